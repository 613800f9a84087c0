"""The control address: bound early, by one service only, handed over at an upgrade; and its worker in the count."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess

import pytest
from generations import fault, settings_with, works
from gunicorn.config import Config
from processes import children, end, listens, tcp_sockets, upgraded
from raw_http import RELU, RELU_PATH, head, post
from service import (
    PATIENCE,
    ROOT,
    Service,
    environment,
    free_port,
    receive,
    run_to_end,
    serve,
)

from ovms_rest.arbiter import hooks
from ovms_rest.arbiter.control_address import ControlAddress

LIVE, READY = "/v2/health/live", "/v2/health/ready"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(params=["port", "path"])
def address(request, tmp_path):
    return f"127.0.0.1:{free_port()}" if request.param == "port" else f"unix:{tmp_path}/control"


def ask(address, path=LIVE):
    """Call the control address on a new connection; return the response."""
    is_path = address.startswith("unix:")
    with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as connection:
        connection.settimeout(10)
        connection.connect(address.removeprefix("unix:") if is_path else ("127.0.0.1", int(address.split(":")[1])))
        connection.sendall(head("GET", path, "Connection: close"))
        return receive(connection)


def answers(address):
    with contextlib.suppress(OSError):
        return ask(address).status == 200
    return False


# --- One service


def refusal_of(caplog, address, **settings):
    """Return why a start with this control address ends, in one line."""
    cfg = Config()
    for name, value in {"bind": ["127.0.0.1:0"], **settings}.items():
        cfg.set(name, value)
    with pytest.raises(SystemExit, match=r"^1$"), hooks._ending_without(address):
        ControlAddress(address, cfg, {})
    (line,) = caplog.messages
    return line.partition(f"cannot listen on {address} (OVMS_REST_CONTROL_BIND): ")[2]


def test_second_service_on_the_same_control_address_does_not_start(start, tmp_path, relu, address):
    """It loads no model before it reports that."""
    with start(1, OVMS_REST_CONTROL_BIND=address):
        ended = run_to_end(tmp_path, OVMS_REST_CONFIG=str(relu), OVMS_REST_CONTROL_BIND=address)
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.endswith(f"[ERROR] cannot listen on {address} (OVMS_REST_CONTROL_BIND): Address already in use")
        assert [ask(address).status for _ in range(10)] == [200] * 10


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:x", "'x' is not a valid port number."),
        ("192.0.2.1:9000", "Cannot assign requested address"),
        ("unix:/absent/control", "No such file or directory"),
        ("unix:/etc/passwd", "it exists and is not a socket"),
    ],
)
def test_unusable_control_address_ends_the_start_with_one_line(caplog, address, reason):
    assert refusal_of(caplog, address) == reason


@pytest.fixture
def orphans():
    """Make this process adopt orphans, as the init process of a container may not reap them."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def test_service_starts_while_workers_of_a_killed_one_still_listen(start, tmp_path, relu, address, orphans):
    """Its workers listen for another moment; the socket at a path stays."""
    options = {"config": relu, "bind": ("-b", f"127.0.0.1:{free_port()}"), "OVMS_REST_CONTROL_BIND": address}
    with start(1, **options) as service:
        workers = service.workers()
        service.process.kill()
        service.process.wait(PATIENCE)
        (tmp_path / "next").mkdir()
        with serve(tmp_path / "next", "-w", "1", **options) as following:
            following.wait_for(lambda: answers(address))
            for pid in workers:
                os.waitpid(pid, 0)
            assert [ask(address).status for _ in range(10)] == [200] * 10


def test_path_of_the_control_address_has_gunicorns_umask_and_is_removed_with_the_service(start, tmp_path):
    path = tmp_path / "control"
    with start(1, "--umask", "0o077", OVMS_REST_CONTROL_BIND=f"unix:{path}"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


# --- Upgrades


@pytest.mark.parametrize(
    ("address", "number"),
    [("port", signal.SIGTERM), ("path", signal.SIGQUIT)],
    indirect=["address"],
    ids=["a port, SIGTERM", "a path, SIGQUIT"],
)
def test_upgrade_takes_the_control_address_over_and_no_call_hangs(start, address, number, orphans):
    with start(1, OVMS_REST_CONTROL_BIND=address) as service:
        with upgraded(service) as pid:
            assert [ask(address).status for _ in range(30)] == [200] * 30
            service.signal(number)
            assert service.process.wait(PATIENCE) == 0
            assert [ask(address).status for _ in range(30)] == [200] * 30
            assert works(service)
            workers = children(pid)
            os.kill(pid, signal.SIGHUP)
            service.wait_for(lambda: len(children(pid)) == 2 and not set(children(pid)) & set(workers))
            assert [ask(address).status for _ in range(10)] == [200] * 10
        assert not answers(address)


def test_upgrade_takes_over_a_port_that_is_in_use_by_the_first_arbiter(start, orphans):
    """Another start would fail there."""
    bind = ("-b", f"127.0.0.1:{free_port()}")
    with start(2, bind=bind) as service:
        assert works(service)
        with upgraded(service):
            assert works(service)
        assert works(service)


def test_upgrade_is_completed_though_the_directory_of_the_pid_file_is_gone(start, tmp_path, orphans):
    (directory := tmp_path / "run").mkdir()
    file = directory / "pid"
    with (
        start(1, "-p", str(file), OVMS_REST_CONTROL_BIND=f"127.0.0.1:{free_port()}") as service,
        upgraded(service) as pid,
    ):
        shutil.rmtree(directory)
        service.signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0
        service.wait_for(lambda: "[ERROR] there is no pid file after the upgrade" in service.log)
        assert works(service)
        directory.mkdir()
        os.kill(pid, signal.SIGHUP)
        service.wait_for(file.exists)
        assert int(file.read_text()) == pid


def test_upgrade_takes_over_a_path_which_the_last_arbiter_removes(start, tmp_path, orphans):
    path = tmp_path / "socket"
    with start(1, "-b", f"unix:{path}", OVMS_REST_CONTROL_BIND=f"127.0.0.1:{free_port()}") as service:
        with upgraded(service):
            service.signal(signal.SIGTERM)
            assert service.process.wait(PATIENCE) == 0
            service.wait_for(lambda: "Master has been promoted" in service.log)
            assert [ask(f"unix:{path}").status for _ in range(10)] == [200] * 10
        assert not path.exists()


@pytest.mark.parametrize("reuse_port", [False, True], ids=["", "--reuse-port"])
@pytest.mark.parametrize("is_path", [False, True], ids=["a port", "a path"])
def test_address_of_bind_as_the_control_address_ends_the_start(tmp_path, caplog, is_path, reuse_port):
    address = f"unix:{tmp_path}/socket" if is_path else f"127.0.0.1:{free_port()}"
    reason = "it is also an address of --bind; the control address must be another"
    assert refusal_of(caplog, address, bind=[address], reuse_port=reuse_port) == reason


@pytest.mark.parametrize("address", ["path"], indirect=True)
def test_cancelled_upgrade_keeps_the_control_address(start, address):
    with start(1, OVMS_REST_CONTROL_BIND=address) as service:
        with upgraded(service):
            assert [ask(address).status for _ in range(10)] == [200] * 10
        assert [ask(address).status for _ in range(30)] == [200] * 30


@pytest.mark.parametrize("options", [(), ("--reuse-port",)], ids=["", "--reuse-port"])
def test_daemon_is_upgraded_step_by_step_and_back(tmp_path, relu, orphans, options):
    """As gunicorn's documentation says: SIGUSR2, SIGWINCH, and SIGTTIN to cancel it."""
    address, port, file = f"127.0.0.1:{free_port()}", free_port(), tmp_path / "pid"
    log, options = tmp_path / "log", ("-b", f"127.0.0.1:{port}", "-w", "1", "--daemon", "--pid", str(file), *options)
    subprocess.run(
        ["gunicorn", *options, "--error-logfile", str(log)],
        cwd=ROOT,
        env=environment(tmp_path, OVMS_REST_CONFIG=str(relu), OVMS_REST_CONTROL_BIND=address),
        check=True,
    )
    service = Service(None, log)
    service.port = port
    started = []

    def serves():
        assert [ask(address).status for _ in range(10)] == [200] * 10
        return works(service)

    def new_pid(file):
        started.append(int(service.wait_for(lambda: file.exists() and file.read_text())))
        return started[-1]

    try:
        old = new_pid(file)
        service.wait_for(lambda: answers(address))
        service.wait_for(lambda: len(children(old)) == 2)
        # With --reuse-port the worker opens a socket of its own.
        service.wait_for(lambda: any(listens(port, int(pid)) for pid in children(old)))
        assert serves()
        os.kill(old, signal.SIGUSR2)
        new = new_pid(tmp_path / "pid.2")
        service.wait_for(lambda: len(children(new)) == 2)
        assert serves()
        os.kill(old, signal.SIGWINCH)
        service.wait_for(lambda: children(old) == [str(new)])
        assert serves()
        os.kill(old, signal.SIGTTIN)  # a worker that infers, and the control worker
        service.wait_for(lambda: len(children(old)) == 3)
        os.kill(new, signal.SIGTERM)
        service.wait_for(lambda: len(children(old)) == 2)
        assert serves()
    finally:
        for pid in started:
            end(pid)


def test_failed_upgrade_does_not_affect_the_service(tmp_path, relu):
    """When the directory is gone, say, gunicorn's own forked process would end the workers of the first arbiter."""
    directory = tmp_path / "deployed"
    directory.mkdir()
    options = ("-c", "python:ovms_rest.arbiter.gunicorn_settings", "--chdir", str(directory), "-w", "2")
    with serve(tmp_path, *options, config=relu) as service:
        service.wait_for_workers(2)
        before = service.workers()
        shutil.rmtree(directory)
        line = "cannot start another arbiter; this one keeps serving: "
        for count in (1, 2):
            service.signal(signal.SIGUSR2)
            service.wait_for(lambda count=count: service.log.count(line) == count)
            service.wait_for_workers(2)
        assert service.workers() == before
        assert works(service)


# --- The end


def test_no_address_accepts_connections_while_workers_wait_for_slow_clients(start):
    """The workers of one address do not keep the other open; they would never accept from it."""
    port, body = free_port(), b"{}"
    with start(1, OVMS_REST_CONTROL_BIND=f"127.0.0.1:{port}") as service:
        service.wait_for_workers(2)
        with service.connect() as client, socket.create_connection(("127.0.0.1", port), PATIENCE) as other:
            client.sendall(post(RELU_PATH, RELU)[:-5])
            other.sendall(post("/v2/repository/index", body)[:-1])
            service.wait_until_idle()
            service.signal(signal.SIGTERM)
            service.wait_for(lambda: "Handling signal: term" in service.log)
            ports = {port, service.port}
            service.wait_for(lambda: not any(found.local in ports and found.state == "0A" for found in tcp_sockets()))
            client.sendall(RELU[-5:])
            other.sendall(body[-1:])
            assert [receive(client, "POST").status, receive(other, "POST").status] == [200, 200]
        assert service.process.wait(PATIENCE) == 0


# --- Workers that come and go


def test_service_is_not_ready_until_a_worker_can_infer(tmp_path, relu):
    """The control worker may be ready first, and responds when all others are gone and none can be started."""
    hook = (
        "import os, time\n"
        "_post_fork = post_fork\n"
        "def post_fork(arbiter, worker):\n"
        "    _post_fork(arbiter, worker)\n"
        f"    while not worker.is_control and not os.path.exists({str(tmp_path / 'go')!r}):\n"
        "        time.sleep(0.01)\n"
    )
    address = f"unix:{tmp_path}/control"
    variables = {"config": relu, "OVMS_REST_CONTROL_BIND": address}
    with serve(tmp_path, "-w", "1", "-c", settings_with(tmp_path, hook), **variables) as service:
        service.wait_for(lambda: answers(address))
        assert fault(ask(address, READY)).startswith("400 no worker can infer; the arbiter ")
        (tmp_path / "go").touch()
        service.wait_for(lambda: ask(address, READY).status == 200)


@pytest.mark.parametrize("address", ["", "127.0.0.1:0"], ids=["no control address", "a control address"])
def test_sigttou_keeps_one_worker_that_infers(start, address):
    with start(2, OVMS_REST_CONTROL_BIND=address) as service:
        left = 2 if address else 1
        assert ", with 2 workers; " in service.log  # besides the control worker
        for count in range(4):
            service.signal(signal.SIGTTOU)
            service.wait_for(lambda n=count: service.log.count("Handling signal: ttou") > n)
        service.wait_for(lambda: service.log.count("no worker removed: only one infers") == 3)
        service.wait_for(lambda: len(service.workers()) == left)
        assert works(service)
        service.signal(signal.SIGTTIN)
        service.wait_for(lambda: len(service.workers()) == left + 1)
        assert works(service)


def test_control_worker_keeps_its_clients_though_another_worker_is_idle(tmp_path):
    """No other worker serves its address."""
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "from ovms_rest.arbiter.gunicorn_settings import *\nimport time\n"
        "def pre_request(worker, request): time.sleep(0.02)\n"
    )
    port = free_port()
    with serve(tmp_path, "-w", "1", "-c", str(hooks), OVMS_REST_CONTROL_BIND=f"127.0.0.1:{port}") as service:
        service.wait_for_workers(2)
        connections = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            for connection in map(stack.enter_context, connections):
                connection.sendall(head("GET", LIVE))
                assert "connection" not in receive(connection).headers
            for connection in connections:
                connection.sendall(head("GET", LIVE))
                assert "connection" not in receive(connection).headers
