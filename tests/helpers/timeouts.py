"""Times that a test waits out: short on an idle machine, long enough for the rest of the test on a busy one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def keep_trying(
    attempt: Callable[[int], T], is_in_time: Callable[[T], bool], seconds: Sequence[int] = (3, 12, 48)
) -> tuple[int, T]:
    """Make an attempt with a time in seconds, and with longer ones until all that should be in time is.

    A test cannot measure how much time that takes: a moment later the machine may be busy. Returns the time, and the
    result of the attempt with it.
    """
    for chosen in seconds:
        result = attempt(chosen)
        if is_in_time(result):
            break
    return chosen, result


def is_only_hang(reasons: str) -> bool:
    """Return whether of the models in a text one timed out, and not before its first inference."""
    return reasons.count(" timed out ") == reasons.count(" s while inferring for the first time") == 1
