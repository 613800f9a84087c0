"""No client begins a line of the log, or sends a control character to whoever reads it."""

import base64
import contextlib
import io
import json
import logging
import re
from urllib.parse import quote

import model_zoo
import pytest
from falcon import testing
from raw_http import exchange, head, post
from service import serve, write_config

from ovms_rest.app import create_app
from ovms_rest.protocol.words import escape, escape_lines
from ovms_rest.settings import Settings
from ovms_rest.worker import log_escaping

NAMES = ("gunicorn.error", "gunicorn.error.ovms_rest", "gunicorn.access")
C0, C1 = map(chr, range(0x20)), map(chr, range(0x7F, 0xA0))
CONTROLS = [*C0, *C1, "\u2028", "\u2029", "\ud800", "\udfff"]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but the line feed


# --- The text


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_a_control_character_is_written_as_python_writes_it(control):
    assert escape(f"a{control}b") == ascii(f"a{control}b")[1:-1]


def test_other_characters_are_left_alone():
    text = "modèle 模型 \U0001f600 \\n %s ~ \xa0"
    assert escape(text) == escape_lines(text) == text


def test_lines_are_kept_and_indented():
    assert escape_lines("a\nb\r\nc\x1b[31m") == "a\n  b\\r\n  c\\x1b[31m"


# --- The loggers


@pytest.fixture(params=NAMES)
def logger(request, tmp_path):
    """A logger as gunicorn has it after it has set it up, which writes to a file."""
    log_escaping.install()
    log_escaping.install()
    found = logging.getLogger(request.param)
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    parent = logging.getLogger("gunicorn.error") if request.param == NAMES[1] else found
    parent.addHandler(handler)
    before, found.level = found.level, logging.DEBUG
    found.read = lambda: (handler.flush(), (tmp_path / "log").read_text())[1]
    yield found
    found.setLevel(before)
    parent.removeHandler(handler)
    handler.close()
    del found.read


def test_messages_and_their_arguments_stay_in_a_line(logger):
    logger.error("a\n%s %r %d", "b\nc", "d\n", 1)
    logger.error("50%\r\nb")
    logger.error(ValueError("a\u2028b"))
    logger.error("%(x)s", {"x": "a\x1b[2J"})
    assert logger.read().splitlines() == [
        r"ERROR a\nb\nc 'd\n' 1",
        r"ERROR 50%\r\nb",
        r"ERROR a\u2028b",
        r"ERROR a\x1b[2J",
    ]


def test_a_traceback_keeps_its_lines_and_none_looks_like_a_line_of_the_log(logger):
    try:
        raise ValueError("a\nERROR forged\x1b[2J")
    except ValueError:
        logger.exception("failed at %s", "x\ny")
    first, *lines = logger.read().splitlines()
    assert first == r"ERROR failed at x\ny"
    assert lines[0] == "  Traceback (most recent call last):"
    assert lines[-2:] == ["  ValueError: a", r"  ERROR forged\x1b[2J"]
    assert all(line.startswith("  ") for line in lines)


def test_a_message_that_does_not_fit_its_arguments_is_left_to_the_handlers(logger):
    record = logging.LogRecord(logger.name, logging.ERROR, __file__, 1, "%d", ("x",), None)
    assert logger.filter(record)
    assert (record.msg, record.args) == ("%d", ("x",))


def test_gunicorns_configuration_keeps_its_lines(logger):
    """It is logged at the level debug."""
    logger.debug("Current configuration:\nb\x1b\n[c")
    assert logger.read() == "DEBUG Current configuration:\n  b\\x1b\n  [c\n"


# --- A service, with everything that a client controls

FORGED = "[2026-11-24 12:00:00 +0000] [1] [CRITICAL] forged"
# Those that HTTP lets through in a header, in latin-1, and those that it does not.
RAW = ["\t", "\x80", "\x85", "\x9b31m", "\x00", "\r", "\n", "\x0b", "\x1b[31m", "\x7f"]
DECODED = ["\n", "\r", "\x1b[31m", "\x00", "\x7f", "\x85", "\u2028", "\u2029", "\x9b31m"]
FORMAT = '%(h)s %(l)s %(u)s "%(r)s" %(s)s %(U)s %(q)s "%(f)s" "%(a)s" %({x-any}i)s %({X-Request-ID}o)s'


@pytest.fixture(scope="module", params=["ovms_rest.worker.worker.Worker", "sync"])
def service(request, tmp_path_factory):
    """A service that logs all that it can."""
    directory = tmp_path_factory.mktemp("logging")
    model_zoo.save(model_zoo.relu(), directory / "m")
    broken = directory / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / f"a\n{FORGED}.onnx").write_text("garbage")
    config = write_config(directory, {"name": "m", "base_path": "m"}, {"name": "broken", "base_path": "broken"})
    logs = ("--log-level", "debug", "--access-logfile", "-", "--access-logformat", FORMAT)
    settings = {"OVMS_REST_MODEL_CONTROL": "local", "OVMS_REST_ACCESS_LOG": "text"}
    with serve(directory, "-w", "1", "-k", request.param, *logs, config=config, **settings) as running:
        yield running


def lines_of_clients(service):
    """Return the log without what gunicorn writes of itself in lines at the start; check that it is clean."""
    text = service._log.read_bytes().decode()
    assert not CONTROL.search(text), ascii(CONTROL.search(text))
    assert not [line for line in text.split("\n") if line.startswith(("forged", FORGED))]
    return text


def requests(text):
    """Yield requests with a text that is decoded, wherever a client may put it."""
    path = quote(text.encode(errors="surrogatepass"), safe="")
    for place in (path, f"/{path}", f"v2/{path}", f"v2/models/{path}", f"v2/models/m/versions/{path}/ready"):
        yield head("GET", f"/{place}")
    yield head("GET", f"/v2?{path}")
    yield head("GET", "/v2", f"X-Request-ID: {path}")
    user = base64.b64encode(f"{text}:password".encode(errors="surrogatepass")).decode()
    yield head("GET", "/v2", f"Authorization: Basic {user}")
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    good, bad = {"inputs": [tensor], "id": text}, {"inputs": [{**tensor, "name": text}], "id": text}
    wrong = {"inputs": [{**tensor, "datatype": text}], "outputs": [{"name": text}], text: text, "parameters": {text: 1}}
    for body in (good, bad, wrong):
        yield post("/v2/models/m/infer", json.dumps(body).encode())
    for name in (path, "m"):
        yield post(f"/v2/models/{name}/infer", b"{}", f"X-Request-ID: {path}")
        yield post(f"/v2/repository/models/{name}/unload", json.dumps({"parameters": {text: text}}).encode())
        for config in (
            {text: 1},
            {"base_path": text},
            {"base_path": f"m/{text}"},
            {"name": text},
            {"base_path": "m", "plugin_config": {text: text}},
            {
                "base_path": "m",
                "plugin_config": {"CACHE_DIR": text, "NUM_STREAMS": text, "INFERENCE_PRECISION_HINT": text},
            },
            {"base_path": "m", "shape": {text: text}, "layout": {text: text}, "target_device": text},
            {"base_path": "m", "shape": text, "layout": text, "mean": text, "color_format": text, "precision": text},
            {"base_path": "m", "model_version_policy": {text: {}}, "batch_size": text, "backend": text},
        ):
            parameters = {"parameters": {"config": json.dumps(config), text: text}}
            yield post(f"/v2/repository/models/{name}/load", json.dumps(parameters).encode())
    yield post("/v2/repository/models/m/load", b"")
    yield post("/v2/logging", json.dumps({"log_format": text, text: text}).encode())
    yield post("/v2/repository/index", json.dumps({"ready": text, text: text}).encode())


def test_what_is_decoded_begins_no_line(service):
    for control in DECODED:
        for data in requests(f"a{control}{FORGED}"):
            assert exchange(service, data).startswith(b"HTTP/1.1 "), data
    text = lines_of_clients(service)
    assert "forged" in text
    assert re.search(r"^\[.*\[DEBUG\] Current configuration:\n(    \w+: .*\n)+", text, re.MULTILINE)


def test_what_is_sent_as_it_is_begins_no_line(service):
    for control in RAW:
        text = f"a{control}{FORGED}"
        for data in (
            head("GET", f"/v2{text.replace(' ', '')}"),
            head("GET", "/v2", f"X-Any: {text}", f"User-Agent: {text}", f"Referer: {text}"),
            head("GET", "/v2", f"X-Request-ID: {text}"),
            head(text, "/v2"),
            head("GET", "/v2", f"{text}: b"),
            head("GET", "/v2", version=text),
            head("GET", "/v2", f"Transfer-Encoding: {text}"),
            head("POST", "/v2", f"Content-Length: {text}"),
            head("POST", "/v2", f"Expect: {text}"),
            f"GET /v2 HTTP/1.1\r\nHost: {text}\r\n\r\n".encode("latin-1"),
        ):
            with contextlib.suppress(ConnectionError):
                exchange(service, data)
    lines_of_clients(service)


@pytest.mark.parametrize("control", ["\n", "\x00", "\x7f", "\x85"])
def test_a_name_with_control_characters_is_refused(service, control):
    name = quote(f"a{control}b")
    body = json.dumps({"parameters": {"config": '{"base_path": "m"}'}}).encode()
    answer = service.request("POST", f"/v2/repository/models/{name}/load", body)
    expected = "name in the path: expected a non-empty string without '/' and control characters, got "
    assert answer.status == 400
    assert answer.json()["error"].startswith(expected)
    for path, method in ((f"/v2/models/{name}", "GET"), (f"/v2/models/{name}/infer", "POST")):
        assert service.request(method, path, b"").status == 404
    for what in ("load", "unload"):
        assert service.request("POST", f"/v2/repository/models/{name}/{what}", b"").status == 404
    assert sorted(service.get("/v1/config").json()) == ["broken", "m"]


def test_a_bug_met_by_a_forged_path_begins_no_line():
    """Falcon writes the decoded path of a request at which the application failed."""

    class BuggyRegistry:
        def find(self, name, version=None, explain=False):
            raise RuntimeError(f"no {name}")

    errors = io.StringIO()
    client = testing.TestClient(create_app(BuggyRegistry(), Settings()))
    answer = client.simulate_get(f"/v2/models/{quote(f'a{chr(10)}{FORGED}')}", wsgierrors=errors)
    first, *lines = errors.getvalue().splitlines()
    assert answer.status_code == 500
    assert first == rf"[ERROR] GET /v2/models/a\n{FORGED} failed"
    assert (lines[0], lines[-2:]) == ("  Traceback (most recent call last):", ["  RuntimeError: no a", f"  {FORGED}"])
