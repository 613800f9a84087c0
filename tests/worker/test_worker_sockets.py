"""The sockets of workers: their addresses, limits of connections and descriptors, and sockets made by others."""

import contextlib
import itertools
import re
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from processes import listens, replaced
from raw_http import LIVE, RELU, RELU_PATH, connected, post, receive
from service import environment, free_port
from workers import fill, inferred, is_filled, several, used, works

# --- Connections and descriptors


def test_connections_beyond_worker_connections_wait_while_none_is_idle(start):
    service = start(1, "--worker-connections", "3")
    with several(service, 3, LIVE + LIVE[:20]) as taken:
        assert [receive(connection).status for connection in taken] == [200] * 3
        with several(service, 4, LIVE) as waiting:
            for connection in taken:
                connection.sendall(LIVE[20:] + LIVE[:20])
                assert receive(connection).status == 200
            assert not select.select(waiting, [], [], 0)[0]
            for connection in (*taken, waiting[0]):
                connection.close()
            assert [receive(connection).status for connection in waiting[1:]] == [200] * 3


def test_longest_idle_connection_is_closed_for_a_new_one(start):
    """Connections with a part of a request, or of an unsent response, stay; so do those idle for less time."""
    service = start(1, "--worker-connections", "6")
    with contextlib.ExitStack() as stack:

        def connect(data):
            connection = stack.enter_context(connected(service, data))
            service.wait_for_workers(1)
            return connection

        silent = connect(b"")
        part_of_head = connect(LIVE[:20])
        part_of_body = connect(post(RELU_PATH, RELU)[:-5])
        unread = connect(fill(1.5, 5_000_000))
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
        assert is_filled(receive(unread, "POST"), 1.5, 5_000_000)


@pytest.mark.parametrize("workers", [1, 2])
def test_new_clients_are_served_while_others_keep_all_connections_idle(start, workers):
    """However many there are; also at the control address."""
    control = free_port()
    service = start(workers, "--worker-connections", "20", OVMS_REST_CONTROL_BIND=f"127.0.0.1:{control}")
    with contextlib.ExitStack() as stack:
        for port in (service.port, control):
            service.port = port
            for _ in range(100):
                connection = stack.enter_context(connected(service, LIVE))
                assert receive(connection).status == 200


def test_no_connection_is_closed_while_any_worker_has_room(start):
    """Also in a burst, in which each worker accepts what the others have not come for."""
    service = start(4, "--worker-connections", "50")
    with several(service, 190, LIVE) as connections:
        answers = {connection: receive(connection) for connection in connections}
        kept = [connection for connection, answer in answers.items() if answer.headers.get("connection") != "close"]
        assert len(kept) > 100
        for connection in kept:
            connection.sendall(LIVE)
        for connection in kept:
            assert receive(connection).status == 200


LACK = "cannot accept a connection: Too many open files"


@contextlib.contextmanager
def few_descriptors(pid, count):
    """Let a worker open no more than `count` files and connections."""
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    opened = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in itertools.count() if number not in opened)
    *_, last = itertools.islice(free, count)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (last + 1, usual[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)


def test_idle_connections_are_closed_for_new_ones_without_descriptors(start):
    """The log names the lack, at most once a second; connections with a part of a request stay."""
    service = start(1)
    (pid,) = service.workers()
    with used(service, 1) as (part_of_head,):
        part_of_head.sendall(LIVE[:20])
        began = time.monotonic()
        with few_descriptors(pid, 4):
            with several(service, 50, LIVE) as connections:
                assert [receive(connection).status for connection in connections] == [200] * 50
            assert 1 <= service.log.count(LACK) <= 2 + (time.monotonic() - began)
            part_of_head.sendall(LIVE[20:])
            assert receive(part_of_head).status == 200
    assert works(service)
    assert service.workers() == [pid]


def test_connections_wait_for_a_descriptor_while_none_is_idle(start):
    """Those that have one are served meanwhile."""
    service = start(1)
    (pid,) = service.workers()
    with few_descriptors(pid, 4), several(service, 4, LIVE[:20]) as taken, several(service, 4, LIVE) as waiting:
        service.wait_for(lambda: LACK in service.log)
        for connection in taken:
            connection.sendall(LIVE[20:] + fill(1, 100_000) + LIVE[:20])
            assert receive(connection).status == 200
            assert is_filled(receive(connection, "POST"), 1, 100_000)
        assert not select.select(waiting, [], [], 0)[0]
        taken[0].close()
        assert [receive(connection).status for connection in waiting] == [200] * 4
    assert works(service)
    assert service.workers() == [pid]


# --- Addresses


def connected_by_path(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def ports_of(service):
    """Return the two ports at which a service listens."""
    ports = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", service.log)}
    assert len(ports) == 2
    return ports


@pytest.fixture(scope="module")
def addressed(tmp_path_factory, start_shared):
    """Two workers on two ports and a unix socket."""
    path = tmp_path_factory.mktemp("addressed") / "socket"
    service = start_shared(2, "-b", "127.0.0.1:0", "-b", f"unix:{path}")
    service.path = path
    return service


def test_large_bodies_pass_a_unix_socket(addressed):
    with connected_by_path(addressed.path) as connection:
        for value in (1.5, 2.5):
            connection.sendall(fill(value, 1_000_000))
            assert is_filled(receive(connection, "POST"), value, 1_000_000)
            connection.sendall(post(RELU_PATH, RELU.ljust(3_000_000)))
            assert inferred(receive(connection, "POST"))
    assert works(addressed), "the other address works as well"


def test_several_addresses_are_served_by_all_workers(addressed):
    ports = ports_of(addressed)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(4):
            connections += [socket.create_connection(("127.0.0.1", port)) for port in ports]
            connections.append(connected_by_path(addressed.path))
        for connection in connections:
            stack.enter_context(connection).sendall(post(RELU_PATH, RELU))
        assert [receive(connection, "POST").status for connection in connections] == [200] * 12


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
    return f"{starter.parent}:{environment(directory)['PATH']}"


ACTIVATION = """
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
first = sockets[0].getsockname()[1]
held = [os.dup2(item.fileno(), 60 + number) for number, item in enumerate(sockets)]
for number, fileno in enumerate(held):
    os.dup2(fileno, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
"""


def test_sockets_of_systemd_are_served(tmp_path, start):
    """Activation by sd_listen_fds(3): the sockets are inherited from 3 on, and stay when the service ends."""
    service = start(2, PATH=write_starter(tmp_path, ACTIVATION))
    for port in ports_of(service):
        service.port = port
        assert works(service)
    before = service.workers()
    service.signal(signal.SIGHUP)
    service.wait_for(lambda: replaced(service, before))
    assert works(service)


@pytest.fixture(scope="module")
def apart(tmp_path_factory, start_shared):
    """Two workers, each with a socket of its own for the same address, and the control worker."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as reserved:
        port = reserved.getsockname()[1]
        # gunicorn does not log the address in this case.
        text = f"arguments[1] = '127.0.0.1:{port}'\nprint('Listening at: http://127.0.0.1:{port}', flush=True)"
        variables = {
            "PATH": write_starter(tmp_path_factory.mktemp("starter"), text),
            "OVMS_REST_CONTROL_BIND": "127.0.0.1:0",
        }
        return start_shared(2, "--reuse-port", **variables)


def test_workers_with_reuse_port_serve_all_their_connections(apart):
    """No worker can accept a connection from the socket of another."""
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(connected(apart, LIVE))
            connection.settimeout(10)
            assert receive(connection).status == 200
    assert all(works(apart) for _ in range(10))


def test_control_worker_does_not_listen_at_the_address_of_the_others(apart):
    port = int(re.search(r"control address: http://127\.0\.0\.1:(\d+)", apart.log)[1])
    assert sum(listens(apart.port, pid) for pid in apart.workers()) == 2
    assert sum(listens(port, pid) for pid in apart.workers()) >= 1
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(LIVE)
        assert receive(connection).status == 200
