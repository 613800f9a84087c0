"""How much memory a process has."""

import os
from pathlib import Path


def resident_bytes(pid: int | str = "self") -> int:
    """Return the bytes of memory that a process has resident (proc(5)). Raises OSError when the process is gone."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
