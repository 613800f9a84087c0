"""Workers under load: balance between workers, requests that do not infer first, priorities, overload."""

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import threading
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
    connected,
    exchange,
    head,
    infer,
    parse,
    post,
    receive,
)
from service import open_files, serve

SLOW = infer("counting", slow_models.count(slow_models.SLOW))
ENDLESS = infer("counting", slow_models.count(2**30))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A config with relu, counting and filling."""
    return slow_models.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models):
    """One worker that queues at most three inferences."""
    with serve(tmp_path_factory.mktemp("alone"), "-w", "1", config=models, OVMS_REST_MAX_WAITING="3") as running:
        running.wait_for_workers(1)
        yield running


@pytest.fixture(scope="module")
def pair(tmp_path_factory, models):
    """Two workers."""
    with serve(tmp_path_factory.mktemp("pair"), "-w", "2", config=models) as running:
        running.wait_for_workers(2)
        yield running


def inferred(answer):
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]


# --- The state of workers


def spent(pid):
    """Return the CPU time of a process in seconds, from the scheduler's nanoseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def wait_until_inferring(service):
    """Wait until the only worker has worked for longer than any request that does not infer."""
    (pid,) = service.workers()
    before = spent(pid)
    service.wait_for(lambda: spent(pid) > before + 0.05)


def owner(service, connection):
    """Return the process id of the worker that has a connection."""
    ports = service.port, connection.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        row = line.split()
        if tuple(int(address.split(":")[1], 16) for address in row[1:3]) == ports:
            return next(pid for pid in service.workers() if f"socket:[{row[9]}]" in open_files(pid))
    raise AssertionError("no worker has it")


@contextlib.contextmanager
def connected_to_idle(service):
    """Open a connection while all workers are idle."""
    service.wait_until_idle()
    with connected(service, LIVE) as connection:
        receive(connection)
        service.wait_until_idle()
        yield connection


# --- Balance


def test_responses_are_complete_at_any_reading_pace_while_others_infer(pair):
    """Clients read large responses in pieces of any size, while others infer."""
    generator = random.Random(0)
    size = 2_500_000
    with contextlib.ExitStack() as stack:
        stack.enter_context(Load(pair.connect, clients=1))
        connections, received = [], {}
        for value in range(8):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            connection.connect(("127.0.0.1", pair.port))
            connection.sendall(infer("filling", slow_models.fill(value, size), "Connection: close"))
            connections.append(connection)
            received[connection] = []
        while connections:
            connection = generator.choice(connections)
            if data := connection.recv(generator.choice((1, 1000, 100_000, 1_000_000))):
                received[connection].append(data)
            else:
                connections.remove(connection)
        for value, data in enumerate(received.values()):
            (answer,) = parse(b"".join(data), "POST")
            assert answer.body.endswith(np.full(size, value, np.float32).tobytes())


def test_kept_alive_connections_are_spread_evenly(pair):
    """Opened one after another, with and without requests, every worker gets the same number."""
    with contextlib.ExitStack() as stack:
        owners = [owner(pair, stack.enter_context(connected_to_idle(pair))) for _ in range(8)]
    assert sorted(map(owners.count, pair.workers())) == [4, 4]


def test_no_request_is_queued_while_another_worker_is_idle(pair):
    """Two clients together, 20 times: the CPU time shows that both workers infer."""
    together = 0
    for _ in range(20):
        pair.wait_until_idle()
        before = {pid: spent(pid) for pid in pair.workers()}
        with connected(pair, SLOW) as one, connected(pair, SLOW) as two:
            assert [receive(connection, "POST").status for connection in (one, two)] == [200, 200]
        grown = [spent(pid) - before[pid] for pid in before]
        together += min(grown) < max(grown) / 4
    assert together <= 1


def test_short_request_is_not_queued_after_a_long_one_while_a_worker_is_idle(pair):
    """Each round begins when the workers have just finished, and may not have published that they are idle."""
    request = infer("counting", slow_models.count(2 * slow_models.SLOW))
    waited = 0
    for _ in range(20):
        with connected(pair, request) as long:
            data = post(RELU_PATH, RELU, "Connection: close")
            (answer,) = parse(exchange(pair, data, half=False), "POST")
            assert inferred(answer)
            waited += bool(select.select([long], [], [], 0)[0])
            assert receive(long, "POST").status == 200
    assert waited < 10


def test_request_ids_are_unique(pair):
    """On both workers, on several connections and on one."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected_to_idle(pair)) for _ in range(4)]
        assert len({owner(pair, connection) for connection in connections}) == 2
        answers = []
        for connection in connections:
            connection.sendall(LIVE * 5)
            answers += [receive(connection) for _ in range(5)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 20
    assert len({found.partition("-")[0] for found in ids}) == 2


def test_kept_alive_clients_keep_all_workers_busy(pair):
    """Four clients, two workers: each takes half of the CPU time."""
    pair.wait_until_idle()
    before = {pid: spent(pid) for pid in pair.workers()}
    threads = [threading.Thread(target=infer_slowly, args=(pair, 6)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grown = [spent(pid) - before[pid] for pid in before]
    assert min(grown) > max(grown) / 2


def infer_slowly(service, count):
    """Infer `count` times, on a connection that is kept as long as the server keeps it."""
    while count:
        with connected(service) as connection:
            closing = False
            while count and not closing:
                connection.sendall(SLOW)
                answer = receive(connection, "POST")
                assert answer.status == 200
                closing = answer.headers.get("connection") == "close"
                count -= 1


def crowd(service, stack):
    """Open two connections to the same worker, and none to the other; return them."""
    connections = [stack.enter_context(connected_to_idle(service)) for _ in range(4)]
    owners = [owner(service, connection) for connection in connections]
    crowded = [connection for connection, pid in zip(connections, owners, strict=True) if pid == owners[0]]
    for connection in connections:
        if connection not in crowded:
            connection.close()
    service.wait_until_idle()
    assert len(crowded) == 2
    return crowded


@pytest.mark.parametrize("size", [0, 300_000], ids=["a small body", "a large body"])
def test_overloaded_worker_gives_a_client_away(pair, size):
    body = json.dumps(slow_models.count(slow_models.SLOW)).encode().ljust(size)
    request = post("/v2/models/counting/infer", body)
    with contextlib.ExitStack() as stack:
        crowded = crowd(pair, stack)
        closed = False
        for _ in range(20):
            for connection in crowded:
                connection.sendall(request)
            answers = [receive(connection, "POST") for connection in crowded]
            assert [answer.status for answer in answers] == [200, 200]
            if closed := any(answer.headers.get("connection") == "close" for answer in answers):
                break
        assert closed


def test_client_with_received_requests_is_not_given_away(pair):
    """The requests would be lost: a client must not retry them by itself (RFC 9110 section 9.2.2)."""
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            pipelining, other = crowd(pair, stack)
            pipelining.sendall(SLOW * 4)
            other.sendall(SLOW)
            answers = [receive(pipelining, "POST") for _ in range(4)]
            assert receive(other, "POST").status == 200
        assert [answer.status for answer in answers] == [200] * 4


def test_connection_wakes_one_worker(tmp_path, models):
    with serve(tmp_path, "-w", "8", config=models) as service:
        service.wait_for_workers(8)
        before = sum(map(switches, service.workers()))
        for _ in range(50):
            assert exchange(service, head("GET", "/v2/health/live", "Connection: close")).startswith(b"HTTP/1.1 200")
        # Every worker checks the time limits of clients once a second; woken by each connection, it would be 400 times.
        assert sum(map(switches, service.workers())) - before < 250


def test_no_worker_is_woken_without_a_connection(tmp_path, models):
    """Idle workers check the time limits of clients once a second, and do nothing else."""
    with serve(tmp_path, "-w", "4", config=models) as service, contextlib.ExitStack() as stack:
        service.wait_for_workers(4)
        for _ in range(4):
            assert receive(stack.enter_context(connected(service, LIVE))).status == 200
        before, started = sum(map(switches, service.workers())), time.monotonic()
        service.wait_for(lambda: time.monotonic() - started > 3)
        assert sum(map(switches, service.workers())) - before <= 4 * 4


def switches(pid):
    """Return the number of voluntary context switches of a process."""
    return int(re.search(r"\nvoluntary_ctxt_switches:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def test_connection_left_to_a_stopped_worker_is_accepted_after_all(tmp_path, models):
    with serve(tmp_path, "-w", "2", config=models) as service, contextlib.ExitStack() as stack:
        service.wait_for_workers(2)
        first = stack.enter_context(connected_to_idle(service))
        busy = owner(service, first)
        (other,) = (pid for pid in service.workers() if pid != busy)
        os.kill(other, signal.SIGSTOP)
        try:
            with connected(service, LIVE) as connection:
                connection.settimeout(10)  # gunicorn would kill the stopped worker after 30 s
                assert receive(connection).status == 200
        finally:
            os.kill(other, signal.SIGCONT)


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


def test_requests_that_do_not_infer_run_before_queued_inferences(alone):
    """On an existing connection and on a new one, with three inferences queued during another."""
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connected(alone, LIVE)) for _ in CONTROL]
        for connection in kept:
            receive(connection)
        slow = [stack.enter_context(connected(alone, LIVE)) for _ in range(4)]
        for connection in slow:
            receive(connection)
        slow[0].sendall(SLOW)
        with contextlib.closing(Barrier(alone)):
            for connection in slow[1:]:
                connection.sendall(SLOW)
            new = [stack.enter_context(connected(alone, data)) for data in CONTROL]
            for connection, data in zip(kept, CONTROL, strict=True):
                connection.sendall(data)
            for connection in (*kept, *new):
                assert receive(connection).status in (200, 404, 405, 400)
            late = slow[-1:]
            assert not select.select(late, [], [], 0)[0], "the last inference was answered before"
            assert [receive(connection, "POST").status for connection in slow] == [200] * 4


@pytest.fixture(scope="module")
def controlled(tmp_path_factory, models):
    """A worker, and one for the control address."""
    directory = tmp_path_factory.mktemp("controlled")
    with serve(directory, "-w", "1", config=models, OVMS_REST_CONTROL_BIND="127.0.0.1:0") as running:
        running.control = control_of(running)
        running.wait_for_workers(2)
        yield running


class Control:
    """The control address as a service."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def control_of(service):
    """Find the control address in the log."""
    return Control(
        int(service.wait_for(lambda: re.search(r"control address: http://127\.0\.0\.1:(\d+)", service.log))[1])
    )


def statuses(service, *requests):
    """Return the statuses of requests on one connection."""
    with connected(service) as connection:
        found = []
        for data in requests:
            connection.sendall(data)
            found.append(receive(connection).status)
        return found


def test_control_address_is_off_by_default(alone):
    assert "control address" not in alone.log
    assert len(alone.workers()) == 1


def test_control_address_serves_everything_except_inferences(controlled):
    assert len(controlled.workers()) == 2
    with connected(controlled.control) as connection:
        for data, status in (*zip(CONTROL[:-1], (200, 200, 200, 200, 200, 405, 404, 405), strict=True), (SLOW, 404)):
            connection.sendall(data)
            answer = receive(connection)
            assert answer.status == status
        assert answer.json() == {"error": "inferences are not served on the control address"}
    answers = parse(exchange(controlled, post(RELU_PATH, RELU)), "POST")
    assert inferred(answers[0])


def test_control_address_serves_many_clients_together(controlled):
    """Kept-alive connections of monitors and probes, while the other worker has none and is idle."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(controlled.control, LIVE)) for _ in range(10)]
        assert [receive(connection).status for connection in connections] == [200] * 10
        for connection in connections:
            connection.sendall(head("GET", "/v2/models/relu"))
        assert [receive(connection).status for connection in connections] == [200] * 10


def test_control_address_serves_connections_one_after_another(controlled):
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(connected(controlled.control, LIVE))
            assert receive(connection).status == 200


def test_control_address_waits_for_no_inference(tmp_path, models):
    """The other worker runs an inference that does not end."""
    with serve(tmp_path, "-w", "1", config=models, OVMS_REST_CONTROL_BIND="127.0.0.1:0") as service:
        control = control_of(service)
        with connected(service, ENDLESS):
            service.wait_for(lambda: any(spent(pid) > 1 for pid in service.workers()))
            assert statuses(control, LIVE, *CONTROL[1:4]) == [200] * 4
            assert statuses(control, LIVE) == [200]
        service.signal(signal.SIGQUIT)
        for pid in service.workers():  # the busy worker does not handle signals
            os.kill(pid, signal.SIGKILL)
        service.process.wait(60)


def test_control_worker_survives_changes_of_the_number_of_workers(tmp_path, models):
    with serve(tmp_path, "-w", "2", config=models, OVMS_REST_CONTROL_BIND="127.0.0.1:0") as service:
        control = control_of(service)
        service.wait_for_workers(3)

        def serves():
            assert inferred(parse(exchange(service, post(RELU_PATH, RELU)), "POST")[0])
            return statuses(control, LIVE, SLOW) == [200, 404]

        assert serves()
        for number, count in ((signal.SIGTTIN, 4), (signal.SIGTTOU, 3), (signal.SIGTTOU, 2)):
            service.signal(number)
            service.wait_for_workers(count)
            assert serves()
        before = service.workers()
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: len(service.workers()) == 3 and not set(service.workers()) & set(before))
        assert serves()
        before = service.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda: not set(service.workers()) & set(before))
        service.wait_for_workers(3)
        assert serves()


def test_control_address_may_be_a_unix_socket(tmp_path, models):
    path = tmp_path / "control"
    with serve(tmp_path, "-w", "1", config=models, OVMS_REST_CONTROL_BIND=f"unix:{path}") as service:
        service.wait_for(path.exists)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(LIVE + SLOW)
            assert [receive(connection).status for _ in range(2)] == [200, 404]


# --- Priorities and timeouts


@pytest.fixture(scope="module")
def scheduling(tmp_path_factory, models):
    """One worker, whose access log shows the order of its responses."""
    directory = tmp_path_factory.mktemp("scheduling")
    path = directory / "access"
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": str(path)}
    with serve(directory, "-w", "1", config=models, **variables) as running:
        running.access = path
        yield running


def counting(name, *fields, steps=slow_models.SLOW, **parameters):
    """Encode an inference request with an id and parameters."""
    return infer("counting", {**slow_models.count(steps), "id": name, "parameters": parameters}, *fields)


def infer_behind_another(service, *requests):
    """Send requests in this order during another inference; return their responses, and the order of those."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(service, LIVE)) for _ in range(len(requests) + 1)]
        for connection in connections:
            receive(connection)
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
    """Return the number of failed inferences of the slow model in the statistics."""
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
    answers, order = infer_behind_another(
        scheduling,
        counting("one"),
        counting("two"),
        counting("impatient", timeout=1000),
        counting("patient", timeout=60_000_000),
    )
    assert [answer.status for answer in answers] == [200, 200, 503, 200]
    late = answers[2]
    found = re.fullmatch(
        r"the request could not start within its timeout of 1000 us, it waited (\d+) us", late.json()["error"]
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
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connected(scheduling, counting("running", steps=5 * slow_models.SLOW)))
        wait_until_inferring(scheduling)
        waiting = [
            stack.enter_context(connected(scheduling, counting(str(number), priority=number, timeout=10**8)))
            for number in range(3)
        ]
        gone = stack_free(scheduling, counting("gone", priority=3, timeout=10**8))
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert receive(first, "POST").status == 200
        gone.close()
        assert [receive(connection, "POST").status for connection in waiting] == [200] * 3
    assert inferred(parse(exchange(scheduling, post(RELU_PATH, RELU)), "POST")[0])
    assert "error on a connection" not in scheduling.log


# --- Overload


def test_request_beyond_the_queue_limit_is_503(alone):
    """One runs and three are queued; all others get a Retry-After, and may retry on the same connection."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(alone, LIVE)) for _ in range(12)]
        for connection in connections:
            receive(connection)
        connections[0].sendall(infer("counting", slow_models.count(10 * slow_models.SLOW)))
        wait_until_inferring(alone)
        for connection in connections[1:]:
            connection.sendall(SLOW + LIVE)
        answers = [receive(connection, "POST") for connection in connections]
        refused = [answer for answer in answers if answer.status != 200]
        assert len(refused) == 12 - 1 - 3
        for answer in refused:
            assert (answer.status, answer.headers["retry-after"], list(answer.json())) == (503, "1", ["error"])
            assert answer.headers["content-type"] == "application/json"
            assert "connection" not in answer.headers
        assert [receive(connection).status for connection in connections[1:]] == [200] * 11
        for connection in connections:
            connection.sendall(post(RELU_PATH, RELU))
            assert inferred(receive(connection, "POST"))


def test_control_requests_succeed_in_overload(alone):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(alone, SLOW * 3 + LIVE)) for _ in range(10)]
        assert statuses(alone, *CONTROL[:4]) == [200] * 4
        for connection in connections:
            answers = [receive(connection, "POST").status for _ in range(3)]
            assert set(answers) <= {200, 503}
            assert receive(connection).status == 200


def test_service_recovers_from_overload(alone):
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connected(alone, SLOW * 5))
    alone.wait_until_idle()
    answers = parse(exchange(alone, post(RELU_PATH, RELU) * 3), *["POST"] * 3)
    assert all(map(inferred, answers))


def stack_free(service, data):
    """Open a connection that the caller closes, and send data."""
    connection = service.connect()
    connection.sendall(data)
    return connection


def test_overload_message_names_the_queue_limit(alone):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(alone, SLOW)) for _ in range(10)]
        answers = [receive(connection, "POST") for connection in connections]
    message = next(json.loads(answer.body)["error"] for answer in answers if answer.status == 503)
    assert message == "overloaded: 3 requests are already queued, the limit per worker"
