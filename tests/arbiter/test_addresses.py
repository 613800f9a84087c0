"""The check of addresses before models are loaded; tests/arbiter/test_processes.py covers a real start."""

import os
import socket

import pytest
from gunicorn.config import Config

from ovms_rest.arbiter import addresses
from ovms_rest.arbiter.addresses import AddressError, SocketFiles, check_addresses, check_paths


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def configure(*binds, **settings):
    cfg = Config()
    cfg.set("bind", list(binds))
    for name, value in settings.items():
        cfg.set(name, value)
    return cfg


def bind_of(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.1:8000", "Cannot assign requested address"),
        ("[2001:db8::1]:8000", "Cannot assign requested address"),
        ("name.invalid:8000", "Name or service not known"),
        ("unix:/absent/socket", "No such file or directory"),
        ("unix:/etc/passwd", "it exists and is not a socket"),
        (f"unix:/tmp/{'x' * 120}", "the path is longer than 107 bytes"),
    ],
)
def test_address_that_cannot_be_bound_is_refused_with_the_reason(address, reason):
    with pytest.raises(AddressError) as caught:
        check_addresses(configure(address), {})
    assert str(caught.value) == f"cannot listen on {address}: {reason}"


def test_check_waits_for_an_address_that_becomes_free_in_time(listener, monkeypatch):
    """The workers of a killed arbiter listen for another moment."""
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: listener.close())
    check_addresses(configure(bind_of(listener)), {})


def test_check_leaves_the_address_free():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        bind = bind_of(sock)
    before = os.listdir("/proc/self/fd")
    check_addresses(configure(bind), {})
    assert os.listdir("/proc/self/fd") == before
    host, port = bind.split(":")
    socket.create_server((host, int(port))).close()


def test_inherited_and_shared_addresses_are_not_checked(listener, monkeypatch):
    bind = bind_of(listener)
    monkeypatch.setattr(addresses, "PATIENCE_SECONDS", 0)
    with pytest.raises(AddressError, match=f"^cannot listen on {bind}: Address already in use$"):
        check_addresses(configure(bind), {})
    every = bind.replace("127.0.0.1", "0.0.0.0")  # noqa: S104
    with pytest.raises(AddressError, match=f"^cannot listen on {every}: Address already in use$"):
        check_addresses(configure("127.0.0.1:0", every), {})
    check_addresses(configure(bind), {"GUNICORN_PID": "1", "GUNICORN_FD": "5"})
    check_addresses(configure(bind, reuse_port=True), {})
    check_addresses(configure(bind, f"fd://{listener.fileno()}"), {})
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    check_addresses(configure(bind), {})
    assert os.environ["LISTEN_FDS"] == "1"  # gunicorn reads it later


def test_check_leaves_a_socket_at_a_path_alone(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        check_addresses(configure(f"unix:{path}"), {})
        check_addresses(configure(f"unix:{tmp_path / 'absent'}"), {})
        assert [file.name for file in tmp_path.iterdir()] == ["socket"]


@pytest.fixture
def bound(tmp_path):
    """A socket that is bound to a path and does not listen."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        yield sock


def test_path_on_which_another_process_listens_is_refused(bound, monkeypatch):
    """Only gunicorn itself would take it."""
    bound.listen(0)
    monkeypatch.setattr(addresses, "PATIENCE_SECONDS", 0)
    path = bound.getsockname()
    for _ in range(3):  # the first attempts fill its backlog
        with pytest.raises(AddressError, match=f"^cannot listen on unix:{path}: Address already in use$"):
            check_addresses(configure(f"unix:{path}"), {})
    with pytest.raises(AddressError, match=f"^cannot listen on unix:{path}: Address already in use$"):
        check_paths([("127.0.0.1", 1), path], [])
    check_paths([("127.0.0.1", 1), path], [path])


def test_check_waits_for_a_path_that_becomes_free_in_time(bound, monkeypatch):
    bound.listen()
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: bound.close())
    check_addresses(configure(f"unix:{bound.getsockname()}"), {})


def test_file_of_a_socket_is_removed(bound, tmp_path):
    files = SocketFiles()
    files.note([bound])
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_file_that_replaced_that_of_a_socket_stays(bound, tmp_path):
    """Also if the socket is noted once more, as at a reload."""
    files = SocketFiles()
    files.note([bound])
    os.unlink(path := bound.getsockname())
    files.note([bound])
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        files.note([bound])
        files.remove()
        assert os.path.exists(path)


def test_file_that_is_gone_is_not_missed(bound, tmp_path):
    files = SocketFiles()
    files.note([bound])
    os.unlink(bound.getsockname())
    files.remove()
    assert list(tmp_path.iterdir()) == []
