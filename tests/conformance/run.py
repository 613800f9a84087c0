"""Serve all ONNX backend cases and compare every response with OpenVINO's outputs; see README.md.

PYTHONPATH=tests/helpers python tests/conformance/run.py [--dynamic] [NAME ...]
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from onnx_cases import load_cases
from onnx_conformance import check, compute

SIZE = 100  # models in one service


def main() -> int:
    """Print the outcomes of the cases; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description="Compare responses to the ONNX backend cases with OpenVINO's outputs.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these cases")
    parser.add_argument("--dynamic", action="store_true", help="make every dim of every input dynamic")
    parser.add_argument("--verbose", action="store_true", help="print every case that is not the same")
    options = parser.parse_args()
    cases = [case for case in load_cases() if not options.names or case.name in options.names]
    counts: Counter[str] = Counter()
    for begin in range(0, len(cases), SIZE):
        with tempfile.TemporaryDirectory() as directory:
            computed = list(compute(cases[begin : begin + SIZE], Path(directory), options.dynamic))
            for outcome in check(computed, Path(directory), options.dynamic):
                counts[outcome.kind] += 1
                if outcome.kind == "fault" or (options.verbose and outcome.kind != "same"):
                    print(f"{outcome.kind}: {outcome.case.name}: {'; '.join(outcome.details)}", flush=True)
        print(f"{min(begin + SIZE, len(cases))} of {len(cases)} cases: {dict(counts)}", file=sys.stderr, flush=True)
    for kind, count in counts.most_common():
        print(f"{count:5} {kind}")
    return 1 if counts["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
