"""The memory of a process."""

import os
import re
from pathlib import Path

_PRIVATE = re.compile(r"^Private_Dirty: +(\d+) kB$", re.MULTILINE)
_PAGE = os.sysconf("SC_PAGESIZE")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident bytes of a process (proc(5)). Raises OSError when the process has ended."""
    return _read_statm(pid)[1] * _PAGE


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the resident bytes of a process without those of files, but with those shared with its parent.

    Raises OSError when the process has ended.
    """
    _, resident, shared, *_ = _read_statm(pid)
    return (resident - shared) * _PAGE


def own_bytes(pid: int | str = "self") -> int:
    """Return the bytes that a process has written and shares with no other process; forks share inherited pages.

    The kernel walks through all pages, which takes some milliseconds per gigabyte. Raises OSError when the process has
    ended or belongs to another user.
    """
    found = _PRIVATE.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    if found is None:
        raise OSError(f"/proc/{pid}/smaps_rollup has no line Private_Dirty")
    return int(found[1]) * 1024


def _read_statm(pid: int | str) -> list[int]:
    return [int(pages) for pages in Path(f"/proc/{pid}/statm").read_text().split()]
