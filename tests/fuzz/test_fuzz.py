"""Every target over its corpus and some new inputs, the same ones every time; run.py goes on with others."""

import importlib.util

import pytest
from fuzz_campaign import CORPUS, fuzz, names, unpack

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python or processor"
)

# New inputs: fewer where one takes milliseconds.
_RUNS = 100_000
_FEWER_RUNS = {
    "applications": 50_000,
    "bodies": 50_000,
    "chunks": 20_000,
    "config": 15_000,
    "conversations": 20_000,
    "flags": 4_000,
    "heads": 50_000,
    "logs": 20_000,
    "predictions": 50_000,
    "requests": 50_000,
}


@pytest.mark.parametrize("name", names())
def test_target_finds_nothing(name, tmp_path):
    known = unpack(name, tmp_path / "corpus")
    runs = known + _FEWER_RUNS.get(name, _RUNS)
    result = fuzz(
        name, "--seeds", "-seed=1", f"-runs={runs}", tmp_path / "corpus", findings=tmp_path / "findings", seconds=600
    )
    assert result.finding is None, f"{result.finding}\n{result.output[-3000:]}"
    assert result.executions >= runs  # an input may be tried once more
    assert result.edges > 20, "the service's code is not instrumented"


def test_corpus_is_small():
    assert {path.stem for path in CORPUS.iterdir()} == set(names())
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 400_000


BROKEN = """
from ovms_rest.protocol.strings import unpack

def check(data):
    unpack(memoryview(data), 1, "x")  # raises InvalidRequestError, which is not caught here
"""


def test_finding_ends_a_run_with_its_reason_and_its_input(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = fuzz("elsewhere.broken", "-seed=1", "-runs=100", findings=tmp_path, seconds=600)
    path, reason = result.finding
    assert reason == "InvalidRequestError: x: its shape needs 1 string, but the data has 0"
    again = fuzz("elsewhere.broken", path, findings=tmp_path, seconds=600)
    assert again.finding[1] == reason
