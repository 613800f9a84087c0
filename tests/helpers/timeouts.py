"""Timeouts that a test waits out: short on an idle machine, long enough for the rest of the test on a busy one."""

import math
import time
from collections.abc import Callable


def timeout_for(work: Callable[[], object]) -> int:
    """Do some work; return a timeout in seconds that the same work keeps while the machine is as busy as now."""
    began = time.monotonic()
    work()
    return math.ceil(4 * (time.monotonic() - began))
