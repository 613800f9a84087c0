"""The number of cores that the service may use."""

import math
import os
from pathlib import Path

from ovms_rest.host.cgroups import CGROUPS, PROC, list_directories, read_file


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the number of cores in the process's affinity, or fewer under a CPU quota (rounded up); at least 1.

    Quotas of control groups v2 (cpu.max) and v1 (cpu.cfs_quota_us) count, including those of parent groups.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for directory in list_directories("cpu", proc, cgroups) if (quota := _read_quota(directory))]
    return max(1, min([cores, *map(math.ceil, quotas)]))


def _read_quota(directory: Path) -> float | None:
    """Return the cores' worth of time that a control group may use; None for no limit."""
    quota, _, period = read_file(directory / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (read_file(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
