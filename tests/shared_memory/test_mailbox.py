"""Messages from workers to the arbiter, and its published value."""

import contextlib
import os
import resource
import signal

import pytest
from forking import fork, join

from ovms_rest.errors import BusyError, InvalidRequestError
from ovms_rest.shared_memory.mailbox import CONTROL, MAX_MESSAGE_BYTES, MAX_VALUE_DEPTH, Mailbox


@pytest.fixture
def mailbox():
    """A mailbox; it signals this process, which stands for the arbiter."""
    return Mailbox()


@contextlib.contextmanager
def handled():
    """Handle the signal of a message, as the arbiter does; yield those that arrived."""
    signals = []
    before = signal.signal(CONTROL, lambda number, frame: signals.append(number))
    yield signals
    signal.signal(CONTROL, before)


def send(mailbox, *messages):
    """Send messages from a forked process, as a worker does; return the name of the error, "" for none."""
    reading, writing = os.pipe()

    def work():
        try:
            for message in messages:
                mailbox.send(message)
        except Exception as caught:
            os.write(writing, type(caught).__name__.encode())

    with handled():
        join(fork(work))
    os.close(writing)
    with os.fdopen(reading) as stream:
        return stream.read()


def test_messages_arrive_whole_and_in_order(mailbox):
    messages = [{"id": "1", "text": "x" * 60_000}, {"id": "2"}]
    assert mailbox.receive() == []
    assert send(mailbox, *messages) == ""
    assert mailbox.receive() == messages
    assert mailbox.receive() == []


def test_queue_of_messages_is_limited(mailbox):
    assert send(mailbox, *({"id": str(index)} for index in range(100_000))) == BusyError.__name__
    assert 1 <= len(mailbox.receive()) < 100_000
    assert send(mailbox, {"id": "again"}) == ""


def test_process_that_adopts_a_worker_gets_no_signal(mailbox):
    """A worker whose arbiter is gone has another parent, which may be the init process."""
    mailbox._arbiter = -1
    assert send(mailbox, {"id": "1"}) == BusyError.__name__
    assert mailbox.receive() == []


def test_message_has_a_size_limit(mailbox):
    assert send(mailbox, {"text": "x" * MAX_MESSAGE_BYTES}) == InvalidRequestError.__name__
    assert mailbox.receive() == []


def nest(depth):
    """Nest this many objects."""
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_value_in_a_message_has_a_depth_limit(mailbox):
    message = {"config": nest(MAX_VALUE_DEPTH)}
    assert send(mailbox, message) == ""
    assert mailbox.receive() == [message]
    assert send(mailbox, {"config": nest(MAX_VALUE_DEPTH + 1)}) == InvalidRequestError.__name__
    assert mailbox.receive() == []


def test_message_signals_the_arbiter_though_the_worker_may_not(mailbox):
    """With --user, an arbiter of root has workers of another user."""

    def work():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        mailbox.send({"id": "1"})

    with handled() as signals:
        join(fork(work))
    assert signals == [CONTROL]
    assert mailbox.receive() == [{"id": "1"}]


def test_every_process_reads_the_value_published_last(mailbox):
    assert mailbox.read() is None
    before = mailbox.writes()
    mailbox.publish({"models": {"m": [1, "ü"]}})
    mailbox.publish({"models": {}})
    assert mailbox.writes() != before
    assert mailbox.read() == {"models": {}}


def test_value_of_any_length_is_published(mailbox):
    value = {"text": "ü" * 2**23}
    mailbox.publish(value)
    assert mailbox.read() == value
    mailbox.publish("short")
    assert mailbox.read() == "short"


def test_failed_write_leaves_no_value_and_the_next_is_read(mailbox):
    mailbox.publish("old")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            mailbox.publish("x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, before)
    assert mailbox.read() is None
    mailbox.publish("new")
    assert mailbox.read() == "new"


def test_half_written_value_is_not_read(mailbox, monkeypatch):
    """Readers try again while the arbiter writes."""
    mailbox.publish("old")
    seen = []

    def pwrite(descriptor, data, offset, write=os.pwrite):
        seen.append(mailbox.read())
        written = write(descriptor, data[:1], offset)
        seen.append(mailbox.read())
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    mailbox.publish("new")
    assert seen == [None] * 10
    assert mailbox.read() == "new"
