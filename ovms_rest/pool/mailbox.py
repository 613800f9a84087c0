"""How workers ask the arbiter for something, and how it answers: through memory and a socket that all of them inherit.

A worker sends a message and a signal. The arbiter reads what has come and publishes one value, which every process of
every generation can read, whenever it likes.
"""

import contextlib
import mmap
import os
import signal
import socket
from typing import Any

import orjson

from ovms_rest.errors import BusyError, InvalidRequestError

# Sent to the arbiter with a message; gunicorn has no use for it.
CONTROL = signal.SIGRTMIN + 1

# As orjson writes it: 254 levels, of which the message itself is one.
MAX_VALUE_DEPTH = 253
# Less than a datagram may have, whatever the system's buffers are.
MAX_MESSAGE_BYTES = 65_536
_PAGE_BYTES = 2**20
# In front of the value, eight bytes each: how often its writing was begun or ended, so that it is odd meanwhile; its
# length.
_WRITES, _LENGTH = range(2)
_HEAD_BYTES = 16


class Mailbox:
    """Messages to the arbiter, and the value that it publishes; made before the first fork."""

    def __init__(self) -> None:
        """Make the socket and the memory, in the arbiter."""
        self._arbiter = os.getpid()
        # Datagrams are whole, whoever else sends at the same time, and the system bounds how many wait.
        self._receiver, self._sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        page = memoryview(mmap.mmap(-1, _PAGE_BYTES))
        self._numbers, self._value = page[:_HEAD_BYTES].cast("Q"), page[_HEAD_BYTES:]

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the arbiter, in a worker.

        Raises BusyError when too many wait already or the arbiter is gone, and InvalidRequestError for one that is too
        large or nested too deep.
        """
        if os.getppid() != self._arbiter:  # whoever is the parent now must not get the signal
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
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._arbiter, CONTROL)

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come, in the arbiter."""
        messages = []
        while True:
            try:
                messages.append(orjson.loads(self._receiver.recv(MAX_MESSAGE_BYTES)))
            except BlockingIOError:
                return messages

    def publish(self, value: Any) -> bool:
        """Publish a value that JSON can hold, in the arbiter; tell whether there was room for it."""
        data = orjson.dumps(value)
        if len(data) > len(self._value):
            return False
        self._numbers[_WRITES] += 1
        self._value[: len(data)] = data
        self._numbers[_LENGTH] = len(data)
        self._numbers[_WRITES] += 1
        return True

    def writes(self) -> int:
        """Return a number that is another one whenever something was published since."""
        return self._numbers[_WRITES]

    def read(self) -> Any:
        """Return the value published last, None when there is none or another is just being written."""
        writes = self._numbers[_WRITES]
        data = bytes(self._value[: self._numbers[_LENGTH]])
        return None if not data or writes % 2 or writes != self._numbers[_WRITES] else orjson.loads(data)
