"""A worker above the memory limit is replaced once its successor is ready, and no client notices."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import model_zoo
import numpy as np
import pytest
import slow_models
from generations import settings_with
from raw_http import RELU, RELU_PATH, connected, head, infer, post, receive
from service import is_running, repeating, serve, write_config

from ovms_rest.arbiter.memory_limit import FreshSize, MemoryLimit
from ovms_rest.host.process_memory import own_bytes

MIB = 2**20
LIMIT = "OVMS_REST_MAX_WORKER_MEMORY_BYTES"
REPLACED = re.compile(r"worker (\d+) ends; its successor was ready after")


@contextlib.contextmanager
def connected_by(path):
    """Open a connection to a unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        yield connection


def spent(pid):
    """Return the CPU time of a process in seconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A config with relu, and growing, whose worker grows with every new shape."""
    directory = tmp_path_factory.mktemp("models")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    model_zoo.save(slow_models.growing(), directory / "growing")
    model_zoo.save(slow_models.counting(), directory / "counting")
    return write_config(directory, *({"name": name, "base_path": name} for name in ("relu", "growing", "counting")))


def random_picture(generator):
    """Write an inference with a shape of its own."""
    shape = [1, 3, *map(int, generator.integers(16, 200, 2))]
    text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape}]}).encode()
    body = text + generator.standard_normal(shape, np.float32).tobytes()
    return post("/v2/models/growing/infer", body, f"Inference-Header-Content-Length: {len(text)}")


def clients(service, count=3):
    """Infer with random shapes continuously, on connections that are kept alive; none may fail."""
    generator = np.random.default_rng(0)

    def infer():
        with service.connect() as connection:
            for _ in range(20):
                connection.sendall(random_picture(generator))
                answer = receive(connection, "POST")
                assert answer.status == 200, answer
                if answer.headers.get("connection") == "close":
                    break

    return repeating(infer, count)


def metric(service, name):
    text = service.get("/metrics").body.decode()
    return float(re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)[1])


class Worker:
    """A worker as the limit uses it: this process or a child."""

    def __init__(self, pid, fresh=False):
        self.pid, self.fresh_size = pid, FreshSize()
        if fresh:
            self.fresh_size.measure()


def test_worker_above_the_limit_is_found():
    assert MemoryLimit(2**40).find_outgrown([Worker(os.getpid())]) is None
    assert MemoryLimit(0).find_outgrown([Worker(os.getpid())]) is None
    grown = Worker(os.getpid())
    assert MemoryLimit(MIB).find_outgrown([grown]) is grown


def test_workers_are_measured_once_a_second_and_less_often_after_a_replacement(monkeypatch):
    limit, worker, now = MemoryLimit(MIB), Worker(os.getpid()), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert limit.find_outgrown([worker]) is worker
    now += 0.9
    assert limit.find_outgrown([worker]) is None
    now += 0.2
    assert limit.find_outgrown([worker]) is worker
    limit.pause(0.5)
    now += 1.9
    assert limit.find_outgrown([worker]) is None
    now += 0.2
    assert limit.find_outgrown([worker]) is worker


def test_worker_that_started_above_the_limit_is_logged_once_per_generation(caplog):
    worker = Worker(os.getpid(), fresh=True)
    limit = MemoryLimit(MIB)
    for count in (1, 1, 2):
        if count == 2:
            limit.forget()
        limit._next_look = 0.0
        assert limit.find_outgrown([worker]) is None
        assert caplog.text.count("a new worker already uses") == count


def test_worker_that_has_just_died_has_no_memory(caplog):
    with subprocess.Popen(["true"]) as gone:
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
        assert MemoryLimit(1).find_outgrown([Worker(gone.pid)]) is None
    assert not caplog.records


def test_memory_that_cannot_be_measured_is_logged_once_per_generation(caplog):
    with subprocess.Popen(["true"]) as gone:
        pass
    limit = MemoryLimit(1)
    for count in (1, 1, 2):
        if count == 2:
            limit.forget()
        limit._next_look = 0.0
        assert limit.find_outgrown([Worker(gone.pid)]) is None
        messages = [record.message for record in caplog.records]
        line = f"{LIMIT} has no effect while the memory of workers cannot be measured: No such file or directory"
        assert messages == count * [line]


def test_worker_that_could_not_be_measured_is_found_at_the_next_look(caplog):
    limit, worker = MemoryLimit(MIB), Worker(os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert limit.find_outgrown([worker]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in caplog.text
    limit._next_look = 0.0
    assert limit.find_outgrown([worker]) is worker


def test_worker_that_cannot_be_measured_does_not_hide_another():
    with subprocess.Popen(["true"]) as gone:
        pass
    grown = Worker(os.getpid())
    assert MemoryLimit(MIB).find_outgrown([Worker(gone.pid), grown]) is grown


def test_workers_above_the_limit_are_replaced_one_at_a_time_and_no_request_fails(tmp_path, models):
    variables = {LIMIT: str(24 * MIB), "OVMS_REST_METRICS_ENABLE": "1"}
    with serve(tmp_path, "-w", "2", config=models, **variables) as service:
        service.wait_for_workers(2)
        before, seen = service.workers(), []

        def are_replaced():
            seen.append((len(service.workers()), metric(service, "ovms_streams")))
            return set(REPLACED.findall(service.log)) >= set(map(str, before))

        with clients(service):
            service.wait_for(are_replaced)
        assert {streams for _, streams in seen} <= {2, 3}, "the successor was ready first"
        assert max(workers for workers, _ in seen) == 3
        replaced = len(REPLACED.findall(service.log))
        assert metric(service, "ovms_rest_worker_memory_replacements") >= replaced >= 2
        assert metric(service, "ovms_rest_worker_restarts") == 0
        line = rf"worker {before[0]} uses (\d+) MiB of private memory, above the limit of 24 MiB"
        assert int(re.search(line, service.log)[1]) >= 24
        service.wait_for_workers(2)


def test_control_worker_above_the_limit_is_replaced(tmp_path, models):
    """It keeps the freed memory of a body."""
    path = tmp_path / "control"
    variables = {LIMIT: str(16 * MIB), "OVMS_REST_CONTROL_BIND": f"unix:{path}"}
    with serve(tmp_path, "-w", "1", config=models, **variables) as service:
        service.wait_for_workers(2)
        control = service.workers()[0]  # is forked first
        with connected_by(path) as connection:
            connection.sendall(post(RELU_PATH, b" " * 24 * MIB))
            assert receive(connection, "POST").status == 404
            assert own_bytes(control) > 16 * MIB
            service.wait_for(lambda: f"worker {control} ends; its successor was ready after" in service.log)
        service.wait_for(lambda: not is_running(control))
        service.wait_for_workers(2)
        for _ in range(3):
            with connected_by(path) as connection:
                connection.sendall(head("GET", "/v2/health/ready") + post(RELU_PATH, RELU))
                assert [receive(connection).status for _ in range(2)] == [200, 404]
        assert service.get("/v2/health/ready").status == 200
        assert "died" not in service.log


def test_workers_that_start_above_the_limit_are_left_alone_and_logged_once(tmp_path, models):
    with serve(tmp_path, "-w", "2", config=models, **{LIMIT: str(MIB)}) as service:
        service.wait_for_workers(2)
        before = service.workers()
        line = "a new worker already uses"
        service.wait_for(lambda: line in service.log)
        with clients(service):
            time.sleep(2.5)  # in which the arbiter looks at them twice
        assert service.workers() == before
        assert service.log.count(line) == 1
        assert "ends" not in service.log


def test_successor_that_cannot_be_started_leaves_the_worker_serving(tmp_path, models):
    fault = tmp_path / "fault"
    hook = f"""
import pathlib
from ovms_rest.arbiter import hooks
def post_worker_init(worker):
    if pathlib.Path({str(fault)!r}).exists():
        raise RuntimeError('a fault of the test')
    hooks.post_worker_init(worker)
"""
    with serve(
        tmp_path, "-w", "1", "-c", settings_with(tmp_path, hook), config=models, **{LIMIT: str(24 * MIB)}
    ) as service:
        service.wait_for_workers(1)
        (before,) = service.workers()
        fault.touch()
        with clients(service, 1):
            service.wait_for(lambda: "a fault of the test" in service.log)
            # A change by call does not report workers that have nothing to do with it.
            assert service.request("POST", "/v1/config/reload", b"").status == 200
            assert before in service.workers()
            assert not REPLACED.search(service.log)
            fault.unlink()
            service.wait_for(lambda: REPLACED.search(service.log))
        service.wait_for(lambda: not is_running(before))


def test_worker_that_dies_while_another_drains_is_replaced_immediately(tmp_path, models):
    """Gunicorn counts draining workers, here the only one left."""
    with serve(tmp_path, "-w", "2", config=models) as service:
        service.wait_for_workers(2)
        ending, dying = service.workers()
        os.kill(dying, signal.SIGSTOP)
        before = spent(ending)
        with connected(service, infer("counting", slow_models.count(20 * slow_models.SLOW))) as connection:
            service.wait_for(lambda: spent(ending) > before + 0.1)
            service.signal(signal.SIGTTOU)
            service.wait_for(lambda: "Handling signal: ttou" in service.log)
            os.kill(dying, signal.SIGKILL)
            service.wait_for(lambda: set(service.workers()) - {ending, dying})
            assert is_running(ending)
            assert receive(connection, "POST").status == 200
