"""Scheduling priority of loads, which give way to inferences while workers serve.

Any process may lower its priority, but only one with CAP_SYS_NICE or RLIMIT_NICE can raise it again (sched(7)); this
holds for nice values and SCHED_IDLE. So only processes and threads that end with their work, or that have the right,
lower their priority here.
"""

import contextlib
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

_LOWEST = 19
# For work that delays others: the arbiter replaces no workers while it loads, and a reload ends when the new workers
# serve. If all cores are always busy, a thread with this nice value still gets a tenth of one, with 19 a seventieth,
# and with SCHED_IDLE a 340th. So such work is idle only at first.
_MODERATE = 10
_PATIENCE_SECONDS = 4.0
_CAP_SYS_NICE = 23
_RLIMIT_NICE = 13  # missing in the module `resource`

Result = TypeVar("Result")

_state = {"is_serving": 0, "nice": 0}


def begin_to_serve() -> None:
    """Have loads give way to workers from now on; before that there are no workers."""
    _state.update(is_serving=1, nice=os.getpriority(os.PRIO_PROCESS, 0))


def gives_way() -> bool:
    """Return whether loads in this process give way to workers."""
    return bool(_state["is_serving"])


def yield_to_others() -> None:
    """Run this thread, and threads that it will start, only on cores that no other process wants, for good.

    Linux then gives them the idle class of disk access too (ioprio_set(2)). Errors are ignored, such as those of a
    filter of system calls.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run_lowered(work: Callable[[], Result]) -> Result:
    """Do work in a thread of lower priority; return its result or raise its exception.

    The caller and its forks keep their priority. Before workers serve, the caller does the work itself.
    """
    if not gives_way():
        return work()
    can_rise = _can_rise()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        if can_rise:
            yield_to_others()
        else:
            _set_priority(threading.get_native_id(), _MODERATE)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    if thread.is_alive():
        if can_rise:
            _set_priority(cast(int, thread.native_id), _MODERATE)
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def lowered() -> Iterator[None]:
    """Run the block only on cores that no other process wants; afterwards restore the usual priority.

    Threads that the block started are restored as well; processes that it forks have to `restore` theirs. A process
    that may not raise its priority keeps it.
    """
    if not _can_rise():
        yield
        return
    timer = threading.Timer(_PATIENCE_SECONDS, _set_priority, (threading.get_native_id(), _MODERATE))
    timer.daemon = True
    timer.start()  # before this thread is lowered, as threads inherit the priority
    yield_to_others()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        restore()


def restore() -> None:
    """Restore the usual priority of the service for all threads of this process."""
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
