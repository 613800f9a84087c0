"""The memory that the service may use and has left: of the host, and of control groups of both versions."""

import os

import pytest

from ovms_rest.host.host_memory import read_host_memory

GIB = 2**30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable:   {10 * GIB // 1024} kB\n"
V2 = "0::/system.slice/ovms_rest.service\n"
V1 = "4:memory:/docker/1\n1:name=systemd:/\n0::/\n"
NO_LIMIT = str(2**63 - 4096)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the memory in GiB, given /proc/self/cgroup and files in /sys/fs/cgroup."""

    def read(proc, files):
        cgroups = tmp_path / "cgroups"
        for name, content in files.items():
            file = cgroups / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        (tmp_path / "proc").write_text(proc)
        (tmp_path / "meminfo").write_text(MEMINFO)
        limit, available = read_host_memory(tmp_path / "proc", cgroups, tmp_path / "meminfo")
        return limit / GIB, available / GIB

    return read


def group(directory, limit, used, droppable=0):
    """Return the files of a group of v2."""
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{used}\n",
        f"{directory}/memory.stat": f"anon 1\ninactive_file {droppable}\nactive_file 77\n",
    }


FULL_GROUP_OF_V1 = {
    "memory/docker/1/memory.limit_in_bytes": str(2 * GIB),
    "memory/docker/1/memory.usage_in_bytes": str(2 * GIB),
    "memory/docker/1/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
}
SERVICE = "system.slice/ovms_rest.service"


@pytest.mark.parametrize(
    ("proc", "files", "memory"),
    [
        ("", {}, (16, 10)),
        (V2, {}, (16, 10)),
        (V2, group(SERVICE, "max", 5 * GIB), (16, 10)),
        (V2, group(SERVICE, 8 * GIB, 5 * GIB), (8, 3)),
        (V2, group(SERVICE, 8 * GIB, 5 * GIB, 2 * GIB), (8, 5)),
        (V2, group(SERVICE, 15 * GIB, 1 * GIB), (15, 10)),
        (V2, group("system.slice", 6 * GIB, 5 * GIB) | group(SERVICE, 8 * GIB, 1 * GIB), (6, 1)),
        (V2, group(".", 4 * GIB, 5 * GIB), (4, 0)),  # over its limit for a moment
        (V2, group(SERVICE, 64 * GIB, 5 * GIB), (16, 10)),
        (V2, group(SERVICE, "", "") | {f"{SERVICE}/memory.current": "garbage"}, (16, 10)),
        (V1, {"memory/docker/1/memory.limit_in_bytes": NO_LIMIT}, (16, 10)),
        (V1, FULL_GROUP_OF_V1, (2, 1)),
    ],
)
def test_tightest_of_host_and_groups_counts(read, proc, files, memory):
    assert read(proc, files) == memory


def test_this_host_has_memory():
    limit, available = read_host_memory()
    assert 0 < available < limit <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
