"""Signal handling on the ordinary stack, instead of the one that OpenVINO sets up.

On CPUs with AMX OpenVINO gives the thread that compiles an alternate signal stack of AT_MINSIGSTKSZ + 8192 bytes, some
20 KB (sigaltstack(2)). Python handles signals on it. A signal may put 12 KB of registers there, so that two that arrive
together overflow it and the kernel ends the process by SIGSEGV ("overflowed sigaltstack" in its log): a worker that
gets a wake-up for a connection and a request to end at the same moment, or the arbiter at any two signals.
"""

import ctypes

_SS_DISABLE = 2


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_libc = ctypes.CDLL(None)


def use_ordinary_stack() -> None:
    """Handle signals on the ordinary stack, in this thread and in processes that it forks."""
    _libc.sigaltstack(ctypes.byref(_Stack(None, _SS_DISABLE, 0)), None)
