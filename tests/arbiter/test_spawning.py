"""Workers that cannot be started or do not become ready: the others keep serving, and the reason is logged once."""

import contextlib
import errno
import http.client
import itertools
import os
import pwd
import queue
import re
import signal
import socket
import subprocess
import tempfile
import time
import types
from pathlib import Path

import model_zoo
import pytest
from generations import checking, fault, hang_up, kill_one, settings_with, wait_until_replaced, works
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from processes import limited
from raw_http import LIVE, RELU, RELU_PATH, post
from service import free_port, receive, run_to_end, serve, wait_for, write_config

from ovms_rest.arbiter.pauses import Pauses
from ovms_rest.arbiter.spawning import MAX_FAILURES, Spawning
from ovms_rest.shared_memory.table import WorkerTable

EXITING = """
import os

def inputs(params):
    return {"x": ("FP32", [-1])}

outputs = lambda params: {"y": ("FP32", [-1])}

def execute(inputs, params):
    if inputs["x"][0]:
        os._exit(int(inputs["x"][0]))
    return {"y": inputs["x"]}
"""


# --- Nothing to start a worker with


def test_arbiter_without_descriptors_keeps_its_workers_and_retries(start):
    with start(2) as service:
        before = service.workers()
        line = "cannot start a worker: Too many open files"
        with limited(service, "nofile", 3):
            kill_one(service)
            service.wait_for(lambda: line in service.log)
            with checking(service):
                time.sleep(1.0)  # in which it retries
            assert len(service.workers()) == 1
            assert service.log.count(line) == 1
        service.wait_for(lambda: len(service.workers()) == 2 and len(set(service.workers()) & set(before)) == 1)
        service.wait_for(lambda: "workers start again after " in service.log)
        assert works(service)
        with limited(service, "nofile", 3):  # again
            kill_one(service)
            service.wait_for(lambda: service.log.count(line) == 2)
        service.wait_for(lambda: len(service.workers()) == 2)


@pytest.mark.parametrize("how", ["signal", "call", "file"])
def test_reload_without_descriptors_fails_with_the_reason_and_is_repeated_later(start, tmp_path, how):
    with start(2, OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="1") as service:
        before = service.workers()
        reason = "file descriptors are free: Too many open files"
        with limited(service, "nofile", 3), checking(service):
            model_zoo.save(model_zoo.relu(), tmp_path / "relu", version=2)
            if how == "signal":
                service.signal(signal.SIGHUP)
                service.wait_for(lambda: "the reload failed; the service keeps" in service.log)
            elif how == "call":
                assert re.match(f"503 .*{reason}", fault(service.request("POST", "/v1/config/reload", b"")))
            else:
                service.wait_for(lambda: reason in service.log)
            assert service.workers() == before
        service.wait_for(lambda: service.get("/v2/models/relu/versions/2/ready").status == 200)
        assert service.log.count(reason) <= 1


def test_arbiter_out_of_processes_keeps_its_workers_and_retries():
    """Not as root, to whom the limit does not apply."""
    if os.geteuid():
        pytest.skip("only root can run the service as a user of its own, whose processes nobody else counts")
    user = 54_321
    with pytest.raises(KeyError):
        pwd.getpwuid(user)
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        directory = Path(made)
        model_zoo.save(model_zoo.relu(), directory / "relu")
        config = write_config(directory, {"name": "relu", "base_path": "relu"})
        subprocess.run(["chown", "-R", str(user), directory], check=True)
        reading = "+dac_read_search"  # of the interpreter, wherever it lies
        command = ["setpriv", "--reuid", str(user), "--clear-groups", "--inh-caps", reading, "--ambient-caps", reading]
        with serve(directory, "-w", "2", config=config, prefix=command) as service:
            service.wait_for(lambda: len(service.workers()) == 2)
            line = "cannot start a worker: Resource temporarily unavailable"
            with limited(service, "nproc", 1, ["setpriv", "--reuid", str(user)]):
                kill_one(service)
                service.wait_for(lambda: line in service.log)
                with checking(service):
                    model_zoo.save(model_zoo.relu(), directory / "relu", version=2)
                    reason = "cannot start a process to try models and nodes: Resource temporarily unavailable"
                    assert fault(service.request("POST", "/v1/config/reload", b"")) == f"503 {reason}"
                assert len(service.workers()) == 1
                assert service.log.count(line) == 1
            service.wait_for(lambda: len(service.workers()) == 2)
            service.wait_for(lambda: service.get("/v2/models/relu/versions/2/ready").status == 200)


class FakeArbiter:
    """An arbiter that cannot fork, as Spawning uses it."""

    def __init__(self, error):
        self.pid, self.num_workers, self.WORKERS = os.getpid(), 1, {}
        self.error = error
        self.attempts = 0

    def spawn_worker(self):
        self.attempts += 1
        self.row = table_of_one.take()
        raise self.error

    def manage_workers(self):
        self.spawn_workers()

    wait_for_signals = kill_worker = reap_workers = spawn_workers = stop = None


table_of_one = WorkerTable(1, 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (MemoryError(), "MemoryError: "),
        (RuntimeError("there are 4096 workers already"), "RuntimeError: there are 4096 workers already"),
    ],
)
def test_failed_fork_takes_no_slot_and_ends_the_start_after_some_attempts(error, reason, caplog, monkeypatch):
    monkeypatch.setattr(Pauses, "is_over", lambda self: True)
    arbiter = FakeArbiter(error)
    Spawning(arbiter, table_of_one)
    for _ in range(MAX_FAILURES):
        arbiter.manage_workers()
    with pytest.raises(HaltServer) as halted:
        arbiter.manage_workers()
    message = f"cannot start a worker: {reason}"
    assert (halted.value.reason, halted.value.exit_status) == (f"no worker became ready: {message}", 3)
    assert arbiter.attempts == MAX_FAILURES
    assert [record.message for record in caplog.records] == [message]
    table_of_one.free(table_of_one.take())  # raises when there is none


# --- Workers that end


def test_birth_of_a_worker_that_is_ready_is_reported():
    arbiter, born = FakeArbiter(None), []
    table = WorkerTable(2, 1)
    for number in (1, 2):
        worker = types.SimpleNamespace(pid=number, row=table.take(), born=float(number), is_ending=False)
        arbiter.WORKERS[number] = worker
    Spawning(arbiter, table, note_opened=born.append)
    worker.row.set_ready()
    arbiter.manage_workers()
    assert born == [2.0]


@pytest.mark.parametrize("status", [1, 3, 4])
def test_worker_that_exits_while_serving_affects_no_other(start, tmp_path, status):
    (tmp_path / "exiting.py").write_text(EXITING)
    node = {"name": "n", "type": "custom", "library_name": "exiting", "outputs": [{"data_item": "y", "alias": "y"}]}
    node["inputs"] = [{"x": {"node_name": "request", "data_item": "x"}}]
    outputs = [{"y": {"node_name": "n", "data_item": "y"}}]
    config = write_config(
        tmp_path,
        {"name": "relu", "base_path": "relu"},
        pipeline_config_list=[{"name": "p", "inputs": ["x"], "nodes": [node], "outputs": outputs}],
        custom_node_library_config_list=[{"name": "exiting", "base_path": "exiting.py"}],
    )

    def infer(value):
        return service.infer("p", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [value]}]})

    with start(2, config=config) as service:
        for _ in range(3):
            assert infer(0).status == 200
            before = service.workers()
            with pytest.raises(ConnectionError):
                infer(status)
            assert works(service)  # by the other worker
            service.wait_for(lambda before=before: len(service.workers()) == 2 and service.workers() != before)
            (dead,) = set(before) - set(service.workers())
            service.wait_for(lambda dead=dead: f"worker {dead} ended with exit status {status}" in service.log)


def test_worker_receives_a_termination_signal_sent_right_after_the_fork(start, tmp_path):
    """Python drops signals that arrive before it has handled the fork, so they are blocked until then."""
    hook = (
        "import os, signal\n"
        "def look(): os.write(2, b'blocked: %r' % sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))\n"
        "os.register_at_fork(after_in_child=look)\n"
    )
    with start(1, "-c", settings_with(tmp_path, hook)) as service:
        service.wait_for_workers(1)
        line = service.log[service.log.rindex("blocked: ") :].splitlines()[0]
        assert {"SIGTERM", "SIGINT", "SIGQUIT"} <= set(re.findall(r"SIG[A-Z]+", line))
        (pid,) = service.workers()
        assert int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) == 0
        os.kill(pid, signal.SIGTERM)
        service.wait_for(lambda: f"Worker exiting (pid: {pid})" in service.log)


@pytest.mark.parametrize("reason", ["max_requests", "max_requests of the control worker", "SIGTERM"])
def test_worker_that_drains_by_itself_is_replaced_while_it_finishes_its_requests(start, reason):
    port = free_port()
    arguments = ("--max-requests", "2") if "max_requests" in reason else ()
    variables = {"OVMS_REST_CONTROL_BIND": f"127.0.0.1:{port}"} if "control" in reason else {}
    with start(1, *arguments, **variables) as service:
        address = "127.0.0.1", port if variables else service.port
        before = service.workers()
        upload = post("/v2/repository/index", b"{}") if variables else post(RELU_PATH, RELU)

        def probe():
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(LIVE)
                return receive(connection).status

        with socket.create_connection(address, timeout=10) as uploading:
            uploading.sendall(upload[:-1])
            assert probe() == 200
            if arguments:
                assert probe() == 200
            else:
                os.kill(before[0], signal.SIGTERM)
            wait_for(lambda: len(service.workers()) > len(before), lambda: service.log, 10)
            assert probe() == 200
            assert set(before) < set(service.workers())
            uploading.sendall(upload[-1:])
            assert receive(uploading, "POST").status == 200
        service.wait_for(lambda: len(service.workers()) == len(before))
        assert "SIGKILL" not in service.log


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("def post_fork(arbiter, worker): raise ValueError('mine')", "a worker ended with exit status 3 before"),
        ("def post_fork(arbiter, worker): __import__('os')._exit(7)", "a worker ended with exit status 7 before"),
        ("def post_fork(arbiter, worker): __import__('os').kill(worker.pid, 9)", "a worker ended with SIGKILL before"),
        ("def pre_fork(arbiter, worker): raise ValueError('mine')", "cannot start a worker: ValueError: mine"),
    ],
)
def test_start_at_which_no_worker_becomes_ready_ends_with_the_reason(tmp_path, relu, hook, reason):
    ended = run_to_end(tmp_path, "-w", "2", "-c", settings_with(tmp_path, hook), OVMS_REST_CONFIG=str(relu))
    assert ended.returncode == 3, ended.stderr
    assert f"Reason: no worker became ready: {reason}" in ended.stderr
    assert ended.stderr.count("Booting worker") <= 6


def test_start_goes_on_when_one_worker_fails_and_another_becomes_ready(tmp_path, relu):
    others_start = tmp_path / "others start"
    hook = f"""
ours = post_worker_init

def post_worker_init(worker):
    if worker.age == 1:
        raise OSError(12, "Cannot allocate memory")
    import pathlib, time
    while not pathlib.Path({str(others_start)!r}).exists():
        time.sleep(0.02)
    ours(worker)
"""
    with serve(tmp_path, "-w", "2", "-c", settings_with(tmp_path, hook), config=relu) as service:
        service.wait_for(lambda: "a worker cannot become ready: Cannot allocate memory" in service.log)
        others_start.touch()
        service.wait_for_workers(2)
        assert works(service)
        service.wait_for(lambda: "workers start again after 1 failed attempt\n" in service.log)


def test_failing_hooks_after_a_reload_keep_the_old_workers_until_they_succeed(start, tmp_path):
    settings = settings_with(tmp_path, "")
    with start(2, "-c", settings) as service:
        before = set(service.workers())
        with checking(service):
            settings_with(tmp_path, "def post_worker_init(worker): raise ValueError('mine')")
            service.signal(signal.SIGHUP)
            service.wait_for(lambda: "the new workers do not become ready" in service.log)
            time.sleep(1.0)  # in which it retries
            assert before <= set(service.workers())
            assert service.log.count("a worker cannot become ready: ValueError: mine") == 1
            # A reload by call says so, too, and is not waited for.
            model_zoo.save(model_zoo.relu(), tmp_path / "relu", version=2)
            assert fault(service.request("POST", "/v1/config/reload", b"")) == (
                "503 new workers do not become ready, so the previous ones keep serving, and the service retries: "
                "a worker cannot become ready: ValueError: mine"
            )
            assert service.log.count("Booting worker") <= 20
            settings_with(tmp_path, "")
            service.signal(signal.SIGHUP)
            wait_until_replaced(service, before)
        assert service.get("/v2/models/relu/versions/2/ready").status == 200


def test_control_address_responds_while_new_workers_fail_and_after(start, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    settings = settings_with(tmp_path, "")

    def control():
        with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200

    with start(1, "-c", settings, OVMS_REST_CONTROL_BIND=address) as service:
        before = set(service.workers())
        service.wait_for(control)
        settings_with(tmp_path, "def post_worker_init(worker): raise ValueError('mine')")
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: "the new workers do not become ready" in service.log)
        with checking(service):
            service.signal(signal.SIGTTIN)
            service.signal(signal.SIGTTOU)
            assert all(control() for _ in range(20))
            assert before <= set(service.workers())
            settings_with(tmp_path, "")
            service.signal(signal.SIGHUP)
            wait_until_replaced(service, before)
        service.wait_for(control)


# --- The end


class StoppingArbiter(FakeArbiter):
    """gunicorn's arbiter with two workers, as far as it stops."""

    LISTENERS = ()
    systemd = reexec_pid = master_pid = dirty_arbiter_pid = 0
    cfg = types.SimpleNamespace(graceful_timeout=30, reuse_port=False)
    stop, kill_workers = Arbiter.stop, Arbiter.kill_workers

    def __init__(self):
        super().__init__(None)
        self.WORKERS = {pid: types.SimpleNamespace() for pid in (1, 2)}
        self.SIG_QUEUE = queue.SimpleQueue()
        self.signals = []

    def kill_worker(self, pid, number):
        self.signals.append((pid, number))

    def reap_dirty_arbiter(self):
        """Do nothing."""


def test_clock_set_forward_during_the_shutdown_kills_no_worker(monkeypatch):
    clock = itertools.count(time.time(), 3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    Spawning(arbiter := StoppingArbiter(), table_of_one)
    looks = itertools.count()
    arbiter.reap_workers = lambda: arbiter.WORKERS.pop(next(looks), None)  # one after the other ends
    arbiter.stop()
    assert arbiter.signals == [(1, signal.SIGTERM), (2, signal.SIGTERM)]


# --- A system without a place to write


READ_ONLY = """
mount --make-rprivate / || exit 1
grep -v -E '^[^ ]+ /(proc|sys)' /proc/self/mounts | cut -d' ' -f2 | while read -r place; do
    mount -o remount,ro,bind "$place"
done
for place in / /tmp /var/tmp /usr/tmp /dev/shm "$HOME" .; do
    if touch "$place/written"; then exit 1; fi
done 2> /dev/null
exec "$@"
"""


def test_service_runs_on_a_read_only_file_system_without_a_temporary_directory(start):
    prefix = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"file systems cannot be made read-only here: {probe.stderr}")
    with start(2, prefix=prefix) as service:
        assert works(service)
        kill_one(service)
        service.wait_for(lambda: len(service.workers()) == 2)
        hang_up(service)
        assert works(service)
        assert "Traceback" not in service.log


def test_worker_that_hangs_before_it_is_ready_is_killed_and_retried(start, tmp_path):
    hook = """
ours = post_fork

def post_fork(arbiter, worker):
    ours(arbiter, worker)
    if worker.age > 1:
        __import__("time").sleep(1000)
"""
    with start(1, "-t", "3", "-c", settings_with(tmp_path, hook)) as service:
        assert works(service)
        service.signal(signal.SIGTTIN)
        service.wait_for(lambda: "WORKER TIMEOUT" in service.log)
        assert works(service)


def test_throwaway_processes_are_not_reaped_by_the_arbiter(start, tmp_path):
    """The exit status of a trial is known even while the arbiter replaces workers."""
    model_zoo.save_crashing(tmp_path / "crashing")
    write_config(tmp_path, *({"name": name, "base_path": name} for name in ("relu", "crashing")))
    with start(2) as service:
        for _ in range(3):
            service.signal(signal.SIGHUP)
            assert works(service)
        assert "ended its trial process with SIGSEGV while being read" in service.log
        assert "exit code 0" not in service.log
