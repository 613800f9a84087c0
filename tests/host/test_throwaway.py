"""Throwaway processes: what they answer, how their end is told, and that none can hold up who waits for it."""

import contextlib
import os
import pty
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
from service import is_running, wait_for_end

from ovms_rest.errors import LoadError
from ovms_rest.host.throwaway import STOPPED, EndedError, start

# More than a pipe holds.
LARGE = "x" * 2**20


@pytest.fixture(autouse=True)
def _find_the_work_below(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def answer_each(task, tell):
    for item in task:
        tell(step="at an item")
        tell(answer=item)


def print_and_answer(task, tell):
    print('{"answer": "printed"}', flush=True)
    os.system('echo \'{"answer": "echoed"}\'')
    tell(answer=task)


def fall_silent(task, tell):
    tell(step="falling silent")
    time.sleep(60)


def close_the_output(task, tell):
    tell(step="closing its output")
    os.closerange(0, 99)
    time.sleep(60)


def step_for_ever(task, tell):
    while True:
        tell(step="stepping")


def die(task, tell):
    tell(step="dying")
    os.kill(os.getpid(), task)


def fail(task, tell):
    raise ValueError(task)


def fork(task, tell):
    """Leave a process behind that keeps the output."""
    if pid := os.fork():
        tell(pid=pid)
    else:
        time.sleep(60)


def reason_of(work, task=None, timeout=60.0, stop=lambda: False):
    with pytest.raises(LoadError) as caught, start(work, task, stop) as process:
        process.answer(timeout)
    return str(caught.value)


@pytest.fixture
def deaf(tmp_path, monkeypatch):
    """Have a process started that reads nothing and says nothing."""
    program = tmp_path / "deaf"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))


# --- Answers


def test_answers_come_in_their_order_without_the_steps():
    with start(answer_each, [1, "two", None]) as process:
        assert [process.answer(60) for _ in range(3)] == [{"answer": 1}, {"answer": "two"}, {"answer": None}]


def test_a_task_and_an_answer_may_be_larger_than_a_pipe():
    with start(answer_each, [LARGE]) as process:
        assert process.answer(60) == {"answer": LARGE}


def test_what_json_does_not_know_comes_as_a_string():
    with start(answer_each, [Path("/a/b")]) as process:
        assert process.answer(60) == {"answer": "/a/b"}


def test_what_the_work_prints_is_no_answer():
    with start(print_and_answer, "told") as process:
        assert process.answer(60) == {"answer": "told"}


# --- Its end


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_signal_that_ends_the_process_is_told_with_the_step(number):
    assert reason_of(die, number) == f"ended the process that tried it with {number.name} while dying"


def test_an_exception_ends_the_process():
    assert reason_of(fail) == "ended the process that tried it with exit code 1 while starting"


def test_an_end_is_told_apart_from_what_else_goes_wrong():
    with start(answer_each, ["one"]) as process:
        process.answer(60)
        with pytest.raises(EndedError, match="with exit code 0 while starting"):
            process.answer(60)
    with start(fall_silent, None) as process, pytest.raises(LoadError) as caught:
        process.answer(0.5)
    assert not isinstance(caught.value, EndedError)


def test_an_end_is_told_though_another_process_keeps_the_output():
    with start(fork, None) as process:
        process.answer(60)
        with pytest.raises(EndedError, match="exit code 0"):
            process.answer(60)


def test_nothing_of_it_is_left_in_the_end():
    with start(fork, None) as process:
        pid = process.answer(60)["pid"]
        assert is_running(pid)
    wait_for_end(pid)


# --- Waiting for it


@pytest.mark.parametrize(
    ("work", "step"),
    [(fall_silent, "falling silent"), (close_the_output, "closing its output"), (step_for_ever, "stepping")],
)
def test_it_is_waited_for_as_long_as_allowed(work, step):
    started = time.monotonic()
    assert reason_of(work, timeout=3) == f"did not come up in 3 s; it was stopped while {step}"
    assert 3 <= time.monotonic() - started < 10


@pytest.mark.parametrize("work", [fall_silent, close_the_output])
def test_it_is_not_waited_for_when_the_service_ends(work):
    started = time.monotonic()
    assert reason_of(work, stop=lambda: time.monotonic() > started + 2) == STOPPED
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("deaf")
def test_a_task_that_is_not_read_is_given_up_when_the_time_is_over():
    started = time.monotonic()
    assert reason_of(answer_each, [LARGE], timeout=1) == "did not come up in 1 s; it was stopped while starting"
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("deaf")
def test_a_task_that_is_not_read_is_given_up_when_the_service_ends():
    started = time.monotonic()
    assert reason_of(answer_each, [LARGE], stop=lambda: True) == STOPPED
    assert time.monotonic() - started < 10


def test_a_process_that_dies_before_it_reads_its_task_is_told(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert reason_of(answer_each, [LARGE]) == "ended the process that tried it with exit code 1 while starting"


def test_a_terminal_that_stops_background_output_does_not_stop_it():
    """As `stty tostop` sets it; the process is not in the foreground's process group."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            settings = termios.tcgetattr(2)
            settings[3] |= termios.TOSTOP
            termios.tcsetattr(2, termios.TCSANOW, settings)
            with start(print_and_answer, "done") as process:
                os._exit(0 if process.answer(20) == {"answer": "done"} else 2)
        finally:
            os._exit(1)
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO at its end
        while stream.read(4096):
            pass
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
