"""How workers ask the arbiter for something, and how it answers: through memory and a socket that all of them inherit.

A worker sends a message, at which the system signals the arbiter. The arbiter reads what has come and publishes one
value, which every process of every generation can read, whenever it likes.
"""

import fcntl
import mmap
import os
import signal
import socket
from typing import Any

import orjson

from ovms_rest.errors import BusyError, InvalidRequestError

# What the arbiter gets when a message has come. The system sends it, on the arbiter's own behalf: a worker that has
# dropped its privileges (--user) may not signal an arbiter of root's. gunicorn does not use it.
CONTROL = signal.SIGIO

# As orjson writes it: 254 levels, of which the message itself is one.
MAX_VALUE_DEPTH = 253
# Less than a datagram may have, whatever the system's buffers are.
MAX_MESSAGE_BYTES = 65_536
# Of the value, in shared memory: how often its writing was begun or ended, so that it is odd meanwhile; its length.
_WRITES, _LENGTH = range(2)


class Mailbox:
    """Messages to the arbiter, and the value that it publishes; made before the first fork."""

    def __init__(self) -> None:
        """Make the socket and the memory, in the arbiter."""
        self._arbiter = os.getpid()
        # Datagrams are whole, whoever else sends at the same time, and the system bounds how many wait.
        self._receiver, self._sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        # No message comes before there are workers, and by then the arbiter has a handler for the signal.
        fcntl.fcntl(self._receiver, fcntl.F_SETOWN, self._arbiter)
        fcntl.fcntl(self._receiver, fcntl.F_SETFL, fcntl.fcntl(self._receiver, fcntl.F_GETFL) | os.O_ASYNC)
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        # A file in memory grows with the value; a map of a fixed size would be too small for some.
        self._value = os.memfd_create("mailbox")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the arbiter, in a worker.

        Raises BusyError when too many wait already or the arbiter is gone, and InvalidRequestError for one that is too
        large or nested too deep.
        """
        if os.getppid() != self._arbiter:  # and nobody will read it
            raise BusyError("the service is shutting down, nothing is changed any more")
        try:
            data = orjson.dumps(message)
        except TypeError as error:  # it was read from JSON, so that nothing else can be wrong with it
            raise InvalidRequestError(
                f"the request has a value that is nested too deep, at most {MAX_VALUE_DEPTH} levels are allowed"
            ) from error
        if len(data) > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(
                f"the request comes to {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are allowed"
            )
        try:
            self._sender.send(data)
        except BlockingIOError as error:
            raise BusyError("too many changes wait to be made; try again") from error

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come, in the arbiter."""
        messages = []
        while True:
            try:
                messages.append(orjson.loads(self._receiver.recv(MAX_MESSAGE_BYTES)))
            except BlockingIOError:
                return messages

    def publish(self, value: Any) -> None:
        """Publish a value that JSON can hold, in the arbiter. Raises OSError when there is no memory for it."""
        data = memoryview(orjson.dumps(value))
        self._numbers[_WRITES] += 1
        self._numbers[_LENGTH] = 0  # which stays so when the value cannot be written
        try:
            os.ftruncate(self._value, len(data))
            written = 0
            while written < len(data):
                written += os.pwrite(self._value, data[written:], written)
            self._numbers[_LENGTH] = len(data)
        finally:
            self._numbers[_WRITES] += 1

    def writes(self) -> int:
        """Return a number that is another one whenever something was published since."""
        return self._numbers[_WRITES]

    def read(self) -> Any:
        """Return the value published last, None when there is none or another is just being written."""
        writes, length = self._numbers[_WRITES], self._numbers[_LENGTH]
        data = b""
        while len(data) < length and (piece := os.pread(self._value, length - len(data), len(data))):
            data += piece
        return None if not data or writes % 2 or writes != self._numbers[_WRITES] else orjson.loads(data)
