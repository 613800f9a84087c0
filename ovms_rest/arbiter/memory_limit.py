"""The memory limit of workers, above which a worker is replaced.

OpenVINO keeps memory and compiled kernels for each shape it has met, and the C library keeps pieces of the heap, so
that a worker with dynamic shapes grows. Only a new process is small again.
"""

import contextlib
import mmap
import time
from collections.abc import Iterable
from typing import Any

from ovms_rest.host.process_memory import anonymous_bytes, own_bytes
from ovms_rest.log import log

SETTING = "OVMS_REST_MAX_WORKER_MEMORY_BYTES"

# The interval of measurements, which take at most a tenth of the time: some milliseconds per gigabyte of a worker.
_LOOK_SECONDS = 1.0
_LOOK_PART = 0.1
# The pause after a replacement, as a multiple of the time that the new worker took to become ready: starting workers
# takes a fraction of the time, however fast they grow.
_PAUSE_FACTOR = 4.0

_MIB = 2**20


class FreshSize:
    """The private memory of a worker when it becomes ready, in bytes, 0 until then; created before the fork."""

    def __init__(self) -> None:
        self._number = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def measure(self) -> None:
        """Store the size, in a worker of a service that has a limit."""
        with contextlib.suppress(OSError):  # the arbiter will log the reason
            self._number[0] = own_bytes()

    def read(self) -> int:
        """Return the size, in the arbiter."""
        return self._number[0]


class MemoryLimit:
    """The limit in bytes, 0 for none, and the time of the next measurement."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next_look = 0.0
        self._has_complained = False
        self._reason = ""  # why a worker could not be measured, which has been logged

    def find_outgrown(self, workers: Iterable[Any]) -> Any:
        """Return the first worker with more private memory than the limit, or None.

        Workers that started above the limit are left alone, for their successors would be no smaller; that is logged
        once. One that cannot be measured now, without a free descriptor say, is measured at the next look.
        """
        if not self._limit or (began := time.monotonic()) < self._next_look:
            return None
        found = None
        for worker in workers:
            try:
                size = _measure(worker.pid, self._limit)
            except OSError as error:
                self._complain_of(error)
                continue
            if size > self._limit and not self._began_above(worker):
                line = "worker %s uses %d MiB %s; a new worker takes its place"
                log.info(line, worker.pid, size // _MIB, self._excess())
                found = worker
                break
        now = time.monotonic()
        self._next_look = now + max(_LOOK_SECONDS, (now - began) / _LOOK_PART)
        return found

    def forget(self) -> None:
        """Log again if workers start above the limit or cannot be measured: a new generation has other models."""
        self._has_complained = False
        self._reason = ""

    def pause(self, start_seconds: float) -> None:
        """Measure no worker for a while, after the start of a replacement took this long."""
        self._next_look = time.monotonic() + max(_LOOK_SECONDS, _PAUSE_FACTOR * start_seconds)

    def _complain_of(self, error: OSError) -> None:
        """Log why a worker cannot be measured, once and not at every look: on some systems none ever can."""
        reason = error.strerror or str(error)
        if reason != self._reason:
            self._reason = reason
            log.error("%s has no effect while the memory of workers cannot be measured: %s", SETTING, reason)

    def _began_above(self, worker: Any) -> bool:
        fresh = worker.fresh_size.read()
        if fresh <= self._limit:
            return False
        if not self._has_complained:
            self._has_complained = True
            line = "a new worker already uses %d MiB %s; such workers are not replaced"
            log.warning(line, fresh // _MIB, self._excess())
        return True

    def _excess(self) -> str:
        return f"of private memory, above the limit of {self._limit // _MIB} MiB ({SETTING})"


def _measure(pid: int, limit: int) -> int:
    """Return the private memory of a worker in bytes; a quick upper bound if that is far below the limit.

    Raises OSError if it cannot be measured; a worker that has died has none.
    """
    try:
        size = anonymous_bytes(pid)  # shared memory included
        return own_bytes(pid) if size > limit / 2 else size
    except ProcessLookupError:  # not reaped yet
        return 0
