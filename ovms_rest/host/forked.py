"""Short work in a fork of this process, so that a crash or hang of it harms nothing.

Unlike a new process (`host.throwaway`), a fork has the compiled models of the arbiter already. It must only infer with
those that survive a fork, as workers do.
"""

import contextlib
import ctypes
import logging
import os
import select
import signal
import time
from collections.abc import Callable

from ovms_rest.host import throwaway

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_ANSWER_BYTES = 16


def run_forked(work: Callable[[], int], seconds: float, stop: Callable[[], bool] = lambda: False) -> int | None:
    """Do work in a fork and return its result, a number of at least 0.

    Return None if it raises an exception, ends the process, takes longer than these `seconds`, or once `stop` returns
    True; and if the system has no process or descriptor left for it.
    """
    try:
        reading, writing = os.pipe()
    except OSError:
        return None
    try:
        pid = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        return None
    if pid == 0:
        _work(work, writing)
    throwaway.running.add(pid)
    try:
        os.close(writing)
        return _receive(reading, time.monotonic() + seconds, stop)
    finally:
        os.close(reading)
        for kill in (os.killpg, os.kill):  # there is no group yet if the fork has not begun to run
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        throwaway.running.discard(pid)


def _receive(reading: int, deadline: float, stop: Callable[[], bool]) -> int | None:
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and not stop():
        if poll.poll(min(left, _POLL_SECONDS) * 1000):
            answer = os.read(reading, _ANSWER_BYTES)
            return int(answer) if answer else None
    return None


def _work(work: Callable[[], int], writing: int) -> None:
    """Do the work and end the fork, without the cleanup of its parent."""
    try:
        os.setpgid(0, 0)  # processes of its own end with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        logging.disable()  # failures are expected here
        os.write(writing, str(work()).encode())
    finally:
        os._exit(0)
