"""Shared by the benchmarks: load by wrk, CPU time and memory of processes, OpenVINO without a server.

The machines are shared and noisy: only ratios within one run mean something. So compared cases are measured in turns,
round by round.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
    """The result of a load: requests/s, the server's CPU milliseconds per request, and the cores that wrk used.

    `failed` is the part of the requests that got no 200; only a load that may fail has one.
    """

    rate: float
    cpu: float
    taken: float = 0.0
    median: float = 0.0
    p99: float = 0.0
    failed: float = 0.0


def cpu_seconds(pids: Sequence[int]) -> float:
    """Sum the CPU time of processes with all their threads, from the scheduler's own nanoseconds."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def pss_megabytes(pids: Sequence[int]) -> float:
    """Sum the memory of processes, shared pages divided among those that share them."""
    sizes = (
        re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE) for pid in pids
    )
    return sum(int(size[1]) for size in sizes) / 1024


def load(
    service,
    directory: Path,
    path: str,
    body: bytes,
    connections: int,
    seconds: float,
    may_fail: bool = False,
    **headers: str,
) -> Load:
    """Have wrk POST a body repeatedly; every response must be 200, unless the load may fail."""
    (directory / "body").write_bytes(body)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    script = directory / "post.lua"
    script.write_text(
        f"local file = io.open({json.dumps(str(directory / 'body'))}, 'rb')\n"
        "wrk.method = 'POST'\nwrk.body = file:read('*a')\n"
        + "".join(f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}\n" for name, value in fields.items())
    )
    workers = service.workers()
    before, started, own = cpu_seconds(workers), time.monotonic(), _children_seconds()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "60s", "-s", script,
         f"http://127.0.0.1:{service.port}{path}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    elapsed, spent = time.monotonic() - started, cpu_seconds(workers) - before
    requests = int(re.search(r"(\d+) requests in", done.stdout)[1])
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    cut = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", done.stdout)
    failed = int(refused[1]) if refused else 0
    failed += sum(map(int, cut.groups())) if cut else 0
    assert may_fail or not failed, done.stdout
    latencies = (
        _milliseconds(re.search(rf"^ +{percent}% +(\S+)", done.stdout, re.MULTILINE)[1]) for percent in (50, 99)
    )
    return Load(
        requests / elapsed, spent / requests * 1e3, (_children_seconds() - own) / elapsed, *latencies, failed / requests
    )


def _milliseconds(text: str) -> float:
    """Read a time as wrk writes it."""
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]


def _children_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def infer_bare(model, arrays: dict, processes: int, seconds: float) -> Load:
    """Only infer with a compiled model, in forked processes; return the sum of their inferences."""
    reading, writing = os.pipe()
    for _ in range(processes):
        if os.fork() == 0:
            model.open(lambda: None)
            count, started, deadline = 0, time.process_time(), time.monotonic() + seconds
            while time.monotonic() < deadline:
                model.infer(arrays)
                count += 1
            os.write(writing, f"{count} {time.process_time() - started}\n".encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        results = [(int(count), float(spent)) for count, spent in map(str.split, lines)]
    for _ in range(processes):
        os.wait()
    total = sum(count for count, _ in results)
    return Load(total / seconds, sum(spent for _, spent in results) / total * 1e3)


def mean(loads: Sequence[Load]) -> Load:
    """Average the rounds of a case."""
    return Load(*(sum(values) / len(values) for values in zip(*loads, strict=True)))


def machine() -> str:
    name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{name[1] if name else 'unknown CPU'}, {cores()} cores"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def arguments(*defaults: int) -> list[int]:
    """Return the numbers on the command line, or their defaults; `--help` prints the benchmark's docstring."""
    help_of = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=help_of, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help=f"by default: {' '.join(map(str, defaults)) or 'none'}")
    given = parser.parse_args().numbers
    if len(given) > len(defaults):
        parser.error(f"got {len(given)} numbers, expected at most {len(defaults)}")
    return [*given, *defaults[len(given) :]]


@contextlib.contextmanager
def benchmark(seconds: int, rounds: int) -> Iterator[tuple[Path, int, int]]:
    """Yield a directory, and the seconds and rounds of the command line or these defaults; print all but the first."""
    seconds, rounds = arguments(seconds, rounds)
    print(f"{machine()}; {rounds} rounds of {seconds} s\n")
    with tempfile.TemporaryDirectory() as name:
        yield Path(name), seconds, rounds


def print_header(*columns: str) -> None:
    print_row(*columns)
    print("|---" * len(columns) + "|")


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def pack_array(array: np.ndarray, name: str = "x") -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request with an FP32 array as binary data, for binary output."""
    return pack({"name": name, "datatype": "FP32", "shape": list(array.shape)}, array.tobytes())


def pack(tensor: dict, data: bytes) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request with one input as binary data, for binary output."""
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {"Inference_Header_Content_Length": str(len(head))}
