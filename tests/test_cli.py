"""The command `ovms-rest`."""

import json
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest
from service import environment, write_config

from ovms_rest import __version__
from ovms_rest.settings import DEMO_CONFIG

COMMAND = str(Path(sys.executable).parent / "ovms-rest")


def run(home, *arguments, **variables):
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(home, **variables),
        check=False,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A config with a model that each worker compiles, one with a broken version, and one that is not there."""
    directory = tmp_path_factory.mktemp("mixed")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "m")
    (directory / "m" / "2").mkdir()
    (directory / "m" / "2" / "model.onnx").write_text("garbage")
    latency = {"name": "latency", "base_path": "m/1", "plugin_config": {"PERFORMANCE_HINT": "LATENCY"}}
    named = {"name": "m", "base_path": "m", "layout": "NC"}
    return write_config(directory, latency, named, {"name": "absent", "base_path": "absent"})


def test_a_good_config_is_reported_and_exits_with_0(tmp_path):
    done = run(tmp_path, "check", DEMO_CONFIG)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "model 'digits' version 1"
    assert lines[1].startswith("  file      /")
    assert "  input     image  FP32  [-1,8,8,1]" in lines
    assert "  output    digit  INT64  [-1]" in lines
    assert any(line.startswith("  CPU       compiled once, shared by all workers: ") for line in lines)
    assert any(line.startswith("  loaded    in ") and line.endswith(" MB") for line in lines)
    assert lines[-1] == "1 of 1 models serve, 0 problems"


def test_progress_is_told_apart_from_the_report(tmp_path):
    done = run(tmp_path, "check", DEMO_CONFIG, "--json")
    assert "loading 'digits' version 1 ...\n" in done.stderr
    assert json.loads(done.stdout)["models"][0]["name"] == "digits"


def test_every_problem_is_reported_and_exits_with_1(tmp_path, mixed):
    done = run(tmp_path, "check", mixed)
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert problems[0].startswith("problem: version 2 of model 'm' does not serve: cannot read ")
    assert problems[1].startswith("problem: model 'absent' does not serve: ")
    assert "  input     x  FP32  [1,4]  layout NC" in done.stdout.splitlines()
    assert "compiled by each worker: PERFORMANCE_HINT is LATENCY" in done.stdout
    assert done.stdout.endswith("2 of 3 models serve, 2 problems\n")


def test_the_report_for_machines_says_the_same(tmp_path, mixed):
    done = run(tmp_path, "check", "--json", mixed)
    assert done.returncode == 1
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
def test_the_mistakes_of_a_file_are_all_reported(tmp_path, flags):
    config = write_config(tmp_path, {"name": "a", "bas_path": "x"}, {"base_path": "y"})
    done = run(tmp_path, "check", config, *flags)
    assert done.returncode == 1
    for text in ("model_config_list[0].config.bas_path", "base_path", "model_config_list[1].config.name"):
        assert text in done.stdout


def test_wrong_settings_are_problems_too(tmp_path):
    done = run(tmp_path, "check", DEMO_CONFIG, OVMS_REST_MAX_WAITING="no")
    assert done.returncode == 1
    assert "problem: OVMS_REST_MAX_WAITING: expected an integer" in done.stdout


def test_the_version(tmp_path):
    assert run(tmp_path, "--version").stdout == f"ovms_rest {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"]])
def test_help_tells_of_check(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert done.returncode == 0
    assert "load all that a config names" in " ".join(done.stdout.lower().split())


@pytest.mark.parametrize("arguments", [[], ["chekc"], ["check"]])
def test_a_wrong_call_is_told_on_the_standard_error(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ovms-rest" in done.stderr
