"""Workers that end: by gunicorn's signals and limits, with requests, clients and connections left, and under load."""

import contextlib
import ctypes
import os
import re
import signal
import time

import pytest
from generations import settings_with
from processes import listens, replaced, spent, wait_for_exit, wait_until_inferring
from raw_http import LIVE, RELU, RELU_PATH, Load, connected, is_closed, parse, post, receive, receive_rest
from service import PATIENCE, serve
from workers import ENDLESS, SLOW, connected_to_idle, inferred, several, slow, used, works


def wait_until_gone(service, workers):
    """Wait until the workers are gone, for much less time than the time limits of clients."""
    deadline = time.monotonic() + 12
    while left := set(workers) & set(service.workers()):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


# --- gunicorn's timeout


def test_hanging_worker_is_replaced_after_gunicorns_timeout(start):
    service = start(2, "--timeout", "2")
    before = service.workers()
    with connected_to_idle(service) as connection, connected_to_idle(service) as other:
        connection.sendall(ENDLESS)
        other.sendall(post(RELU_PATH, RELU))
        assert receive(other, "POST").status == 200
        assert is_closed(connection)
    service.wait_for(lambda: len(set(before) - set(service.workers())) == 1)
    assert service.log.count("WORKER TIMEOUT") == 1, "the other worker reported"
    assert works(service)


def test_long_queue_does_not_count_as_hanging(start):
    """A worker that is busy for longer than gunicorn's `timeout` reports between inferences."""
    service = start(1, "--timeout", "2")
    began = time.monotonic()
    with several(service, 7, SLOW * 100) as connections:
        while time.monotonic() < began + 3:
            assert [receive(connection, "POST").status for connection in connections] == [200] * 7
    assert "WORKER TIMEOUT" not in service.log


# --- The drain


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_worker_finishes_its_requests_before_it_ends(start, number):
    service = start(1)
    before = service.workers()
    with (
        connected(service, post(RELU_PATH, RELU)[:-5]) as half,
        connected(service, LIVE[:-5]) as part,
        several(service, 5, SLOW) as busy,
    ):
        receive(busy[0], "POST")
        service.signal(number)
        answers = [receive(connection, "POST") for connection in busy[1:]]
        service.wait_for(lambda: not listens(service.port, before[0]))  # as it is about to end
        half.sendall(RELU[-5:])
        part.sendall(LIVE[-5:])
        answers += [receive(half, "POST"), receive(part)]
        assert [answer.status for answer in answers] == [200] * 6
        closing = ["connection" in answer.headers for answer in answers]
        assert closing == sorted(closing), "an answer of a worker that ends does not say so"
        assert closing[-1]
    if number == signal.SIGTERM:
        assert service.process.wait(60) == 0
    else:
        service.wait_for(lambda: replaced(service, before))
        assert works(service)
    assert "SIGKILL" not in service.log


LATE_DRAIN = """
from ovms_rest.arbiter.gunicorn_settings import *
import pathlib, time
HERE = pathlib.Path({directory!r})
opened = post_worker_init

def post_worker_init(worker):
    opened(worker)
    drain = worker._drain
    def wait_and_drain():
        (HERE / "draining").touch()
        while not (HERE / "connected").exists():
            time.sleep(0.01)
        drain()
    worker._drain = wait_and_drain
"""


def test_connection_that_nobody_has_accepted_when_the_last_worker_drains_is_served(start, tmp_path):
    (tmp_path / "settings.py").write_text(LATE_DRAIN.format(directory=str(tmp_path)))
    service = start(1, "-c", str(tmp_path / "settings.py"))
    service.signal(signal.SIGTERM)
    service.wait_for((tmp_path / "draining").exists)
    with connected(service, LIVE) as connection:
        (tmp_path / "connected").touch()
        answer = receive(connection)
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert service.process.wait(60) == 0


def test_client_may_send_one_more_request_after_the_inference_during_shutdown(start):
    """The client cannot know yet, and has a second from when the worker begins to drain."""
    service = start(1)
    with used(service, 2) as (kept, busy):
        busy.sendall(slow(10))
        wait_until_inferring(service)
        service.signal(signal.SIGTERM)
        assert receive(busy, "POST").headers["connection"] == "close"
        time.sleep(0.1)
        kept.sendall(LIVE)
        answer = receive(kept)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert service.process.wait(60) == 0


def test_requests_left_at_the_end_of_the_drain_are_refused(start):
    """The worker ends after its first response, and has two seconds for the requests received by then."""
    service = start(1, "--graceful-timeout", "2", "--max-requests", "1")
    (pid,) = service.workers()
    with several(service, 20, slow(5)) as connections:
        answers = [receive(connection, "POST") for connection in connections]
        statuses = [answer.status for answer in answers]
        assert 0 < statuses.count(503) == 20 - statuses.count(200) < 20
        refused = answers[statuses.index(503)]
        assert refused.json() == {"error": "the server is shutting down; the request was not started"}
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert all(answer.headers["connection"] == "close" for answer in answers)
        assert all(map(is_closed, connections))
        service.wait_for(lambda: pid not in service.workers())


def test_busy_client_does_not_keep_a_worker_from_ending(start):
    """Its pipelined requests get responses, but for no longer than gunicorn's graceful_timeout."""
    service = start(1, "--graceful-timeout", "1", "--max-requests", "1")
    before = service.workers()
    with connected(service, SLOW * 200) as connection:
        wait_until_gone(service, before)
        connection.setblocking(True)
        statuses = [answer.status for answer in parse(receive_rest(connection), *["POST"] * 200)]
    assert 1 < len(statuses) < 200


@pytest.mark.parametrize("reason", ["max_requests", "SIGHUP"])
def test_slow_client_does_not_keep_a_worker_from_ending(start, reason):
    """It gets no more than gunicorn's graceful_timeout, even if the arbiter does not wait for the worker."""
    limit = ("--max-requests", "4") if reason == "max_requests" else ()
    service = start(1, "--graceful-timeout", "1", *limit)
    before = service.workers()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(connected(service, LIVE))
            receive(connection)
            connection.sendall(post(RELU_PATH, RELU)[:-5])
        if reason != "max_requests":
            service.signal(signal.Signals[reason])
        wait_until_gone(service, before)
    assert works(service)


@pytest.fixture
def reaper():
    """Adopt orphans in this process, which reaps them: gunicorn does not wait for workers that it has killed."""
    set_subreaper(True)
    yield
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    set_subreaper(False)


def set_subreaper(on):
    assert ctypes.CDLL(None).prctl(36, int(on), 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER


def test_worker_that_does_not_end_is_killed_after_the_graceful_timeout(reaper, start):
    service = start(1, "--graceful-timeout", "1")
    (pid,) = service.workers()
    before = spent(pid)
    with connected(service, ENDLESS) as connection:
        service.wait_for(lambda: spent(pid) > before + 0.1)
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
        assert is_closed(connection)
    os.waitpid(pid, 0)


def test_workers_end_after_an_arbiter_that_was_killed_and_one_that_hangs_does_not_keep_the_port(
    reaper, start, tmp_path, models
):
    """The other one finishes its requests. The system ends the one that hangs, here after 5 s instead of 35."""
    hook = "from ovms_rest.host import parent\nparent.choose_signal = lambda seconds: 5"
    service = start(2, "-c", settings_with(tmp_path, hook))
    workers = service.workers()
    before = {pid: spent(pid) for pid in workers}
    with connected_to_idle(service) as half, connected_to_idle(service) as endless:
        half.sendall(post(RELU_PATH, RELU)[:-5])
        endless.sendall(ENDLESS)
        (hanging,) = service.wait_for(lambda: [pid for pid in workers if spent(pid) > before[pid] + 0.1])
        service.process.kill()
        service.process.wait(PATIENCE)
        service.wait_for(lambda: "is gone; the worker ends" in service.log)
        half.sendall(post(RELU_PATH, RELU)[-5:])
        assert inferred(receive(half, "POST"))
        codes = {pid: wait_for_exit(pid) for pid in workers}
        assert codes == {pid: -signal.SIGALRM if pid == hanging else 0 for pid in workers}
        assert is_closed(endless)
    assert service.log.count("is gone; the worker ends") == 1
    (tmp_path / "next").mkdir()
    with serve(tmp_path / "next", "-w", "1", bind=("-b", f"127.0.0.1:{service.port}"), config=models) as following:
        assert works(following)


def test_quick_shutdown_waits_for_no_client(start):
    service = start(1)
    with used(service, 1) as (idle,), connected(service, post(RELU_PATH, RELU)[:-5]) as half, used(service, 1):
        service.signal(signal.SIGINT)
        assert service.process.wait(20) == 0
        assert is_closed(idle)
        assert is_closed(half)
    assert "SIGKILL" not in service.log


# --- gunicorn's keepalive


def test_idle_connection_is_closed_after_keepalive(start):
    service = start(1, "--keep-alive", "1")
    with connected(service, LIVE) as connection:
        assert "connection" not in receive(connection).headers
        assert is_closed(connection)
    with connected(service, SLOW + LIVE) as connection:  # which is not idle
        assert [receive(connection, "POST").status, receive(connection).status] == [200, 200]


def test_keepalive_of_0_closes_every_connection(start):
    service = start(1, "--keep-alive", "0")
    for data in (LIVE, b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"):
        with connected(service, data) as connection:
            assert receive(connection).headers["connection"] == "close"
            assert is_closed(connection)


# --- Workers that start and end under load


def test_no_request_is_lost_when_workers_end_after_max_requests(start):
    service = start(2, "--max-requests", "150", "--max-requests-jitter", "100")
    with Load(service.connect) as load:
        service.wait_for(lambda: load.failures or service.log.count("reached max_requests") >= 4)
    assert load.failures == []
    counts = [int(text) for text in re.findall(r"reached max_requests after (\d+) requests and ends", service.log)]
    assert all(150 <= count <= 250 for count in counts)
    assert len(set(counts)) > 1, "the jitter keeps workers from ending all at once"
    assert "SIGKILL" not in service.log


def test_no_request_is_lost_when_workers_are_replaced_or_their_number_changes(start):
    service = start(2)
    with Load(service.connect) as load:
        for _ in range(2):
            before, count = service.workers(), load.answered
            service.signal(signal.SIGHUP)
            service.wait_for(lambda before=before: replaced(service, before) and len(service.workers()) == 2)
            service.wait_for(lambda count=count: load.failures or load.answered > count + 100)
        service.signal(signal.SIGTTIN)
        service.wait_for_workers(3)
        for left in (2, 1):
            service.signal(signal.SIGTTOU)
            service.wait_for_workers(left)
        count = load.answered
        service.wait_for(lambda: load.failures or load.answered > count + 100)
    assert load.failures == []
    assert "SIGKILL" not in service.log


def test_clients_that_continue_sending_lose_no_request_when_the_service_ends(start):
    """Every connection ends with a response that announces it."""
    service = start(2)
    with Load(service.connect, clients=8, reconnect=False) as load:
        service.wait_for(lambda: load.failures or load.answered > 200)
        service.signal(signal.SIGTERM)
        load.join()
    assert load.failures == []
    assert service.process.wait(60) == 0
    assert "SIGKILL" not in service.log
