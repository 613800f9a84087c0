"""Signals that arrive together do not end a process that has inferred."""

import subprocess
import sys

import model_zoo
import slow_models

SCRIPT = """
import ctypes, os, signal, sys
from pathlib import Path
import numpy as np
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model
from ovms_rest.models.signal_stack import _SS_DISABLE, _libc, _Stack

def handle(number, frame):
    handled.append(number)

model = Model("growing", 1, Path(sys.argv[1]), plan_compilation("CPU", {}, cores=2))
model.open(lambda: None)
model.infer({"x": np.zeros((1, 3, 300, 300), np.float32)})
handled, numbers = [], [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, *range(34, 50)]
for number in numbers:
    signal.signal(number, handle)
for _ in range(20):
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
stack = _Stack()
_libc.sigaltstack(None, ctypes.byref(stack))
print(not stack.flags & _SS_DISABLE, sorted(handled) == sorted(20 * numbers), flush=True)
os._exit(0)
"""


def test_process_that_has_inferred_handles_many_signals_together(tmp_path):
    """On CPUs with AMX, a worker died of two signals that arrived together."""
    file = model_zoo.save(slow_models.growing(), tmp_path) / "1" / "model.xml"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
