"""Minutes of mixed clients, during which nothing may fail, leak a descriptor or grow.

    PYTHONPATH=tests/helpers python tests/benchmarks/soak.py [--seconds 180] [--workers 2] [--reload] [--control]
        [--kill]
    PYTHONPATH=tests/helpers python tests/benchmarks/soak.py --shapes [--seconds 180] [--workers 2] [--limit 0]

The first quarter of the time warms up. After it and at the end, descriptors and memory of the workers are compared,
without clients. `--reload` sends SIGHUP at intervals, `--control` unloads and loads a model that no client uses;
neither may cost a request. `--kill` kills a worker at intervals, which may cost its requests, so connections may end.
Exits with 1 on any failure or growth.

`--shapes` infers with random shapes instead, and prints the largest memory of a worker's own. `--limit` is the limit in
MiB above which workers are replaced, 0 for none; no request may fail.
"""

import argparse
import collections
import contextlib
import http.client
import json
import multiprocessing
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from os import kill
from pathlib import Path

import model_zoo
import numpy as np
import slow_models
from measure import pss_megabytes
from raw_http import LIVE, RELU, RELU_PATH, head, infer, parse_all, post, post_chunked, receive, receive_rest
from rude_clients import dribble, read_slowly, vanish
from service import open_files, serve, write_config

from ovms_rest.host.process_memory import own_bytes

# Allowed growth of a worker's memory: in megabytes, and as a fraction of its first size.
GROWTH = 8, 0.1
PATIENCE = 120


class Failure(Exception):  # noqa: N818
    """A response that a client must not get."""


class Context:
    """State that the clients share; with `excused`, connections may end without a response."""

    def __init__(self, service, excused: bool) -> None:
        self.service, self.excused = service, excused
        self.stopping = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.excuses = 0
        self.failures: list[str] = []

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.service.port), timeout=PATIENCE)

    def run(self, client: Callable[["Context", random.Random], None], number: int) -> None:
        """Run a client repeatedly."""
        name, generator = client.__name__, random.Random(number)
        while not self.stopping.is_set():
            try:
                client(self, generator)
                self.counts[name] += 1
            except Exception as error:
                if self.excused and isinstance(error, ConnectionError):
                    self.excuses += 1
                    time.sleep(0.05)
                    continue
                place = traceback.extract_tb(error.__traceback__)[-1]
                self.failures.append(f"{name}: {error!r} at {Path(place.filename).name}:{place.lineno}")
                if len(self.failures) > 50:
                    self.stopping.set()


def pack_binary(model, name, array):
    """Return the path, the body and the header field of an inference with binary data, in and out."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return f"/v2/models/{model}/infer", text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}"


def random_array(generator, *shape):
    return np.random.default_rng(generator.randrange(2**32)).standard_normal(shape, "f4")


def exchange(context, data, method="POST"):
    """Send a request on a new connection; return the response."""
    with context.connect() as connection:
        connection.sendall(data)
        return receive(connection, method)


def check(answer, condition: bool = True, status: int = 200) -> None:
    if answer.status != status or not condition:
        raise Failure(f"{answer.status} {answer.headers} {answer.body[:200]!r}")


def is_canceled(answer) -> bool:
    """Return whether a queued inference was cancelled because its client had closed its sending side."""
    return (answer.status, answer.headers.get("connection")) == (503, "close") and b"cancels the request" in answer.body


# --- Clients: each function is one turn and is repeated


def steady(context, generator):
    """Infer on a kept-alive connection, with numbers of this client alone."""
    with context.connect() as connection:
        for _ in range(generator.randrange(1, 500)):
            data = [generator.randrange(-1000, 1000) for _ in range(4)]
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}
            connection.sendall(infer("relu", {"inputs": [tensor]}))
            answer = receive(connection, "POST")
            check(answer, answer.json().get("outputs", [{}])[0].get("data") == [max(item, 0) for item in data])
            if answer.headers.get("connection") == "close" or context.stopping.is_set():
                return


def binary(context, generator):
    """Infer with large tensors, in a body of known size or in chunks."""
    array = random_array(generator, generator.randrange(1, 60_000), 4)
    path, body, field = pack_binary("relu", "x", array)
    if generator.random() < 0.5:
        data = post(path, body, field)
    else:
        size = generator.randrange(1000, 300_000)
        data = post_chunked(path, *(body[at : at + size] for at in range(0, len(body), size)), fields=(field,))
    answer = exchange(context, data)
    check(answer, answer.body.endswith(np.maximum(array, 0).tobytes()))


def splitting(context, generator):
    """Infer with a pipeline that splits a request and gathers its shards."""
    array = random_array(generator, generator.randrange(1, 40), 1, 4)
    answer = exchange(context, post(*pack_binary("parts", "in", array)))
    check(answer, answer.body.endswith(np.maximum(array, 0).tobytes()))


def expecting(context, generator):
    with context.connect() as connection:
        data = post(RELU_PATH, RELU, "Expect: 100-continue", "Connection: close")
        connection.sendall(data[: -len(RELU)])
        interim = connection.recv(1000)
        if interim != b"HTTP/1.1 100 Continue\r\n\r\n":
            raise Failure(f"{interim!r}")
        connection.sendall(RELU)
        check(receive(connection, "POST"))


def pipelining(context, generator):
    """Send several requests together, cut anywhere, and expect the responses in order."""
    kinds = {"relu": post(RELU_PATH, RELU), "ovms_rest": head("GET", "/v2"), "filling": None}
    names = [generator.choice(list(kinds)) for _ in range(generator.randrange(2, 20))]
    fill = infer("filling", slow_models.fill(1.5, 1000))
    data = b"".join(kinds[name] or fill for name in names)
    with context.connect() as connection:
        start = 0
        while start < len(data):
            size = generator.randrange(1, 2000)
            connection.sendall(data[start : start + size])
            start += size
        if ended := generator.random() < 0.5:
            connection.shutdown(socket.SHUT_WR)
        for name in names:
            answer = receive(connection, "GET" if name == "ovms_rest" else "POST")
            if ended and is_canceled(answer):
                return
            check(answer, f'"{name}"'.encode() in answer.body[:100])
            if answer.headers.get("connection") == "close":
                return


def slow_inference(context, generator):
    steps = generator.randrange(1000, slow_models.SLOW)
    answer = exchange(context, infer("counting", slow_models.count(steps)))
    check(answer, answer.json().get("outputs", [{}])[0].get("data") == [steps])


def slow_reader(context, generator):
    read_slowly(context.connect, generator)


def dribbling(context, generator):
    dribble(context.connect)


def idle(context, generator):
    """Keep connections idle."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(context.connect()) for _ in range(50)]
        time.sleep(generator.random() * 3)
        for connection in connections:
            with contextlib.suppress(ConnectionError):  # the server may have closed it meanwhile
                connection.sendall(LIVE[: generator.randrange(1, len(LIVE))])


def probing(context, generator):
    """Request health and metadata, as monitors do."""
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/relu", "/v2/models/counting/ready"):
        check(context.service.get(path))
    time.sleep(0.05)


HOSTILE = [
    (b"BROKEN\r\n\r\n", (400,)),
    (b"GET /v2 HTTP/1.1\r\n\r\n", (400,)),
    (b"GET /v2 HTTP/1.1\nHost: x\n\n", (400,)),
    (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", (400,)),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
    (head("POST", RELU_PATH, "Content-Length: 5", "Transfer-Encoding: chunked"), (400,)),
    (head("POST", RELU_PATH, "Content-Length: 5", "Content-Length: 6"), (400,)),
    (head("POST", RELU_PATH, "Content-Length: 99999999999"), (413,)),
    (head("POST", RELU_PATH, "Transfer-Encoding: gzip"), (501,)),
    (head("POST", RELU_PATH, "Transfer-Encoding: chunked") + b"zz\r\n", (400,)),
    (head("POST", RELU_PATH, "Transfer-Encoding: chunked") + b"5\r\nabcdefgh", (400,)),
    (head("POST", RELU_PATH, "Content-Length: 5", "Expect: tea"), (417,)),
    (head("GET", "/" + "a" * 9000), (414,)),
    (head("GET", "/v2", "A: " + "b" * 9000), (431,)),
    (head("GET", "/v2", *["A: b"] * 150), (431,)),
    (post(RELU_PATH, b"{broken"), (400,)),
    (post(RELU_PATH, b"[" * 100_000), (400,)),
    (post(RELU_PATH, RELU)[:-9], (400,)),
]


def hostile(context, generator):
    """Send invalid requests, some with more bytes after them."""
    data, statuses = generator.choice(HOSTILE)
    with context.connect() as connection:
        connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            if generator.random() < 0.3 and data[-9:] not in RELU:
                connection.sendall(bytes(generator.randrange(256) for _ in range(1000)) * 100)
            connection.shutdown(socket.SHUT_WR)
        answers = parse_all(receive_rest(connection))
        if not answers and context.excused:
            context.excuses += 1
            return
        if answers and is_canceled(answers[0]):
            return
        if not answers or answers[0].status not in statuses or list(answers[0].json()) != ["error"]:
            raise Failure(f"{answers[:1]} to {data[:200]!r}")


def vanishing(context, generator):
    vanish(context.connect, generator)
    time.sleep(0.005)


# Clients with the number of their threads.
CLIENTS = {steady: 4, binary: 1, splitting: 1, expecting: 1, pipelining: 2, slow_inference: 1, slow_reader: 2}
CLIENTS |= {dribbling: 1, idle: 1, probing: 1, hostile: 1, vanishing: 2}


def run_tritonclient(port, seconds, excused, results):
    """Infer with Triton's client library, in a process of its own."""
    from geventhttpclient.response import HTTPConnectionClosed
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    count, failures, deadline = 0, [], time.monotonic() + seconds
    client = http.InferenceServerClient(f"127.0.0.1:{port}", connection_timeout=PATIENCE, network_timeout=PATIENCE)
    array = np.random.default_rng(0).standard_normal((100, 4), np.float32)
    while time.monotonic() < deadline:
        tensor = http.InferInput("x", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array, binary_data=count % 2 == 0)
        output = http.InferRequestedOutput("y", binary_data=count % 3 == 0)
        try:
            result = client.infer("relu", [tensor], outputs=[output])
            if not np.array_equal(result.as_numpy("y"), np.maximum(array, 0)):
                failures.append("wrong result")
            count += 1
        except (OSError, HTTPConnectionClosed, InferenceServerException) as error:
            if not excused:
                failures.append(repr(error))
            time.sleep(0.05)
    results.put((count, failures))


# --- The run


def disturb(context, number, pause):
    """Reload the service or kill a worker at intervals."""
    while not context.stopping.wait(pause):
        context.counts[number.name] += 1
        if number is signal.SIGHUP:
            context.service.signal(number)
        elif workers := context.service.workers():
            with contextlib.suppress(ProcessLookupError):
                kill(random.choice(workers), number)


def control(context, pause):
    """Unload and load a model in turns."""
    what = "unload"
    while not context.stopping.wait(pause):
        try:
            answer = context.service.request("POST", f"/v2/repository/models/spare/{what}")
            check(answer)
            context.counts[what] += 1
            what = "load" if what == "unload" else "unload"
        except Exception as error:
            if not (context.excused and isinstance(error, ConnectionError | http.client.HTTPException)):
                context.failures.append(f"{what}: {error!r}")


def add_to(config):
    """Add a model that no client uses, and a pipeline, to a config."""
    root = json.loads(config.read_text())
    root["model_config_list"].append({"config": {"name": "spare", "base_path": "relu"}})
    source = {"node_name": "request", "data_item": "in"}
    node = {"name": "n", "type": "DL model", "model_name": "relu", "inputs": [{"x": source}]}
    node["outputs"] = [{"data_item": "y", "alias": "y"}]
    output = {"out": {"node_name": "n", "data_item": "y"}}
    parts = {"name": "parts", "inputs": ["in"], "nodes": [node], "outputs": [output], "demultiply_count": -1}
    config.write_text(json.dumps({**root, "pipeline_config_list": [parts]}))


def run_clients(context, seconds, reload, loads):
    """Run all clients for some seconds, and wait for their end."""
    context.stopping.clear()
    # A client library that gets a response with Connection: close while it sends the next request reports a failure.
    forgiving = context.excused or reload or loads
    queue = multiprocessing.get_context("spawn").Queue()
    triton = multiprocessing.get_context("spawn").Process(
        target=run_tritonclient, args=(context.service.port, seconds, forgiving, queue)
    )
    triton.start()
    threads = [
        threading.Thread(target=context.run, args=(client, 100 * place + number))
        for place, (client, count) in enumerate(CLIENTS.items())
        for number in range(count)
    ]
    if reload:
        threads.append(threading.Thread(target=disturb, args=(context, signal.SIGHUP, 11)))
    if loads:
        threads.append(threading.Thread(target=control, args=(context, 3)))
    if context.excused:
        threads.append(threading.Thread(target=disturb, args=(context, signal.SIGKILL, 7)))
    for thread in threads:
        thread.start()
    context.stopping.wait(seconds)
    context.stopping.set()
    for thread in threads:
        thread.join(2 * PATIENCE)
        if thread.is_alive():
            context.failures.append("a client is hanging")
    count, failures = queue.get(timeout=PATIENCE)
    triton.join()
    context.counts["tritonclient"] += count
    context.failures += [f"tritonclient: {failure}" for failure in failures]


def measure(context, workers):
    """Return the workers' descriptors and megabytes, once they have closed all connections."""
    context.service.wait_for(lambda: len(context.service.workers()) == workers)
    deadline, last = time.monotonic() + 30, {}
    while time.monotonic() < deadline:  # it takes seconds to close refused and vanished clients
        found = {pid: len(open_files(pid)) for pid in context.service.workers()}
        if found == last and len(set(found.values())) == 1:
            break
        last = found
        time.sleep(3)
    return {pid: (len(open_files(pid)), pss_megabytes([pid])) for pid in context.service.workers()}


def print_measures(before, after):
    """Print what `measure` found once the service was warm, and at the end."""
    for moment, found in (("warm", before), ("end", after)):
        print(f"{moment}: " + ", ".join(f"{pid} {opened} fd {size:.1f} MB" for pid, (opened, size) in found.items()))


def print_failures(context):
    """Print the failures with their counts; return the exit code."""
    print(f"{len(context.failures)} failures")
    for failure, count in collections.Counter(context.failures).most_common(20):
        print(f"  {count} x {failure}")
    return 1 if context.failures else 0


def compare(context, before, after, steady_workers):
    """Record growth as failures."""
    count = min(opened for opened, _ in before.values())
    megabytes = max(size for _, size in before.values())
    for pid, (opened, size) in after.items():
        if opened > count:
            context.failures.append(f"worker {pid} has {opened} descriptors, {count} before")
        if size > megabytes + max(GROWTH[0], GROWTH[1] * megabytes):
            context.failures.append(f"worker {pid} has {size:.1f} MB, at most {megabytes:.1f} before")
    if steady_workers and set(before) != set(after):
        context.failures.append(f"workers were replaced: {sorted(before)} by {sorted(after)}")


def shapes(context, generator):
    """Infer with pictures of random sizes on a kept-alive connection."""
    with context.connect() as connection:
        while not context.stopping.is_set():
            shape = [1, 3, generator.randrange(16, 600), generator.randrange(16, 600)]
            connection.sendall(post(*pack_binary("growing", "x", np.zeros(shape, np.float32))))
            answer = receive(connection, "POST")
            check(answer)
            context.counts["inferences"] += 1
            if answer.headers.get("connection") == "close":
                return


def run_shapes(seconds: int, workers: int, limit: int) -> int:
    """Infer with random shapes, watch the workers' memory, and print a report."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model_zoo.save(slow_models.growing(), directory / "growing")
        config = write_config(directory, {"name": "growing", "base_path": "growing"})
        variables = {"OVMS_REST_MAX_WORKER_MEMORY_BYTES": str(limit * 2**20)}
        with serve(directory, "-w", str(workers), config=config, **variables) as service:
            service.wait_for_workers(workers)
            context = Context(service, excused=False)
            threads = [threading.Thread(target=context.run, args=(shapes, number)) for number in range(2 * workers)]
            for thread in threads:
                thread.start()
            peaks: dict[int, float] = {}
            sums, most, end = [], 0, time.monotonic() + seconds
            while time.monotonic() < end and not context.stopping.is_set():
                sizes = {}
                for pid in service.workers():
                    with contextlib.suppress(OSError):
                        sizes[pid] = own_bytes(pid) / 2**20
                        peaks[pid] = max(peaks.get(pid, 0.0), sizes[pid])
                sums.append(sum(sizes.values()))
                most = max(most, len(sizes))
                time.sleep(0.25)
            context.stopping.set()
            for thread in threads:
                thread.join(2 * PATIENCE)
            replaced = service.log.count("its successor was ready")
    parts = [max(sums[start : start + len(sums) // 10]) for start in range(0, len(sums), max(len(sums) // 10, 1))]
    inferences = context.counts["inferences"]
    print(f"{seconds} s, {workers} workers, limit {limit} MiB: {inferences} inferences of random shapes")
    print(f"{replaced} workers replaced, at most {most} workers at a time")
    print(f"memory of its own: at most {max(peaks.values()):.0f} MiB in one worker, {max(sums):.0f} MiB in all of them")
    print("maximum in all of them, in each tenth of the time: " + ", ".join(f"{part:.0f}" for part in parts[:10]))
    return print_failures(context)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seconds", 180), ("workers", 2), ("limit", 0)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    for name in ("reload", "control", "kill", "shapes"):
        arguments.add_argument(f"--{name}", action="store_true")
    chosen = arguments.parse_args()
    if chosen.shapes:
        return run_shapes(chosen.seconds, chosen.workers, chosen.limit)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = slow_models.save(directory)
        add_to(config)
        with serve(directory, "-w", str(chosen.workers), config=config) as service:
            service.wait_for(lambda: len(service.workers()) == chosen.workers)
            context = Context(service, chosen.kill)
            run_clients(context, chosen.seconds // 4, chosen.reload, chosen.control)
            before = measure(context, chosen.workers)
            run_clients(context, chosen.seconds - chosen.seconds // 4, chosen.reload, chosen.control)
            after = measure(context, chosen.workers)
            compare(context, before, after, not (chosen.reload or chosen.control or chosen.kill))
            for text in ("Traceback", "WORKER TIMEOUT", "error on a connection"):
                if text in service.log:
                    context.failures.append(f"the log has {text!r}: {service.log[service.log.index(text) :][:2000]}")
    print(f"{chosen.seconds} s, {chosen.workers} workers, {sum(context.counts.values())} turns of clients:")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(context.counts.items())))
    if chosen.kill:
        print(f"{context.excuses} connections ended without a response")
    print_measures(before, after)
    return print_failures(context)


if __name__ == "__main__":
    sys.exit(main())
