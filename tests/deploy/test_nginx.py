"""deploy/nginx: each variant with a real nginx in front of the real service, including wrong keys and bypasses."""

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import crashing_nodes
import model_zoo
import nginx
import numpy as np
import pytest
import slow_models
from raw_http import RELU, RELU_PATH, Load, chunk, head, post, post_chunked
from service import PATIENCE, environment, receive, serve
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from ovms_rest.settings import Settings

pytestmark = pytest.mark.skipif(
    nginx.PROGRAM is None or not (nginx.DEBIAN / "nginx.conf").exists(), reason="Debian's package nginx is missing"
)

KEY, OTHER_KEY, OPERATOR_KEY = "0123456789abcdef0123456789abcdef", "f" * 32, "a0" * 16


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The service as in README.md: two workers, a control address, and sockets in its directory."""
    directory = tmp_path_factory.mktemp("service")
    models = {
        "relu": model_zoo.relu(),
        "my modèl": model_zoo.relu(),
        "counting": slow_models.counting(),
        "filling": slow_models.filling(),
        "vector": model_zoo.relu((-1,)),
    }
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    config = model_zoo.save_all(directory, models, lambda _: exact, **crashing_nodes.save(directory))
    with serve(
        directory,
        "-w",
        "2",
        bind=("-b", "127.0.0.1:0", "-b", f"unix:{directory}/data.sock"),
        config=config,
        OVMS_REST_CONTROL_BIND=f"unix:{directory}/control.sock",
        OVMS_REST_METRICS_ENABLE="true",
        OVMS_REST_ACCESS_LOG="json",
    ) as running:
        running.directory = directory
        running.wait_for_workers(3)
        yield running


@pytest.fixture(scope="module")
def plain(service, tmp_path_factory):
    with nginx.run(tmp_path_factory.mktemp("nginx") / "plain", service.directory, "http") as running:
        yield running


def make_certificate(directory, name, *arguments):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *arguments],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip


@contextlib.contextmanager
def run_tls(directory, service, *variants):
    """Run nginx with a certificate for 127.0.0.1; `clients_ca` has signed the certificate of `alice`, not `mallory`."""
    ports = nginx.install(directory, service.directory, *variants)
    tls = directory / "ovms_rest" / "tls"
    tls.mkdir()
    make_certificate(tls, "server", "-addext", "subjectAltName=IP:127.0.0.1")
    for name in ("clients_ca", "other_ca"):
        make_certificate(tls, name)
    for name, authority in (("alice", "clients_ca"), ("mallory", "other_ca")):
        make_certificate(tls, name, "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key")
    with nginx.start(directory, *ports) as running:
        running.tls = tls
        yield running


def curl(running, path, *arguments, scheme="https"):
    """Request a path with curl; return curl's exit status and the response."""
    trust = ["--cacert", str(running.tls / "server.crt")] if scheme == "https" else []
    done = subprocess.run(
        ["curl", "-sS", "-D", "/dev/stderr", "--path-as-is", *trust, *arguments, "-w", "\n%{http_code} %{http_version}",
         f"{scheme}://127.0.0.1:{running.port}{path}"],
        capture_output=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    body, _, line = done.stdout.rpartition(b"\n")
    status, version = line.split()
    head = done.stderr.decode("latin-1")
    return SimpleNamespace(exit=done.returncode, status=int(status), version=version.decode(), head=head, body=body)


def error_of(answer, *statuses):
    """Check that a response is an error in JSON, with one of these statuses if any are given; return its text."""
    assert not statuses or answer.status in statuses, answer
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def infer_with_tritonclient(port, model, values, binary=True, **options):
    """Infer with one input x; return the output y."""
    with InferenceServerClient(f"127.0.0.1:{port}", network_timeout=PATIENCE) as client:
        x = InferInput("x", list(values.shape), "FP32")
        x.set_data_from_numpy(values, binary_data=binary)
        outputs = [InferRequestedOutput("y", binary_data=binary)]
        return client.infer(model, [x], outputs=outputs, **options).as_numpy("y")


def infers(answer):
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]


# --- Routes


OPEN = [
    ("GET", "/"),
    ("GET", "/v2"),
    ("HEAD", "/v2"),
    ("GET", "/v2/"),
    ("GET", "/v2/models"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2/models/relu"),
    ("GET", "/v2/models/relu/versions/1/ready"),
    ("GET", "/v2/models/relu/versions/1/config"),
    ("GET", "/v2/models/my%20mod%C3%A8l"),
    ("GET", "/v2/models/re%6Cu/ready"),
    ("GET", "/v2/models/absent%25"),
    ("GET", "/v2/models/relu/versions/7/ready"),
    ("POST", "/v2/models/relu"),
    ("GET", "/v2/models/relu/infer"),
    ("OPTIONS", "/v2/models/relu/infer"),
    ("POST", "/v2/models/absent/infer?x=1"),
    ("GET", "/v1/models/relu"),
    ("GET", "/v1/models/my%20mod%C3%A8l/versions/1/metadata"),
    ("POST", "/v1/models/relu:classify"),
    ("POST", "/v1/models/absent:predict"),
]


def test_browsers_are_not_redirected_to_the_console_which_is_not_passed_on(plain):
    answer = plain.request("GET", "/", headers={"Accept": "text/html"})
    assert (answer.status, answer.json()["name"]) == (200, "ovms_rest")


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_open_route_responds_like_the_service(service, plain, method, path):
    through, direct = plain.request(method, path), service.request(method, path)
    assert (through.status, through.body) == (direct.status, direct.body)
    assert through.headers.get("content-type") == direct.headers.get("content-type")
    assert through.headers.get("allow") == direct.headers.get("allow")


@pytest.mark.parametrize("path", ["/v2/models/relu/infer", "/v2/models/my%20mod%C3%A8l/versions/1/infer/"])
def test_inference(plain, path):
    assert infers(plain.request("POST", path, RELU))


@pytest.mark.parametrize("path", ["/v1/models/relu:predict", "/v1/models/my%20mod%C3%A8l/versions/1:predict"])
def test_prediction_of_tensorflow_serving(plain, path):
    answer = plain.request("POST", path, b'{"instances": [[1, -2, 3, -4]]}')
    assert (answer.status, answer.json()) == (200, {"predictions": [[1, 0, 3, 0]]})


CLOSED = [
    ("GET", "/metrics"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/relu/load"),
    ("POST", "/v2/repository/models/relu/unload"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v1/config"),
    ("POST", "/v1/config/reload"),
]


def spellings(path):
    """Return paths that some server could take for this one."""
    first, rest = path[1], path[2:]
    last = path.rpartition("/")[2]
    return [
        path,
        f"{path}/",
        f"{path}//",
        f"{path}?x=/v2/models/relu/infer",
        f"{path}#/v2/models/relu/infer",
        f"{path};/v2/models/relu/infer",
        f"/{path}",
        f"/.{path}",
        f"/v2/models/..{path.removeprefix('/v2')}" if path.startswith("/v2") else f"/v2/..{path}",
        f"/v2/models/relu/infer/../../../..{path}",
        f"/v2/models/relu/%2e%2e/%2E%2E/..{path}",
        f"/v2/models/relu/..%2f..%2f..{path}",
        f"/%2e{path}",
        f"/%{ord(first):x}{rest}",
        f"/%25{ord(first):x}{rest}",
        path.removesuffix(last) + "".join(f"%{ord(letter):02X}" for letter in last),
        path[0] + path[1:].replace("/", "%2f"),
        path[0] + path[1:].replace("/", "%2F"),
        path[0] + path[1:].replace("/", "%5c"),
        path[0] + path[1:].replace("/", "//"),
        path[0] + path[1:].replace("/", "/./"),
        path.upper(),
        path.replace(last, last.capitalize()),
        f"{path}%20",
        f"{path}%0a",
        f"{path}%00",
        f"{path}/.",
        f"{path}/x/..",
        f"http://ovms_rest{path}",
        f"http://localhost:9000{path}",
        quote(path, safe=""),
        f"*{path}",
    ]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_operators_route_is_closed_to_clients_in_every_spelling(service, plain, method, path):
    for number, target in enumerate(spellings(path)):
        fields = (f"X-Request-ID: {method}-{path}-{number}", "Content-Length: 0", "Connection: close")
        with plain.connect() as connection:
            connection.sendall(head(method, target, *fields))
            answer = receive(connection, method)
        assert error_of(answer, 400, 403, 404), target
    # The service got none of them: the workers have logged later requests and not these.
    for later, route in (("control", "/v2"), ("data", RELU_PATH)):
        marker = f"{method}-{path}-{later}"
        plain.request("GET", route, headers={"X-Request-ID": marker})
        service.wait_for(lambda marker=marker: f'"{marker}"' in service.log)
    assert not re.search(rf'"{method}-{path}-\d+"', service.log)


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_operators_reach_all_routes_at_their_address(plain, method, path):
    path = path.replace("relu", "fragile")  # a pipeline, which is loaded quickly
    body = b'{"log_verbose_level": 0}' if (method, path) == ("POST", "/v2/logging") else None
    answer = plain.operators.request(method, path, body)
    assert answer.status == 200, answer
    plain.wait_for(lambda: plain.operators.request("POST", "/v2/repository/models/fragile/load").status == 200)


@pytest.mark.parametrize("headers", [{}, {"Host": "evil.example"}])
def test_page_of_another_site_cannot_unload_a_model_at_the_operators_address(plain, headers):
    headers = {"Origin": "http://evil.example", **headers}
    assert plain.operators.request("POST", "/v2/repository/models/relu/unload", headers=headers).status == 403


def test_health_does_not_wait_for_inferences(plain):
    slow = post("/v2/models/counting/infer", json.dumps(slow_models.count(4 * slow_models.SLOW)).encode())
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(plain.connect()) for _ in range(2)]
        for connection in connections:
            connection.sendall(slow)
        for _ in range(2):
            assert plain.get("/v2/health/ready").status == 200
            assert plain.get("/v2/models/relu").status == 200
        for connection in connections:  # none has a response yet
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            connection.setblocking(True)
        for connection in connections:  # so that other tests do not count these inferences as theirs
            assert receive(connection, "POST").status == 200


# --- Clients


def test_tritonclient(plain):
    with InferenceServerClient(f"127.0.0.1:{plain.port}") as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("relu")["name"] == "relu"
    values = np.array([[1, -2, 3, -4]], np.float32)
    for binary in (True, False):
        assert (infer_with_tritonclient(plain.port, "relu", values, binary) == np.maximum(values, 0)).all()


def test_chunked_bodies_and_http_1_0_without_a_host_work(plain):
    assert infers(plain.raw(post_chunked(RELU_PATH, RELU[:20], RELU[20:])))
    assert plain.raw(b"GET /v2 HTTP/1.0\r\n\r\n").status == 200


def test_tensor_of_20_megabytes_passes_in_both_directions(plain):
    values = np.arange(-2_500_000, 2_500_000, dtype=np.float32)
    assert (infer_with_tritonclient(plain.port, "vector", values) == np.maximum(values, 0)).all()


# --- nginx's own responses


MALFORMED = [
    (b"NONSENSE\r\n\r\n", 400),
    (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
    (b"GET /v2 HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"get /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /../.. HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (head("POST", RELU_PATH, "Content-Length: x"), 400),
    (head("POST", RELU_PATH, "Content-Length: 1", "Transfer-Encoding: chunked"), 400),
    (head("TRACE", "/v2"), 405),
    (head("GET", "/" + 9000 * "a"), 414),
    (head("GET", "/v2", "X: " + 9000 * "a"), 431),
    (head("GET", "/v2", *5000 * ["X: 1234567890"]), 431),
    (head("POST", RELU_PATH, "Transfer-Encoding: gzip"), 501),
    (head("GET", "/v2", version="3.0"), 505),
]


def check_malformed(running):
    for data, status in MALFORMED:
        with running.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            answer = receive(connection)
        assert error_of(answer, status), data[:50]
        assert answer.headers["x-request-id"]


def test_malformed_head_is_refused_in_json(plain):
    check_malformed(plain)


def test_malformed_chunk_is_refused_in_json(plain):
    answer = plain.raw(head("POST", RELU_PATH, "Transfer-Encoding: chunked") + b"zz\r\n")
    assert "malformed request" in error_of(answer, 400)


def test_unknown_path_is_404_in_json(plain):
    for path in ("/nothing", "/v2/models/relu/nothing", "/v2/models/relu/versions/x/infer", "/v3/chat", "//v2"):
        assert error_of(plain.get(path), 404) == "unknown path; GET / lists the routes"


def test_405_from_nginx_names_the_methods(plain):
    assert plain.raw(head("TRACE", "/v2", "Connection: close")).headers["allow"] == "GET, HEAD, OPTIONS, POST"


@pytest.mark.parametrize(("path", "size"), [(RELU_PATH, 2**28), ("/v2", 2**20)])
def test_body_above_the_limit_is_413_in_json(plain, path, size):
    assert "256 MiB" in error_of(plain.raw(head("POST", path, f"Content-Length: {size + 1}")), 413)
    if path == "/v2":
        data = head("POST", path, "Transfer-Encoding: chunked") + chunk(bytes(size + 1))
        with plain.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            assert receive(connection).status == 413


def test_body_limit_equals_the_services():
    assert Settings().max_body_bytes == 256 * 2**20
    assert "client_max_body_size 256m;" in (nginx.DEPLOY / "ovms_rest" / "routes.conf").read_text()


def test_502_in_json_with_retry_after_while_the_service_is_down(tmp_path):
    with nginx.run(tmp_path / "nginx", tmp_path / "absent", "http") as running:
        for method, path in (("GET", "/v2"), ("POST", RELU_PATH)):
            answer = running.request(method, path)
            assert "does not respond" in error_of(answer, 502)
            assert answer.headers["retry-after"] == "1"
        assert running.get("/nothing").status == 404


def test_inference_above_the_limit_is_503_and_one_that_takes_too_long_504(service, tmp_path):
    replaced = {"ovms_rest_inferences 256;": "ovms_rest_inferences 1;", "timeout 120s;": "timeout 100ms;"}
    slow = json.dumps(slow_models.count(4 * slow_models.SLOW)).encode()
    with nginx.run(tmp_path / "nginx", service.directory, "http", **replaced) as running, running.connect() as first:
        before = inferences(service, "counting")
        begin(first, "/v2/models/counting/infer", slow, "Connection: close")
        first.sendall(slow)

        def refused():
            answer = running.infer("relu", RELU)
            return answer if answer.status == 503 else None

        answer = running.wait_for(refused)
        assert "too many requests are in progress" in error_of(answer)
        assert answer.headers["retry-after"] == "1"
        assert "too long" in error_of(receive(first, "POST"), 504)
        first.close()  # else nginx would count it for another 5 s
        running.wait_for(lambda: running.infer("relu", RELU).status == 200)
    service.wait_until_idle()
    assert inferences(service, "counting") == before + 1  # it was not sent again


def test_limit_of_a_client_leaves_others_alone(service, tmp_path):
    replaced = {"ovms_rest_clients 128;": "ovms_rest_clients 1;"}
    with nginx.run(tmp_path / "nginx", service.directory, "http", **replaced) as running, running.connect() as first:
        begin(first, RELU_PATH, RELU)  # an unfinished upload
        running.wait_for(lambda: running.infer("relu", RELU).status == 503)
        assert running.get("/v2").status == 200  # the limit counts only inferences
        with socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0)) as other:
            other.sendall(post(RELU_PATH, RELU, "Connection: close"))
            assert receive(other, "POST").status == 200
        first.sendall(RELU)
        assert receive(first, "POST").status == 200


def begin(connection, path, body, *fields):
    """Send the head of a request and wait until nginx, which then asks for the body, has counted it."""
    connection.sendall(head("POST", path, f"Content-Length: {len(body)}", "Expect: 100-continue", *fields))
    expected = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert connection.recv(len(expected), socket.MSG_WAITALL) == expected


def inferences(service, model):
    return service.get(f"/v2/models/{model}/stats").json()["model_stats"][0]["execution_count"]


# --- Requests as the service receives them


class Backend:
    """Replaces the service: records requests and sends `answers` in turn; None closes the connection."""

    def __init__(self, path: Path, *answers: bytes | None) -> None:
        self.requests: list[bytes] = []
        self._answers = list(answers)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                data = b""
                while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < length_of(data):
                    if not (piece := connection.recv(65536)):
                        return  # from `close`
                    data += piece
                self.requests.append(data)
                if (answer := self._answers.pop(0)) is not None:
                    connection.sendall(answer)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self._listener.getsockname())
        self._thread.join(PATIENCE)
        self._listener.close()


def length_of(data):
    found = re.search(rb"\r\ncontent-length: (\d+)\r\n", data, re.IGNORECASE)
    return int(found[1]) if found else 0


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@contextlib.contextmanager
def in_front_of(directory, data=(), control=()):
    """Run nginx in front of backends with these answers; yield it and the requests of each backend."""
    backends = [Backend(directory / "data.sock", *data), Backend(directory / "control.sock", *control)]
    try:
        with nginx.run(directory / "nginx", directory, "http") as running:
            yield running, *(backend.requests for backend in backends)
    finally:
        for backend in backends:
            backend.close()


def fields_of(request):
    lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    return lines[0], {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}


def test_service_gets_time_id_and_origin_of_a_request(tmp_path):
    with in_front_of(tmp_path, [OK, OK]) as (running, data, _):
        forged = {"X-Forwarded-For": "10.0.0.1", "X-Real-IP": "10.0.0.1", "Forwarded": "for=10.0.0.1"}
        forged |= {"X-Request-Start": "t=1", "Authorization": "Basic eDp5", "X-Request-ID": "mine"}
        before = time.time()
        running.request("POST", "/v2/models/a%20b/infer?q=%2f", b"{}", forged)
        line, fields = fields_of(data[0])
        assert line == "POST /v2/models/a%20b/infer?q=%2f HTTP/1.1"
        assert before - 0.01 <= float(fields["x-request-start"].removeprefix("t=")) <= time.time() + 0.01
        assert fields["x-request-id"] == "mine"
        assert fields["x-forwarded-for"] == fields["x-real-ip"] == "127.0.0.1"
        assert fields["x-forwarded-proto"] == "http"
        assert fields["x-forwarded-host"] == fields["host"] == f"127.0.0.1:{running.port}"
        assert fields["x-forwarded-port"] == str(running.port)
        assert "forwarded" not in fields
        assert "authorization" not in fields
        running.request("POST", RELU_PATH, b"{}", {"X-Request-ID": "two words"})
        assert re.fullmatch("[0-9a-f]{32}", fields_of(data[1])[1]["x-request-id"])


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        ("/v2/models/x/../relu/./infer", "/v2/models/relu/infer"),
        ("/v2/models/re%6cu/%69nfer", "/v2/models/relu/infer"),
        ("/v2/models/relu%2finfer", "/v2/models/relu/infer"),
        ("/v2/repository/models/relu/load/../../../../models/relu/infer", "/v2/models/relu/infer"),
        ("/v2/models/a%25%3f%23%20b%22/infer?a=1&b=%20", "/v2/models/a%25%3F%23%20b%22/infer?a=1&b=%20"),
    ],
)
def test_service_gets_the_path_by_which_nginx_decided(tmp_path, sent, passed):
    with in_front_of(tmp_path, [OK]) as (running, data, _):
        assert running.raw(head("POST", sent, "Content-Length: 0", "Connection: close")).status == 200
        line, _ = fields_of(data[0])
        assert line.replace("%22", '"') == f"POST {passed} HTTP/1.1".replace("%22", '"')


# --- Workers that die


def test_inference_whose_worker_died_is_sent_twice_more_with_its_body_and_first_time(tmp_path):
    body = bytes(6_000_000)  # more than stays in memory
    with in_front_of(tmp_path, [None, None, OK, None, None, None]) as (running, data, _):
        assert running.request("POST", "/v2/models/m/infer", body, {"X-Request-Attempt": "7"}).status == 200
        assert [request.partition(b"\r\n\r\n")[2] for request in data] == [body, body, body]
        fields = [fields_of(request)[1] for request in data]
        assert len({(each["x-request-start"], each["x-request-id"]) for each in fields}) == 1
        assert [each.get("x-request-attempt") for each in fields] == [None, "2", "3"]
        answer = running.request("POST", "/v2/models/m/infer", b"{}")
        assert "does not respond" in error_of(answer, 502)
        assert answer.headers["retry-after"] == "1"
        assert len(data) == 6


def test_health_check_is_sent_once_more_and_a_load_is_not(tmp_path):
    with in_front_of(tmp_path, control=[None, OK, None, None]) as (running, _, control):
        assert running.get("/v2/health/ready").status == 200
        for action in ("load", "unload"):
            assert running.operators.request("POST", f"/v2/repository/models/relu/{action}").status == 502
        assert len(control) == 4


def test_error_of_the_service_passes_unchanged_and_is_not_sent_again(tmp_path):
    refusal = b'HTTP/1.1 503 X\r\nRetry-After: 7\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{"error":"x"}'
    with in_front_of(tmp_path, [refusal]) as (running, data, _):
        answer = running.request("POST", RELU_PATH, b"{}")
        assert (answer.status, answer.body, answer.headers["retry-after"]) == (503, b'{"error":"x"}', "7")
        assert len(data) == 1


def test_clients_do_not_notice_that_workers_are_killed_during_inferences(service, plain):
    with Load(plain.connect, clients=6) as load:
        for _ in range(6):
            before = load.answered
            plain.wait_for(lambda before=before: load.answered > before + 100 or load.failures)
            victim = service.workers()[0]  # data workers and the control worker
            os.kill(victim, signal.SIGKILL)
            assert plain.get("/v2/health/live").status == 200
            service.wait_for(lambda victim=victim: victim not in service.workers())
            service.wait_for(lambda: len(service.workers()) == 3)
    assert load.failures == []


def deaths(service):
    """Return the deaths during an inference with the pipeline, by how the workers ended."""
    return re.findall(r"worker \d+ (.*?) during an inference with 'fragile/1'", service.log)


def test_request_that_crashes_kills_one_worker_and_its_inputs_two(service, plain):
    before = len(deaths(service))
    # So that nginx has kept-alive connections to both workers.
    with Load(plain.connect, clients=8) as load:
        plain.wait_for(lambda: load.answered > 400)
        for number in range(20):
            answer = plain.infer("fragile", crashing_nodes.request(crashing_nodes.CRASH, 1), X_Request_ID=f"p{number}")
            assert "died of SIGSEGV during an inference with model 'fragile'" in error_of(answer, 500)
    assert load.failures == []
    assert deaths(service)[before:] == ["died of SIGSEGV"] * 2
    for number in range(2):
        assert f"request 'p{number}' alone; refused for 60 s" in service.log
    assert "refused requests that repeat a crash: " in service.log
    assert plain.infer("fragile", crashing_nodes.request(1, 1)).status == 200
    text = plain.operators.get("/metrics").body.decode()
    assert 'ovms_rest_crashes{name="fragile",version="1"} 2.0' in text
    assert 'ovms_rest_requests_refused{kind="crashed",name="fragile",version="1"} 20.0' in text
    service.wait_for_workers(3)


def test_model_that_crashes_with_different_requests_is_paused(service, plain):
    before, statuses = len(deaths(service)), []
    with Load(plain.connect, clients=4) as load:
        for number in range(20):
            values = crashing_nodes.CRASH, 2, number
            statuses.append(plain.infer("fragile", crashing_nodes.request(*values)).status)
    assert load.failures == []
    crashed = len(deaths(service)) - before
    assert crashed <= 5
    assert statuses == [500] * crashed + [503] * (20 - crashed)
    service.wait_for_workers(3)
    service.wait_for(lambda: plain.infer("fragile", crashing_nodes.request(1, 1)).status == 200)


def test_request_whose_worker_is_killed_is_run_once_more(service, plain):
    before = len(deaths(service))
    answer = plain.infer("fragile", crashing_nodes.request(crashing_nodes.KILL, 3))
    assert "was killed by SIGKILL during an inference with model 'fragile'" in error_of(answer, 500)
    assert deaths(service)[before:] == ["was killed by SIGKILL"] * 2
    service.wait_for_workers(3)


# --- API keys


def write_keys(directory, keys, rights):
    (directory / "ovms_rest" / "api_keys.keys.conf").write_text(keys)
    (directory / "ovms_rest" / "api_keys.rights.conf").write_text(rights)


@contextlib.contextmanager
def run_with_keys(directory, service):
    """Run nginx with three holders: alice may use relu, bob may see the server, the operator may do everything."""
    ports = nginx.install(directory, service.directory, "http", "api_keys")
    write_keys(
        directory,
        f"{KEY} alice;\n{OTHER_KEY} bob;\n{OPERATOR_KEY} operator;\n",
        '"~^alice (infer|model) relu$" yes;\n"~^(alice|bob) (server|health) -$" yes;\n"~^operator .*$" yes;\n',
    )
    with nginx.start(directory, *ports) as running:
        yield running


@pytest.fixture(scope="module")
def keys(service, tmp_path_factory):
    with run_with_keys(tmp_path_factory.mktemp("nginx") / "keys", service) as running:
        yield running


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}"),
        *("Bearer alice", "Bearer default", "Bearer include", "Bearer .*", f"Bearer {KEY} infer relu"),
        *(f"Bearer {KEY[:-1]}", f"Bearer {KEY[1:]}", f"Bearer {KEY}0", f"Bearer 0{KEY}", f"Bearer {'0' * 32}"),
        *(f"Bearer {KEY.upper()}", f"Bearer {KEY[:-1]}F", f"Bearer {KEY},", f"Bearer {KEY} {KEY}", f"Bearer  {KEY}"),
    ],
)
def test_wrong_key_is_refused_on_every_path(keys, value):
    headers = {} if value is None else {"Authorization": value}
    paths = [path for _, path in OPEN + CLOSED] + ["/nothing", "//v2", "/v2/models/../", RELU_PATH, "/ovms_rest_errors"]
    for path in paths:
        answer = keys.request("POST" if path.endswith("infer") else "GET", path, headers=headers)
        assert "API key" in error_of(answer, 401), path
        assert answer.headers["www-authenticate"] == 'Bearer realm="ovms_rest"'


def test_key_has_its_rights_and_no_others(keys):
    allowed = {
        (KEY, "POST", RELU_PATH): 200,
        (KEY, "GET", "/v2/models/relu/versions/1/config"): 200,
        (KEY, "GET", "/v2/models/re%6Cu/ready"): 200,
        (KEY, "GET", "/v2/health/ready"): 200,
        (KEY, "POST", "/v1/models/relu:predict"): 400,  # of the service, for an empty request
        (KEY, "GET", "/v1/models/relu/versions/1/metadata"): 200,
        (KEY, "POST", "/v1/models/vector:predict"): 403,
        (KEY, "POST", "/v1/models/vector/versions/1:predict"): 403,
        (KEY, "GET", "/v1/models/vector"): 403,
        (OTHER_KEY, "GET", "/v2"): 200,
        (OPERATOR_KEY, "POST", RELU_PATH): 200,
        (OPERATOR_KEY, "GET", "/metrics"): 200,
        (OPERATOR_KEY, "POST", "/v2/repository/models/relu/load"): 200,
        (OPERATOR_KEY, "GET", "/nothing"): 404,
        (OPERATOR_KEY, "GET", "/ovms_rest_error"): 404,
        (KEY, "GET", "/v2/models/relu/stats"): 403,
        (KEY, "GET", "/v2/models/stats"): 403,
        (KEY, "POST", "/v2/models/vector/infer"): 403,
        (KEY, "POST", "/v2/models/Relu/infer"): 403,
        (KEY, "POST", "/v2/models/relu2/infer"): 403,
        (KEY, "POST", "/v2/models/relu%0A/infer"): 403,
        (KEY, "POST", "/v2/models/vector%2finfer"): 403,
        (KEY, "POST", "/v2/models/relu/../vector/infer"): 403,
        (KEY, "POST", "/v2/models/relu%20/infer"): 403,
        (KEY, "GET", "/metrics"): 403,
        (KEY, "POST", "/v2/repository/models/relu/unload"): 403,
        (KEY, "POST", "/v2/repository/models/relu/infer"): 403,
        (KEY, "GET", "/nothing"): 403,
        (OTHER_KEY, "POST", RELU_PATH): 403,
        (OTHER_KEY, "GET", "/v2/models/relu"): 403,
    }
    found = {}
    for key, method, path in allowed:
        answer = keys.request(method, path, RELU if path.endswith("infer") else None, bearer(key))
        found[key, method, path] = answer.status
        if answer.status in (403, 404):
            assert error_of(answer)
    assert found == allowed


def test_two_keys_in_one_request_do_not_add_up(keys):
    data = post("/v2/models/vector/infer", b"{}", f"Authorization: Bearer {KEY}", f"Authorization: Bearer {OTHER_KEY}")
    assert keys.raw(data).status in (400, 401, 403)


def test_files_of_keys_and_rights_are_read_on_reload(service, tmp_path):
    with run_with_keys(tmp_path / "nginx", service) as running:
        file = running.directory / "ovms_rest" / "api_keys.keys.conf"
        new = "1" * 32
        file.write_text(file.read_text().replace(KEY, new))
        assert running.infer("relu", RELU, **bearer(KEY)).status == 200
        running.reload()
        assert running.infer("relu", RELU, **bearer(KEY)).status == 401
        assert running.infer("relu", RELU, **bearer(new)).status == 200
        rights = running.directory / "ovms_rest" / "api_keys.rights.conf"
        rights.write_text(rights.read_text().replace("(infer|model)", "model"))
        running.reload()
        assert running.infer("relu", RELU, **bearer(new)).status == 403


def test_malformed_head_is_refused_in_json_before_any_key(keys):
    check_malformed(keys)


def test_shipped_key_files_allow_nothing(service, tmp_path):
    with nginx.run(tmp_path / "nginx", service.directory, "http", "api_keys") as running:
        assert running.get("/v2").status == 401
        assert running.infer("relu", RELU, **bearer(KEY)).status == 401


# --- Basic auth, rates, compression


def test_basic_auth_requires_user_and_password_on_every_path(service, tmp_path):
    directory = tmp_path / "nginx"
    ports = nginx.install(directory, service.directory, "http", "basic_auth")
    hashed = subprocess.run(
        ["openssl", "passwd", "-apr1", "-stdin"], input="secret\n", capture_output=True, text=True, check=True
    ).stdout
    (directory / "ovms_rest" / "users").write_text(f"alice:{hashed}")
    with nginx.start(directory, *ports) as running:
        running.tls = None
        right = curl(running, RELU_PATH, "-u", "alice:secret", "-d", RELU.decode(), scheme="http")
        assert right.status == 200
        assert curl(running, "/metrics", "-u", "alice:secret", scheme="http").status == 403
        for wrong in ([], ["-u", "alice:Secret"], ["-u", "alice:"], ["-u", "Alice:secret"], ["-u", "bob:secret"]):
            for path in ("/metrics", "/v2/repository/index", "/nothing"):  # refused without asking for a password
                assert curl(running, path, *wrong, scheme="http").status in (403, 404)
            for path in ("/", "/v2", RELU_PATH, "/%76%32", "/V2/../v2", "/v2/models/relu/stats/"):
                answer = curl(running, path, *wrong, scheme="http")
                assert answer.status == 401, path
                assert "credential" in json.loads(answer.body)["error"]
                assert 'WWW-Authenticate: Basic realm="ovms_rest"' in answer.head
        check_malformed(running)


def test_client_above_its_rate_gets_429_with_retry_after_and_others_do_not(service, tmp_path):
    directory = tmp_path / "nginx"
    replaced = {"rate=100r/s": "rate=1r/m", "burst=100 nodelay": "burst=1 nodelay"}
    ports = nginx.install(directory, service.directory, "http", "rate_limit", **replaced)
    # So that the test can act as clients with other addresses.
    (directory / "conf.d" / "addresses.conf").write_text("set_real_ip_from 127.0.0.1; real_ip_header X-Address;\n")
    with nginx.start(directory, *ports) as running:

        def ask(address, path="/v2"):
            return running.request("GET", path, headers={"X-Address": address})

        for path in ("/v2", RELU_PATH):
            ask("192.0.2.1", path)
        for path in ("/v2", RELU_PATH, "/metrics", "/nothing"):
            answer = ask("192.0.2.1", path)
            # nginx runs `return` before it counts
            assert answer.status == 429 or path in ("/metrics", "/nothing")
            assert error_of(answer)
        refused = ask("192.0.2.1")
        assert "too many requests per second from this client" in error_of(refused)
        assert refused.headers["retry-after"] == "1"
        assert ask("192.0.2.2").status == 200
        assert [ask(f"2001:db8::{host}").status for host in range(1, 4)] == [200, 200, 429]
        assert ask("2001:db8:0:1::1").status == 200
        for _ in range(2):
            check_malformed(running)


def test_gzip_compresses_the_json_of_inferences_and_nothing_else(service, tmp_path):
    request = slow_models.fill(0.5, 1000)
    accepting = {"Accept_Encoding": "gzip, deflate"}
    with nginx.run(tmp_path / "nginx", service.directory, "http", "gzip") as running:
        binary = running.infer("filling", request, **accepting)
        assert binary.headers["inference-header-content-length"]
        assert "content-encoding" not in binary.headers
        del request["parameters"]
        answer = running.infer("filling", request, **accepting)
        assert answer.headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(answer.body))["outputs"][0]["data"] == [0.5] * 1000
        assert answer.headers["vary"] == "Accept-Encoding"
        assert "content-encoding" not in running.infer("filling", request).headers
        for path in ("/v2/models/stats", "/v2/models/relu/config", "/v2"):
            answer = running.request("GET", path, headers={"Accept-Encoding": "gzip"})
            assert "content-encoding" not in answer.headers
            assert answer.json()
        values = np.arange(1000, dtype=np.float32)
        algorithm = {"response_compression_algorithm": "gzip"}
        assert (infer_with_tritonclient(running.port, "vector", values, binary=False, **algorithm) == values).all()


def test_nothing_is_compressed_without_the_variant(plain):
    request = slow_models.fill(0.5, 1000)
    del request["parameters"]
    assert "content-encoding" not in plain.infer("filling", request, Accept_Encoding="gzip").headers


# --- TLS


def test_https_accepts_only_tls_1_3_and_no_plain_text(service, tmp_path):
    with run_tls(tmp_path / "nginx", service, "https") as running:
        answer = curl(running, RELU_PATH, "-d", RELU.decode())
        assert (answer.status, answer.version) == (200, "1.1")
        assert curl(running, "/v2", "--tls-max", "1.2").exit == 35
        assert curl(running, "/v2", "--tlsv1.3").status == 200
        assert error_of(running.get("/v2"), 400) == "this port accepts only HTTPS"
        assert curl(running, "/metrics").status == 403
        listening = (running.directory / "ovms_rest" / "servers.conf").read_text()
        assert "listen 80" not in listening
        trust = {"ca_certs": str(running.tls / "server.crt")}
        with InferenceServerClient(f"127.0.0.1:{running.port}", ssl=True, ssl_options=trust) as client:
            assert client.is_model_ready("relu")


def test_mutual_tls_accepts_only_certificates_from_its_authority(service, tmp_path):
    with run_tls(tmp_path / "nginx", service, "https", "mutual_tls") as running:

        def certificate(name):
            return ["--cert", str(running.tls / f"{name}.crt"), "--key", str(running.tls / f"{name}.key")]

        assert curl(running, RELU_PATH, "-d", RELU.decode(), *certificate("alice")).status == 200
        assert curl(running, "/metrics", *certificate("alice")).status == 403
        for wrong in ([], certificate("mallory"), certificate("server")):
            for path in ("/v2", RELU_PATH, "/metrics", "/nothing", "/ovms_rest_error"):
                answer = curl(running, path, *wrong)
                assert answer.status == 403
                assert "client certificate is required" in json.loads(answer.body)["error"]
        assert error_of(running.get("/v2")) == "this port accepts only HTTPS"


def test_http2(service, tmp_path):
    with run_tls(tmp_path / "nginx", service, "https_http2", "api_keys") as running:
        write_keys(running.directory, f"{KEY} alice;\n", '"~^alice .*$" yes;\n')
        running.reload()
        authorized = ["-H", f"Authorization: Bearer {KEY}"]
        answer = curl(running, RELU_PATH, "--http2", *authorized, "-d", RELU.decode())
        assert (answer.status, answer.version) == (200, "2")
        assert json.loads(answer.body)["outputs"][0]["data"] == [1, 0, 3, 0]
        assert curl(running, RELU_PATH, "--http1.1", *authorized, "-d", RELU.decode()).version == "1.1"
        file = tmp_path / "tensor"
        file.write_bytes(np.arange(2_000_000, dtype=np.float32).tobytes())
        header = ["-H", "Inference-Header-Content-Length: 0"]
        large = curl(running, "/v2/models/vector/infer", "--http2", *authorized, *header, "--data-binary", f"@{file}")
        assert (large.status, large.version) == (200, "2")
        assert large.body.endswith(file.read_bytes())
        for arguments, path, status in (
            ([], "/v2", 401),
            (authorized, "/nothing", 404),
            ([*authorized, "-X", "TRACE"], "/v2", 405),
            ([*authorized, "-H", f"X: {9000 * 'a'}"], "/v2", 431),
            ([*authorized, "-H", "Content-Length: 300000000", "-d", "x"], RELU_PATH, 413),
        ):
            answer = curl(running, path, "--http2", *arguments)
            assert (answer.status, answer.version) == (status, "2"), path
            assert json.loads(answer.body)["error"]


def test_variants_combine(service, tmp_path):
    variants = ("https_http2", "mutual_tls", "api_keys", "rate_limit", "gzip")
    with run_tls(tmp_path / "nginx", service, *variants) as running:
        write_keys(running.directory, f"{KEY} alice;\n", '"~^alice infer relu$" yes;\n')
        running.reload()
        certificate = ["--cert", str(running.tls / "alice.crt"), "--key", str(running.tls / "alice.key")]
        key = ["-H", f"Authorization: Bearer {KEY}"]
        body = ["-d", RELU.decode()]
        assert curl(running, RELU_PATH, *certificate, *key, *body).status == 200
        assert curl(running, RELU_PATH, *certificate, *body).status == 401
        assert curl(running, "/v2", *certificate, *key).status == 403
        without = curl(running, RELU_PATH, *key, *body)
        assert "client certificate" in json.loads(without.body)["error"]


# --- The README


# Runs in namespaces of its own, with copies of the files of Debian's package, and starts nginx as the package does.
HOST = """
set -eu
ip link set lo up
mount -t tmpfs none /run
mount -t tmpfs none /var/log/nginx
mount -t tmpfs none /var/lib/nginx
cp -a /etc/nginx {copy}
mount --bind {copy} /etc/nginx
{waiting}apt-get() {{ echo "installed: $*"; }}
{service} &
until [ -S /run/ovms_rest/control.sock ] && curl -s --unix-socket /run/ovms_rest/control.sock http://x/v2; do
    command sleep 0.05
done
nginx
{blocks}
"""


def test_commands_of_the_readme_work_as_written(tmp_path):
    isolated = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    needed = "ip link set lo up && mount -t tmpfs none /run"
    probe = subprocess.run([*isolated, "sh", "-c", needed], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"cannot make namespaces for the README's host: {probe.stderr.decode()}")
    readme = (nginx.DEPLOY / "README.md").read_text()
    first, *blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    *preparation, service = first.strip().splitlines()
    commands = {"service": "\n".join([*preparation, service]), "blocks": "echo ---\n".join(["", *blocks])}
    done = subprocess.run(
        [*isolated, "bash", "-c", HOST.format(copy=tmp_path / "etc", waiting=nginx.WAITING, **commands)],
        cwd=nginx.ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    _, installing, trying, *variants = done.stdout.split("---\n")
    assert installing == ""
    assert re.fullmatch(r'200\n\{"model_name":"digits".*"data":\[7\]\}.*', trying.split('{"error"')[0], re.DOTALL)
    assert '{"error":"this client may not use this route or model"}' in trying
    assert "ovms_requests_success" in trying
    assert trying.endswith("\n200\n")
    assert len(variants) == 5
    for text in variants:
        assert re.search('^{"name":"(ovms_rest|digits)"', text, re.MULTILINE), done.stdout
