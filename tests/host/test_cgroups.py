"""The control groups of a process, from files as Linux writes them."""

import pytest

from ovms_rest.host.cgroups import list_directories, read_file


@pytest.mark.parametrize(
    ("proc", "directories"),
    [
        ("", ["", "cpu"]),
        ("0::/\n", ["", "cpu", ""]),
        ("0::/a/b\n", ["", "cpu", "a/b", "a", ""]),
        ("2:cpu,cpuacct:/a\n1:memory:/b\n", ["", "cpu", "cpu/a", "cpu"]),
    ],
)
def test_directories_are_those_of_the_groups_and_their_parents(tmp_path, proc, directories):
    (tmp_path / "proc").write_text(proc)
    found = list_directories("cpu", tmp_path / "proc", tmp_path / "cgroups")
    assert found == [tmp_path / "cgroups" / name for name in directories]


def test_missing_file_is_empty(tmp_path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert read_file(tmp_path / "cpu.max") == "max 100000\n"
    assert read_file(tmp_path / "missing") == read_file(tmp_path) == ""
