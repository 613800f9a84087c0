"""Which worker has outgrown the limit of its memory, so that another has to take its place.

OpenVINO keeps memory and compiled kernels for shapes that it has seen, and the C library keeps pieces of the heap, so
that a worker with dynamic shapes grows. Only a new process begins small again.
"""

import contextlib
import logging
import mmap
import time
from collections.abc import Iterable
from typing import Any

from ovms_rest.host.process_memory import anonymous_bytes, own_bytes

log = logging.getLogger("gunicorn.error.ovms_rest")

SETTING = "OVMS_REST_MAX_WORKER_MEMORY_BYTES"

# The workers are looked at once in so long, and for no more than a tenth of the time: it takes some milliseconds for
# every gigabyte that one has.
_LOOK_SECONDS = 1.0
_LOOK_PART = 0.1
# So many times as long as a worker took to come up no other is replaced, so that starting workers takes a part of the
# time only, however fast they grow.
_PAUSE_FACTOR = 4.0

_MIB = 2**20


class FreshSize:
    """The bytes that a worker has of its own when it becomes ready, which it tells the arbiter; 0 until then."""

    def __init__(self) -> None:
        """Make it, before the fork."""
        self._number = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def measure(self) -> None:
        """Tell the size, in a worker of a service that has a limit."""
        with contextlib.suppress(OSError):  # which the arbiter is going to complain of
            self._number[0] = own_bytes()

    def read(self) -> int:
        """Return the size, in the arbiter."""
        return self._number[0]


class MemoryLimit:
    """The limit, and when the arbiter looks next whether a worker is above it."""

    def __init__(self, limit: int) -> None:
        """Take the limit in bytes; 0 is for none."""
        self._limit = limit
        self._next_look = 0.0
        self._has_complained = False

    def find_outgrown(self, workers: Iterable[Any]) -> Any:
        """Return the first worker that has more memory of its own than the limit, None when there is none.

        Workers that begin above the limit are left alone, for their successors would be no smaller; the log says so
        once.
        """
        if not self._limit or (began := time.monotonic()) < self._next_look:
            return None
        found = None
        try:
            for worker in workers:
                size = _measure(worker.pid, self._limit)
                if size > self._limit and not self._began_above(worker):
                    log.info(
                        "worker %s has %d MiB of memory of its own, more than the %d MiB that %s allows; another takes "
                        "its place",
                        worker.pid,
                        size // _MIB,
                        self._limit // _MIB,
                        SETTING,
                    )
                    found = worker
                    break
        except OSError as error:
            self._limit = 0
            log.error("%s has no effect, since the memory of workers cannot be measured: %s", SETTING, error)
        now = time.monotonic()
        self._next_look = now + max(_LOOK_SECONDS, (now - began) / _LOOK_PART)
        return found

    def forget(self) -> None:
        """Complain again of workers that begin above the limit: those of a new generation have other models."""
        self._has_complained = False

    def pause(self, start_seconds: float) -> None:
        """Look at no worker for a while, after one that took so long to come up has replaced another."""
        self._next_look = time.monotonic() + max(_LOOK_SECONDS, _PAUSE_FACTOR * start_seconds)

    def _began_above(self, worker: Any) -> bool:
        fresh = worker.fresh_size.read()
        if fresh <= self._limit:
            return False
        if not self._has_complained:
            self._has_complained = True
            log.warning(
                "a new worker has %d MiB of memory of its own already, more than the %d MiB that %s allows; such "
                "workers are not replaced",
                fresh // _MIB,
                self._limit // _MIB,
                SETTING,
            )
        return True


def _measure(pid: int, limit: int) -> int:
    """Return how much memory a worker has of its own; roughly, and at once, when that is far below the limit.

    Raises OSError when it cannot be measured; one that has died has none.
    """
    try:
        size = anonymous_bytes(pid)  # what it shares included
        return own_bytes(pid) if size > limit / 2 else size
    except ProcessLookupError:  # it is still to be reaped
        return 0
