"""Heartbeats of workers, kept in memory.

gunicorn keeps each in a temporary file, which needs a writable file system.
"""

import os
import time
from typing import Any

from gunicorn.workers import base


class Heartbeat:
    """The time of a worker's last report, with the interface of gunicorn's `WorkerTmp`, which it replaces."""

    def __init__(self, cfg: Any) -> None:
        # A file object, which may be closed twice: gunicorn does in places.
        self._file = os.fdopen(os.memfd_create("heartbeat"), "r+b", 0)
        if (cfg.uid, cfg.gid) != (os.geteuid(), os.getegid()):
            os.fchown(self.fileno(), cfg.uid, cfg.gid)  # only its owner may set the time of a file
        self.notify()

    def notify(self) -> None:
        """Report that the worker is alive."""
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
    """Make every worker class use it; gunicorn has no setting for that."""
    base.WorkerTmp = Heartbeat
