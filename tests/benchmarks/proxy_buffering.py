"""The cost of nginx in front of the service, and of reading a request whole before passing it on.

    PYTHONPATH=tests/helpers python tests/benchmarks/proxy_buffering.py [SECONDS [ROUNDS]]

The files of deploy/nginx with `proxy_request_buffering` on, as they are, on with `client_body_buffer_size 32m`, and
off, against the service alone: CPU time of nginx and the workers per request, and its time on one connection, both in
the best round, for 4 floats as JSON, 602 KB and 20 MB in binary. Then slow clients, each of which has sent half of a
4 MB body: the workers' memory for them, and the time of a small request meanwhile. Needs nginx and wrk (Debian: apt-get
install nginx wrk).
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
from measure import arguments, load, machine, print_header, print_row, pss_megabytes
from raw_http import RELU, head
from service import serve

SLOW_CLIENTS, SLOW_BYTES = 32, 4_000_000
CASES = {
    "4 floats, JSON": ("/v2/models/relu/infer", RELU, {}),
    "602 KB": ("/v2/models/vector/infer", bytes(602_112), {"Inference_Header_Content_Length": "0"}),
    "20 MB": ("/v2/models/vector/infer", bytes(20_000_000), {"Inference_Header_Content_Length": "0"}),
}


def through(proxy, service):
    """Return a target for `load` whose CPU time is that of nginx and the workers."""
    return SimpleNamespace(port=proxy.port, workers=lambda: proxy.workers() + service.workers())


def time_requests(running, seconds):
    """Return the milliseconds of small requests, sent one after another."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        assert running.infer("relu", RELU).status == 200
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure_slow_clients(running, service, seconds):
    """Return the workers' MB for slow clients, and the times of small requests without and with them."""
    alone, before = time_requests(running, seconds), pss_megabytes(service.workers())
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW_CLIENTS):
            connection = stack.enter_context(running.connect())
            connection.sendall(head("POST", "/v2/models/vector/infer", f"Content-Length: {SLOW_BYTES}"))
            connection.sendall(bytes(SLOW_BYTES // 2))
        beside = time_requests(running, seconds)
        taken = pss_megabytes(service.workers()) - before
    return taken, alone, beside


def p99(times):
    return np.percentile(times, 99)


def main():
    seconds, rounds = arguments(3, 3)
    directory = Path(tempfile.mkdtemp())
    config = model_zoo.save_all(directory, {"relu": model_zoo.relu(), "vector": model_zoo.relu((-1,))})
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
        print_header("body in and out", "buffering", "CPU ms", "time ms")
        for case, (path, body, headers) in CASES.items():
            found = {way: [] for way in ways}
            for _ in range(rounds):
                for way, target in ways.items():
                    found[way].append(load(target, directory, path, body, 1, seconds, **headers))
            for way, loads in found.items():
                cpu, rate = min(item.cpu for item in loads), max(item.rate for item in loads)
                print_row(case, way, f"{cpu:.2f}", f"{1e3 / rate:.2f}")
        print(f"\n{SLOW_CLIENTS} slow clients:\n")
        print_header("buffering", "MB of the workers", "ms alone", "ms beside", "p99 alone", "p99 beside")
        for way, running in (("on", on), ("off", off)):
            taken, alone, beside = measure_slow_clients(running, service, seconds)
            medians, last = ([figure(times) for times in (alone, beside)] for figure in (statistics.median, p99))
            print_row(way, f"{taken:.0f}", *(f"{figure:.2f}" for figure in (*medians, *last)))


if __name__ == "__main__":
    main()
