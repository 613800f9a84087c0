"""How many cores the service may use."""

import math
import os
from pathlib import Path

from ovms_rest.host.cgroups import CGROUPS, PROC, list_directories, read_file


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Count the cores of the process's affinity, or fewer when a cgroup has a CPU quota (rounded up); at least 1.

    Quotas of control groups v2 (cpu.max) and v1 (cpu.cfs_quota_us) count, those of parent groups too.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for directory in list_directories("cpu", proc, cgroups) if (quota := _read_quota(directory))]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def _read_quota(directory: Path) -> float | None:
    """Read how many cores' time a cgroup may use; None for no limit."""
    quota, _, period = read_file(directory / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (
            read_file(directory / "cpu.cfs_quota_us").strip(),
            read_file(directory / "cpu.cfs_period_us").strip(),
        )
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
