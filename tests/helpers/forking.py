"""Children of the test's process, which end as a worker does."""

import os
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Run work in a child; return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def join(*pids: int) -> None:
    """Wait for children, which must exit with 0."""
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
