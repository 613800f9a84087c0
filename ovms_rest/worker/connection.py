"""A client's connection to a worker: receives requests, one at a time, and sends the answers.

Reading and writing never block. The socket is registered once, edge-triggered, so that no request costs a system call
for it: `readable` remembers that an edge came until a read has drained the socket. A request that came whole is handed
to the worker; the connection reads on when that has been answered.
"""

import contextlib
import fcntl
import logging
import socket
import ssl
import struct
import termios
import time
from collections.abc import Sequence
from enum import Enum, auto
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import NamedTuple, Protocol, cast

from ovms_rest.protocol.buffers import allocate, tensors_begin
from ovms_rest.protocol.room import Room, describe_lack
from ovms_rest.worker.chunks import ChunkDecoder
from ovms_rest.worker.http1 import CONTINUE, Environ, Head, HeadReader, Refusal, RequestBody

log = logging.getLogger("gunicorn.error.ovms_rest")

EVENTS = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET

# How long a client that was refused may go on sending before the connection is cut: closed at once, the answer would be
# lost to it.
LINGER_SECONDS = 2.0
# Bytes that give a body, or an answer, another second.
SLOWEST = 100_000
# More is left for the next turn, so that one fast client does not keep the others waiting.
BYTES_PER_TURN = 4 * 2**20

# The system takes 1024 at once.
MAX_PARTS = 512

# A body so small gains nothing by lying where tensors should: arrays of its size are copied before the inference.
_SMALL_BODY = 16_384

# The largest head that a connection remembers.
_REMEMBERED_HEAD = 2048

_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_HEADER_LENGTH = "HTTP_INFERENCE_HEADER_CONTENT_LENGTH"
_EMPTY = memoryview(b"")
_NEVER = float("inf")
_QUEUED = struct.Struct("i")
_RESET = struct.pack("ii", 1, 0)
# `tcpi_last_data_recv` of linux/tcp.h, milliseconds, and its precision on kernels with the fewest ticks in a second.
_LAST_RECEIVED = struct.Struct("52xI")
_TICKS = 0.01

Buffer = bytes | memoryview


class State(Enum):
    """What a connection is at."""

    HEAD = auto()  # waits for a request, or has a part of its head
    BODY = auto()
    WAITING = auto()  # has a whole request, which waits or is being answered
    SENDING = auto()  # has an answer of which a part is still to be sent
    LINGERING = auto()  # has sent its last answer and waits for the client to close
    CLOSED = auto()


# In which more may come.
RECEIVING = (State.HEAD, State.BODY)


class Times(NamedTuple):
    """The time limits in seconds: of a head, of a body or an answer without progress, between requests."""

    head: float
    body: float
    send: float
    idle: float


class Host(Protocol):
    """What a connection needs of its worker."""

    heads: HeadReader
    times: Times
    now: float
    arena: memoryview
    held: int
    max_held: int
    max_body: int

    def submit(self, connection: "Connection") -> None:
        """Take a request that came whole."""

    def resume_later(self, connection: "Connection") -> None:
        """Call `resume` in the next turn."""

    def refuse(self, connection: "Connection", refusal: Refusal) -> None:
        """Answer a request that the application does not see, and close."""

    def cancel(self, connection: "Connection", is_gone: bool = False) -> None:
        """Give up a request that waits for its inference: its client sends no more, or does not even read."""

    def forget(self, connection: "Connection") -> None:
        """Drop a connection that is closed."""


class Connection:
    """A connection over a plain socket."""

    __slots__ = (
        "_body",
        "_counted",
        "_decoder",
        "_held",
        "_host",
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
        "head",
        "idle_since",
        "is_gone",
        "is_half_closed",
        "is_resuming",
        "keep_alive",
        "socket",
        "state",
        "template",
    )

    def __init__(self, host: Host, sock: socket.socket, template: Environ) -> None:
        """Take a connected, non-blocking socket and the environ that its requests have in common."""
        self._host = host
        self.socket = sock
        self.template = template
        self.state = State.HEAD
        self.deadline = host.now + host.times.head
        self.head: Head | None = None
        self.keep_alive = True
        self.idle_since = host.now
        self.is_gone = False  # the client reads no answer
        self.is_half_closed = False  # the client has sent its last byte, and may be gone
        self.is_resuming = False  # for the host, which calls `resume` some time
        self._is_slow = False  # takes so much that it goes on by `resume` alone, until its body is whole
        self._readable = False
        self._linger = False
        self._pending = bytearray()  # a part of a head, or what came behind a request
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

    def handle(self, events: int) -> None:
        """Do what epoll says can be done."""
        if events & (EPOLLERR | EPOLLHUP):
            if events & EPOLLERR or self.state not in RECEIVING:
                if self.state is State.WAITING:
                    self._host.cancel(self, is_gone=True)
                self.close()
                return
            self.is_gone = True  # closed a unix socket, from which its last request may still be read
        if events & EPOLLRDHUP:  # also behind bytes that are not read yet
            self.is_half_closed = True
            if self.state is State.WAITING:
                self._host.cancel(self)
        if events & (EPOLLIN | EPOLLRDHUP):
            self._readable = True
        if self._unsent:
            self._send_rest()
        if self._readable:
            if self._is_slow:
                self._host.resume_later(self)
            else:
                self._receive()

    def resume(self) -> None:
        """Go on where the last turn ended: with a request that came behind another, or more to be read."""
        if self._decoder is not None and self._decoder.has_more:
            self._feed(b"")
            if self._decoder is None or self._decoder.has_more:
                return
        if self.state is State.HEAD and self._pending:
            self._read_head(self._pending)
            if self.state is State.HEAD and not self._seen:
                return  # answered: what comes behind is for the next turn again
        if self._readable:
            self._receive()

    def expire(self) -> None:
        """End a connection whose deadline has passed, unless it has made progress since that was set.

        Every `SLOWEST` bytes received or sent give another second, but never more than the time limit from now on.
        """
        if self.state is State.BODY:
            done, limit = self._received, self._host.times.body
        elif self.state is State.SENDING:
            done, limit = self._sent - self._count_queued(), self._host.times.send
        else:
            done, limit = self._counted, 0.0
        earned, self._counted = max(done - self._counted, 0) / SLOWEST, done
        self.deadline = min(self.deadline + earned, self._host.now + limit)
        if self.deadline > self._host.now:
            return
        if self.state is State.BODY:
            self._refuse(Refusal(408, f"the body did not come in time, {self._received} bytes of it did"))
        elif self.state is State.HEAD and self._pending:
            self._refuse_head(self._pending, Refusal(408, "the head of the request did not come in time"))
        else:
            if self.state is State.SENDING:  # what the system has of the response is not kept for the client either
                with contextlib.suppress(OSError):
                    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.close()

    def _count_queued(self) -> int:
        """Return how many bytes the system has of what was sent and the client has not acknowledged."""
        try:
            return int(_QUEUED.unpack(fcntl.ioctl(self.socket, termios.TIOCOUTQ, _QUEUED.pack(0)))[0])
        except OSError:  # no socket that counts them
            return 0

    def is_idle(self) -> bool:
        """Return whether the connection waits for a request of which nothing has come, not even to the socket."""
        if self.state is not State.HEAD or self._pending or self._readable:
            return False
        try:
            return not socket.socket.recv(self.socket, 1, socket.MSG_PEEK)  # TLS: of what is still encrypted
        except BlockingIOError:
            return True
        except OSError:  # reset by the client
            return True

    def received_by(self) -> float:
        """Return a time (monotonic seconds) before which the last bytes came; infinity where the system does not say.

        Bytes wait in the system's buffer while the worker infers, and this is how long they did. The system counts in
        its own ticks, so that the time is up to `_TICKS` too late.
        """
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_RECEIVED.size)
        except OSError:  # a unix socket
            return _NEVER
        milliseconds: int = _LAST_RECEIVED.unpack(info)[0]
        return time.monotonic() - milliseconds / 1000 + _TICKS

    def drain(self, deadline: float) -> None:
        """Answer at the most one more request, which has to come by then."""
        if self.state is State.HEAD and not self._pending:
            self.deadline = min(self.deadline, deadline)

    def close(self) -> None:
        """Close at once."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self.head = None
        self._body = _EMPTY
        self._decoder = None
        self._pending = bytearray()
        self._unsent = []
        self._hold(0)
        self._host.forget(self)
        self.socket.close()

    # --- Receiving

    def _receive(self) -> None:
        host, left = self._host, BYTES_PER_TURN
        while self._readable:
            state = self.state
            if state is State.HEAD and self._pending and not self._seen:
                return  # the next request is here already, and waits for its turn
            if state is State.BODY and self._decoder is None:
                target = self._body[self._received :]
            elif state is State.HEAD or state is State.BODY or state is State.LINGERING:
                target = host.arena
            else:
                return
            try:
                count = self.socket.recv_into(target)
            except _BLOCKED:
                self._readable = False
                return
            except OSError:  # reset by the client, or no TLS
                self.close()
                return
            if not count:
                self._end()
                return
            if count < len(target):
                self._note_drained()
            self._take(state, target, count)
            if self.state is State.HEAD and not self._seen:
                return  # a request was answered; the next one is for the next turn, so that others come in between
            if self._decoder is not None and self._decoder.has_more:
                return  # decoded in the next turns
            left -= count
            if left <= 0 and self._readable:
                self._is_slow = self.state is not State.WAITING
                host.resume_later(self)
                return

    def _note_drained(self) -> None:
        """A short read has emptied the socket; but the end of the stream, already told, has to be read yet."""
        self._readable = self.is_half_closed

    def _take(self, state: State, target: memoryview, count: int) -> None:
        if state is State.HEAD:
            if self._pending:
                self._pending += target[:count]
                self._read_head(self._pending)
            else:
                self._read_head(target[:count])
        elif state is State.BODY:
            if self._decoder is not None:
                self._feed(bytes(target[:count]))
                return
            self._take_body(count)

    def _take_body(self, count: int) -> None:
        self._received += count
        try:
            self._check_room(self._received, len(self._body))
        except Refusal as refusal:
            self._refuse(refusal)
            return
        self._hold(self._received + len(self._pending))
        if self._received == len(self._body):
            self._complete()

    def _end(self) -> None:
        """The client sends no more."""
        self._readable = False
        if self.state is State.BODY and self._decoder is None:
            self._refuse(Refusal(400, f"the body ended after {self._received} of {len(self._body)} bytes"))
        elif self.state is State.BODY:
            self._refuse(Refusal(400, "the body ended before its last chunk"))
        elif self.state is State.HEAD and self._pending.strip(b"\r\n"):  # an empty line alone is no request
            message = f"the head of the request ended after {len(self._pending)} bytes, before its empty line"
            self._refuse_head(self._pending, Refusal(400, message))
        else:
            self.close()

    def _read_head(self, source: bytearray | memoryview) -> None:
        try:
            head = self._parse_head(source)
        except Refusal as refusal:
            self._refuse_head(source, refusal)
            return
        if head is None:
            self._keep_part_of_head(source)
            return
        self._seen = 0
        self.head = head
        self.keep_alive = head.keep_alive
        if head.length is None:
            self._begin_chunks(head, bytes(source[head.size :]))
        else:
            self._begin_body(head, source)

    def _parse_head(self, source: bytearray | memoryview) -> Head | None:
        """Parse a head, unless it is the same as the last one, as it mostly is on a connection that is kept alive."""
        last = self._last_head
        if last is not None and bytes(source[: last.size]) == self._last_bytes:
            return last.copy()
        head = self._host.heads.read(source, self._seen, self.template)
        if head is not None and head.size <= _REMEMBERED_HEAD:
            self._last_bytes = bytes(source[: head.size])
            self._last_head = head.copy()
        return head

    def _keep_part_of_head(self, source: bytearray | memoryview) -> None:
        if source is not self._pending:
            self._pending += source
            self.deadline = self._host.now + self._host.times.head
        self._seen = len(self._pending)
        self._hold(self._seen)
        limit = self._host.heads.limits.head
        if self._seen > limit:
            self._refuse_head(source, Refusal(431, f"the head of the request is larger than {limit} bytes"))
        elif self._host.held > self._host.max_held:
            self._refuse_head(source, self._no_room("the head of a request", self._seen))

    def _begin_body(self, head: Head, source: bytearray | memoryview) -> None:
        length = head.length or 0
        rest = memoryview(source)[head.size :]
        received = min(length, len(rest))
        if received == length <= _SMALL_BODY and (not length or self._has_room(length)):
            self._body = memoryview(bytearray(rest[:length]))  # writable, as OpenVINO wants the memory of a tensor
            if len(rest) > length or self._pending:
                self._keep_behind(source, rest, length)
                self._hold(length + len(self._pending))
            self._complete()
            return
        try:
            self._check_room(received, length)
        except Refusal as refusal:
            self._refuse(refusal)
            return
        self._body = allocate(length, tensors_begin(head.environ.get(_HEADER_LENGTH)))
        self._body[:received] = rest[:received]
        self._received = received
        self._keep_behind(source, rest, received)
        self._hold(received + len(self._pending))
        if received == length:
            self._complete()
        else:
            self._wait_for_body(head)

    def _keep_behind(self, source: bytearray | memoryview, rest: memoryview, size: int) -> None:
        """Keep what came behind a request of which so many bytes lie in `rest`, without copying it every time."""
        if source is self._pending:
            used = len(source) - len(rest) + size
            rest.release()
            del self._pending[:used]
        else:
            self._pending = bytearray(rest[size:])

    def _wait_for_body(self, head: Head) -> None:
        self.state = State.BODY
        self.deadline = self._host.now + self._host.times.body
        self._counted = 0
        if head.expects_continue and not self._received:
            self._send_now(CONTINUE)

    def _check_room(self, received: int, announced: int = 0) -> None:
        """Refuse a body that is too large, or has come so far that there is no room for more.

        The memory of what is announced only is not taken yet, and would be kept from others by who sends no more.
        """
        host = self._host
        if max(received, announced) > host.max_body:
            what = f"{announced}" if announced else f"more than {host.max_body}"
            raise Refusal(413, f"the body has {what} bytes, at most {host.max_body} are allowed")
        if host.held - self._held + received > host.max_held or announced > host.max_held:
            raise self._no_room("a body", max(received, announced))

    def _has_room(self, length: int) -> bool:
        host = self._host
        return length <= host.max_body and host.held - self._held + length <= host.max_held

    def _no_room(self, what: str, size: int) -> Refusal:
        room = Room(self._host.held - self._held, self._host.max_held)
        return Refusal(503, describe_lack(what, size, room), {"Retry-After": "1"})

    def _begin_chunks(self, head: Head, rest: bytes) -> None:
        aligned = tensors_begin(head.environ.get(_HEADER_LENGTH))
        self._body = _EMPTY
        self._received = 0
        self._pending = bytearray()
        self._decoder = ChunkDecoder(self._host.heads.limits, self._host.max_body, aligned)
        self._wait_for_body(head)
        if self.state is State.BODY:
            self._feed(rest)

    def _feed(self, data: bytes) -> None:
        decoder = self._decoder
        assert decoder is not None
        try:
            decoder.feed(data)
            self._check_room(decoder.size)
        except Refusal as refusal:
            self._refuse(refusal)
            return
        self._received = decoder.size
        self._hold(self._received + len(decoder.rest))
        if decoder.is_complete:
            self._pending = bytearray(decoder.rest)
            self._body = decoder.data
            self._decoder = None
            self._complete()
        elif decoder.has_more:
            self._is_slow = True
            self._host.resume_later(self)

    def _complete(self) -> None:
        self.state = State.WAITING
        self._is_slow = False
        self.deadline = _NEVER
        assert self.head is not None
        self.head.environ["wsgi.input"] = RequestBody(self._body)
        self._body = _EMPTY
        self._host.submit(self)

    def _refuse_head(self, source: bytearray | memoryview, refusal: Refusal) -> None:
        refusal.is_of_head = bytes(memoryview(source)[:5]) == b"HEAD "
        self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is wrong and close: where the next request begins is not known any more."""
        self.state = State.WAITING
        self.keep_alive = False
        self._linger = True
        self._is_slow = False
        self._decoder = None
        self._body = _EMPTY
        self._pending = bytearray()
        self._host.refuse(self, refusal)

    # --- Sending

    def send(self, parts: Sequence[Buffer], size: int) -> None:
        """Send an answer of so many bytes; what the socket does not take at once is copied and sent later."""
        try:
            sent = self._send_parts(parts)
        except OSError:
            self.close()
            return
        if sent == size:
            self._finish()
            return
        self.state = State.SENDING
        self.head = None  # with the body
        self.deadline = self._host.now + self._host.times.send
        self._sent, self._counted = sent, 0
        self._unsent = list(map(_keep, _skip(parts, sent)))
        self._hold_unsent()
        if self._host.held > self._host.max_held:  # only small answers come so far
            log.debug("no room for %d bytes of an answer that is not read, whose connection is closed", size - sent)
            self.close()

    def _send_parts(self, parts: Sequence[Buffer]) -> int:
        if len(parts) > MAX_PARTS:
            parts = [b"".join(parts)]
        try:
            return self.socket.send(parts[0]) if len(parts) == 1 else self.socket.sendmsg(parts)
        except _BLOCKED:
            return 0

    def _send_now(self, data: bytes) -> None:
        """Send an interim response. A socket that does not take these few bytes has a client that does not read."""
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
        """An answer was sent whole."""
        self.head = None
        self._hold(len(self._pending))
        if self.keep_alive:
            self.state = State.HEAD
            self.idle_since = self._host.now
            self.deadline = self._host.now + (self._host.times.head if self._pending else self._host.times.idle)
            if self._pending or self._readable:
                self._host.resume_later(self)
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
        self.deadline = self._host.now + LINGER_SECONDS
        self._pending = bytearray()
        self._readable = True
        self._host.resume_later(self)

    def _shut_down(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def has_more(self) -> bool:
        """Tell whether another request, or a part of one, was received already."""
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
        """Close after this answer though the client did not ask for it, and so may be sending another request."""
        self.keep_alive = False
        self._linger = True

    def hold_request(self) -> None:
        """Account for a request that came whole and has to wait."""
        assert self.head is not None
        self._hold(len(self.head.environ["wsgi.input"].buffer) + len(self._pending))

    def _hold(self, size: int) -> None:
        """Account for the memory that this connection keeps."""
        self._host.held += size - self._held
        self._held = size


class TlsConnection(Connection):
    """A connection over TLS; the handshake goes on inside of reads and writes."""

    __slots__ = ()

    def _note_drained(self) -> None:
        """A short read means nothing here: a record has its own size, and more may be decrypted already."""

    def _shut_down(self) -> None:
        self._say_goodbye()
        super()._shut_down()

    def close(self) -> None:
        """Close at once, but not without the alert that RFC 9112 section 9.8 asks for."""
        if self.state is not State.CLOSED and self.state is not State.LINGERING:
            self._say_goodbye()
        super().close()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client is not waited for, and may be gone
            self.socket.unwrap()  # type: ignore[attr-defined]

    def has_more(self) -> bool:
        """Tell whether another request, or a part of one, was received already; what is encrypted does not count."""
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
    """Return a view of memory that stays as it is: other than bytes it may be a model's, for its next inference."""
    return part if isinstance(part.obj, bytes) else memoryview(bytes(part))


def _skip(parts: Sequence[Buffer], size: int) -> Sequence[memoryview]:
    """Return what is behind so many bytes of the parts."""
    rest = []
    for part in parts:
        if size < len(part):
            rest.append(memoryview(part)[size:])
        size = max(size - len(part), 0)
    return rest
