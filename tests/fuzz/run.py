"""Fuzz all targets in turn, or those named; see README.md.

python tests/fuzz/run.py --seconds 3600 [TARGET ...]
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from fuzz_campaign import CORPUS, HERE, Result, fuzz, names, pack, unpack

FINDINGS = HERE / "findings"
# A run of a target ends at a finding; the target goes on with the next run. They are short because atheris leaks the
# arrays of NumPy that instrumented code compares: `images` grows by up to 20 MB a second.
_RUN_SECONDS = 30
_GRACE_SECONDS = 120
_ROW = "{:<15}{:>12}{:>8}{:>8}{:>10}  {}"


def main() -> int:
    """Print a row for each target; return 1 if there is a finding."""
    parser = argparse.ArgumentParser(description="Fuzz everything that reads bytes from outside.")
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=f"only these: {', '.join(names())}")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (600)")
    parser.add_argument("--blind", action="store_true", help="without corpus, seeds, dictionary and mutator")
    parser.add_argument("--merge", action="store_true", help="then reduce the corpora and write them to corpus/")
    options = parser.parse_args()
    chosen = options.targets or names()
    if unknown := set(chosen) - set(names()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    print(_ROW.format("target", "executions", "exec/s", "edges", "findings", "first finding"), flush=True)
    found = 0
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            corpus = Path(directory) / "corpus"
            corpus.mkdir()
            if not options.blind:
                unpack(name, corpus)
            found += _fuzz_for(name, corpus, options.seconds / len(chosen), options.blind)
            if options.merge:
                _merge(name, corpus, Path(directory) / "merged")
    if found:
        print(f"reproduce one with: python tests/fuzz/fuzz.py TARGET {FINDINGS.relative_to(HERE.parents[1])}/FILE")
    return 1 if found else 0


def _fuzz_for(name: str, corpus: Path, seconds: float, blind: bool) -> int:
    """Fuzz a target for a time, print its row, and return the number of findings."""
    begun, results = time.monotonic(), []
    while (left := seconds - (time.monotonic() - begun)) > 0 and len(results) < 100:
        limit = max(1, int(min(left, _RUN_SECONDS)))
        results.append(_run(name, corpus, limit, ["--blind" if blind else "--seeds"]))
    elapsed = time.monotonic() - begun
    executions = sum(result.executions for result in results)
    # The same fault may be found in every run.
    findings = dict(reversed([result.finding[::-1] for result in results if result.finding is not None]))
    first = " in ".join(next(iter(findings.items()), ()))
    edges = max(result.edges for result in results)
    print(_ROW.format(name, executions, round(executions / elapsed), edges, len(findings), first[:300]), flush=True)
    return len(findings)


def _run(name: str, corpus: Path, limit: int, options: list[str]) -> Result:
    seed = time.time_ns() % 2**31 or 1
    arguments = (*options, f"-seed={seed}", f"-max_total_time={limit}", corpus)
    return fuzz(name, *arguments, findings=FINDINGS, seconds=limit + _GRACE_SECONDS)


def _merge(name: str, corpus: Path, merged: Path) -> None:
    """Keep only the inputs that reach something new, the smallest first."""
    merged.mkdir()
    result = fuzz(name, "-merge=1", merged, corpus, findings=FINDINGS, seconds=3600)
    if "MERGE-OUTER" not in result.output or not any(merged.iterdir()):
        print(f"{name}: the corpus could not be merged:\n{result.output[-1000:]}", file=sys.stderr)
        return
    pack(name, merged)
    shutil.rmtree(merged)
    print(f"{'':<15}corpus: {(CORPUS / f'{name}.zip').stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
