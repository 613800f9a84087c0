"""The time since when a request has been waiting, for requests with a timeout."""

import re
import time
from collections.abc import Mapping
from typing import Any

# Seconds with a fraction, milliseconds, or microseconds: of 13 and 16 digits from the year 2001 to 2286.
_REQUEST_START = re.compile(r"(?:t=)?(?:([0-9]{1,10})\.([0-9]{1,9})|([0-9]{13})|([0-9]{16}))")
# An X-Request-Start further back means that a clock is wrong.
_LONGEST_WAIT_NS = 3600 * 10**9


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


def waits_since(environ: Mapping[str, Any], received_ns: int) -> int:
    """Return since when a request has been waiting: since `received_ns`, or since a proxy in front received it.

    Both are in nanoseconds of the monotonic clock.
    """
    began = decode_request_start(environ.get("HTTP_X_REQUEST_START", ""))
    waited = 0 if began is None else time.time_ns() - began
    return min(received_ns, time.monotonic_ns() - waited) if 0 < waited <= _LONGEST_WAIT_NS else received_ns
