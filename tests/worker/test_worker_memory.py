"""The memory that clients make a worker hold: bounded, refused with a reason, and given back."""

import contextlib
import json
import re
import select
import socket

import pytest
import slow_models
from processes import memory, reset_peak, tcp_sockets
from raw_http import (
    LIVE,
    RELU,
    RELU_PATH,
    Barrier,
    chunk,
    connected,
    exchange,
    head,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
)
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

SMALL = {"OVMS_REST_MAX_HELD_BYTES": str(8 * MIB), "OVMS_REST_MAX_BODY_BYTES": str(4 * MIB)}


@pytest.fixture(scope="module")
def small(start_shared):
    """A worker that may hold 8 MiB of unfinished requests, of which one may have 4 MiB."""
    return start_shared(1, **SMALL)


@pytest.fixture(scope="module")
def crowded(start_shared):
    """A worker that may hold 8 MiB, for large responses, whose heap does not affect other tests."""
    return start_shared(1, **SMALL)


@contextlib.contextmanager
def growing_at_the_most_by(service, size):
    """Check that the memory of the only worker never grows by more than `size`."""
    assert works(service)
    (pid,) = service.workers()
    reset_peak(pid)
    before = memory(pid, "VmRSS")
    yield
    grown = memory(pid, "VmHWM") - before
    assert grown < size, f"grown by {grown / MIB:.1f} MiB"


def send_until_answered(connection, data):
    """Send data in pieces, none after the response: a refused client that continues for two seconds is cut off."""
    for start in range(0, len(data), 65536):
        if select.select([connection], [], [], 0)[0]:
            return
        with contextlib.suppress(ConnectionError):
            connection.sendall(data[start : start + 65536])


def refuses(service, size=MIB):
    with connected(service) as connection:
        send_until_answered(connection, post(RELU_PATH, b" " * size))
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
            send_until_answered(connection, part)
            wait_until_read(small)
            if select.select([connection], [], [], 0)[0]:
                statuses.append(receive(connection).status)
        assert statuses
        assert set(statuses) == {503}
    wait_until_free(small)
    assert works(small)


def wait_until_received(service, connections):
    """Wait until the only worker has read all that was sent on these connections."""
    ports = {connection.getsockname()[1] for connection in connections}
    empty = "00000000:00000000"
    service.wait_for(lambda: all(found.queues == empty for found in tcp_sockets() if ports & {*found[:2]}))
    wait_until_read(service)


@pytest.mark.parametrize("kind", ["fixed", "chunked"])
def test_memory_of_incomplete_bodies_is_bounded(small, kind):
    body = RELU.ljust(4 * MIB)
    data = post(RELU_PATH, body) if kind == "fixed" else post_chunked(RELU_PATH, *[body[:MIB]] + [b" " * MIB] * 3)
    with growing_at_the_most_by(small, 24 * MIB), several(small, 2, data[:-10]) as halves:
        wait_until_received(small, halves)  # the probes would take their room
        small.wait_for(lambda: refuses(small))
        for _ in range(5):
            with connected(small) as connection:
                send_until_answered(connection, data[:-10])
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
        request = fill(1.5, size)
        unread = [connected_with_small_buffer(crowded, request) for _ in range(40)]  # 160 MB
        connections = [stack.enter_context(connection) for connection in unread]
        wait_until_read(crowded)
        crowded.wait_for(lambda: refuses(crowded, 4 * MIB))
        answers = []
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)
            answers += parse(receive_rest(connection), "POST")
    served = [answer for answer in answers if answer.status == 200]
    assert 1 <= len(served) <= 10
    assert all(is_filled(answer, 1.5, size) for answer in served)
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
            data = post("/v2/models/filling/infer", request + b" " * size)
            connection = stack.enter_context(connected_with_small_buffer(patient, data))
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


def test_memory_of_pipelined_requests_after_a_slow_one_is_bounded(start):
    """Also those that are not read because of an inference.

    In a heap that earlier tests have left in pieces OpenVINO's loop takes up to 30 MB; so the worker is a new one.
    """
    service = start(1, **SMALL)
    with growing_at_the_most_by(service, 8 * MIB), several(service, 6, slow(3)) as connections:
        for connection in connections:
            Flood(connection).send()
        for connection in connections:
            connection.setblocking(True)
            assert receive(connection, "POST").status == 200


def test_announced_bodies_reserve_no_memory(patient):
    """Four heads that announce the largest body would take all the room for 45 minutes if they reserved it."""
    with several(patient, 8, head("POST", RELU_PATH, f"Content-Length: {256 * MIB}") + b"{"):
        assert works(patient)


def test_no_memory_is_held_after_all_clients_left(small):
    """However they left: otherwise the room would be used up some day."""
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            for data in (LIVE[:9], LIVE + LIVE[:9], post(RELU_PATH, b" " * MIB)[:-1], CHUNKED + chunk(b" " * MIB)):
                stack.enter_context(connected(small, data))
            stack.enter_context(connected(small, fill(1, 300_000) * 3))
            wait_until_read(small)
        exchange(small, post(RELU_PATH, b" " * MIB)[:-1])
        exchange(small, CHUNKED + chunk(b" " * MIB) + b"x")
        exchange(small, head("POST", RELU_PATH, "Content-Length: 99999999999"))
    wait_until_free(small)
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # exactly all the room
            connection = stack.enter_context(connected(small, post(RELU_PATH, RELU.ljust(4 * MIB))[:-1]))
            wait_until_read(small)
            assert not select.select([connection], [], [], 0)[0]
        assert refuses(small, 100)
    wait_until_free(small)
    assert works(small)
