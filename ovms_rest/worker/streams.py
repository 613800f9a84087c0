"""Standard output, standard error and log files as streams that never block a process, whatever their reader does.

A pipe whose reader has stopped, as in `gunicorn 2>&1 | stuck`, takes 64 KiB and then blocks its writer: the arbiter
would no longer replace workers, and a worker no longer respond, because of a log line. Here a line that cannot be
written within WAIT_SECONDS is dropped, and the log says how many were as soon as there is room again.

O_NONBLOCK is not set on inherited descriptors: it would apply to every process that shares the open file, such as the
shell.
"""

import contextlib
import io
import logging
import logging.handlers
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from ovms_rest.log import log

# How long a write waits for a slow reader. After a wait in vain, writes do not wait until there is room again.
WAIT_SECONDS = 0.02

_Write = Callable[[memoryview], int]

# The user and group of workers.
_owner = {"uid": 0, "gid": 0}


class Stream(io.RawIOBase):
    """A descriptor to write to, which is closed with the stream unless it is a standard one.

    Lines that it does not take are dropped and counted. `name` is for the log.
    """

    def __init__(self, descriptor: int, name: str, is_standard: bool = False) -> None:
        super().__init__()
        self.name = name
        self._descriptor = descriptor
        self._is_standard = is_standard
        self._own: io.FileIO | socket.socket | None = None
        self._write: _Write = self._write_plainly
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._lost = 0  # lines, of this process
        self._pid = os.getpid()
        self._reason = ""
        self._is_cut = False  # the last line that came out lacks its end
        self._waits = True
        self.attach()

    def attach(self) -> None:
        """Look at what the descriptor is now: gunicorn's `capture_output` replaces it by a file."""
        self._detach()
        kind = os.fstat(self._descriptor).st_mode
        if stat.S_ISSOCK(kind):  # of systemd's journal
            self._own = sock = socket.socket(fileno=os.dup(self._descriptor))
            self._write = lambda data: sock.send(data, socket.MSG_DONTWAIT)
        elif stat.S_ISFIFO(kind) or os.isatty(self._descriptor):
            self._attach_pipe()
        else:  # a file on a disk, or /dev/null: neither ever blocks
            self._write = self._write_plainly

    def _attach_pipe(self) -> None:
        """Open the pipe or terminal once more, with flags of its own."""
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._own = io.FileIO(os.open(f"/proc/self/fd/{self._descriptor}", flags), "w")
        except OSError:  # another user's, or without a reader
            self._write = self._write_after_poll
        else:
            self._write = partial(os.write, self._own.fileno())

    def _detach(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def close(self) -> None:
        """Close the stream."""
        if not self.closed:
            self._detach()
            if not self._is_standard:
                os.close(self._descriptor)
        super().close()

    def unblocked(self) -> int:
        """Return a non-blocking descriptor of the pipe or terminal if there is one, else the usual one."""
        return self._own.fileno() if isinstance(self._own, io.FileIO) else self._descriptor

    def _write_plainly(self, data: memoryview) -> int:
        return os.write(self._descriptor, data)

    def _write_after_poll(self, data: memoryview) -> int:
        """Write no more than a pipe has room for. Linux before 6.4 waits if others take that room meanwhile."""
        if not self._poll.poll(0):
            raise BlockingIOError
        data = data[: select.PIPE_BUF]
        try:
            return os.pwritev(self._descriptor, [data], -1, os.RWF_NOWAIT)
        except (BlockingIOError, BrokenPipeError):
            raise
        except OSError:  # not supported
            return os.write(self._descriptor, data)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write lines, or drop them; return their length in either case."""
        view = memoryview(data)
        rest = memoryview(b"\n" + view) if self._is_cut else view
        length, reason = len(rest), ""
        deadline = time.monotonic() + WAIT_SECONDS if self._waits else 0.0
        while rest:
            try:
                rest = rest[self._write(rest) :]
            except BlockingIOError:
                if not self._wait(deadline):
                    reason = "its reader has fallen behind"
                    break
            except OSError as error:
                reason = error.strerror or "unknown error"
                break
        if reason:
            self._count_own()
            self._reason = reason
            self._lost += max(1, bytes(rest).count(b"\n"))
            self._is_cut = self._is_cut or len(rest) < length
            self._waits = False
        else:
            self._is_cut = False
            self._waits = True
            if self._lost:
                self._log_lost()
        return len(view)

    def _wait(self, deadline: float) -> bool:
        """Wait until there is room; return whether there is."""
        left = deadline - time.monotonic()
        return left > 0 and bool(self._poll.poll(left * 1000))

    def _count_own(self) -> None:
        """Count from 0 in a forked process: lines lost before the fork are logged by the other process."""
        if self._pid != os.getpid():
            self._pid, self._lost = os.getpid(), 0

    def _log_lost(self) -> None:
        """Log how many lines were lost, now that there is room."""
        self._count_own()
        lost, self._lost = self._lost, 0
        if not lost:
            return
        log.warning("%d lines of %s were lost: %s", lost, self.name, self._reason)
        if self._lost:  # the line just logged was lost, too
            self._lost += lost - 1


class _Standard(io.TextIOWrapper):
    """A standard stream."""

    def __init__(self, stream: Stream, like: TextIO) -> None:
        """Write whole lines, encoded as by the stream `like`."""
        super().__init__(stream, like.encoding, like.errors, line_buffering=True)
        self.stream = stream


def install(uid: int, gid: int) -> None:
    """Make this process, and those forked from it, write to the log without ever being blocked by its reader.

    Called in the arbiter whenever gunicorn has set up its logger. New log files, which workers open again after a
    rotation, belong to their user and group.
    """
    _owner.update(uid=uid, gid=gid)
    for name, number in (("stdout", 1), ("stderr", 2)):
        _replace(name, number)
    for handler in _handlers():
        if isinstance(handler, logging.FileHandler):
            _unblock_file(handler)
        elif isinstance(handler, logging.handlers.SysLogHandler):
            _unblock_syslog(handler)
        elif isinstance(handler, logging.StreamHandler):
            _unblock_stream(handler)


def _handlers() -> set[logging.Handler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}


def _replace(name: str, number: int) -> None:
    """Replace a standard stream by an unblocked one, unless that has been done before."""
    standard: TextIO | None = getattr(sys, name)
    if isinstance(standard, _Standard):
        standard.stream.attach()
        return
    try:
        if standard is None or standard.fileno() != number:  # closed, or replaced by another stream
            return
    except (OSError, ValueError):
        return
    standard.flush()
    stream = Stream(number, f"the standard {'error' if number == 2 else 'output'}", is_standard=True)
    setattr(sys, name, _Standard(stream, standard))


def unblocked_stdout() -> int:
    """Return a non-blocking descriptor of the standard output if there is one, else the usual one."""
    return sys.stdout.stream.unblocked() if isinstance(sys.stdout, _Standard) else 1


def _unblock_stream(handler: "logging.StreamHandler[TextIO]") -> None:
    if handler.stream is sys.__stderr__:
        handler.setStream(sys.stderr)
    elif handler.stream is sys.__stdout__:
        handler.setStream(sys.stdout)


def _unblock_file(handler: Any) -> None:
    """Unblock a log file, which may be a named pipe or /dev/stderr, now and whenever it is opened again."""
    if "_open" not in vars(handler):
        handler._open = partial(_open_file, handler, handler._open)
        if handler.stream is not None:
            handler.stream = _unblock_text(handler.stream)


def _open_file(handler: logging.FileHandler, opening: Callable[[], TextIO]) -> TextIO:
    """Open a log file; write to the standard error instead, and say so, when it cannot be opened."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISFIFO(os.stat(handler.baseFilename).st_mode):  # opening it to write would wait for a reader
                os.close(os.open(handler.baseFilename, os.O_WRONLY | os.O_NONBLOCK))
        provide_file(handler.baseFilename, _owner["uid"], _owner["gid"])
        file = opening()
    except OSError as error:
        print(f"cannot open the log file {handler.baseFilename}: {error.strerror}", file=sys.stderr)
        return _unblock_text(os.fdopen(os.dup(2), "w"))
    return _unblock_text(file)


def provide_file(path: str, uid: int, gid: int, mode: int = 0o666) -> None:
    """Create a log file for workers of another user (--user), who may not be allowed to; in the arbiter.

    A file that exists keeps its owner: the workers may have moved it there, or have made the path a link to it. Errors
    are left to those who open the file.
    """
    if not uid or os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(file, "wb"):
            os.fchown(file, uid, gid)


def provide_logs() -> None:
    """Create the files of all loggers for the workers, before anything else opens them."""
    for handler in _handlers():
        if isinstance(handler, logging.FileHandler):
            provide_file(handler.baseFilename, _owner["uid"], _owner["gid"])


def _unblock_text(file: TextIO) -> TextIO:
    """Return a text file as one that never blocks; a regular file stays as it is."""
    if _is_regular(file):
        return file
    stream = Stream(os.dup(file.fileno()), file.name)
    unblocked = io.TextIOWrapper(stream, file.encoding, file.errors, line_buffering=True)
    file.close()
    return unblocked


def _is_regular(file: TextIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


class _UnblockedSyslog:
    """Drops records for which the daemon of a handler has no room."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self._send = handler.emit
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, or drop it."""
        sock = self._handler.socket
        if sock and not select.select([], [sock], [], 0)[1]:
            self._lost += 1
            return
        self._send(record)
        if self._lost:
            lost, self._lost = self._lost, 0
            log.warning("%d lines of the system log were lost: it has fallen behind", lost)


def _unblock_syslog(handler: logging.handlers.SysLogHandler) -> None:
    if "emit" not in vars(handler):
        handler.emit = _UnblockedSyslog(handler).emit  # type: ignore[method-assign]
