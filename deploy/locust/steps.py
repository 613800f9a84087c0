"""A load shape that adds users step by step up to a latency limit, and prints the highest rate within it.

Load it beside the users: `locust -f locustfile.py,steps.py --headless --latency-limit-ms 50`.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import kserve
from locust import LoadTestShape, events
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner

# Time for starting the users of a step.
SPAWN_SECONDS = 60
_KEY = "inferences_by_second"
_FAILED, _REFUSED = -1, -2  # in the place of a latency


@events.init_command_line_parser.add_listener
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--latency-limit-ms", type=float, default=100.0, help="limit of the 99th percentile; default: 100")
    add("--step-seconds", type=int, default=10, help="measured time of each step in whole seconds; default: 10")
    add("--settle-seconds", type=int, default=2, help="time before it that is not measured; default: 2")
    add("--first-users", type=int, default=1, help="users of the first step; default: 1")
    add("--step-factor", type=float, default=1.5, help="users of a step / users of the one before; default: 1.5")
    add("--max-users", type=int, default=1000, help="limit of users; default: 1000")
    add("--min-rate", type=float, default=0.0, help="exit with status 1 below this rate, in requests/s; default: 0")


class Recorder:
    """Counts inferences by the second in which they ended and by latency, which locust's statistics do not record.

    A process that sends requests counts its own; a master sums up the reports of the others. The clocks of several
    hosts must agree to within --settle-seconds.
    """

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self.seconds: dict[int, Counter[int]] = defaultdict(Counter)
        self.processes: dict[int, set[str]] = defaultdict(set)
        self._reported: dict[str, float] = {}  # by process, until when it has reported

    def count(self, request_type: str, response_time: float | None, exception: Exception | None, **_: Any) -> None:
        """Count an inference that has just ended; latencies are kept in units of 0.1 ms."""
        if request_type == "POST" and response_time is not None:
            key = int(response_time * 10)
            if exception is not None:
                key = _REFUSED if isinstance(exception, kserve.RefusedError) else _FAILED
            self.seconds[int(time.time())][key] += 1

    def report(self, data: dict[str, Any], **_: Any) -> None:
        """Report to the master what was counted since the last report."""
        seconds = {second: dict(counts) for second, counts in self.seconds.items()}
        data[_KEY] = {"until": time.time(), "seconds": seconds}
        self.seconds.clear()

    def receive(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        """Add the report of a process."""
        report = data.get(_KEY, {"until": 0.0, "seconds": {}})
        self._reported[client_id] = report["until"]
        for second, counts in report["seconds"].items():
            self.seconds[int(second)].update({int(latency): count for latency, count in counts.items()})
            self.processes[int(second)].add(client_id)

    def has_all(self, processes: Iterable[str], end: float) -> bool:
        """Return whether the reports of these processes reach until `end`."""
        return all(self._reported.get(process, 0.0) >= end for process in processes)

    def forget(self) -> None:
        """Drop all counts, so that a long test needs no more memory than a short one."""
        self.seconds.clear()
        self.processes.clear()

    def measure(self, begin: int, end: int) -> "Measurement":
        """Sum up the seconds from `begin` until before `end`."""
        counts: Counter[int] = Counter()
        processes: set[str] = set()
        for second in range(begin, end):
            counts.update(self.seconds.get(second, {}))
            processes |= self.processes.get(second, set())
        failed, refused = counts.pop(_FAILED, 0), counts.pop(_REFUSED, 0)
        return Measurement(
            counts.total() / (end - begin), _quantile(counts, 0.99), failed, refused, len(processes) or 1
        )


class Measurement(NamedTuple):
    """The result of a step."""

    rate: float  # answered inferences/s
    p99_ms: float
    failed: int
    refused: int  # 429 and 503
    processes: int

    def __str__(self) -> str:
        """Describe it in a line."""
        return (
            f"{self.rate:.1f} requests/s, p99 {self.p99_ms:.1f} ms, {self.failed} failed, {self.refused} refused, "
            f"sent by {self.processes} process{'es' if self.processes > 1 else ''}"
        )


def _quantile(counts: Counter[int], part: float) -> float:
    """Return the latency in ms that this share of the inferences does not exceed, 0 without inferences."""
    left = math.ceil(part * counts.total())
    for latency in sorted(counts):
        left -= counts[latency]
        if left <= 0:
            return (latency + 1) / 10  # the upper end of its unit
    return 0.0


recorder = Recorder()
events.request.add_listener(recorder.count)
events.report_to_master.add_listener(lambda client_id, data: recorder.report(data))
events.worker_report.add_listener(recorder.receive)


class Steps(LoadTestShape):
    """Starts with few users, and adds more while p99 is within the limit and all responses are right."""

    def __init__(self) -> None:
        """Begin before the first step."""
        super().__init__()
        self._begin_test()

    def reset_time(self) -> None:
        """Start again, as the web page's button does."""
        super().reset_time()
        self._begin_test()

    def _begin_test(self) -> None:
        self._step = 0
        self._users = 0
        self._best: tuple[int, Measurement] | None = None

    def tick(self) -> tuple[int, float] | None:
        """Return the number of users and the spawn rate, None at the end."""
        options, now = self._options(), time.time()
        if not self._users:
            return self._begin_step(max(1, options.first_users))
        if not self._begin:  # the users of this step are starting
            if self.get_current_user_count() >= self._users:
                self._begin = math.ceil(now) + options.settle_seconds
                recorder.forget()
            elif now > self._deadline:
                return self._end(f"{_count_users(self._users)} could not be started in {SPAWN_SECONDS} s")
            return self._load()
        end = self._begin + max(1, options.step_seconds)
        if now < end or not self._has_reports(end):
            return self._load()
        measured = recorder.measure(self._begin, end)
        _print(f"step {self._step}: {_count_users(self._users)}, {measured}")
        if measured.failed:
            return self._end(f"{measured.failed} requests failed at {_count_users(self._users)}")
        if not measured.rate:
            return self._end(f"no inference was answered in step {self._step}")
        if measured.refused or measured.p99_ms > options.latency_limit_ms:
            return self._end()
        if self._best is None or measured.rate > self._best[1].rate:
            self._best = self._users, measured
        if self._users >= options.max_users:
            _print(f"the limit was not reached with {_count_users(self._users)}; --max-users allows more")
            return self._end()
        return self._begin_step(min(max(self._users + 1, int(self._users * options.step_factor)), options.max_users))

    def _begin_step(self, users: int) -> tuple[int, float]:
        self._step += 1
        self._users = users
        self._begin = 0
        self._deadline = time.time() + SPAWN_SECONDS
        return self._load()

    def _has_reports(self, end: int) -> bool:
        """Return whether all processes that are alive have reported."""
        if not isinstance(self.runner, MasterRunner) or time.time() > end + 3 * WORKER_REPORT_INTERVAL:
            return True
        return recorder.has_all(self.runner.clients, end)

    def _load(self) -> tuple[int, float]:
        return self._users, min(self._users, 100)

    def _end(self, fault: str = "") -> None:
        """Print the result and set the exit status."""
        options = self._options()
        limit = f"p99 <= {options.latency_limit_ms:g} ms"
        if self._best is None:
            fault = fault or f"no step had {limit}"
        else:
            users, best = self._best
            reached = f"{best.rate:.1f} requests/s ({_count_users(users)}, p99 {best.p99_ms:.1f} ms)"
            _print(f"highest rate with {limit}: {reached}")
            if best.rate < options.min_rate:
                fault = fault or f"the highest rate is below --min-rate {options.min_rate:g}"
        if fault:
            _print(f"failed: {fault}")
        self.runner.environment.process_exit_code = 1 if fault else 0

    def _options(self) -> argparse.Namespace:
        return self.runner.environment.parsed_options


def _count_users(count: int) -> str:
    return f"{count} user{'' if count == 1 else 's'}"


_print = partial(print, flush=True)
