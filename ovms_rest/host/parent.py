"""The end of a process that hangs after its parent has been killed.

A worker notices that its arbiter is gone between two inferences. One that hangs in native code never does, and nobody
is left to kill it: it would keep the listening sockets for good, so that the service could not start again. So the
kernel sends a signal when the parent ends (PR_SET_PDEATHSIG), whose handler is alarm(3): it takes the number of the
signal as seconds, and SIGALRM ends the process. Neither needs Python, which a hanging call may have locked.
"""

import ctypes
import math
import os
import signal

_PR_SET_PDEATHSIG = 1
# The real-time signals without another use: the first wakes workers, and `priority` has one for naps.
_SIGNALS = tuple(number for number in range(signal.SIGRTMIN + 1, signal.SIGRTMAX + 1) if number != signal.SIGRTMIN + 15)


def end_after_parent(parent: int, seconds: float) -> None:
    """Have this process end after its parent, in at least these seconds if the signals reach that far: 35 to 64.

    It can end in order before, or `postpone` its end. `parent` is the process id. The kernel forgets this when the
    process changes its user, and sends the signal when the thread that forked the process ends.
    """
    number, libc = choose_signal(seconds), ctypes.CDLL(None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc.signal(number, ctypes.cast(libc.alarm, ctypes.c_void_p))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, number))
    libc.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        signal.alarm(number)


def choose_signal(seconds: float) -> int:
    """Return the first signal that lasts for these seconds, or the last one."""
    return next((number for number in _SIGNALS if number >= seconds), _SIGNALS[-1])


def postpone(seconds: float) -> None:
    """Have this process, whose parent is gone, end after these seconds from now."""
    signal.alarm(math.ceil(seconds))
