"""The end of processes that hang after their parent is gone."""

import ctypes
import os
import signal
import time

import pytest
from forking import fork
from processes import adopting, wait_for_exit

from ovms_rest.host import parent
from ovms_rest.host.parent import choose_signal, end_after_parent, postpone
from ovms_rest.host.priority import _NAP
from ovms_rest.shared_memory.table import WAKE


@pytest.fixture(autouse=True)
def _end_after_a_second(monkeypatch):
    monkeypatch.setattr(parent, "choose_signal", lambda seconds: signal.SIGHUP)


def hang():
    """Wait in native code for ever, and keep Python locked; signals do not interrupt that."""
    reading, _ = os.pipe()
    ctypes.PyDLL(None).read(reading, ctypes.create_string_buffer(1), 1)


def orphan(work):
    """Return the exit code of a process that works: its parent ends once the pipe that it gets has been closed."""
    sent, sending = os.pipe()
    waiting, ready = os.pipe()

    def work_as_child():
        os.close(waiting)
        work(ready)

    def be_parent():
        pid = fork(work_as_child)
        os.write(sending, str(pid).encode())
        os.close(ready)
        os.read(waiting, 1)

    with adopting():
        middle = fork(be_parent)
        os.close(ready)
        os.waitpid(middle, 0)
        pid = int(os.read(sent, 20))
        code = wait_for_exit(pid)
    for descriptor in (sent, sending, waiting):
        os.close(descriptor)
    return code


def test_process_that_hangs_in_native_code_ends_after_its_parent():
    """It may have been started with SIGALRM ignored or blocked."""

    def work(ready):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM, signal.SIGHUP))
        end_after_parent(os.getppid(), 30)
        os.close(ready)
        hang()

    assert orphan(work) == -signal.SIGALRM


def test_process_whose_parent_is_gone_already_ends_too():
    def work(ready):
        before = os.getppid()
        os.close(ready)
        while os.getppid() == before:
            time.sleep(0.001)
        end_after_parent(before, 30)
        hang()

    assert orphan(work) == -signal.SIGALRM


def test_end_is_postponed():
    def work(ready):
        before = os.getppid()
        end_after_parent(before, 30)
        os.close(ready)
        while os.getppid() == before:
            time.sleep(0.001)
        postpone(9.5)
        time.sleep(1.2)
        os._exit(int(signal.getitimer(signal.ITIMER_REAL)[0] > 1))

    assert orphan(work) == 1


def test_process_with_a_parent_has_no_timer():
    def work():
        end_after_parent(os.getppid(), 30)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    pid = fork(work)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(("seconds", "number"), [(0, 35), (30, 35), (35.5, 36), (49, 50), (64, 64), (1000, 64)])
def test_number_of_the_signal_is_the_time_in_seconds(seconds, number):
    assert choose_signal(seconds) == number


def test_signals_have_no_other_use():
    assert not {WAKE, _NAP} & set(parent._SIGNALS)
