"""The time since when a request has been waiting, for requests with a timeout."""

import time
from collections.abc import Mapping
from typing import Any

from ovms_rest.protocol.decoding import decode_request_start

# An X-Request-Start further back means that a clock is wrong.
_LONGEST_WAIT_NS = 3600 * 10**9


def waits_since(environ: Mapping[str, Any], received_ns: int) -> int:
    """Return since when a request has been waiting: since `received_ns`, or since a proxy in front received it.

    Both are in nanoseconds of the monotonic clock.
    """
    began = decode_request_start(environ.get("HTTP_X_REQUEST_START", ""))
    waited = 0 if began is None else time.time_ns() - began
    return min(received_ns, time.monotonic_ns() - waited) if 0 < waited <= _LONGEST_WAIT_NS else received_ns
