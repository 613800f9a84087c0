"""How the service scales with its workers: CPU per request, memory, the shared tables, reloads, and 5,000 connections.

    PYTHONPATH=tests/helpers python tests/benchmarks/scale.py [SECONDS [ROUNDS]] [PART ...]

PART is `workers`, `tables`, `models` or `connections`; without one, all run. The cores of this machine stand for those
of a larger one: the service believes that it has a core for each worker, all workers are forked, and two connections
load two of them at a time. So the figures include what the other workers cost, but not what a larger machine adds
(slower memory on a remote node, caches shared by more cores). Needs wrk.
"""

import contextlib
import itertools
import resource
import signal
import socket
import statistics
import sys
import time
from pathlib import Path

import model_zoo
from counting import fill, measure
from measure import benchmark, cpu_seconds, load, mean, print_header, print_row, pss_megabytes
from raw_http import RELU, RELU_PATH, post
from service import receive, serve, write_config
from worker_rows import make_rows

from ovms_rest.shared_memory.counters import Counters
from ovms_rest.shared_memory.table import SLOTS
from ovms_rest.worker.balance import Balance

WORKERS = (2, 4, 8, 16, 32, 64)
LOADED = 2
MODELS = 200
CONNECTIONS = 5000
CONNECTING_WORKERS = 8


def serve_on(directory, workers, config, *arguments, **variables):
    """Serve with that number of workers, and make the service believe that it has as many cores."""
    directory.mkdir()
    settings = directory / "settings.py"
    settings.write_text(
        "import ovms_rest.host.cores\n"
        f"ovms_rest.host.cores.usable_cores = lambda: {workers}\n"
        "from ovms_rest.arbiter.gunicorn_settings import *\n"
    )
    arguments = ("-c", str(settings), "-w", str(workers), *arguments)
    return serve(directory, *arguments, config=config, OVMS_REST_METRICS_ENABLE="true", **variables)


def compare_workers(directory, seconds, rounds):
    """Print what a request, an idle second, a page of metrics and the memory cost, by the number of workers."""
    config = model_zoo.save_all(directory, {"relu": model_zoo.relu()})
    loads, idle, pages, memory, starts = ({count: [] for count in WORKERS} for _ in range(5))
    for _ in range(rounds):
        for count in WORKERS:
            begun = time.monotonic()
            with serve_on(directory / f"{count}-{len(loads[count])}", count, config) as service:
                service.wait_for_workers(count)
                starts[count].append(time.monotonic() - begun)
                memory[count].append(pss_megabytes([service.process.pid, *service.workers()]))
                idle[count].append(idle_share(service, seconds))
                loads[count].append(load(service, directory, RELU_PATH, RELU, LOADED, seconds))
                pages[count].append(median_milliseconds(lambda service=service: service.get("/metrics")))
    few = mean(loads[WORKERS[0]])
    per_worker = slope({count: statistics.median(values) for count, values in memory.items()})
    print_header(
        "workers", "requests/s", "CPU us/request", f"CPU / {WORKERS[0]} workers", "idle, cores", "/metrics, ms",
        "PSS, MB", "ready after, s",
    )  # fmt: skip
    for count in WORKERS:
        done = mean(loads[count])
        print_row(
            count, f"{done.rate:.0f}", f"{done.cpu * 1e3:.0f}", f"{done.cpu / few.cpu:.2f}",
            f"{statistics.median(idle[count]):.4f}", f"{statistics.median(pages[count]):.1f}",
            f"{statistics.median(memory[count]):.0f}", f"{statistics.median(starts[count]):.1f}",
        )  # fmt: skip
    print(f"\nEach further worker takes {per_worker:.1f} MB (PSS, a model of four floats).\n")


def idle_share(service, seconds):
    """Return how many cores all workers use while no request comes."""
    before, begun = cpu_seconds(service.workers()), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(service.workers()) - before) / (time.monotonic() - begun)


def median_milliseconds(call, times=9):
    """Return the median time of a call."""
    taken = []
    for _ in range(times):
        begun = time.monotonic()
        assert call().status == 200
        taken.append(time.monotonic() - begun)
    return statistics.median(taken) * 1e3


def slope(values):
    """Return the growth of values by their numbers, by least squares."""
    return statistics.linear_regression(list(values), list(values.values())).slope


def compare_tables(seconds, rounds):
    """Print what a look at the rows of all workers costs, in a loop, by their number."""
    print_header("rows", "read the worker table, us", "choose for a connection, us", "look for idle workers, us",
                 "sum a model's counters, us")  # fmt: skip
    for count in WORKERS:
        _, rows = make_rows(*[(1, 0)] * count, cores=count, size=SLOTS)
        balance = Balance(rows[0], 1000)
        counters = Counters(SLOTS).of("m", "1")
        fill(counters, count)
        calls = {
            "read": lambda i, rows=rows: rows[0].all_workers(),
            "choose": lambda i, balance=balance: balance.choose(1, False),
            "idle": lambda i, balance=balance: balance.is_another_better_off(1, 1, 0.0),
            "sum": lambda i, counters=counters: counters.read(),
        }
        figures = [min(measure(call, seconds / 10) for _ in range(rounds)) / 1000 for call in calls.values()]
        print_row(count, *(f"{figure:.1f}" for figure in figures))
    print()


def reload_models(directory, rounds):
    """Print the time and the CPU time of starts and reloads with many models."""
    paths = [model_zoo.save(model_zoo.relu((-1, 4 + number)), directory / f"m{number}") for number in range(MODELS)]
    config = write_config(directory, *({"name": path.name, "base_path": str(path)} for path in paths))
    print_header("workers", "start, s", "reload without a change, s", "reload of one changed model, s",
                 "CPU of that, s", "CPU of each new worker, s", "PSS, MB")  # fmt: skip
    versions = itertools.count(2)
    for count in WORKERS[:: len(WORKERS) - 1]:
        begun = time.monotonic()
        with serve_on(
            directory / f"service-{count}", count, config, OVMS_REST_MODEL_CONTROL="all",
            OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0",
        ) as service:  # fmt: skip
            service.wait_for_workers(count)
            start = time.monotonic() - begun
            unchanged, changed, spent, each = [], [], [], []
            for _ in range(rounds):
                unchanged.append(reload(service, count, 200)[0])
                model_zoo.save(model_zoo.relu(), paths[0], next(versions))
                seconds, used, of_workers = reload(service, count, 201)
                changed.append(seconds)
                spent.append(used)
                each.append(of_workers / count)
            memory = pss_megabytes([service.process.pid, *service.workers()])
        print_row(count, f"{start:.1f}", *(f"{statistics.median(of):.2f}" for of in (unchanged, changed, spent, each)),
                  f"{memory:.0f}")  # fmt: skip
    print()


def reload(service, count, status):
    """Reload; return the seconds until the new workers serve, and the CPU time of all processes and of the workers."""
    arbiter, begun = cpu_seconds([service.process.pid]), time.monotonic()
    response = service.request("POST", "/v1/config/reload", b"")
    assert response.status == status, response.body
    seconds = time.monotonic() - begun
    service.wait_for_workers(count)
    of_workers = cpu_seconds(service.workers())
    return seconds, of_workers + cpu_seconds([service.process.pid]) - arbiter, of_workers


def hold_connections(directory, seconds, rounds):
    """Print what a request costs beside thousands of connections that are kept alive without a request."""
    config = model_zoo.save_all(directory, {"relu": model_zoo.relu()})
    with serve_on(directory / "connections", CONNECTING_WORKERS, config, "--keep-alive", "600") as service:
        service.wait_for_workers(CONNECTING_WORKERS)
        before, results = pss_megabytes(service.workers()), {0: [], CONNECTIONS: []}
        memory = []
        for _ in range(rounds):
            results[0].append(load(service, directory, RELU_PATH, RELU, LOADED, seconds))
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(connect(service)) for _ in range(CONNECTIONS)]
                memory.append(pss_megabytes(service.workers()) - before)
                results[CONNECTIONS].append(load(service, directory, RELU_PATH, RELU, LOADED, seconds))
                for connection in connections:
                    is_kept(connection)
    alone = mean(results[0])
    print_header("other connections", "requests/s", "CPU us/request", "CPU / without", "p99, ms")
    for count, loads in results.items():
        done = mean(loads)
        print_row(count, f"{done.rate:.0f}", f"{done.cpu * 1e3:.0f}", f"{done.cpu / alone.cpu:.2f}", f"{done.p99:.2f}")
    each = statistics.median(memory) / CONNECTIONS * 1024
    print(f"\n{CONNECTING_WORKERS} workers; an idle connection takes {each:.1f} KB.\n")


def connect(service):
    """Return a connection that the service keeps after a response; it gives some away to other workers."""
    while not is_kept(connection := service.connect()):
        connection.close()
    return connection


def is_kept(connection: socket.socket) -> bool:
    """Infer once, which must work; return whether the connection stays open."""
    connection.sendall(post(RELU_PATH, RELU))
    answer = receive(connection, "POST")
    assert answer.status == 200
    return answer.headers.get("connection") != "close"


PARTS = ("workers", "tables", "models", "connections")


def main():
    chosen = [part for part in PARTS if part in sys.argv[1:]] or PARTS
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in PARTS]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * CONNECTIONS)), hard))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with benchmark(3, 3) as (directory, seconds, rounds):
        places = {part: Path(directory, part) for part in chosen}
        for place in places.values():
            place.mkdir()
        calls = {
            "workers": lambda place: compare_workers(place, seconds, rounds),
            "tables": lambda place: compare_tables(seconds, rounds),
            "models": lambda place: reload_models(place, rounds),
            "connections": lambda place: hold_connections(place, seconds, rounds),
        }
        for part, place in places.items():
            calls[part](place)


if __name__ == "__main__":
    main()
