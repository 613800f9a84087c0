"""What is noted of the disk, and what of it is left out."""

import pytest

from ovms_rest.models.watching import stamp


def test_a_file_that_changes_has_another_stamp(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("1")
    before = stamp(path)
    path.write_text("12")
    assert stamp(path) != before


def test_what_lies_beside_a_file_belongs_to_it(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("")
    before = stamp(path)
    (tmp_path / "a.bin").write_text("")
    (tmp_path / "b.bin").write_text("")
    assert len(stamp(path)) == len(before) + 1


@pytest.mark.parametrize("name", ["missing", "x" * 300, "a\0b", "a/b/c", "x" * 300 + "/a"])
def test_a_path_with_nothing_there_has_an_empty_stamp(tmp_path, name):
    assert stamp(tmp_path / name) == ()
    assert stamp(tmp_path / f"{name}.py") == ()
