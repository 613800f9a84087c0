"""Settings from environment variables."""

import dataclasses
from pathlib import Path

import pytest

from ovms_rest.errors import ConfigError
from ovms_rest.settings import DEMO_CONFIG, Settings, read_settings

FLAG = "expected true or false, got"


# By name: the default, the text of a variable, and its value.
SETTINGS = {
    "config": (DEMO_CONFIG, "/srv/config.json", Path("/srv/config.json")),
    "max_body_bytes": (268_435_456, "1000", 1000),
    "max_waiting": (64, "3", 3),
    "max_held_bytes": (2**30, "5000", 5000),
    "max_worker_memory_bytes": (0, "6000", 6000),
    "head_timeout_seconds": (10, "4", 4),
    "body_timeout_seconds": (30, "5", 5),
    "send_timeout_seconds": (30, "6", 6),
    "control_bind": ("", "127.0.0.1:9000", "127.0.0.1:9000"),
    "model_control": ("auto", "None", "none"),
    "console": (True, "False", False),
    "model_roots": ("", "/srv/models:/data", "/srv/models:/data"),
    "load_timeout_seconds": (300, "7", 7),
    "file_system_poll_wait_seconds": (1, "0", 0),
    "access_log": ("none", "JSON", "json"),
    "access_log_file": ("-", "/var/log/access", "/var/log/access"),
    "metrics_enable": (False, "1", True),
    "metrics_list": ("", "ovms_streams", "ovms_streams"),
    "cache_dir": ("", "/var/cache/models", "/var/cache/models"),
    "cpu_extension": ("", "/opt/operations.so", "/opt/operations.so"),
    "max_image_pixels": (2**26, "8", 8),
    "max_request_pixels": (2**28, "9", 9),
    "response_compression": (False, "true", True),
    "allowed_origins": ("", "https://a.example", "https://a.example"),
    "allowed_methods": ("*", "GET, POST", "GET, POST"),
    "allowed_headers": ("*", "Content-Type", "Content-Type"),
    "allow_credentials": (False, "true", True),
}


def test_settings_have_defaults():
    defaults = {name: default for name, (default, _, _) in SETTINGS.items()}
    assert dataclasses.asdict(read_settings({})) == defaults


def test_default_config_is_a_file_of_the_package():
    assert DEMO_CONFIG.is_file()


def test_every_setting_has_a_variable():
    environ = {f"OVMS_REST_{name.upper()}": text for name, (_, text, _) in SETTINGS.items()}
    values = {name: value for name, (_, _, value) in SETTINGS.items()}
    assert dataclasses.asdict(read_settings(environ)) == values


@pytest.mark.parametrize("variable", [f"OVMS_REST_{setting.name.upper()}" for setting in dataclasses.fields(Settings)])
def test_empty_variable_counts_as_unset(variable):
    assert read_settings({variable: ""}) == Settings()


@pytest.mark.parametrize("setting", dataclasses.fields(Settings), ids=lambda setting: setting.name)
def test_every_setting_has_a_description(setting):
    assert setting.metadata["meaning"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("TRUE", True), ("True", True), ("1", True), ("false", False), ("FALSE", False), ("0", False)],
)
def test_boolean_is_true_or_false(text, expected):
    assert read_settings({"OVMS_REST_RESPONSE_COMPRESSION": text}).response_compression is expected


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("OVMS_REST_MAX_BODY_BYTES", "1", 1),
        ("OVMS_REST_MAX_BODY_BYTES", "2147483647", 2**31 - 1),
        ("OVMS_REST_MAX_BODY_BYTES", "007", 7),
        ("OVMS_REST_LOAD_TIMEOUT_SECONDS", "1", 1),
        ("OVMS_REST_LOAD_TIMEOUT_SECONDS", "86400", 86400),
    ],
)
def test_integer_may_have_any_value_within_its_limits(variable, text, expected):
    name = variable.removeprefix("OVMS_REST_").lower()
    assert getattr(read_settings({variable: text}), name) == expected


MAX_BODY = "OVMS_REST_MAX_BODY_BYTES: expected an integer from 1 to 2147483647, got"
LOAD_TIMEOUT = "OVMS_REST_LOAD_TIMEOUT_SECONDS: expected an integer from 1 to 86400, got"


def problems(environ):
    with pytest.raises(ConfigError) as caught:
        read_settings(environ)
    return list(caught.value.problems)


MAX_BODIES = ["0", "2147483648", "-1", "+1", "1.0", "1e6", "1_000", "256M", " 1", "٣", "²", "9" * 5000]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        *((MAX_BODY, text) for text in [*MAX_BODIES, "0" * 19 + "3" + "0" * 12]),
        *((LOAD_TIMEOUT, text) for text in ("0", "86401", "5m")),
        *((f"OVMS_REST_RESPONSE_COMPRESSION: {FLAG}", text) for text in ("yes", "2")),
        *((f"OVMS_REST_ALLOW_CREDENTIALS: {FLAG}", text) for text in ("on", " true")),
    ],
)
def test_invalid_value_is_reported_with_its_variable(problem, text):
    """Leading zeros do not hide a number beyond the limit."""
    assert problems({problem.partition(":")[0]: text}) == [f"{problem} {text!r}"]


def test_all_invalid_values_are_reported_together():
    environ = {
        "OVMS_REST_MAX_BODY_BYTES": "x",
        "OVMS_REST_CONFIG": "a.json",
        "OVMS_REST_LOAD_TIMEOUT_SECONDS": "y",
        "OVMS_REST_ALLOW_CREDENTIALS": "z",
    }
    assert problems(environ) == [
        f"{MAX_BODY} 'x'",
        f"{LOAD_TIMEOUT} 'y'",
        f"OVMS_REST_ALLOW_CREDENTIALS: {FLAG} 'z'",
    ]


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("OVMS_REST_CONFG", "OVMS_REST_CONFIG"),
        ("OVMS_REST_CONFIG_PATH", "OVMS_REST_CONFIG"),
        ("OVMS_REST_MAX_BODY_BYTE", "OVMS_REST_MAX_BODY_BYTES"),
        ("OVMS_REST_ALLOWED_ORIGIN", "OVMS_REST_ALLOWED_ORIGINS"),
        ("OVMS_REST_ALLOWED_CREDENTIALS", "OVMS_REST_ALLOW_CREDENTIALS"),
        ("OVMS_REST_LOAD_TIMEOUT", "OVMS_REST_LOAD_TIMEOUT_SECONDS"),
        ("OVMS_REST_COMPRESSION", "OVMS_REST_RESPONSE_COMPRESSION"),
    ],
)
def test_name_similar_to_a_setting_is_logged(caplog, variable, near):
    assert read_settings({variable: "1"}) == Settings()
    assert caplog.record_tuples == [
        ("gunicorn.error.ovms_rest", 30, f"unknown setting {variable} ignored; did you mean {near}?")
    ]


PORT = "OVMS_REST_PORT_8000_TCP"


@pytest.mark.parametrize(
    "variable",
    [
        *("OVMS_REST_SERVICE_HOST", "OVMS_REST_SERVICE_PORT", "OVMS_REST_SERVICE_PORT_HTTP"),
        *("OVMS_REST_PORT", PORT, f"{PORT}_ADDR", f"{PORT}_PORT", f"{PORT}_PROTO"),
        *("ovms_rest_config", "OVMS_CONFIG", "MY_OVMS_REST_CONFIG", "PATH"),
    ],
)
def test_foreign_variable_is_ignored(caplog, variable):
    assert read_settings({variable: "tcp://10.0.0.1:8000"}) == Settings()
    assert caplog.records == []


def test_empty_variable_similar_to_a_setting_is_ignored(caplog):
    read_settings({"OVMS_REST_CONFG": ""})
    assert caplog.records == []
