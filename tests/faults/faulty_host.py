"""A host with the service behind nginx, whose processes and files can be harmed.

The sockets between nginx and the service outlive the service, as with deploy/systemd; this module starts the service
again after its end, as systemd does.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

import faulty_models
import nginx
import numpy as np
from activation import listening, start_activated
from nginx import Nginx
from processes import adopting
from raw_http import LIVE, head
from service import PATIENCE, ROOT, Answer, Service, environment, is_running, receive, wait_for
from steady_load import Load
from surroundings import Setup

WORKERS = 2
# gunicorn's --timeout, 30 s by default: a worker that hangs is killed after it.
TIMEOUT_SECONDS = 3
# RestartSec in deploy/systemd/ovms_rest.service.
RESTART_SECONDS = 2
# Models are loaded on cores that nobody else wants, so that a load may take long beside other tests.
LOAD_SECONDS = 300
# A worker has some 15 MiB of its own when it starts, and the steady load adds less than as much again.
LIMIT_MIB = 96


class Host:
    """A running host under load."""

    service: Service
    nginx: Nginx | None = None
    load: Load

    def __init__(self, directory: Path, setup: Setup, ports: tuple[int, int], sockets: Sequence[socket.socket]) -> None:
        self.directory, self.models, self.setup = directory, directory / "models", setup
        self.own: Counter[str] = Counter()  # outcomes of the requests that belong to a fault
        self.version, self.factor = 1, 1.0  # of the model `versioned`, as served
        self._ports, self._nginx = ports, contextlib.ExitStack()
        self._sockets, self._nginx_sockets = sockets[:2], sockets[2:]

    # --- The service

    @property
    def config(self) -> Path:
        """The config file of the service."""
        return self.models / "config.json"

    def start_service(self) -> None:
        """Start the service and wait until it is ready."""
        variables = {
            "OVMS_REST_CONFIG": str(self.config),
            "OVMS_REST_CONTROL_BIND": f"unix:{self.directory}/control.sock",
            "OVMS_REST_METRICS_ENABLE": "true",
            "OVMS_REST_MAX_WORKER_MEMORY_BYTES": str(LIMIT_MIB * 2**20),
            **self.setup.variables(self.directory),
        }
        prefix = [*self.setup.prefix(self.directory), *self.setup.service_prefix(self.directory)]
        command = [*prefix, "gunicorn", "-w", str(WORKERS), "--timeout", str(TIMEOUT_SECONDS)]
        log = self.directory / "service.log"
        with log.open("ab") as stream:
            process = start_activated(
                command, self._sockets, cwd=ROOT, env=environment(self.directory, **variables),
                stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.service = Service(process, log)
        self.service.wait_for(self.is_whole)

    def kill_arbiter(self, with_workers: bool) -> None:
        """Kill the arbiter, and its workers as systemd does; otherwise they end by themselves."""
        workers = self.service.workers()
        self.service.signal(signal.SIGKILL)
        self.service.process.wait(PATIENCE)
        if with_workers:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        time.sleep(RESTART_SECONDS)
        self.start_service()
        for pid in workers:
            wait_for(lambda pid=pid: os.waitpid(pid, os.WNOHANG)[0], lambda pid=pid: f"worker {pid} is left")

    def stop_service(self) -> None:
        """End the service in order."""
        self.service.signal(signal.SIGTERM)
        status = self.service.process.wait(PATIENCE)
        assert status == 0, self.log()

    def end(self) -> None:
        """End nginx, and kill all processes of the service that are left."""
        self._nginx.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.service.process.pid, signal.SIGKILL)
        self.service.process.wait(PATIENCE)

    def is_whole(self) -> bool:
        """Return whether all workers run, and none that drains."""
        status = self.service.process.poll()
        assert status is None, f"the service ended with {status}:\n{self.log()}"
        with contextlib.suppress(FileNotFoundError):
            pids = self.service.workers()
            if len(pids) == WORKERS + 1 and all(map(is_running, pids)):
                return self.nginx is None or self.nginx.get("/v2/health/ready").status == 200
        return False

    def connect_to_service(self) -> socket.socket:
        """Open a connection to the service without nginx."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._sockets[0].getsockname())
        return connection

    def oldest_worker(self) -> int:
        """Return the process id of the worker that has run longest; the control worker is among them."""
        return min(self.service.workers(), key=_started)

    def inferring_worker(self) -> int:
        """Return the process id of the oldest of the other workers."""
        control = self._sockets[1]
        return min((pid for pid in self.service.workers() if not _watches(pid, control)), key=_started)

    def reload(self) -> Answer:
        """Load what changed, and return when it is served."""
        with self.nginx.operators.connect() as connection:
            connection.settimeout(LOAD_SECONDS)
            connection.sendall(head("POST", "/v1/config/reload", "Content-Length: 0", "Connection: close"))
            return receive(connection, "POST")

    def metric(self, name: str) -> float:
        """Return the sum of a metric's values."""
        lines = self.nginx.operators.get("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def dates(self) -> list[float]:
        """Return the time of day in seconds of nginx and of a worker, as their responses say."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self._sockets[0].getsockname())
            connection.sendall(LIVE)
            answers = receive(connection), self.nginx.get("/v2/health/live")
        return [parsedate_to_datetime(answer.headers["date"]).timestamp() for answer in answers]

    # --- nginx

    def start_nginx(self) -> None:
        """Start nginx and wait until it listens."""
        prefix = self.setup.prefix(self.directory)
        started = nginx.start(self.directory / "nginx", *self._ports, self._nginx_sockets, prefix)
        self.nginx = self._nginx.enter_context(started)

    def stop_nginx(self) -> None:
        """End nginx as its systemd unit does: it answers the requests that it has."""
        self.nginx.signal(signal.SIGQUIT)
        self.nginx.process.wait(PATIENCE)
        self._nginx.close()

    # --- Requests that belong to a fault

    def ask(self, model: str, request: dict) -> Answer:
        """Infer once and count the status."""
        answer = self.nginx.infer(model, request)
        self.own[str(answer.status)] += 1
        return answer

    def ask_binary(self, model: str, array: np.ndarray) -> Answer:
        """Infer once with an input x of binary data and count the status."""
        text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": list(array.shape)}]}).encode()
        answer = self.nginx.infer(model, text + array.tobytes(), Inference_Header_Content_Length=str(len(text)))
        self.own[str(answer.status)] += 1
        return answer

    # --- Recovery

    def wait_until_whole(self) -> None:
        """Wait until all processes run and every client has been served since."""
        wait_for(self.is_whole, self.log)
        self.load.wait_for_all(self.log)

    def log(self) -> str:
        """Return the end of the service's log."""
        return self.service.log[-8000:]


def _watches(pid: int, sock: socket.socket) -> bool:
    """Return whether a process waits in epoll for a socket (proc(5), fdinfo)."""
    text = f" ino:{os.fstat(sock.fileno()).st_ino:x} "
    with contextlib.suppress(OSError):  # closed meanwhile
        for file in Path(f"/proc/{pid}/fdinfo").iterdir():
            if text in file.read_text():
                return True
    return False


def _started(pid: int) -> tuple[int, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]), pid  # in ticks since the system started (proc(5))


def missing() -> str:
    """Return what no host can do without and is missing here, or ""."""
    return "Debian's package nginx is missing" if nginx.PROGRAM is None else ""


@contextlib.contextmanager
def running(directory: Path, setup: Setup) -> Iterator[Host]:
    """Run a host under load in a directory; end all its processes."""
    models = directory / "models"
    models.mkdir()
    faulty_models.save(models)
    ports = nginx.install(directory / "nginx", directory, "http")
    with adopting(), listening(directory / "data.sock", directory / "control.sock", *ports) as sockets:
        host = Host(directory, setup, ports, sockets)
        try:
            host.start_service()
            host.start_nginx()
            with Load(host.nginx.port) as host.load:
                host.load.wait_for_all(host.log)
                yield host
            host.stop_service()
        finally:
            host.end()
