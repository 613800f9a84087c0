"""A real gunicorn with the service, started as by a user."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds until a test gives up


Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], explain: Callable[[], str], seconds: float = PATIENCE) -> Found:
    """Wait until a condition holds and return its result; fail with an explanation after a timeout."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out after {seconds} s:\n{explain()}"
        time.sleep(0.02)
    return found


class Answer(NamedTuple):
    """A response; the names of `headers` are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


class Service:
    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process = process
        self._log = log
        self.port = 0

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], Found]) -> Found:
        """Wait until a condition holds and return its result; fail with the log after a timeout."""
        return wait_for(condition, lambda: self.log)

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait_for_workers(self, count: int) -> None:
        """Wait until this number of workers serve: each has reached its event loop and waits there."""
        self.wait_for(lambda: len(pids := self.workers()) == count and all(map(is_waiting, pids)))

    def wait_until_idle(self) -> None:
        """Wait until all workers wait in their event loops."""
        self.wait_for(lambda: all(map(is_waiting, self.workers())))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def request(self, method: str, path: str, body: bytes | dict | None = None, headers: dict | None = None) -> Answer:
        """Send a request on a new connection; a dict is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            return _read_answer(connection.getresponse())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def infer(self, model: str, body: bytes | dict, **headers: str) -> Answer:
        """POST an inference request; underscores in the names of headers stand for dashes."""
        return self.request(
            "POST",
            f"/v2/models/{model}/infer",
            body,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, data: bytes, half: bool = False) -> Answer:
        """Send bytes, then close the sending side if `half`; return the response."""
        with self.connect() as connection:
            connection.sendall(data)
            if half:
                connection.shutdown(socket.SHUT_WR)
            return receive(connection, data.split(b" ", 1)[0].decode("latin-1"))


def receive(connection: socket.socket, method: str = "GET") -> Answer:
    """Read the response to a request and not a byte more, skipping interim responses."""
    # With a buffer of one byte, read(n) waits for n bytes and nothing is read ahead.
    return read_response(connection.makefile("rb", buffering=1), method)


def read_response(stream: IO[bytes], method: str) -> Answer:
    """Read the response to a request from a stream, which stays open."""
    response = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: stream), method=method)
    response._close_conn = lambda: None
    response.begin()
    return _read_answer(response)


def _read_answer(response: http.client.HTTPResponse) -> Answer:
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return the environment with these variables and no others of ours or gunicorn's."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OVMS_REST_", "GUNICORN", "WEB_CONCURRENCY"))
    }
    return {**inherited, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}


@contextlib.contextmanager
def serve(
    directory: Path,
    *arguments: str,
    config: Path | None = None,
    prefix: Sequence[str] = (),
    bind: Sequence[str] = ("-b", "127.0.0.1:0"),
    cwd: Path = ROOT,
    program: str = "gunicorn",
    **variables: str,
) -> Iterator[Service]:
    """Run gunicorn on a free port, end it by SIGTERM, and check that no process is left.

    `prefix` is a command that runs another in its own process, `cwd` a directory instead of the checkout; `program` is
    what to run.
    """
    if config is not None:
        variables["OVMS_REST_CONFIG"] = str(config)
    log = directory / "service.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*prefix, program, *bind, *arguments],
            cwd=cwd,
            env=environment(directory, **variables),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    service = Service(process, log)
    try:

        def find_port():
            assert process.poll() is None, f"it ended with {process.returncode}:\n{service.log}"
            log = service.log
            if "; loading and unloading over HTTP: " in log:  # the last line of a start
                return re.search(r"Listening at: https?://(?:127\.0\.0\.1|0\.0\.0\.0|\[::\]):(\d+)", log)
            return None

        service.port = int(service.wait_for(find_port)[1])
        yield service
        if process.poll() is None:
            process.terminate()
            assert process.wait(PATIENCE) == 0, service.log
    finally:
        left = _end_session(process)
    assert not left, f"processes are left: {left}\n{service.log}"


def _end_session(process: subprocess.Popen) -> list[str]:
    """Kill the remaining processes of the service; return them."""
    left = [line for stat in Path("/proc").glob("[0-9]*/stat") if f" {process.pid} " in (line := _read(stat))]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    return left


def _read(stat: Path) -> str:
    """Return name, state, parent and session of a process, or "" if it is gone."""
    try:
        return " ".join(stat.read_text().split()[0:6]) + " "
    except OSError:
        return ""


def run_to_end(
    directory: Path, *arguments: str, bind: Sequence[str] = ("-b", "127.0.0.1:0"), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run gunicorn in the checkout where it should end by itself."""
    return subprocess.run(
        ["gunicorn", *bind, *arguments],
        cwd=ROOT,
        env=environment(directory, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def repeating(step: Callable[[], None], threads: int = 2) -> Iterator[list[Exception]]:
    """Repeat a step in threads until the block ends, then fail with the first exception; yield the exceptions."""
    is_over, failures, counts = threading.Event(), [], []

    def repeat() -> None:
        while not is_over.is_set():
            try:
                step()
            except Exception as error:
                failures.append(error)
            counts.append(1)

    running = [threading.Thread(target=repeat) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield failures
    finally:
        is_over.set()
        for thread in running:
            thread.join()
    assert counts
    assert not failures, failures[0]


def write_config(directory: Path, *models: dict, **sections: object) -> Path:
    """Write a config file with these models; return its path."""
    path = directory / "config.json"
    path.write_text(json.dumps({"model_config_list": [{"config": model} for model in models], **sections}))
    return path


def _cycle_ports() -> Iterator[int]:
    """Yield ports that the system gives to no client, in turn; each process of pytest-xdist has others."""
    count = 2048
    first = 16384 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8 * count
    start = random.randrange(count)
    return itertools.cycle(first + (start + number) % count for number in range(count))


_ports = _cycle_ports()


def free_port() -> int:
    """Return a port on which nobody listens, another one each time."""
    while True:
        port = next(_ports)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"])


def open_files(pid: int) -> list[str]:
    """Return the files that a process has open."""
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(file))
    return found


def is_waiting(pid: int) -> bool:
    """Return whether a worker has reached its event loop and waits there."""
    return "anon_inode:[eventpoll]" in open_files(pid) and "\nState:\tS" in Path(f"/proc/{pid}/status").read_text()


def wait_for_end(pid: int) -> None:
    """Wait until a process that something else ends is gone; fail after 10 seconds."""
    wait_for(lambda: not is_running(pid), lambda: f"process {pid} is still running", 10)
