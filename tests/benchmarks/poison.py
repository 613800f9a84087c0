"""The rate of other requests while requests that crash their worker arrive, through nginx.

    PYTHONPATH=tests/helpers python tests/benchmarks/poison.py [SECONDS [ROUNDS]]

Two workers behind nginx; wrk sends inferences to one model, ten requests per second crash another: none, the same
inputs each time, or different ones each time. Needs wrk and nginx (Debian: apt-get install wrk nginx).
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import crashing_nodes
import model_zoo
import nginx
from measure import benchmark, load, mean, print_header, print_row
from raw_http import RELU, RELU_PATH
from service import serve

PER_SECOND = 10
CONNECTIONS = 4


class Poison:
    """A thread that sends crashing requests at a steady rate, each with an id of its own; `statuses` counts answers."""

    def __init__(self, running: nginx.Nginx, is_same: bool) -> None:
        self.statuses: Counter[int] = Counter()
        self._running = running
        self._is_same = is_same
        self._is_over = threading.Event()
        self._sent = 0
        self._threads: list[threading.Thread] = []
        self._clock = threading.Thread(target=self._run)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._is_over.wait(max(0.0, due - time.monotonic())):
            self._sent += 1
            values = crashing_nodes.CRASH, 0.0 if self._is_same else time.monotonic()
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
    with serve(directory, "-w", "2", bind=bind, config=config, OVMS_REST_CONTROL_BIND=control) as service:
        service.wait_for_workers(3)
        with nginx.run(directory / "nginx", directory, "http") as running:
            yield service, running


def measure(service, running, directory, seconds, poison):
    """Return the load of wrk, and how many workers died meanwhile."""
    before = service.log.count("died of SIGSEGV during")
    with poison or contextlib.nullcontext():
        result = load(running, directory, RELU_PATH, RELU, CONNECTIONS, seconds, may_fail=True)
    service.wait_for_workers(3)
    return result, service.log.count("died of SIGSEGV during") - before


def main():
    cases = {"none": None, "the same inputs": True, "different inputs": False}
    with benchmark(5, 4) as (directory, seconds, rounds):
        results = {case: [] for case in cases}
        died = Counter()
        statuses = {case: Counter() for case in cases}
        for number in range(rounds):
            with serving(directory / str(number)) as (service, running):
                for case, is_same in cases.items():
                    poison = None if is_same is None else Poison(running, is_same)
                    result, deaths = measure(service, running, directory, seconds, poison)
                    results[case].append(result)
                    died[case] += deaths
                    if poison is not None:
                        statuses[case] += poison.statuses
        columns = (
            "requests/s of the others",
            "of none",
            "of them failed",
            "p99 ms",
            "workers died",
            "answers to the crashing ones",
        )
        print_header("10 crashing requests per second", *columns)
        base = mean(results["none"]).rate
        for case, loads in results.items():
            average = mean(loads)
            answers = ", ".join(f"{count} x {status}" for status, count in sorted(statuses[case].items()))
            row = f"{average.rate:.0f}", f"{average.rate / base:.2f}", f"{average.failed:.2%}", f"{average.p99:.1f}"
            print_row(case, *row, f"{died[case] / rounds:.1f} per round", answers or "-")


if __name__ == "__main__":
    main()
