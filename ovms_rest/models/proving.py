"""Trying models in a throwaway process, so that one that crashes or hangs does not take the arbiter with it.

The process is started anew and not forked: what OpenVINO has in the arbiter is nothing to try a model on.
It reads its tasks as one JSON document and writes a line of JSON at every step, so that it is known which model it was
at, and at what, when it dies or falls silent.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from ovms_rest.errors import LoadError
from ovms_rest.models.compilation import Compilation
from ovms_rest.models.runtime import Model

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """A model to be tried: its file and how it is to be compiled."""

    file: Path
    compilation: Compilation


def prove(tasks: Sequence[Task], timeout: float) -> list[str | None]:
    """Read, compile and infer every model once in a throwaway process; return for each None or why it must not serve.

    Each model has `timeout` seconds. One that ends the process gets another try in a process of its own before it is
    blamed, for the damage may have been done by a model before it.
    """
    reasons: list[str | None] = []
    while len(reasons) < len(tasks):
        reasons += _attempt(tasks[len(reasons) :], timeout)
    return reasons


def _attempt(tasks: Sequence[Task], timeout: float) -> list[str | None]:
    """Start a process and try models until all are through or one fails it; return the results, of one at least."""
    command = [sys.executable, "-m", "ovms_rest.models.proving"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            return _watch(process, tasks, timeout)
        finally:
            process.kill()


def _watch(process: subprocess.Popen[bytes], tasks: Sequence[Task], timeout: float) -> list[str | None]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(orjson.dumps(tasks, default=str))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it is dead, which the end of its output will tell
    output = select.poll()
    output.register(process.stdout, select.POLLIN)
    reasons: list[str | None] = []
    step, rest, deadline = "starting", b"", time.monotonic() + timeout
    while len(reasons) < len(tasks):
        if not output.poll(max(0.0, deadline - time.monotonic()) * 1000):
            reasons.append(f"did not come up in {timeout:g} s; it was stopped while {step}")
            break
        received = os.read(process.stdout.fileno(), 65536)
        if not received:
            if not reasons:
                reasons.append(f"ended the process that tried it with {_describe_end(process.wait())} while {step}")
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in map(orjson.loads, lines):
            if "step" in line:
                step = line["step"]
            else:
                reasons.append(line["reason"])
                step, deadline = "starting", time.monotonic() + timeout
    return reasons


def _describe_end(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def main() -> None:
    """Try the models that come on the standard input: the throwaway process."""
    # Not to outlive an arbiter that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a model or plugin prints is no answer

    def answer(**message: str | None) -> None:
        os.write(answers, orjson.dumps(message) + b"\n")

    for task in orjson.loads(sys.stdin.buffer.read()):
        try:
            answer(step="being read")
            model = Model("", 1, Path(task["file"]), Compilation(**task["compilation"]))
            answer(step="being compiled")
            model.compile()
            answer(step="inferring for the first time")
            model.open(lambda: None)
            del model
        except LoadError as error:
            answer(reason=str(error))
        else:
            answer(reason=None)
    os._exit(0)  # nothing is left to do, and OpenVINO takes a while to tear down


if __name__ == "__main__":
    main()
