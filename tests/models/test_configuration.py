"""Checks of the values in the configuration of one model."""

from pathlib import Path

import pytest

from ovms_rest.models.configuration import MAX_NIREQ, ModelConfig, check_values_of
from ovms_rest.models.options import ModelOptions


def problems(**values):
    return check_values_of(ModelConfig("m", Path("/m"), **values)).problems


def test_default_values_have_no_problems():
    assert problems() == []
    assert problems(nireq=MAX_NIREQ) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"remote": "s3://b/m"}, 'base_path: only local directories and files can be served, got "s3://b/m"'),
        ({"nireq": MAX_NIREQ + 1}, "nireq: expected at most 100000, got 100001"),
        ({"options": ModelOptions(shape="(x)")}, "shape: expected each dim"),
        ({"plugin_config": {"NUM_STREAMS": "x"}}, "plugin_config.NUM_STREAMS: expected AUTO, NUMA or an integer"),
    ],
)
def test_invalid_value_is_a_problem(values, problem):
    (found,) = problems(**values)
    assert found.startswith(problem)


def test_all_problems_are_returned():
    found = problems(remote="gs://m", nireq=MAX_NIREQ + 1, options=ModelOptions(layout="Q:"))
    assert [problem.partition(":")[0] for problem in found] == ["base_path", "nireq", "layout"]
