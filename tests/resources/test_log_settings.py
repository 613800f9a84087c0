"""Triton's logging extension: its requests, and their effect on gunicorn's log in all processes."""

import contextlib
import json
import logging
import re
import signal

import model_zoo
import pytest
from fake_app import client_of
from gunicorn.config import Config
from gunicorn.glogging import Logger
from service import serve, write_config

from ovms_rest.resources.log_settings import Logging
from ovms_rest.resources.permission import Permission
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.log_levels import LogLevels

NAMES = ("gunicorn.error", "gunicorn.error.ovms_rest")
MALFORMED = b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"
AT_INFO = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.fixture
def logger(tmp_path):
    """Make gunicorn's logger write to a file from level info on; restore the loggers afterwards."""
    loggers = [logging.getLogger(name) for name in (*NAMES, "gunicorn.access")]
    before = [(log, log.level, log.propagate, log.handlers[:]) for log in loggers]
    yield Logger(config(tmp_path, "info"))
    for log, level, propagate, handlers in before:
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.setLevel(level)
        log.propagate, log.handlers[:] = propagate, handlers
        vars(log).pop("isEnabledFor", None)


@pytest.fixture
def log_levels(logger):
    """Return the levels of gunicorn's log, which is at info."""
    made = LogLevels()
    made.install()
    return made


def config(directory, level):
    """Return gunicorn's config with this level and a log file."""
    made = Config()
    made.set("errorlog", str(directory / "log"))
    made.set("loglevel", level)
    return made


@pytest.fixture
def client(logger):
    return make_client(Settings(model_control="local"))


def make_client(settings):
    return client_of({"/v2/logging": Logging(LogLevels(), Permission(settings), 1000)})


def post(client, body, address="127.0.0.1"):
    return client.simulate_post("/v2/logging", body=body, remote_addr=address, host="localhost")


# --- Requests


def test_get_returns_the_settings(client):
    answer = client.simulate_get("/v2/logging")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == AT_INFO


def test_head_works_where_get_does(client):
    assert client.simulate_head("/v2/logging").status_code == 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("log_info", False), ("log_warning", False), ("log_error", False)),
        *(("log_verbose_level", 2**31 - 1), ("log_format", "ISO8601")),
    ],
)
def test_changing_one_setting_returns_all(client, key, value):
    answer = post(client, json.dumps({key: value}))
    assert (answer.status_code, answer.json) == (200, {**AT_INFO, key: value})
    assert client.simulate_get("/v2/logging").json == {**AT_INFO, key: value}


@pytest.mark.parametrize("body", [b"", b" \n", b"{}", b'{"unknown": null}'])
def test_request_without_changes_returns_the_settings(client, body):
    answer = post(client, body)
    assert (answer.status_code, answer.json) == (200, AT_INFO)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("log_info", "null", "true or false"),
        ("log_warning", "1", "true or false"),
        ("log_error", '"true"', "true or false"),
        *(("log_verbose_level", value, "an integer from 0 to 2147483647") for value in ("-1", "1.0", "2147483648")),
        ("log_verbose_level", "true", "an integer from 0 to 2147483647"),
        *(("log_format", value, '"default" or "ISO8601"') for value in ('"iso8601"', '["default"]', "null")),
    ],
)
def test_invalid_settings_are_refused(client, key, value, expected):
    answer = post(client, f'{{"{key}": {value}}}')
    assert (answer.status_code, answer.json) == (400, {"error": f"{key} is {value}, expected {expected}"})


def test_log_file_cannot_be_changed(client):
    answer = post(client, '{"log_file": "/tmp/log"}')
    message = "log_file cannot be changed while the service runs; --log_path or gunicorn's --error-logfile set it"
    assert (answer.status_code, answer.json) == (400, {"error": message})


@pytest.mark.parametrize(("body", "found"), [("[]", "an array"), ("null", "null")])
def test_settings_that_are_not_an_object_are_refused(client, body, found):
    answer = post(client, body)
    message = f"the request is {found}, expected an object or an empty body"
    assert (answer.status_code, answer.json) == (400, {"error": message})


def test_invalid_json_is_refused(client):
    answer = post(client, "{log_info}")
    assert answer.status_code == 400
    assert answer.json["error"].startswith("the request is not valid JSON: ")


def test_invalid_setting_leaves_the_others_unchanged(client):
    assert post(client, '{"log_info": false, "log_verbose_level": "high"}').status_code == 400
    assert client.simulate_get("/v2/logging").json == AT_INFO


def test_body_over_the_limit_is_refused(client):
    assert post(client, b" " * 1001).status_code == 413


def test_changes_need_permission(client):
    assert post(client, '{"log_info": false}', address="10.0.0.1").status_code == 403
    assert client.simulate_get("/v2/logging", remote_addr="10.0.0.1").json == AT_INFO


def test_changes_are_refused_where_model_control_is_none(logger):
    answer = post(make_client(Settings(model_control="none")), "{}")
    message = "POST /v2/logging is not allowed over HTTP; OVMS_REST_MODEL_CONTROL is 'none'"
    assert (answer.status_code, answer.json) == (403, {"error": message})


# --- gunicorn's log


def log_all(name):
    """Log a line at every level, with the level in it."""
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logging.getLogger(name), level)("%s of %s", level, name)


def lines(directory):
    return (directory / "log").read_text().splitlines()


def levels(directory):
    """Return the levels of the logged lines."""
    return [line.split("] ")[-1].split(" of ")[0] for line in lines(directory)]


@pytest.mark.parametrize(
    ("level", "on"),
    [
        ("debug", {"log_info", "log_warning", "log_error", "log_verbose_level"}),
        ("info", {"log_info", "log_warning", "log_error"}),
        ("warning", {"log_warning", "log_error"}),
        ("error", {"log_error"}),
        ("critical", set()),
    ],
)
def test_initial_settings_follow_gunicorns_level(logger, tmp_path, level, on):
    logger.setup(config(tmp_path, level))
    log_levels = LogLevels()
    log_levels.install()
    names = ("log_info", "log_warning", "log_error", "log_verbose_level")
    assert {name for name in names if getattr(log_levels.read(), name)} == on


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "value", "left"),
    [
        ("log_verbose_level", 1, ["debug", "info", "warning", "error", "critical"]),
        ("log_verbose_level", 0, ["info", "warning", "error", "critical"]),
        ("log_info", False, ["warning", "error", "critical"]),
        ("log_warning", False, ["info", "error", "critical"]),
        ("log_error", False, ["info", "warning", "critical"]),
    ],
)
def test_each_setting_affects_its_own_level(log_levels, tmp_path, name, key, value, left):
    log_levels.change({key: value})
    log_all(name)
    assert levels(tmp_path) == left


def test_log_format_sets_the_format_of_times(log_levels, tmp_path):
    for log_format in ("default", "ISO8601", "default"):
        log_levels.change({"log_format": log_format})
        logging.getLogger(NAMES[1]).info("written")
    usual, iso = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\]", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    for line, form in zip(lines(tmp_path), (usual, iso, usual), strict=True):
        assert re.fullmatch(rf"{form} \[\d+\] \[INFO\] written", line)


def test_iso_times_are_utc(log_levels, tmp_path):
    log_levels.change({"log_format": "ISO8601"})
    record = logging.LogRecord(NAMES[0], logging.INFO, __file__, 1, "written", (), None)
    record.created = 1_800_000_000.9
    logging.getLogger(NAMES[0]).handle(record)
    assert lines(tmp_path)[0].startswith("2027-01-15T08:00:00Z ")


def test_settings_survive_a_new_setup_of_gunicorns_log(logger, log_levels, tmp_path):
    log_levels.change({"log_info": False, "log_verbose_level": 1, "log_format": "ISO8601"})
    logger.setup(config(tmp_path, "info"))
    log_levels.install()
    log_all(NAMES[1])
    assert levels(tmp_path) == ["debug", "warning", "error", "critical"]
    assert lines(tmp_path)[0][10] == "T"


def test_changed_gunicorn_level_replaces_the_settings(logger, log_levels, tmp_path):
    """A user who changes it in gunicorn's config and reloads wants it."""
    log_levels.change({"log_verbose_level": 1})
    logger.setup(config(tmp_path, "error"))
    log_levels.install()
    log_all(NAMES[1])
    assert levels(tmp_path) == ["error", "critical"]


@pytest.mark.parametrize("name", NAMES)
def test_disabled_level_makes_no_record(log_levels, name):
    for verbose in (0, 1):
        log_levels.change({"log_verbose_level": verbose})
        assert logging.getLogger(name).isEnabledFor(logging.DEBUG) == bool(verbose)


def test_handler_that_survives_a_reload_is_changed_once(logger, tmp_path):
    """The handler of --log_path does."""
    handler = logging.FileHandler(tmp_path / "other")
    handler.setFormatter(logging.Formatter(Logger.error_fmt, Logger.datefmt))
    logging.getLogger(NAMES[0]).addHandler(handler)
    log_levels = LogLevels()
    log_levels.install()
    once = handler.formatter.formatTime
    log_levels.install()
    assert handler.formatter.formatTime is once


def test_other_loggers_are_left_alone(log_levels, tmp_path):
    for name in ("gunicorn.access", ""):
        assert "isEnabledFor" not in vars(logging.getLogger(name))


# --- All processes


@pytest.fixture
def own_service(tmp_path):
    """A service whose levels a test may change."""
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    # The log of `serve`: gunicorn appends to it, and reopens it at SIGUSR1.
    arguments = ("-w", "2", "--error-logfile", str(tmp_path / "service.log"))
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    with serve(tmp_path, *arguments, config=config, OVMS_REST_MODEL_CONTROL="local") as running:
        running.wait_for(lambda: len(running.workers()) == 2)
        yield running


def set_log(service, **settings):
    answer = service.request("POST", "/v2/logging", settings)
    assert answer.status == 200, answer.body
    return answer.json()


def refuse_in_every_worker(service, log):
    """Send malformed requests on new connections until every worker has logged a refusal."""
    workers = set(service.workers())
    with contextlib.ExitStack() as held:

        def all_have():
            connection = held.enter_context(service.connect())  # held, so that other workers accept the next ones
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            assert service.raw(MALFORMED).status == 505
            return workers <= refusals(log())

        service.wait_for(all_have)


def refusals(text):
    """Return the process ids of the workers that have logged a refusal."""
    return {int(pid) for pid in re.findall(r"\[(\d+)\] \[DEBUG\] refused a request", text)}


def test_change_applies_to_every_worker_immediately(own_service):
    assert set_log(own_service, log_verbose_level=1) == {**AT_INFO, "log_verbose_level": 1}
    refuse_in_every_worker(own_service, lambda: own_service.log)
    answers = [own_service.get("/v2/logging").json()["log_verbose_level"] for _ in range(10)]
    assert answers == [1] * 10


def test_default_level_writes_no_debug_lines(service):
    for _ in range(10):
        assert service.raw(MALFORMED).status == 505
    assert "[DEBUG]" not in service.log


def test_change_applies_to_the_arbiter_and_survives_a_reload(own_service):
    set_log(own_service, log_info=False, log_verbose_level=1)
    length, old = len(own_service.log), set(own_service.workers())
    own_service.signal(signal.SIGHUP)
    own_service.wait_for(lambda: len(own_service.workers()) == 2 and not old & set(own_service.workers()))
    assert "[INFO]" not in own_service.log[length:]
    refuse_in_every_worker(own_service, lambda: own_service.log[length:])
    assert own_service.get("/v2/logging").json() == {**AT_INFO, "log_info": False, "log_verbose_level": 1}
    set_log(own_service, log_info=True)
    own_service.signal(signal.SIGHUP)
    own_service.wait_for(lambda: f"[{own_service.process.pid}] [INFO] Handling signal: hup" in own_service.log[length:])


def test_change_applies_to_reopened_files(own_service, tmp_path):
    set_log(own_service, log_format="ISO8601", log_verbose_level=1)
    (tmp_path / "service.log").rename(tmp_path / "old.log")
    own_service.signal(signal.SIGUSR1)
    own_service.wait_for((tmp_path / "service.log").exists)
    refuse_in_every_worker(own_service, lambda: own_service.log)
    for line in own_service.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \[\d+\] \[", line)
