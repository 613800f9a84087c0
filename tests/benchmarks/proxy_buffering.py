"""What nginx costs in front of the service, and whether it should read a request whole before it passes it on.

    PYTHONPATH=tests/helpers python tests/benchmarks/proxy_buffering.py [SECONDS [ROUNDS]]

The files of deploy/nginx with `proxy_request_buffering` on, as they are, on with `client_body_buffer_size 32m`, and
off, against the service alone: CPU time of nginx and the workers for a request, and its time on one connection, each of
the best round, for 4 floats as JSON, 602 KB and 20 MB in binary. Then slow clients, each with half of a 4 MB body
sent: the memory that they take of the workers, and the time of a small request meanwhile. Needs nginx and wrk (Debian:
apt-get install nginx wrk).
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import model_zoo
import nginx
import numpy as np
from measure import arguments, load, machine, pss_megabytes
from raw_http import RELU, head
from service import serve, write_config

SLOW_CLIENTS, SLOW_BYTES = 32, 4_000_000
CASES = {
    "4 floats, JSON": ("/v2/models/relu/infer", RELU, {}),
    "602 KB": ("/v2/models/vector/infer", bytes(602_112), {"Inference_Header_Content_Length": "0"}),
    "20 MB": ("/v2/models/vector/infer", bytes(20_000_000), {"Inference_Header_Content_Length": "0"}),
}


def through(proxy, service):
    """Let the load measure nginx and the workers together."""
    return SimpleNamespace(port=proxy.port, workers=lambda: proxy.workers() + service.workers())


def time_requests(running, seconds):
    """Return the times of small requests, one after another, in milliseconds."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        assert running.infer("relu", RELU).status == 200
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure_slow_clients(running, service, seconds):
    """Return MB of the workers that slow clients take, and the times of small requests without and with them."""
    alone, before = time_requests(running, seconds), pss_megabytes(service.workers())
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW_CLIENTS):
            connection = stack.enter_context(running.connect())
            connection.sendall(head("POST", "/v2/models/vector/infer", f"Content-Length: {SLOW_BYTES}"))
            connection.sendall(bytes(SLOW_BYTES // 2))
        beside = time_requests(running, seconds)
        taken = pss_megabytes(service.workers()) - before
    return taken, alone, beside


def main():
    """Measure in turns and print tables."""
    seconds, rounds = arguments(3, 3)
    directory = Path(tempfile.mkdtemp())
    for name, model in (("relu", model_zoo.relu()), ("vector", model_zoo.relu((-1,)))):
        model_zoo.save(model, directory / name)
    config = write_config(directory, *({"name": name, "base_path": name} for name in ("relu", "vector")))
    in_memory = {"client_body_buffer_size 4m;": "client_body_buffer_size 32m;"}
    unbuffered = {"proxy_request_buffering on;": "proxy_request_buffering off;"}
    bind = ("-b", "127.0.0.1:0", "-b", f"unix:{directory}/data.sock")
    control = f"unix:{directory}/control.sock"
    with (
        serve(directory, "-w", "2", bind=bind, config=config, OVMS_REST_CONTROL_BIND=control) as service,
        nginx.run(directory / "on", directory, "http") as on,
        nginx.run(directory / "memory", directory, "http", **in_memory) as memory,
        nginx.run(directory / "off", directory, "http", **unbuffered) as off,
    ):
        proxies = {"on": on, "on, 32 MB in memory": memory, "off": off}
        ways = {"no nginx": service, **{name: through(proxy, service) for name, proxy in proxies.items()}}
        print(f"{machine()}; {rounds} rounds of {seconds} s, 1 connection\n")
        print("| body in and out | buffering | CPU ms | time ms |\n|---|---|---|---|")
        for case, (path, body, headers) in CASES.items():
            found = {way: [] for way in ways}
            for _ in range(rounds):
                for way, target in ways.items():
                    found[way].append(load(target, directory, path, body, 1, seconds, **headers))
            for way, loads in found.items():
                cpu, rate = min(item.cpu for item in loads), max(item.rate for item in loads)
                print(f"| {case} | {way} | {cpu:.2f} | {1e3 / rate:.2f} |")
        print(f"\n{SLOW_CLIENTS} slow clients:\n")
        print("| buffering | MB of the workers | ms alone | ms beside | p99 alone | p99 beside |")
        print("|---|---|---|---|---|---|")
        for way, running in (("on", on), ("off", off)):
            taken, alone, beside = measure_slow_clients(running, service, seconds)
            figures = [
                statistics.median(alone),
                statistics.median(beside),
                *(np.percentile(t, 99) for t in (alone, beside)),
            ]
            print(f"| {way} | {taken:.0f} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
