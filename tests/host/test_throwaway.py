"""Throwaway processes: their results, reports of how they ended, and limits on how long the arbiter waits."""

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

# Larger than the buffer of a pipe.
LARGE = "x" * 2**20


@pytest.fixture(autouse=True)
def _make_this_module_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def send_each(task, send):
    for item in task:
        send(step="at an item")
        send(result=item)


def print_and_send(task, send):
    print('{"result": "printed"}', flush=True)
    os.system('echo \'{"result": "echoed"}\'')
    send(result=task)


def hang(task, send):
    send(result="begun")
    send(step="hanging")
    time.sleep(60)


def close_output(task, send):
    send(result="begun")
    send(step="closing its output")
    os.closerange(0, 99)
    time.sleep(60)


def step_forever(task, send):
    send(result="begun")
    while True:
        send(step="stepping")


def die(task, send):
    send(step="dying")
    os.kill(os.getpid(), task)


def fail(task, send):
    raise ValueError(task)


def fork(task, send):
    """Leave a process that keeps the output open."""
    if pid := os.fork():
        send(pid=pid)
    else:
        time.sleep(60)


def reason_after_begin_of(work, timeout=60.0, shuts_down=False):
    """Return why no result follows the first one, for which a busy machine may take any time."""
    begun = []
    with start(work, None, lambda: shuts_down and bool(begun)) as process:
        begun.append(process.receive(60))
        with pytest.raises(LoadError) as caught:
            process.receive(timeout)
    return str(caught.value)


def reason_of(work, task=None, timeout=60.0, stop=lambda: False):
    with pytest.raises(LoadError) as caught, start(work, task, stop) as process:
        process.receive(timeout)
    return str(caught.value)


@pytest.fixture
def deaf(tmp_path, monkeypatch):
    """Start a process that neither reads nor writes."""
    program = tmp_path / "deaf"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))


# --- Results


def test_results_are_received_in_order_without_the_steps():
    with start(send_each, [1, "two", None]) as process:
        assert [process.receive(60) for _ in range(3)] == [{"result": 1}, {"result": "two"}, {"result": None}]


@pytest.mark.parametrize(("item", "received"), [(LARGE, LARGE), (Path("/a/b"), "/a/b")], ids=["large", "no JSON"])
def test_task_may_be_larger_than_a_pipe_and_of_any_type(item, received):
    """JSON gets a string for a value of another type."""
    with start(send_each, [item]) as process:
        assert process.receive(60) == {"result": received}


def test_task_is_complete_while_a_fork_of_the_arbiter_keeps_the_pipe_open():
    """A worker may be forked before the task is written whole."""
    is_over, end = os.pipe()
    with start(send_each, [LARGE]) as process:
        pid = os.fork()
        if not pid:
            os.close(end)
            os.read(is_over, 1)
            os._exit(0)
        try:
            assert process.receive(10) == {"result": LARGE}
        finally:
            os.close(end)
            os.close(is_over)
            os.waitpid(pid, 0)


def test_output_of_the_work_is_not_a_result():
    with start(print_and_send, "sent") as process:
        assert process.receive(60) == {"result": "sent"}


# --- The end of the process


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_signal_that_ends_the_process_is_reported_with_the_step(number):
    assert reason_of(die, number) == f"ended its trial process with {number.name} while dying"


def test_exception_ends_the_process():
    assert reason_of(fail) == "ended its trial process with exit code 1 while starting"


def test_ended_process_is_distinguished_from_a_timeout():
    with start(send_each, ["one"]) as process:
        process.receive(60)
        with pytest.raises(EndedError, match="with exit code 0 while starting"):
            process.receive(60)
    with start(hang, None) as process:
        process.receive(60)
        with pytest.raises(LoadError) as caught:
            process.receive(0.1)
    assert not isinstance(caught.value, EndedError)


def test_end_is_reported_while_a_fork_keeps_the_output_open():
    with start(fork, None) as process:
        process.receive(60)
        with pytest.raises(EndedError, match="exit code 0"):
            process.receive(60)


def test_forks_of_the_process_end_with_it():
    with start(fork, None) as process:
        pid = process.receive(60)["pid"]
        assert is_running(pid)
    wait_for_end(pid)


# --- Waiting for a result


@pytest.mark.parametrize(
    ("work", "step"),
    [(hang, "hanging"), (close_output, "closing its output"), (step_forever, "stepping")],
)
def test_process_is_stopped_after_the_timeout(work, step):
    assert reason_after_begin_of(work, timeout=1) == f"timed out after 1 s while {step}"


@pytest.mark.parametrize("work", [hang, close_output])
def test_process_is_stopped_when_the_service_shuts_down(work):
    assert reason_after_begin_of(work, shuts_down=True) == STOPPED


@pytest.mark.usefixtures("deaf")
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"timeout": 1}, "timed out after 1 s while starting"), ({"stop": lambda: True}, STOPPED)],
)
def test_unread_task_is_given_up_after_the_timeout_or_when_the_service_shuts_down(options, reason):
    assert reason_of(send_each, [LARGE], **options) == reason


def test_process_that_dies_before_it_reads_its_task_is_reported(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert reason_of(send_each, [LARGE]) == "ended its trial process with exit code 1 while starting"


def test_terminal_set_to_tostop_does_not_stop_the_process():
    """`stty tostop` stops processes outside the foreground process group at their first output."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            settings = termios.tcgetattr(2)
            settings[3] |= termios.TOSTOP
            termios.tcsetattr(2, termios.TCSANOW, settings)
            with start(print_and_send, "done") as process:
                os._exit(0 if process.receive(20) == {"result": "done"} else 2)
        finally:
            os._exit(1)
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO at its end
        while stream.read(4096):
            pass
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
