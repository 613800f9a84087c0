"""Trying models in a throwaway process, so that one that crashes or hangs does not take the arbiter with it.

The process is started anew and not forked: what OpenVINO has in the arbiter is nothing to try a model on.
It reads its tasks as one JSON document and writes a line of JSON at every step, so that it is known which model it was
at, and at what, when it dies or falls silent.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ovms_rest.errors import LoadError
from ovms_rest.models.compilation import Compilation
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.options import ModelOptions
from ovms_rest.models.runtime import DEFAULT_LIMITS, NO_OPTIONS, Model

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """A version to be tried: its directory or file, and what is to be done with it."""

    path: Path
    compilation: Compilation
    options: ModelOptions = NO_OPTIONS
    limits: ImageLimits = DEFAULT_LIMITS


class Proof(NamedTuple):
    """What came of a try: why the model must not serve, None when it may; seconds and bytes of memory that it took."""

    reason: str | None
    seconds: float = 0.0
    memory: int = 0


_STOPPED = Proof("was not tried to the end, as the service ends")
_STOP_POLL_SECONDS = 0.2


def prove(
    tasks: Sequence[Task],
    timeout: float,
    begin: Callable[[int], None] = lambda index: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Proof]:
    """Read, compile and infer every model once in a throwaway process.

    Each model has `timeout` seconds; `begin` is called with its place when its turn comes. One that ends the process
    gets another try in a process of its own before it is blamed, for the damage may have been done by a model before
    it. When `stop` says so, the rest is not tried.
    """
    proofs: list[Proof] = []
    while len(proofs) < len(tasks):
        if stop():
            return proofs + [_STOPPED] * (len(tasks) - len(proofs))
        done = len(proofs)

        def begin_one(index: int, done: int = done) -> None:
            begin(done + index)

        proofs += _attempt(tasks[done:], timeout, begin_one, stop)
    return proofs


def _attempt(
    tasks: Sequence[Task], timeout: float, begin: Callable[[int], None], stop: Callable[[], bool]
) -> list[Proof]:
    """Start a process and try models until all are through or one fails it; return the results, of one at least."""
    command = [sys.executable, "-m", "ovms_rest.models.proving"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            return _watch(process, tasks, timeout, begin, stop)
        finally:
            process.kill()


def _watch(
    process: subprocess.Popen[bytes],
    tasks: Sequence[Task],
    timeout: float,
    begin: Callable[[int], None],
    stop: Callable[[], bool],
) -> list[Proof]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(orjson.dumps(tasks, default=str))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it is dead, which the end of its output will tell
    output = select.poll()
    output.register(process.stdout, select.POLLIN)
    proofs: list[Proof] = []
    begin(0)
    step, rest, deadline = "starting", b"", time.monotonic() + timeout
    while len(proofs) < len(tasks):
        if not output.poll(min(_STOP_POLL_SECONDS, max(0.0, deadline - time.monotonic())) * 1000):
            if stop():
                proofs.append(_STOPPED)
                break
            if time.monotonic() >= deadline:
                proofs.append(Proof(f"did not come up in {timeout:g} s; it was stopped while {step}"))
                break
            continue
        received = os.read(process.stdout.fileno(), 65536)
        if not received:
            if not proofs:
                end = _describe_end(process.wait())
                proofs.append(Proof(f"ended the process that tried it with {end} while {step}"))
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in map(orjson.loads, lines):
            if "step" in line:
                step = line["step"]
            else:
                proofs.append(Proof(**line))
                step, deadline = "starting", time.monotonic() + timeout
                if len(proofs) < len(tasks):
                    begin(len(proofs))
    return proofs


def _describe_end(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def main() -> None:
    """Try the models that come on the standard input: the throwaway process."""
    # Not to outlive an arbiter that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a model or plugin prints is no answer

    def answer(**message: str | float | None) -> None:
        os.write(answers, orjson.dumps(message) + b"\n")

    for task in map(_decode, orjson.loads(sys.stdin.buffer.read())):
        started, before = time.monotonic(), _resident()
        try:
            answer(step="being read")
            model = Model("", 1, task.path, task.compilation, task.options, task.limits)
            answer(step="being compiled")
            model.compile()
            answer(step="inferring for the first time")
            model.open(lambda: None)
            memory = max(0, _resident() - before)
            del model
        except LoadError as error:
            answer(reason=str(error))
        else:
            answer(reason=None, seconds=time.monotonic() - started, memory=memory)
    os._exit(0)  # nothing is left to do, and OpenVINO takes a while to tear down


def _decode(task: dict[str, Any]) -> Task:
    return Task(
        Path(task["path"]),
        Compilation(**task["compilation"]),
        ModelOptions(**task["options"]),
        ImageLimits(**task["limits"]),
    )


def _resident() -> int:
    """Return the bytes of memory that this process has resident (proc(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
