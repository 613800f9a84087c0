"""The memory that the service may use, and how much of it is left."""

import re
from pathlib import Path
from typing import NamedTuple

from ovms_rest.host.cgroups import CGROUPS, PROC, list_directories, read_file

MEMINFO = Path("/proc/meminfo")


class HostMemory(NamedTuple):
    """The memory that the service may use, and the part that is left, in bytes."""

    limit_bytes: int
    available_bytes: int


def read_host_memory(proc: Path = PROC, cgroups: Path = CGROUPS, meminfo: Path = MEMINFO) -> HostMemory:
    """Return the memory of the host or of the tightest control group, v1 or v2, parents included.

    Swap does not count. Page cache that the kernel would drop counts as left: MemAvailable of the host; in a group,
    `inactive_file`, as Kubernetes computes its working set.
    """
    host = read_file(meminfo)
    limits, left = [_find(r"MemTotal:\s+", host) * 1024], [_find(r"MemAvailable:\s+", host) * 1024]
    for directory in list_directories("memory", proc, cgroups):
        limit = _read_number(directory / "memory.max") or _read_number(directory / "memory.limit_in_bytes")
        if limit is None or limit >= limits[0]:  # v1 writes a number of 19 digits for no limit
            continue
        used = _read_number(directory / "memory.current") or _read_number(directory / "memory.usage_in_bytes") or 0
        # In v1, inactive_file leaves out child groups; in v2 it includes them.
        stat = read_file(directory / "memory.stat")
        droppable = _find("^total_inactive_file ", stat) or _find("^inactive_file ", stat)
        limits.append(limit)
        left.append(max(0, limit - used + droppable))
    return HostMemory(min(limits), min(left))


def _find(label: str, text: str) -> int:
    found = re.search(label + r"(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _read_number(file: Path) -> int | None:
    text = read_file(file).strip()
    return int(text) if text.isdigit() else None
