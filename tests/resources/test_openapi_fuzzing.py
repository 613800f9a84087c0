"""schemathesis over all routes of the OpenAPI document: requests that fit its schemas, and requests that do not."""

import os
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest
from service import serve

from openvino import Type  # isort: skip

# A schema cannot say that `data` has as many elements as `shape` says, and a timeout of 1 us passes.
CONFIG = """
[warnings]
enabled = false

[phases]
stateful.enabled = false
coverage.unexpected-methods = ["DELETE", "PUT"]

[[operations]]
include-path-regex = "/infer$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "503"]
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
"""

FIND = Path(__file__).parents[2] / "ovms_rest" / "demo" / "find_digits.py"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzzing")
    connection = {"picture": {"node_name": "request", "data_item": "picture"}}
    find = {"name": "n", "type": "custom", "library_name": "find", "inputs": [connection]}
    config = model_zoo.save_all(
        directory,
        {
            "o'd%2Fd {é}": model_zoo.relu(),
            "types": model_zoo.passthrough(flag=(Type.boolean, ()), text=(Type.string, (-1,))),
        },
        custom_node_library_config_list=[{"name": "find", "base_path": str(FIND)}],
        pipeline_config_list=[
            {
                "name": "pipeline",
                "inputs": ["picture"],
                "nodes": [{**find, "outputs": [{"data_item": "boxes", "alias": "boxes"}]}],
                "outputs": [{"boxes": {"node_name": "n", "data_item": "boxes"}}],
            }
        ],
    )
    with serve(directory, "-w", "1", config=config, OVMS_REST_METRICS_ENABLE="true") as running:
        yield running


def test_schemathesis_finds_no_failure(served, tmp_path):
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run"),
        *(f"http://127.0.0.1:{served.port}/v2/openapi.json", "--max-examples", "2", "--workers", "1"),
        *("--generation-deterministic", "--no-color"),
    ]
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "CI": "1"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "failed" not in found.stdout
    assert "500 Internal" not in served.log
