"""Inject every fault into a service under load for its share of the time, and print the table.

    PYTHONPATH=tests/helpers python tests/faults/run.py [--seconds 3600] [--only NAME ...]

Exits with 1 if a request failed that the fault does not excuse, or an answer was wrong.
"""

import argparse
import itertools
import random
import signal
import sys
import tempfile
from operator import attrgetter
from pathlib import Path

from fault_table import FAULTS, HEAD, inject
from faulty_host import missing, running


def main() -> int:
    """Run the faults, those of one kind of host together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all faults together")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    faults = [fault for fault in FAULTS if fault.name in chosen.only]
    print(HEAD, flush=True)
    found: list[str] = []
    for setup, group in itertools.groupby(faults, attrgetter("setup")):
        if reason := missing() or setup.missing():
            print(f"skipped {', '.join(fault.name for fault in group)}: {reason}")
            continue
        with tempfile.TemporaryDirectory() as directory, running(Path(directory), setup) as host:
            for fault in group:
                row = inject(host, fault, random.Random(fault.name), chosen.seconds / len(faults))
                print(row, flush=True)
                for text in (*row.tally.failures[:10], *row.tally.wrong[:10]):
                    print(f"  {text}", file=sys.stderr, flush=True)
                found += row.faults()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
