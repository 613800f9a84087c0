"""A connection by itself, over a pair of sockets: the events that it returns, and the memory that it holds."""

import contextlib
import itertools
import random
import select
import socket
import sys

import numpy as np
import pytest
from gunicorn.config import Config
from hypothesis import given
from hypothesis import strategies as st
from raw_http import LIVE, RELU, RELU_PATH, chunk, cut, head, post, post_chunked
from request_cases import CONVERSATION, END, REFUSED, REFUSED_CHUNKS, SIZE, STREAM
from workers import CHUNKED

from ovms_rest.protocol.words import count_of
from ovms_rest.worker.connection import Cancelled, Connection, Context, Refused, Request, State, Times
from ovms_rest.worker.http1 import HeadReader

HEADS = HeadReader(Config())
ARENA = 65_536  # the worker receives at most this many bytes in one call


class Counting:
    """A socket that counts the bytes of every `sendmsg`, and how often it is read."""

    def __init__(self, connection):
        self._connection, self.sent, self.reads = connection, [], 0

    def recv_into(self, target):
        self.reads += 1
        return self._connection.recv_into(target)

    def sendmsg(self, parts):
        count = self._connection.sendmsg(parts)
        self.sent.append(count)
        return count

    def __getattr__(self, name):
        return getattr(self._connection, name)


@contextlib.contextmanager
def wire():
    """Yield a connection with its context, the socket that it counts, and the client's end."""
    server, client = socket.socketpair()
    with server, client:
        server.setblocking(False)
        arena = memoryview(bytearray(ARENA))
        context = Context(HEADS, Times(1, 1, 1, 1), 2**28, 2**30, arena, lambda connection: None)
        counting = Counting(server)
        yield Connection(context, counting, {"SCRIPT_NAME": ""}), context, counting, client


@pytest.fixture
def wired():
    """A connection with its context, the socket that it counts, and the client's end."""
    with wire() as made:
        yield made


def take(wired, data):
    """Send data and let the connection receive it; return its event."""
    connection, _, _, client = wired
    client.sendall(data)
    return connection.handle(select.EPOLLIN)


def read_response(wired, size):
    """Read a response while the connection sends the rest of it."""
    connection, _, _, client = wired
    received = client.recv(100_000)
    while len(received) < size and connection.state is not State.CLOSED:
        connection.handle(select.EPOLLOUT)
        received += client.recv(100_000)
    connection.handle(select.EPOLLOUT)
    return received


def drive(wired, pieces):
    """Send pieces, each of which is read alone, an empty one ends the stream; yield the events, and respond to each."""
    connection, context, _, client = wired
    for piece in pieces:
        if piece:
            client.sendall(piece)
        else:
            client.shutdown(socket.SHUT_WR)
        event = connection.handle(select.EPOLLIN if piece else select.EPOLLIN | select.EPOLLRDHUP)
        while event is not None or context.resuming:
            if event is not None:
                yield event
                connection.send([b"response"], 8)
            event = None
            if context.resuming:
                context.resuming.clear()
                connection.is_resuming = False
                event = connection.resume()


@pytest.mark.parametrize("length", [0, 1, 63, 64, 100, 1000])
@pytest.mark.parametrize("how", ["with the head", "behind it", "in chunks", "behind another request"])
def test_first_tensor_lies_on_a_64_byte_boundary(wired, length, how):
    connection = wired[0]
    body = bytes(range(256)) * 80  # smaller bodies are copied anyway
    field = f"Inference-Header-Content-Length: {length}"
    data = [post(RELU_PATH, body, field)]
    if how == "behind it":
        data = [data[0][: -len(body)], body[:1000], body[1000:]]
    elif how == "in chunks":
        chunks = chunk(body[:1001]) + chunk(body[1001:]) + chunk(b"")
        data = [head("POST", RELU_PATH, "Transfer-Encoding: chunked", field) + chunks]
    elif how == "behind another request":
        data = [post(RELU_PATH, b"x") + data[0]]
    for piece in data:
        request = take(wired, piece)
    if how == "behind another request":
        connection.send([b"answer"], 6)
        request = connection.resume()
    buffer = np.frombuffer(request.environ["wsgi.input"].buffer, np.uint8)
    assert (buffer.ctypes.data + length) % 64 == 0
    assert buffer.tobytes() == body
    assert buffer.flags.writeable


def test_response_is_sent_by_one_sendmsg(wired):
    connection, _, counting, client = wired
    take(wired, post(RELU_PATH, RELU))
    parts = [b"head", b"json", memoryview(np.arange(1000, dtype=np.uint8)), memoryview(b"")]
    connection.send(parts, 1008)
    assert counting.sent == [1008]
    assert client.recv(2000) == b"".join(parts)
    assert connection.state is State.HEAD


def test_response_of_very_many_parts_is_sent(wired):
    """The system takes at most 1024 in one call (sendmsg(2), IOV_MAX)."""
    connection, context, _, _ = wired
    take(wired, post(RELU_PATH, RELU))
    connection.send([b"x"] * 3000, 3000)
    assert read_response(wired, 3000) == b"x" * 3000
    assert (connection.state, context.held) == (State.HEAD, 0)


def test_unsent_rest_of_a_response_survives_the_next_inference(wired):
    """The next output overwrites the memory of that response."""
    connection, context, counting, _ = wired
    take(wired, post(RELU_PATH, RELU))
    output = np.random.default_rng(0).integers(0, 255, 3_000_000, np.uint8)
    expected = b"head" + output.tobytes()
    connection.send([b"head", output.data], len(expected))
    assert 0 < counting.sent[0] < len(expected)
    assert context.held == len(expected) - counting.sent[0]
    output[:] = 0
    assert read_response(wired, len(expected)) == expected
    assert (connection.state, context.held) == (State.HEAD, 0)


def test_unsent_bytes_object_is_kept_without_a_copy_and_counts_whole(wired):
    connection, context, counting, _ = wired
    take(wired, post(RELU_PATH, RELU))
    body = np.random.default_rng(0).bytes(6_000_000)
    references = sys.getrefcount(body)
    connection.send([b"head", body], len(body) + 4)
    assert 0 < counting.sent[0] < len(body)
    assert sys.getrefcount(body) == references + 1
    assert context.held == len(body)
    assert read_response(wired, len(body) + 4) == b"head" + body
    assert (connection.state, context.held, sys.getrefcount(body)) == (State.HEAD, 0, references)


def test_queued_small_body_and_the_bytes_after_it_are_counted(wired):
    connection, context, _, _ = wired
    behind = LIVE * 100
    take(wired, post(RELU_PATH, RELU) + behind)
    assert context.held == len(RELU) + len(behind)
    connection.send([b"answer"], 6)
    assert context.held == len(behind)
    connection.hold_request(connection.resume())
    assert context.held == len(behind) - len(LIVE)
    connection.close()
    assert context.held == 0


def test_pipelined_requests_are_not_copied_for_each_of_many(wired):
    """The time grows with the number of requests, not with its square."""
    connection, _, _, client = wired
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    take(wired, LIVE * 1000)
    pending = connection._pending
    for _ in range(1, 1000):
        connection.send([b"answer"], 6)
        client.recv(100)
        assert isinstance(connection.resume(), Request)
        assert connection._pending is pending
    assert not pending


def test_body_larger_than_the_memory_limit_is_refused_at_its_head(wired):
    wired[1].max_held = 50_000
    refusal = take(wired, head("POST", RELU_PATH, "Content-Length: 50001")).refusal
    message = "no room for a body of 50001 bytes: OVMS_REST_MAX_HELD_BYTES allows 50000"
    assert (refusal.status, str(refusal)) == (503, message)


# --- Events


def test_incomplete_request_is_no_event(wired):
    data = post(RELU_PATH, RELU)
    for piece, held in ((data[:20], 20), (data[20:-1], len(RELU) - 1)):
        assert take(wired, piece) is None
        assert wired[1].held == held
    request = take(wired, data[-1:])
    assert bytes(request.environ["wsgi.input"].buffer) == RELU
    assert request.head.inference == ("relu", None)


def test_requests_on_a_connection_share_a_head_and_no_environ(wired):
    first = take(wired, LIVE)
    first.environ["X"] = "y"
    wired[0].send([b"response"], 8)
    second = take(wired, LIVE)
    assert second.head is first.head
    assert "X" not in second.environ


def test_pipelined_request_is_returned_after_the_response(wired):
    connection, context, _, _ = wired
    assert take(wired, LIVE + post(RELU_PATH, RELU)).head.inference is None
    assert connection.handle(select.EPOLLIN) is None
    connection.send([b"response"], 8)
    assert list(context.resuming) == [connection]
    assert connection.resume().head.inference == ("relu", None)


# --- Requests in pieces


def describe(request):
    """Return the parts of a request: its environ, body, length if known, and whether the connection is kept."""
    environ = request.environ
    body = bytes(environ["wsgi.input"].buffer)
    return {**environ, "wsgi.input": None}, body, request.head.length, request.connection.keep_alive


def read_in_pieces(places):
    with wire() as wired:
        return list(map(describe, drive(wired, filter(None, cut(STREAM, places)))))


WHOLE = read_in_pieces([])


def test_pipelined_requests_are_read_one_after_another():
    assert [environ["REQUEST_METHOD"] for environ, *_ in WHOLE] == [method for _, method, _ in CONVERSATION]
    assert [body for _, body, *_ in WHOLE if body] == [RELU, RELU, RELU, b"{broken", RELU, b"GET ", b"PUT", RELU]


def test_stream_may_be_split_at_any_byte():
    for place in range(1, len(STREAM)):
        assert read_in_pieces([place]) == WHOLE, place


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_stream_in_any_pieces_has_the_same_requests(places):
    assert read_in_pieces(places) == WHOLE


def bodies(wired, data):
    pieces = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    return [bytes(request.environ["wsgi.input"].buffer) for request in drive(wired, pieces)]


@pytest.mark.parametrize("size", [1000, *range(ARENA - 2, ARENA + 3), 2 * ARENA, 300_001, 4 * 2**20])
def test_bodies_of_any_size_are_read(wired, size):
    """Twice on a connection, the head of the second after the body of the first."""
    body = random.Random(size).randbytes(size)
    assert bodies(wired, post(RELU_PATH, body) * 2 + LIVE) == [body, body, b""]


def test_receive_may_end_anywhere_in_the_next_request(wired):
    request = post(RELU_PATH, RELU * 10)
    size = len(request) - len(RELU * 10)
    for place in (0, 1, size - 1, size, size + 1, size + 500, len(request)):
        filler = b"x" * (ARENA - place - len(head("GET", "/v2", "Content-Length: 60000")))
        data = head("GET", "/v2", f"Content-Length: {len(filler)}") + filler + request
        assert bodies(wired, data) == [filler, RELU * 10], place


@pytest.mark.parametrize("sizes", [[1] * 1000, [1000, 1, 70_000], [ARENA - 1, ARENA, ARENA + 1], [10**6]])
def test_chunks_of_any_size_are_decoded(wired, sizes):
    body = random.Random(0).randbytes(300_001)
    places = itertools.takewhile(len(body).__gt__, itertools.accumulate(itertools.islice(itertools.cycle(sizes), 1000)))
    assert bodies(wired, post_chunked(RELU_PATH, *cut(body, list(places))) * 2) == [body, body]


# --- Refusals


@pytest.mark.parametrize(
    "data", [*(data for data, _, _ in REFUSED), *(CHUNKED + chunks for chunks in REFUSED_CHUNKS), CHUNKED + b"3\n"]
)
def test_nothing_after_a_refused_request_is_read(wired, data):
    (event,) = drive(wired, [data + LIVE, LIVE])
    assert isinstance(event, Refused)
    assert event.refusal.status in (400, 417, 431, 501, 505)
    connection, _, _, client = wired
    assert (connection.state, connection.keep_alive) == (State.LINGERING, False)
    assert client.recv(100) == b"response"
    assert client.recv(100) == b""


def test_malformed_head_is_refused_with_an_unread_request(wired):
    (event,) = drive(wired, [b"nonsense\r\n\r\n"])
    assert event.refusal.status == 400
    assert (event.request.environ["REQUEST_METHOD"], event.request.environ["RAW_URI"]) == ("-", "-")


@pytest.mark.parametrize(
    ("start", "more"), [(b"GET /", b"a"), (b"GET /v2 HTTP/1.1\r\nA: ", b"b"), (b"GET /v2 HTTP/1.1\r\n", b"A: b\r\n")]
)
def test_endless_head_is_refused_at_the_limit(wired, start, more):
    """It is not received without end, and not kept whole: gunicorn's limits amount to 823 KB."""
    (event,) = drive(wired, [start, *[more * (50_000 // len(more))] * 20])
    assert event.refusal.status in (414, 431)
    assert wired[1].held == 0


@pytest.mark.parametrize("size", [2**28 + 1, 2**40, 2**63 - 1])
def test_body_over_the_limit_is_refused_before_it_is_read(wired, size):
    (event,) = drive(wired, [head("POST", RELU_PATH, f"Content-Length: {size}")])
    message = f"the body has {size} bytes, at most {2**28} are allowed"
    assert (event.refusal.status, str(event.refusal), wired[1].held) == (413, message, 0)


def refuse_at_the_end(wired, data):
    *requests, event = drive(wired, [data, b""])
    assert len(requests) == data.startswith(LIVE)
    assert (event.refusal.status, wired[0].keep_alive, wired[1].held) == (400, False, 0)
    return event


IN_CHUNKS = "the body ended before its last chunk"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (post(RELU_PATH, RELU)[:-1], f"the body ended after {len(RELU) - 1} of {len(RELU)} bytes"),
        (head("POST", RELU_PATH, "Content-Length: 5"), "the body ended after 0 of 5 bytes"),
        (CHUNKED, IN_CHUNKS),
        (CHUNKED + SIZE + b"\r\n" + RELU, IN_CHUNKS),
        (CHUNKED + SIZE + b"\r\n" + RELU + END[:-2], IN_CHUNKS),
        (CHUNKED + SIZE + b"\r\n" + RELU + END[:-2] + b"A: b\r\n", IN_CHUNKS),
    ],
)
def test_truncated_body_is_refused_with_its_request(wired, data, message):
    event = refuse_at_the_end(wired, data)
    assert str(event.refusal) == message
    assert event.request.environ["PATH_INFO"] == RELU_PATH


@pytest.mark.parametrize("before", [b"", LIVE, b"\r\n"])
@pytest.mark.parametrize("size", [1, 10, len(LIVE) - 1])
def test_truncated_head_is_refused(wired, before, size):
    refusal = refuse_at_the_end(wired, before + LIVE[:size]).refusal
    size += len(before) * (before != LIVE)
    assert str(refusal) == f"the head of the request ended after {count_of(size, 'byte')}, before its empty line"


# --- Expectations

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        post(RELU_PATH, RELU, "Expect: 100-continue"),
        CHUNKED[:-2] + b"Expect: 100-CONTINUE\r\n\r\n" + SIZE + b"\r\n" + RELU + END,
    ],
)
def test_expectation_gets_100_continue(wired, data):
    client = wired[3]
    size = data.index(b"\r\n\r\n") + 4
    for _ in range(2):
        assert take(wired, data[:size]) is None
        assert client.recv(1000) == INTERIM
        (request,) = drive(wired, [data[size:]])
        assert bytes(request.environ["wsgi.input"].buffer) == RELU
        assert client.recv(1000) == b"response"


def test_http_1_0_gets_no_100_continue(wired):
    data = post(RELU_PATH, RELU, "Expect: 100-continue", version="1.0")
    (request,) = drive(wired, [data[:-50], data[-50:]])
    assert request.environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    assert wired[3].recv(1000) == b"response"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((f"Content-Length: {2**28 + 1}", "Expect: 100-continue"), 413),
        (("Content-Length: 5", "Expect: 100-continue, tea"), 417),
        (("Content-Length: 5", "Transfer-Encoding: chunked", "Expect: 100-continue"), 400),
    ],
)
def test_refused_body_gets_no_100_continue(wired, fields, status):
    (event,) = drive(wired, [head("POST", RELU_PATH, *fields)])
    assert event.refusal.status == status
    assert wired[3].recv(1000) == b"response"


# --- Ends


@pytest.mark.parametrize(
    ("events", "is_gone", "state"),
    [
        (select.EPOLLIN | select.EPOLLRDHUP, False, State.COMPLETE),
        (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP, True, State.CLOSED),
        (select.EPOLLERR, True, State.CLOSED),
    ],
)
def test_client_that_closes_cancels_its_queued_request(wired, events, is_gone, state):
    connection = wired[0]
    request = take(wired, post(RELU_PATH, RELU))
    assert connection.handle(events) == Cancelled(request, is_gone)
    assert connection.state is state


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LIVE[:20], "timed out reading the head of the request after 20 bytes"),
        (post(RELU_PATH, RELU)[:-3], f"timed out reading the body after {len(RELU) - 3} bytes"),
    ],
)
def test_late_request_is_refused(wired, data, message):
    connection, context, _, _ = wired
    assert take(wired, data) is None
    context.now += 2
    refusal = connection.expire().refusal
    assert (refusal.status, str(refusal)) == (408, message)


def test_idle_connection_is_closed_after_its_time(wired):
    connection, context, _, client = wired
    context.now += 2
    assert connection.expire() is None
    assert connection.state is State.CLOSED
    assert client.recv(1) == b""


# --- Reads


def reads_until_it_waits(wired, data):
    """Send a request of which the head arrived before; return it, and how often the socket was read."""
    connection, _, counting, client = wired
    head_end = data.index(b"\r\n\r\n") + 4
    assert take(wired, data[:head_end]) is None
    before = counting.reads
    request = take(wired, data[head_end:])
    connection.send([b"response"], 8)
    while connection.is_resuming:
        connection.is_resuming = False
        connection.resume()
    assert client.recv(100) == b"response"
    return request, counting.reads - before


@pytest.mark.parametrize("size", [1, 1000, 50_000])
def test_body_that_follows_its_head_is_read_once(wired, size):
    """The read that completes it is a short one, so no other is needed to find the socket empty."""
    body = bytes(range(256)) * (size // 256 + 1)
    request, reads = reads_until_it_waits(wired, post(RELU_PATH, body[:size]))
    assert bytes(request.environ["wsgi.input"].buffer) == body[:size]
    assert reads == 1


@pytest.mark.parametrize("more", [1, 2, len(LIVE)])
def test_bytes_after_such_a_body_belong_to_the_next_request(wired, more):
    connection = wired[0]
    data = post(RELU_PATH, RELU)
    assert take(wired, data[: -len(RELU)]) is None
    request = take(wired, RELU + LIVE[:more])
    assert bytes(request.environ["wsgi.input"].buffer) == RELU
    connection.send([b"response"], 8)
    following = connection.resume()
    if more < len(LIVE):
        assert following is None
        following = take(wired, LIVE[more:])
    assert following.environ["PATH_INFO"] == "/v2/health/live"
