"""The number of usable cores: affinity and quotas of control groups."""

import os

import pytest

from ovms_rest.host.cores import usable_cores

V2 = "0::/\n"
HYBRID = "4:memory:/\n3:cpuset:/\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n"


def v1(group, quota, period="100000"):
    """Return the files of a group of v1."""
    return {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": period}


@pytest.fixture
def sixteen_cores(monkeypatch):
    """Let this process run on 16 cores, whatever the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.fixture
def count(tmp_path, sixteen_cores):
    """Return a function that counts cores, given the content of /proc/self/cgroup and of files in /sys/fs/cgroup."""

    def count(proc, files):
        cgroups = tmp_path / "cgroups"
        cgroups.mkdir()
        for name, content in files.items():
            file = cgroups / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        (tmp_path / "proc").write_text(proc)
        return usable_cores(tmp_path / "proc", cgroups)

    return count


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        *(("400000 100000\n", 4), ("100000 100000\n", 1), ("50000 100000\n", 1), ("1000 1000000\n", 1)),
        *(("150000 100000\n", 2), ("100001 100000\n", 2), ("250000 50000\n", 5)),
        *((text, 16) for text in ("1600000 100000\n", "6400000 100000\n", "max 100000\n", "max\n", "\n", "")),
        *((text, 16) for text in ("0 100000\n", "100000 0\n", "100000\n", "garbage\n")),
    ],
)
def test_quota_of_v2_rounded_up_limits_the_cores(count, cpu_max, cores):
    assert count(V2, {"cpu.max": cpu_max}) == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        *(("400000\n", "100000\n", 4), ("50000\n", "100000\n", 1), ("250000\n", "100000\n", 3)),
        *((quota, "100000\n", 16) for quota in ("6400000\n", "-1\n", "0\n")),
        *(("400000\n", "0\n", 16), ("400000\n", "", 16), ("\n", "\n", 16)),
    ],
)
def test_quota_of_v1_rounded_up_limits_the_cores(count, quota, period, cores):
    assert count("1:cpu:/\n", v1("cpu", quota, period)) == cores


@pytest.mark.parametrize(
    ("own", "parent", "grandparent", "cores"),
    [
        ("300000 100000", "500000 100000", "700000 100000", 3),
        ("500000 100000", "300000 100000", "700000 100000", 3),
        ("500000 100000", "700000 100000", "300000 100000", 3),
        ("max 100000", "max 100000", "300000 100000", 3),
        ("max 100000", "max 100000", "max 100000", 16),
    ],
)
def test_tightest_of_nested_groups_of_v2_counts(count, own, parent, grandparent, cores):
    files = {"pods/pod1/c1/cpu.max": own, "pods/pod1/cpu.max": parent, "pods/cpu.max": grandparent}
    assert count("0::/pods/pod1/c1\n", files) == cores


def test_tightest_of_nested_groups_of_v1_counts(count):
    files = v1("cpu/docker/c1", "500000") | v1("cpu/docker", "300000") | v1("cpu", "-1")
    assert count("2:cpu,cpuacct:/docker/c1\n", files) == 3


def test_group_of_another_process_is_ignored(count):
    assert count("0::/mine\n", {"mine/cpu.max": "500000 100000", "other/cpu.max": "100000 100000"}) == 5


@pytest.mark.parametrize("line", ["3:cpuset:/tight\n", "2:cpuacct:/tight\n", "1:name=systemd:/tight\n"])
def test_group_of_another_controller_is_ignored(count, line):
    assert count(line, v1("cpu/tight", "100000")) == 16


@pytest.mark.parametrize(
    ("proc", "files"),
    [
        ("0::/docker/c1\n", {"cpu.max": "300000 100000"}),
        ("0::/../../docker/c1\n", {"cpu.max": "300000 100000"}),
        ("2:cpu,cpuacct:/docker/c1\n", v1("cpu", "300000")),
    ],
)
def test_group_may_be_mounted_as_the_root_in_a_container(count, proc, files):
    assert count(proc, files) == 3


def test_v1_beside_v2_counts(count):
    assert count(HYBRID, v1("cpu", "300000") | {"cpu.max": "500000 100000"}) == 3


@pytest.mark.parametrize("proc", ["", V2, HYBRID, "0::/gone/group\n", "0::/with:colon\n"])
def test_without_quota_files_the_affinity_counts(count, proc):
    assert count(proc, {}) == 16


def test_group_with_a_colon_in_its_name_counts(count):
    assert count("0::/with:colon\n", {"with:colon/cpu.max": "300000 100000"}) == 3


def test_without_control_groups_the_affinity_counts(tmp_path, sixteen_cores):
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 16


def test_affinity_of_the_process_counts(tmp_path):
    """The kernel, not a fixture, sets the affinity."""
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(affinity)})
        assert usable_cores(tmp_path, tmp_path) == 1
    finally:
        os.sched_setaffinity(0, affinity)
    assert usable_cores(tmp_path, tmp_path) == len(affinity)


def test_this_machine_has_usable_cores():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
