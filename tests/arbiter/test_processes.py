"""The service as processes: its start, its signals, its workers' deaths, and what a bad config or model does to it."""

import os
import re
import signal
import socket
import types

import model_zoo
import numpy as np
import pytest
from service import PATIENCE, ROOT, receive, run_to_end, serve, write_config

from ovms_rest.arbiter import hooks
from ovms_rest.host.cores import usable_cores
from ovms_rest.models.registry import Entry, ModelRegistry

RELU = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, -2, 3, -4]}]}


@pytest.fixture
def relu(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    return write_config(tmp_path, {"name": "relu", "base_path": "relu"})


def works(service):
    return service.infer("relu", RELU).json()["outputs"][0]["data"] == [1, 0, 3, 0]


# --- Start


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not valid JSON: "),
        ("[]", "expected an object with the key 'model_config_list', got []"),
        (
            '{"model_config_list": [{"config": {"name": "a"}}, {"config": {"name": "b", "nireq": "4"}}]}',
            'model_config_list[1].config.nireq: expected an integer from 0 to 100000, got "4"',
        ),
        (
            '{"model_config_list": [{"config": {"name": "a", "base_pth": "x"}}]}',
            "model_config_list[0].config.base_pth: unknown key; the nearest known one is 'base_path'",
        ),
    ],
)
def test_a_wrong_config_ends_the_start_with_a_readable_line(tmp_path, text, line):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    ended = run_to_end(tmp_path, OVMS_REST_CONFIG=str(path))
    assert ended.returncode == 1
    (found,) = (ended.stdout + ended.stderr).splitlines()
    assert found.startswith(f"ovms_rest: {path}: {line}")


def test_a_wrong_setting_ends_the_start_with_a_readable_line(tmp_path):
    ended = run_to_end(tmp_path, OVMS_REST_MAX_BODY_BYTES="1 GB")
    assert ended.returncode == 1
    assert ended.stderr == (
        "ovms_rest: OVMS_REST_MAX_BODY_BYTES: expected an integer from 1 to 2147483647, got '1 GB'\n"
    )


def test_there_is_a_worker_for_every_usable_core(tmp_path, relu):
    cores = len(os.sched_getaffinity(0))
    with serve(tmp_path, config=relu) as service:
        service.wait_for(lambda: len(service.workers()) == cores)


def test_web_concurrency_and_gunicorns_flags_win(tmp_path, relu):
    with serve(tmp_path, config=relu, WEB_CONCURRENCY="3") as service:
        service.wait_for(lambda: len(service.workers()) == 3)
    with serve(tmp_path, "-w", "1", "--access-logfile", "-", config=relu, WEB_CONCURRENCY="3") as service:
        assert works(service)
        assert len(service.workers()) == 1
        service.wait_for(lambda: '"POST /v2/models/relu/infer HTTP/1.1" 200' in service.log)


def test_more_workers_than_usable_cores_are_warned_about_once(tmp_path, relu):
    cores = usable_cores()
    warning = f"[WARNING] {cores + 1} workers, but usable cores: {cores}; more workers than cores gain nothing"
    with serve(tmp_path, "-w", str(cores + 1), config=relu) as service:
        assert service.log.count(warning) == 1
        before = service.workers()
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: not set(before) & set(service.workers()))
        assert service.log.count("but usable cores") == 1
    with serve(tmp_path, "-w", str(cores), config=relu) as service:
        assert "but usable cores" not in service.log


def test_gunicorn_serves_from_any_directory_by_the_line_of_the_readme(tmp_path):
    """It serves the demo, and its own flags take precedence."""
    (options,) = re.findall(r"^gunicorn (-c python:\S+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    empty = tmp_path / "empty"
    empty.mkdir()
    with serve(tmp_path, *options.split(), "-w", "1", cwd=empty) as service:
        assert service.get("/v2/health/ready").status == 200
        assert "Using worker: ovms_rest.worker.worker.Worker" in service.log
        assert len(service.workers()) == 1
        assert service.get("/v2/models/digits").json()["inputs"][0]["name"] == "image"


def test_the_log_tells_what_is_served_and_how(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu", version=3)
    config = write_config(
        tmp_path,
        {"name": "shared", "base_path": "relu", "plugin_config": {"PERFORMANCE_HINT": "THROUGHPUT"}},
        {"name": "own", "base_path": "relu", "plugin_config": {"PERFORMANCE_HINT": "LATENCY"}},
    )
    with serve(tmp_path, "-w", "1", config=config) as service:
        file = tmp_path / "relu" / "3" / "model.xml"
        assert (
            f"model 'shared' version 3 serves from {file}: x FP32[-1,4] -> y FP32[-1,4]; compiled once for all workers "
            "(one thread in each worker satisfies PERFORMANCE_HINT=THROUGHPUT), ready after "
        ) in service.log
        assert (
            f"model 'own' version 3 serves from {file}: x FP32[-1,4] -> y FP32[-1,4]; compiled by each worker "
            "(PERFORMANCE_HINT is LATENCY), ready after "
        ) in service.log
        assert re.search(
            r"2 of 2 models and pipelines serve on http://127\.0\.0\.1:\d+, with 1 worker; "
            "they may be loaded and unloaded by call from nowhere: OVMS_REST_CONTROL_BIND is not set",
            service.log,
        )


# --- Addresses


def refused(ended, address, reason):
    """Whether a start ended with this one line, so without having loaded a model."""
    (line,) = ended.stderr.splitlines()
    return ended.returncode == 1 and line.endswith(f"[ERROR] cannot listen on {address}: {reason}")


def test_an_address_in_use_ends_the_start_before_models_are_loaded(tmp_path, relu):
    variables = {"OVMS_REST_CONFIG": str(relu)}
    with serve(tmp_path, "-w", "1", config=relu) as service:
        address = f"127.0.0.1:{service.port}"
        assert refused(run_to_end(tmp_path, "-b", address, **variables), address, "Address already in use")
        # The other addresses are checked as well.
        both = ("-b", "127.0.0.1:0", "-b", f"0.0.0.0:{service.port}")
        assert refused(run_to_end(tmp_path, *both, **variables), f"0.0.0.0:{service.port}", "Address already in use")
        assert works(service)


@pytest.mark.parametrize(
    ("bind", "address", "reason"),
    [
        ("192.0.2.1:8000", "192.0.2.1:8000", "Cannot assign requested address"),
        ("[2001:db8::1]:8000", "[2001:db8::1]:8000", "Cannot assign requested address"),
        ("name.invalid:8000", "name.invalid:8000", "Name or service not known"),
        ("unix:/absent/socket", "unix:/absent/socket", "No such file or directory"),
        ("unix:/etc/passwd", "unix:/etc/passwd", "it exists and is not a socket"),
        (f"unix:/tmp/{'x' * 120}", f"unix:/tmp/{'x' * 120}", "the path is longer than 107 bytes"),
    ],
)
def test_an_address_that_cannot_be_bound_ends_the_start_before_models_are_loaded(tmp_path, relu, bind, address, reason):
    assert refused(run_to_end(tmp_path, "-b", bind, OVMS_REST_CONFIG=str(relu)), address, reason)


def test_the_socket_of_a_service_that_is_gone_is_replaced(tmp_path, relu):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serve(tmp_path, "-w", "1", "-b", f"unix:{path}", config=relu) as service:
        assert works(service)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


# --- Models that do not serve


def test_bad_models_leave_the_others_served_and_are_told(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    model_zoo.save_crashing(tmp_path / "crashing")
    model_zoo.save(model_zoo.endless(), tmp_path / "hanging")
    (tmp_path / "corrupt" / "1").mkdir(parents=True)
    (tmp_path / "corrupt" / "1" / "model.onnx").write_bytes(b"garbage")
    names = ("relu", "crashing", "hanging", "corrupt", "missing")
    config = write_config(tmp_path, *({"name": name, "base_path": name} for name in names))
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_LOAD_TIMEOUT_SECONDS="4") as service:
        assert works(service)
        answer = service.get("/v2/health/ready")
        assert answer.status == 400
        for name, reason in (
            ("crashing", "version 1 ended its trial process with SIGSEGV while being read"),
            ("hanging", "version 1 timed out after 4 s while inferring for the first time"),
            ("corrupt", f"version 1 cannot read {tmp_path}/corrupt/1/model.onnx: "),
            ("missing", f"cannot read the model directory {tmp_path}/missing: No such file or directory"),
        ):
            line = f"model {name!r} does not serve: {reason}"
            assert line in answer.json()["error"]
            assert reason.removeprefix("version 1 ") in service.log
            answer_of_model = service.get(f"/v2/models/{name}/ready")
            assert (answer_of_model.status, answer_of_model.json()["error"].startswith(line)) == (404, True)


# --- Workers


def test_a_worker_that_dies_is_replaced(tmp_path, relu):
    with serve(tmp_path, "-w", "2", config=relu) as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        before = service.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda: len(service.workers()) == 2 and not set(service.workers()) & set(before))
        assert works(service)


def test_workers_come_and_go_by_signals_and_none_hangs(tmp_path, relu):
    with serve(tmp_path, "-w", "1", config=relu) as service:
        service.wait_for(lambda: len(service.workers()) == 1)
        service.signal(signal.SIGTTIN)
        service.wait_for(lambda: len(service.workers()) == 2)
        service.signal(signal.SIGTTOU)
        service.wait_for(lambda: len(service.workers()) == 1)
        for _ in range(3):
            before = service.workers()
            service.signal(signal.SIGHUP)
            service.wait_for(lambda before=before: service.workers() and not set(service.workers()) & set(before))
            assert works(service)
        assert "SIGKILL" not in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_that_end_it_end_it_at_once(tmp_path, relu, number):
    with serve(tmp_path, "-w", "2", config=relu) as service:
        assert works(service)
        service.signal(number)
        assert service.process.wait(10) == 0
        assert "SIGKILL" not in service.log


def test_a_worker_that_has_done_its_requests_is_replaced(tmp_path, relu):
    with serve(tmp_path, "-w", "1", "--max-requests", "3", config=relu) as service:
        for _ in range(10):
            assert works(service)
        assert "SIGKILL" not in service.log


def test_models_compiled_by_each_worker_serve(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    own = {"name": "relu", "base_path": "relu", "plugin_config": {"PERFORMANCE_HINT": "LATENCY"}}
    config = write_config(tmp_path, own, {"name": "shared", "base_path": "relu"})
    with serve(tmp_path, "-w", "2", config=config) as service:
        for _ in range(8):
            assert works(service)
            assert service.infer("shared", RELU).status == 200


def test_a_bad_request_does_not_spoil_the_good_ones_after_it(tmp_path):
    """Shapes that only fail inside the model are a 400 for the client that sent them, and for no other."""
    model_zoo.save(model_zoo.product(), tmp_path / "product")
    config = write_config(tmp_path, {"name": "product", "base_path": "product"})

    def request(left, right):
        return {
            "inputs": [
                {"name": name, "datatype": "FP32", "shape": list(shape), "data": np.ones(shape).tolist()}
                for name, shape in (("left", left), ("right", right))
            ]
        }

    with serve(tmp_path, "-w", "1", config=config) as service:
        for _ in range(3):
            assert service.infer("product", request((2, 2), (2, 2))).json()["outputs"][0]["data"] == [2, 2, 2, 2]
            answer = service.infer("product", request((2, 3), (2, 2)))
            assert answer.status == 400
            assert re.fullmatch(
                r"model 'product' version 1 cannot compute this request: node 'MatMul_\d+': Incompatible MatMul matrix "
                r"dimension. First input dimension=3 at COL_INDEX_DIM=1 doesn't match the second input dimension=2 at "
                r"ROW_INDEX_DIM=0",
                answer.json()["error"],
            )


# --- Hooks


def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    os.waitpid(pid, 0)


def test_readiness_falls_at_once_when_the_service_is_told_to_end(tmp_path, relu):
    with serve(tmp_path, "-w", "1", config=relu) as service, service.connect() as connection:
        for path, told in ((b"live", b""), (b"ready", b'{"error":"the service is shutting down"}')):
            connection.sendall(b"GET /v2/health/%s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            answer = receive(connection)
            assert (answer.status, answer.body) == (503 if told else 200, told)
            if not told:
                service.process.terminate()
                service.wait_for(lambda: "Handling signal: term" in service.log)
        assert answer.headers["connection"] == "close"
        assert service.process.wait(PATIENCE) == 0


def test_readiness_does_not_fall_with_a_generation_whose_place_another_takes(tmp_path, relu):
    with serve(tmp_path, "-w", "1", config=relu) as service, service.connect() as connection:
        told = {}
        while told.get("connection") != "close":
            connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            status, headers, _ = receive(connection)
            assert status == 200
            if not told:
                service.signal(signal.SIGHUP)
            told = headers


def make_arbiter(models):
    """Make what the hooks need of an arbiter and its application."""
    counters = types.SimpleNamespace(release=lambda slot: [])
    app = types.SimpleNamespace(models=models, telemetry=types.SimpleNamespace(counters=counters))
    return types.SimpleNamespace(app=types.SimpleNamespace(wsgi=lambda: app), control_sockets=[], tls=None, WORKERS={})


def test_a_model_at_which_workers_die_is_given_up(caplog):
    """What the arbiter does about a worker that dies while it opens a model."""
    models = ModelRegistry({"m": Entry({1: None}), "n": Entry({1: None})})
    arbiter = make_arbiter(models)
    for deaths in range(1, hooks.MAX_DEATHS + 1):
        worker = types.SimpleNamespace(pid=deaths)
        hooks.pre_fork(arbiter, worker)
        fork(lambda worker=worker: hooks.note_opening(worker, "m/1"))
        assert models.versions("m") == ["1"]
        hooks.child_exit(arbiter, worker)
        assert f"worker {deaths} died or hung while it opened 'm/1' (model and version)" in caplog.text
    assert models.versions("m") == []
    assert models.versions("n") == ["1"]


def test_a_worker_that_ends_while_serving_blames_no_model(caplog):
    worker = types.SimpleNamespace(pid=1)
    hooks.pre_fork(arbiter := make_arbiter(None), worker)
    fork(lambda: (hooks.note_opening(worker, "m"), hooks.note_opening(worker, "")))
    hooks.child_exit(arbiter, worker)
    assert "died" not in caplog.text
