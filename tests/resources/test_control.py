"""Bodies of the control routes: small ones are read, and none keeps the control worker from answering probes."""

import gzip
import json

import model_zoo
import pytest
from processes import spent
from service import free_port, serve, write_config

from ovms_rest.resources.control import MAX_BODY_BYTES

ROUTES = ["repository/index", "repository/models/relu/load", "repository/models/relu/unload", "logging"]
GZIP = {"Content-Encoding": "gzip"}
MESSAGE = f"at most {MAX_BODY_BYTES} are allowed"


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A service whose requests go to its control address."""
    directory, port = tmp_path_factory.mktemp("control"), free_port()
    model_zoo.save(model_zoo.relu(), directory / "relu")
    config = write_config(directory, {"name": "relu", "base_path": "relu"})
    variables = {"OVMS_REST_CONTROL_BIND": f"127.0.0.1:{port}"}
    with serve(directory, "-w", "1", config=config, **variables) as running:
        running.wait_for(lambda: running.log.count("Booting worker") == 2)
        running.port = port
        running.wait_for(lambda: len(running.workers()) == 2)
        yield running


@pytest.mark.parametrize("route", ROUTES)
def test_decompression_bomb_is_refused_quickly(control, route):
    """59 KB blocked the probes for 3.7 s."""
    bomb = gzip.compress(b'{"junk":[' + b"{}," * 20_000_000 + b"{}]}")
    assert len(bomb) < 60_000
    before = sum(map(spent, control.workers()))
    answer = control.request("POST", f"/v2/{route}", bomb, GZIP)
    assert sum(map(spent, control.workers())) - before < 1
    assert (answer.status, answer.json()["error"]) == (
        413,
        f"the body decompresses to more than the {MAX_BODY_BYTES} bytes allowed",
    )
    assert control.get("/v2/health/live").status == 200


@pytest.mark.parametrize("route", ROUTES)
def test_large_body_is_refused_with_the_limit(control, route):
    body = b" " * MAX_BODY_BYTES + b"{}"
    answer = control.request("POST", f"/v2/{route}", body)
    assert (answer.status, answer.json()["error"]) == (413, f"the body has {len(body)} bytes, {MESSAGE}")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"ready":1e999}', "the number 1e999 is beyond the range of FP64: line 1 column 10 (char 9)"),
        (b'{"caf\xe9":1}', "line 1 column 6: byte 0xe9 is not UTF-8"),
    ],
)
def test_what_is_wrong_with_the_json_is_named(control, body, reason):
    answer = control.request("POST", "/v2/repository/index", body)
    assert (answer.status, answer.json()["error"]) == (400, f"the request is not valid JSON: {reason}")


def test_compressed_body_within_the_limit_is_read(control):
    body = gzip.compress(b" " * (MAX_BODY_BYTES - 2) + b"{}")
    answer = control.request("POST", "/v2/repository/index", body, GZIP)
    assert (answer.status, [entry["name"] for entry in answer.json()]) == (200, ["relu"])


CONFIGS = {
    "unknown keys": {f"key {index}": 1 for index in range(3500)},
    "properties": {"base_path": "relu", "plugin_config": {f"KEY {index}": 1 for index in range(3500)}},
    "wrong properties": {"base_path": "relu", "plugin_config": {f"KEY {index}": [] for index in range(3500)}},
    "a long key": {"x" * 60_000: 1},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_with_many_mistakes_is_refused_with_a_short_message(control, config):
    """Searching for the nearest known key of each kept the arbiter busy for seconds."""
    before = spent(control.process.pid)
    body = {"parameters": {"config": json.dumps(config)}}
    answer = control.request("POST", "/v2/repository/models/relu/load", body)
    assert answer.status in (400, 412)
    assert len(answer.json()["error"]) < 10_000
    assert spent(control.process.pid) - before < 0.5
