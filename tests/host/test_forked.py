"""Work in a fork: its result, and failures that stay there."""

import faulthandler
import os
import signal
import time

import pytest
from service import wait_for_end

from ovms_rest.host import throwaway
from ovms_rest.host.forked import run_forked


def raise_error():
    raise ValueError


def crash():
    faulthandler.disable()  # pytest's, whose lines would look like a failure
    os.kill(os.getpid(), signal.SIGSEGV)


def exit_early():
    os._exit(3)


def hang():
    time.sleep(1000)


def test_the_result_is_returned():
    assert run_forked(lambda: 17, 60) == 17
    assert throwaway.running == set()


def test_the_memory_of_this_process_is_unchanged():
    values = [1]
    assert run_forked(lambda: values.append(2) or len(values), 60) == 2
    assert values == [1]


@pytest.mark.parametrize("work", [raise_error, crash, exit_early])
def test_a_failure_has_no_result(work):
    assert run_forked(work, 60) is None


def test_work_that_takes_too_long_is_ended_with_its_processes(tmp_path):
    file = tmp_path / "pid"

    def work():
        pid = os.fork()
        if pid == 0:
            hang()
        file.write_text(str(pid))
        hang()

    began = time.monotonic()
    assert run_forked(work, 2) is None
    assert time.monotonic() - began < 30
    wait_for_end(int(file.read_text()))


def test_work_is_ended_once_it_should_stop():
    assert run_forked(hang, 1000, lambda: True) is None


def test_without_descriptors_nothing_is_done(monkeypatch):
    def refuse():
        raise OSError

    monkeypatch.setattr(os, "pipe", refuse)
    assert run_forked(lambda: 1, 60) is None


def test_without_processes_nothing_is_done(monkeypatch):
    def refuse():
        raise OSError

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", refuse)
    assert run_forked(lambda: 1, 60) is None
    assert len(os.listdir("/proc/self/fd")) == before
