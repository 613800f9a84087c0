"""gunicorn's settings and signals with the worker of the service, and the service under gunicorn's own workers."""

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import model_zoo
import numpy as np
import pytest
import slow_models
from raw_http import (
    LIVE,
    RELU,
    RELU_PATH,
    Load,
    connected,
    exchange,
    head,
    infer,
    is_closed,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
)
from service import ROOT, environment, free_port, open_files, serve, write_config

RELU_DATA = [1, 0, 3, 0]
SLOW = infer("counting", slow_models.count(slow_models.SLOW))
ENDLESS = infer("counting", slow_models.count(2**30))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A config with relu, counting and filling."""
    return slow_models.save(tmp_path_factory.mktemp("models"))


def works(service):
    answer = parse(exchange(service, post(RELU_PATH, RELU, "Connection: close")), "POST")[0]
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == RELU_DATA


def replaced(service, before):
    """Return whether all of these workers have been replaced."""
    now = service.workers()
    return bool(now) and not set(now) & set(before)


# --- An application that shows its environ

PROBE = '''
import json
import os
from dataclasses import replace
from types import SimpleNamespace

from ovms_rest.arbiter.reloading import Managed
from ovms_rest.settings import read_settings
from ovms_rest.shared_memory.table import SLOTS, WorkerTable


class App:
    """The part of the service's own application that the hooks need, without models."""

    settings = replace(read_settings(os.environ), load_timeout_seconds=5)
    reloading, log_levels = SimpleNamespace(is_due=lambda: False), SimpleNamespace(install=lambda: None)
    managed = Managed(settings, WorkerTable(SLOTS, 1), reloading, log_levels, "nowhere")

    def describe(self):
        return "an application"

    def open(self, slot, is_control, opening, retire):
        pass

    def release(self, slot):
        return []

    def __call__(self, environ, start_response):
        return getattr(self, environ["PATH_INFO"].strip("/") or "environ")(environ, start_response)

    def environ(self, environ, start_response):
        shown = {key: value for key, value in environ.items() if isinstance(value, str | bool | tuple)}
        shown["body"] = environ["wsgi.input"].read().decode()
        environ["wsgi.errors"].write("noted\\n")
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(shown).encode()]

    def write(self, environ, start_response):
        write = start_response("201 Created", [])
        write(b"one ")
        return [b"two"]

    def generate(self, environ, start_response):
        start_response("200 OK", [])
        yield b"one "
        yield b"two"

    def closing(self, environ, start_response):
        start_response("200 OK", [("A", "b")])

        class Parts(list):
            def close(self):
                print("the parts were closed", flush=True)

        return Parts([b"one"])

    def identify(self, environ, start_response):
        start_response("200 OK", [("x-request-id", "of the application"), ("A", environ["HTTP_X_REQUEST_ID"])])
        return []

    def fail(self, environ, start_response):
        raise RuntimeError("the reason of the failure")

    def fail_late(self, environ, start_response):
        start_response("200 OK", [("Content-Length", "100")])
        yield b"one"
        raise RuntimeError("the reason of the late failure")

    def split(self, environ, start_response):
        start_response("200 OK", [("A", "b\\r\\nC: d")])
        return [b"x"]


app = App()
'''


def write_settings(directory, text=""):
    """Write settings for gunicorn that import ours and add some."""
    path = directory / "settings.py"
    path.write_text(f"from ovms_rest.arbiter.gunicorn_settings import *\n\n{text}")
    return str(path)


def write_probe(directory, text=""):
    """Write the application above and the settings for gunicorn to run it."""
    (directory / "probe.py").write_text(PROBE)
    return write_settings(directory, f'wsgi_app = "probe:app"\npythonpath = {str(directory)!r}\n{text}')


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("probe")
    path = directory / "socket"
    arguments = ("-b", f"unix:{path}", "-w", "1", "-c", write_probe(directory))
    with serve(directory, *arguments) as running:
        running.path = str(path)
        yield running


def test_application_is_called_by_the_rules_of_wsgi(probe):
    environ = probe.request("POST", "/?a=b", b"body", {"X-A": "b"}).json()
    host = f"127.0.0.1:{probe.port}"
    assert environ == {
        **environ,
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/",
        "QUERY_STRING": "a=b",
        "CONTENT_LENGTH": "4",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": str(probe.port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": host,
        "HTTP_X_A": "b",
        "REMOTE_ADDR": "127.0.0.1",
        "wsgi.version": [1, 0],
        "wsgi.url_scheme": "http",
        "wsgi.multithread": False,
        "wsgi.run_once": False,
        "body": "body",
    }
    assert environ["REMOTE_PORT"].isdigit()
    probe.wait_for(lambda: "noted" in probe.log)


def test_every_form_of_wsgi_response_is_sent(probe):
    for path, status, body in (("write", 201, b"one two"), ("generate", 200, b"one two"), ("closing", 200, b"one")):
        answer = probe.get(f"/{path}")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (status, body, str(len(body)))
    probe.wait_for(lambda: "the parts were closed" in probe.log)


def test_failing_application_is_a_500_with_its_reason_in_the_log(probe):
    with connected(probe) as connection:
        for path in ("fail", "fail_late"):
            connection.sendall(head("GET", f"/{path}"))
            answer = receive(connection)
            assert (answer.status, list(answer.json())) == (500, ["error"])
            assert "reason of" not in answer.json()["error"]
    probe.wait_for(lambda: "the reason of the late failure" in probe.log)
    assert parse(exchange(probe, head("GET", "/fail", "X-Request-ID: mine")))[0].headers["x-request-id"] == "mine"
    probe.wait_for(lambda: "error while running request mine, GET /fail" in probe.log)


def test_application_may_set_the_request_id(probe):
    """The next request gets an id of the worker again."""
    with connected(probe) as connection:
        for path, expected in (("identify", "of the application"), ("identify", "of the application"), ("write", "b")):
            connection.sendall(head("GET", f"/{path}", "X-Request-ID: b"))
            answer = receive(connection)
            assert answer.headers["x-request-id"] == expected
            assert answer.headers.get("a", "b") == "b"
    assert exchange(probe, head("GET", "/identify")).lower().count(b"x-request-id") == 1


def test_application_cannot_split_its_response(probe):
    assert b"C: d" not in exchange(probe, head("GET", "/split"))
    probe.wait_for(lambda: "line break" in probe.log)
    assert probe.get("/").status == 200


def test_unix_socket_is_served(probe):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(probe.path)
        for _ in range(3):
            connection.sendall(post("/", b"body"))
            environ = receive(connection, "POST").json()
            assert (environ["body"], environ["REMOTE_ADDR"], environ["HTTP_HOST"]) == ("body", "", "x")
        connection.sendall(LIVE[:10])
        connection.shutdown(socket.SHUT_WR)
        assert receive_rest(connection)[:12] in (b"", b"HTTP/1.1 400")


def test_large_bodies_pass_a_unix_socket(tmp_path, models):
    path = tmp_path / "socket"
    with serve(tmp_path, "-b", f"unix:{path}", "-w", "1", config=models) as service:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            for value in (1.5, 2.5):
                connection.sendall(infer("filling", slow_models.fill(value, 1_000_000)))
                answer = receive(connection, "POST")
                assert answer.body.endswith(np.full(1_000_000, value, np.float32).tobytes())
                connection.sendall(post(RELU_PATH, RELU.ljust(3_000_000)))
                assert receive(connection, "POST").json()["outputs"][0]["data"] == RELU_DATA
        assert works(service), "the other address works as well"


def test_script_name_is_the_mount_path(tmp_path):
    """Where the service is mounted below a path: gunicorn's documentation of SCRIPT_NAME (WSGI's, PEP 3333)."""
    with serve(tmp_path, "-w", "1", "-c", write_probe(tmp_path), SCRIPT_NAME="/prefix") as service:
        environ = service.get("/prefix/environ?a").json()
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"], environ["QUERY_STRING"]) == ("/prefix", "/environ", "a")


# --- Limits


def test_gunicorns_limits_are_flags(tmp_path, models):
    limits = ("--limit-request-line", "100", "--limit-request-fields", "3", "--limit-request-field_size", "50")
    with serve(tmp_path, "-w", "1", *limits, config=models) as service:
        for data, status in (
            (head("GET", "/" + "a" * 85), 404),
            (head("GET", "/" + "a" * 90), 414),
            (head("GET", "/v2", "A: b", "C: d"), 200),
            (head("GET", "/v2", "A: b", "C: d", "E: f"), 431),
            (head("GET", "/v2", "A: " + "b" * 45), 200),
            (head("GET", "/v2", "A: " + "b" * 46), 431),
            (post_chunked(RELU_PATH, RELU), 200),
        ):
            answer = parse(exchange(service, data))[0]
            assert answer.status == status, data
            assert status < 410 or list(answer.json()) == ["error"]


def test_default_body_limit_is_256_mib(tmp_path, models):
    with serve(tmp_path, "-w", "1", config=models) as service:
        field = "Expect: 100-continue"
        with connected(service, head("POST", RELU_PATH, f"Content-Length: {256 * 2**20}", field)) as connection:
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        with connected(service, head("POST", RELU_PATH, f"Content-Length: {256 * 2**20 + 1}", field)) as connection:
            assert parse(receive_rest(connection), "POST")[0].status == 413


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--proxy-protocol",), "proxy_protocol is not supported"),
        (("--http-protocols", "h2,h1"), "http_protocols is not supported"),
    ],
)
def test_unsupported_setting_ends_the_start(tmp_path, models, arguments, message):
    ended = subprocess.run(
        ["gunicorn", "-b", "127.0.0.1:0", *arguments],
        cwd=ROOT,
        env=environment(tmp_path, OVMS_REST_CONFIG=str(models)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert message in ended.stderr


# --- Time limits


def test_hanging_worker_is_replaced_after_gunicorns_timeout(tmp_path, models):
    with serve(tmp_path, "-w", "2", "--timeout", "2", config=models) as service:
        service.wait_for_workers(2)
        before = service.workers()
        with contextlib.ExitStack() as stack:
            connection, other = (stack.enter_context(connected_to_idle(service)) for _ in range(2))
            connection.sendall(ENDLESS)
            other.sendall(post(RELU_PATH, RELU))
            assert receive(other, "POST").status == 200
            assert is_closed(connection)
        service.wait_for(lambda: len(set(before) - set(service.workers())) == 1)
        assert service.log.count("WORKER TIMEOUT") == 1, "the other worker reported"
        assert works(service)


@contextlib.contextmanager
def connected_to_idle(service):
    """Open a connection while all workers are idle, so that it goes to one with the fewest connections."""
    service.wait_until_idle()
    with connected(service, LIVE) as connection:
        receive(connection)
        yield connection


def test_long_queue_does_not_count_as_hanging(tmp_path, models):
    """A worker that is busy for longer than gunicorn's `timeout` reports between inferences."""
    request = infer("counting", slow_models.count(6 * slow_models.SLOW))
    with serve(tmp_path, "-w", "1", "--timeout", "2", config=models) as service:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connected(service, request)) for _ in range(7)]
            assert [receive(connection, "POST").status for connection in connections] == [200] * 7
        assert "WORKER TIMEOUT" not in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_worker_finishes_its_requests_before_it_ends(tmp_path, models, number):
    with serve(tmp_path, "-w", "1", config=models) as service:
        service.wait_for_workers(1)
        before = service.workers()
        with contextlib.ExitStack() as stack:
            half = stack.enter_context(connected(service, post(RELU_PATH, RELU)[:-5]))
            part = stack.enter_context(connected(service, LIVE[:-5]))
            slow = [stack.enter_context(connected(service, SLOW)) for _ in range(5)]
            receive(slow[0], "POST")
            service.signal(number)
            answers = [receive(connection, "POST") for connection in slow[1:]]
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


def test_client_may_send_one_more_request_after_the_inference_during_shutdown(tmp_path, models):
    """The client cannot know yet, and has a second from when the worker begins to drain."""
    with serve(tmp_path, "-w", "1", config=models) as service:
        with connected(service, LIVE) as kept, connected(service, LIVE) as slow:
            receive(kept)
            receive(slow)
            (pid,) = service.workers()
            before = cpu_seconds(pid)
            slow.sendall(infer("counting", slow_models.count(30 * slow_models.SLOW)))
            service.wait_for(lambda: cpu_seconds(pid) > before + 0.05)
            service.signal(signal.SIGTERM)
            assert receive(slow, "POST").headers["connection"] == "close"
            time.sleep(0.1)
            kept.sendall(LIVE)
            answer = receive(kept)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert service.process.wait(60) == 0


def test_requests_left_at_the_end_of_the_drain_are_refused(tmp_path, models):
    """The worker ends after its first response, and has two seconds for the requests received by then."""
    request = infer("counting", slow_models.count(5 * slow_models.SLOW))
    arguments = ("-w", "1", "--graceful-timeout", "2", "--max-requests", "1")
    with serve(tmp_path, *arguments, config=models) as service, contextlib.ExitStack() as stack:
        service.wait_for_workers(1)
        (pid,) = service.workers()
        connections = [stack.enter_context(connected(service, request)) for _ in range(20)]
        answers = [receive(connection, "POST") for connection in connections]
        statuses = [answer.status for answer in answers]
        assert 0 < statuses.count(503) == 20 - statuses.count(200) < 20
        refused = answers[statuses.index(503)]
        assert refused.json() == {"error": "the server is shutting down; the request was not started"}
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert all(answer.headers["connection"] == "close" for answer in answers)
        assert all(map(is_closed, connections))
        service.wait_for(lambda: pid not in service.workers())


def test_busy_client_does_not_keep_a_worker_from_ending(tmp_path, models):
    """Its pipelined requests get responses, but for no longer than gunicorn's graceful_timeout."""
    arguments = ("-w", "1", "--graceful-timeout", "1", "--max-requests", "1")
    with serve(tmp_path, *arguments, config=models) as service:
        service.wait_for_workers(1)
        before = service.workers()
        with connected(service, SLOW * 200) as connection:
            wait_until_gone(service, before)
            connection.setblocking(True)
            statuses = [answer.status for answer in parse(receive_rest(connection), *["POST"] * 200)]
        assert 1 < len(statuses) < 200


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


def test_worker_that_does_not_end_is_killed_after_the_graceful_timeout(tmp_path, models, reaper):
    with serve(tmp_path, "-w", "1", "--graceful-timeout", "1", config=models) as service:
        service.wait_for_workers(1)
        (pid,) = service.workers()
        before = cpu_seconds(pid)
        with connected(service, ENDLESS) as connection:
            service.wait_for(lambda: cpu_seconds(pid) > before + 0.1)
            service.signal(signal.SIGTERM)
            assert service.process.wait(20) == 0
            assert is_closed(connection)
        os.waitpid(pid, 0)


def cpu_seconds(pid):
    """Return the CPU time of a process, from the scheduler's nanoseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.parametrize("reason", ["max_requests", "SIGHUP"])
def test_slow_client_does_not_keep_a_worker_from_ending(tmp_path, models, reason):
    """It gets no more than gunicorn's graceful_timeout, even if the arbiter does not wait for the worker."""
    limit = ("--max-requests", "4") if reason == "max_requests" else ()
    with serve(tmp_path, "-w", "1", "--graceful-timeout", "1", *limit, config=models) as service:
        service.wait_for_workers(1)
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


def wait_until_gone(service, workers):
    """Wait until the workers are gone, for much less time than the time limits of clients."""
    deadline = time.monotonic() + 12
    while left := set(workers) & set(service.workers()):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def test_idle_connection_is_closed_after_keepalive(tmp_path, models):
    with serve(tmp_path, "-w", "1", "--keep-alive", "1", config=models) as service:
        with connected(service, LIVE) as connection:
            assert "connection" not in receive(connection).headers
            assert is_closed(connection)
        with connected(service, SLOW + LIVE) as connection:  # which is not idle
            assert [receive(connection, "POST").status, receive(connection).status] == [200, 200]


def test_keepalive_of_0_closes_every_connection(tmp_path, models):
    with serve(tmp_path, "-w", "1", "--keep-alive", "0", config=models) as service:
        with connected(service, LIVE) as connection:
            assert receive(connection).headers["connection"] == "close"
            assert is_closed(connection)
        with connected(service, b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") as connection:
            assert receive(connection).headers["connection"] == "close"
            assert is_closed(connection)


# --- Workers that start and end under load


def test_no_request_is_lost_when_workers_end_after_max_requests(tmp_path, models):
    arguments = ("-w", "2", "--max-requests", "150", "--max-requests-jitter", "100")
    with serve(tmp_path, *arguments, config=models) as service:
        service.wait_for_workers(2)
        with Load(service.connect) as load:
            service.wait_for(lambda: load.failures or service.log.count("reached max_requests") >= 4)
        assert load.failures == []
        counts = [int(text) for text in re.findall(r"reached max_requests after (\d+) requests and ends", service.log)]
        assert all(150 <= count <= 250 for count in counts)
        assert len(set(counts)) > 1, "the jitter keeps workers from ending all at once"
        assert "SIGKILL" not in service.log


def test_no_request_is_lost_when_workers_are_replaced_or_their_number_changes(tmp_path, models):
    with serve(tmp_path, "-w", "2", config=models) as service:
        service.wait_for_workers(2)
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


def test_clients_that_continue_sending_lose_no_request_when_the_service_ends(tmp_path, models):
    """Every connection ends with a response that announces it."""
    with serve(tmp_path, "-w", "2", config=models) as service:
        service.wait_for_workers(2)
        with Load(service.connect, clients=8, reconnect=False) as load:
            service.wait_for(lambda: load.failures or load.answered > 200)
            service.signal(signal.SIGTERM)
            load.join()
        assert load.failures == []
        assert service.process.wait(60) == 0
        assert "SIGKILL" not in service.log


def test_quick_shutdown_waits_for_no_client(tmp_path, models):
    with serve(tmp_path, "-w", "1", config=models) as service, connected(service, LIVE) as idle:
        receive(idle)
        with connected(service, post(RELU_PATH, RELU)[:-5]) as half, connected(service, LIVE) as other:
            receive(other)
            service.signal(signal.SIGINT)
            assert service.process.wait(20) == 0
            assert is_closed(idle)
            assert is_closed(half)
        assert "SIGKILL" not in service.log


# --- Logs and hooks


def test_gunicorns_access_log_has_a_line_per_request(tmp_path, models):
    layout = "%(h)s|%(m)s|%(U)s|%(q)s|%(H)s|%(s)s|%(B)s|%({x-a}i)s|%({content-type}o)s|%(r)s|%(a)s|"
    path = tmp_path / "access"
    arguments = ("--access-logfile", str(path), "--access-logformat", layout)
    with serve(tmp_path, "-w", "1", *arguments, config=models) as service:
        requests = head("GET", "/v2?a=b", "X-A: b", "User-Agent: c d") + post(RELU_PATH, RELU) + head("HEAD", "/v2")
        exchange(service, requests)
        exchange(service, post("/v2/models/x/infer", b""))
        service.wait_for(lambda: path.read_text().count("\n") == 4)
        written = path.read_text().splitlines()
        size = len(service.get("/v2").body)
    kind = "application/json"
    assert written[:3] == [
        f"127.0.0.1|GET|/v2|a=b|HTTP/1.1|200|{size}|b|{kind}|GET /v2?a=b HTTP/1.1|c d|",
        f"127.0.0.1|POST|{RELU_PATH}||HTTP/1.1|200|123|-|{kind}|POST {RELU_PATH} HTTP/1.1|-|",
        f"127.0.0.1|HEAD|/v2||HTTP/1.1|200|0|-|{kind}|HEAD /v2 HTTP/1.1|-|",
    ]
    assert written[3].startswith("127.0.0.1|POST|/v2/models/x/infer||HTTP/1.1|404|")


def test_gunicorns_access_log_has_refused_requests(tmp_path, models):
    """The access log is where one looks first for the reason of errors."""
    arguments = ("--access-logfile", str(tmp_path / "access"))
    variables = {"OVMS_REST_MAX_WAITING": "1", "OVMS_REST_MAX_BODY_BYTES": "1000"}
    with serve(tmp_path, "-w", "1", *arguments, config=models, **variables) as service:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connected(service, SLOW)) for _ in range(5)]
            statuses = sorted(receive(connection, "POST").status for connection in connections)
        assert statuses[-1] == 503
        exchange(service, head("POST", RELU_PATH, "Content-Length: 1001"))
        exchange(service, LIVE)
        service.wait_for(lambda: "/v2/health/live" in (tmp_path / "access").read_text())
        found = re.findall(r'" (\d+) ', (tmp_path / "access").read_text())
        assert sorted(found) == sorted([*map(str, statuses), "413", "200"])


def test_logs_are_reopened_by_sigusr1(tmp_path, models):
    path = tmp_path / "access"
    with serve(tmp_path, "-w", "2", "--access-logfile", str(path), config=models) as service:
        service.wait_for_workers(2)
        before = service.workers()
        assert works(service)
        path.rename(tmp_path / "access.1")
        service.signal(signal.SIGUSR1)
        service.wait_for(path.exists)
        # Every worker reopens it when its signal comes.
        service.wait_for(lambda: all(str(path) in open_files(pid) for pid in before))
        assert works(service)
        service.wait_for(lambda: RELU_PATH in path.read_text())
        assert service.workers() == before


def test_sigusr1_during_writes_to_the_log_loses_no_line(tmp_path, models):
    path = tmp_path / "access"
    with serve(tmp_path, "-w", "1", "--access-logfile", str(path), config=models) as service:
        service.wait_for_workers(1)
        (worker,) = service.workers()
        sent = [threading.Thread(target=lambda: [works(service) for _ in range(100)]) for _ in range(2)]
        for thread in sent:
            thread.start()
        while any(thread.is_alive() for thread in sent):
            os.kill(worker, signal.SIGUSR1)
            time.sleep(0.0005)
        for thread in sent:
            thread.join()
        service.wait_for(lambda: path.read_text().count(RELU_PATH) == 200)
        assert "Logging error" not in service.log


@pytest.fixture
def observed(tmp_path, models):
    """One worker that writes a line of JSON for every request, and queues at most one."""
    path = tmp_path / "lines"
    variables = {
        "OVMS_REST_ACCESS_LOG": "json",
        "OVMS_REST_ACCESS_LOG_FILE": str(path),
        "OVMS_REST_MAX_WAITING": "1",
        "OVMS_REST_MAX_BODY_BYTES": "1000",
    }
    with serve(tmp_path, "-w", "1", config=models, **variables) as running:
        running.lines = path
        yield running


def lines_of(service, count):
    """Wait for `count` lines; return them parsed."""
    return list(map(json.loads, service.wait_for(lambda: has_lines(service.lines, count))))


def has_lines(path, count):
    lines = path.read_text().splitlines()
    return lines if len(lines) == count else None


def test_access_log_line_describes_an_inference(observed):
    body = json.dumps({"id": "mine", **json.loads(RELU)}).encode()
    (answer,) = parse(exchange(observed, post(RELU_PATH + "?key=secret", body, "X-Request-ID: a")), "POST")
    (line,) = lines_of(observed, 1)
    assert line == {
        **line,
        "client": "127.0.0.1",
        "request_id": "a",
        "method": "POST",
        "path": RELU_PATH,
        "status": 200,
        "bytes_in": len(body),
        "bytes_out": len(answer.body),
        "model": "relu",
        "version": "1",
        "id": "mine",
    }
    assert 0 <= line["queue_us"] + line["inference_us"] <= line["total_us"] < 10_000_000
    written = datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S.%f%z")
    assert abs(written.timestamp() - time.time()) < 60
    assert "secret" not in observed.lines.read_text()


def test_access_log_line_has_the_times_of_an_inference(observed):
    with connected(observed, SLOW) as first, connected(observed, LIVE) as second:
        receive(second)
        second.sendall(SLOW * 2)
        receive(first, "POST")
        assert [receive(second, "POST").status for _ in range(2)] == [200, 200]
    lines = [line for line in lines_of(observed, 4) if line["model"]]
    assert [line["model"] for line in lines] == ["counting"] * 3
    assert all(line["inference_us"] > 5000 for line in lines)
    assert all(line["queue_us"] + line["inference_us"] <= line["total_us"] for line in lines)


def test_access_log_has_requests_that_do_not_infer_and_refused_ones(observed):
    requests = [
        (LIVE, "GET", 200),
        (head("HEAD", "/v2"), "HEAD", 200),
        (head("GET", "/v2/models/%22quoted%22"), "GET", 404),
        (post("/v2/models/unknown/infer", b"{}"), "POST", 404),
        (post(RELU_PATH, b"{broken"), "POST", 400),
        (head("POST", RELU_PATH, "Content-Length: 1001"), "POST", 413),
    ]
    answers = parse(exchange(observed, *[data for data, _, _ in requests]), *[method for _, method, _ in requests])
    (broken,) = parse(exchange(observed, b"BROKEN\r\n\r\n"))
    lines = lines_of(observed, 7)
    assert [(line["method"], line["status"]) for line in lines] == [
        *((method, status) for _, method, status in requests),
        ("-", 400),
    ]
    ids = [answer.headers["x-request-id"] for answer in (*answers, broken)]
    assert [line["request_id"] for line in lines] == ids
    assert [line["path"] for line in lines][2::2] == ["/v2/models/%22quoted%22", RELU_PATH, "-"]
    assert [line["bytes_in"] for line in lines] == [0, 0, 0, 2, 7, None, None]
    assert [line["model"] for line in lines[:4]] == [None] * 4


def test_access_log_has_overloads(observed):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(observed, SLOW)) for _ in range(5)]
        statuses = [receive(connection, "POST").status for connection in connections]
    assert 503 in statuses
    assert sorted(line["status"] for line in lines_of(observed, 5)) == sorted(statuses)


def test_client_cannot_forge_an_access_log_line(observed):
    forged = json.dumps({"id": 'x\n{"status":200}\x1b[2J', **json.loads(RELU)}).encode()
    exchange(observed, post(RELU_PATH, forged), head("GET", "/v2\xc2\x9b31m%0Astatus"))
    lines = lines_of(observed, 2)
    assert lines[0]["id"] == 'x\n{"status":200}\x1b[2J'
    assert observed.lines.read_text().replace("\n", "").isprintable()


def test_text_access_log_goes_to_standard_output(tmp_path, models):
    with serve(tmp_path, "-w", "1", config=models, OVMS_REST_ACCESS_LOG="text") as service:
        assert works(service)
        found = service.wait_for(lambda: re.search(r"^time=.*\n", service.log, re.MULTILINE))[0]
    pairs = dict(pair.split("=", 1) for pair in found.split())
    assert (pairs["path"], pairs["status"], pairs["model"], pairs["version"]) == (RELU_PATH, "200", "relu", "1")
    assert "id" not in pairs


def test_access_log_is_reopened_by_sigusr1(tmp_path, models):
    path = tmp_path / "lines"
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": str(path)}
    with serve(tmp_path, "-w", "2", config=models, **variables) as service:
        service.wait_for_workers(2)
        before = service.workers()
        assert works(service)
        service.wait_for(lambda: has_lines(path, 1))  # a line is written after its response was sent
        path.rename(tmp_path / "lines.1")
        service.signal(signal.SIGUSR1)
        service.wait_for(lambda: all(str(path) in open_files(pid) for pid in before))
        assert works(service)
        service.wait_for(lambda: has_lines(path, 1))
        assert has_lines(tmp_path / "lines.1", 1)
        assert service.workers() == before


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/lines"])
def test_unwritable_access_log_costs_no_request(tmp_path, models, path):
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": path}
    with serve(tmp_path, "-w", "1", config=models, **variables) as service:
        assert all(works(service) for _ in range(3))
        service.wait_for(lambda: "access log" in service.log)
        assert service.log.count("access log") == 1


def test_access_log_is_off_by_default(tmp_path, models):
    with serve(tmp_path, "-w", "1", config=models, OVMS_REST_ACCESS_LOG_FILE=str(tmp_path / "lines")) as service:
        assert works(service)
        assert not (tmp_path / "lines").exists()
        assert RELU_PATH not in service.log


HOOKS = """
def pre_request(worker, req):
    worker.log.info("before %s %s %s of %s", req.method, req.path, dict(req.headers).get("X-A"), req.remote_addr[0])
    if "fail-before" in req.uri:
        raise RuntimeError("the hook before failed")


def post_request(worker, req, environ, resp):
    worker.log.info("after %s %s %s", environ["PATH_INFO"], resp.status, resp.sent)
    if "fail-after" in req.uri:
        raise RuntimeError("the hook after failed")


def when_ready(server):
    server.log.info("hook when_ready")


def worker_int(worker):
    worker.log.info("hook worker_int")
"""


def test_users_hooks_see_every_request(tmp_path, models):
    with serve(tmp_path, "-w", "1", "-c", write_settings(tmp_path, HOOKS), config=models) as service:
        with connected(service) as connection:
            connection.sendall(head("GET", "/v2?a", "X-A: b") + post(RELU_PATH, RELU) + head("GET", "/v2?fail-after"))
            assert [receive(connection).status for _ in range(3)] == [200] * 3
            connection.sendall(head("GET", "/v2?fail-before"))
            answer = receive(connection)
            assert (answer.status, list(answer.json())) == (500, ["error"])
        service.wait_for(lambda: "the hook before failed" in service.log)
        assert "before GET /v2 b of 127.0.0.1" in service.log
        assert re.search(r"after /v2 200 OK [1-9]\d+\n", service.log)
        assert f"after {RELU_PATH} 200 OK 123" in service.log
        assert "the hook after failed" in service.log
        assert "hook when_ready" in service.log
        service.signal(signal.SIGINT)
        assert service.process.wait(20) == 0
        assert "hook worker_int" in service.log


def test_users_hooks_see_a_deferred_call_once(tmp_path, models):
    """A reload takes many times as long as the interval at which the worker polls its outcome."""
    with serve(tmp_path, "-w", "1", "-c", write_settings(tmp_path, HOOKS), config=models) as service:
        reload = head("POST", "/v1/config/reload", "Content-Length: 0", "X-A: b")
        with connected(service, reload) as connection:
            assert receive(connection, "POST").status == 200
        for file in models.parent.rglob("*.xml"):
            os.utime(file)
        with connected(service, reload) as connection:
            assert receive(connection, "POST").status == 201
        service.wait_for(lambda: service.log.count("after /v1/config/reload") == 2)
        assert service.log.count("before POST /v1/config/reload b") == 2


# --- Connections and descriptors


def test_connections_beyond_worker_connections_wait_while_none_is_idle(tmp_path, models):
    arguments = ("-w", "1", "--worker-connections", "3")
    with serve(tmp_path, *arguments, config=models) as service, contextlib.ExitStack() as stack:
        taken = [stack.enter_context(connected(service, LIVE + LIVE[:20])) for _ in range(3)]
        assert [receive(connection).status for connection in taken] == [200] * 3
        waiting = [stack.enter_context(connected(service, LIVE)) for _ in range(4)]
        for connection in taken:
            connection.sendall(LIVE[20:] + LIVE[:20])
            assert receive(connection).status == 200
        assert not readable(waiting)
        for connection in (*taken, waiting[0]):
            connection.close()
        assert [receive(connection).status for connection in waiting[1:]] == [200] * 3


def test_longest_idle_connection_is_closed_for_a_new_one(tmp_path, models):
    """Connections with a part of a request, or of an unsent response, stay; so do those idle for less time."""
    arguments = ("-w", "1", "--worker-connections", "6")
    with serve(tmp_path, *arguments, config=models) as service, contextlib.ExitStack() as stack:
        service.wait_for_workers(1)

        def connect(data):
            connection = stack.enter_context(connected(service, data))
            service.wait_for_workers(1)
            return connection

        silent = connect(b"")
        part_of_head = connect(LIVE[:20])
        part_of_body = connect(post(RELU_PATH, RELU)[:-5])
        unread = connect(infer("filling", slow_models.fill(1.5, 5_000_000)))
        idle, used_last = connect(LIVE), connect(LIVE)
        assert [receive(connection).status for connection in (idle, used_last)] == [200, 200]
        for gone in (silent, idle):
            assert receive(connect(LIVE)).status == 200
            assert gone.recv(1) == b""
            used_last.sendall(LIVE)
            assert receive(used_last).status == 200
        part_of_head.sendall(LIVE[20:])
        assert receive(part_of_head).status == 200
        part_of_body.sendall(post(RELU_PATH, RELU)[-5:])
        assert receive(part_of_body, "POST").status == 200
        assert receive(unread, "POST").body.endswith(np.full(5_000_000, 1.5, np.float32).tobytes())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_new_clients_are_served_while_others_keep_all_connections_idle(tmp_path, models, workers):
    """However many there are; also at the control address."""
    control = free_port()
    arguments = ("-w", workers, "--worker-connections", "20")
    variables = {"OVMS_REST_CONTROL_BIND": f"127.0.0.1:{control}"}
    with serve(tmp_path, *arguments, config=models, **variables) as service, contextlib.ExitStack() as stack:
        for port in (service.port, control):
            service.port = port
            for _ in range(100):
                connection = stack.enter_context(connected(service, LIVE))
                assert receive(connection).status == 200


def readable(connections):
    return select.select(connections, [], [], 0)[0]


def test_worker_without_descriptors_serves_its_connections_and_recovers(tmp_path, models):
    with serve(tmp_path, "-w", "1", config=models) as service:
        assert works(service)
        (pid,) = service.workers()
        count = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(connected(service, LIVE))
            receive(first)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + 4, hard))
            connections = [stack.enter_context(connected(service, LIVE)) for _ in range(20)]
            service.wait_for(lambda: "cannot accept a connection" in service.log)
            for data in (LIVE, post(RELU_PATH, RELU), infer("filling", slow_models.fill(1, 100_000))):
                first.sendall(data)
                assert receive(first, data.split()[0].decode()).status == 200
            for connection in connections:  # in the order in which they came
                assert receive(connection).status == 200
                connection.close()
        assert works(service)
        assert service.workers() == [pid]
        assert service.log.count("cannot accept a connection") < 100


# --- Sockets


def test_several_addresses_are_served_by_all_workers(tmp_path, models):
    path = tmp_path / "socket"
    with serve(tmp_path, "-w", "2", "-b", "127.0.0.1:0", "-b", f"unix:{path}", config=models) as service:
        service.wait_for_workers(2)
        ports = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", service.log)}
        assert len(ports) == 2
        with contextlib.ExitStack() as stack:
            connections = []
            for _ in range(4):
                connections += [
                    *(stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in ports),
                    stack.enter_context(socket.socket(socket.AF_UNIX)),
                ]
                connections[-1].connect(str(path))
            for connection in connections:
                connection.sendall(post(RELU_PATH, RELU))
            answers = [receive(connection, "POST") for connection in connections]
            assert [answer.status for answer in answers] == [200] * 12


def write_starter(directory, text):
    """Write a `gunicorn` that does something before it executes the real one; return the PATH to find it."""
    starter = directory / "bin" / "gunicorn"
    starter.parent.mkdir()
    real = Path(sys.executable).parent
    starter.write_text(
        f"#!{sys.executable}\nimport os, socket, sys\narguments = sys.argv[1:]\n{text}\n"
        f"os.environ['PATH'] = {str(real)!r} + ':' + os.environ['PATH']\n"
        f"os.execv({str(real / 'gunicorn')!r}, ['gunicorn', *arguments])\n"
    )
    starter.chmod(0o755)
    return f"{starter.parent}:{real}:{os.environ['PATH']}"


ACTIVATION = """
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
first = sockets[0].getsockname()[1]
held = [os.dup2(item.fileno(), 60 + number) for number, item in enumerate(sockets)]
for number, fileno in enumerate(held):
    os.dup2(fileno, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
"""


def test_sockets_of_systemd_are_served(tmp_path, models):
    """Activation by sd_listen_fds(3): the sockets are inherited from 3 on, and stay when the service ends."""
    with serve(tmp_path, "-w", "2", config=models, PATH=write_starter(tmp_path, ACTIVATION)) as service:
        service.wait_for_workers(2)
        ports = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", service.log)}
        assert len(ports) == 2
        for port in ports:
            service.port = port
            assert works(service)
        before = service.workers()
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: replaced(service, before))
        assert works(service)


@pytest.fixture
def apart(tmp_path, models):
    """Two workers, each with a socket of its own for the same address, and the control worker."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as reserved:
        port = reserved.getsockname()[1]
        # gunicorn does not log the address in this case.
        text = f"arguments[1] = '127.0.0.1:{port}'\nprint('Listening at: http://127.0.0.1:{port}', flush=True)"
        variables = {"PATH": write_starter(tmp_path, text), "OVMS_REST_CONTROL_BIND": "127.0.0.1:0"}
        with serve(tmp_path, "-w", "2", "--reuse-port", config=models, **variables) as service:
            service.wait_for_workers(3)
            reserved.close()
            yield service


def test_workers_with_reuse_port_serve_all_their_connections(apart):
    """No worker can accept a connection from the socket of another."""
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(connected(apart, LIVE))
            connection.settimeout(10)
            assert receive(connection).status == 200
    for _ in range(10):
        assert works(apart)


def test_control_worker_does_not_listen_at_the_address_of_the_others(apart):
    port = int(re.search(r"control address: http://127\.0\.0\.1:(\d+)", apart.log)[1])
    assert sum(listens(apart.port, pid) for pid in apart.workers()) == 2
    assert sum(listens(port, pid) for pid in apart.workers()) >= 1
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(LIVE)
        assert receive(connection).status == 200


def listens(port, pid):
    """Return whether a process has a socket that listens at a port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    return not listening.isdisjoint(open_files(pid))


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 with its key."""
    directory = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    return str(directory / "cert.pem"), str(directory / "key.pem")


@pytest.fixture(scope="module")
def tls(tmp_path_factory, models, certificate):
    directory = tmp_path_factory.mktemp("tls")
    cert, key = certificate
    arguments = ("--certfile", cert, "--keyfile", key, "-w", "1")
    with serve(directory, *arguments, config=models, OVMS_REST_HEAD_TIMEOUT_SECONDS="2") as running:
        yield running


def secured(service, certificate, own=False, **options):
    """Open a connection over TLS."""
    context = ssl.create_default_context(cafile=certificate[0])
    if own:
        context.load_cert_chain(*certificate)
    return context.wrap_socket(service.connect(), server_hostname="127.0.0.1", **options)


def test_tls_is_served(tls, certificate):
    with secured(tls, certificate) as connection:
        for _ in range(3):
            connection.sendall(LIVE + post(RELU_PATH, RELU))
            assert receive(connection).status == 200
            assert receive(connection, "POST").json()["outputs"][0]["data"] == RELU_DATA
        connection.sendall(b"BROKEN\r\n\r\n")
        answer = receive(connection)
        assert (answer.status, list(answer.json())) == (400, ["error"])


def test_tls_in_pieces_and_in_bulk_is_read(tls, certificate):
    with secured(tls, certificate) as connection:
        data = post(RELU_PATH, RELU) + post_chunked(RELU_PATH, RELU[:9], RELU[9:])
        for byte in data:
            connection.sendall(bytes([byte]))
        assert [receive(connection, "POST").status for _ in range(2)] == [200, 200]
        for _ in range(2):
            connection.sendall(post(RELU_PATH, RELU.ljust(5_000_000)) + LIVE)
            assert receive(connection, "POST").json()["outputs"][0]["data"] == RELU_DATA
            assert receive(connection).status == 200


def test_slow_readers_get_large_responses_over_tls(tls, certificate):
    """The unsent part of a record is sent while others infer."""
    with contextlib.ExitStack() as stack:
        connections = {value: stack.enter_context(secured(tls, certificate)) for value in (1.5, 2.5, 3.5)}
        for value, connection in connections.items():
            connection.sendall(infer("filling", slow_models.fill(value, 3_000_000)) + LIVE)
        for _ in range(3):
            with secured(tls, certificate) as other:
                other.sendall(infer("filling", slow_models.fill(-1, 100)))
                assert receive(other, "POST").status == 200
        for value, connection in connections.items():
            answer = receive(connection, "POST")
            assert answer.body.endswith(np.full(3_000_000, value, np.float32).tobytes())
            assert receive(connection).status == 200


def test_tls_connection_is_closed_with_an_alert(tls, certificate):
    """RFC 9112 section 9.8: servers MUST attempt to initiate an exchange of closure alerts before closing."""
    for data in (head("GET", "/v2", "Connection: close"), b"BROKEN\r\n\r\n"):
        with secured(tls, certificate, suppress_ragged_eofs=False) as connection:
            connection.sendall(data)
            received = b""
            while more := connection.recv(10_000):  # raises for an end without an alert
                received += more
            assert len(parse(received)) == 1


def test_clients_without_tls_do_not_affect_others(tls, certificate):
    """Plain HTTP, no bytes, a handshake that ends in the middle, and a certificate that the client refuses."""
    before = tls.workers()
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(connected(tls))
        started = stack.enter_context(connected(tls, b"\x16\x03\x01\x00\xf4\x01"))
        plain = stack.enter_context(connected(tls, LIVE))
        assert is_closed(plain) or b"200" not in plain.recv(1000)
        with pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(tls.connect(), server_hostname="127.0.0.1")
        with secured(tls, certificate) as connection:
            connection.sendall(LIVE)
            assert receive(connection).status == 200
        assert is_closed(silent)
        assert is_closed(started)
    assert tls.workers() == before


def test_connection_reset_before_the_handshake_ends_no_worker(tls, certificate):
    """The worker accepts it, and its first operation fails."""
    (pid,) = tls.workers()
    for data in (b"", b"\x16\x03\x01"):
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(3):
                with connected(tls, data) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            os.kill(pid, signal.SIGCONT)
        with secured(tls, certificate) as connection:
            connection.sendall(LIVE)
            assert receive(connection).status == 200
    assert tls.workers() == [pid]
    assert "Traceback" not in tls.log


def is_answered(connection):
    with connection:
        connection.sendall(head("GET", "/"))
        return receive(connection).status == 200


def test_client_certificates_are_verified(tmp_path, certificate):
    cert, key = certificate
    settings = write_probe(tmp_path)
    flags = ("--certfile", cert, "--keyfile", key, "--ca-certs", cert, "--cert-reqs", "2", "-w", "1", "-c", settings)
    with serve(tmp_path, *flags) as service:
        with secured(service, certificate, own=True) as connection:
            connection.sendall(head("GET", "/"))
            environ = receive(connection).json()
            assert (environ["wsgi.url_scheme"], environ["REMOTE_ADDR"]) == ("https", "127.0.0.1")
        with pytest.raises((ssl.SSLError, ConnectionError)):  # in TLS 1.3 the first read fails
            is_answered(secured(service, certificate))


# --- gunicorn's own workers


CHUNKED = head("POST", RELU_PATH, "Transfer-Encoding: chunked")


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_service_runs_under_gunicorns_own_workers(tmp_path, kind):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    config = write_config(tmp_path, {"name": "relu", "base_path": "relu"})
    with serve(tmp_path, "-w", "2", "-k", kind, config=config, OVMS_REST_MAX_BODY_BYTES="100000") as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        for _ in range(4):
            assert works(service)
        array = np.arange(-2000, 2000, dtype=np.float32).reshape(-1, 4)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1000, 4]}
        text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        answer = service.infer("relu", text + array.tobytes(), Inference_Header_Content_Length=str(len(text)))
        assert answer.body.endswith(np.maximum(array, 0).tobytes())
        (answer,) = parse(exchange(service, post_chunked(RELU_PATH, RELU[:9], RELU[9:])), "POST")
        assert answer.json()["outputs"][0]["data"] == RELU_DATA
        for data, status in (
            (head("GET", "/v2/health/ready"), 200),
            (head("HEAD", "/v2"), 200),
            (head("GET", "/nothing"), 404),
            (post(RELU_PATH, b"{"), 400),
            (post(RELU_PATH, b"x" * 100_001), 413),
            (post(RELU_PATH, RELU)[:-5], 400),
            (CHUNKED + b"5\r\nab", 400),
            (CHUNKED + b"x\r\n", 400),
            (CHUNKED + b"1\r\na\r\n0\r\nHost: x\r\n\r\n", 400),
            (CHUNKED + b"1\r\na\r\n0\r\nno colon\r\n\r\n", 400),
            (b"BROKEN\r\n\r\n", 400),
        ):
            (answer,) = parse(exchange(service, data), data.split()[0].decode())
            assert answer.status == status, data
            assert status == 200 or answer.json().keys() == {"error"}
        before = service.workers()
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: replaced(service, before))
        assert works(service)
        assert "Traceback" not in service.log
