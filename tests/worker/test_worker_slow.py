"""Slow and hostile clients: they delay no one, are limited in time, and hold bounded memory."""

import contextlib
import json
import re
import select
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import slow_models
from raw_http import (
    LIVE,
    RELU,
    RELU_PATH,
    Barrier,
    Load,
    chunk,
    connected,
    exchange,
    head,
    infer,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
)
from service import serve

MIB = 2**20
CHUNKED = head("POST", RELU_PATH, "Transfer-Encoding: chunked")
SMALL = {"OVMS_REST_MAX_HELD_BYTES": str(8 * MIB), "OVMS_REST_MAX_BODY_BYTES": str(4 * MIB)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A config with relu, counting and filling."""
    return slow_models.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def patient(tmp_path_factory, models):
    """Run a worker with the default limits."""
    with serve(tmp_path_factory.mktemp("patient"), "-w", "1", config=models) as running:
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory, models):
    """Run a worker with the shortest time limits that can be set."""
    limits = {f"OVMS_REST_{name}_TIMEOUT_SECONDS": "1" for name in ("HEAD", "BODY", "SEND")}
    with serve(tmp_path_factory.mktemp("strict"), "-w", "1", "--keep-alive", "2", config=models, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def small(tmp_path_factory, models):
    """Run a worker that may hold 8 MiB of unfinished requests, of which one may have 4 MiB."""
    with serve(tmp_path_factory.mktemp("small"), "-w", "1", config=models, **SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def crowded(tmp_path_factory, models):
    """Run a worker that may hold 8 MiB, for large responses, whose heap does not affect other tests."""
    with serve(tmp_path_factory.mktemp("crowded"), "-w", "1", config=models, **SMALL) as running:
        yield running


def inferred(answer):
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]


def works(service):
    data = post(RELU_PATH, RELU, "Connection: close")
    return inferred(parse(exchange(service, data, half=False), "POST")[0])


@contextlib.contextmanager
def growing_at_the_most_by(service, size):
    """Check that the memory of the only worker never grows by more than `size`."""
    assert works(service)
    (pid,) = service.workers()
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
    before = memory(pid, "VmRSS")
    yield
    grown = memory(pid, "VmHWM") - before
    assert grown < size, f"grown by {grown / MIB:.1f} MiB"


def memory(pid, kind):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{kind}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024


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
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", patient.port))
        connection.sendall(infer("filling", slow_models.fill(2.5, size), "Connection: close"))
        received = [connection.recv(100)]
        for value in range(20):
            with connected(patient, infer("filling", slow_models.fill(value, size // 10))) as other:
                assert receive(other, "POST").body.endswith(np.full(size // 10, value, np.float32).tobytes())
            received.append(connection.recv(100_000))
        received.append(receive_rest(connection))
    (answer,) = parse(b"".join(received), "POST")
    assert answer.body.endswith(np.full(size, 2.5, np.float32).tobytes())


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
    workers = patient.workers()
    data = {
        "chunks": chunk(b"x") * 50_000,
        "extensions": chunk(b"x", b";a") * 10_000,
        "requests": LIVE * 10_000,
    }[kind]
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(patient)) for _ in range(40)]
        for connection in connections:
            if kind != "requests":
                connection.sendall(CHUNKED)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(data)
        waited = []
        for _ in range(10):
            for request in (LIVE, post(RELU_PATH, RELU)):
                began = time.monotonic()
                with connected(patient, request) as connection:
                    assert receive(connection, request.split()[0].decode()).status == 200
                waited.append(time.monotonic() - began)
    assert max(waited) < 0.5
    assert patient.workers() == workers


# --- They are limited in time

SMALL_BODY = post(RELU_PATH, RELU)


class Slow:
    """A connection on which data is sent, and then single bytes as long as the server takes them."""

    def __init__(self, connection, data, more=b""):
        self.connection, self.more, self.received, self.closed = connection, more, b"", False
        connection.sendall(data)
        connection.setblocking(False)

    def step(self):
        """Send a byte and receive the available bytes."""
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


def test_late_requests_get_408_and_idle_connections_are_closed(strict):
    """All together, so that the test waits once; single bytes do not extend the time."""
    kinds = {
        "silent": (b"", b"", None),
        "head": (LIVE[:20], b"", "timed out reading the head of the request after "),
        "head, dribbling": (LIVE[:20], b"A", "timed out reading the head of the request after "),
        "second head": (LIVE + LIVE[:20], b"A", "timed out reading the head of the request after "),
        "body": (SMALL_BODY[:-5], b"", f"timed out reading the body after {len(RELU) - 5} bytes"),
        "no body": (head("POST", RELU_PATH, "Content-Length: 5000"), b"", "timed out reading the body after 0 bytes"),
        "body, dribbling": (head("POST", RELU_PATH, "Content-Length: 5000"), b"x", "timed out reading the body after "),
        "chunks": (CHUNKED + b"5\r\nab", b"", "timed out reading the body after 2 bytes"),
        "chunks, dribbling": (CHUNKED + b"fff\r\n", b"x", "timed out reading the body after "),
        "chunk size": (CHUNKED + b"5", b"", "timed out reading the body after 0 bytes"),
        "extension, dribbling": (CHUNKED + b"5;", b"a", "timed out reading the body after 0 bytes"),
        "trailers, dribbling": (CHUNKED + b"0\r\nA", b"a", "timed out reading the body after 0 bytes"),
        "expecting": (
            head("POST", RELU_PATH, "Content-Length: 5", "Expect: 100-continue"),
            b"",
            "timed out reading the body after 0 bytes",
        ),
        "large body, dribbling": (
            head("POST", RELU_PATH, "Content-Length: 200000000"),
            b"x",
            "timed out reading the body after ",
        ),
        "large body, stopping": (
            head("POST", RELU_PATH, "Content-Length: 200000000") + b" " * 5_000_000,
            b"",
            "timed out reading the body after 5000000 bytes",
        ),
        "chunks, stopping": (
            CHUNKED + chunk(b" " * 5_000_000),
            b"",
            "timed out reading the body after 5000000 bytes",
        ),
        "idle": (LIVE, b"", None),
    }
    with contextlib.ExitStack() as stack:
        slow = {
            kind: Slow(stack.enter_context(connected(strict)), data, more) for kind, (data, more, _) in kinds.items()
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
    for kind, (data, _, message) in kinds.items():
        answers = [answer for answer in parse(slow[kind].received) if answer.status >= 200]
        expected = [200] * data.startswith(LIVE) + [408] * (message is not None)
        assert [answer.status for answer in answers] == expected, kind
        if message is not None:
            assert answers[-1].json()["error"].startswith(message), kind
            assert answers[-1].headers["connection"] == "close"


class Flood:
    """A connection on which requests are sent without end, and no response is read."""

    def __init__(self, connection):
        self._connection, self._left = connection, b""
        connection.setblocking(False)

    def send(self):
        """Send as many bytes as the socket takes; return their number."""
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < MIB:
                self._left = self._left or LIVE * 1000
                count = self._connection.send(self._left)
                self._left = self._left[count:]
                sent += count
        return sent


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
    with connected_with_small_buffer(strict, infer("filling", slow_models.fill(1, 10_000_000))) as connection:
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
    with connected_with_small_buffer(strict, infer("filling", slow_models.fill(2.5, size))) as connection:
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
    assert answer.body.endswith(np.full(size, 2.5, np.float32).tobytes())


@contextlib.contextmanager
def connected_with_small_buffer(service, data):
    """Open a connection with a small receive buffer, and send bytes."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.port))
        connection.sendall(data)
        yield connection


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
    body = RELU.ljust(300_000)
    with connected(strict, post(RELU_PATH, body)[:-200_000]) as connection:
        for end in (200_000, 300_000):
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                assert works(strict)
            connection.sendall(body[end - 100_000 : end])
        assert inferred(receive(connection, "POST"))


def test_time_in_the_queue_does_not_count_against_the_client(strict):
    """A client whose request is queued, or whose inference is slow, is not cut off."""
    request = infer("counting", slow_models.count(8 * slow_models.SLOW))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(strict, request + LIVE)) for _ in range(4)]
        for connection in connections:
            assert [receive(connection, "POST").status, receive(connection).status] == [200, 200]


def test_connection_is_not_idle_during_its_inference(strict):
    """Its idle time begins with the response, even if the inference took longer than that."""
    with connected(strict, infer("counting", slow_models.count(50 * slow_models.SLOW))) as connection:
        assert receive(connection, "POST").status == 200
        for _ in range(3):  # turns of the worker in which it checks the time limits
            with contextlib.closing(Barrier(strict)):
                connection.sendall(LIVE)
                assert receive(connection).status == 200


# --- They hold bounded memory


def refuses(service, size=MIB):
    """Return whether a request with a body of that size is refused for lack of room."""
    with connected(service) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(post(RELU_PATH, b" " * size))
        answer = receive(connection, "POST")
    if answer.status == 400:  # no JSON
        return False
    assert (answer.status, answer.headers["retry-after"], list(answer.json())) == (503, "1", ["error"])
    return True


def wait_until_free(service):
    service.wait_for(lambda: not refuses(service, 4 * MIB))


def test_memory_of_incomplete_heads_is_bounded(small):
    part = LIVE[:-2] + b"".join(b"A%d: %s\r\n" % (index, b"b" * 8000) for index in range(60))
    with growing_at_the_most_by(small, 24 * MIB), contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(80):  # 40 MB
            connection = stack.enter_context(connected(small))
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
            with contextlib.closing(Barrier(small)) as barrier:
                barrier.wait()
            if select.select([connection], [], [], 0)[0]:
                statuses.append(receive(connection).status)
        assert statuses
        assert set(statuses) == {503}
    wait_until_free(small)
    assert works(small)


@pytest.mark.parametrize("kind", ["fixed", "chunked"])
def test_memory_of_incomplete_bodies_is_bounded(small, kind):
    body = RELU.ljust(4 * MIB)
    data = post(RELU_PATH, body) if kind == "fixed" else post_chunked(RELU_PATH, *[body[:MIB]] + [b" " * MIB] * 3)
    with (
        growing_at_the_most_by(small, 24 * MIB),
        contextlib.closing(Barrier(small)) as barrier,
        contextlib.ExitStack() as stack,
    ):
        halves = []
        for _ in range(2):
            halves.append(stack.enter_context(connected(small, data[:-10])))
            barrier.wait()
        small.wait_for(lambda: refuses(small))
        for _ in range(5):
            with connected(small) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(data[:-10])
                assert parse(receive_rest(connection), "POST")[0].status == 503
        assert exchange(small, LIVE).startswith(b"HTTP/1.1 200"), "what has no body is served"
        halves[0].sendall(data[-10:])
        assert inferred(receive(halves[0], "POST"))
        assert not refuses(small)
        halves[1].sendall(data[-10:])
        assert inferred(receive(halves[1], "POST"))
    wait_until_free(small)


def test_memory_of_unread_responses_is_bounded(crowded):
    """Clients that do not read leave no room for further responses and requests until they read or disconnect."""
    size = 1_000_000
    with growing_at_the_most_by(crowded, 20 * MIB), contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(connected_with_small_buffer(crowded, infer("filling", slow_models.fill(1.5, size))))
            for _ in range(40)  # 160 MB
        ]
        with contextlib.closing(Barrier(crowded)) as barrier:
            barrier.wait()
        crowded.wait_for(lambda: refuses(crowded, 4 * MIB))
        answers = []
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)
            answers += parse(receive_rest(connection), "POST")
    served = [answer for answer in answers if answer.status == 200]
    assert 1 <= len(served) <= 10
    for answer in served:
        assert answer.body.endswith(np.full(size, 1.5, np.float32).tobytes())
    for answer in answers:
        if answer.status != 200:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert re.fullmatch(
                r"no room for a response of 4\d{6} bytes: unfinished requests and responses hold \d+ of 8388608",
                answer.json()["error"],
            )
    wait_until_free(crowded)


@pytest.mark.parametrize("kind", ["shape known", "shape unknown", "JSON"])
def test_response_over_the_limit_is_refused_with_the_setting(crowded, kind):
    if kind == "shape known":
        request, size, model = slow_models.fill(1.5, 1), 4 * slow_models.WIDE, "wide"
        request["inputs"].pop()
    elif kind == "shape unknown":
        request, size, model = slow_models.fill(1.5, 12_500_000), 50_000_000, "filling"
    else:
        request, size, model = slow_models.fill(1.2345678, 3_000_000) | {"parameters": {}}, 8 * MIB, "filling"
    inferred_before = inferences(crowded, model)
    with growing_at_the_most_by(crowded, 64 * MIB if kind == "shape unknown" else 24 * MIB):
        answer = crowded.infer(model, request)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    found = re.fullmatch(
        r"no room for a response of (\d+) bytes: OVMS_REST_MAX_HELD_BYTES allows 8388608", answer.json()["error"]
    )
    assert int(found[1]) == size if kind != "JSON" else size < int(found[1]) < size + MIB
    assert inferences(crowded, model) == inferred_before
    assert works(crowded)


def inferences(service, model):
    return service.get(f"/v2/models/{model}/stats").json()["model_stats"][0]["inference_count"]


def test_json_response_is_measured_while_it_is_written(crowded):
    """A million numbers take from two to many million bytes."""
    request = slow_models.fill(1.5, 1_000_000) | {"parameters": {}}
    answer = crowded.infer("filling", request)
    assert answer.json()["outputs"][0]["data"] == [1.5] * 1_000_000


def test_body_is_freed_before_its_response_is_read(patient):
    """The memory of bodies counts until it is freed."""
    size, count = 100 * MIB, 3
    assert works(patient)
    (pid,) = patient.workers()
    before = memory(pid, "VmRSS")
    request = json.dumps(slow_models.fill(1, 4 * MIB)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", patient.port))
            connection.sendall(post("/v2/models/filling/infer", request + b" " * size))
            assert connection.recv(1) == b"H"
        patient.wait_for(lambda: memory(pid, "VmRSS") - before < count * size / 2)


def test_small_chunks_take_no_more_memory_than_large_ones(small):
    """A quarter of a million chunks of two bytes are half a megabyte."""
    with growing_at_the_most_by(small, 6 * MIB), connected(small, CHUNKED) as connection:
        connection.sendall(chunk(b"ab") * (MIB // 4) + chunk(b""))
        assert receive(connection, "POST").status == 400  # no JSON


def test_memory_of_pipelined_requests_with_unread_responses_is_bounded(small):
    with growing_at_the_most_by(small, 8 * MIB), connected(small) as connection:
        flood, stopped = Flood(connection), 0
        while stopped < 20:
            stopped = stopped + 1 if not flood.send() else 0
            with contextlib.closing(Barrier(small)) as barrier:
                for _ in range(50):
                    barrier.wait()
    wait_until_free(small)


def test_memory_of_pipelined_requests_after_a_slow_one_is_bounded(tmp_path, models):
    """Also those that are not read because of an inference.

    In a heap that earlier tests have left in pieces OpenVINO's loop takes up to 30 MB; so the worker is a new one.
    """
    slow = infer("counting", slow_models.count(3 * slow_models.SLOW))
    with (
        serve(tmp_path, "-w", "1", config=models, **SMALL) as service,
        growing_at_the_most_by(service, 8 * MIB),
        contextlib.ExitStack() as stack,
    ):
        connections = [stack.enter_context(connected(service, slow)) for _ in range(6)]
        for connection in connections:
            Flood(connection).send()
        for connection in connections:
            connection.setblocking(True)
            assert receive(connection, "POST").status == 200


def test_announced_bodies_reserve_no_memory(patient):
    """Four heads that announce the largest body would take all the room for 45 minutes if they reserved it."""
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connected(patient, head("POST", RELU_PATH, f"Content-Length: {256 * MIB}") + b"{"))
        assert works(patient)


def test_no_memory_is_held_after_all_clients_left(small):
    """However they left: otherwise the room would be used up some day."""
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for data in (LIVE[:9], LIVE + LIVE[:9], post(RELU_PATH, b" " * MIB)[:-1], CHUNKED + chunk(b" " * MIB)):
                stack.enter_context(connected(small, data))
            stack.enter_context(connected(small, infer("filling", slow_models.fill(1, 300_000)) * 3))
            with contextlib.closing(Barrier(small)) as barrier:
                barrier.wait()
        exchange(small, post(RELU_PATH, b" " * MIB)[:-1])
        exchange(small, CHUNKED + chunk(b" " * MIB) + b"x")
        exchange(small, head("POST", RELU_PATH, "Content-Length: 99999999999"))
    wait_until_free(small)
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # exactly all the room
            connection = stack.enter_context(connected(small, post(RELU_PATH, RELU.ljust(4 * MIB))[:-1]))
            with contextlib.closing(Barrier(small)) as barrier:
                barrier.wait()
            assert not select.select([connection], [], [], 0)[0]
        assert refuses(small, 100)
    assert not is_refused_for_ever(small)


def is_refused_for_ever(service):
    wait_until_free(service)
    return not works(service)
