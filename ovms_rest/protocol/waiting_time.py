"""Since when a request waits, for those that say how long they can."""

import time
from collections.abc import Mapping
from typing import Any

from ovms_rest.protocol.decoding import decode_request_start

# What X-Request-Start tells is no waiting but a clock that is wrong when it lies further back.
_LONGEST_WAIT_NS = 3600 * 10**9


def waits_since(environ: Mapping[str, Any], received_ns: int) -> int:
    """Tell since when a request waits: since it came, at `received_ns`, or since the proxy in front of us had it.

    Both are nanoseconds of the monotonic clock.
    """
    began = decode_request_start(environ.get("HTTP_X_REQUEST_START", ""))
    waited = 0 if began is None else time.time_ns() - began
    return min(received_ns, time.monotonic_ns() - waited) if 0 < waited <= _LONGEST_WAIT_NS else received_ns
