"""Heartbeats of workers, kept in memory.

gunicorn keeps each in a temporary file, for which a read-only file system has no place.
"""

import os
import time
from typing import Any

from gunicorn.workers import base


class Heartbeat:
    """The time of a worker's last report; it has the interface of gunicorn's `WorkerTmp`, in whose place it is used."""

    def __init__(self, cfg: Any) -> None:
        """Create it, in the arbiter. Raises OSError when the process may open no more files."""
        # A file object, which may be closed twice: gunicorn does in places.
        self._file = os.fdopen(os.memfd_create("heartbeat"), "r+b", 0)
        if (cfg.uid, cfg.gid) != (os.geteuid(), os.getegid()):
            os.fchown(self.fileno(), cfg.uid, cfg.gid)  # only its owner may set the time of a file
        self.notify()

    def notify(self) -> None:
        """Report, in the worker."""
        now = time.monotonic()
        os.utime(self.fileno(), (now, now))

    def last_update(self) -> float:
        """Return the time of the last report, in monotonic seconds."""
        return os.fstat(self.fileno()).st_mtime

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()


def install() -> None:
    """Have every worker class use it; gunicorn has no setting for that."""
    base.WorkerTmp = Heartbeat
