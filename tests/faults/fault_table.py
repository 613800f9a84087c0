"""The faults, and how one is injected under load, reported and judged."""

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import injections
from faulty_host import Host
from steady_load import Tally
from surroundings import MOVED_CLOCK, PLAIN, SMALL_DISK, UNPRIVILEGED, Setup

# nginx closes the idle connections of clients when its processes end, before 1.27.4 without a setting to wait
# (`keepalive_min_timeout`). A request that a client sends at that moment is lost with its connection.
_CLOSED_WHEN_SENDING = r"(ConnectionReset|BrokenPipe)Error|RemoteDisconnected"


@dataclass(frozen=True)
class Fault:
    """A fault: what injects it, how often a test does so, and on which host.

    `losses` describes failures of others that it excuses as a pattern, "" if it excuses none.
    """

    name: str
    inject: Callable[[Host, random.Random], None]
    times: int = 2
    setup: Setup = PLAIN
    losses: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        """What is injected, the documentation of its function."""
        return (self.inject.__doc__ or "").strip().removesuffix(".")


PROCESSES = (
    Fault("worker-killed", injections.kill_worker, times=3),
    Fault("all-workers-killed", injections.kill_all_workers),
    Fault("worker-stopped", injections.stop_worker, times=1),
    Fault("worker-paused", injections.pause_worker),
    Fault("crash-in-inference", injections.crash_in_inference),
    Fault("hang-in-inference", injections.hang_in_inference, times=1),
    Fault("memory-limit", injections.outgrow_memory, times=1),
    Fault("reload", injections.reload_by_signal, times=1),
    Fault("reload-storm", injections.reload_without_waiting, times=1),
    Fault("arbiter-killed", injections.kill_arbiter, times=1),
    Fault("service-killed", injections.kill_service, times=1),
    Fault("service-restarted", injections.restart_service, times=1),
    Fault("arbiter-without-descriptors", injections.exhaust_arbiters_descriptors, times=1),
    Fault("workers-without-descriptors", injections.exhaust_workers_descriptors, times=1),
)
CHANGES = (
    Fault("model-swapped", injections.swap_version, times=1),
    Fault("model-replaced-in-place", injections.replace_in_place, times=1),
    Fault("model-deleted", injections.delete_model, times=1),
    Fault("model-corrupt", injections.corrupt_model, times=1),
    Fault("model-half-copied", injections.copy_half_of_model, times=1),
    Fault("config-broken", injections.break_config),
    Fault("clients-vanish", injections.vanish_as_client, times=1),
    Fault("clients-dribble", injections.dribble_as_client, times=1),
    Fault("clients-half-close", injections.half_close_as_client, times=1),
    Fault("clients-read-slowly", injections.read_slowly_as_client, times=1),
    Fault("nginx-reloaded", injections.reload_nginx, losses=_CLOSED_WHEN_SENDING),
    Fault("nginx-restarted", injections.restart_nginx, losses=_CLOSED_WHEN_SENDING),
)
RESOURCES = (
    Fault("no-processes", injections.exhaust_processes, times=1, setup=UNPRIVILEGED),
    Fault("disk-full", injections.fill_disk, times=1, setup=SMALL_DISK),
    Fault("clock-jumps", injections.jump_clock, times=5, setup=MOVED_CLOCK),
)
FAULTS = (*PROCESSES, *CHANGES, *RESOURCES)


@dataclass(frozen=True)
class Row:
    """What happened while a fault was injected; `own` are the outcomes of the requests that belong to it."""

    fault: Fault
    injected: int
    tally: Tally
    own: Counter[str]
    seconds: float

    def __str__(self) -> str:
        tally = self.tally
        own = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(self.own.items()))
        counts = [self.injected, f"{self.seconds:.0f}", tally.sent, len(tally.failures), len(tally.wrong)]
        numbers = [*counts, *(f"{seconds:.2f} s" for seconds in (tally.longest_gap, tally.longest_request))]
        return f"| `{self.fault.name}` | {self.fault.text} | " + " | ".join(map(str, numbers)) + f" | {own} |"

    def faults(self) -> list[str]:
        """Return the failures that the fault does not excuse, and the wrong answers."""
        losses = re.compile(self.fault.losses or "(?!)")
        return [*self.tally.wrong, *(failure for failure in self.tally.failures if not losses.search(failure))]


HEAD = (
    "| name | fault | injected | seconds | requests sent | failed | wrong | longest gap | longest request "
    "| own requests |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def inject(host: Host, fault: Fault, generator: random.Random, seconds: float = 0.0) -> Row:
    """Inject a fault its number of times, or for some seconds at least once, and wait for recovery each time."""
    host.wait_until_whole()
    host.load.take()
    host.own.clear()
    began, injected = time.monotonic(), 0
    while injected < (1 if seconds else fault.times) or time.monotonic() < began + seconds:
        fault.inject(host, generator)
        host.wait_until_whole()
        injected += 1
    return Row(fault, injected, host.load.take(), Counter(host.own), time.monotonic() - began)


def check(host: Host, fault: Fault) -> None:
    """Inject a fault as often as a test does; fail if it cost a request that it may not cost, or an answer is wrong."""
    row = inject(host, fault, random.Random(fault.name))
    print(row)
    assert row.injected == fault.times
    assert not row.faults(), "\n".join([str(row), *row.faults()])
