"""The processes of the service: start, signals, deaths of workers, invalid configs and broken models."""

import os
import re
import signal
import socket

import model_zoo
import pytest
from generations import fault, hang_up, works
from raw_http import LIVE, RELU, RELU_PATH, connected, post
from service import PATIENCE, ROOT, is_waiting, receive, run_to_end, serve, wait_for_end, write_config
from timeouts import is_only_hang, keep_trying

from ovms_rest.app import get_app
from ovms_rest.host.cores import usable_cores

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
def test_invalid_config_ends_the_start_with_a_readable_line(tmp_path, monkeypatch, capsys, text, line):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("OVMS_REST_CONFIG", str(path))
    with pytest.raises(SystemExit, match=r"^1$"):
        get_app()
    (found,) = "".join(capsys.readouterr()).splitlines()
    assert found.startswith(f"ovms_rest: {path}: {line}")


def test_invalid_setting_ends_the_start_with_a_readable_line(tmp_path):
    ended = run_to_end(tmp_path, OVMS_REST_MAX_BODY_BYTES="1 GB")
    assert ended.returncode == 1
    message = "OVMS_REST_MAX_BODY_BYTES: expected an integer from 1 to 2147483647, got '1 GB'"
    assert ended.stdout + ended.stderr == f"ovms_rest: {message}\n"


def test_web_concurrency_and_gunicorns_flags_win(start, tmp_path, relu):
    with serve(tmp_path, config=relu, WEB_CONCURRENCY="3") as service:
        service.wait_for(lambda: len(service.workers()) == 3)
    with start(1, "--access-logfile", "-", WEB_CONCURRENCY="3") as service:
        assert works(service)
        assert len(service.workers()) == 1
        service.wait_for(lambda: '"POST /v2/models/relu/infer HTTP/1.1" 200' in service.log)


def test_more_workers_than_usable_cores_are_warned_about_once(start):
    cores = usable_cores()
    warning = f"[WARNING] more workers ({cores + 1}) than usable cores ({cores}): the others gain nothing"
    with start(cores + 1) as service:
        assert service.log.count(warning) == 1
        hang_up(service)
        assert service.log.count("than usable cores") == 1
    with start(cores) as service:
        assert "than usable cores" not in service.log


def test_gunicorn_command_of_the_readme_serves_from_any_directory(tmp_path):
    """It serves the demo, and its own flags take precedence."""
    (options,) = re.findall(r"^gunicorn (-c python:\S+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    empty = tmp_path / "empty"
    empty.mkdir()
    with serve(tmp_path, *options.split(), "-w", "1", cwd=empty) as service:
        assert service.get("/v2/health/ready").status == 200
        assert "Using worker: ovms_rest.worker.worker.Worker" in service.log
        assert len(service.workers()) == 1
        assert service.get("/v2/models/digits").json()["inputs"][0]["name"] == "image"


def test_log_lists_the_models_and_how_they_are_compiled(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu", version=3)
    config = write_config(
        tmp_path,
        {"name": "shared", "base_path": "relu", "plugin_config": {"PERFORMANCE_HINT": "THROUGHPUT"}},
        {"name": "own", "base_path": "relu", "plugin_config": {"PERFORMANCE_HINT": "LATENCY"}},
    )
    with serve(tmp_path, "-w", "1", config=config) as service:
        how = "compiled once for all workers (one thread in each worker satisfies PERFORMANCE_HINT=THROUGHPUT)"
        for name, compiled in (("shared", how), ("own", "compiled by each worker (PERFORMANCE_HINT is LATENCY)")):
            line = f"model {name!r} version 3 serves from {tmp_path}/relu/3/model.xml: x FP32[-1,4] -> y FP32[-1,4]; "
            assert f"{line}{compiled}, ready after " in service.log
        assert re.search(
            r"2 of 2 models and pipelines serve on http://127\.0\.0\.1:\d+, with 1 worker; "
            "loading and unloading over HTTP: disabled, as OVMS_REST_CONTROL_BIND is not set",
            service.log,
        )


# --- Addresses


def test_address_in_use_ends_the_start_before_models_are_loaded(start, tmp_path, relu):
    with start(1) as service:
        address = f"127.0.0.1:{service.port}"
        ended = run_to_end(tmp_path, "-b", address, OVMS_REST_CONFIG=str(relu))
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.endswith(f"[ERROR] cannot listen on {address}: Address already in use")
        assert works(service)


def test_socket_of_a_service_that_is_gone_is_replaced(start, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with start(1, "-b", f"unix:{path}") as service:
        assert works(service)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_path_of_a_running_service_is_not_taken(start, tmp_path, relu):
    path = tmp_path / "socket"
    with start(1, "-b", f"unix:{path}") as service:
        ended = run_to_end(tmp_path, bind=("-b", f"unix:{path}"), OVMS_REST_CONFIG=str(relu))
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.endswith(f"[ERROR] cannot listen on unix:{path}: Address already in use")
        assert works(service)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize("is_control", [False, True], ids=["--bind", "the control address"])
def test_service_whose_path_was_replaced_ends_in_order_and_leaves_the_other_one(start, tmp_path, is_control):
    path, file = tmp_path / "socket", tmp_path / "pid"
    options = {"OVMS_REST_CONTROL_BIND": f"unix:{path}"} if is_control else {}
    with (
        start(1, "-p", str(file), *(() if is_control else ("-b", f"unix:{path}")), **options) as service,
        connected(service, post(RELU_PATH, RELU)[:-5]) as client,
        socket.socket(socket.AF_UNIX) as other,
    ):
        service.wait_until_idle()  # so the worker has received the beginning of the request
        path.unlink()
        other.bind(str(path))
        service.signal(signal.SIGTERM)
        service.wait_for(lambda: "Handling signal: term" in service.log)
        client.sendall(RELU[-5:])
        assert receive(client, "POST").status == 200
        assert service.process.wait(PATIENCE) == 0
        assert path.exists()
        assert not file.exists()


# --- Models that do not serve


def test_broken_models_are_reported_and_the_others_serve(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    model_zoo.save_crashing(tmp_path / "crashing")
    model_zoo.save(model_zoo.endless(), tmp_path / "hanging")
    (tmp_path / "corrupt" / "1").mkdir(parents=True)
    (tmp_path / "corrupt" / "1" / "model.onnx").write_bytes(b"garbage")
    names = ("relu", "crashing", "hanging", "corrupt", "missing")
    config = write_config(tmp_path, *({"name": name, "base_path": name} for name in names))

    def answers(timeout):
        """Start the service, and return its readiness, that of each model, and its log."""
        with serve(tmp_path, "-w", "1", config=config, OVMS_REST_LOAD_TIMEOUT_SECONDS=str(timeout)) as service:
            readiness = fault(service.get("/v2/health/ready"))
            assert not is_only_hang(readiness) or works(service)
            faults = {name: fault(service.get(f"/v2/models/{name}/ready")) for name in names[1:]}
            return readiness, faults, service.log

    timeout, (readiness, faults, log) = keep_trying(answers, lambda answers: is_only_hang(answers[0]))
    assert readiness.startswith("400 ")
    for name, reason in (
        ("crashing", "version 1 ended its trial process with SIGSEGV while being read"),
        ("hanging", f"version 1 timed out after {timeout} s while inferring for the first time"),
        ("corrupt", f"version 1 cannot read {tmp_path}/corrupt/1/model.onnx: "),
        ("missing", f"cannot read the model directory {tmp_path}/missing: No such file or directory"),
    ):
        line = f"model {name!r} does not serve: {reason}"
        assert line in readiness
        assert reason.removeprefix("version 1 ") in log
        assert faults[name].startswith(f"404 {line}")


# --- Workers


def test_signals_add_and_remove_workers_and_none_hangs(start):
    with start(1) as service:
        service.signal(signal.SIGTTIN)
        service.wait_for(lambda: len(service.workers()) == 2)
        service.signal(signal.SIGTTOU)
        service.wait_for(lambda: len(service.workers()) == 1)
        for _ in range(3):
            hang_up(service)
            assert works(service)
        assert "SIGKILL" not in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_termination_signals_end_the_service_immediately(start, number):
    with start(2) as service:
        assert works(service)
        service.signal(number)
        assert service.process.wait(10) == 0
        assert "SIGKILL" not in service.log


def test_shutdown_during_a_load_begins_no_other_and_answers_calls(start, tmp_path):
    """The signals that come during the load are handled together after it."""
    with start(1, OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0") as service, service.connect() as caller:
        model_zoo.save(model_zoo.endless(), tmp_path / "relu", 2)
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: "model 'relu' version 2 is being tried" in service.log)
        caller.sendall(post("/v1/config/reload", b""))
        assert service.get("/v2/health/live").status == 200  # so the worker has received the call
        service.signal(signal.SIGHUP)
        service.signal(signal.SIGTERM)
        assert fault(receive(caller, "POST")).endswith("the service is shutting down")
        assert service.process.wait(PATIENCE) == 0
        assert service.log.count("is being tried") == 2  # at the start and now
        assert service.log.count("Hang up: Master") == 1
        assert service.log.count("Booting worker") == 1


def test_worker_is_replaced_after_max_requests(start):
    with start(1, "--max-requests", "3") as service:
        for _ in range(10):
            assert works(service)
        assert "SIGKILL" not in service.log


def test_invalid_request_does_not_affect_valid_ones_after_it(tmp_path):
    """Shapes that fail only inside the model are a 400 for the client that sent them, and for no other."""
    model_zoo.save(model_zoo.product(), tmp_path / "product")
    config = write_config(tmp_path, {"name": "product", "base_path": "product"})

    def infer(columns):
        left = {"name": "left", "datatype": "FP32", "shape": [2, columns], "data": [1] * 2 * columns}
        right = {"name": "right", "datatype": "FP32", "shape": [2, 2], "data": [1] * 4}
        return service.infer("product", {"inputs": [left, right]})

    with serve(tmp_path, "-w", "1", config=config) as service:
        for _ in range(3):
            assert infer(2).json()["outputs"][0]["data"] == [2, 2, 2, 2]
            line = (
                r"400 model 'product' version 1 cannot compute this request: node 'MatMul_\d+': Incompatible MatMul "
                r"matrix dimension. First input dimension=3 at COL_INDEX_DIM=1 doesn't match the second input "
                r"dimension=2 at ROW_INDEX_DIM=0"
            )
            assert re.fullmatch(line, fault(infer(3)))


def test_worker_that_ends_during_a_load_leaves_the_trial_alone(start, tmp_path):
    """It was forked by the arbiter in the midst of it, here with a closed standard output."""
    closing = ("sh", "-c", 'exec "$@" >&-', "sh")
    with start(1, prefix=closing, OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0") as service:
        (first,) = service.workers()
        model_zoo.save(model_zoo.endless(), tmp_path / "relu", 2)
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: "model 'relu' version 2 is being tried" in service.log)
        (trial,) = service.wait_for(lambda: set(service.workers()) - {first})
        os.kill(first, signal.SIGKILL)
        (second,) = service.wait_for(lambda: set(service.workers()) - {first, trial})
        service.wait_for(lambda: is_waiting(second))
        os.kill(second, signal.SIGTERM)
        wait_for_end(second)
        service.wait_for(lambda: set(service.workers()) - {first, second, trial})
        assert trial in service.workers()
        assert "version 2 of model 'relu' does not serve" not in service.log


# --- Hooks


def test_readiness_falls_immediately_at_shutdown(start):
    with start(1) as service, service.connect() as connection:
        assert ask_ready(connection).status == 200
        service.process.terminate()
        answer = wait_until_not_ready(service, connection)
        assert (answer.status, answer.body) == (503, b'{"error":"the service is shutting down"}')
        assert answer.headers["connection"] == "close"
        assert service.process.wait(PATIENCE) == 0


def ask_ready(connection):
    connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
    return receive(connection)


def wait_until_not_ready(service, connection):
    """Ask for the readiness until it falls; return that response, which is the last one on the connection."""
    return service.wait_for(lambda: (answer := ask_ready(connection)).status != 200 and answer)


def test_control_call_during_the_shutdown_is_refused_immediately(start):
    with start(1) as service, service.connect() as connection, service.connect() as other:
        connection.settimeout(10)
        connection.sendall(LIVE)
        assert receive(connection).status == 200
        service.process.terminate()
        assert wait_until_not_ready(service, other).status == 503
        connection.sendall(post("/v1/config/reload", b""))
        assert fault(receive(connection, "POST")) == "503 the service is shutting down and accepts no changes"
        assert service.process.wait(10) == 0


def test_readiness_does_not_fall_when_a_generation_is_replaced(start):
    with start(1) as service, service.connect() as connection:
        seen = {}
        while seen.get("connection") != "close":
            status, headers, _ = ask_ready(connection)
            assert status == 200
            if not seen:
                service.signal(signal.SIGHUP)
            seen = headers
