"""The rate of other requests while requests that crash their worker, or hang in it, arrive, through nginx.

    PYTHONPATH=tests/helpers python tests/benchmarks/poison.py [SECONDS [ROUNDS]]

Two workers behind nginx; wrk sends inferences to one model, ten requests per second crash another or hang in it: none,
the same inputs each time, or different ones each time. Hangs are measured for fifteen of gunicorn's timeouts, each of
two seconds instead of 30. Needs wrk and nginx (Debian: apt-get install wrk nginx).
"""

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import crashing_nodes
import model_zoo
import nginx
from measure import benchmark, load, mean, print_header, print_row
from raw_http import RELU, RELU_PATH
from service import serve

PER_SECOND = 10
CONNECTIONS = 4
TIMEOUT_SECONDS = 2
HANG_SECONDS = 15 * TIMEOUT_SECONDS


class Case(NamedTuple):
    """What the requests do to their worker, and whether their inputs are the same each time."""

    what: int
    is_same: bool


CASES = {
    "none": None,
    "crash, the same inputs": Case(crashing_nodes.CRASH, is_same=True),
    "crash, different inputs": Case(crashing_nodes.CRASH, is_same=False),
    "hang, the same inputs": Case(crashing_nodes.WAIT, is_same=True),
    "hang, different inputs": Case(crashing_nodes.WAIT, is_same=False),
}


class Poison:
    """A thread that sends such requests at a steady rate, each with an id of its own; `statuses` counts responses."""

    def __init__(self, running: nginx.Nginx, case: Case) -> None:
        self.statuses: Counter[int] = Counter()
        self._running = running
        self._case = case
        self._is_over = threading.Event()
        self._sent = 0
        self._threads: list[threading.Thread] = []
        self._clock = threading.Thread(target=self._run)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._is_over.wait(max(0.0, due - time.monotonic())):
            self._sent += 1
            values = self._case.what, 0.0 if self._case.is_same else time.monotonic()
            self._threads.append(threading.Thread(target=self._send, args=values))
            self._threads[-1].start()
            due += 1 / PER_SECOND

    def _send(self, *values: float) -> None:
        self.statuses[self._running.infer("fragile", crashing_nodes.request(*values)).status] += 1

    def __enter__(self) -> "Poison":
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._clock.join()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def serving(directory) -> Iterator[tuple]:
    """Yield a fresh service, which knows of no crash, and nginx in front of it."""
    directory.mkdir()
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    config = model_zoo.save_all(
        directory, {"relu": model_zoo.relu()}, lambda _: exact, **crashing_nodes.save(directory)
    )
    bind = ("-b", "127.0.0.1:0", "-b", f"unix:{directory}/data.sock")
    control = f"unix:{directory}/control.sock"
    arguments = "-w", "2", "--timeout", str(TIMEOUT_SECONDS)
    with serve(directory, *arguments, bind=bind, config=config, OVMS_REST_CONTROL_BIND=control) as service:
        service.wait_for_workers(3)
        with nginx.run(directory / "nginx", directory, "http") as running:
            yield service, running


def count_deaths(service) -> int:
    """Return how many workers crashed or hung in an inference."""
    return service.log.count("died of SIGSEGV during") + service.log.count("hung and was ended during")


def main():
    with benchmark(5, 4) as (directory, seconds, rounds):
        results = {case: [] for case in CASES}
        died, statuses = Counter(), {case: Counter() for case in CASES}
        for number, (index, (label, case)) in itertools.product(range(rounds), enumerate(CASES.items())):
            hangs = case is not None and case.what == crashing_nodes.WAIT
            with serving(directory / f"{number}-{index}") as (service, running):
                poison = Poison(running, case) if case else contextlib.nullcontext()
                with poison:
                    duration = max(seconds, HANG_SECONDS) if hangs else seconds
                    result = load(running, directory, RELU_PATH, RELU, CONNECTIONS, duration, may_fail=True)
                service.wait_for_workers(3)
                results[label].append(result)
                died[label] += count_deaths(service)
                if case:
                    statuses[label] += poison.statuses
        columns = (
            "requests/s of the others",
            "rate / none",
            "failed",
            "p99 ms",
            "workers lost",
            "responses to the ten",
        )
        print_header("10 requests per second", *columns)
        base = mean(results["none"]).rate
        for label, loads in results.items():
            average = mean(loads)
            answers = ", ".join(f"{count} x {status}" for status, count in sorted(statuses[label].items()))
            row = f"{average.rate:.0f}", f"{average.rate / base:.2f}", f"{average.failed:.2%}", f"{average.p99:.1f}"
            print_row(label, *row, f"{died[label] / rounds:.1f} per round", answers or "-")


if __name__ == "__main__":
    main()
