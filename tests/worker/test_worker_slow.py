"""Slow and hostile clients: they delay no one, and are limited in time."""

import contextlib
import json
import select
import time

import numpy as np
import pytest
from processes import spent
from raw_http import LIVE, RELU, RELU_PATH, Load, chunk, connected, head, parse, post, receive, receive_rest
from workers import (
    CHUNKED,
    MIB,
    Flood,
    connected_with_small_buffer,
    fill,
    inferred,
    is_filled,
    several,
    slow,
    wait_until_read,
    works,
)


@pytest.fixture(scope="module")
def strict(start_shared):
    """A worker with the shortest time limits that can be set."""
    limits = {f"OVMS_REST_{name}_TIMEOUT_SECONDS": "1" for name in ("HEAD", "BODY", "SEND")}
    return start_shared(1, "--keep-alive", "2", **limits)


# --- They delay no one


def test_idle_and_dribbling_connections_delay_no_one(patient):
    """All of them get their responses in the end."""
    data = {
        "idle": (b"", LIVE, "GET"),
        "answered": (b"", LIVE, "GET"),
        "part of a head": (LIVE[:20], LIVE[20:], "GET"),
        "part of a body": (post(RELU_PATH, RELU)[:-40], post(RELU_PATH, RELU)[-40:], "POST"),
        "part of chunks": (CHUNKED + chunk(RELU[:9]), chunk(RELU[9:]) + chunk(b""), "POST"),
    }
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(100):
            for kind, (first, rest, method) in data.items():
                connection = stack.enter_context(connected(patient, first))
                connections.append((connection, rest, method))
                if kind == "answered":
                    connection.sendall(LIVE)
                    assert receive(connection).status == 200
        for place in range(8):
            for connection, rest, _ in connections:
                connection.sendall(rest[place : place + 1])
                if connection is connections[place][0]:
                    assert works(patient)
        for connection, rest, method in connections:
            connection.sendall(rest[8:])
            assert receive(connection, method).status == 200


def test_large_response_to_a_slow_reader_delays_no_one_and_stays_intact(patient):
    size = 6_000_000
    with connected_with_small_buffer(patient, fill(2.5, size, "Connection: close"), size=65536) as connection:
        received = [connection.recv(100)]
        for value in range(20):
            with connected(patient, fill(value, size // 10)) as other:
                assert is_filled(receive(other, "POST"), value, size // 10)
            received.append(connection.recv(100_000))
        received.append(receive_rest(connection))
    (answer,) = parse(b"".join(received), "POST")
    assert is_filled(answer, 2.5, size)


def test_slow_upload_delays_no_one(patient):
    array = np.random.default_rng(0).standard_normal((500_000, 4), np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(array.shape)}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    data = post(RELU_PATH, text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}")
    with connected(patient) as connection:
        for start in range(0, len(data), 500_000):
            connection.sendall(data[start : start + 500_000])
            assert works(patient)
        assert receive(connection, "POST").body.endswith(np.maximum(array, 0).tobytes())


@pytest.mark.parametrize("kind", ["chunks", "extensions", "requests"])
def test_tiny_chunks_and_requests_delay_no_one(patient, kind):
    """The bytes in the sockets of 40 connections take the worker seconds."""
    assert works(patient)
    (pid,) = patient.workers()
    data = {
        "chunks": CHUNKED + chunk(b"x") * 50_000,
        "extensions": CHUNKED + chunk(b"x", b";a") * 10_000,
        "requests": LIVE * 10_000,
    }[kind]
    with several(patient, 40) as connections:
        for connection in connections:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(data)
        busy = []  # the worker, meanwhile, in seconds
        for _ in range(10):
            for request in (LIVE, post(RELU_PATH, RELU)):
                before = spent(pid)
                with connected(patient, request) as connection:
                    assert receive(connection, request.split()[0].decode()).status == 200
                busy.append(spent(pid) - before)
    assert max(busy) < 0.5
    assert patient.workers() == [pid]


# --- They are limited in time


class Slow:
    """A connection on which data is sent, and then single bytes as long as the server takes them."""

    def __init__(self, connection, data, more=b""):
        self.connection, self.more, self.received, self.closed = connection, more, b"", False
        connection.sendall(data)
        connection.setblocking(False)

    def step(self):
        with contextlib.suppress(BlockingIOError):
            try:
                while data := self.connection.recv(100_000):
                    self.received += data
                self.closed = True
            except ConnectionError:
                self.closed = True
            if not self.closed and self.more:
                with contextlib.suppress(ConnectionError):
                    self.connection.send(self.more[:1])


def late_body(size=""):
    return f"timed out reading the body after {f'{size} bytes' if size != '' else ''}"


LATE_HEAD = "timed out reading the head of the request after "
LARGE = head("POST", RELU_PATH, "Content-Length: 200000000")
# What is sent, the byte that is sent again and again after it, and the error or None.
LATE = {
    "silent": (b"", b"", None),
    "head": (LIVE[:20], b"", LATE_HEAD),
    "head, dribbling": (LIVE[:20], b"A", LATE_HEAD),
    "second head": (LIVE + LIVE[:20], b"A", LATE_HEAD),
    "body": (post(RELU_PATH, RELU)[:-5], b"", late_body(len(RELU) - 5)),
    "no body": (head("POST", RELU_PATH, "Content-Length: 5000"), b"", late_body(0)),
    "body, dribbling": (head("POST", RELU_PATH, "Content-Length: 5000"), b"x", late_body()),
    "chunks": (CHUNKED + b"5\r\nab", b"", late_body(2)),
    "chunks, dribbling": (CHUNKED + b"fff\r\n", b"x", late_body()),
    "chunk size": (CHUNKED + b"5", b"", late_body(0)),
    "extension, dribbling": (CHUNKED + b"5;", b"a", late_body(0)),
    "trailers, dribbling": (CHUNKED + b"0\r\nA", b"a", late_body(0)),
    "expecting": (head("POST", RELU_PATH, "Content-Length: 5", "Expect: 100-continue"), b"", late_body(0)),
    "large body, dribbling": (LARGE, b"x", late_body()),
    "large body, stopping": (LARGE + b" " * 5_000_000, b"", late_body(5_000_000)),
    "chunks, stopping": (CHUNKED + chunk(b" " * 5_000_000), b"", late_body(5_000_000)),
    "idle": (LIVE, b"", None),
}


def test_late_requests_get_408_and_idle_connections_are_closed(strict):
    """All together, so that the test waits once; single bytes do not extend the time."""
    with contextlib.ExitStack() as stack:
        slow = {
            kind: Slow(stack.enter_context(connected(strict)), data, more) for kind, (data, more, _) in LATE.items()
        }
        deadline = time.monotonic() + 30
        with Load(strict.connect, clients=2) as load:
            while not all(item.closed for item in slow.values()):
                assert time.monotonic() < deadline, [kind for kind, item in slow.items() if not item.closed]
                select.select([item.connection for item in slow.values() if not item.closed], [], [], 0.05)
                for item in slow.values():
                    if not item.closed:
                        item.step()
        assert load.failures == []
        assert load.answered > 20
    for kind, (data, _, message) in LATE.items():
        answers = [answer for answer in parse(slow[kind].received) if answer.status >= 200]
        expected = [200] * data.startswith(LIVE) + [408] * (message is not None)
        assert [answer.status for answer in answers] == expected, kind
        if message is not None:
            assert answers[-1].json()["error"].startswith(message), kind
            assert answers[-1].headers["connection"] == "close"


def test_client_that_does_not_read_is_closed_in_time(strict):
    """Its pipelined requests are not read while its responses are unsent."""
    with connected(strict) as connection:
        flood, sent = Flood(connection), 0
        deadline = time.monotonic() + 30
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() < deadline:
                sent += flood.send()
                assert sent < 100 * MIB
                time.sleep(0.01)
    assert works(strict)


def test_client_that_stops_reading_a_large_response_is_closed_in_time(strict):
    """Its size alone gives it no more time: 40 MB would be 400 seconds."""
    with connected_with_small_buffer(strict, fill(1, 10_000_000)) as connection:
        received = len(connection.recv(MIB))
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        assert poll.poll(30_000), "it is not closed"
        received += len(receive_rest(connection))
        assert received < 40_000_000
    assert works(strict)


def test_client_that_reads_at_the_slowest_pace_gets_its_response(strict):
    """The bytes that the client has received count, not those that the system has taken."""
    size = 2_000_000
    with connected_with_small_buffer(strict, fill(2.5, size)) as connection:
        received, began = [connection.recv(1000)], time.monotonic()
        while (elapsed := time.monotonic() - began) < 6:
            if sum(map(len, received)) < 200_000 * elapsed:
                received.append(connection.recv(20_000))
            else:
                assert works(strict)
        connection.settimeout(10)
        while sum(map(len, received)) < 4 * size:
            received.append(connection.recv(MIB))
    (answer,) = parse(b"".join(received), "POST")
    assert is_filled(answer, 2.5, size)


def test_refused_client_that_continues_sending_is_cut_off(strict):
    with connected(strict, b"BROKEN\r\n\r\n") as connection:
        assert receive(connection).status == 400
        deadline = time.monotonic() + 30
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() < deadline:
                connection.sendall(b"x" * 1000)
                time.sleep(0.01)


def test_time_limit_of_a_body_grows_with_its_size(strict):
    """A second for every 100,000 bytes: a body at that pace is read despite a limit of a second."""
    data, sent, began = post(RELU_PATH, RELU.ljust(300_000)), 100_000, time.monotonic()
    with connected(strict, data[:sent]) as connection:
        while sent < len(data):
            assert works(strict)
            due = 100_000 + int(100_000 * (time.monotonic() - began))
            connection.sendall(data[sent:due])
            sent = due
        assert inferred(receive(connection, "POST"))


def test_time_in_the_queue_does_not_count_against_the_client(strict):
    """A client whose request is queued, or whose inference is slow, is not cut off."""
    with several(strict, 4, slow(8) + LIVE) as connections:
        for connection in connections:
            assert [receive(connection, "POST").status, receive(connection).status] == [200, 200]


def test_connection_is_not_idle_during_its_inference(strict):
    """Its idle time begins with the response, even if the inference took longer than that."""
    with connected(strict) as connection:
        factor, seconds = 5, 0.0
        while seconds < 2.5:  # the limit is 2 s
            connection.sendall(slow(factor))
            began = time.monotonic()
            assert receive(connection, "POST").status == 200
            seconds = time.monotonic() - began
            factor = max(factor + 1, round(factor * 2.8 / seconds))
        for _ in range(3):  # turns of the worker in which it checks the time limits
            wait_until_read(strict)
            connection.sendall(LIVE)
            assert receive(connection).status == 200
