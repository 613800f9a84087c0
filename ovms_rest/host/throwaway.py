"""Work in a throwaway process, so that what crashes or hangs there does not take the arbiter with it.

The process is started anew and not forked: what OpenVINO has in the arbiter is nothing to try a model on. It reads its
task as one JSON document and writes a line of JSON for each answer, and one at every step before, so that it is known
what it was at when it dies or falls silent. While workers serve, it runs only on cores that no other process wants.
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
from typing import Any

import orjson

from ovms_rest.errors import LoadError, ShortageError
from ovms_rest.host.priority import core_seconds, gives_way, wants_core

# Writes a line: tell(step="being compiled"), or an answer, which has any other names.
Tell = Callable[..., None]
# A function of a module, which gets the task as it came out of JSON.
Work = Callable[[Any, Tell], None]

STOPPED = "was not tried to the end, as the service ends"

# The processes that run: whoever reaps all children leaves these to `start`, which needs to know how they ended.
running: set[int] = set()

_PR_SET_PDEATHSIG = 1
# What the process runs, the first at a low priority from its first import on.
_LOWER = "from ovms_rest.host.priority import yield_to_others; yield_to_others(); "
_RUN = "from ovms_rest.host.throwaway import main; main()"
_POLL_SECONDS = 0.2
# A process that gets no core may take so many times its timeout.
_MOST_TIMEOUTS = 4


class EndedError(LoadError):
    """The process ended by itself, without the answer that was waited for."""


class Throwaway:
    """A throwaway process as the arbiter sees it; `start` makes one."""

    def __init__(self, process: subprocess.Popen[bytes], task: bytes, stop: Callable[[], bool]) -> None:
        """Take a process that was started, and what it is to read."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stop = stop
        self._input, self._output = process.stdin, process.stdout
        self._unsent = memoryview(task)
        self._rest = b""
        self._lines: deque[bytes] = deque()
        self._is_silent = False
        # It may not read its task, and need not: that goes out piece by piece while an answer is waited for.
        os.set_blocking(self._input.fileno(), False)
        self._ready = select.poll()
        self._ready.register(self._input, select.POLLOUT)
        self._ready.register(self._output, select.POLLIN)

    def answer(self, timeout: float) -> dict[str, Any]:
        """Wait `timeout` seconds at most for the next answer, and return it.

        Of a process that gives way to workers, the time in which it wants a core and gets none does not count, up to
        three times the timeout.

        Raises LoadError, which says at which step it was: EndedError when the process ended, and else when the time is
        over. When `stop` said so meanwhile it has the text STOPPED.
        """
        step, deadline = "starting", _Deadline(self._process.pid, timeout)
        try:
            while (message := self._receive(deadline)) is not None:
                if "step" not in message:
                    return message
                step = message["step"]
            raise EndedError(f"ended the process that tried it with {self._wait(deadline)} while {step}")
        except TimeoutError:
            raise LoadError(f"did not come up in {timeout:g} s; it was stopped while {step}") from None

    def _receive(self, deadline: "_Deadline") -> dict[str, Any] | None:
        """Return the next line, None when no more will come. Raises LoadError and TimeoutError."""
        while not self._lines:
            has_ended = self._process.poll() is not None
            if not self._exchange(deadline.pause()):
                if has_ended:  # and what it forked keeps its output open
                    return None
                self._check_stop()
            elif self._is_silent:
                return None
        message: dict[str, Any] = orjson.loads(self._lines.popleft())
        return message

    def _exchange(self, seconds: float) -> bool:
        """Write and read what is possible now or will be in that time; tell whether anything was."""
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
            self._unsent = self._unsent[:0]  # it reads no more; if it is dead, the end of its output tells
        if not self._unsent:
            self._ready.unregister(self._input)
            self._input.close()

    def _wait(self, deadline: "_Deadline") -> str:
        """Wait for the end and describe it. Raises LoadError, and TimeoutError when it only closed its output."""
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
    """The end of the time that a process has; while it gives way to workers, that of the time on a core."""

    def __init__(self, pid: int, seconds: float) -> None:
        """Start to count."""
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
    """Start a throwaway process that does some work, and end it in the end, with all that it forked into its group.

    `task` goes to `work` by JSON, in which what JSON does not know is a string. When `stop` says so, answers are no
    longer waited for. The process has the `descriptors` under the same numbers. Raises ShortageError when the system
    has no process, memory or descriptor left for it.
    """
    written = orjson.dumps(task, default=str)
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
        # One thread for linear algebra: NumPy starts one for each core else, and its import takes three times the CPU.
        environ = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
        # In a process group of its own, so that what the work may fork ends with it. In a session of its own it would
        # get as much of the cores as all workers together, whatever its priority (autogroup, sched(7)).
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
            pass_fds=descriptors,
            env=environ,
        )
    except OSError as error:
        raise ShortageError(f"cannot start a process to try models and nodes in: {error.strerror}") from error


def main() -> None:
    """Be the throwaway process: do the work whose module and name are the arguments."""
    # Not to outlive an arbiter that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a terminal set to `tostop` would stop it at its first line
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the work prints is no answer
    _, module, name = sys.argv
    work: Work = getattr(importlib.import_module(module), name)

    def tell(**message: Any) -> None:
        os.write(answers, orjson.dumps(message) + b"\n")

    work(orjson.loads(sys.stdin.buffer.read()), tell)
    os._exit(0)  # nothing is left to do, and OpenVINO takes a while to tear down
