"""The logs of a worker, gunicorn's access log and the service's own, and the hooks of users."""

import json
import os
import re
import signal
import threading
import time
from datetime import datetime

import pytest
from processes import wait_until_reopened
from raw_http import LIVE, RELU, RELU_PATH, connected, exchange, head, parse, post, receive
from workers import SLOW, several, used, works

# --- gunicorn's access log


def test_gunicorns_access_log_has_a_line_per_request(tmp_path, start):
    layout = "%(h)s|%(m)s|%(U)s|%(q)s|%(H)s|%(s)s|%(B)s|%({x-a}i)s|%({content-type}o)s|%(r)s|%(a)s|"
    path = tmp_path / "access"
    service = start(1, "--access-logfile", str(path), "--access-logformat", layout)
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


def test_gunicorns_access_log_has_refused_requests(tmp_path, start):
    """The access log is where one looks first for the reason of errors."""
    path = tmp_path / "access"
    limits = {"OVMS_REST_MAX_WAITING": "1", "OVMS_REST_MAX_BODY_BYTES": "1000"}
    service = start(1, "--access-logfile", str(path), **limits)
    with several(service, 5, SLOW) as connections:
        statuses = sorted(receive(connection, "POST").status for connection in connections)
    assert statuses[-1] == 503
    exchange(service, head("POST", RELU_PATH, "Content-Length: 1001"))
    exchange(service, LIVE)
    service.wait_for(lambda: "/v2/health/live" in path.read_text())
    assert sorted(re.findall(r'" (\d+) ', path.read_text())) == sorted([*map(str, statuses), "413", "200"])


def test_logs_are_reopened_by_sigusr1(tmp_path, start):
    paths = gunicorns, own = tmp_path / "access", tmp_path / "lines"
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": str(own)}
    service = start(2, "--access-logfile", str(gunicorns), **variables)
    before = service.workers()
    for _ in range(2):
        assert works(service)
        for path in paths:
            service.wait_for(lambda path=path: has_lines(path, 1))  # a line is written after its response was sent
            path.rename(path.with_suffix(".old"))
        service.signal(signal.SIGUSR1)
        for path in paths:
            service.wait_for(path.exists)
            wait_until_reopened(service, path)
    for path in paths:
        assert RELU_PATH in path.with_suffix(".old").read_text()
    assert service.workers() == before


def test_sigusr1_during_writes_to_the_log_loses_no_line(tmp_path, start):
    path = tmp_path / "access"
    service = start(1, "--access-logfile", str(path))
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


# --- The access log of the service


@pytest.fixture(scope="module")
def shared(tmp_path_factory, start_shared):
    """One worker that writes a line of JSON for every request, and queues at most one."""
    path = tmp_path_factory.mktemp("logs") / "lines"
    limits = {"OVMS_REST_MAX_WAITING": "1", "OVMS_REST_MAX_BODY_BYTES": "1000"}
    service = start_shared(1, OVMS_REST_ACCESS_LOG="json", OVMS_REST_ACCESS_LOG_FILE=str(path), **limits)
    service.lines = path
    return service


@pytest.fixture
def observed(shared):
    """The same worker with an empty file."""
    os.truncate(shared.lines, 0)
    return shared


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
    with connected(observed, SLOW) as first, used(observed, 1) as (second,):
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
    with several(observed, 5, SLOW) as connections:
        statuses = [receive(connection, "POST").status for connection in connections]
    assert 503 in statuses
    assert sorted(line["status"] for line in lines_of(observed, 5)) == sorted(statuses)


def test_client_cannot_forge_an_access_log_line(observed):
    forged = json.dumps({"id": 'x\n{"status":200}\x1b[2J', **json.loads(RELU)}).encode()
    exchange(observed, post(RELU_PATH, forged), head("GET", "/v2\xc2\x9b31m%0Astatus"))
    lines = lines_of(observed, 2)
    assert lines[0]["id"] == 'x\n{"status":200}\x1b[2J'
    assert observed.lines.read_text().replace("\n", "").isprintable()


def test_text_access_log_goes_to_standard_output(start):
    service = start(1, OVMS_REST_ACCESS_LOG="text")
    assert works(service)
    found = service.wait_for(lambda: re.search(r"^time=.*\n", service.log, re.MULTILINE))[0]
    pairs = dict(pair.split("=", 1) for pair in found.split())
    assert (pairs["path"], pairs["status"], pairs["model"], pairs["version"]) == (RELU_PATH, "200", "relu", "1")
    assert "id" not in pairs


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/lines"])
def test_unwritable_access_log_costs_no_request(start, path):
    service = start(1, OVMS_REST_ACCESS_LOG="json", OVMS_REST_ACCESS_LOG_FILE=path)
    assert all(works(service) for _ in range(3))
    service.wait_for(lambda: "access log" in service.log)
    assert service.log.count("access log") == 1


def test_access_log_is_off_by_default(tmp_path, start):
    service = start(1, OVMS_REST_ACCESS_LOG_FILE=str(tmp_path / "lines"))
    assert works(service)
    assert not (tmp_path / "lines").exists()
    assert RELU_PATH not in service.log


# --- Hooks

HOOKS = """
from ovms_rest.arbiter.gunicorn_settings import *


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


@pytest.fixture
def hooked(tmp_path, start):
    (tmp_path / "settings.py").write_text(HOOKS)
    return start(1, "-c", str(tmp_path / "settings.py"))


def test_users_hooks_see_every_request(hooked):
    with connected(hooked) as connection:
        connection.sendall(head("GET", "/v2?a", "X-A: b") + post(RELU_PATH, RELU) + head("GET", "/v2?fail-after"))
        assert [receive(connection).status for _ in range(3)] == [200] * 3
        connection.sendall(head("GET", "/v2?fail-before"))
        answer = receive(connection)
        assert (answer.status, list(answer.json())) == (500, ["error"])
    hooked.wait_for(lambda: "the hook before failed" in hooked.log)
    assert "before GET /v2 b of 127.0.0.1" in hooked.log
    assert re.search(r"after /v2 200 OK [1-9]\d+\n", hooked.log)
    assert f"after {RELU_PATH} 200 OK 123" in hooked.log
    assert "the hook after failed" in hooked.log
    assert "hook when_ready" in hooked.log
    hooked.signal(signal.SIGINT)
    assert hooked.process.wait(20) == 0
    assert "hook worker_int" in hooked.log


def test_users_hooks_see_a_deferred_call_once(hooked, models):
    """A reload takes many times as long as the interval at which the worker polls its outcome."""
    reload = head("POST", "/v1/config/reload", "Content-Length: 0", "X-A: b")
    with connected(hooked, reload) as connection:
        assert receive(connection, "POST").status == 200
    for file in models.parent.rglob("*.xml"):
        os.utime(file)
    with connected(hooked, reload) as connection:
        assert receive(connection, "POST").status == 201
    hooked.wait_for(lambda: hooked.log.count("after /v1/config/reload") == 2)
    assert hooked.log.count("before POST /v1/config/reload b") == 2
