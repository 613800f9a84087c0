"""Several workers: which of them gets a connection or keeps a client, and when one is woken."""

import contextlib
import json
import os
import random
import re
import select
import threading
import time
from pathlib import Path

import pytest
import slow_models
from processes import spent, stopped, tcp_sockets
from raw_http import LIVE, RELU, RELU_PATH, Load, connected, exchange, head, infer, parse, post, receive
from service import open_files
from workers import SLOW, connected_to_idle, connected_with_small_buffer, fill, inferred, is_filled, several, slow, used

LISTENING = "0A"  # the state in /proc/net/tcp


@pytest.fixture(scope="module")
def shared_pair(start_shared):
    return start_shared(2)


@pytest.fixture
def pair(shared_pair):
    """Two workers that have noticed the end of the previous test's connections."""
    shared_pair.wait_until_idle()
    return shared_pair


def owner(service, connection):
    ports = service.port, connection.getsockname()[1]
    (name,) = (found.name for found in tcp_sockets() if (found.local, found.remote) == ports)
    (pid,) = (pid for pid in service.workers() if name in open_files(pid))
    return pid


@contextlib.contextmanager
def measuring(service):
    """Yield a list that gets the CPU time that each worker takes during the block."""
    service.wait_until_idle()
    before, taken = {pid: spent(pid) for pid in service.workers()}, []
    yield taken
    taken += [spent(pid) - seconds for pid, seconds in before.items()]


# --- Connections


def test_responses_are_complete_at_any_reading_pace_while_others_infer(pair):
    """Clients read large responses in pieces of any size, while others infer."""
    generator = random.Random(0)
    size = 2_500_000
    with contextlib.ExitStack() as stack:
        stack.enter_context(Load(pair.connect, clients=1))
        received = {}
        for value in range(8):
            request = fill(value, size, "Connection: close")
            received[stack.enter_context(connected_with_small_buffer(pair, request, size=16384))] = []
        connections = list(received)
        while connections:
            connection = generator.choice(connections)
            if data := connection.recv(generator.choice((1, 1000, 100_000, 1_000_000))):
                received[connection].append(data)
            else:
                connections.remove(connection)
    for value, data in enumerate(received.values()):
        (answer,) = parse(b"".join(data), "POST")
        assert is_filled(answer, value, size)


def test_kept_alive_connections_are_spread_evenly(pair):
    """Opened one after another, with and without requests, every worker gets the same number."""
    with contextlib.ExitStack() as stack:
        owners = [owner(pair, stack.enter_context(connected_to_idle(pair))) for _ in range(8)]
    assert sorted(map(owners.count, pair.workers())) == [4, 4]


def test_no_request_is_queued_while_another_worker_is_idle(pair):
    """Two clients at the same time, 20 times: the CPU time shows that both workers infer."""
    alone = 0
    for _ in range(20):
        with measuring(pair) as taken, several(pair, 2, SLOW) as connections:
            assert [receive(connection, "POST").status for connection in connections] == [200, 200]
        alone += min(taken) < max(taken) / 4
    assert alone <= 1


def test_short_request_is_not_queued_after_a_long_one_while_a_worker_is_idle(pair):
    """Each round begins when the workers have just finished, and may not have published that they are idle."""
    waited = 0
    for _ in range(20):
        with connected(pair, slow(2)) as long:
            (answer,) = parse(exchange(pair, post(RELU_PATH, RELU, "Connection: close"), half=False), "POST")
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
    threads = [threading.Thread(target=infer_slowly, args=(pair, 6)) for _ in range(4)]
    with measuring(pair) as taken:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert min(taken) > max(taken) / 2


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


@contextlib.contextmanager
def crowded(service):
    """Open two connections to the same worker, and none to the other."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected_to_idle(service)) for _ in range(4)]
        owners = [owner(service, connection) for connection in connections]
        together = [connection for connection, pid in zip(connections, owners, strict=True) if pid == owners[0]]
        for connection in connections:
            if connection not in together:
                connection.close()
        service.wait_until_idle()
        assert len(together) == 2
        yield together


def test_busy_clients_of_a_worker_that_has_far_more_move_to_the_other(pair):
    """All 12 connections are opened while one worker is stopped, and neither worker is idle afterwards."""
    request, ended = infer("counting", slow_models.count(slow_models.SLOW // 10)), threading.Event()

    def run(connection):
        while not ended.is_set():
            with connection:
                closing = False
                while not closing and not ended.is_set():
                    connection.sendall(request)
                    answer = receive(connection, "POST")
                    assert answer.status == 200
                    closing = answer.headers.get("connection") == "close"
            connection = pair.connect()

    def counts():
        served = {found.name for found in tcp_sockets() if found.local == pair.port and found.state != LISTENING}
        return [len(served & set(open_files(pid))) for pid in pair.workers()]

    def is_balanced():
        held = counts()
        return sum(held) == 12 and min(held) >= 4

    with stopped(pair, pair.workers()[0]):
        connections = [pair.connect() for _ in range(12)]
        for connection in connections:
            connection.sendall(LIVE)
            assert receive(connection).status == 200
        assert sorted(counts()) == [0, 12]
    threads = [threading.Thread(target=run, args=(connection,)) for connection in connections]
    for thread in threads:
        thread.start()
    try:
        pair.wait_for(is_balanced)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("size", [0, 300_000], ids=["a small body", "a large body"])
def test_overloaded_worker_gives_a_client_away(pair, size):
    request = post("/v2/models/counting/infer", json.dumps(slow_models.count(slow_models.SLOW)).encode().ljust(size))
    closed = False
    with crowded(pair) as connections:
        for _ in range(20):
            for connection in connections:
                connection.sendall(request)
            answers = [receive(connection, "POST") for connection in connections]
            assert [answer.status for answer in answers] == [200, 200]
            if closed := any(answer.headers.get("connection") == "close" for answer in answers):
                break
    assert closed


def test_client_with_received_requests_is_not_given_away(pair):
    """The requests would be lost: a client must not retry them by itself (RFC 9110 section 9.2.2)."""
    for _ in range(3):
        with crowded(pair) as (pipelining, other):
            pipelining.sendall(SLOW * 4)
            other.sendall(SLOW)
            answers = [receive(pipelining, "POST") for _ in range(4)]
            assert receive(other, "POST").status == 200
        assert [answer.status for answer in answers] == [200] * 4


def test_few_workers_get_the_clients_when_there_are_more_workers_than_cores(start):
    """16 clients connect at the same time to 16 workers on two cores, and infer without a pause."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    service = start(16, prefix=("taskset", "-c", ",".join(map(str, cores))))

    def share_of_four():
        before = {pid: spent(pid) for pid in service.workers()}
        with Load(service.connect, clients=16) as load:
            service.wait_for(lambda: load.answered > 2000)
        assert load.failures == []
        taken = sorted((spent(pid) - seconds for pid, seconds in before.items()), reverse=True)
        return sum(taken[:4]) / sum(taken)

    # Usually 0.97; less when a worker gets no core for a while, as the others then take its clients.
    assert any(share_of_four() > 0.8 for _ in range(3))


# --- Wake-ups


def switches(service):
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in service.workers()]
    return sum(int(re.search(r"\nvoluntary_ctxt_switches:\t(\d+)", text)[1]) for text in texts)


def test_connection_wakes_one_worker(start):
    service = start(8)
    before, began = switches(service), time.monotonic()
    for _ in range(50):
        assert exchange(service, head("GET", "/v2/health/live", "Connection: close")).startswith(b"HTTP/1.1 200")
    # Every worker checks the time limits of clients once a second; woken by each connection, it would be 400 times.
    assert switches(service) - before < 250 + 8 * (time.monotonic() - began)


def test_no_worker_is_woken_without_a_connection(start):
    """Idle workers check the time limits of clients once a second, and do nothing else."""
    service = start(4)

    def is_quiet():
        before, began = switches(service), time.monotonic()
        time.sleep(3)
        return switches(service) - before <= 4 * (time.monotonic() - began + 1)

    with used(service, 4):
        assert any(is_quiet() for _ in range(3))  # a process waits for a page or a lock now and then


def test_connection_left_to_a_stopped_worker_is_accepted_after_all(start):
    service = start(2)
    with connected_to_idle(service) as first:
        (other,) = set(service.workers()) - {owner(service, first)}
        with stopped(service, other), connected(service, LIVE) as connection:
            connection.settimeout(10)  # gunicorn would kill the stopped worker after 30 s
            assert receive(connection).status == 200
