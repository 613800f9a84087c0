"""deploy/hosts as a whole: a balancer and hosts in network namespaces, with real nginx and real services."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import model_zoo
import namespaces
import nginx
import numpy as np
import slow_models
from openvino import Type, opset15
from processes import adopting
from raw_http import infer
from service import PATIENCE, ROOT, Answer, Service, is_running, read_response, serve, wait_for, write_config

DEPLOY = ROOT / "deploy" / "hosts"
SCRIPT = DEPLOY / "hosts.py"
CONFIG = "config.json"


def adding(number: int):
    """Return a model x FP32 [-1,4] -> y = x + number, so that a response shows which version made it."""
    x = model_zoo.parameter("x", (-1, 4), Type.f32)
    return model_zoo.model_of({"y": opset15.add(x, opset15.constant(np.float32([number])))}, [x])


def write_models(directory: Path) -> Path:
    """Write version 1 of `adding`, which the config pins, of `watched` and of `counting`; return the config."""
    model_zoo.save(adding(1), directory / "adding")
    model_zoo.save(adding(1), directory / "watched")
    model_zoo.save(slow_models.counting(), directory / "counting")
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    return write_config(
        directory,
        {"name": "adding", "base_path": "adding", **pinned(1), **exact},
        {"name": "watched", "base_path": "watched", **exact},
        {"name": "counting", "base_path": "counting", **exact},
    )


def pinned(version: int) -> dict:
    """Return the key that lets a model serve one version only."""
    return {"model_version_policy": {"specific": {"versions": [version]}}}


def install_balancer(directory: Path, addresses: Sequence[str], **replaced: str) -> int:
    """Install the balancer's files as the README does, with these hosts; return the port for clients."""
    port, _ = nginx.install(directory, directory / "absent", "http", **replaced)
    for name in ("servers.conf", "hosts.conf"):
        shutil.copy(DEPLOY / "balancer" / name, directory / "ovms_rest")
    hosts = directory / "ovms_rest" / "hosts.conf"
    text = hosts.read_text()
    for number, address in enumerate(addresses):
        assert f"server 10.0.0.{11 + number}:80 " in text
        text = text.replace(f"server 10.0.0.{11 + number}:80 ", f"server {address} ")
    hosts.write_text(text)
    return port


class Host:
    """A host: the service and nginx in front of it. Both can be killed and started again."""

    def __init__(self, directory: Path, namespace: namespaces.Namespace) -> None:
        self.directory = directory
        self.namespace = namespace
        self.service: Service
        self.nginx: nginx.Nginx
        self._running_service, self._running_nginx = contextlib.ExitStack(), contextlib.ExitStack()
        directory.mkdir(parents=True)
        write_models(directory)
        listen = "listen 127.0.0.1:9000;"
        operators = {listen: f"{listen} listen {namespace.address}:9000;", "listen 80 ": "listen 80 "}
        nginx.install(directory / "nginx", directory, "http", **operators)
        for file in (DEPLOY / "host").iterdir():
            shutil.copy(file, directory / "nginx" / "ovms_rest")
            (directory / "nginx" / "ovms_rest" / "enabled" / file.name).symlink_to(f"../{file.name}")

    @property
    def address(self) -> str:
        return self.namespace.address

    def start_service(self) -> None:
        with self.namespace.inside():
            self.service = self._running_service.enter_context(
                serve(
                    self.directory,
                    *("-w", "1", "--graceful-timeout", "10"),
                    bind=("-b", "127.0.0.1:0", "-b", f"unix:{self.directory}/data.sock"),
                    config=self.directory / CONFIG,
                    OVMS_REST_CONTROL_BIND=f"unix:{self.directory}/control.sock",
                    OVMS_REST_METRICS_ENABLE="true",
                )
            )
        self.service.wait_for_workers(2)

    def start_nginx(self) -> None:
        with self.namespace.inside():
            self.nginx = self._running_nginx.enter_context(nginx.start(self.directory / "nginx", 80, 9000))

    def start(self) -> "Host":
        self.start_service()
        self.start_nginx()
        return self

    def kill_service(self) -> None:
        """Kill all processes of the service at once."""
        with adopting():
            workers = self.service.workers()
            os.killpg(self.service.process.pid, signal.SIGKILL)
            self.service.process.wait(PATIENCE)
            _reap(workers)
            self._running_service.close()

    def kill_nginx(self) -> None:
        """Kill all processes of nginx at once."""
        with adopting():
            workers = self.nginx.workers()
            for pid in (self.nginx.process.pid, *workers):
                os.kill(pid, signal.SIGKILL)
            self.nginx.process.wait(PATIENCE)
            _reap(workers)
            self._running_nginx.close()

    def request(self, method: str, path: str, body: dict | None = None) -> Answer:
        """Send a request to the operators' address."""
        with self.namespace.inside():
            return self.nginx.operators.request(method, path, body)

    def versions(self, model: str = "adding") -> list[str]:
        """Return the versions of a model that serve."""
        rows = self.request("POST", "/v2/repository/index", {"ready": True}).json()
        return [row["version"] for row in rows if row["name"] == model]

    def is_counting(self) -> bool:
        """Return whether a worker is inferring with `counting`."""
        return bool(
            re.search(r'ovms_current_requests\{name="counting".*\} 1', self.request("GET", "/metrics").body.decode())
        )

    def inferences(self, model: str = "adding") -> int:
        """Return the number of inferences with a model so far."""
        rows = self.request("GET", f"/v2/models/{model}/stats").json()["model_stats"]
        return sum(row["execution_count"] for row in rows)

    def stop(self) -> None:
        with self._running_service, self._running_nginx:
            pass


def _reap(pids: Sequence[int]) -> None:
    """Wait until killed processes whose parent was killed too are gone."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        wait_for(lambda pid=pid: not is_running(pid), lambda pid=pid: f"process {pid} is still running")


class Cluster(NamedTuple):
    """A running balancer with hosts; clients are in the namespace of the balancer."""

    network: namespaces.Network
    balancer: nginx.Nginx
    hosts: list[Host]

    @property
    def list(self) -> Path:
        return self.balancer.directory / "ovms_rest" / "hosts.conf"

    def operate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run hosts.py on the balancer; return its end and its output."""
        with self.network.hub.inside():
            command = f"{nginx.PROGRAM} -p {self.balancer.directory}/ -c {self.balancer.directory}/nginx.conf"
            return subprocess.run(
                [sys.executable, str(SCRIPT), "--list", str(self.list), "--nginx", command, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=4 * PATIENCE,  # several loads, one after another
                check=False,
            )


@contextlib.contextmanager
def run(directory: Path, count: int = 3) -> Iterator[Cluster]:
    """Run a balancer and hosts, installed as the README does."""
    with namespaces.network(count) as network, contextlib.ExitStack() as stack:
        hosts = [Host(directory / f"host{at}", namespace) for at, namespace in enumerate(network.hosts)]
        for host in hosts:
            stack.callback(host.stop)
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(Host.start, hosts))
        with network.hub.inside():
            for line in (DEPLOY / "balancer" / "90-ovms_rest_balancer.conf").read_text().splitlines():
                if line and not line.startswith("#"):
                    name, _, value = line.partition(" = ")
                    Path("/proc/sys", name.replace(".", "/")).write_text(value)
            port = install_balancer(directory / "balancer", [f"{host.address}:80" for host in hosts])
            balancer = stack.enter_context(nginx.start(directory / "balancer", port, port))
        yield Cluster(network, balancer, hosts)


# --- Clients


class Answered(NamedTuple):
    """A correct response: which client got it, when it was asked for, how long it took, and which version it is of."""

    client: int
    at: float
    seconds: float
    version: str


class Clients:
    """Clients of a balancer that send an inference each at intervals; a wrong or missing response is a failure.

    `closed` counts connections that ended when they were used again, before a byte of a response: a server may close
    an idle connection at any time, and clients then send on a new one.
    """

    def __init__(self, cluster: Cluster, model: str = "adding", clients: int = 6, interval: float = 0.05) -> None:
        self.answers: list[Answered] = []
        self.failures: list[str] = []
        self.closed = 0
        self._cluster = cluster
        self._model = model
        self._interval = interval
        self._is_over = threading.Event()
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in range(clients)]

    def _run(self, client: int) -> None:
        while not self._is_over.is_set():
            is_reused = False
            try:
                with self._cluster.network.hub.connect(self._cluster.balancer.port) as connection:
                    stream = connection.makefile("rb", buffering=1)
                    while self._ask(client, connection, stream) and not self._is_over.wait(self._interval):
                        is_reused = True
            except Exception as error:
                if is_reused and isinstance(error, ConnectionError):
                    self.closed += 1
                else:
                    self.failures.append(repr(error))

    def _ask(self, client: int, connection: socket.socket, stream: IO[bytes]) -> bool:
        """Send an inference and check its response; return whether the connection stays open."""
        number = next(self._numbers) % 2**20
        data = [number, -number, 0.5, 1]
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}
        started = time.monotonic()
        connection.sendall(infer(self._model, {"inputs": [tensor]}, f"X-Request-ID: number-{number}"))
        answer = read_response(stream, "POST")
        seconds = time.monotonic() - started
        found = answer.json() if answer.status == 200 else {}
        expected = [item + int(found.get("model_version", 0)) for item in data]
        if answer.status != 200 or found["outputs"][0]["data"] != expected:
            self.failures.append(f"{data}: {answer}")
        elif answer.headers["x-request-id"] != f"number-{number}":
            self.failures.append(f"{data}: id {answer.headers['x-request-id']}")
        else:
            self.answers.append(Answered(client, started, seconds, found["model_version"]))
        return answer.headers.get("connection") != "close"

    def go_on(self, count: int) -> list[Answered]:
        """Wait until each client has this number of responses to requests sent from now on; return all responses since.

        So those of requests that were under way are among them.
        """
        now, first = time.monotonic(), len(self.answers)

        def have_come() -> bool:
            assert self.failures == []
            counts = Counter(answer.client for answer in self.answers[first:] if answer.at >= now)
            return all(counts[client] >= count for client in range(len(self._threads)))

        wait_for(have_come, lambda: f"{len(self.answers) - first} responses since then")
        return self.answers[first:]

    def wait_for_version(self, version: str) -> None:
        """Wait until five or more responses to each client are all of this version of the model.

        The workers that a reload replaces serve until all new ones are ready, while the index already has the new
        version.
        """
        wait_for(lambda: versions(self.go_on(5)) == {version}, lambda: f"versions: {versions(self.answers[-30:])}")

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def versions(answers: Sequence[Answered]) -> set[str]:
    return {answer.version for answer in answers}


def quantile(answers: Sequence[Answered], share: float) -> float:
    """Return a quantile of the times of responses, in seconds."""
    return float(np.quantile([answer.seconds for answer in answers], share))
