"""What gunicorn calls around a fork (https://docs.gunicorn.org/en/stable/settings.html#server-hooks)."""

import gc
import logging
import mmap
import os
import sys
import time
from collections import Counter
from typing import Any

from ovms_rest.app import App

log = logging.getLogger("gunicorn.error.ovms_rest")

# So many workers may die at a model before it is given up.
MAX_DEATHS = 3
_NAME_BYTES = 4096

_deaths: Counter[str] = Counter()


def pre_fork(arbiter: Any, worker: Any) -> None:
    """Prepare a fork: a page on which the worker notes the model it is at, and a heap the collector leaves alone."""
    worker.opening = mmap.mmap(-1, _NAME_BYTES)
    gc.freeze()


def post_worker_init(worker: Any) -> None:
    """Open the models in a new worker, before it accepts connections.

    gunicorn kills a worker that does not report for its `timeout`. The time to open the models comes on top of that,
    by a report dated ahead.
    """
    app: App = worker.wsgi
    ahead = time.monotonic() + app.load_timeout_seconds
    os.utime(worker.tmp.fileno(), (ahead, ahead))
    app.models.open(lambda name: _note(worker.opening, name))
    worker.notify()


def _note(page: mmap.mmap, name: str) -> None:
    page.seek(0)
    page.write(name.encode()[: _NAME_BYTES - 1] + b"\0")


def child_exit(arbiter: Any, worker: Any) -> None:
    """Tell which model a worker was at when it died before it could serve; give the model up when it goes on."""
    name = worker.opening[:].partition(b"\0")[0].decode(errors="ignore")
    worker.opening.close()
    if not name:
        return
    log.error("worker %s died or hung while it opened model %r", worker.pid, name)
    _deaths[name] += 1
    if _deaths[name] == MAX_DEATHS:
        arbiter.app.wsgi().models.give_up(name, f"{MAX_DEATHS} workers died or hung while they opened it")


def worker_exit(arbiter: Any, worker: Any) -> None:
    """End a worker at once: in a fork of a process that used OpenVINO, the exit of the interpreter hangs.

    gunicorn calls this last in a worker, but also in the arbiter for a worker that was gone already.
    """
    if os.getpid() != worker.pid:
        return
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
