"""Scheduling priority of loading while workers serve, so that inferences come first.

No right is needed to lower a priority (sched(7)), but without CAP_SYS_NICE or RLIMIT_NICE nothing raises it again:
neither a nice value nor SCHED_IDLE. So what lowers its priority here is a process or a thread that ends with its work,
or one that has that right.
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
# For what others wait for: the arbiter replaces no workers while it loads, and a reload is over when the new workers
# serve. On cores that are all busy for good, a thread with this nice value still gets a tenth of one, with 19 a
# seventieth, and with SCHED_IDLE a 340th. So such work is idle only at first.
_MODERATE = 10
_PATIENCE_SECONDS = 4.0
_CAP_SYS_NICE = 23
_RLIMIT_NICE = 13  # which the module `resource` does not name

Result = TypeVar("Result")

_state = {"is_serving": 0, "nice": 0}


def begin_to_serve() -> None:
    """Have loads give way to workers from now on. Before that, at the start, there is nothing to disturb."""
    _state.update(is_serving=1, nice=os.getpriority(os.PRIO_PROCESS, 0))


def gives_way() -> bool:
    """Return whether loads in this process give way to workers."""
    return bool(_state["is_serving"])


def yield_to_others() -> None:
    """Have this thread, and those that it will start, run only where no other process wants to, for good.

    Linux then gives it the idle class of disk access too (ioprio_set(2)). What the system forbids, such as a filter of
    system calls, is passed over: the work is the same at any priority.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run_lowered(work: Callable[[], Result]) -> Result:
    """Do work in a thread of lower priority, wait for it, and return its result or raise its exception.

    The caller keeps its priority, and so does what it forks. Before workers serve, the caller does the work itself.
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
    """Run the caller's work only where no other process wants to run; afterwards go back to the usual priority.

    Threads that the work has started go back as well; processes that it forks have to `restore` their priority. Without
    the right to go back the work keeps its priority.
    """
    if not _can_rise():
        yield
        return
    timer = threading.Timer(_PATIENCE_SECONDS, _set_priority, (threading.get_native_id(), _MODERATE))
    timer.daemon = True
    timer.start()  # before this thread is lowered, for a thread inherits that
    yield_to_others()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        restore()


def restore() -> None:
    """Give all threads of this process the usual priority of the service."""
    threads = [threading.get_native_id()]
    with contextlib.suppress(OSError):  # there may be no descriptors left
        threads += map(int, os.listdir("/proc/self/task"))
    for thread in threads:
        _set_priority(thread, _state["nice"])


def end_quietly() -> None:
    """Have the rest of this process, which is about to exit, give way to others."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)


def _can_rise() -> bool:
    """Return whether this process may leave SCHED_IDLE again: with CAP_SYS_NICE, or as far as RLIMIT_NICE allows."""
    soft, _ = resource.getrlimit(_RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= 20 - _state["nice"]:
        return True
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # there are no descriptors left, which is for the load to find
        return False
    capabilities = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> _CAP_SYS_NICE & 1)


def _set_priority(thread: int, nice: int) -> None:
    """Give a thread the usual policy and a nice value."""
    with contextlib.suppress(OSError):  # a thread that is gone, or what a filter of system calls forbids
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, nice)


def core_seconds(pid: int) -> float:
    """Return the CPU time of a process and all its threads that run; 0 when the process is gone."""
    spent = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def wants_core(pid: int) -> bool:
    """Return whether a thread of a process runs, or would if it had a core."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "stat").read_bytes().rpartition(b") ")[2].startswith(b"R"):
                return True
    return False
