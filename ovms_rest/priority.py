"""Scheduling priority of loading while workers serve, so that inferences come first.

No right is needed to lower a priority (sched(7)), but without CAP_SYS_NICE nothing raises it again: neither a nice
value nor SCHED_IDLE. So what lowers its priority here is a process or a thread that ends with its work.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_LOWEST = 19
# The arbiter replaces no workers while it waits for a thread of its own. On cores that are all busy for good, a thread
# with this nice value still gets a tenth of one, with 19 a seventieth, and with SCHED_IDLE a 340th.
_MODERATE = 10

Result = TypeVar("Result")

_state = {"is_serving": False}


def begin_to_serve() -> None:
    """Have loads give way to workers from now on. Before that, at the start, there is nothing to disturb."""
    _state["is_serving"] = True


def gives_way() -> bool:
    """Return whether loads in this process give way to workers."""
    return _state["is_serving"]


def yield_to_others() -> None:
    """Have this thread, and those that it will start, run only where no other process wants to, for good.

    Linux then gives it the idle class of disk access too (ioprio_set(2)). What the system forbids, such as a filter of
    system calls, is passed over: the work is the same at any priority.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run_niced(work: Callable[[], Result]) -> Result:
    """Do work in a thread of lower priority, wait for it, and return its result or raise its exception.

    The caller keeps its priority, and so does what it forks. Before workers serve, the caller does the work itself.
    """
    if not gives_way():
        return work()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _MODERATE)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


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
