"""The way of spans out of the workers."""

import pytest
from forking import fork, join

from ovms_rest.shared_memory.statistics import SpanCounts
from ovms_rest.tracing.channel import SpanChannel, SpanCounters, read_content, read_count


@pytest.fixture
def channel():
    made = SpanChannel(slots=4)
    yield made
    made.close()


def test_messages_arrive_whole_with_their_number_of_spans(channel):
    channel.send(0, 5, b"first")
    channel.send(1, 300, b"second")
    received = [channel.receiver.recv(100) for _ in range(2)]
    assert [read_count(message) for message in received] == [5, 300]
    assert [bytes(read_content(message)) for message in received] == [b"first", b"second"]


def test_worker_drops_what_the_socket_has_no_room_for(channel):
    """The loop would never end if a send waited."""
    message, sent = bytes(5000), 0
    while not channel.counters.read().full:
        channel.send(3, 6, message)
        sent += 1
    assert channel.counters.read() == SpanCounts(0, 6, 0)
    assert sent < 10_000
    channel.receiver.recv(6000)
    channel.send(3, 6, b"")
    assert channel.counters.read().full == 6


def test_message_that_is_too_long_is_dropped(channel):
    channel.send(0, 2000, bytes(50 * 2**20))
    assert channel.counters.read() == SpanCounts(0, 2000, 0)


def test_counts_of_all_processes_are_summed(channel):
    def count(slot):
        channel.counters.count_lost(slot, 10 + slot)

    join(*(fork(lambda slot=slot: count(slot)) for slot in range(4)))
    sender = SpanCounters(channel.memory, channel.size)  # as a new process maps it
    sender.count_sent(7)
    sender.count_full(100)
    sender.count_failed(3)
    assert channel.counters.read() == SpanCounts(7, 100 + 46, 3)


def test_receiver_learns_that_all_senders_are_gone(channel):
    receiver = channel.receiver.dup()
    join(fork(lambda: channel.send(0, 1, b"last")))
    channel.close()
    assert receiver.recv(100)[2:] == b"last"
    assert receiver.recv(100) == b""
    receiver.close()
    channel.send(0, 1, b"")  # as a worker that outlives the arbiter may do
    assert channel.counters.read().full == 1
