"""`python -m ovms_rest` and the console script `ovms-rest`."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from service import environment

from ovms_rest import __version__


@pytest.mark.parametrize("command", [["ovms-rest"], [sys.executable, "-m", "ovms_rest"]])
def test_command_and_module_print_the_versions(tmp_path, command):
    arguments, env = [*command, "--version"], environment(tmp_path)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
    assert done.stdout == f"ovms_rest {__version__}\nOpenVINO {version('openvino')}\n"
