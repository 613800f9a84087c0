"""The arbiter's side of the process that sends spans; tests/tracing/test_traced_service.py has the rest."""

import os
import signal
import sys
import time
import types

import pytest
from service import is_running, wait_for

from ovms_rest.arbiter.span_sender import SpanSender
from ovms_rest.host import throwaway
from ovms_rest.tracing.tracing import prepare_tracing

CFG = types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid())


@pytest.fixture
def sender():
    """A process that has been started, for a collector that does not exist."""
    made = SpanSender(prepare_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, 1), CFG)
    yield made
    made.end()


def pid_of(sender):
    return sender._process.pid


def test_process_is_started_once_and_ends_with_its_owner(sender):
    sender.look()
    pid = pid_of(sender)
    assert pid in throwaway.running  # so that the arbiter does not reap it
    sender.look()
    assert pid_of(sender) == pid
    assert os.getpgid(pid) == pid
    sender.end()
    assert not is_running(pid)
    assert pid not in throwaway.running
    sender.end()
    sender.look()
    assert sender._process is None


def test_process_that_does_not_end_is_killed(sender):
    sender.look()
    pid = pid_of(sender)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    sender.end()
    assert not is_running(pid)
    assert 1 <= time.monotonic() - began < 30


def test_process_that_died_is_replaced_after_a_pause(sender, caplog):
    sender.look()
    pid = pid_of(sender)
    os.kill(pid, signal.SIGKILL)

    def is_replaced():
        sender.look()
        return sender._process is not None and pid_of(sender) != pid

    wait_for(is_replaced, lambda: caplog.text)
    assert caplog.messages == ["the process that sends spans ended with signal 9; it is started again"]


def test_failing_start_is_logged_once_and_tried_again(sender, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/does/not/exist")
        sender.look()
        wait_for(sender._pauses.is_over, lambda: caplog.text)
        sender.look()
    (message,) = caplog.messages
    assert message.startswith("cannot start the process that sends spans: ")
    wait_for(sender._pauses.is_over, lambda: caplog.text)
    sender.look()
    assert is_running(pid_of(sender))


def test_lines_of_the_process_are_logged(sender, caplog, monkeypatch):
    monkeypatch.setattr("ovms_rest.arbiter.span_sender._PROGRAM", "print('one\\ntwo')")
    sender.look()

    def has_ended():
        sender.look()
        return "ended with status 0" in caplog.text

    wait_for(has_ended, lambda: caplog.text)
    assert caplog.messages[:2] == ["traces: one", "traces: two"]
