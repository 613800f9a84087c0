"""Compiled models survive a fork; each scenario is a case of it."""

import subprocess
import sys

import fork_scenarios
import pytest


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in fork_scenarios.SCENARIOS])
def test_scenario(scenario, tmp_path):
    subprocess.run([sys.executable, fork_scenarios.__file__, scenario, tmp_path], check=True, timeout=120)
