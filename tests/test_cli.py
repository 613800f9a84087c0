"""The command `ovms-rest`."""

import json
import signal
import socket
import subprocess

import model_zoo
import openvino
import pytest
from raw_http import exchange, parse
from service import PATIENCE, environment, free_port, write_config
from service import serve as serve_program

from ovms_rest.cli import main
from ovms_rest.host.cores import usable_cores
from ovms_rest.settings import DEMO_CONFIG


def run(home, *arguments, **variables):
    """Run the command to its end."""
    return subprocess.run(
        ["ovms-rest", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env=environment(home, **variables),
        check=False,
    )


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command in this process, for calls that end before anything is loaded."""

    def call(*arguments, **variables):
        for name, text in {"OVMS_REST_CONFIG": "", **variables}.items():
            monkeypatch.setenv(name, text)
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A config with a model that each worker compiles, one with a broken version, and a missing one."""
    directory = tmp_path_factory.mktemp("mixed")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "m")
    (directory / "m" / "2").mkdir()
    (directory / "m" / "2" / "model.onnx").write_text("garbage")
    latency = {"name": "latency", "base_path": "m/1", "plugin_config": {"PERFORMANCE_HINT": "LATENCY"}}
    named = {"name": "m", "base_path": "m", "layout": "NC"}
    return write_config(directory, latency, named, {"name": "absent", "base_path": "absent"})


def test_check_of_a_valid_config_exits_with_0(tmp_path):
    done = run(tmp_path, "check", DEMO_CONFIG)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "model 'digits' version 1"
    assert lines[1].startswith("  file      /")
    assert "  input     image  FP32  [-1,8,8,1]" in lines
    assert "  output    digit  INT64  [-1]" in lines
    assert any(line.startswith("  CPU       compiled once, shared by all workers: ") for line in lines)
    assert any(line.startswith("  loaded    in ") and line.endswith(" MB") for line in lines)
    assert "pipeline 'number'" in lines
    assert "  input     picture  FP32  [1,-1,-1,1]" in lines
    assert "  models    digits" in lines
    assert lines[-1] == "1 of 1 models and 1 of 1 pipelines serve, 0 problems"


def test_check_without_argument_checks_the_configured_service(tmp_path):
    config = write_config(tmp_path, {"name": "absent", "base_path": "absent"})
    assert run(tmp_path, "check").stdout.endswith("1 of 1 models and 1 of 1 pipelines serve, 0 problems\n")
    assert run(tmp_path, "check", OVMS_REST_CONFIG=str(config)).stdout.endswith("0 of 1 models serve, 1 problem\n")


def test_check_reports_the_precision_of_inference(tmp_path):
    """A CPU with BF16 instructions computes FP32 models in BF16 by default."""
    can = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "m")
    for plugin_config, is_noted in (({"INFERENCE_PRECISION_HINT": "f32"}, False), ({}, can)):
        config = write_config(tmp_path, {"name": "m", "base_path": "m", "plugin_config": plugin_config})
        done = run(tmp_path, "check", config)
        assert done.returncode == 0
        assert ("computes FP32 in BF16" in done.stdout) == is_noted


def test_check_reports_every_problem_and_exits_with_1(tmp_path, mixed):
    done = run(tmp_path, "check", mixed)
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert problems[0].startswith("problem: model 'm' version 2 cannot read ")
    assert problems[1].startswith("problem: model 'absent': cannot read ")
    assert "  input     x  FP32  [1,4]  layout NC" in done.stdout.splitlines()
    assert "compiled by each worker: PERFORMANCE_HINT is LATENCY" in done.stdout
    assert done.stdout.endswith("2 of 3 models serve, 2 problems\n")


def test_json_report_has_the_same_content_and_progress_goes_to_standard_error(tmp_path, mixed):
    done = run(tmp_path, "check", "--json", mixed)
    assert done.returncode == 1
    assert "loading 'm' version 1 ...\n" in done.stderr
    report = json.loads(done.stdout)
    assert len(report["problems"]) == 2
    assert [model["name"] for model in report["models"]] == ["latency", "m", "absent"]
    latency, named, absent = (model["versions"] for model in report["models"])
    assert absent == []
    assert (latency[0]["shared"], named[0]["shared"]) == (False, True)
    assert named[0]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": "[1,4]", "layout": "NC"}]
    assert named[0]["load_seconds"] > 0
    assert named[0]["memory_bytes"] >= 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_check_reports_all_mistakes_of_a_file(tmp_path, call, flags):
    done = call("check", write_config(tmp_path, {"name": "a", "bas_path": "x"}, {"base_path": "y"}), *flags)
    assert done.returncode == 1
    for text in ("model_config_list[0].config.bas_path", "base_path", "model_config_list[1].config.name"):
        assert text in done.stdout


def test_check_reports_invalid_settings(call):
    done = call("check", DEMO_CONFIG, OVMS_REST_MAX_WAITING="no")
    assert done.returncode == 1
    assert "problem: OVMS_REST_MAX_WAITING: expected an integer" in done.stdout


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    """A config of a model that infers batches of up to 4 rows, and one that cannot."""
    directory = tmp_path_factory.mktemp("batched")
    models = {"m": model_zoo.relu((-1, 4)), "fixed": model_zoo.relu((1, 4))}
    return model_zoo.save_all(directory, models, lambda name: {"max_batch_size": 4} if name == "m" else {})


def test_check_measures_batches_when_asked(tmp_path, batched):
    done = run(tmp_path, "check", "--json", "--batching", batched)
    m, fixed = (model["versions"][0]["batching"] for model in json.loads(done.stdout)["models"])
    assert [speed["rows"] for speed in m["speeds"]] == [1, 2, 4]
    for speed in m["speeds"]:
        assert speed["rows_per_second"] == pytest.approx(speed["rows"] / speed["milliseconds"] * 1e3, rel=0.2)
    assert "requests of one row are answered" in m["verdict"]
    assert (fixed["speeds"], fixed["verdict"][:20]) == ([], "cannot infer batches")
    assert "measuring 'm' version 1 ..." in done.stderr


def test_check_writes_the_speeds_of_batches_as_a_table(tmp_path, batched):
    lines = run(tmp_path, "check", "--batching", batched).stdout.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("  batching"))
    assert lines[begin].split() == ["batching", "rows", "ms", "rows/s", "times"]
    assert [line.split()[0] for line in lines[begin + 1 : begin + 4]] == ["1", "2", "4"]
    assert "max_batch_size" in lines[begin + 4]
    assert [line for line in lines if "cannot infer batches: max_batch_size: input 'x' has the shape [1,4]" in line]


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"]])
def test_help_describes_check(call, arguments):
    done = call(*arguments)
    assert done.returncode == 0
    assert "that a config" in " ".join(done.stdout.lower().split())


@pytest.mark.parametrize("arguments", [[], ["--chekc"], ["check", "--a"], ["--config_path", "c", "--pull"]])
def test_usage_error_goes_to_standard_error(call, arguments):
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("usage: ovms-rest [NAME=]PATH")
    assert "\novms-rest: " in done.stderr


# --- Paths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A repository with the models a and b, and a model file next to it."""
    directory = tmp_path_factory.mktemp("paths")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "models" / "a")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "models" / "b")
    for suffix in ("xml", "bin"):
        (directory / f"relu.{suffix}").write_bytes((directory / f"models/a/1/model.{suffix}").read_bytes())
    return directory


def test_check_takes_paths_as_well_as_a_config(models):
    done = run(models, "check", models / "models", f"n={models}/relu.xml", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert [model["name"] for model in report["models"]] == ["a", "b", "n"]


def test_check_reports_paths_without_a_model(models, call):
    done = call("check", models / "absent", models / "relu.bin")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"problem: {models}/absent: No such file or directory",
        f"problem: {models}/relu.bin: the weights of relu.xml; give that file instead",
        "0 of 0 models serve, 2 problems",
    ]


def test_paths_without_a_model_are_reported_one_per_line(models, call):
    done = call(models / "absent", models / "models" / "a", models / "relu.bin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"ovms-rest: {models}/absent: No such file or directory",
        f"ovms-rest: {models}/relu.bin: the weights of relu.xml; give that file instead",
    ]


# --- The service

DIGITS = DEMO_CONFIG.parent / "digits"
SINGLE = ("--model_name=digits", f"--model_path={DIGITS}")


def serve(directory, *arguments, **variables):
    """Run the service on a free port, in a directory without gunicorn.conf.py."""
    bind = (f"--rest_port={free_port()}",)
    return serve_program(directory, *map(str, arguments), program="ovms-rest", bind=bind, cwd=directory, **variables)


def classify(service):
    """Infer with the demo model; return the digit."""
    body = (DEMO_CONFIG.parent / "samples" / "digit-7.json").read_bytes()
    answer = service.infer("digits", body)
    assert answer.status == 200, answer.body
    return answer.json()["outputs"][0]["data"]


def test_config_file_is_served_by_one_worker_per_core(tmp_path):
    with serve(tmp_path, "--config_path", DEMO_CONFIG) as service:
        assert classify(service) == [7]
        assert f"Listening at: http://0.0.0.0:{service.port}" in service.log
        assert "Using worker: ovms_rest.worker.worker.Worker" in service.log
        service.wait_for(lambda: len(service.workers()) == usable_cores())


def test_single_model_is_served_with_its_options(tmp_path):
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "m")
    options = ("--shape", '{"x": "(2,4)"}', "--layout=NC", "--model_version_policy", '{"specific": {"versions": [1]}}')
    with serve(tmp_path, "--model_name=a b", "--model_path=m", *options) as service:
        described = service.get("/v2/models/a%20b").json()
        assert described["name"] == "a b"
        assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [2, 4]}]
        assert service.get("/v2/health/ready").status == 200


def test_paths_are_served_under_their_names_and_survive_a_reload(models, tmp_path):
    with serve(tmp_path, models / "models", f"n={models}/relu.xml", "-w1") as service:
        assert [model["name"] for model in service.get("/v2/models").json()["models"]] == ["a", "b", "n"]
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [-1, 2, -3, 4]}]}
        assert service.infer("n", body).json()["outputs"][0]["data"] == [0, 2, 0, 4]
        assert f"Listening at: http://127.0.0.1:{service.port} " in service.log
        assert service.request("POST", "/v1/config/reload").status == 200


def test_path_called_check_is_served(tmp_path):
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "check")
    with serve(tmp_path, "./check", "--shape=(2,4)") as service:
        assert service.get("/v2/models/check").json()["inputs"][0]["shape"] == [2, 4]


def test_failing_model_of_a_repository_leaves_the_others(tmp_path):
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "models" / "good")
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "models" / "bad")
    (tmp_path / "models" / "bad" / "1" / "model.xml").write_text("garbage")
    with serve(tmp_path, "models") as service:
        assert service.get("/v2/models/good/ready").status == 200
        assert service.get("/v2/models/bad/ready").status == 404
    done = run(tmp_path, tmp_path / "models" / "bad", f"--rest_port={free_port()}")
    assert done.returncode == 1
    assert "\novms-rest: model 'bad' does not serve: version 1 cannot read " in done.stderr


def test_command_line_of_kserve_is_served(tmp_path):
    line = "--port=8001 --file_system_poll_wait_seconds=0 --grpc_bind_address=127.0.0.1 --rest_bind_address=127.0.0.1"
    with serve(tmp_path, *SINGLE, *line.split(), "--log_level", "INFO") as service:
        assert classify(service) == [7]
        assert f"Listening at: http://127.0.0.1:{service.port} " in service.log
        assert service.log.count(": ignored: ") == 1
        assert "[INFO] --port, --grpc_bind_address: ignored: there is no gRPC" in service.log


def test_port_in_use_ends_the_start_before_models_are_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ended = run(tmp_path, *SINGLE, "--rest_bind_address=127.0.0.1", f"--rest_port={port}")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"[ERROR] cannot listen on 127.0.0.1:{port}: Address already in use")


def test_ipv4_and_ipv6_are_served_together(tmp_path):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with serve(tmp_path, *SINGLE, "--rest_bind_address=0.0.0.0,::") as service:
        assert service.get("/v2/health/live").status == 200
        with socket.create_connection(("::1", service.port), timeout=PATIENCE) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_flags_override_variables_and_these_override_defaults(tmp_path):
    """For settings, the number of workers and gunicorn's own settings."""
    variables = {
        "OVMS_REST_CONFIG": "/nowhere.json",
        "OVMS_REST_ALLOWED_ORIGINS": "http://a",
        "OVMS_REST_ALLOWED_METHODS": "GET",
        "WEB_CONCURRENCY": "3",
        "GUNICORN_CMD_ARGS": "--access-logfile - --log-level error",
    }
    flags = ("--allowed_origins=http://b", "--rest_workers=1", "--log_level=INFO")
    with serve(tmp_path, *SINGLE, *flags, **variables) as service:
        preflight = service.request("OPTIONS", "/v2", headers={"Origin": "http://b"})
        assert preflight.headers["access-control-allow-origin"] == "http://b"
        assert service.get("/v2").headers["access-control-allow-origin"] == "http://b"
        (refused,) = parse(exchange(service, b"BROKEN\r\n\r\n"), "POST")
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, "http://b")
        service.wait_for(lambda: '"GET /v2 HTTP/1.1" 200' in service.log)
    assert service.log.count("Booting worker with pid: ") == 1


def test_variable_sets_the_number_of_workers(tmp_path):
    with serve(tmp_path, *SINGLE, WEB_CONCURRENCY="3") as service:
        service.wait_for(lambda: len(service.workers()) == 3)


def test_rest_workers_starts_no_more_workers_than_cores(tmp_path):
    with serve(tmp_path, *SINGLE, "--rest_workers=64") as service:
        service.wait_for(lambda: len(service.workers()) == usable_cores())
        assert f"--rest_workers: {usable_cores()} instead of 64: " in service.log


def test_log_file_is_written_and_reopened(tmp_path):
    with serve(tmp_path, *SINGLE, "--log_path=own.log") as service:
        own = tmp_path / "own.log"
        assert "model 'digits' version 1 serves from " in own.read_text()
        assert "model 'digits' version 1 serves from " in service.log
        own.rename(tmp_path / "old.log")
        service.signal(signal.SIGUSR1)
        service.wait_for(own.exists)
    assert "Shutting down: Master" in own.read_text()


def test_reload_keeps_flags_and_model(tmp_path):
    with serve(tmp_path, *SINGLE, "--rest_workers=1") as service:
        service.wait_for(lambda: len(service.workers()) == 1)
        (first,) = service.workers()
        assert classify(service) == [7]
        service.signal(signal.SIGHUP)

        def renewed():
            assert service.process.poll() is None, service.log
            return len(service.workers()) == 1 and service.workers() != [first]

        service.wait_for(renewed)
        assert classify(service) == [7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_signals_of_gunicorn_end_the_service(tmp_path, number):
    with serve(tmp_path, *SINGLE) as service:
        assert service.get("/v2/health/live").status == 200
        service.signal(number)
        assert service.process.wait(PATIENCE) == 0


# --- A start that fails


def test_single_model_that_does_not_serve_ends_the_start(tmp_path):
    done = run(tmp_path, "--rest_port=1", "--model_name=m", f"--model_path={tmp_path}/absent")
    assert done.returncode == 1
    assert f"\novms-rest: model 'm' does not serve: cannot read the model directory {tmp_path}/absent" in done.stderr


UNUSABLE = ["absent", "x" * 300, "x" * 5000 + ".py", "d/" * 3000, "m\0", "s3://bucket/m"]


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """A service that loads by call, with a model at each unusable path, named by its index, and the demo's as d."""
    directory = tmp_path_factory.mktemp("unusable")
    wrong = [{"name": str(index), "base_path": base_path} for index, base_path in enumerate(UNUSABLE)]
    config = write_config(directory, *wrong, {"name": "d", "base_path": str(DIGITS)})
    settings = {"OVMS_REST_MODEL_CONTROL": "local", "OVMS_REST_MODEL_ROOTS": str(directory)}
    with serve(directory, "--config_path", config, **settings) as service:
        yield service
        assert "Traceback" not in service.log


@pytest.mark.parametrize("index", range(len(UNUSABLE)))
def test_unusable_path_is_reported_as_a_reason_and_leaves_other_models(unusable, index):
    """In the config file, and in a load request."""
    assert unusable.get("/v2/models/d/ready").status == 200
    assert unusable.get(f"/v2/models/{index}/ready").status == 404
    body = {"parameters": {"config": json.dumps({"base_path": UNUSABLE[index]})}}
    answer = unusable.request("POST", "/v2/repository/models/other/load", body)
    assert answer.status == 412, answer.body
    assert answer.json()["error"].startswith("model 'other': ")


def test_missing_config_file_ends_the_start(tmp_path):
    done = run(tmp_path, "--rest_port=1", "--config_path=absent.json")
    assert done.returncode == 1
    assert "absent.json: cannot be read: No such file or directory" in done.stderr


def test_unwritable_log_ends_the_start(tmp_path, call):
    file = tmp_path / "absent" / "x.log"
    done = call("--rest_port=1", *SINGLE, f"--log_path={file}")
    assert done.returncode == 1
    assert done.stderr == f"ovms-rest: --log_path: {file} cannot be written: No such file or directory\n"


def test_gunicorn_config_file_is_refused(tmp_path):
    done = run(tmp_path, "--rest_port=1", *SINGLE, GUNICORN_CMD_ARGS="-c mine.py")
    assert done.returncode == 1
    assert "GUNICORN_CMD_ARGS: ovms-rest reads no gunicorn config file, got -c mine.py" in done.stderr


def test_values_invalid_in_a_config_are_reported_with_their_flags(call):
    values = ("--model_name=a/b", "--model_path=s3://b/m", "--model_version_policy={}", '--plugin_config={"A": []}')
    done = call("--rest_port=1", *values)
    assert done.returncode == 64
    problems = [line for line in done.stderr.splitlines() if line.startswith("ovms-rest: ")]
    names = [problem.split(": ")[1] for problem in problems]
    assert names == ["--model_name", "--model_version_policy", "--plugin_config", "--model_path"]
    assert problems[3] == 'ovms-rest: --model_path: only local directories and files can be served, got "s3://b/m"'


def test_all_invalid_values_of_a_single_model_end_the_start(tmp_path):
    done = run(tmp_path, "--rest_port=1", "--model_name=m", "--model_path=s3://b/m", "--shape=(1,x)")
    assert done.returncode == 1
    (problem,) = [line for line in done.stderr.splitlines() if line.startswith("ovms-rest: model 'm' does not serve: ")]
    assert "base_path: only local directories and files can be served" in problem
    assert "; shape: expected " in problem


# --- Metrics


def write_metrics(directory, *names, enable=True):
    """Write a config with an existing model and a list of metrics; return its path."""
    monitoring = {"metrics": {"enable": enable, "metrics_list": names}}
    return write_config(directory, {"name": "d", "base_path": str(DIGITS)}, monitoring=monitoring)


ENABLE, LIST = "OVMS_REST_METRICS_ENABLE", "OVMS_REST_METRICS_LIST"
METRICS_MISTAKES = [
    (("ovms_foo",), True, {}, "monitoring.metrics.metrics_list[0]: unknown metric 'ovms_foo'; "),
    (("ovms_foo",), False, {}, "monitoring.metrics.metrics_list[0]: unknown metric 'ovms_foo'; "),
    (("ovms_streams",), True, {ENABLE: "true"}, f"monitoring: {ENABLE} enables metrics already; remove one of the two"),
    ((), False, {LIST: "ovms_streams"}, f"{LIST}: requires {ENABLE}=true"),
    ((), False, {ENABLE: "true", LIST: "ovms_streams, ovms_foo"}, f"{LIST}: unknown metric 'ovms_foo'; "),
]


@pytest.mark.parametrize(("names", "enable", "variables", "problem"), METRICS_MISTAKES)
def test_mistakes_of_metrics_are_reported_before_models_are_loaded(tmp_path, call, names, enable, variables, problem):
    config = write_metrics(tmp_path, *names, enable=enable)
    checked = call("check", config, **variables)
    started = run(tmp_path, "--rest_port=1", "--config_path", config, **variables)
    assert (checked.returncode, started.returncode) == (1, 1)
    assert problem in checked.stdout
    assert "0 of 0 models serve, 1 problem" in checked.stdout
    assert problem in started.stderr
    for progress in (checked.stderr, started.stderr):
        assert "loading" not in progress
        assert "is being tried" not in progress


def test_mistakes_of_settings_and_file_are_reported_together(tmp_path, call):
    done = call("check", write_metrics(tmp_path, "ovms_foo", "ovms_bar"), OVMS_REST_METRICS_LIST="ovms_streams")
    assert done.stdout.count("problem: ") == 3


def test_check_reports_settings_without_effect(tmp_path):
    model = {"name": "d", "base_path": str(DIGITS), "nireq": 8, "shape": {"image": "(-1,8,8,1)"}, "batch_size": 7}
    libraries = [{"name": "l", "base_path": "absent.so"}]
    done = run(tmp_path, "check", write_config(tmp_path, model, custom_node_library_config_list=libraries))
    assert done.returncode == 0
    assert "\n            nireq=8 is ignored: " in done.stdout
    assert "WARNING: model 'd': Both shape and batch size have been defined. " in done.stderr
    assert "WARNING: library 'l', which no pipeline uses: there is no file " in done.stderr


def test_check_reports_a_model_that_could_not_be_tried_and_exits_with_0(tmp_path):
    model_zoo.save(model_zoo.split(), tmp_path / "split")
    done = run(tmp_path, "check", write_config(tmp_path, {"name": "split", "base_path": "split"}))
    assert done.returncode == 0
    assert "\n            the trial with invented inputs failed: " in done.stdout
    assert "WARNING: model 'split' version 1: the trial with invented inputs failed: " in done.stderr
    assert done.stdout.splitlines()[-1] == "1 of 1 models serve, 0 problems"
