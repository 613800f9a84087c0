"""Settings from environment variables."""

import dataclasses
from pathlib import Path

import pytest

from ovms_rest.errors import ConfigError
from ovms_rest.settings import DEMO_CONFIG, Settings, read_settings

FLAG = "expected true or false, got"


def test_settings_have_defaults():
    assert read_settings({}) == Settings(
        config=DEMO_CONFIG,
        max_body_bytes=268_435_456,
        max_waiting=64,
        max_held_bytes=2**30,
        max_worker_memory_bytes=0,
        head_timeout_seconds=10,
        body_timeout_seconds=30,
        send_timeout_seconds=30,
        control_bind="",
        model_control="auto",
        model_roots="",
        load_timeout_seconds=300,
        file_system_poll_wait_seconds=1,
        access_log="none",
        access_log_file="-",
        metrics_enable=False,
        metrics_list="",
        cache_dir="",
        cpu_extension="",
        max_image_pixels=2**26,
        max_request_pixels=2**28,
        response_compression=False,
        allowed_origins="",
        allowed_methods="*",
        allowed_headers="*",
        allow_credentials=False,
    )


def test_default_config_is_a_file_of_the_package():
    assert DEMO_CONFIG.is_file()


def test_every_setting_has_a_variable():
    environ = {
        "OVMS_REST_CONFIG": "/srv/config.json",
        "OVMS_REST_MAX_BODY_BYTES": "1000",
        "OVMS_REST_MAX_WAITING": "3",
        "OVMS_REST_MAX_HELD_BYTES": "5000",
        "OVMS_REST_MAX_WORKER_MEMORY_BYTES": "6000",
        "OVMS_REST_HEAD_TIMEOUT_SECONDS": "4",
        "OVMS_REST_BODY_TIMEOUT_SECONDS": "5",
        "OVMS_REST_SEND_TIMEOUT_SECONDS": "6",
        "OVMS_REST_CONTROL_BIND": "127.0.0.1:9000",
        "OVMS_REST_MODEL_CONTROL": "None",
        "OVMS_REST_MODEL_ROOTS": "/srv/models:/data",
        "OVMS_REST_LOAD_TIMEOUT_SECONDS": "7",
        "OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0",
        "OVMS_REST_ACCESS_LOG": "JSON",
        "OVMS_REST_ACCESS_LOG_FILE": "/var/log/access",
        "OVMS_REST_METRICS_ENABLE": "1",
        "OVMS_REST_METRICS_LIST": "ovms_streams",
        "OVMS_REST_CACHE_DIR": "/var/cache/models",
        "OVMS_REST_CPU_EXTENSION": "/opt/operations.so",
        "OVMS_REST_MAX_IMAGE_PIXELS": "8",
        "OVMS_REST_MAX_REQUEST_PIXELS": "9",
        "OVMS_REST_RESPONSE_COMPRESSION": "true",
        "OVMS_REST_ALLOWED_ORIGINS": "https://a.example",
        "OVMS_REST_ALLOWED_METHODS": "GET, POST",
        "OVMS_REST_ALLOWED_HEADERS": "Content-Type",
        "OVMS_REST_ALLOW_CREDENTIALS": "true",
    }
    assert len(environ) == len(dataclasses.fields(Settings))
    assert read_settings(environ) == Settings(
        config=Path("/srv/config.json"),
        max_body_bytes=1000,
        max_waiting=3,
        max_held_bytes=5000,
        max_worker_memory_bytes=6000,
        head_timeout_seconds=4,
        body_timeout_seconds=5,
        send_timeout_seconds=6,
        control_bind="127.0.0.1:9000",
        model_control="none",
        model_roots="/srv/models:/data",
        load_timeout_seconds=7,
        file_system_poll_wait_seconds=0,
        access_log="json",
        access_log_file="/var/log/access",
        metrics_enable=True,
        metrics_list="ovms_streams",
        cache_dir="/var/cache/models",
        cpu_extension="/opt/operations.so",
        max_image_pixels=8,
        max_request_pixels=9,
        response_compression=True,
        allowed_origins="https://a.example",
        allowed_methods="GET, POST",
        allowed_headers="Content-Type",
        allow_credentials=True,
    )


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


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("OVMS_REST_MAX_BODY_BYTES", "0", f"{MAX_BODY} '0'"),
        ("OVMS_REST_MAX_BODY_BYTES", "2147483648", f"{MAX_BODY} '2147483648'"),
        ("OVMS_REST_MAX_BODY_BYTES", "-1", f"{MAX_BODY} '-1'"),
        ("OVMS_REST_MAX_BODY_BYTES", "+1", f"{MAX_BODY} '+1'"),
        ("OVMS_REST_MAX_BODY_BYTES", "1.0", f"{MAX_BODY} '1.0'"),
        ("OVMS_REST_MAX_BODY_BYTES", "1e6", f"{MAX_BODY} '1e6'"),
        ("OVMS_REST_MAX_BODY_BYTES", "1_000", f"{MAX_BODY} '1_000'"),
        ("OVMS_REST_MAX_BODY_BYTES", "256M", f"{MAX_BODY} '256M'"),
        ("OVMS_REST_MAX_BODY_BYTES", " 1", f"{MAX_BODY} ' 1'"),
        ("OVMS_REST_MAX_BODY_BYTES", "٣", f"{MAX_BODY} '٣'"),
        ("OVMS_REST_MAX_BODY_BYTES", "²", f"{MAX_BODY} '²'"),
        ("OVMS_REST_MAX_BODY_BYTES", "9" * 5000, f"{MAX_BODY} '{'9' * 5000}'"),
        ("OVMS_REST_LOAD_TIMEOUT_SECONDS", "0", f"{LOAD_TIMEOUT} '0'"),
        ("OVMS_REST_LOAD_TIMEOUT_SECONDS", "86401", f"{LOAD_TIMEOUT} '86401'"),
        ("OVMS_REST_LOAD_TIMEOUT_SECONDS", "5m", f"{LOAD_TIMEOUT} '5m'"),
        ("OVMS_REST_RESPONSE_COMPRESSION", "yes", f"OVMS_REST_RESPONSE_COMPRESSION: {FLAG} 'yes'"),
        ("OVMS_REST_RESPONSE_COMPRESSION", "2", f"OVMS_REST_RESPONSE_COMPRESSION: {FLAG} '2'"),
        ("OVMS_REST_ALLOW_CREDENTIALS", "on", f"OVMS_REST_ALLOW_CREDENTIALS: {FLAG} 'on'"),
        ("OVMS_REST_ALLOW_CREDENTIALS", " true", f"OVMS_REST_ALLOW_CREDENTIALS: {FLAG} ' true'"),
    ],
)
def test_invalid_value_is_reported_with_its_variable(variable, text, problem):
    with pytest.raises(ConfigError) as caught:
        read_settings({variable: text})
    assert caught.value.problems == (problem,)


def test_leading_zeros_do_not_hide_a_number_beyond_the_limit():
    text = "0" * 19 + "3" + "0" * 12
    with pytest.raises(ConfigError) as caught:
        read_settings({"OVMS_REST_MAX_BODY_BYTES": text})
    assert caught.value.problems == (f"{MAX_BODY} '{text}'",)


def test_all_invalid_values_are_reported_together():
    environ = {
        "OVMS_REST_MAX_BODY_BYTES": "x",
        "OVMS_REST_CONFIG": "a.json",
        "OVMS_REST_LOAD_TIMEOUT_SECONDS": "y",
        "OVMS_REST_ALLOW_CREDENTIALS": "z",
    }
    with pytest.raises(ConfigError) as caught:
        read_settings(environ)
    assert caught.value.problems == (
        f"{MAX_BODY} 'x'",
        f"{LOAD_TIMEOUT} 'y'",
        f"OVMS_REST_ALLOW_CREDENTIALS: {FLAG} 'z'",
    )


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


@pytest.mark.parametrize(
    "variable",
    [
        "OVMS_REST_SERVICE_HOST",
        "OVMS_REST_SERVICE_PORT",
        "OVMS_REST_SERVICE_PORT_HTTP",
        "OVMS_REST_PORT",
        "OVMS_REST_PORT_8000_TCP",
        "OVMS_REST_PORT_8000_TCP_ADDR",
        "OVMS_REST_PORT_8000_TCP_PORT",
        "OVMS_REST_PORT_8000_TCP_PROTO",
        "ovms_rest_config",
        "OVMS_CONFIG",
        "MY_OVMS_REST_CONFIG",
        "PATH",
    ],
)
def test_foreign_variable_is_ignored(caplog, variable):
    assert read_settings({variable: "tcp://10.0.0.1:8000"}) == Settings()
    assert caplog.records == []


def test_empty_variable_similar_to_a_setting_is_ignored(caplog):
    read_settings({"OVMS_REST_CONFG": ""})
    assert caplog.records == []
