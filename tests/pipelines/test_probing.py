"""The trial of custom code in a throwaway process: everything that can end or hang it."""

import os
import time
from pathlib import Path

import pytest
from node_cases import PYTHON_NODE
from service import wait_for_end
from timeouts import keep_trying

from ovms_rest.errors import LoadError
from ovms_rest.pipelines.probing import Code, probe


def code(directory, **params):
    return Code("file", str(directory / "node.py"), params)


def reason_of(directory, timeout=60, stop=lambda: False, **params) -> str:
    with pytest.raises(LoadError) as caught:
        probe(code(directory, **params), timeout, stop)
    return str(caught.value)


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import os; os.abort()", "SIGABRT"),
        ("import ctypes; ctypes.string_at(8)", "SIGSEGV"),
    ],
)
def test_code_that_ends_its_process_is_reported(tmp_path, text, end):
    (tmp_path / "node.py").write_text(text)
    assert reason_of(tmp_path) == f"ended its trial process with {end} while being imported"


@pytest.mark.parametrize(
    "text", ["import time; time.sleep(60)", "import os, time; os.closerange(3, 99); time.sleep(60)"]
)
def test_code_that_hangs_is_stopped(tmp_path, text):
    (tmp_path / "node.py").write_text(text)
    before = children()  # those of other tests' fixtures
    timeout, reason = keep_trying(
        lambda timeout: reason_of(tmp_path, timeout), lambda reason: not reason.endswith("while starting")
    )
    assert reason == f"timed out after {timeout} s while being imported"
    assert children() == before


def test_a_trial_ends_with_the_service(tmp_path):
    (tmp_path / "node.py").write_text("import time; time.sleep(60)")
    started = time.monotonic()
    assert reason_of(tmp_path, stop=lambda: True) == "was not tried, because the service is shutting down"
    assert time.monotonic() - started < 10


def test_the_output_of_the_code_does_not_disturb_its_trial(tmp_path):
    (tmp_path / "node.py").write_text(f"import sys\nprint('{{\"reason\": 1}}', flush=True)\n{PYTHON_NODE}")
    assert probe(code(tmp_path), 60) is None


def test_processes_forked_by_the_code_end_with_its_trial(tmp_path):
    pids = tmp_path / "pids"
    (tmp_path / "node.py").write_text(
        f"import os, time\nif not os.fork():\n    print(os.getpid(), file=open({str(pids)!r}, 'w'))\n"
        f"    time.sleep(60)\ntime.sleep(0.5)\nos._exit(1)"
    )
    assert reason_of(tmp_path) == "ended its trial process with exit code 1 while being imported"
    wait_for_end(int(pids.read_text()))


def test_a_process_that_cannot_start_is_reported(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(PYTHON_NODE)
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert reason_of(tmp_path) == "ended its trial process with exit code 1 while starting"


def test_a_process_that_does_not_read_its_params_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(PYTHON_NODE)
    (tmp_path / "deaf").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "deaf").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "deaf"))
    assert reason_of(tmp_path, timeout=1, large="x" * 2**20) == "timed out after 1 s while starting"
