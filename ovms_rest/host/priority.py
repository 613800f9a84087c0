"""Scheduling priority of loads, which give way to inferences while workers serve.

Any process may lower its priority, but only one with CAP_SYS_NICE or RLIMIT_NICE can raise it again (sched(7)); this
holds for nice values and SCHED_IDLE. So only processes and threads that end with their work, or that have the right,
lower their priority here.

A low priority is not enough: when a worker wakes up on the core of another one, Linux may leave both there for 0.1 s,
while a thread of the lowest priority keeps the second core. A core fetches a waiting thread when it becomes idle, so a
thread that loads sleeps for a moment every few milliseconds ("naps"). tests/benchmarks/README.md has the figures.
"""

import contextlib
import ctypes
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

_LOWEST = 19
# For work that delays others: the arbiter replaces no workers while it loads, and a reload ends when the new workers
# serve. If all cores are always busy, a thread with this nice value still gets a tenth of one, with 19 a seventieth,
# and with SCHED_IDLE a 340th. So such work is idle only at first.
_MODERATE = 10
_PATIENCE_SECONDS = 4.0
_NAP_INTERVAL_SECONDS = 0.002
# The handler of this signal is usleep(3), which takes its number, 49, as microseconds.
_NAP = signal.SIGRTMIN + 15
_CAP_SYS_NICE = 23
_RLIMIT_NICE = 13  # missing in the module `resource`

Result = TypeVar("Result")

_state = {"is_serving": 0, "nice": 0}
_thread = threading.local()


def begin_to_serve() -> None:
    """Have loads give way to workers from now on; before that there are no workers."""
    _state.update(is_serving=1, nice=os.getpriority(os.PRIO_PROCESS, 0))


def gives_way() -> bool:
    """Return whether loads in this process give way to workers."""
    return bool(_state["is_serving"])


def yield_to_others() -> None:
    """Run this thread, and threads that it will start, only on cores that no other process wants, for good."""
    _begin_napping(threading.Event(), None)
    _lower()


def run_lowered(work: Callable[[], Result]) -> Result:
    """Do work at a lower priority than that of the service; return its result or raise its exception.

    Where a process may not raise its priority again, a thread does the work, so that the caller and its forks keep
    theirs. Before workers serve, the priority stays the same.
    """
    if not gives_way():
        return work()
    if _can_rise():
        with lowered():
            return work()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with lowered():
                _set_priority(threading.get_native_id(), _MODERATE)
                results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    try:
        thread.start()
    except RuntimeError:  # as in _begin_napping
        return work()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def lowered() -> Iterator[None]:
    """Run the block only on cores that no other process wants; afterwards restore the priority from before.

    Threads that the block started are restored as well; processes that it forks have to `restore` theirs. A process
    that may not raise its priority keeps it, and only naps. Within another such block nothing changes.
    """
    if getattr(_thread, "is_lowered", False):
        yield
        return
    can_rise, end = _can_rise(), threading.Event()
    napping = _begin_napping(end, _MODERATE if can_rise else None)
    if can_rise:
        _lower()
    _thread.is_lowered = True
    try:
        yield
    finally:
        _thread.is_lowered = False
        end.set()
        if napping is not None:
            napping.join()
        if can_rise:
            restore()


class _Loading:
    """The calling thread, which loads."""

    def __init__(self) -> None:

        self.ident = threading.get_ident()
        self.native_id = threading.get_native_id()
        self.clock = time.pthread_getcpuclockid(self.ident)


def _begin_napping(end: threading.Event, later_nice: int | None) -> threading.Thread | None:
    """Have this thread nap from now on; called before it is lowered, as threads inherit the priority."""
    napping = threading.Thread(target=_keep_napping, args=(_Loading(), end, later_nice), daemon=True)
    try:
        napping.start()
    except RuntimeError:  # the system has no process left; the load will report it
        return None
    return napping


def _keep_napping(loading: _Loading, end: threading.Event, later_nice: int | None) -> None:
    """Have a thread nap while it computes, until the end; give it the later nice value when that takes long."""
    libc = ctypes.CDLL(None)
    libc.signal(_NAP, ctypes.cast(libc.usleep, ctypes.c_void_p))
    patience = time.monotonic() + _PATIENCE_SECONDS
    spent = time.clock_gettime(loading.clock)
    while not end.wait(_NAP_INTERVAL_SECONDS):
        if (now := time.clock_gettime(loading.clock)) - spent >= _NAP_INTERVAL_SECONDS / 2:
            spent = now
            signal.pthread_kill(loading.ident, _NAP)
        if later_nice is not None and time.monotonic() >= patience:
            _set_priority(loading.native_id, later_nice)
            later_nice = None


def _lower() -> None:
    """Give this thread the lowest priority.

    Linux then gives it the idle class of disk access too (ioprio_set(2)). Errors are ignored, such as those of a
    filter of system calls.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def restore() -> None:
    """Restore the usual priority of the service for all threads of this process."""
    _thread.is_lowered = False  # in a fork of a thread that is
    threads = [threading.get_native_id()]
    with contextlib.suppress(OSError):  # the process may be out of descriptors
        threads += map(int, os.listdir("/proc/self/task"))
    for thread in threads:
        _set_priority(thread, _state["nice"])


def end_quietly() -> None:
    """Lower the priority of this process, which is about to exit."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)


def _can_rise() -> bool:
    """Return whether this process may leave SCHED_IDLE again: with CAP_SYS_NICE, or as far as RLIMIT_NICE allows."""
    soft, _ = resource.getrlimit(_RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= 20 - _state["nice"]:
        return True
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # out of descriptors; the load will report it
        return False
    capabilities = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> _CAP_SYS_NICE & 1)


def _set_priority(thread: int, nice: int) -> None:
    """Give a thread the usual policy and this nice value."""
    with contextlib.suppress(OSError):  # the thread has ended, or a filter forbids the system call
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, nice)


def core_seconds(pid: int) -> float:
    """Return the CPU seconds of a process's running threads; 0 when the process has ended."""
    spent = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def wants_core(pid: int) -> bool:
    """Return whether a thread of a process is running, or waiting for a core."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "stat").read_bytes().rpartition(b") ")[2].startswith(b"R"):
                return True
    return False
