"""The way of spans from the workers to the process that sends them: a socket, and counts in shared memory.

A worker never waits: the system holds a bounded number of messages, and further ones are dropped and counted. A message
is sent whole or not at all, so that messages of several workers do not mix. All processes share one pair of sockets,
which outlives both workers and the process that sends.
"""

import contextlib
import mmap
import os
import socket

from ovms_rest.shared_memory.statistics import SpanCounts

# More than the system allows; it takes as much as it does (net.core.wmem_max). The default holds 200 messages or so.
_SOCKET_BYTES = 4 * 2**20
# The rows of the process that sends, before those of the workers.
_SENT, _FULL, _FAILED = range(3)
_OWN_ROWS = 3
_COUNT_BYTES = 2


class SpanCounters:
    """The counters, in a file in memory; each worker and the process that sends write rows of their own."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, size)).cast("q")

    def count_sent(self, spans: int) -> None:
        """Count spans that the collector has accepted."""
        self._numbers[_SENT] += spans

    def count_full(self, spans: int) -> None:
        """Count spans for which the process that sends had no room."""
        self._numbers[_FULL] += spans

    def count_failed(self, spans: int) -> None:
        """Count spans that the collector has not accepted."""
        self._numbers[_FAILED] += spans

    def count_lost(self, slot: int, spans: int) -> None:
        """Count spans that a worker could not hand over."""
        self._numbers[_OWN_ROWS + slot] += spans

    def read(self) -> SpanCounts:
        """Return the sums over all processes."""
        sent, full, failed, *lost = self._numbers.tolist()
        return SpanCounts(sent, full + sum(lost), failed)


class SpanChannel:
    """Both ends; created in the arbiter before it forks, for workers with slots below `slots`."""

    def __init__(self, slots: int) -> None:
        # Unlike datagrams, this kind reports the end when all senders are gone.
        self.receiver, self._sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sender.setblocking(False)
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self.size = (_OWN_ROWS + slots) * 8
        self.memory = os.memfd_create("spans")
        os.ftruncate(self.memory, self.size)
        self.counters = SpanCounters(self.memory, self.size)

    def send(self, slot: int, spans: int, message: bytes) -> None:
        """Hand over the spans of a request, or drop them; in a worker."""
        try:
            self._sender.send(spans.to_bytes(_COUNT_BYTES, "little") + message)
        except OSError:  # full; or the message is too long, as for a pipeline of a thousand nodes
            self.counters.count_lost(slot, spans)

    def close(self) -> None:
        """Close both ends in the arbiter, so that the process that sends ends once the workers are gone."""
        with contextlib.suppress(OSError):
            self._sender.close()
            self.receiver.close()


def read_count(message: bytes) -> int:
    """Return the number of spans in a received message."""
    return int.from_bytes(message[:_COUNT_BYTES], "little")


def read_content(message: bytes) -> memoryview:
    """Return what was sent as `message`."""
    return memoryview(message)[_COUNT_BYTES:]
