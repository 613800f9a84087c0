"""Runs of targets in processes of their own, and their corpora: one archive for each target in corpus/."""

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
# One date for all members, so that an archive depends on its inputs alone.
_DATE = (2026, 1, 1, 0, 0, 0)
# More than any target needs; a decoder that allocates what an input announces needs more.
_MOST_MEGABYTES = 1000
_SECONDS_PER_INPUT = 20

# A line of libFuzzer: "#5000  DONE   cov: 458 ft: 996 corp: 115/26Kb ...".
_LINE = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ", re.MULTILINE)
_ARTIFACT = re.compile(r"Test unit written to (\S+)")
_REASON = re.compile(r"=== Uncaught Python exception: ===\n(.*)|^(SUMMARY: .*|==\d+== ERROR: .*)", re.MULTILINE)


class Result(NamedTuple):
    """A run: executions, edges of the service's code, and the file and the reason of a finding, None without one."""

    executions: int
    edges: int
    finding: tuple[str, str] | None
    output: str


def names() -> list[str]:
    """Return the targets."""
    return sorted(path.stem for path in (HERE / "fuzz_targets").glob("[a-z]*.py"))


def unpack(name: str, directory: Path) -> int:
    """Write the corpus of a target into a directory, a file for each input; return how many."""
    directory.mkdir(parents=True, exist_ok=True)
    archive = CORPUS / f"{name}.zip"
    if not archive.exists():
        return 0
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(directory)
        return len(packed.namelist())


def pack(name: str, directory: Path) -> None:
    """Replace the corpus of a target by the files of a directory."""
    CORPUS.mkdir(exist_ok=True)
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(directory.iterdir()):
            packed.writestr(zipfile.ZipInfo(path.name, _DATE), path.read_bytes(), zipfile.ZIP_DEFLATED)


def fuzz(name: str, *arguments: object, findings: Path, seconds: float) -> Result:
    """Run a target with libFuzzer's arguments; a finding is written to a directory. Kill it after the seconds."""
    findings.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, str(HERE / "fuzz.py"), name, *map(str, arguments)),
        *(f"-artifact_prefix={findings}/{name}-", f"-rss_limit_mb={_MOST_MEGABYTES}", f"-timeout={_SECONDS_PER_INPUT}"),
    ]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    ) as process:
        try:
            raw, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the process that merges
            raw, _ = process.communicate()
            raw += f"\n==0== ERROR: did not end within {seconds:.0f} s".encode()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    output = raw.decode(errors="replace")
    counted = [(int(executions), int(edges)) for executions, edges in _LINE.findall(output)]
    executions, edges = max(counted, default=(0, 0))
    finding = None
    if process.returncode:
        artifact, reason = _ARTIFACT.search(output), _REASON.search(output)
        text = next(filter(None, reason.groups()), "") if reason else output[-500:]
        finding = (artifact[1] if artifact else "", text)
    return Result(executions, edges, finding, output)
