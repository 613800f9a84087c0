"""The cost of code in a process of its own, because the peak memory of this process is that of all tests."""

import os
import subprocess
import sys
from typing import NamedTuple

_PROGRAM = """
import re, sys, time
{preparation}
def _memory(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1]) / 1024
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
_before, _begun = _memory("VmRSS"), time.process_time()
try:
    {code}
    _error = ""
except Exception as error:
    _error = f"{{type(error).__name__}}: {{error}}"
print(time.process_time() - _begun, _memory("VmHWM") - _before, _error)
"""


class Cost(NamedTuple):
    """Seconds of a core, the most MiB that were resident in addition to those before, and the error raised."""

    seconds: float
    mebibytes: float
    error: str


def measure_cost(preparation: str, code: str) -> Cost:
    """Run one line of code after its preparation; both can import the tests' modules."""
    program = [sys.executable, "-c", _PROGRAM.format(preparation=preparation, code=code)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(program, env=environ, capture_output=True, check=True, text=True).stdout
    seconds, mebibytes, error = output.strip("\n").split(" ", 2)
    return Cost(float(seconds), float(mebibytes), error)
