"""OVMS's flags: the settings that they become, and the command lines that are refused."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest

from ovms_rest.flags import FLAGS, GROUPS, REFUSED, UsageError, read_flags
from ovms_rest.settings import PREFIX, Settings

CORES = 4
CONFIG = ("--config_path", "c.json")
SINGLE = ("--model_name", "m", "--model_path", "/m")
PORT = ("--rest_port", "8000")


def read(*arguments):
    return read_flags(arguments, CORES)


def refusals(*arguments):
    with pytest.raises(UsageError) as caught:
        read(*arguments)
    return list(caught.value.problems)


# --- Values of flags


def test_config_path_becomes_a_setting():
    start = read(*CONFIG, *PORT)
    assert start.environ == {"OVMS_REST_CONFIG": "c.json"}
    assert start.models == ()


def test_single_model_has_the_form_of_a_config():
    start = read(*SINGLE, *PORT)
    assert start.models == ({"name": "m", "base_path": "/m"},)
    assert start.environ == {}


def test_relative_model_path_starts_at_the_working_directory():
    start = read("--model_name", "m", "--model_path", "models/m", *PORT)
    assert start.models[0]["base_path"] == f"{Path.cwd()}/models/m"


def test_remote_model_path_is_left_for_the_config_to_refuse():
    assert read("--model_name", "m", "--model_path", "s3://b/m", *PORT).models[0]["base_path"] == "s3://b/m"


MODEL_CASES = {
    "batch_size": [("8", "8"), ("1:16", "1:16"), ("-1", "-1")],
    "max_batch_size": [("0", 0), ("32", 32)],
    "shape": [("(1,3,-1)", "(1,3,-1)"), ('{"a": "(1,2)"}', {"a": "(1,2)"}), ("[1, 2]", [1, 2]), ("auto", "auto")],
    "layout": [("NHWC:NCHW", "NHWC:NCHW"), ('{"a": "NC"}', {"a": "NC"})],
    "model_version_policy": [('{"all": {}}', {"all": {}})],
    "nireq": [("0", 0), ("16", 16)],
    "target_device": [("AUTO:GPU,CPU", "AUTO:GPU,CPU")],
    "plugin_config": [('{"NUM_STREAMS": "4"}', {"NUM_STREAMS": "4"}), ("{}", {})],
    "mean": [("-1.5", "-1.5"), ("[1,2,3]", "[1,2,3]")],
    "scale": [("(1,2,3)", "(1,2,3)")],
    "color_format": [("RGB:BGR", "RGB:BGR")],
    "precision": [("uint8:fp32", "uint8:fp32")],
}


@pytest.mark.parametrize("form", ["apart", "joined"])
@pytest.mark.parametrize(("flag", "text", "value"), [(k, *case) for k, cases in MODEL_CASES.items() for case in cases])
def test_model_flag_becomes_the_key_of_its_name(flag, text, value, form):
    given = [f"--{flag}", text] if form == "apart" else [f"--{flag}={text}"]
    layout = [] if flag == "layout" else ["--layout", "NHWC"]
    assert read(*SINGLE, *PORT, *given, *layout).models[0][flag] == value


def test_every_model_flag_has_a_case():
    assert set(MODEL_CASES) == {flag.name for flag in FLAGS.values() if flag.key} - {"model_name", "model_path"}


SETTING_CASES = [
    (["--cache_dir", "/cache"], {"OVMS_REST_CACHE_DIR": "/cache"}),
    (["--file_system_poll_wait_seconds=0"], {"OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0"}),
    (["--allowed_origins=*"], {"OVMS_REST_ALLOWED_ORIGINS": "*"}),
    (["--allowed_methods", "GET, POST"], {"OVMS_REST_ALLOWED_METHODS": "GET, POST"}),
    (["--allowed_headers", "X-A"], {"OVMS_REST_ALLOWED_HEADERS": "X-A"}),
    (["--allow_credentials"], {"OVMS_REST_ALLOW_CREDENTIALS": "true"}),
    (["--allow_credentials=false"], {"OVMS_REST_ALLOW_CREDENTIALS": "false"}),
    (["--allow_credentials", "TRUE"], {"OVMS_REST_ALLOW_CREDENTIALS": "true"}),
    # An empty value restores the setting's default, even if its variable is set.
    (["--allowed_origins="], {"OVMS_REST_ALLOWED_ORIGINS": ""}),
]


@pytest.mark.parametrize(("arguments", "environ"), SETTING_CASES)
def test_flag_becomes_a_setting(arguments, environ):
    assert read(*SINGLE, *PORT, *arguments).environ == environ


def test_flags_name_existing_settings():
    known = {PREFIX + setting.name.upper() for setting in fields(Settings)}
    assert {flag.setting for flag in FLAGS.values() if flag.setting} <= known


LEVELS = ("DEBUG", "INFO", "WARNING", "error")
GUNICORN_CASES = [
    ([], {"bind": ["0.0.0.0:8000"]}),
    (["--rest_bind_address", "127.0.0.1"], {"bind": ["127.0.0.1:8000"]}),
    (["--rest_bind_address=127.0.0.1, ::1"], {"bind": ["127.0.0.1:8000", "[::1]:8000"]}),
    (["--rest_bind_address=[::1],localhost"], {"bind": ["[::1]:8000", "localhost:8000"]}),
    (["--rest_bind_address=0.0.0.0,::"], {"bind": ["[::]:8000"]}),
    (["--rest_bind_address=127.0.0.1,::,::1,localhost"], {"bind": ["[::]:8000"]}),
    (["--rest_bind_address=0.0.0.0,127.0.0.1,::1"], {"bind": ["0.0.0.0:8000", "[::1]:8000"]}),
    (["--rest_bind_address", ""], {"bind": ["0.0.0.0:8000"]}),
    (["--rest_bind_address=::1"], {"bind": ["[::1]:8000"]}),
    (["--rest_workers", "3"], {"bind": ["0.0.0.0:8000"], "workers": 3}),
    (["--rest_workers", "1"], {"bind": ["0.0.0.0:8000"], "workers": 1}),
    (["--rest_workers", "0"], {"bind": ["0.0.0.0:8000"], "workers": CORES}),
    (["--rest_workers", "16"], {"bind": ["0.0.0.0:8000"], "workers": CORES}),
    *((["--log_level", level], {"bind": ["0.0.0.0:8000"], "loglevel": level.lower()}) for level in LEVELS),
    (["--log_level", "TRACE"], {"bind": ["0.0.0.0:8000"], "loglevel": "debug"}),
]


@pytest.mark.parametrize(("arguments", "settings"), GUNICORN_CASES)
def test_flag_becomes_a_setting_of_gunicorn(arguments, settings):
    assert read(*CONFIG, *PORT, *arguments).gunicorn == settings


def test_last_of_repeated_flags_wins():
    assert read(*CONFIG, *PORT, "--rest_port=8001").gunicorn["bind"] == ["0.0.0.0:8001"]


def test_log_path_is_kept():
    assert read(*CONFIG, *PORT).log_path == ""
    assert read(*CONFIG, *PORT, "--log_path", "x.log").log_path == "x.log"


GRPC = ["--grpc_bind_address=::", "--port=9000", "--grpc_workers=2", "--grpc_max_threads=4", "--grpc_memory_quota=1"]
IGNORED = "ignored: there is no gRPC, and custom nodes are cleaned up when a worker exits"
LEFT_OUT = "--rest_bind_address: left out"
NOTE_CASES = [
    ([], []),
    (["--rest_workers", str(CORES)], []),
    (["--rest_workers", "16"], ["--rest_workers: 4 instead of 16: the maximum is one per usable core"]),
    (["--metrics_enable=false"], []),
    (["--metrics_enable"], []),
    (["--port=0"], []),
    (GRPC, [f"--port, --grpc_bind_address, --grpc_workers, --grpc_max_threads, --grpc_memory_quota: {IGNORED}"]),
    (
        ["--custom_node_resources_cleaner_interval_seconds=300", "--grpc_channel_arguments=a=b"],
        [f"--grpc_channel_arguments, --custom_node_resources_cleaner_interval_seconds: {IGNORED}"],
    ),
    (["--rest_bind_address=0.0.0.0,::"], [f"{LEFT_OUT} 0.0.0.0, covered by ::, which accepts IPv4 too"]),
    (["--rest_bind_address=0.0.0.0,127.0.0.1"], [f"{LEFT_OUT} 127.0.0.1, covered by 0.0.0.0"]),
]


@pytest.mark.parametrize(("arguments", "notes"), NOTE_CASES)
def test_flags_without_effect_are_noted(arguments, notes):
    assert list(read(*CONFIG, *PORT, *arguments).notes) == [(logging.INFO, note) for note in notes]


# --- Refused command lines

SERVABLE = "use --config_path, or --model_path with --model_name"
NOTHING = f"nothing to serve: give a PATH, or {SERVABLE}"
COMBINATIONS = [
    (PORT, [NOTHING]),
    ([*PORT, "--config_path="], [NOTHING]),
    ([*PORT, "--model_name=m"], [f"{SERVABLE}; --model_path is missing"]),
    ([*PORT, "--model_path=m"], [f"{SERVABLE}; --model_name is missing"]),
    ([*PORT, *CONFIG, *SINGLE], ["use either --config_path, or --model_path with --model_name"]),
    (
        [*PORT, *CONFIG, "--nireq=1", "--layout=NC"],
        ["--layout, --nireq: model parameters cannot be combined with --config_path; set them in the file"],
    ),
    *(
        ([*PORT, *SINGLE, f"--{name}", value], [f"--{name} requires --layout to be set"])
        for name, value in [("mean", "1"), ("scale", "2"), ("color_format", "RGB:BGR"), ("precision", "uint8:fp32")]
    ),
    *(
        ([*CONFIG, *ports], ["--rest_port is missing: it is the port to serve on"])
        for ports in ([], ["--rest_port=0", "--port=0"])
    ),
    ([*CONFIG, "--port=9000"], ["--rest_port is missing: --port is for gRPC, which is not served"]),
    ([*CONFIG, *PORT, "--port=8000"], ["--port and --rest_port cannot have the same value, got 8000"]),
    ([*CONFIG, *PORT, "--metrics_list=a"], ["--metrics_list requires --metrics_enable"]),
    ([*CONFIG, *PORT, "--metrics_list=a", "--metrics_enable=false"], ["--metrics_list requires --metrics_enable"]),
    ([], [NOTHING]),
    (["-b=:80", *PORT, *CONFIG, "--rest_bind_address=::1"], ["use either --bind or --rest_port, --rest_bind_address"]),
    ([*PORT, *CONFIG, "-w", "2", "--rest_workers=2"], ["use either --workers or --rest_workers"]),
]


@pytest.mark.parametrize(("arguments", "problems"), COMBINATIONS)
def test_incompatible_flags_are_refused(arguments, problems):
    assert refusals(*arguments) == problems


ADDRESSES = "expected IP addresses or host names, separated by commas"
VALUES = [
    ("rest_port", "65536", "expected an integer from 0 to 65535"),
    ("rest_port", "-1", "expected an integer from 0 to 65535"),
    ("port", "http", "expected an integer from 0 to 65535"),
    ("rest_port", "٨", "expected an integer from 0 to 65535"),
    ("rest_workers", "10001", "expected an integer from 0 to 10000"),
    ("nireq", "1.5", "expected an integer from 0 to 1000000000"),
    ("file_system_poll_wait_seconds", "-1", "expected an integer from 0 to 86400"),
    ("custom_node_resources_cleaner_interval_seconds", "0", "expected an integer from 1 to 1000000000"),
    ("log_level", "FATAL", "expected one of TRACE, DEBUG, INFO, WARNING, ERROR"),
    ("metrics_enable", "yes", "expected true or false"),
    ("allow_credentials", "on", "expected true or false"),
    ("metrics_list", "a,,b", "expected names, separated by commas"),
    ("rest_bind_address", "127.0.0.1,", ADDRESSES),
    ("rest_bind_address", "127.0.0.300", ADDRESSES),
    ("rest_bind_address", "127.0.0.1:80", ADDRESSES),
    ("rest_bind_address", "[::1", ADDRESSES),
    ("rest_bind_address", "unix:/x", ADDRESSES),
    ("bind", "8000", "expected HOST:PORT, unix:PATH or fd://N, several separated by commas"),
    ("workers", "0", "expected an integer from 1 to 10000"),
    ("plugin_config", "[]", "expected a JSON object"),
    ("model_version_policy", "1", "expected a JSON object"),
]


@pytest.mark.parametrize(("flag", "text", "problem"), VALUES)
def test_invalid_value_is_refused(flag, text, problem):
    assert refusals(f"--{flag}={text}") == [f"--{flag}: {problem}, got {text!r}"]


@pytest.mark.parametrize(("flag", "text"), [("shape", "{'a': 1}"), ("layout", "[NC"), ("plugin_config", "{NUM: 1}")])
def test_invalid_json_is_refused(flag, text):
    (problem,) = refusals(f"--{flag}={text}")
    assert problem.startswith(f"--{flag}: is not valid JSON (")
    assert problem.endswith(f"), got {text!r}")


def test_comment_in_json_is_reported_as_such():
    (problem,) = refusals("--plugin_config={ # mine }")
    assert problem.startswith("--plugin_config: is not valid JSON (# begins a comment, which JSON does not have: ")


def test_flag_without_value_is_refused():
    assert refusals("--rest_port", "--config_path", "x") == ["--rest_port: expected one argument"]


@pytest.mark.parametrize("arguments", [["--{}"], ["--{}=x"], ["--{}", "x"]])
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_flag_of_ovms_is_refused_with_the_reason(name, arguments):
    given = [argument.format(name) for argument in arguments]
    assert refusals(*CONFIG, *PORT, *given) == [f"--{name} is not supported: {REFUSED[name]}"]


def test_no_flag_is_both_known_and_refused():
    assert not FLAGS.keys() & REFUSED.keys()


UNKNOWN = [
    ("--rest_prot=1", "--rest_prot: unknown flag; the nearest known one is --rest_port"),
    ("--rest-port=1", "--rest-port: unknown flag; the nearest known one is --rest_port"),
    ("--config=x", "--config: unknown flag; the nearest known one is --config_path"),  # no abbreviations
    ("--config_pat=x", "--config_pat: unknown flag; the nearest known one is --config_path"),
]


@pytest.mark.parametrize(("argument", "problem"), UNKNOWN)
def test_unknown_flag_is_refused_with_the_nearest(argument, problem):
    assert refusals(*CONFIG, *PORT, argument) == [problem]


def test_flags_of_gunicorn_set_addresses_and_workers():
    for flags in (["-b", "0.0.0.0:80,unix:/x", "-w", "64"], ["--bind=0.0.0.0:80, unix:/x", "--workers=64"]):
        assert read(*CONFIG, *flags).gunicorn == {"bind": ["0.0.0.0:80", "unix:/x"], "workers": 64}


# --- Paths


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").touch()
    return {"name": "m", "base_path": str(tmp_path / "m.onnx")}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),  # gunicorn's own default, 127.0.0.1:8000
        (["--rest_port=80"], {"bind": ["127.0.0.1:80"]}),
        (["--rest_bind_address=0.0.0.0"], {"bind": ["0.0.0.0:8000"]}),
        (["-b", ":80"], {"bind": [":80"]}),
        (["--rest_port=80", "--port=81", "--rest_workers=2"], {"bind": ["127.0.0.1:80"], "workers": 2}),
    ],
)
def test_paths_need_no_port(model, flags, settings):
    start = read("m.onnx", *flags)
    assert start.models == (model,)
    assert start.gunicorn == settings


@pytest.mark.parametrize(
    "line",
    [
        "m.onnx --rest_port 80",
        "--rest_port 80 m.onnx",
        "--rest_port 80 -- m.onnx",
        "--metrics_enable m.onnx",
        "--metrics_enable true m.onnx",
        "m.onnx --metrics_enable",
    ],
)
def test_paths_may_precede_and_follow_flags(model, line):
    assert read(*line.split()).models == (model,)


def test_model_flags_apply_to_a_single_path(model):
    assert read("m.onnx", "--layout=NC").models == (model | {"layout": "NC"},)
    assert refusals("a=m.onnx", "b=m.onnx", "--layout=NC") == [
        "--layout: model parameters apply to a single model, got 2 models"
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("m.onnx --config_path c.json", "use either PATH or --config_path"),
        ("m.onnx --model_name n", "use either PATH or --model_name; the name of a model is given as NAME=PATH"),
        ("m.onnx --model_name n --model_path p", "use either PATH or --model_name and --model_path"),
        ("m.onnx --port 80", "--rest_port is missing: --port is for gRPC, which is not served"),
        ("m.onnx --port 80 --rest_port 80", "--port and --rest_port cannot have the same value, got 80"),
    ],
)
def test_incompatible_paths_and_flags_are_refused(model, line, problem):
    assert refusals(*line.split()) == [problem]


def test_mistakes_of_flags_and_paths_are_reported_together(model):
    assert refusals("absent", "m.onnx", "--rest_port=x", "other") == [
        "--rest_port: expected an integer from 0 to 65535, got 'x'",
        "absent: No such file or directory",
        "other: No such file or directory",
    ]


def test_all_mistakes_are_reported_together():
    assert refusals("--pull", "--rest_prot", "1", "--port=x", "--nireq=y") == [
        f"--pull is not supported: {REFUSED['pull']}",
        "--rest_prot: unknown flag; the nearest known one is --rest_port",
        "--nireq: expected an integer from 0 to 1000000000, got 'y'",
        "--port: expected an integer from 0 to 65535, got 'x'",
    ]


# --- Command lines of other products

KSERVE = "--model_name=m --model_path=/mnt/models --port=9000 --rest_port=8080 --file_system_poll_wait_seconds=0"
OPENSHIFT = (
    "--model_name=m --port=8001 --rest_port=8888 --model_path=/mnt/models --file_system_poll_wait_seconds=0 "
    "--grpc_bind_address=0.0.0.0 --rest_bind_address=0.0.0.0 --target_device=AUTO --metrics_enable"
)


@pytest.mark.parametrize(("line", "port"), [(KSERVE, 8080), (OPENSHIFT, 8888)])
def test_command_lines_of_serving_runtimes_are_understood(line, port):
    start = read(*line.split())
    assert start.models[0]["base_path"] == "/mnt/models"
    metrics = {"OVMS_REST_METRICS_ENABLE": "true"} if "--metrics_enable" in line else {}
    assert start.environ == {"OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0", **metrics}
    assert start.gunicorn == {"bind": [f"0.0.0.0:{port}"]}


def test_help_has_a_line_for_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n{title}:\n" in text for title in GROUPS)
    lines = [line.split() for line in text.splitlines() if line.startswith("  --")]
    assert [words[0].lstrip("-") for words in lines] == ["version", *(name for name in FLAGS if not FLAGS[name].letter)]
    for flag in FLAGS.values():
        if flag.letter:  # Python 3.13 leaves the first value out
            assert re.search(rf"\n  -{flag.letter}( {flag.metavar})?, --{flag.name} {flag.metavar}", text)
    assert max(map(len, text.splitlines())) <= 104
    # Only the longest name has its meaning on the next line.
    assert [words[0] for words in lines if len(words) <= 2] == ["--custom_node_resources_cleaner_interval_seconds"]
