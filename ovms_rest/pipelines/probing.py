"""Trying the code of a custom node in a throwaway process, so that its crash or hang does not harm the arbiter.

The process is started anew, as that of `models.proving`, and speaks as it does: it reads what to try as JSON, and
writes a line of JSON at every step and one with the answer.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from ovms_rest.errors import LoadError
from ovms_rest.pipelines import c_nodes, python_nodes

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


class Code(NamedTuple):
    """What is to be tried: a Python file, the name of a Python module or object, or a C library, and the params."""

    kind: Literal["file", "name", "c"]
    place: str
    params: Mapping[str, str]


def probe(code: Code, timeout: float, stop: Callable[[], bool] = lambda: False) -> Any:
    """Load the code of a node in a process of its own, for `timeout` seconds at most; return what it tells of itself.

    That is nothing for Python and `c_nodes.Description` for C. When `stop` says so, it is given up. Raises LoadError.
    """
    command = [sys.executable, "-m", "ovms_rest.pipelines.probing"]
    # In a session of its own, so that what the code may fork ends with it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            return _watch(process, code, timeout, stop)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], code: Code, timeout: float, stop: Callable[[], bool]) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead, which the end of its output will tell
        process.stdin.write(orjson.dumps({**code._asdict(), "params": dict(code.params), "path": sys.path}))
        process.stdin.close()
    output = select.poll()
    output.register(process.stdout, select.POLLIN)
    step, rest, deadline = "starting", b"", time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if not output.poll(min(_POLL_SECONDS, left) * 1000):
            if stop():
                raise LoadError("was not tried to the end, as the service ends")
            if process.poll() is None:
                continue
            received = b""  # what it forked may keep its output open
        else:
            received = os.read(process.stdout.fileno(), 65536)
        if not received:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its output and goes on
                raise LoadError(f"ended the process that tried it with {_wait(process, left)} while {step}")
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in map(orjson.loads, lines):
            if "reason" in line:
                raise LoadError(line["reason"])
            if "answer" in line:
                return line["answer"]
            step = line["step"]
    raise LoadError(f"did not come up in {timeout:g} s; it was stopped while {step}")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the end and describe it."""
    returncode = process.wait(seconds)
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def main() -> None:
    """Try the code that is told on the standard input: the throwaway process."""
    # Not to outlive an arbiter that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the code prints is no answer
    task = orjson.loads(sys.stdin.buffer.read())
    sys.path[:] = task["path"]

    def answer(**message: Any) -> None:
        os.write(answers, orjson.dumps(message) + b"\n")

    try:
        answer(answer=_try(Code(task["kind"], task["place"], task["params"]), lambda step: answer(step=step)))
    except LoadError as error:
        answer(reason=str(error))
    os._exit(0)


def _try(code: Code, tell: Callable[[str], None]) -> c_nodes.Description | None:
    if code.kind == "c":
        return c_nodes.describe(Path(code.place), code.params, tell)
    tell("being imported")
    if code.kind == "file":
        python_nodes.load_file("", Path(code.place), code.params)
    else:
        python_nodes.load_name("", code.place, code.params)
    return None


if __name__ == "__main__":
    main()
