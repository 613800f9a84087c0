"""The README: its requests give what it shows, its tables are those of the code, its test command is CI's."""

import re
import subprocess
from dataclasses import fields

import pytest
from service import ROOT, environment, serve

from ovms_rest.config import _MODEL_KEYS, _ROOT_KEYS
from ovms_rest.settings import PREFIX, Settings

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
REQUESTS = [
    (command, answer) for block in BLOCKS for command, answer in re.findall(r"^\$ (.*)\n(.*)\n", block, re.MULTILINE)
]
DEMO = "http://127.0.0.1:8000"
CONTROL = "http://127.0.0.1:9000"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The service as the first command starts it, with a control address, on other ports."""
    with serve(tmp_path_factory.mktemp("demo"), OVMS_REST_CONTROL_BIND="127.0.0.1:0") as running:
        found = running.wait_for(lambda: re.search(r"control address: (http://127\.0\.0\.1:\d+)", running.log))
        running.control = found[1]
        yield running


@pytest.mark.parametrize(("command", "answer"), REQUESTS)
def test_a_request_gives_what_the_readme_shows(demo, command, answer, tmp_path):
    assert DEMO in command or CONTROL in command
    command = command.replace(DEMO, f"http://127.0.0.1:{demo.port}").replace(CONTROL, demo.control)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    pattern = re.escape(answer).replace(r"\[\.\.\.\]", r"\[[0-9.,e-]+\]")
    assert re.fullmatch(pattern, done.stdout.strip())


def test_the_readme_has_requests():
    assert len(REQUESTS) >= 5


def test_the_python_example_runs(demo, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    code, text = blocks  # tests/models/test_text.py runs the other one
    assert "openvino_tokenizers" in text
    done = subprocess.run(
        ["python", "-c", code.replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}")],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(re.findall(r"\d\.\d+e[-+]\d+|\d\.\d+", done.stdout)) == 10


@pytest.mark.parametrize(("language", "interpreter"), [("sh", "sh"), ("sh", "bash"), ("py", "python")])
def test_the_recipes_send_a_picture(demo, tmp_path, language, interpreter):
    section = README.split("\n### Images\n")[1].split("\n### ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [interpreter, "-c", code.replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}")],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[6,5,9,0,2]" in done.stdout.replace(" ", "")


def test_the_table_of_settings_is_the_code_s():
    rows = re.findall(r"^\| `(OVMS_REST_\w+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    expected = [(PREFIX + field.name.upper(), field.default, field.metadata["meaning"]) for field in fields(Settings)]
    assert [(name, meaning) for name, _, meaning in rows] == [(name, meaning) for name, _, meaning in expected]
    assert [default for _, default, _ in rows[1:]] == [
        str(default).lower() if isinstance(default, bool) else str(default) or "(empty)"
        for _, default, _ in expected[1:]
    ]


@pytest.mark.parametrize(("title", "checks"), [("the file", _ROOT_KEYS), ("a model", _MODEL_KEYS)])
def test_the_tables_of_keys_are_the_code_s(title, checks):
    """Those that are always refused are told below the tables."""
    table = README.split(f"### Keys of {title}\n", 1)[1].split("\n\n", 2)[0]
    keys = [key for names in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", names)]
    assert sorted(keys) == sorted(key for key, check in checks.items() if "is not supported" not in str(check(None)))


def test_ci_runs_the_readme_s_test_command():
    (command,) = re.findall(r"^(pip install '\.\[test\]'.*)$", README, re.MULTILINE)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
