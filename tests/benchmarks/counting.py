"""The cost of counting an inference, and of reading the sums of all workers.

    python tests/benchmarks/counting.py [SECONDS [ROUNDS]]

Microseconds of a call in a loop, including the loop: the best round and the median of all. "Nothing" calls a method
with the same arguments that does nothing.
"""

import statistics
import time

from measure import arguments, machine, print_header, print_row
from records import timed

from ovms_rest.shared_memory.counters import BATCH_SIZES, Counters

SLOTS = 4096
WORKERS = 64
CALLS = 1000


class Nothing:
    """The same calls without any work."""

    def record(self, queue_ns, input_ns, infer_ns, output_ns, batch, request_bytes, response_bytes):
        """Do nothing."""


def fill(model, workers=WORKERS):
    """Count an inference in the rows of that many workers."""
    for slot in reversed(range(workers)):
        model.claim(slot)
        model.record(timed(1, 1, 1, 1))


def cases():
    """Return the calls to measure by name, each a function of a growing number."""
    counters = Counters(SLOTS)
    one, many, read = (counters.of(name, "1") for name in ("one", "many", "read"))
    counters.claim(WORKERS - 1)
    counters.claim(0)
    fill(read)
    nothing = Nothing()
    return {
        "nothing": lambda i: nothing.record(timed(1500, 20_000 + i, 3_000_000, 9000, 1, 602_112, 602_112)),
        "record": lambda i: one.record(timed(1500, 20_000 + i, 3_000_000, 9000, 1, 602_112, 602_112)),
        "record, different batch sizes": lambda i: many.record(
            timed(1500, 20_000, 3_000_000, 9000, i, 602_112, 602_112)
        ),
        "fail": lambda i: one.fail("overload", 1500 + i),
        "begin": lambda i: one.begin(),
        f"read, {WORKERS} workers": lambda i: read.read(),
    }


def measure(call, seconds):
    """Return the nanoseconds of a call."""
    count, started = 0, time.perf_counter_ns()
    while (spent := time.perf_counter_ns() - started) < seconds * 1e9:
        for i in range(count, count + CALLS):
            call(i)
        count += CALLS
    return spent / count


def main():
    seconds, rounds = arguments(1, 5)
    print(f"{machine()}; {rounds} rounds of {seconds} s; {BATCH_SIZES} batch sizes are distinguished\n")
    calls = cases()
    results = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(measure(call, seconds) / 1000)
    print_header("call", "best us", "median us")
    for name, times in results.items():
        print_row(name, f"{min(times):.2f}", f"{statistics.median(times):.2f}")


if __name__ == "__main__":
    main()
