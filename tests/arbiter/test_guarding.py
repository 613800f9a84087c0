"""Settings and files that a reload cannot use: each is logged, and the service continues unchanged."""

import logging
import os
import signal
import socket
import threading

import model_zoo
import pytest
from generations import checking, hang_up, kill_one, settings_with, wait_until_replaced, works
from service import PATIENCE, free_port, serve, wait_for_end, write_config

from ovms_rest.arbiter import guarding

BIND = "bind = '127.0.0.1:0'\n"
FAILED = "the reload failed; the service keeps its previous settings"


@pytest.fixture(scope="module")
def bound(tmp_path_factory):
    """A service of two workers whose address is in its config file, and the directory of that file."""
    directory = tmp_path_factory.mktemp("bound")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    config = write_config(directory, {"name": "relu", "base_path": "relu"})
    with serve(directory, "-w", "2", "-c", settings_with(directory, BIND), config=config, bind=()) as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        yield service, directory


@pytest.mark.parametrize(
    ("hook", "line"),
    [
        ("workers = (", "Failed to read config file"),
        ("workers = 'many'", "Invalid value for workers: many"),
        ("bind = '192.0.2.1:80'", "Can't connect to ('192.0.2.1', 80)"),
        ("worker_class = 'nowhere.Worker'", "class uri 'nowhere.Worker' invalid"),
        ("raw_env = ['OVMS_REST_MAX_HELD_BYTES=many']", "OVMS_REST_MAX_HELD_BYTES: expected an integer"),
    ],
)
def test_reload_with_unusable_settings_changes_nothing(bound, hook, line):
    service, directory = bound
    failures = service.log.count(FAILED)
    before = service.workers()
    settings_with(directory, BIND + hook)
    with checking(service):
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: service.log.count(FAILED) > failures)
    assert line in service.log
    assert service.workers() == before
    kill_one(service)  # what is forked now has the old settings
    service.wait_for(lambda: len(service.workers()) == 2)
    os.kill(before[-1], signal.SIGKILL)
    wait_for_end(before[-1])
    service.wait_for(lambda: works(service))
    service.wait_for(lambda: len(service.workers()) == 2)
    settings_with(directory, BIND)
    hang_up(service)
    assert works(service)


def test_reload_with_another_address_leaves_nothing_listening_on_the_previous_one(start, tmp_path):
    settings = settings_with(tmp_path, "bind = '127.0.0.1:0'")
    with start(2, "-c", settings, bind=()) as service:
        assert works(service)
        previous, service.port = service.port, free_port()
        settings_with(tmp_path, f"bind = '127.0.0.1:{service.port}'")
        service.signal(signal.SIGHUP)

        def is_open(port):
            with socket.socket() as connection:
                return connection.connect_ex(("127.0.0.1", port)) == 0

        service.wait_for(lambda: is_open(service.port) and works(service))
        service.wait_for(lambda: not is_open(previous))


def test_reload_does_not_take_the_path_of_another_process(start, tmp_path):
    """A path of its own is kept."""
    own, path = tmp_path / "own", tmp_path / "other"
    binds = f"bind = ['127.0.0.1:0', 'unix:{own}'%s]"
    with (
        start(1, "-c", settings_with(tmp_path, binds % ""), bind=()) as service,
        socket.socket(socket.AF_UNIX) as other,
    ):
        other.bind(str(path))
        other.listen()
        settings_with(tmp_path, binds % f", 'unix:{path}'")
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: f"{FAILED}: AddressError: cannot listen on unix:{path}: Add" in service.log)
        assert works(service)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(own))
        other.close()
        hang_up(service)
        for socket_file in (own, path):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_file))
    assert not own.exists()
    assert not path.exists()


def test_log_files_that_cannot_be_reopened_do_not_end_the_service(start, tmp_path):
    (logs := tmp_path / "logs").mkdir()
    with start(1, "--access-logfile", str(logs / "access")) as service:
        assert works(service)
        logs.rename(tmp_path / "moved")
        service.signal(signal.SIGUSR1)
        service.wait_for(lambda: "the log files are not reopened: No such file or directory" in service.log)
        assert works(service)
        (before,) = service.workers()
        service.signal(signal.SIGHUP)  # gunicorn keeps the log as it was
        wait_until_replaced(service, [before])
        assert works(service)
        (tmp_path / "moved").rename(logs)
        service.signal(signal.SIGUSR1)
        assert works(service)
        service.wait_for(lambda: (logs / "access").read_text().count("POST") >= 1)


def test_log_at_a_named_pipe_without_a_reader_is_not_reopened(tmp_path, caplog):
    """Opening it would block the arbiter for good."""
    os.mkfifo(path := tmp_path / "log")
    handler, reopened = logging.FileHandler(path, delay=True), []
    logging.getLogger("gunicorn.access").addHandler(handler)
    thread = threading.Thread(target=guarding._reopen_files, args=[lambda: reopened.append(1)])
    try:
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    finally:
        logging.getLogger("gunicorn.access").removeHandler(handler)
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        thread.join()
    assert not reopened
    assert "the log files are not reopened: No such device or address" in caplog.text
