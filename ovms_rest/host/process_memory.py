"""How much memory a process has."""

import os
import re
from pathlib import Path

_PRIVATE = re.compile(r"^Private_Dirty: +(\d+) kB$", re.MULTILINE)
_PAGE = os.sysconf("SC_PAGESIZE")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the bytes of memory that a process has resident (proc(5)). Raises OSError when the process is gone."""
    return _read_statm(pid)[1] * _PAGE


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the resident bytes of a process that no file has, those that it shares with its parent included.

    Raises OSError when the process is gone.
    """
    _, resident, shared, *_ = _read_statm(pid)
    return (resident - shared) * _PAGE


def own_bytes(pid: int | str = "self") -> int:
    """Return the bytes that a process has written and shares with no other; what it inherited by fork is shared.

    The kernel walks through all pages for it, which takes some milliseconds for a gigabyte. Raises OSError when the
    process is gone or another user's.
    """
    found = _PRIVATE.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    if found is None:
        raise OSError(f"/proc/{pid}/smaps_rollup has no line Private_Dirty")
    return int(found[1]) * 1024


def _read_statm(pid: int | str) -> list[int]:
    return [int(pages) for pages in Path(f"/proc/{pid}/statm").read_text().split()]
