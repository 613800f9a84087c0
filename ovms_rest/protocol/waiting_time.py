"""The time since when a request has been waiting, for requests with a timeout."""

import re
import time
from collections.abc import Mapping
from typing import Any

# Seconds with a fraction, milliseconds, or microseconds: of 13 and 16 digits from the year 2001 to 2286.
_REQUEST_START = re.compile(r"(?:t=)?(?:([0-9]{1,10})\.([0-9]{1,9})|([0-9]{13})|([0-9]{16}))")
# An X-Request-Start further back means that a clock is wrong.
_LONGEST_WAIT_NS = 3600 * 10**9
# Smaller changes are not told apart from a clock that is being slewed.
_SMALLEST_JUMP_NS = 10**8


def decode_request_start(value: str) -> int | None:
    """Return the time in `X-Request-Start`, when a proxy took the request, in nanoseconds since 1970; None if invalid.

    No standard defines it. nginx and others send "t=" and seconds with a fraction, or milliseconds or microseconds
    without one; the "t=" may be left out.
    """
    match = _REQUEST_START.fullmatch(value)
    if match is None:
        return None
    seconds, fraction, milliseconds, microseconds = match.groups()
    if seconds:
        return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0"))
    return int(milliseconds) * 1_000_000 if milliseconds else int(microseconds) * 1000


class Clock:
    """The time of day beside the monotonic clock: jumps of the first, as far as calls notice them.

    All times are in nanoseconds.
    """

    def __init__(self, wall: int, monotonic: int) -> None:
        self._offset = wall - monotonic
        self._looked = self._jumped_after = monotonic
        self._jump = 0

    def find_wait(self, began: int, wall: int, monotonic: int) -> int:
        """Return for how long a request that `began` at a time of day has waited now.

        A request that began before the clock was put forward has not waited for the length of the jump.
        """
        offset, waited = wall - monotonic, wall - began
        if abs(offset - self._offset) > _SMALLEST_JUMP_NS:
            self._jump, self._jumped_after = offset - self._offset, self._looked
        self._offset, self._looked = offset, monotonic
        # A request from after the jump has waited for less than the time since the last look before the jump.
        has_seen_jump = self._jump > 0 and waited > monotonic - self._jumped_after
        return waited - self._jump if has_seen_jump else waited


_clock = Clock(time.time_ns(), time.monotonic_ns())


def waits_since(environ: Mapping[str, Any], received_ns: int) -> int:
    """Return since when a request has been waiting: since `received_ns`, or since a proxy in front received it.

    Both are in nanoseconds of the monotonic clock.
    """
    began = decode_request_start(environ.get("HTTP_X_REQUEST_START", ""))
    if began is None:
        return received_ns
    now = time.monotonic_ns()
    waited = _clock.find_wait(began, time.time_ns(), now)
    return min(received_ns, now - waited) if 0 < waited <= _LONGEST_WAIT_NS else received_ns
