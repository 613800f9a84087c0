"""A WSGI application under the worker, gunicorn's limits, and the service under gunicorn's own workers."""

import json
import signal
import socket
import ssl

import model_zoo
import numpy as np
import pytest
from processes import replaced
from raw_http import (
    LIVE,
    RELU,
    RELU_PATH,
    connected,
    exchange,
    head,
    parse,
    post,
    post_chunked,
    receive,
    receive_rest,
)
from service import run_to_end, serve, write_config
from workers import CHUNKED, MIB, inferred, works

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
    reloading = SimpleNamespace(is_due=lambda: False, forget_deaths=lambda born: None)
    log_levels = SimpleNamespace(install=lambda: None)
    managed = Managed(settings, WorkerTable(SLOTS, 1), reloading, log_levels, "nowhere")

    def set_ports(self, service, control):
        pass

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


def write_probe(directory):
    """Write the application above, and settings for gunicorn that import ours and name it; return their path."""
    (directory / "probe.py").write_text(PROBE)
    path = directory / "settings.py"
    path.write_text(
        "from ovms_rest.arbiter.gunicorn_settings import *\n\n"
        f'wsgi_app = "probe:app"\npythonpath = {str(directory)!r}\n'
    )
    return str(path)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("probe")
    path = directory / "socket"
    with serve(directory, "-w", "1", "-b", f"unix:{path}", "-c", write_probe(directory)) as running:
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


def test_script_name_is_the_mount_path(tmp_path):
    """Where the service is mounted below a path: gunicorn's documentation of SCRIPT_NAME (WSGI's, PEP 3333)."""
    with serve(tmp_path, "-w", "1", "-c", write_probe(tmp_path), SCRIPT_NAME="/prefix") as service:
        environ = service.get("/prefix/environ?a").json()
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"], environ["QUERY_STRING"]) == ("/prefix", "/environ", "a")


def test_client_certificates_are_verified(tmp_path, certificate):
    cert, key = certificate
    flags = ("--certfile", cert, "--keyfile", key, "--ca-certs", cert, "--cert-reqs", "2")
    context = ssl.create_default_context(cafile=cert)

    def environ_of(service):
        with context.wrap_socket(service.connect(), server_hostname="127.0.0.1") as connection:
            connection.sendall(head("GET", "/"))
            return receive(connection).json()

    with serve(tmp_path, "-w", "1", "-c", write_probe(tmp_path), *flags) as service:
        with pytest.raises((ssl.SSLError, ConnectionError)):  # in TLS 1.3 the first read fails
            environ_of(service)
        context.load_cert_chain(cert, key)
        environ = environ_of(service)
        assert (environ["wsgi.url_scheme"], environ["REMOTE_ADDR"]) == ("https", "127.0.0.1")


# --- Limits


def test_gunicorns_limits_are_flags(start):
    service = start(1, "--limit-request-line", "100", "--limit-request-fields", "3", "--limit-request-field_size", "50")
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


def test_default_body_limit_is_256_mib(probe):
    field = "Expect: 100-continue"
    with connected(probe, head("POST", "/", f"Content-Length: {256 * MIB}", field)) as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    with connected(probe, head("POST", "/", f"Content-Length: {256 * MIB + 1}", field)) as connection:
        assert parse(receive_rest(connection), "POST")[0].status == 413


@pytest.mark.parametrize("argument", ["--proxy-protocol", "--http-protocols=h2,h1"])
def test_unsupported_setting_ends_the_start(tmp_path, models, argument):
    ended = run_to_end(tmp_path, argument, OVMS_REST_CONFIG=str(models))
    assert ended.returncode == 1
    assert f"{argument[2:].partition('=')[0].replace('-', '_')} is not supported" in ended.stderr


# --- gunicorn's own workers


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
        assert inferred(answer)
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
