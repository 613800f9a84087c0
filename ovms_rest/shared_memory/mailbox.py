"""Messages from workers to the arbiter, over a socket, and a value that the arbiter publishes in shared memory.

When a worker sends a message, the system signals the arbiter. The arbiter reads the messages and publishes one value,
which every process of every generation can read at any time.
"""

import fcntl
import mmap
import os
import signal
import socket
from typing import Any

import orjson

from ovms_rest.errors import BusyError, InvalidRequestError

# The signal that a message has arrived. The system sends it on behalf of the arbiter itself: a worker that has dropped
# its privileges (--user) may not signal an arbiter of root. gunicorn does not use it.
CONTROL = signal.SIGIO

# orjson writes 254 levels; the message itself is one.
MAX_VALUE_DEPTH = 253
# Below the limit of a datagram, whatever the system's buffer sizes.
MAX_MESSAGE_BYTES = 65_536
# In shared memory: the number of times that a write began or ended, odd during a write, and the value's length.
_WRITES, _LENGTH = range(2)


class Mailbox:
    """Messages to the arbiter, and the value that it publishes; created before the first fork."""

    def __init__(self) -> None:
        self._arbiter = os.getpid()
        # Datagrams of several senders do not mix, and the system limits the number queued.
        self._receiver, self._sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        # No message arrives before workers start, and by then the arbiter has a handler for the signal.
        fcntl.fcntl(self._receiver, fcntl.F_SETOWN, self._arbiter)
        fcntl.fcntl(self._receiver, fcntl.F_SETFL, fcntl.fcntl(self._receiver, fcntl.F_GETFL) | os.O_ASYNC)
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        # A file in memory grows with the value; any fixed size would be too small for some.
        self._value = os.memfd_create("mailbox")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the arbiter, in a worker.

        Raises BusyError if too many are queued or the arbiter is gone, and InvalidRequestError for a message that is
        too large or nested too deep.
        """
        if os.getppid() != self._arbiter:  # no process would read it
            raise BusyError("the service is shutting down and accepts no changes")
        try:
            data = orjson.dumps(message)
        except TypeError as error:  # the only other cause would be a type that JSON lacks
            raise InvalidRequestError(
                f"the request is nested too deep, at most {MAX_VALUE_DEPTH} levels are allowed"
            ) from error
        if len(data) > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(f"the request has {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
        try:
            self._sender.send(data)
        except BlockingIOError as error:
            raise BusyError("too many changes are queued; try again") from error

    def receive(self) -> list[dict[str, Any]]:
        """Return the queued messages, in the arbiter."""
        messages = []
        while True:
            try:
                messages.append(orjson.loads(self._receiver.recv(MAX_MESSAGE_BYTES)))
            except BlockingIOError:
                return messages

    def publish(self, value: Any) -> None:
        """Publish a JSON value, in the arbiter. Raises OSError if memory is short."""
        data = memoryview(orjson.dumps(value))
        self._numbers[_WRITES] += 1
        self._numbers[_LENGTH] = 0  # stays 0 if the value cannot be written
        try:
            os.ftruncate(self._value, len(data))
            written = 0
            while written < len(data):
                written += os.pwrite(self._value, data[written:], written)
            self._numbers[_LENGTH] = len(data)
        finally:
            self._numbers[_WRITES] += 1

    def writes(self) -> int:
        """Return a number that changes whenever a value is published."""
        return self._numbers[_WRITES]

    def read(self) -> Any:
        """Return the value published last, None if there is none or a write is in progress."""
        writes, length = self._numbers[_WRITES], self._numbers[_LENGTH]
        data = b""
        while len(data) < length and (piece := os.pread(self._value, length - len(data), len(data))):
            data += piece
        return None if not data or writes % 2 or writes != self._numbers[_WRITES] else orjson.loads(data)
