"""What workers ask of the arbiter, and what it tells them."""

import os
import signal

import pytest

from ovms_rest.errors import BusyError, InvalidRequestError
from ovms_rest.pool.mailbox import CONTROL, MAX_MESSAGE_BYTES, MAX_VALUE_DEPTH, Mailbox


@pytest.fixture
def mailbox():
    """A mailbox; the signals to the arbiter, which is the parent of the one who sends, come to nobody."""
    return Mailbox()


def send(mailbox, *messages):
    """Send messages from a forked process, as a worker does; return the name of the error, "" for none."""
    reading, writing = os.pipe()
    before = signal.signal(CONTROL, lambda number, frame: None)
    pid = os.fork()
    if not pid:
        error = ""
        try:
            for message in messages:
                mailbox.send(message)
        except Exception as caught:
            error = type(caught).__name__
        os.write(writing, error.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    signal.signal(CONTROL, before)
    with os.fdopen(reading) as stream:
        return stream.read()


def test_messages_arrive_whole_and_in_order(mailbox):
    messages = [{"id": "1", "text": "x" * 60_000}, {"id": "2"}]
    assert mailbox.receive() == []
    assert send(mailbox, *messages) == ""
    assert mailbox.receive() == messages
    assert mailbox.receive() == []


def test_so_many_wait_and_more_are_refused(mailbox):
    assert send(mailbox, *({"id": str(index)} for index in range(100_000))) == BusyError.__name__
    assert 1 <= len(mailbox.receive()) < 100_000
    assert send(mailbox, {"id": "again"}) == ""


def test_whoever_adopts_a_worker_gets_no_signal(mailbox):
    """The worker of an arbiter that is gone has another parent, which may be the init of the system."""
    mailbox._arbiter = -1
    assert send(mailbox, {"id": "1"}) == BusyError.__name__
    assert mailbox.receive() == []


def test_a_message_has_a_limit(mailbox):
    assert send(mailbox, {"text": "x" * MAX_MESSAGE_BYTES}) == InvalidRequestError.__name__
    assert mailbox.receive() == []


def nest(depth):
    """Nest so many objects."""
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_a_value_of_a_message_has_a_limit_of_its_depth(mailbox):
    message = {"config": nest(MAX_VALUE_DEPTH)}
    assert send(mailbox, message) == ""
    assert mailbox.receive() == [message]
    assert send(mailbox, {"config": nest(MAX_VALUE_DEPTH + 1)}) == InvalidRequestError.__name__
    assert mailbox.receive() == []


def test_every_process_reads_what_was_published_last(mailbox):
    assert mailbox.read() is None
    before = mailbox.writes()
    assert mailbox.publish({"models": {"m": [1, "ü"]}})
    assert mailbox.publish({"models": {}})
    assert mailbox.writes() != before
    assert mailbox.read() == {"models": {}}


def test_what_is_too_long_is_not_published(mailbox):
    mailbox.publish("short")
    assert not mailbox.publish("x" * 2**21)
    assert mailbox.read() == "short"


def test_half_a_value_is_none(mailbox):
    """While the arbiter writes, who reads tries later."""
    mailbox.publish("old")
    seen = []

    class Value:
        def __setitem__(self, place, data):
            seen.append(mailbox.read())

        def __getitem__(self, place):
            return b'"half'

        def __len__(self):
            return 100

    mailbox._value = Value()
    mailbox.publish("new")
    assert seen == [None]
