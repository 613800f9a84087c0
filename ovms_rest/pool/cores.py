"""How many cores the service may use."""

import math
import os
from pathlib import Path


def usable_cores(proc: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the cores of the process's affinity, or fewer when a cgroup has a CPU quota (rounded up); at least 1.

    Quotas of control groups v2 (cpu.max) and v1 (cpu.cfs_quota_us) count, those of parent groups too.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for directory in _cgroup_directories(proc, cgroups) if (quota := _read_quota(directory))]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def _cgroup_directories(proc: Path, cgroups: Path) -> list[Path]:
    """List the directories of the process's cgroups that may hold a CPU quota, each with its parents."""
    directories = [cgroups, cgroups / "cpu"]  # in a container the group may be mounted as the root itself
    for line in _read(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif "cpu" in controllers.split(","):
            root = cgroups / "cpu"
        else:
            continue
        group = root / path.lstrip("/")
        directories += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return directories


def _read_quota(directory: Path) -> float | None:
    """Read how many cores' time a cgroup may use; None for no limit."""
    quota, _, period = _read(directory / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read(directory / "cpu.cfs_quota_us").strip(), _read(directory / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no such controller here
        return ""
