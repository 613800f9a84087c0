"""A request whose client closes its connection while it is queued is cancelled and counted."""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess

import pytest
from processes import stopped, wait_until_inferring
from raw_http import LIVE, RELU, RELU_PATH, connected, exchange, head, infer, parse, post, receive, receive_rest
from service import free_port
from workers import reset, slow, used

SLOW = slow(2)
# Takes so long that a test hangs visibly if it is run.
ENDLESS = slow(200)
CROWD = 800


@pytest.fixture(scope="module")
def service(tmp_path_factory, start_shared):
    """One worker on a port and a unix socket."""
    path = tmp_path_factory.mktemp("cancellation") / "socket"
    variables = {"OVMS_REST_METRICS_ENABLE": "1", "OVMS_REST_MAX_WAITING": str(2 * CROWD)}
    running = start_shared(1, "-b", f"unix:{path}", **variables)
    running.path = path
    return running


@pytest.fixture(scope="module")
def tls(start_shared, certificate):
    cert, key = certificate
    return start_shared(1, "--certfile", cert, "--keyfile", key, OVMS_REST_METRICS_ENABLE="1")


def connect(service):
    return service.connect()


def connect_by_path(service):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(str(service.path))
    return connection


def connect_by_tls(service):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(service.connect())


def counts(service, connecting=connect):
    """Return how many inferences of all models succeeded, and how many were canceled."""
    with connecting(service) as connection:
        connection.sendall(head("GET", "/metrics"))
        text = receive(connection).body.decode()
    answered = re.findall(r'^ovms_requests_success\{.*method="ModelInfer".*\} (\S+)$', text, re.MULTILINE)
    canceled = re.findall(r'^ovms_rest_requests_refused\{kind="canceled".*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, answered)), sum(map(float, canceled))


def close(connection):
    connection.close()


def close_sending_side(connection):
    connection.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def behind_two(service, connecting, data):
    """Yield a connection whose request has been read, and is queued during an inference."""
    with contextlib.ExitStack() as stack:
        first, second, third, last = (stack.enter_context(connecting(service)) for _ in range(4))
        for connection in (first, second, third, last):
            connection.sendall(LIVE)
            receive(connection)
        first.sendall(SLOW)
        wait_until_inferring(service)
        second.sendall(SLOW)
        third.sendall(data)
        last.sendall(LIVE)  # read last, and run before the second inference
        assert receive(first, "POST").status == 200
        receive(last)
        yield third
        assert receive(second, "POST").status == 200


PIPELINED = ENDLESS + LIVE + ENDLESS


@pytest.mark.parametrize(
    ("connecting", "data", "end"),
    [
        (connect, ENDLESS, close),
        (connect, ENDLESS, close_sending_side),
        (connect, ENDLESS, reset),
        (connect, ENDLESS.replace(b"HTTP/1.1", b"HTTP/1.0", 1), close),
        (connect, PIPELINED, close),
        (connect, PIPELINED, close_sending_side),
        (connect_by_path, ENDLESS, close),
        (connect_by_path, PIPELINED, close_sending_side),
    ],
)
def test_queued_request_of_a_disconnected_client_is_cancelled(service, connecting, data, end):
    answered, canceled = counts(service)
    with behind_two(service, connecting, data) as connection:
        end(connection)
    assert counts(service) == (answered + 2, canceled + 1)


@pytest.mark.parametrize("end", [close, reset])
def test_queued_request_of_a_disconnected_tls_client_is_cancelled(tls, end):
    answered, canceled = counts(tls, connect_by_tls)
    with behind_two(tls, connect_by_tls, ENDLESS) as connection:
        end(connection)
    assert counts(tls, connect_by_tls) == (answered + 2, canceled + 1)


@pytest.mark.parametrize("kept_alive", [False, True])
@pytest.mark.parametrize(
    ("connecting", "end"), [(connect, close), (connect, close_sending_side), (connect_by_path, close)]
)
def test_unread_request_of_a_disconnected_client_is_cancelled(service, connecting, end, kept_alive):
    """During an inference, requests and the bytes after them lie in the system's buffers."""
    answered, canceled = counts(service)
    with connected(service) as first, contextlib.ExitStack() as stack:
        gone = [connecting(service) for _ in range(2)]
        if kept_alive:
            for connection in gone:
                connection.sendall(LIVE)
                receive(connection)
        first.sendall(slow(8))  # long enough for the steps below on a busy machine
        wait_until_inferring(service)
        for connection in gone if kept_alive else [connecting(service) for _ in gone]:
            connection.sendall(ENDLESS)
            end(stack.enter_context(connection))
        assert receive(first, "POST").status == 200
        service.wait_for(lambda: counts(service)[1] == canceled + 2)
    assert counts(service)[0] == answered + 1


NGINX = """
daemon off; master_process off; pid {directory}/pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    upstream service {{ server unix:{path}; server 127.0.0.1:{port} backup; keepalive 8; }}
    server {{
        listen 127.0.0.1:{front};
        location / {{ proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""


@pytest.fixture
def front(service, tmp_path):
    """Run nginx in front of the unix socket; return its port."""
    if (program := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
        pytest.skip("nginx is not installed")
    port, path = free_port(), tmp_path / "nginx.conf"
    path.write_text(NGINX.format(directory=tmp_path, path=service.path, port=service.port, front=port))
    with subprocess.Popen([program, "-c", path, "-p", tmp_path, "-e", "stderr"]) as process:
        try:
            service.wait_for(lambda: is_open(port))
            yield port
        finally:
            process.terminate()


def is_open(port):
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_queued_request_of_a_disconnected_client_of_nginx_is_cancelled(service, front):
    def connect_by_nginx(_):
        return socket.create_connection(("127.0.0.1", front), timeout=60)

    answered, canceled = counts(service)
    with behind_two(service, connect_by_nginx, ENDLESS) as connection:
        connection.close()
    service.wait_for(lambda: counts(service) == (answered + 2, canceled + 1))


def test_half_closed_client_with_a_queued_request_gets_503(service):
    """As in nginx and Go: whether such a client still reads is unknown. If it does, it gets the reason."""
    with behind_two(service, connect, PIPELINED) as connection:
        connection.shutdown(socket.SHUT_WR)
        (answer,) = parse(receive_rest(connection), "POST")
        assert answer.headers["content-type"] == "application/json"
        assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")
        message = "the client closed its side of the connection before the inference began, which cancels the request"
        assert answer.json() == {"error": message}


def test_half_closed_client_of_an_idle_worker_gets_its_response(service):
    for _ in range(5):
        answers = parse(exchange(service, post(RELU_PATH, RELU) * 3), *["POST"] * 3)
        assert [answer.status for answer in answers] == [200] * 3


def test_request_overtaken_by_a_higher_priority_counts_as_queued(service):
    answered, canceled = counts(service)
    urgent = infer("relu", {**json.loads(RELU), "parameters": {"priority": 1}})
    (pid,) = service.workers()
    with used(service, 2) as (gone, other):
        service.wait_until_idle()
        with stopped(service, pid):
            gone.sendall(ENDLESS)
            gone.shutdown(socket.SHUT_WR)
            other.sendall(urgent)
        assert receive(other, "POST").status == 200
        assert receive(gone, "POST").status == 503
    assert counts(service) == (answered + 1, canceled + 1)


def test_all_requests_of_a_disconnecting_crowd_are_cancelled(service):
    """The crowd is larger than the worker can handle between two inferences."""
    answered, canceled = counts(service)
    with used(service, 2 + CROWD) as (first, second, *crowd):
        first.sendall(SLOW)
        wait_until_inferring(service)
        second.sendall(SLOW)
        for connection in crowd:
            connection.sendall(post(RELU_PATH, RELU))
        assert receive(first, "POST").status == 200
        for connection in crowd:
            connection.close()
        assert receive(second, "POST").status == 200
        service.wait_for(lambda: sum(counts(service)) >= answered + canceled + 2 + CROWD)
    assert counts(service) == (answered + 2, canceled + CROWD)
