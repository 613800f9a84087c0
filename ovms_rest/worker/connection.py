"""A client's connection to a worker: receives requests, one at a time, and sends the responses.

Reading and writing never block. The socket is registered once, edge-triggered, so that no request costs a system call
for it: `_readable` remembers that an edge came until a read has drained the socket. `handle`, `resume` and `expire`
return an `Event`, mostly a complete request, or None; the connection reads on once the response has been sent.
"""

import contextlib
import fcntl
import socket
import ssl
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import NamedTuple, cast

from ovms_rest.log import log
from ovms_rest.protocol.buffers import allocate
from ovms_rest.protocol.room import Room, describe_lack
from ovms_rest.protocol.words import count_of
from ovms_rest.worker.chunks import ChunkDecoder
from ovms_rest.worker.http1 import CONTINUE, UNREAD, Environ, Head, HeadReader, Refusal, RequestBody

EVENTS = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET

# How long a refused client may continue sending before the connection is cut: an immediate close would lose the
# response.
LINGER_SECONDS = 2.0
# Bytes of progress that give a body, or a response, another second.
SLOWEST = 100_000
# More is left for the next turn, so that one fast client does not keep the others waiting.
BYTES_PER_TURN = 4 * 2**20

# The system takes at most 1024 in one call (sendmsg(2), IOV_MAX).
MAX_PARTS = 512

# A body up to this size gains nothing from alignment: arrays of its size are copied before the inference.
_SMALL_BODY = 16_384

# The largest head that a connection remembers.
_REMEMBERED_HEAD = 2048

_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_EMPTY = memoryview(b"")
_NEVER = float("inf")
_QUEUED = struct.Struct("i")
_RESET = struct.pack("ii", 1, 0)
# `tcpi_last_data_recv` of linux/tcp.h, milliseconds, and its precision on kernels with the fewest ticks in a second.
_LAST_RECEIVED = struct.Struct("52xI")
_TICKS = 0.01

Buffer = bytes | memoryview


class State(Enum):
    """The state of a connection."""

    HEAD = auto()  # awaits a request, or has a part of its head
    BODY = auto()
    COMPLETE = auto()  # has a complete request, which is queued, deferred or run
    SENDING = auto()  # has a response of which a part is still to be sent
    LINGERING = auto()  # has sent its last response and waits for the client to close
    CLOSED = auto()


# The states in which more of a request may be received.
RECEIVING = (State.HEAD, State.BODY)


class Times(NamedTuple):
    """Time limits in seconds: for a head, for a body or a response without progress, and between requests."""

    head: float
    body: float
    send: float
    idle: float


class Request:
    """A request received whole: a head that may be shared with other requests, and an environ of its own.

    `received_ns` is when the last byte was read, by the monotonic clock; the worker sets it.
    """

    __slots__ = ("connection", "environ", "head", "is_running", "received_ns")

    def __init__(self, connection: "Connection", head: Head, environ: Environ) -> None:
        self.connection = connection
        self.head = head
        self.environ = environ
        self.received_ns = 0
        self.is_running = False  # its inference has begun, or is about to with those of others


class Refused(NamedTuple):
    """A request that could not be read: the application does not see it, and its connection closes after a response."""

    request: Request
    refusal: Refusal


class Cancelled(NamedTuple):
    """The client closed its side of the connection while its request was queued; `is_gone` if it cannot read either."""

    request: Request
    is_gone: bool


Event = Request | Refused | Cancelled


@dataclass(slots=True)
class Context:
    """What the connections of a worker share: limits, a clock, and the account of the memory that they hold."""

    heads: HeadReader
    times: Times
    max_body: int
    max_held: int
    arena: memoryview
    on_close: Callable[["Connection"], None]
    now: float = 0.0
    held: int = 0
    resuming: deque["Connection"] = field(default_factory=deque)  # those that continue in the next turn


class Connection:
    """A connection over a plain socket."""

    __slots__ = (
        "_body",
        "_context",
        "_counted",
        "_decoder",
        "_held",
        "_is_slow",
        "_last_bytes",
        "_last_head",
        "_linger",
        "_pending",
        "_readable",
        "_received",
        "_seen",
        "_sent",
        "_unsent",
        "deadline",
        "idle_since",
        "is_gone",
        "is_half_closed",
        "is_resuming",
        "keep_alive",
        "request",
        "socket",
        "state",
        "template",
    )

    def __init__(self, context: Context, sock: socket.socket, template: Environ) -> None:
        """Serve a connected, non-blocking socket; `template` is the common part of the environs of its requests."""
        self._context = context
        self.socket = sock
        self.template = template
        self.state = State.HEAD
        self.deadline = context.now + context.times.head
        self.request: Request | None = None  # being received, queued or run
        self.keep_alive = True
        self.idle_since = context.now
        self.is_gone = False  # the client does not read responses any more
        self.is_half_closed = False  # the client has sent its last byte, and may be gone
        self.is_resuming = False  # in `Context.resuming`, so that `resume` will be called
        self._is_slow = False  # takes so much time that only `resume` continues it, until its body is whole
        self._readable = False
        self._linger = False
        self._pending = bytearray()  # a part of a head, or bytes after a request
        self._seen = 0
        self._last_bytes = b""
        self._last_head: Head | None = None
        self._body = _EMPTY
        self._received = 0
        self._sent = 0
        self._counted = 0  # bytes received, or sent, that have moved the deadline
        self._decoder: ChunkDecoder | None = None
        self._unsent: list[memoryview] = []  # of bytes objects
        self._held = 0

    # --- Events

    def handle(self, events: int) -> Event | None:
        """Receive and send as far as epoll reports that it is possible."""
        if events & (EPOLLERR | EPOLLHUP):
            if events & EPOLLERR or self.state not in RECEIVING:
                request = self.request if self.state is State.COMPLETE else None
                self.close()
                return request and Cancelled(request, is_gone=True)
            self.is_gone = True  # closed a unix socket, from which its last request may still be read
        if events & (EPOLLIN | EPOLLRDHUP):
            self._readable = True
        if events & EPOLLRDHUP:  # also after bytes that are not read yet
            self.is_half_closed = True
            if self.state is State.COMPLETE:
                return self.request and Cancelled(self.request, is_gone=False)
        if self._unsent:
            self._send_rest()
        if self._readable:
            if not self._is_slow:
                return self._receive()
            self._resume_later()
        return None

    def resume(self) -> Event | None:
        """Continue where the last turn ended: with a pipelined request, or more to be read."""
        if self._decoder is not None and self._decoder.has_more and self.request is not None:
            event = self._feed(self.request, self._decoder, b"")
            if event is not None or self._decoder.has_more:
                return event
        if self.state is State.HEAD and self._pending:
            event = self._read_head(self._pending)
            if event is not None:
                return event
        return self._receive() if self._readable else None

    def _resume_later(self) -> None:
        if not self.is_resuming:
            self.is_resuming = True
            self._context.resuming.append(self)

    def expire(self) -> Event | None:
        """End a connection whose deadline has passed, unless it has made progress since that was set.

        Every `SLOWEST` bytes received or sent give another second, but never more than the time limit from now on.
        """
        if self.state is State.BODY:
            done, limit = self._received, self._context.times.body
        elif self.state is State.SENDING:
            done, limit = self._sent - self._count_queued(), self._context.times.send
        else:
            done, limit = self._counted, 0.0
        earned, self._counted = max(done - self._counted, 0) / SLOWEST, done
        self.deadline = min(self.deadline + earned, self._context.now + limit)
        if self.deadline > self._context.now:
            return None
        if self.state is State.BODY:
            return self._refuse(Refusal(408, f"timed out reading the body after {count_of(self._received, 'byte')}"))
        if self.state is State.HEAD and self._pending:
            message = f"timed out reading the head of the request after {count_of(len(self._pending), 'byte')}"
            return self._refuse_head(self._pending, Refusal(408, message))
        if self.state is State.SENDING:  # what the system has of the response is not kept for the client either
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()
        return None

    def _count_queued(self) -> int:
        """Return how many sent bytes the client has not acknowledged."""
        try:
            return int(_QUEUED.unpack(fcntl.ioctl(self.socket, termios.TIOCOUTQ, _QUEUED.pack(0)))[0])
        except OSError:  # a socket that does not count them
            return 0

    def is_idle(self) -> bool:
        """Return whether no byte of a next request has arrived, not even at the socket."""
        if self.state is not State.HEAD or self._pending or self._readable:
            return False
        try:
            return not socket.socket.recv(self.socket, 1, socket.MSG_PEEK)  # with TLS, of the encrypted bytes
        except BlockingIOError:
            return True
        except OSError:  # reset by the client
            return True

    def received_by(self) -> float:
        """Return a time (monotonic seconds) before which the last bytes arrived; infinity if the system does not know.

        They may have arrived in the system's buffer during an inference. The system counts in its own ticks, so the
        time is up to `_TICKS` too late.
        """
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_RECEIVED.size)
        except OSError:  # a unix socket
            return _NEVER
        milliseconds: int = _LAST_RECEIVED.unpack(info)[0]
        return time.monotonic() - milliseconds / 1000 + _TICKS

    def drain(self, deadline: float) -> None:
        """Accept at most one more request, which has to arrive by the deadline."""
        if self.state is State.HEAD and not self._pending:
            self.deadline = min(self.deadline, deadline)

    def close(self) -> None:
        """Close immediately."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._body = _EMPTY
        self._decoder = None
        self._pending = bytearray()
        self._unsent = []
        self._hold(0)
        self._context.on_close(self)
        self.request = None
        self.socket.close()

    # --- Receiving

    def _receive(self) -> Event | None:
        context, left = self._context, BYTES_PER_TURN
        while self._readable:
            state, request, decoder = self.state, self.request, self._decoder
            if state is State.HEAD and self._pending and not self._seen:
                return None  # the next request has been received, and is read in the next turn
            if state is State.BODY and decoder is None:
                target = self._body[self._received :]
            elif state is State.HEAD or state is State.BODY or state is State.LINGERING:
                target = context.arena
            else:
                return None
            try:
                count = self.socket.recv_into(target)
            except _BLOCKED:
                self._readable = False
                return None
            except OSError:  # reset by the client, or not TLS
                self.close()
                return None
            if not count:
                return self._end()
            if count < len(target):
                self._note_drained()
            event: Event | None = None
            if state is State.HEAD:
                if self._pending:
                    self._pending += target[:count]
                    event = self._read_head(self._pending)
                else:
                    event = self._read_head(target[:count])
            elif request is not None and decoder is not None:
                event = self._feed(request, decoder, bytes(target[:count]))
            elif request is not None:
                event = self._take_body(request, count)
            if event is not None:
                return event
            if self._decoder is not None and self._decoder.has_more:
                return None  # decoded in the next turns
            left -= count
            if left <= 0 and self._readable:
                self._is_slow = True
                self._resume_later()
                return None
        return None

    def _note_drained(self) -> None:
        """Note that a short read has emptied the socket, except for an end of stream that epoll has reported."""
        self._readable = self.is_half_closed

    def _take_body(self, request: Request, count: int) -> Event | None:
        length = len(self._body) - 1
        self._received += count
        if self._received > length:  # with the first byte of the next request
            self._pending += self._body[length:]
            self._received = length
        try:
            self._check_room(self._received, length)
        except Refusal as refusal:
            return self._refuse(refusal)
        self._hold(self._received + len(self._pending))
        if self._received < length:
            return None
        self._body = self._body[:length]
        return self._complete(request)

    def _end(self) -> Event | None:
        """Handle the end of the stream: the client sends no more."""
        self._readable = False
        if self.state is State.BODY and self._decoder is None:
            return self._refuse(Refusal(400, f"the body ended after {self._received} of {len(self._body) - 1} bytes"))
        if self.state is State.BODY:
            return self._refuse(Refusal(400, "the body ended before its last chunk"))
        if self.state is State.HEAD and self._pending.strip(b"\r\n"):  # an empty line alone is not a request
            message = (
                f"the head of the request ended after {count_of(len(self._pending), 'byte')}, before its empty line"
            )
            return self._refuse_head(self._pending, Refusal(400, message))
        self.close()
        return None

    def _read_head(self, source: bytearray | memoryview) -> Event | None:
        last = self._last_head
        # Mostly it is the same as the last one on a connection that is kept alive.
        if last is not None and bytes(source[: last.size]) == self._last_bytes:
            head = last
        else:
            try:
                found = self._context.heads.read(source, self._seen, self.template)
            except Refusal as refusal:
                return self._refuse_head(source, refusal)
            if found is None:
                return self._keep_part_of_head(source)
            head = found
            if head.size <= _REMEMBERED_HEAD:
                self._last_bytes, self._last_head = bytes(source[: head.size]), head
        self._seen = 0
        self.request = request = Request(self, head, head.environ.copy())
        self.keep_alive = head.keep_alive
        if head.length is None:
            return self._begin_chunks(request, bytes(source[head.size :]))
        return self._begin_body(request, head.length, source)

    def _keep_part_of_head(self, source: bytearray | memoryview) -> Event | None:
        context = self._context
        if source is not self._pending:
            self._pending += source
            self.deadline = context.now + context.times.head
        self._seen = len(self._pending)
        self._hold(self._seen)
        limit = context.heads.limits.head
        if self._seen > limit:
            return self._refuse_head(source, Refusal(431, f"the head of the request is larger than {limit} bytes"))
        if context.held > context.max_held:
            return self._refuse_head(source, self._no_room("the head of a request", self._seen))
        return None

    def _begin_body(self, request: Request, length: int, source: bytearray | memoryview) -> Event | None:
        rest = memoryview(source)[request.head.size :]
        received = min(length, len(rest))
        if received == length <= _SMALL_BODY and (not length or self._has_room(length)):
            self._body = memoryview(bytearray(rest[:length]))  # writable, as OpenVINO wants the memory of a tensor
            if len(rest) > length or self._pending:
                self._keep_rest(source, rest, length)
                self._hold(length + len(self._pending))
            return self._complete(request)
        try:
            self._check_room(received, length)
        except Refusal as refusal:
            return self._refuse(refusal)
        # One byte more than the body, so that the read that completes it is a short one, which empties the socket.
        self._body = allocate(length + 1, request.head.header_length.length)
        self._body[:received] = rest[:received]
        self._received = received
        self._keep_rest(source, rest, received)
        self._hold(received + len(self._pending))
        if received == length:
            self._body = self._body[:length]
            return self._complete(request)
        self._wait_for_body(request.head)
        return None

    def _keep_rest(self, source: bytearray | memoryview, rest: memoryview, size: int) -> None:
        """Keep what came after the `size` bytes of a request in `rest`, without copying it every time."""
        if source is self._pending:
            used = len(source) - len(rest) + size
            rest.release()
            del self._pending[:used]
        else:
            self._pending = bytearray(rest[size:])

    def _wait_for_body(self, head: Head) -> None:
        self.state = State.BODY
        self.deadline = self._context.now + self._context.times.body
        self._counted = 0
        if head.expects_continue and not self._received:
            self._send_now(CONTINUE)

    def _check_room(self, received: int, announced: int = 0) -> None:
        """Refuse a body that is too large, or for which there is no room left after the bytes received so far.

        A body that is only announced reserves no memory: a client that sends no more would keep it from others.
        """
        context = self._context
        if max(received, announced) > context.max_body:
            what = f"{announced}" if announced else f"more than {context.max_body}"
            raise Refusal(413, f"the body has {what} bytes, at most {context.max_body} are allowed")
        if context.held - self._held + received > context.max_held or announced > context.max_held:
            raise self._no_room("a body", max(received, announced))

    def _has_room(self, length: int) -> bool:
        context = self._context
        return length <= context.max_body and context.held - self._held + length <= context.max_held

    def _no_room(self, what: str, size: int) -> Refusal:
        room = Room(self._context.held - self._held, self._context.max_held)
        return Refusal(503, describe_lack(what, size, room), {"Retry-After": "1"})

    def _begin_chunks(self, request: Request, rest: bytes) -> Event | None:
        limits, max_body = self._context.heads.limits, self._context.max_body
        self._body = _EMPTY
        self._received = 0
        self._pending = bytearray()
        self._decoder = decoder = ChunkDecoder(limits, max_body, request.head.header_length.length)
        self._wait_for_body(request.head)
        return self._feed(request, decoder, rest) if self.state is State.BODY else None

    def _feed(self, request: Request, decoder: ChunkDecoder, data: bytes) -> Event | None:
        try:
            decoder.feed(data)
            self._check_room(decoder.size)
        except Refusal as refusal:
            return self._refuse(refusal)
        self._received = decoder.size
        self._hold(self._received + len(decoder.rest))
        if decoder.is_complete:
            self._pending = bytearray(decoder.rest)
            self._body = decoder.data
            self._decoder = None
            return self._complete(request)
        if decoder.has_more:
            self._is_slow = True
            self._resume_later()
        return None

    def _complete(self, request: Request) -> Request:
        self.state = State.COMPLETE
        self._is_slow = False
        self.deadline = _NEVER
        request.environ["wsgi.input"] = RequestBody(self._body)
        self._body = _EMPTY
        return request

    def _refuse_head(self, source: bytearray | memoryview, refusal: Refusal) -> Refused:
        refusal.is_of_head = bytes(memoryview(source)[:5]) == b"HEAD "
        return self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> Refused:
        """Read no further, since it is unknown where the next request begins; the response closes the connection."""
        self.state = State.COMPLETE
        self.keep_alive = False
        self._linger = True
        self._is_slow = False
        self._decoder = None
        self._body = _EMPTY
        self._pending = bytearray()
        if self.request is None:
            self.request = Request(self, UNREAD, {**UNREAD.environ, **self.template})
        return Refused(self.request, refusal)

    # --- Sending

    def send(self, parts: Sequence[Buffer], size: int) -> None:
        """Send a response of `size` bytes; the part that the socket does not take now is copied and sent later."""
        try:
            sent = self._send_parts(parts)
        except OSError:
            self.close()
            return
        if sent == size:
            self._finish()
            return
        self.state = State.SENDING
        self.request = None  # with the body
        self.deadline = self._context.now + self._context.times.send
        self._sent, self._counted = sent, 0
        self._unsent = list(map(_keep, _skip(parts, sent)))
        self._hold_unsent()
        if self._context.held > self._context.max_held:  # only small responses get here
            log.debug("closed a connection: no room for %d bytes of a response that is not read", size - sent)
            self.close()

    def _send_parts(self, parts: Sequence[Buffer]) -> int:
        if len(parts) > MAX_PARTS:
            parts = [b"".join(parts)]
        try:
            return self.socket.send(parts[0]) if len(parts) == 1 else self.socket.sendmsg(parts)
        except _BLOCKED:
            return 0

    def _send_now(self, data: bytes) -> None:
        """Send an interim response. If the socket does not take these few bytes, its client does not read: close."""
        try:
            if self._send_parts([data]) != len(data):
                self.close()
        except OSError:
            self.close()

    def _send_rest(self) -> None:
        try:
            sent = self._send_parts(self._unsent)
        except OSError:
            self.close()
            return
        self._sent += sent
        self._unsent = list(_skip(self._unsent, sent))
        if not self._unsent:
            self._finish()
        else:
            self._hold_unsent()

    def _hold_unsent(self) -> None:
        """Account for the bytes objects that are kept until the last of them is sent."""
        self._hold(sum(len(cast(bytes, part.obj)) for part in self._unsent) + len(self._pending))

    def _finish(self) -> None:
        """Await the next request, or close, after a response was sent whole."""
        self.request = None
        self._hold(len(self._pending))
        if self.keep_alive:
            self.state = State.HEAD
            self.idle_since = self._context.now
            self.deadline = self._context.now + (
                self._context.times.head if self._pending else self._context.times.idle
            )
            if self._pending or self._readable:
                self._resume_later()
        elif self._linger or self._pending or self._readable:
            self._begin_lingering()
        else:
            self.close()

    def _begin_lingering(self) -> None:
        try:
            self._shut_down()
        except OSError:
            self.close()
            return
        self.state = State.LINGERING
        self.deadline = self._context.now + LINGER_SECONDS
        self._pending = bytearray()
        self._readable = True
        self._resume_later()

    def _shut_down(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def has_more(self) -> bool:
        """Return whether another request, or a part of one, has been received."""
        if self._pending or not self._readable:
            return bool(self._pending)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except _BLOCKED:
            self._readable = False
            return False
        except OSError:  # reset by the client
            return False

    def linger(self) -> None:
        """Close after this response although the client, which may be sending another request, did not ask for it."""
        self.keep_alive = False
        self._linger = True

    def hold_request(self, request: Request) -> None:
        """Account for a request that was received whole and has to wait."""
        self._hold(len(request.environ["wsgi.input"].buffer) + len(self._pending))

    def _hold(self, size: int) -> None:
        """Account for the memory that this connection keeps."""
        self._context.held += size - self._held
        self._held = size


class TlsConnection(Connection):
    """A connection over TLS; reads and writes do the handshake."""

    __slots__ = ()

    def _note_drained(self) -> None:
        """Keep reading after a short read: a record has its own size, and more may be decrypted already."""

    def _shut_down(self) -> None:
        self._send_alert()
        super()._shut_down()

    def close(self) -> None:
        """Close immediately, after sending the alert that RFC 9112 section 9.8 asks for."""
        if self.state is not State.CLOSED and self.state is not State.LINGERING:
            self._send_alert()
        super().close()

    def _send_alert(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # without waiting for the client, which may be gone
            self.socket.unwrap()  # type: ignore[attr-defined]

    def has_more(self) -> bool:
        """Return whether another request, or a part of one, has been received and decrypted."""
        return bool(self._pending)

    def _send_parts(self, parts: Sequence[Buffer]) -> int:
        sent = 0
        for part in parts:
            view = memoryview(part)
            while view:
                try:
                    count = self.socket.send(view)
                except _BLOCKED:
                    return sent
                sent += count
                view = view[count:]
        return sent


def _keep(part: memoryview) -> memoryview:
    """Return a view of memory that will not change: a model reuses the memory of its outputs for the next inference."""
    return part if isinstance(part.obj, bytes) else memoryview(bytes(part))


def _skip(parts: Sequence[Buffer], size: int) -> Sequence[memoryview]:
    """Return the parts without their first `size` bytes."""
    rest = []
    for part in parts:
        if size < len(part):
            rest.append(memoryview(part)[size:])
        size = max(size - len(part), 0)
    return rest
