"""The memory of processes."""

import mmap
import os
import subprocess
import sys

import pytest

from ovms_rest.host.process_memory import anonymous_bytes, own_bytes, resident_bytes


def test_written_memory_is_resident():
    size = 64 * 2**20
    before = resident_bytes()
    with mmap.mmap(-1, size) as memory:
        reserved = resident_bytes()
        memory.write(b"x" * size)
        # The bytes object that is written is as large, and freed by now.
        assert size * 0.9 < resident_bytes() - before < size * 1.5
    assert reserved - before < size * 0.1


def test_memory_of_another_process_is_read_by_its_id():
    assert resident_bytes(os.getpid()) == pytest.approx(resident_bytes(), rel=0.1)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert 0 < resident_bytes(other.pid) < resident_bytes()
        finally:
            other.kill()


INHERITING = """
import os, sys
from ovms_rest.host.process_memory import anonymous_bytes, own_bytes
size = 64 * 2**20
memory = bytearray(b"x") * size
if not os.fork():
    before = own_bytes(), anonymous_bytes()
    memory[: size // 2] = b"y" * (size // 2)
    print(*before, own_bytes())
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""


def test_inherited_memory_becomes_private_once_written():
    output = subprocess.run([sys.executable, "-c", INHERITING], capture_output=True, text=True, check=True).stdout
    before, anonymous, after = map(int, output.split())
    size = 64 * 2**20
    assert before < size * 0.1
    assert anonymous > size
    assert size * 0.4 < after - before < size * 0.6


@pytest.mark.parametrize(
    ("function", "file"), [(resident_bytes, "statm"), (own_bytes, "smaps_rollup"), (anonymous_bytes, "statm")]
)
def test_ended_process_has_no_memory(function, file):
    with subprocess.Popen(["true"]) as gone:
        pass
    with pytest.raises(FileNotFoundError, match=f"/proc/{gone.pid}/{file}"):
        function(gone.pid)
