"""What a config has that OVMS dropped, by values and in the report of `ovms-rest check`."""

import json
import subprocess

import model_zoo
import pytest
from service import environment, write_config

from ovms_rest.config import load_config
from ovms_rest.ovms_releases import describe_dropped

CLIENTS = "clients of TensorFlow Serving's REST API: need OVMS before 2026.3; work here: POST /v1/models/NAME:predict"
PIPELINES = "pipeline_config_list: a legacy feature of OVMS; works here, with libraries in C as for OVMS"
STATEFUL = "needs OVMS before 2026.3, since later releases refuse the whole file; works here: false has no effect"


def model(**keys):
    return {"config": {"name": "m", "base_path": "m", **keys}}


@pytest.mark.parametrize(
    ("root", "lines"),
    [
        ({"model_config_list": []}, []),
        ({"model_config_list": [model()]}, [CLIENTS]),
        ({"model_config_list": [model()], "pipeline_config_list": []}, [CLIENTS]),
        ({"model_config_list": [], "pipeline_config_list": [{"name": "p"}]}, [PIPELINES, CLIENTS]),
        (
            {"model_config_list": [model(), model(stateful=False)]},
            [f"model_config_list[1].config.stateful: {STATEFUL}", CLIENTS],
        ),
        (
            {"model_config_list": [model(stateful=False)] * 3},
            [f"model_config_list[0].config.stateful and 2 more: {STATEFUL}", CLIENTS],
        ),
    ],
)
def test_each_feature_has_a_line(root, lines):
    assert list(describe_dropped(root)) == lines


def test_stateful_false_is_accepted_without_effect(tmp_path):
    plain, stateful = (
        load_config(write_config(tmp_path, {"name": "m", "base_path": "m", **keys}))
        for keys in ({}, {"stateful": False})
    )
    assert stateful.models == plain.models


def check(home, *arguments):
    """Run `ovms-rest check` to its end; return its exit code and output."""
    done = subprocess.run(
        ["ovms-rest", "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env=environment(home),
        check=False,
    )
    return done.returncode, done.stdout


def test_check_names_what_ovms_dropped_and_the_file_is_no_problem(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m", "stateful": False})
    expected = [f"model_config_list[0].config.stateful: {STATEFUL}", CLIENTS]
    code, text = check(tmp_path, config)
    assert code == 0
    assert [line for line in text.splitlines() if line.startswith("OVMS: ")] == [f"OVMS: {line}" for line in expected]
    code, text = check(tmp_path, config, "--json")
    assert json.loads(text)["ovms"] == expected
    assert code == 0


def test_check_of_paths_says_nothing_of_ovms(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    code, text = check(tmp_path, tmp_path / "m", "--json")
    assert (code, json.loads(text)["ovms"]) == (0, [])


def test_check_of_a_refused_file_says_in_which_release_a_key_was_dropped(tmp_path):
    code, text = check(tmp_path, write_config(tmp_path, {"name": "m", "base_path": "m", "stateful": True}))
    assert code == 1
    assert "config.stateful: is not supported: OVMS removed stateful models in 2026.3" in text
    assert "OVMS: " not in text
