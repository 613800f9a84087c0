"""Workers that hang are ended, as gunicorn does after its `timeout`, but only if they and the arbiter could run.

A container that is frozen, or a virtual machine that is moved, stops workers and arbiter alike, and the clock goes on.
After that, all workers look as if they hung.
"""

import time
from pathlib import Path
from typing import Any

# A turn of the arbiter's loop takes a second, and at most about two where it waits for workers to retire.
_LATE_SECONDS = 4.0
# Workers report every second.
_GRACE_SECONDS = 2.0


def install(arbiter: Any) -> None:
    """Replace the method of an arbiter that ends hanging workers."""
    hangs = _Hangs(arbiter)
    arbiter.murder_workers = hangs.end


class _Hangs:
    def __init__(self, arbiter: Any) -> None:
        self._arbiter = arbiter
        self._end = arbiter.murder_workers
        self._last = time.monotonic()
        self._resume_at = 0.0

    def end(self) -> None:
        """End workers that hang, and note which of them somebody had stopped."""
        now = time.monotonic()
        if now - self._last > max(_LATE_SECONDS, self._arbiter.timeout / 2):
            self._resume_at = now + _GRACE_SECONDS
        self._last = now
        if now < self._resume_at:
            return
        workers = [worker for worker in self._arbiter.WORKERS.values() if not worker.aborted]
        self._end()
        for worker in workers:
            worker.was_stopped = worker.aborted and _is_stopped(worker.pid)


def _is_stopped(pid: int) -> bool:
    """Return whether a process, to which SIGABRT was sent, is stopped by a signal or a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"
