"""Work in a throwaway process, so that a crash or hang does not harm the arbiter.

The process is a new one and not a fork, because an inherited OpenVINO may hang. It reads its task as a line of JSON
and writes a line of JSON for each result, and for each step before it, so that the step is known when it dies or
hangs. While workers serve, it runs only on cores that no other process wants.
"""

import contextlib
import ctypes
import importlib
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import PIPE
from typing import Any

import orjson

from ovms_rest.errors import LoadError, ShortageError
from ovms_rest.host.priority import core_seconds, gives_way, wants_core

# Writes a line: send(step="being compiled"), or a result, which has any other names.
Send = Callable[..., None]
# A function at the top of a module; it gets the task as read from JSON.
Work = Callable[[Any, Send], None]

STOPPED = "was not tried, because the service is shutting down"

# Running processes: code that reaps all children leaves these to `start`, which needs their exit status.
running: set[int] = set()

_PR_SET_PDEATHSIG = 1
# The program; `_LOWER` comes first so that the imports run at low priority too.
_LOWER = "from ovms_rest.host.priority import yield_to_others; yield_to_others(); "
_RUN = "from ovms_rest.host.throwaway import main; main()"
_POLL_SECONDS = 0.2
# A process that gets no core may take this many times its timeout.
_MOST_TIMEOUTS = 4


class EndedError(LoadError):
    """The process ended by itself before it sent the expected result."""


class Throwaway:
    """A running throwaway process; `start` makes one."""

    def __init__(self, process: subprocess.Popen[bytes], task: bytes, stop: Callable[[], bool]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stop = stop
        self._input, self._output = process.stdin, process.stdout
        self._unsent = memoryview(task)
        self._rest = b""
        self._lines: deque[bytes] = deque()
        self._is_silent = False
        # The process may be slow to read its task, so the task is written in pieces while waiting for results.
        os.set_blocking(self._input.fileno(), False)
        self._ready = select.poll()
        self._ready.register(self._input, select.POLLOUT)
        self._ready.register(self._output, select.POLLIN)

    def receive(self, timeout: float) -> dict[str, Any]:
        """Wait at most `timeout` seconds for the next result, and return it.

        While the process gives way to workers, time in which it wants a core and gets none does not count, up to three
        times the timeout.

        Raises LoadError, which names the step: EndedError when the process ended, LoadError itself after the timeout.
        Once `stop` returns True, the text is STOPPED.
        """
        step, deadline = "starting", _Deadline(self._process.pid, timeout)
        try:
            while (message := self._receive(deadline)) is not None:
                if "step" not in message:
                    return message
                step = message["step"]
            raise EndedError(f"ended its trial process with {self._wait(deadline)} while {step}")
        except TimeoutError:
            raise LoadError(f"timed out after {timeout:g} s while {step}") from None

    def _receive(self, deadline: "_Deadline") -> dict[str, Any] | None:
        """Return the next line, None after the last. Raises LoadError and TimeoutError."""
        while not self._lines:
            has_ended = self._process.poll() is not None
            if not self._exchange(deadline.pause()):
                if has_ended:  # while a fork of it keeps its output open
                    return None
                self._check_stop()
            elif self._is_silent:
                return None
        message: dict[str, Any] = orjson.loads(self._lines.popleft())
        return message

    def _exchange(self, seconds: float) -> bool:
        """Write and read as far as possible within that time; return whether anything was written or read."""
        ready = self._ready.poll(seconds * 1000)
        for descriptor, _ in ready:
            if descriptor == self._output.fileno():
                self._read()
            else:
                self._write()
        return bool(ready)

    def _read(self) -> None:
        received = os.read(self._output.fileno(), 65536)
        if not received:
            self._ready.unregister(self._output)
            self._is_silent = True
        *lines, self._rest = (self._rest + received).split(b"\n")
        self._lines.extend(lines)

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._input.fileno(), self._unsent) :]
        except BrokenPipeError:
            self._unsent = self._unsent[:0]  # it reads no more; if it died, its output ends
        if not self._unsent:
            self._ready.unregister(self._input)
            self._input.close()

    def _wait(self, deadline: "_Deadline") -> str:
        """Wait for the end and describe it. Raises LoadError, and TimeoutError if only the output was closed."""
        while True:
            try:
                returncode = self._process.wait(deadline.pause())
            except subprocess.TimeoutExpired:
                self._check_stop()
            else:
                return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"

    def _check_stop(self) -> None:
        if self._stop():
            raise LoadError(STOPPED)


class _Deadline:
    """The deadline of a process; while it gives way to workers, only its time on a core counts."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid = pid
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._last = self._end + (_MOST_TIMEOUTS - 1) * seconds if gives_way() else self._end
        self._spent = core_seconds(pid)

    def pause(self) -> float:
        """Return the seconds to wait before looking again. Raises TimeoutError when there are none."""
        now = time.monotonic()
        if now >= self._end and now < self._last and wants_core(self._pid):
            self._end = min(now + self._seconds - (core_seconds(self._pid) - self._spent), self._last)
        if now >= self._end:
            raise TimeoutError
        return min(self._end - now, _POLL_SECONDS)


@contextmanager
def start(
    work: Work, task: Any, stop: Callable[[], bool] = lambda: False, descriptors: Sequence[int] = ()
) -> Iterator[Throwaway]:
    """Start a throwaway process that does some work; kill it on exit, with all processes that it forked in its group.

    `task` goes to `work` as JSON, with values of other types as strings. Once `stop` returns True, `receive` waits no
    longer. The process inherits the `descriptors` under the same numbers. Raises ShortageError when the system has no
    process, memory or descriptor left for it.
    """
    written = orjson.dumps(task, default=str, option=orjson.OPT_APPEND_NEWLINE)
    code = _LOWER + _RUN if gives_way() else _RUN
    command = [sys.executable, "-c", code, work.__module__, work.__name__]
    with _start(command, descriptors) as process:
        running.add(process.pid)
        try:
            yield Throwaway(process, written, stop)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            running.discard(process.pid)


def _start(command: list[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    try:
        # One thread for linear algebra: by default NumPy starts one per core, and its import takes three times the CPU.
        environ = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
        # A process group of its own, so that forks of the work end with it. In a session of its own it would get as
        # much CPU time as all workers together, whatever its priority (autogroup, sched(7)).
        return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, process_group=0, pass_fds=descriptors, env=environ)
    except OSError as error:
        raise ShortageError(f"cannot start a process to try models and nodes: {error.strerror}") from error


def main() -> None:
    """Do the work whose module and name are the arguments; the main function of the throwaway process."""
    # The process must not outlive a killed arbiter.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a terminal set to `tostop` would stop it at its first line
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps what the work prints out of the results
    _, module, name = sys.argv
    work: Work = getattr(importlib.import_module(module), name)

    def send(**message: Any) -> None:
        os.write(results, orjson.dumps(message) + b"\n")

    # A line, and not all until the end: a worker forked meanwhile keeps the other end of the pipe open.
    work(orjson.loads(sys.stdin.buffer.readline()), send)
    os._exit(0)  # OpenVINO's teardown takes a while and serves no purpose
