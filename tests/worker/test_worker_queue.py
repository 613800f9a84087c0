"""The order in which a worker serves its requests: control requests first, priorities, timeouts, overload."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import time

import pytest
import slow_models
from processes import replaced, spent, wait_until_inferring
from raw_http import LIVE, RELU, RELU_PATH, connected, exchange, head, infer, parse, post, receive
from workers import ENDLESS, SLOW, inferred, reset, several, slow, used, wait_until_read, works

# --- Requests that do not infer come first

CONTROL = [
    LIVE,
    head("GET", "/v2/health/ready"),
    head("GET", "/v2"),
    head("GET", "/v2/models/relu"),
    head("GET", "/v2/models/relu/ready"),
    head("GET", "/v2/models/relu/infer"),
    head("GET", "/nothing"),
    post("/v2/models/relu", b"body"),
    b"BROKEN\r\n\r\n",
]


@pytest.fixture(scope="module")
def alone(start_shared):
    return start_shared(1, OVMS_REST_MAX_WAITING="3")


def statuses(service, *requests):
    with connected(service) as connection:
        found = []
        for data in requests:
            connection.sendall(data)
            found.append(receive(connection).status)
        return found


def test_requests_that_do_not_infer_run_before_queued_inferences(alone):
    """On an existing connection and on a new one, with three inferences queued during another."""
    with used(alone, len(CONTROL)) as kept, used(alone, 4) as busy, contextlib.ExitStack() as stack:
        busy[0].sendall(SLOW)
        wait_until_read(alone)
        for connection in busy[1:]:
            connection.sendall(SLOW)
        new = [stack.enter_context(connected(alone, data)) for data in CONTROL]
        for connection, data in zip(kept, CONTROL, strict=True):
            connection.sendall(data)
        for connection in (*kept, *new):
            assert receive(connection).status in (200, 404, 405, 400)
        assert not select.select(busy[-1:], [], [], 0)[0], "the last inference was answered before"
        assert [receive(connection, "POST").status for connection in busy] == [200] * 4


class Control:
    def __init__(self, service):
        found = service.wait_for(lambda: re.search(r"control address: http://127\.0\.0\.1:(\d+)", service.log))
        self.port = int(found[1])

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@pytest.fixture(scope="module")
def controlled(start_shared):
    return start_shared(1, OVMS_REST_CONTROL_BIND="127.0.0.1:0")


@pytest.fixture(scope="module")
def control(controlled):
    return Control(controlled)


def test_control_address_is_off_by_default(alone):
    assert "control address" not in alone.log
    assert len(alone.workers()) == 1


def test_control_address_serves_everything_except_inferences(controlled, control):
    assert len(controlled.workers()) == 2
    assert statuses(control, *CONTROL[:-1], SLOW) == [200, 200, 200, 200, 200, 405, 404, 405, 404]
    (answer,) = parse(exchange(control, SLOW), "POST")
    assert answer.json() == {"error": "inferences are not served on the control address"}
    assert works(controlled)


def test_control_address_serves_many_clients_together(control):
    """Kept-alive connections of monitors and probes, while the other worker has none and is idle."""
    with several(control, 10, LIVE) as connections:
        assert [receive(connection).status for connection in connections] == [200] * 10
        for connection in connections:
            connection.sendall(head("GET", "/v2/models/relu"))
        assert [receive(connection).status for connection in connections] == [200] * 10


def test_control_address_serves_connections_one_after_another(control):
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            assert receive(stack.enter_context(connected(control, LIVE))).status == 200


def test_control_address_waits_for_no_inference(start):
    service = start(1, OVMS_REST_CONTROL_BIND="127.0.0.1:0")
    control = Control(service)
    with connected(service, ENDLESS):
        before = {pid: spent(pid) for pid in service.workers()}
        service.wait_for(lambda: any(spent(pid) > seconds + 0.3 for pid, seconds in before.items()))
        assert statuses(control, LIVE, *CONTROL[1:4]) == [200] * 4
        assert statuses(control, LIVE) == [200]
    service.signal(signal.SIGQUIT)
    for pid in service.workers():  # the busy worker does not handle signals
        with contextlib.suppress(ProcessLookupError):  # the control worker does
            os.kill(pid, signal.SIGKILL)
    service.process.wait(60)


def test_control_worker_survives_changes_of_the_number_of_workers(start):
    service = start(2, OVMS_REST_CONTROL_BIND="127.0.0.1:0")
    control = Control(service)

    def serves():
        assert works(service)
        return statuses(control, LIVE, SLOW) == [200, 404]

    assert serves()
    for number, count in ((signal.SIGTTIN, 4), (signal.SIGTTOU, 3), (signal.SIGTTOU, 2)):
        service.signal(number)
        service.wait_for_workers(count)
        assert serves()
    before = service.workers()
    service.signal(signal.SIGHUP)
    service.wait_for(lambda: len(service.workers()) == 3 and replaced(service, before))
    assert serves()
    before = service.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda: not set(service.workers()) & set(before))
    service.wait_for_workers(3)
    assert serves()


def test_control_address_may_be_a_unix_socket(tmp_path, start):
    path = tmp_path / "control"
    start(1, OVMS_REST_CONTROL_BIND=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(LIVE + SLOW)
        assert [receive(connection).status for _ in range(2)] == [200, 404]


# --- Priorities and timeouts


@pytest.fixture(scope="module")
def scheduling(tmp_path_factory, start_shared):
    """One worker, whose access log shows the order of its responses."""
    path = tmp_path_factory.mktemp("scheduling") / "access"
    running = start_shared(1, OVMS_REST_ACCESS_LOG="json", OVMS_REST_ACCESS_LOG_FILE=str(path))
    running.access = path
    return running


def counting(name, *fields, steps=slow_models.SLOW, **parameters):
    return infer("counting", {**slow_models.count(steps), "id": name, "parameters": parameters}, *fields)


def infer_behind_another(service, *requests):
    """Send requests in this order during another inference; return their responses, and the order of those."""
    with used(service, len(requests) + 1) as connections:
        written = service.access.stat().st_size
        connections[0].sendall(counting("running", steps=5 * slow_models.SLOW))
        wait_until_inferring(service)
        for connection, request in zip(connections[1:], requests, strict=True):
            connection.sendall(request)
        answers = [receive(connection, "POST") for connection in connections]
        for connection in connections:  # the connections still work
            connection.sendall(post(RELU_PATH, RELU))
            assert inferred(receive(connection, "POST"))
    assert answers[0].status == 200
    lines = service.wait_for(
        lambda: len(lines := service.access.read_bytes()[written:].splitlines()) >= 2 * len(connections) and lines
    )
    ids = [json.loads(line)["request_id"] for line in lines]
    order = sorted(range(len(requests)), key=lambda number: ids.index(answers[number + 1].headers["x-request-id"]))
    return answers[1:], order


def failures(service):
    (model,) = service.get("/v2/models/counting/stats").json()["model_stats"]
    return model["inference_stats"]["fail"]["count"]


def test_requests_run_by_priority(scheduling):
    answers, order = infer_behind_another(
        scheduling, counting("default"), counting("second", priority=2), counting("first", priority=1)
    )
    assert [answer.json()["id"] for answer in answers] == ["default", "second", "first"]
    assert order == [2, 1, 0]


def test_requests_of_equal_priority_run_in_order(scheduling):
    requests = [counting(str(number), priority=number % 2) for number in range(4)]
    assert infer_behind_another(scheduling, *requests)[1] == [1, 3, 0, 2]


def test_request_is_refused_when_its_timeout_passes(scheduling):
    """It is refused before its turn, and counts as a failure of its model."""
    before = failures(scheduling)
    timeouts = {"one": 0, "two": 0, "impatient": 1000, "patient": 60_000_000}
    requests = [counting(name, timeout=timeout) for name, timeout in timeouts.items()]
    answers, order = infer_behind_another(scheduling, *requests)
    assert [answer.status for answer in answers] == [200, 200, 503, 200]
    late = answers[2]
    found = re.fullmatch(
        r"the request could not start within its timeout of 1000 us; it waited (\d+) us", late.json()["error"]
    )
    assert int(found[1]) > 1000
    assert late.headers["retry-after"] == "1"
    assert "connection" not in late.headers
    assert order == [0, 2, 1, 3]
    assert failures(scheduling) == before + 1


def test_timeout_includes_the_time_at_a_proxy(scheduling):
    """It reached the proxy two minutes ago, and has a timeout of one minute."""
    field = f"X-Request-Start: t={time.time() - 120:.3f}"
    answers, order = infer_behind_another(
        scheduling,
        counting("first", priority=1),
        counting("late", field, timeout=60_000_000),
        counting("in time", field, timeout=600_000_000),
    )
    assert [answer.status for answer in answers] == [200, 503, 200]
    assert order == [1, 0, 2]


def test_request_of_a_disconnected_client_is_neither_run_nor_refused(scheduling):
    """With a priority and a timeout of its own."""
    with connected(scheduling, slow(5)) as first, contextlib.ExitStack() as stack:
        wait_until_inferring(scheduling)
        requests = [counting(str(number), priority=number, timeout=10**8) for number in range(4)]
        *waiting, gone = [stack.enter_context(connected(scheduling, request)) for request in requests]
        assert receive(first, "POST").status == 200
        reset(gone)
        assert [receive(connection, "POST").status for connection in waiting] == [200] * 3
    assert works(scheduling)
    assert "error on a connection" not in scheduling.log


# --- Overload


def test_request_beyond_the_queue_limit_is_503(alone):
    """One runs and three are queued; all others get a Retry-After, and may retry on the same connection."""
    with used(alone, 12) as connections:
        connections[0].sendall(slow(10))
        wait_until_inferring(alone)
        for connection in connections[1:]:
            connection.sendall(SLOW + LIVE)
        answers = [receive(connection, "POST") for connection in connections]
        refused = [answer for answer in answers if answer.status != 200]
        assert len(refused) == 12 - 1 - 3
        for answer in refused:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.json() == {"error": "overloaded: 3 requests are already queued, the limit per worker"}
            assert answer.headers["content-type"] == "application/json"
            assert "connection" not in answer.headers
        assert [receive(connection).status for connection in connections[1:]] == [200] * 11
        for connection in connections:
            connection.sendall(post(RELU_PATH, RELU))
            assert inferred(receive(connection, "POST"))


def test_control_requests_succeed_in_overload(alone):
    with several(alone, 10, SLOW * 3 + LIVE) as connections:
        assert statuses(alone, *CONTROL[:4]) == [200] * 4
        for connection in connections:
            assert {receive(connection, "POST").status for _ in range(3)} <= {200, 503}
            assert receive(connection).status == 200


def test_service_recovers_from_overload(alone):
    with several(alone, 50, SLOW * 5):
        pass
    alone.wait_until_idle()
    answers = parse(exchange(alone, post(RELU_PATH, RELU) * 3), *["POST"] * 3)
    assert all(map(inferred, answers))
