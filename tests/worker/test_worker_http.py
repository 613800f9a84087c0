"""The worker as an HTTP/1.1 server, by raw sockets: framing, connections, refusals, limits."""

import contextlib
import email.utils
import json
import re
import socket
import struct
import time

import numpy as np
import pytest
import raw_http
import slow_models
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_http import (
    LIVE,
    RELU,
    RELU_PATH,
    Barrier,
    chunk,
    connected,
    cut,
    exchange,
    head,
    infer,
    is_closed,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
    send_pieces,
)
from service import serve

MAX_BODY = 4 * 2**20
RELU_DATA = [1, 0, 3, 0]
# This must not get a response after a request that is refused.
SMUGGLED = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run one worker, so that the order of events is known, with a low limit for bodies."""
    directory = tmp_path_factory.mktemp("worker_http")
    config = slow_models.save(directory)
    with serve(directory, "-w", "1", config=config, OVMS_REST_MAX_BODY_BYTES=str(MAX_BODY)) as running:
        yield running


@pytest.fixture(scope="module")
def barrier(server):
    with contextlib.closing(Barrier(server)) as found:
        yield found


def inferred(answer):
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == RELU_DATA


def refused(answer, status=None):
    """Return whether a response is an error in the usual form, and the last of its connection."""
    return (
        answer.status >= 400
        and status in (None, answer.status)
        and answer.headers["content-type"] == "application/json"
        and answer.headers["connection"] == "close"
        and list(answer.json()) == ["error"]
    )


def final(answers):
    """Leave out interim responses."""
    return [answer for answer in answers if answer.status >= 200]


def stable(answer):
    """Return the part of a response that is the same for equal requests at any time."""
    return answer.status, {**answer.headers, "date": None, "x-request-id": None}, answer.body


# --- Several requests on a connection

TRAILED = head("POST", RELU_PATH, "Transfer-Encoding: chunked") + (
    chunk(RELU[:7], b";name=value") + chunk(RELU[7:], b';a="b;c"') + b"0;last\r\nA: b\r\nC:\r\n\r\n"
)
CONVERSATION = [
    (LIVE, "GET", 200),
    (post(RELU_PATH, RELU), "POST", 200),
    (head("HEAD", "/v2"), "HEAD", 200),
    (post_chunked(RELU_PATH, RELU[:7], RELU[7:]), "POST", 200),
    (head("GET", "/v2/nothing?there=is"), "GET", 404),
    (TRAILED, "POST", 200),
    (post(RELU_PATH, b"{broken"), "POST", 400),
    (head("HEAD", "/v2/models/unknown"), "HEAD", 404),
    (post(RELU_PATH, RELU, "Expect: 100-continue"), "POST", 200),
    (b"\r\n" + post(RELU_PATH, b""), "POST", 400),
    (head("GET", "/v2", "Content-Length: 4") + b"GET ", "GET", 200),
    (post_chunked("/v2", b"PUT"), "POST", 405),
    (post(RELU_PATH, RELU), "POST", 200),
]
BYTES = b"".join(data for data, _, _ in CONVERSATION)
METHODS = [method for _, method, _ in CONVERSATION]
STATUSES = [status for _, _, status in CONVERSATION]


def test_connection_is_kept_alive(server):
    with connected(server) as connection:
        for _ in range(20):
            for data, method, status in CONVERSATION:
                connection.sendall(data)
                answer = receive(connection, method)
                assert answer.status == status
                assert "connection" not in answer.headers


def test_pipelined_responses_come_in_order(server):
    answers = final(parse(exchange(server, BYTES * 5), *METHODS * 5))
    assert [answer.status for answer in answers] == STATUSES * 5
    for (data, _, status), answer in zip(CONVERSATION * 5, answers, strict=True):
        if RELU_PATH.encode() in data and status == 200:
            assert inferred(answer)


def test_pipelined_responses_come_in_order_after_a_slow_one(server):
    slow = infer("counting", slow_models.count(slow_models.SLOW))
    answers = parse(exchange(server, slow + LIVE + slow + head("GET", "/v2/models/relu") + LIVE), "POST", "GET", "POST")
    assert [answer.status for answer in answers] == [200] * 5
    names = [answer.json().get("model_name", answer.json().get("name")) for answer in answers if answer.body]
    assert names == ["counting", "counting", "relu"]


def test_many_pipelined_requests_get_their_responses(server):
    """More requests than fit into one receive, and more responses than the client has room for."""
    count = 5000
    with connected(server) as connection:
        connection.settimeout(60)
        connection.setblocking(True)
        requests, received = LIVE * count, []
        sent = 0
        while sent < len(requests):
            sent += connection.send(requests[sent : sent + 100_000])
            received.append(connection.recv(2**20))
        connection.shutdown(socket.SHUT_WR)
        received.append(receive_rest(connection))
    answers = parse(b"".join(received))
    assert [answer.status for answer in answers] == [200] * count


# --- Requests in pieces

SHORT = post(RELU_PATH, RELU) + TRAILED + LIVE


def test_stream_may_be_split_at_any_byte(server, barrier):
    for place in range(1, len(SHORT)):
        with connected(server) as connection:
            send_pieces(connection, cut(SHORT, [place]), barrier)
            answers = [receive(connection, method) for method in ("POST", "POST", "GET")]
            assert [inferred(answer) for answer in answers[:2]] == [True, True], place
            assert answers[2].status == 200, place


def test_stream_may_be_split_at_every_byte(server, barrier):
    with connected(server) as connection:
        send_pieces(connection, cut(BYTES, list(range(1, len(BYTES)))), barrier)
        connection.shutdown(socket.SHUT_WR)
        answers = final(parse(receive_rest(connection), *METHODS))
    assert [answer.status for answer in answers] == STATUSES


@pytest.fixture(scope="module")
def whole(server):
    """The responses to the conversation when it is sent in one piece."""
    return [stable(answer) for answer in final(parse_with_interim(exchange(server, BYTES)))]


def parse_with_interim(data):
    """Parse the responses to the conversation, before one of which there may be an interim one."""
    interim, count = b"HTTP/1.1 100 Continue\r\n\r\n", data.count(b"HTTP/1.1 100 ")
    assert count <= 1
    return parse(data.replace(interim, b""), *METHODS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, len(BYTES) - 1), max_size=12))
def test_stream_in_any_pieces_gets_the_same_responses(server, barrier, whole, places):
    with connected(server) as connection:
        send_pieces(connection, cut(BYTES, places), barrier)
        connection.shutdown(socket.SHUT_WR)
        answers = parse_with_interim(receive_rest(connection))
    assert [stable(answer) for answer in answers] == whole


# --- Bodies


def matrix(size):
    """Make a binary request of `size` bytes; return its body, header and the expected response."""
    rows = (size - 200) // 16
    array = np.random.default_rng(size).standard_normal((rows, 4), np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": array.nbytes}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    text = text.ljust(size - array.nbytes)
    return text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}", np.maximum(array, 0).tobytes()


def section(answer):
    return answer.body[int(answer.headers["inference-header-content-length"]) :]


ARENA = 64 * 1024  # the worker receives at most this many bytes in one call
SIZES = [1000, *range(ARENA - 2, ARENA + 3), 2 * ARENA, 300_001, MAX_BODY]


@pytest.mark.parametrize("size", SIZES)
def test_bodies_of_any_size_are_read(server, size):
    """Twice on a connection, the head of the second after the body of the first."""
    body, field, expected = matrix(size)
    answers = parse(exchange(server, post(RELU_PATH, body, field) * 2 + LIVE), "POST", "POST")
    assert [answer.status for answer in answers] == [200] * 3
    assert [section(answer) == expected for answer in answers[:2]] == [True, True]


def test_receive_may_end_anywhere_in_the_next_request(server):
    body, field, expected = matrix(1000)
    request = post(RELU_PATH, body, field)
    size = len(request) - len(body)
    for place in (0, 1, size - 1, size, size + 1, size + 500, len(request)):
        filler = ARENA - place - len(head("GET", "/v2", "Content-Length: 60000"))
        data = head("GET", "/v2", f"Content-Length: {filler}") + b"x" * filler + request
        answers = parse(exchange(server, data), "GET", "POST")
        assert [answer.status for answer in answers] == [200, 200], place
        assert section(answers[1]) == expected


def test_empty_body_is_a_tensor_without_elements(server):
    """An empty body needs no memory."""
    field = "Inference-Header-Content-Length: 0"
    requests = post(RELU_PATH, b"", field) + post_chunked(RELU_PATH, fields=(field,)) + head("POST", RELU_PATH, field)
    answers = parse(exchange(server, requests), "POST", "POST", "POST")
    assert [answer.status for answer in answers] == [200] * 3
    for answer in answers:
        assert answer.json()["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [0, 4], "parameters": {"binary_data_size": 0}}
        ]


@pytest.mark.parametrize("sizes", [[1], [1000, 1, 70_000], [ARENA - 1, ARENA, ARENA + 1], [10**6]])
def test_chunks_of_any_size_are_decoded(server, sizes):
    body, field, expected = matrix(300_001)
    chunks, start = [], 0
    while start < len(body):
        size = sizes[len(chunks) % len(sizes)] if start < 1000 or sizes != [1] else len(body)
        chunks.append(body[start : start + size])
        start += size
    answers = parse(exchange(server, post_chunked(RELU_PATH, *chunks, fields=(field,)) * 2), "POST", "POST")
    assert [section(answer) == expected for answer in answers] == [True, True]


CHUNKED = head("POST", RELU_PATH, "Transfer-Encoding: chunked")
SIZE = b"%x" % len(RELU)
END = b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        SIZE + b"\r\n" + RELU + END,
        SIZE.upper() + b"\r\n" + RELU + END,
        b"0000" + SIZE + b"\r\n" + RELU + b"\r\n000\r\n\r\n",
        SIZE + b";a\r\n" + RELU + END,
        SIZE + b";a=b;c\r\n" + RELU + END,
        SIZE + b';a="b c;d"\r\n' + RELU + END,
        SIZE + b"\r\n" + RELU + b"\r\n0;a=b\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\r\nC-D:\r\n\r\n",
    ],
)
def test_chunked_bodies_are_decoded(server, data):
    answers = parse(exchange(server, CHUNKED + data + LIVE), "POST", "GET")
    assert inferred(answers[0])
    assert [answer.status for answer in answers] == [200, 200]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" + RELU + END,
        b"x\r\n" + RELU + END,
        b"-1\r\n" + RELU + END,
        b"+" + SIZE + b"\r\n" + RELU + END,
        b"0x" + SIZE + b"\r\n" + RELU + END,
        b" " + SIZE + b"\r\n" + RELU + END,
        SIZE + b" \r\n" + RELU + END,
        SIZE + b"\t\r\n" + RELU + END,
        SIZE[:1] + b"_" + SIZE[1:] + b"\r\n" + RELU + END,
        b"1" * 17 + b"\r\n" + RELU + END,
        SIZE + b"\n" + RELU + END,
        SIZE + b"\r" + RELU + END,
        SIZE + b"\r\r\n" + RELU + END,
        SIZE + b";a\n" + RELU + END,
        SIZE + b";a\rb\r\n" + RELU + END,
        SIZE + b"\r\n" + RELU + b"0\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\n0\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"x\r\n0\r\n\r\n",
        SIZE + b"\r\n" + RELU[:-1] + END,
        SIZE + b"\r\n" + RELU + b"\r\n0\n\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\rc\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nHost: x\r\n\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n",
        SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
        SIZE + b";" + b"a" * 9000 + b"\r\n" + RELU + END,
    ],
)
def test_malformed_chunks_are_refused(server, data):
    (answer,) = parse(exchange(server, CHUNKED + data + SMUGGLED), "POST")
    assert refused(answer)
    assert answer.status in (400, 431)


@pytest.mark.parametrize(
    "data",
    [
        b"3\nabc\n0\n\n",
        b"3\n",
        b"3;a\n",
        b"\n",
        b"3\rabc",
        b"3\r\nabc\n",
        b"3\r\nabc\r0",
        b"0\n\n",
        b"0\r\n\n",
        b"0\r\nA: b\n\n",
        b"0\r\nA: b\r\n\n",
        b"0\r\nA: b\rC",
    ],
)
def test_chunk_line_with_a_bare_cr_or_lf_is_refused_immediately(server, data):
    """Not only when the time limit passes. RFC 9112 section 2.2 lets a bare LF end the lines of heads only."""
    with connected(server, CHUNKED + data) as connection:
        assert refused(receive(connection, "POST"), 400)


@pytest.mark.parametrize(
    "trailer", [b"no colon", b": b", b"A : b", b" A: b", b"A: b\r\n folded", b"A(: b", b"A: b\0", b"GET / HTTP/1.1"]
)
def test_malformed_trailers_are_refused(server, trailer):
    """RFC 9112 section 7.1.2: a trailer section consists of field lines."""
    data = CHUNKED + SIZE + b"\r\n" + RELU + b"\r\n0\r\n" + trailer + b"\r\n\r\n" + SMUGGLED
    (answer,) = parse(exchange(server, data), "POST")
    assert refused(answer, 400)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (post(RELU_PATH, RELU)[:-1], f"the body ended after {len(RELU) - 1} of {len(RELU)} bytes"),
        (head("POST", RELU_PATH, "Content-Length: 5"), "the body ended after 0 of 5 bytes"),
        (CHUNKED, "the body ended before its last chunk"),
        (CHUNKED + SIZE + b"\r\n" + RELU, "the body ended before its last chunk"),
        (CHUNKED + SIZE + b"\r\n" + RELU + b"\r\n0\r\n", "the body ended before its last chunk"),
        (CHUNKED + SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\r\n", "the body ended before its last chunk"),
    ],
)
def test_truncated_body_is_refused(server, data, message):
    (answer,) = parse(exchange(server, data), "POST")
    assert refused(answer, 400)
    assert answer.json()["error"] == message


# --- Expectations


@pytest.mark.parametrize(
    "data",
    [
        post(RELU_PATH, RELU, "Expect: 100-continue"),
        CHUNKED[:-2] + b"Expect: 100-CONTINUE\r\n\r\n" + SIZE + b"\r\n" + RELU + END,
    ],
)
def test_expectation_gets_100_continue(server, data):
    size = data.index(b"\r\n\r\n") + 4
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(data[:size])
            interim = connection.recv(1000)
            assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(data[size:])
            assert inferred(receive(connection, "POST"))


def test_http_1_0_gets_no_100_continue(server, barrier):
    data = post(RELU_PATH, RELU, "Expect: 100-continue", version="1.0")
    size = data.index(b"\r\n\r\n") + 4
    with connected(server) as connection:
        send_pieces(connection, [data[:size], data[size:]], barrier)
        (answer,) = parse(receive_rest(connection), "POST")
    assert inferred(answer)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (("Content-Length: 4194305", "Expect: 100-continue"), 413),
        (("Content-Length: 5", "Expect: 100-continue, tea"), 417),
        (("Content-Length: 5", "Transfer-Encoding: chunked", "Expect: 100-continue"), 400),
    ],
)
def test_refused_body_gets_no_100_continue(server, fields, status):
    with connected(server, head("POST", RELU_PATH, *fields)) as connection:
        (answer,) = parse(receive_rest(connection), "POST")
    assert refused(answer, status)


def test_pipelined_expectation_gets_100_continue_in_its_turn(server):
    data = post(RELU_PATH, RELU, "Expect: 100-continue")
    size = data.index(b"\r\n\r\n") + 4
    with connected(server, infer("counting", slow_models.count(slow_models.SLOW)) + data[:size]) as connection:
        assert receive(connection, "POST").json()["model_name"] == "counting"
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(data[size:])
        assert inferred(receive(connection, "POST"))


# --- The end of a connection


def test_http_1_0_closes_unless_asked_to_keep_alive(server):
    with connected(server, b"GET /v2 HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n") as connection:
        answer = receive(connection)
        assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
        connection.sendall(b"GET /v2 HTTP/1.0\r\n\r\n")
        answer = receive(connection)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert is_closed(connection)


def test_connection_close_is_obeyed(server):
    for data in (head("GET", "/v2", "Connection: close"), head("GET", "/v2", "Connection: x, close", version="1.0")):
        with connected(server, data) as connection:
            assert receive(connection).headers["connection"] == "close"
            assert is_closed(connection)


def test_requests_after_connection_close_get_no_response(server):
    data = post(RELU_PATH, RELU, "Connection: close")
    for chunks in ([data + SMUGGLED], [data, SMUGGLED]):
        (answer,) = parse(exchange(server, *chunks), "POST")
        assert inferred(answer)


def test_response_is_complete_although_the_client_sent_more_than_its_request(server, barrier):
    """Old clients send a line break after a body; closing with unread bytes would reset the connection."""
    data = infer("filling", slow_models.fill(2.5, 500_000), "Connection: close")
    size = data.index(b"\r\n\r\n") + 4
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send_pieces(connection, [data[:size], data[size:] + b"\r\n"], barrier)
        (answer,) = parse(receive_rest(connection), "POST")
    assert section(answer) == np.full(500_000, 2.5, np.float32).tobytes()


def test_half_closed_client_gets_its_responses(server):
    answers = parse(exchange(server, LIVE + post(RELU_PATH, RELU) + LIVE), "GET", "POST")
    assert [answer.status for answer in answers] == [200] * 3


def test_half_close_may_arrive_before_responses_to_received_requests(server):
    """The first ones run before a slow inference of another client, and the half-close arrives meanwhile."""
    slow = infer("counting", slow_models.count(slow_models.SLOW))
    with connected(server, LIVE) as connection, connected(server) as one, connected(server) as two:
        receive(connection)
        one.sendall(slow)
        two.sendall(slow)
        connection.sendall(LIVE * 5)
        received = connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        answers = parse(received + receive_rest(connection))
        assert [receive(other, "POST").status for other in (one, two)] == [200, 200]
    assert [answer.status for answer in answers] == [200] * 5


def test_half_close_cancels_a_queued_inference(server, barrier):
    """As in nginx and Go: whether such a client still reads is unknown. If it does, it gets the reason."""
    slow = infer("counting", slow_models.count(slow_models.SLOW))
    with connected(server, slow) as first, connected(server, post(RELU_PATH, RELU) + LIVE) as second:
        second.shutdown(socket.SHUT_WR)
        (answer,) = parse(receive_rest(second), "POST")
        assert refused(answer, 503)
        assert "closed its side of the connection before the inference began" in answer.json()["error"]
        assert receive(first, "POST").status == 200


def test_half_close_does_not_cancel_pipelined_requests(server):
    slow = infer("counting", slow_models.count(slow_models.SLOW))
    answers = parse(exchange(server, slow + post(RELU_PATH, RELU) + slow + LIVE), *["POST"] * 3)
    assert [answer.status for answer in answers] == [200] * 4


@pytest.mark.parametrize("before", [b"", LIVE, b"\r\n"])
@pytest.mark.parametrize("size", [1, 10, len(LIVE) - 1])
def test_truncated_head_is_refused(server, before, size):
    *answers, last = parse(exchange(server, before + LIVE[:size]))
    assert [answer.status for answer in answers] == [200] * (before == LIVE)
    assert refused(last, 400)
    size += len(before) * (before != LIVE)
    assert last.json()["error"] == f"the head of the request ended after {size} bytes, before its empty line"


def test_empty_line_before_the_end_of_the_stream_is_ignored(server):
    for data in (b"\r", b"\r\n"):
        assert exchange(server, data) == b""
        assert [answer.status for answer in parse(exchange(server, LIVE + data))] == [200]


def reset(connection):
    """Make closing a connection reset it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_clients_that_vanish_at_any_moment_do_not_affect_others(server, barrier):
    slow = infer("counting", slow_models.count(slow_models.SLOW))
    large = infer("filling", slow_models.fill(1, 3_000_000))
    before, mistakes = server.workers(), server.log.count("Traceback")
    for end in (reset, socket.socket.close):
        for data in (b"", LIVE[:10], head("POST", RELU_PATH, "Content-Length: 9"), CHUNKED + b"5\r\nab", slow, large):
            connections = [raw_http.connected(server, data) for _ in range(3)]
            with contextlib.ExitStack() as stack:
                for connection in connections:
                    end(stack.enter_context(connection))
        with connected(server, slow) as first, connected(server, slow) as second, connected(server, large) as third:
            barrier.wait()
            end(second)  # while its request is queued
            assert receive(first, "POST").status == 200
            third.recv(10)
            end(third)  # while its response is being sent
        barrier.wait()
    assert inferred(parse(exchange(server, post(RELU_PATH, RELU)), "POST")[0])
    assert server.workers() == before
    assert server.log.count("Traceback") == mistakes


# --- Refusals


@pytest.mark.parametrize(
    "data",
    [
        # two lengths
        head("POST", "/v2", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n",
        head("POST", "/v2", "Content-Length: 0", "Content-Length: 5") + b"12345",
        head("POST", "/v2", "Content-Length: 5, 5") + b"12345",
        head("GET", "/v2", "Content-Length: 0", "content-length: 41"),
        # lengths that other servers may accept
        head("POST", "/v2", "Content-Length: +5") + b"12345",
        head("POST", "/v2", "Content-Length: 0x5") + b"12345",
        head("POST", "/v2", "Content-Length: 5 5") + b"12345",
        head("POST", "/v2", "Content-Length: -0"),
        head("POST", "/v2", "Content-Length: 18446744073709551616"),
        head("POST", "/v2", "Content-Length : 5") + b"12345",
        head("POST", "/v2", "Content-Length\t: 5") + b"12345",
        head("POST", "/v2", " Content-Length: 5") + b"12345",
        # codings that other servers may accept
        head("POST", "/v2", "Transfer-Encoding : chunked") + b"0\r\n\r\n",
        head("POST", "/v2", " Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("POST", "/v2", "A: b", " Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding:\x00chunked") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: identity", "Content-Length: 5") + b"12345",
        head("POST", "/v2", "Transfer-Encoding: chunked", "Transfer-Encoding: x") + b"0\r\n\r\n",
        head("POST", "/v2", "Transfer-Encoding: chunked", version="1.0") + b"0\r\n\r\n",
        # line ends that other servers may accept
        b"GET /v2 HTTP/1.1\nHost: x\n\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\nContent-Length: 5\r\n\r\n12345",
        b"GET /v2 HTTP/1.1\r\nHost: x\rContent-Length: 5\r\n\r\n12345",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n\nContent-Length: 5\r\n\r\n",
        b"\n" + head("GET", "/v2"),
        b"\r" + head("GET", "/v2"),
        # other protocols
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v2 HTTP/0.9\r\n\r\n",
        b"GET /v2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 " + b"\x00" * 100 + b"\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + head("GET", "/v2"),
    ],
)
def test_ambiguous_request_is_refused_and_nothing_after_it_read(server, data):
    (answer,) = parse(exchange(server, data + SMUGGLED))
    assert refused(answer)
    assert answer.status in (400, 501, 505)


def test_requests_before_a_refused_one_get_their_responses(server):
    answers = parse(exchange(server, LIVE + post(RELU_PATH, RELU) + b"GET\r\n\r\n" + SMUGGLED), "GET", "POST")
    assert [answer.status for answer in answers] == [200, 200, 400]


def test_refusal_reaches_a_client_that_continues_sending(server):
    """A client that reads only after sending everything must not find the connection reset."""
    with connected(server, b"BROKEN\r\n\r\n") as connection:
        for _ in range(30):
            connection.sendall(b"x" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        (answer,) = parse(receive_rest(connection))
    assert refused(answer, 400)


def test_refusal_of_head_has_no_body(server):
    """RFC 9110 section 9.3.2, whatever the status."""
    for data in (
        b"HEAD /v2 HTTP/1.1\r\n\r\n",
        head("HEAD", "/v2", "Content-Length: 99999999"),
        b"HEAD /v2 HTTP/1.1\r\n",
    ):
        received = exchange(server, data)
        assert received.startswith(b"HTTP/1.1 4")
        assert received.endswith(b"\r\n\r\n")


# --- Limits


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * (4094 - 14) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /" + b"a" * (4095 - 14) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (head("GET", "/v2", *["A: b"] * 99), 200),
        (head("GET", "/v2", *["A: b"] * 100), 431),
        (head("GET", "/v2", "A: " + "b" * (8190 - 5)), 200),
        (head("GET", "/v2", "A: " + "b" * (8191 - 5)), 431),
        (head("GET", "/v2", *["A: " + "b" * 8000] * 99), 200),
    ],
)
def test_heads_have_gunicorns_limits(server, data, status):
    answer = parse(exchange(server, data))[0]
    assert answer.status == status
    assert status < 410 or refused(answer)


@pytest.mark.parametrize(
    ("start", "more"), [(b"GET /", b"a"), (b"GET /v2 HTTP/1.1\r\nA: ", b"b"), (b"GET /v2 HTTP/1.1\r\n", b"A: b\r\n")]
)
def test_endless_head_is_refused_at_the_limit(server, start, more):
    """It is not received without end, and not kept whole: gunicorn's limits amount to 823 KB."""
    with connected(server, start) as connection:
        connection.settimeout(60)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(more * (100_000 // len(more)))
        (answer,) = parse(receive_rest(connection))
    assert refused(answer)
    assert answer.status in (414, 431)


@pytest.mark.parametrize("size", [MAX_BODY + 1, 2**40, 2**63 - 1])
def test_body_over_the_limit_is_refused_before_it_is_read(server, size):
    with connected(server, head("POST", RELU_PATH, f"Content-Length: {size}")) as connection:
        (answer,) = parse(receive_rest(connection), "POST")
    assert refused(answer, 413)
    assert answer.json()["error"] == f"the body has {size} bytes, at most {MAX_BODY} are allowed"


def test_chunked_body_is_refused_at_the_limit(server):
    chunks = [b"x" * 2**20] * 4
    whole = post_chunked(RELU_PATH, *chunks)
    assert parse(exchange(server, whole), "POST")[0].status == 400  # no JSON
    with connected(server, CHUNKED, *map(chunk, chunks), b"1\r\nx") as connection:
        (answer,) = parse(receive_rest(connection), "POST")
    assert refused(answer, 413)


@pytest.mark.parametrize(
    ("before", "size"), [(0, MAX_BODY + 1), (0, 2**59), (1, MAX_BODY), (100, MAX_BODY - 99), (300_000, MAX_BODY)]
)
def test_oversized_chunk_is_refused_at_its_size_line(server, before, size):
    with connected(server, CHUNKED + (chunk(b"x" * before) if before else b"") + b"%x\r\n" % size) as connection:
        (answer,) = parse(receive_rest(connection), "POST")
    assert refused(answer, 413)
    assert answer.json()["error"] == (
        f"the body is too large: a chunk of {size} after {before} bytes, at most {MAX_BODY} are allowed"
    )


def test_client_that_sends_a_body_over_the_limit_gets_the_response(server):
    """Client libraries send everything, then read."""
    body = b"x" * (3 * MAX_BODY)
    for data in (post(RELU_PATH, body), post_chunked(RELU_PATH, *[body[:100_000]] * 125)):
        with connected(server) as connection:
            connection.sendall(data)
            assert refused(receive(connection, "POST"), 413)


def test_refused_requests_leave_no_memory_held(server):
    body, field, expected = matrix(MAX_BODY)
    for _ in range(3):
        exchange(server, head("POST", RELU_PATH, f"Content-Length: {MAX_BODY}") + b"x" * 1000)
        exchange(server, head("POST", RELU_PATH, f"Content-Length: {MAX_BODY + 1}") + b"x" * 1000)
    assert section(parse(exchange(server, post(RELU_PATH, body, field)), "POST")[0]) == expected


# --- Targets and responses


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET http://example.org/v2 HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://example.org/v2?a HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://example.org HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET //v2 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"CONNECT example.org:80 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
)
def test_every_form_of_a_target_is_accepted_or_refused(server, data, status):
    (answer,) = parse(exchange(server, data))
    assert answer.status == status


# --- X-Request-ID

MADE = re.compile(r"[0-9a-f]{12}-[0-9]+")


@pytest.mark.parametrize(
    "request_id", ["a", "0b6f6c1e-0d1e-4d3c-8f5e-3d1c9b7a2f10", "!#$%&'()*+,-./:;<=>?@[]^_`{|}~", "x" * 128]
)
def test_request_id_is_repeated_in_the_response(server, request_id):
    field = f"X-Request-ID: {request_id}"
    requests = [
        head("GET", "/v2/health/live", field),
        head("HEAD", "/v2", field),
        post(RELU_PATH, RELU, field),
        post_chunked(RELU_PATH, RELU, fields=(field,)),
        post(RELU_PATH, b"{broken", field),
        head("GET", "/nothing", field),
        post(RELU_PATH, b"", field, f"Content-Length: {MAX_BODY + 1}").replace(b"Content-Length: 0\r\n", b""),
    ]
    answers = parse(exchange(server, *requests), "GET", "HEAD", *["POST"] * 3)
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 400, 404, 413]
    assert [answer.headers["x-request-id"] for answer in answers] == [request_id] * 7


def test_request_without_an_id_gets_one(server):
    answers = parse(
        exchange(server, LIVE * 3, post(RELU_PATH, RELU) * 3, b"BROKEN\r\n\r\n"), *["GET"] * 3, *["POST"] * 3
    )
    assert [answer.status for answer in answers] == [200] * 6 + [400]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(map(MADE.fullmatch, ids))
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\tb", "\xe9", "a\x1b[2Jb", "a\x7f", "a\x00b", "a\x0b"])
def test_request_id_unfit_for_logs_is_replaced(server, request_id):
    (answer,) = parse(exchange(server, head("GET", "/v2/health/live", f"X-Request-ID: {request_id}")))
    assert answer.status in (200, 400)
    assert MADE.fullmatch(answer.headers["x-request-id"])


def test_repeated_request_id_is_joined(server):
    (answer,) = parse(exchange(server, head("GET", "/v2", "X-Request-ID: a", "X-Request-ID: b")))
    assert answer.headers["x-request-id"] == "a,b"


def test_request_ids_do_not_stay_on_a_connection(server):
    with connected(server) as connection:
        for field, expected in (("X-Request-ID: a", "a"), ("A: b", None), ("X-Request-ID: c", "c"), ("A: b", None)):
            connection.sendall(head("GET", "/v2", field))
            found = receive(connection).headers["x-request-id"]
            assert found == expected or (expected is None and MADE.fullmatch(found))


def test_every_response_has_server_and_date(server):
    for data in (LIVE, b"BROKEN\r\n\r\n"):
        (answer,) = parse(exchange(server, data))
        assert answer.headers["server"] == "ovms_rest"
        sent = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
        assert abs(sent - time.time()) < 60
