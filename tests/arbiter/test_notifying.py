"""Notifications as systemd receives them; tests/deploy/test_systemd.py covers those of a service."""

import os
import socket

import pytest
from forking import fork, join

from ovms_rest.arbiter.notifying import Notifier


@pytest.fixture
def systemd(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


@pytest.fixture
def notifier(systemd):
    return Notifier({"NOTIFY_SOCKET": systemd.getsockname()})


def received(systemd):
    """Return the messages received so far."""
    messages = []
    while True:
        try:
            messages.append(systemd.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_variables_of_systemd_are_taken_out_of_the_environment():
    environ = {"NOTIFY_SOCKET": "/none", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    Notifier(environ)
    assert environ == {"HOME": "/"}


def test_ready_is_reported_once(systemd, notifier):
    notifier.report_ready(300)
    notifier.report_ready(300)
    assert received(systemd) == ["READY=1"]


@pytest.mark.parametrize(
    ("pid", "parent", "seconds"),
    [("", "", 600), (str(os.getpid()), "", 600), ("77", "77", 600), ("77", "", None)],
    ids=["of any process", "of this process", "of the arbiter before", "of another process"],
)
def test_watchdog_gets_the_time_of_two_loads_and_is_kicked_when_ready(systemd, monkeypatch, pid, parent, seconds):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    variables = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": pid, "GUNICORN_PID": parent}
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname(), **variables})
    notifier.kick()
    notifier.report_ready(300)
    assert received(systemd) == [f"READY=1\nWATCHDOG_USEC={seconds}000000" if seconds else "READY=1"]
    for now in (1000.0, 1149.0, 1151.0):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        notifier.kick()
    assert received(systemd) == (["WATCHDOG=1"] * 2 if seconds else [])


def test_status_is_reported_when_it_changes(systemd, notifier):
    for status in ("a", "a", "b"):
        notifier.report_status(status)
    assert received(systemd) == ["STATUS=a", "STATUS=b"]


def test_reload_of_a_ready_service_ends_ready_even_if_it_fails(systemd, notifier):
    with pytest.raises(ZeroDivisionError):
        notifier.reload(lambda: 1 / 0)
    (begin,) = received(systemd)
    assert begin.startswith("RELOADING=1\nMONOTONIC_USEC=")
    notifier.report_ready(300)
    with pytest.raises(ZeroDivisionError):
        notifier.reload(lambda: 1 / 0)
    assert received(systemd)[2:] == ["READY=1"]


@pytest.mark.parametrize(("successor", "message"), [(0, "STOPPING=1"), (77, "MAINPID=77")])
def test_end_is_reported_once(systemd, notifier, successor, message):
    notifier.report_end(successor)
    notifier.report_end(0)
    assert received(systemd) == [message]


def test_forked_process_sends_nothing(systemd, notifier):
    join(fork(lambda: notifier.report_ready(300)))
    assert received(systemd) == []


def test_failure_to_notify_is_logged(caplog):
    Notifier({"NOTIFY_SOCKET": "/none"}).report_ready(300)
    assert [record.message for record in caplog.records] == [
        "cannot notify systemd of READY=1: [Errno 2] No such file or directory"
    ]
    Notifier({}).report_ready(300)
    assert len(caplog.records) == 1
