"""gunicorn's settings for the service, read in a process of their own, as importing them changes gunicorn."""

import subprocess
import sys

import pytest
from service import environment

from ovms_rest.host.cores import usable_cores


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "value"),
    [
        ("workers", (), {}, usable_cores()),
        ("workers", (), {"WEB_CONCURRENCY": "7"}, 7),
        ("control_socket_disable", ("-w", "1"), {}, True),
        ("control_socket_disable", ("--control-socket=x",), {}, False),
        ("control_socket_disable", (), {"GUNICORN_CMD_ARGS": "--control-socket x"}, False),
    ],
)
def test_setting_follows_the_environment_and_the_command_line(tmp_path, name, arguments, variables, value):
    code = f"from ovms_rest.arbiter.gunicorn_settings import {name}; print({name})"
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment(tmp_path, **variables), capture_output=True, text=True, check=True)
    assert ended.stdout == f"{value}\n"
