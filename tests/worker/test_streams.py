"""Logs whose reader has stopped reading: lines are lost and counted, and no process waits."""

import contextlib
import logging
import logging.handlers
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import model_zoo
import pytest
from service import PATIENCE, ROOT, Service, environment, free_port, write_config

from ovms_rest.worker import streams
from ovms_rest.worker.streams import Stream

LOST = "lines of the test were lost: its reader has fallen behind"


class Pipe:
    def __init__(self):
        self.reading, self.writing = os.pipe()
        self.stream = Stream(self.writing, "the test")

    def fill(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.pwritev(self.writing, [b"." * 4096], -1, os.RWF_NOWAIT)

    def read(self):
        os.set_blocking(self.reading, False)
        data = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.reading, 2**20):
                data += piece
        os.set_blocking(self.reading, True)
        return data.lstrip(b".")


@pytest.fixture
def pipe():
    made = Pipe()
    yield made
    made.stream.close()
    os.close(made.reading)


def test_lines_keep_their_order_and_the_pipe_stays_blocking_for_others(pipe):
    assert [pipe.stream.write(b"one\n"), pipe.stream.write(b"two\n")] == [4, 4]
    assert pipe.read() == b"one\ntwo\n"
    assert os.get_blocking(pipe.writing)


def test_lines_without_room_are_counted(pipe, caplog):
    pipe.fill()
    for _ in range(1000):
        assert pipe.stream.write(b"lost\n") == 5
    pipe.stream.write(b"two\nlines\n")
    assert pipe.read() == b""
    assert caplog.messages == []
    pipe.stream.write(b"there\n")
    assert pipe.read() == b"there\n"
    assert caplog.messages == [f"1002 {LOST}"]
    pipe.stream.write(b"again\n")
    assert caplog.messages == [f"1002 {LOST}"]


def test_writer_waits_once_for_a_stuck_reader(pipe):
    pipe.fill()
    started = time.monotonic()
    pipe.stream.write(b"waited\n")
    waited = time.monotonic() - started
    assert waited >= streams.WAIT_SECONDS
    started = time.monotonic()
    for _ in range(1000):
        pipe.stream.write(b"not waited\n")
    assert time.monotonic() - started < 1000 * streams.WAIT_SECONDS / 10


def test_slow_reader_gets_every_line(pipe, monkeypatch):
    monkeypatch.setattr(streams, "WAIT_SECONDS", 30)
    lines = b"".join(b"%d\n" % number for number in range(100_000))
    received = []

    def read():
        while sum(map(len, received)) < len(lines):
            received.append(os.read(pipe.reading, 10_000))

    reader = threading.Thread(target=read)
    reader.start()
    for line in lines.splitlines(keepends=True):
        pipe.stream.write(line)
    reader.join(PATIENCE)
    assert b"".join(received) == lines


def test_truncated_line_ends_before_the_next(pipe, caplog):
    pipe.stream.write(b"x" * 100_000 + b"\n")
    assert pipe.read() == b"x" * 65_536
    pipe.stream.write(b"next\n")
    assert pipe.read() == b"\nnext\n"
    assert caplog.messages == [f"1 {LOST}"]


def test_forked_process_counts_its_own_lines(pipe, caplog):
    pipe.fill()
    pipe.stream.write(b"of the parent\n")
    pipe.read()
    pid = os.fork()
    if not pid:
        pipe.stream.write(b"of the child\n")
        os._exit(len(caplog.messages))
    assert os.waitpid(pid, 0)[1] == 0
    assert pipe.read() == b"of the child\n"
    pipe.stream.write(b"of the parent\n")
    assert caplog.messages == [f"1 {LOST}"]


def test_pipe_of_another_user_does_not_block(pipe, caplog):
    """It cannot be opened again, like the pipe of a container's log sometimes."""
    pipe.stream._detach()
    pipe.stream._write = pipe.stream._write_after_poll
    pipe.stream.write(b"x" * 10_000 + b"\n")
    assert pipe.read() == b"x" * 10_000 + b"\n"
    pipe.fill()
    pipe.stream.write(b"lost\n")
    pipe.read()
    pipe.stream.write(b"there\n")
    assert pipe.read() == b"there\n"
    assert caplog.messages == [f"1 {LOST}"]


def test_lines_without_a_reader_are_lost(caplog):
    made = Pipe()
    os.close(made.reading)
    assert made.stream.write(b"lost\n") == 5
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), made.writing)
    made.stream.attach()
    made.stream.write(b"there\n")
    made.stream.close()
    assert caplog.messages == ["1 lines of the test were lost: Broken pipe"]


def test_journal_that_does_not_read_does_not_block(caplog):
    """Its socket cannot be opened again, and stays blocking for other processes."""
    ours, journal = socket.socketpair()
    with journal:
        stream = Stream(ours.detach(), "the test")
        for _ in range(1000):
            assert stream.write(b"x" * 9999 + b"\n") == 10_000
        assert os.get_blocking(stream.fileno())
        journal.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while journal.recv(2**20):
                pass
        stream.write(b"there\n")
        assert journal.recv(100).lstrip(b"\n") == b"there\n"
        stream.close()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(LOST)


def test_stopped_terminal_does_not_block(caplog):
    """Ctrl-S stops it."""
    master, slave = pty.openpty()
    stream = Stream(slave, "the test")
    os.write(master, b"\x13")
    while has_room(slave):
        stream.write(b"x" * 1000 + b"\n")
        time.sleep(0.001)
    seconds = []
    for _ in range(100):
        started = time.monotonic()
        stream.write(b"lost\n")
        seconds.append(time.monotonic() - started)
    assert sum(seconds) - max(seconds) < 1, "besides one pause of the machine"
    stream.close()
    os.close(master)


def has_room(descriptor):
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return poll.poll(0)


# --- Log files and the system's log


@pytest.fixture
def logger():
    """A logger of its own, whose handlers `install` treats like all others."""
    made = logging.getLogger("test_streams")
    made.propagate = False
    yield made
    for handler in made.handlers[:]:
        made.removeHandler(handler)
        handler.close()


@pytest.fixture
def install(monkeypatch):
    """Install the streams; afterwards restore the standard ones."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    return lambda uid=0: streams.install(uid, uid)


@pytest.fixture
def handle(logger, install):

    def add(path):
        handler = logging.FileHandler(path)
        logger.addHandler(handler)
        install()
        return handler

    return add


def reopen(handler):
    """Reopen a log file like gunicorn at SIGUSR1."""
    handler.close()
    handler.stream = handler._open()


@pytest.fixture
def fifo(tmp_path):
    """A named pipe with a reader; the path, and the reader's descriptor."""
    path = tmp_path / "log"
    os.mkfifo(path)
    return path, os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def test_log_at_a_named_pipe_does_not_block_before_or_after_reopening(fifo, logger, handle):
    path, reading = fifo
    handler = handle(path)
    for _ in range(2):
        for _ in range(100):
            logger.error("x" * 10_000)
        reopen(handler)
    os.close(reading)


def test_log_at_a_named_pipe_without_a_reader_does_not_block(fifo, logger, handle, capfd):
    path, reading = fifo
    handler = handle(path)
    os.close(reading)
    reopen(handler)
    logger.error("instead")
    expected = f"cannot open the log file {path}: No such device or address\ninstead\n"
    assert capfd.readouterr().err == expected


def test_log_file_on_a_disk_is_written_and_reopened(tmp_path, logger, handle):
    path = tmp_path / "log"
    handler = handle(path)
    logger.error("one")
    path.rename(tmp_path / "old")
    reopen(handler)
    logger.error("two")
    assert (tmp_path / "old").read_text() == "one\n"
    assert path.read_text() == "two\n"


def test_system_log_that_does_not_read_does_not_block(tmp_path, logger, install, caplog):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "syslog"))
        logger.addHandler(logging.handlers.SysLogHandler(str(tmp_path / "syslog")))
        install()
        for _ in range(1000):
            logger.error("line")
        daemon.setblocking(False)
        received = 0
        with contextlib.suppress(BlockingIOError):
            while daemon.recv(100):
                received += 1
        logger.error("there")
        assert daemon.recv(100) == b"<11>there\0"
    messages = [record.message for record in caplog.records if record.name != logger.name]
    assert messages == [f"{1000 - received} lines of the system log were lost: it has fallen behind"]


# --- The service


@pytest.fixture
def relu(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    return write_config(tmp_path, {"name": "relu", "base_path": "relu"})


@contextlib.contextmanager
def stuck(directory, config, *arguments, **variables):
    """A service whose output is a full pipe without a reader; yield it and the pipe."""
    pipe = Pipe()
    pipe.fill()
    process = subprocess.Popen(
        ["gunicorn", "-b", f"127.0.0.1:{(port := free_port())}", "-w", "2", *arguments],
        cwd=ROOT,
        env=environment(directory, OVMS_REST_CONFIG=str(config), **variables),
        stdout=pipe.writing,
        stderr=pipe.writing,
        start_new_session=True,
    )
    (directory / "service.log").touch()
    service = Service(process, directory / "service.log")
    service.port = port
    try:
        service.wait_for(lambda: answers(service))
        yield service, pipe
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        pipe.stream.close()
        os.close(pipe.reading)


def answers(service):
    with contextlib.suppress(OSError):
        return service.get("/v2/health/ready").status == 200
    return False


@pytest.mark.parametrize("options", [(), ("--access-logfile", "-", "--error-logfile", "/dev/stderr")])
def test_service_does_not_wait_for_a_reader_of_standard_error(tmp_path, relu, options):
    """Workers are replaced, requests succeed and models reload; the log continues when it is read."""
    with stuck(tmp_path, relu, *options, OVMS_REST_ACCESS_LOG="json") as (service, pipe):
        before = service.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda: len(service.workers()) == 2 and not set(service.workers()) & set(before))
        for _ in range(20):
            assert service.get("/v2/models/relu").status == 200
        model_zoo.save(model_zoo.relu(), tmp_path / "relu", 2)
        assert service.request("POST", "/v1/config/reload").status == 201
        pipe.read()
        service.signal(signal.SIGTTIN)
        data = bytearray()

        def is_logged():
            data.extend(pipe.read())
            is_lost = re.search(rb"lines of (the standard error|/dev/stderr) were lost", data)
            return b"Handling signal: ttin" in data and is_lost

        service.wait_for(is_logged)
        assert os.get_blocking(pipe.writing), "the shell that started it has the same open file"
