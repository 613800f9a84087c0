"""The worker as an HTTP/1.1 server, by raw sockets: bodies, connections and their ends, refusals, limits."""

import contextlib
import email.utils
import re
import socket
import time

import pytest
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
    is_closed,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
    send_pieces,
)
from request_cases import CONVERSATION, STREAM
from workers import (
    CHUNKED,
    MIB,
    SLOW,
    connected_with_small_buffer,
    fill,
    inferred,
    is_filled,
    reset,
    several,
    used,
    works,
)

MAX_BODY = 4 * MIB


@pytest.fixture(scope="module")
def server(start_shared):
    """One worker, so that the order of events is known, with a low limit for bodies."""
    return start_shared(1, OVMS_REST_MAX_BODY_BYTES=str(MAX_BODY))


@pytest.fixture(scope="module")
def barrier(server):
    with contextlib.closing(Barrier(server)) as found:
        yield found


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
    return [answer for answer in answers if answer.status >= 200]


# --- Several requests on a connection

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
    answers = final(parse(exchange(server, STREAM * 5), *METHODS * 5))
    assert [answer.status for answer in answers] == STATUSES * 5
    for (data, _, status), answer in zip(CONVERSATION * 5, answers, strict=True):
        if RELU_PATH.encode() in data and status == 200:
            assert inferred(answer)


def test_pipelined_responses_come_in_order_after_a_slow_one(server):
    """The client has closed its side meanwhile, which cancels none of them."""
    requests = (SLOW, LIVE, post(RELU_PATH, RELU), SLOW, head("GET", "/v2/models/relu"), LIVE)
    answers = parse(exchange(server, *requests), "POST", "GET", "POST", "POST")
    assert [answer.status for answer in answers] == [200] * 6
    names = [answer.json().get("model_name", answer.json().get("name")) for answer in answers if answer.body]
    assert names == ["counting", "relu", "counting", "relu"]


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


def test_stream_may_be_split_at_every_byte(server, barrier):
    with connected(server) as connection:
        send_pieces(connection, cut(STREAM, list(range(1, len(STREAM)))), barrier)
        connection.shutdown(socket.SHUT_WR)
        answers = final(parse(receive_rest(connection), *METHODS))
    assert [answer.status for answer in answers] == STATUSES


# --- Bodies


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


# --- Expectations


def test_pipelined_expectation_gets_100_continue_in_its_turn(server):
    data = post(RELU_PATH, RELU, "Expect: 100-continue")
    size = data.index(b"\r\n\r\n") + 4
    with connected(server, SLOW + data[:size]) as connection:
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
    for chunks in ([data + LIVE], [data, LIVE]):
        (answer,) = parse(exchange(server, *chunks), "POST")
        assert inferred(answer)


def test_response_is_complete_although_the_client_sent_more_than_its_request(server, barrier):
    """Old clients send a line break after a body; closing with unread bytes would reset the connection."""
    data = fill(2.5, 500_000, "Connection: close")
    size = data.index(b"\r\n\r\n") + 4
    with connected_with_small_buffer(server) as connection:
        send_pieces(connection, [data[:size], data[size:] + b"\r\n"], barrier)
        (answer,) = parse(receive_rest(connection), "POST")
    assert is_filled(answer, 2.5, 500_000)


def test_half_close_may_arrive_before_responses_to_received_requests(server):
    """The first ones run before a slow inference of another client, and the half-close arrives meanwhile."""
    with used(server, 1) as (connection,), several(server, 2, SLOW) as others:
        connection.sendall(LIVE * 5)
        received = connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        answers = parse(received + receive_rest(connection))
        assert [receive(other, "POST").status for other in others] == [200, 200]
    assert [answer.status for answer in answers] == [200] * 5


def test_empty_line_before_the_end_of_the_stream_is_ignored(server):
    for data in (b"\r", b"\r\n"):
        assert exchange(server, data) == b""
        assert [answer.status for answer in parse(exchange(server, LIVE + data))] == [200]


def test_clients_that_vanish_at_any_moment_do_not_affect_others(server, barrier):
    large = fill(1, 3_000_000)
    before, mistakes = server.workers(), server.log.count("Traceback")
    for end in (reset, socket.socket.close):
        for data in (b"", LIVE[:10], head("POST", RELU_PATH, "Content-Length: 9"), CHUNKED + b"5\r\nab", SLOW, large):
            for _ in range(3):
                with connected(server, data) as connection:
                    end(connection)
        with several(server, 2, SLOW) as (first, second), connected(server, large) as third:
            barrier.wait()
            end(second)  # while its request is queued
            assert receive(first, "POST").status == 200
            third.recv(10)
            end(third)  # while its response is being sent
        barrier.wait()
    assert works(server)
    assert server.workers() == before
    assert server.log.count("Traceback") == mistakes


# --- Refusals


def test_requests_before_a_refused_one_get_their_responses(server):
    answers = parse(exchange(server, LIVE + post(RELU_PATH, RELU) + b"GET\r\n\r\n" + LIVE), "GET", "POST")
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert refused(answers[2])


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
    whole = b"HEAD /v2 HTTP/1.1\r\n\r\n"
    for data in (whole, head("HEAD", "/v2", "Content-Length: 99999999"), whole[:-2]):
        received = exchange(server, data)
        assert received.startswith(b"HTTP/1.1 4")
        assert received.endswith(b"\r\n\r\n")


# --- Limits


def test_chunked_body_is_refused_at_the_limit(server):
    chunks = [b"x" * MIB] * 4
    whole = post_chunked(RELU_PATH, *chunks)
    assert parse(exchange(server, whole), "POST")[0].status == 400  # no JSON
    with connected(server, CHUNKED, *map(chunk, chunks), b"1\r\nx") as connection:
        (answer,) = parse(receive_rest(connection), "POST")
    assert refused(answer, 413)


def test_client_that_sends_a_body_over_the_limit_gets_the_response(server):
    """Client libraries send everything, then read."""
    body = b"x" * (3 * MAX_BODY)
    for data in (post(RELU_PATH, body), post_chunked(RELU_PATH, *[body[:100_000]] * 125)):
        with connected(server) as connection:
            connection.sendall(data)
            assert refused(receive(connection, "POST"), 413)


# --- Targets and responses


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "http://example.org/v2", 200),
        ("GET", "http://example.org/v2?a", 200),
        ("GET", "http://example.org", 200),
        ("OPTIONS", "*", 200),
        ("GET", "//v2", 404),
        ("CONNECT", "example.org:80", 404),
    ],
)
def test_every_form_of_a_target_is_accepted_or_refused(server, method, target, status):
    (answer,) = parse(exchange(server, head(method, target)))
    assert answer.status == status


def test_304_has_no_length(server):
    """It would have to be the length that the 200 has (RFC 9110 section 8.6)."""
    known = head("GET", "/v2/openapi.json", "If-None-Match: *")
    answers = parse(exchange(server, known, known, LIVE))
    assert [answer.status for answer in answers] == [304, 304, 200]
    assert ["content-length" in answer.headers for answer in answers] == [False, False, True]


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
        head("POST", RELU_PATH, field, f"Content-Length: {MAX_BODY + 1}"),
    ]
    answers = parse(exchange(server, *requests), "GET", "HEAD", *["POST"] * 3)
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 400, 404, 413]
    assert [answer.headers["x-request-id"] for answer in answers] == [request_id] * 7


def test_request_without_an_id_gets_one(server):
    data = exchange(server, LIVE * 3, post(RELU_PATH, RELU) * 3, b"BROKEN\r\n\r\n")
    answers = parse(data, *["GET"] * 3, *["POST"] * 3)
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
