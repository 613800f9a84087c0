"""Everything that a client sends on a connection: pipelined requests with bodies, cut at arbitrary places.

The input: a byte for the number of cuts, the length of each piece, and the stream. Bodies have at most 2000 bytes.
"""

import contextlib
from select import EPOLLIN, EPOLLRDHUP
from typing import Any

import h11
from fuzz_oracles import check_refusal
from fuzz_streams import TO_ASCII, split_input, to_h11
from gunicorn.config import Config
from request_cases import CONVERSATION, END, REFUSED, REFUSED_CHUNKS, SIZE, STREAM, VALID_CHUNKS, get, post
from workers import CHUNKED

from ovms_rest.worker.connection import Connection, Context, Refused, State, Times
from ovms_rest.worker.http1 import HeadReader

MAX_LENGTH = 1500
TOKENS = [
    *(
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\n",
        b"Content-Length: 3\r\n\r\nabc",
        b"\r\n0\r\n\r\n",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"3\r\nabc\r\n",
        b"\r\n\r\n",
        b"\r\n",
        b"Connection: close\r\n",
        b";a=b",
        b"HTTP/1.0",
    ),
    *(b"Expect: 100-continue\r\n", b"Inference-Header-Content-Length: 2\r\n", b"A: b\r\n"),
]
_ARENA = memoryview(bytearray(65_536))
_MAX_BODY = 2000
REFUSED_ITEM = (b"refused",)
_HEADS = HeadReader(Config())


def seeds() -> list[bytes]:
    """Return the conversation of the tests, its parts, and refused requests behind others."""
    streams = [STREAM, *(data for data, _, _ in CONVERSATION)]
    streams += [get() + data + get() for data, _, _ in REFUSED[::4] if len(data) < 1000]
    streams += [CHUNKED + data + get() for data in (*VALID_CHUNKS, *REFUSED_CHUNKS) if len(data) < 1000]
    streams += [post("Content-Length: 2001"), post("Content-Length: 9") + b"123", CHUNKED + SIZE + END]
    streams += [get("Connection: close") + get(), get(version="1.0") + get(), post("Content-Length: 3") + b"abc" * 2]
    return [b"\0" + stream for stream in streams] + [b"\4\7\31\71\1" + stream for stream in streams]


def check(data: bytes) -> None:
    """Receive a stream whole, in pieces, and byte by byte if it is short, and compare the requests with h11's."""
    pieces, stream = split_input(data)
    whole = _converse([stream])
    assert _converse(pieces) == whole, "differs by where the bytes are cut"
    if len(stream) < 100:
        assert _converse([stream[index : index + 1] for index in range(len(stream))]) == whole, "differs byte by byte"
    requests = [tuple(map(_to_ascii, item)) for item in whole if item != REFUSED_ITEM]
    theirs = _converse_with_h11(stream)
    assert theirs[: len(requests)] == requests, f"h11 read {theirs[: len(requests)]}, the service {requests}"


def _to_ascii(text: bytes) -> bytes:
    return text.translate(TO_ASCII)


class _Socket:
    """The pieces that arrive one after the other, and the end of the stream."""

    def __init__(self) -> None:
        self.arrived: bytes | None = b""
        self.sent = 0

    def recv_into(self, target: memoryview) -> int:
        if self.arrived is None:
            return 0
        if not self.arrived:
            raise BlockingIOError
        count = min(len(target), len(self.arrived))
        target[:count] = self.arrived[:count]
        self.arrived = self.arrived[count:]
        return count

    def send(self, data: Any) -> int:
        self.sent += len(data)
        return len(data)

    def shutdown(self, how: int) -> None:
        """Accept the end of the responses."""

    def close(self) -> None:
        """Accept the end."""


def _converse(pieces: list[bytes]) -> list[tuple[Any, ...]]:
    """Return the requests that a connection reads, responding to each, and its refusal."""
    closed: list[Connection] = []
    context = Context(_HEADS, Times(1, 1, 1, 1), _MAX_BODY, 2**20, _ARENA, closed.append)
    sock = _Socket()
    connection = Connection(context, sock, {"SCRIPT_NAME": ""})  # type: ignore[arg-type]
    found: list[tuple[Any, ...]] = []
    for piece in [*pieces, None]:
        sock.arrived = piece if piece is None else (sock.arrived or b"") + piece
        event = connection.handle(EPOLLIN if piece is not None else EPOLLIN | EPOLLRDHUP)
        while event is not None or context.resuming:
            if event is not None:
                found.append(_describe(event))
                assert context.held <= 66_000
                assert connection.state is State.COMPLETE
                connection.send([b"response"], 8)
            event = None
            if context.resuming:
                context.resuming.clear()
                connection.is_resuming = False
                event = connection.resume()
    assert closed == [connection], "still open after the end of the stream"
    assert context.held == 0, "memory is still accounted for"
    return found


def _describe(event: Any) -> tuple[Any, ...]:
    if isinstance(event, Refused):
        check_refusal(event.refusal, 400, 413, 414, 417, 431, 501, 505)
        return REFUSED_ITEM  # several faults may be noticed in another order, depending on the pieces
    environ = event.environ
    body = bytes(environ["wsgi.input"].buffer)
    assert len(body) <= _MAX_BODY
    return environ["REQUEST_METHOD"].encode(), environ["RAW_URI"].encode("latin-1"), body


def _converse_with_h11(stream: bytes) -> list[tuple[Any, ...]]:
    """Return the requests that h11 reads."""
    found: list[tuple[Any, ...]] = []
    with contextlib.suppress(h11.RemoteProtocolError):
        keeps_alive = True
        while stream and keeps_alive:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=10**6)
            connection.receive_data(to_h11(stream))
            request, body = connection.next_event(), b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += bytes(event.data)
            if not isinstance(request, h11.Request) or not isinstance(event, h11.EndOfMessage):
                break
            found.append((request.method, request.target, body))
            stream, _ = connection.trailing_data
            keeps_alive = connection.their_state is h11.DONE
    return found
