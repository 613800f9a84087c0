"""Stamps of files: which changes they show, and which files they leave out."""

import os
import time

import formats
import pytest

from ovms_rest.models.watching import stamp


def test_changed_file_has_another_stamp(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("1")
    before = stamp(path)
    path.write_text("12")
    assert stamp(path) != before


def test_files_read_with_a_file_belong_to_its_stamp(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("")
    before = stamp(path)
    (tmp_path / "a.bin").write_text("")
    (tmp_path / "b.bin").write_text("")
    assert len(stamp(path)) == len(before) + 1


def test_modules_and_packages_beside_a_node_belong_to_its_stamp(tmp_path):
    node = tmp_path / "node.py"
    for name in ("node.py", "beside.py", "package/__init__.py", "package/inner/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    for name in ("beside.py", "package/__init__.py", "package/inner/module.py"):
        before = stamp(node)
        (tmp_path / name).write_text("another")
        assert stamp(node) != before
    before = stamp(node)
    (tmp_path / "data").mkdir()
    for name in ("package/__init__.pyc", "data/module.py"):
        (tmp_path / name).write_text("another")
    assert stamp(node) == before


@pytest.mark.parametrize("name", ["missing", "x" * 300, "a\0b", "a/b/c", "x" * 300 + "/a"])
def test_missing_path_has_an_empty_stamp(tmp_path, name):
    assert stamp(tmp_path / name) == ()
    assert stamp(tmp_path / f"{name}.py") == ()


def test_content_of_the_same_size_and_time_has_another_stamp(tmp_path):
    path = tmp_path / "1" / "model.bin"
    path.parent.mkdir()
    path.write_text("old")
    status, before = path.stat(), stamp(tmp_path)
    time.sleep(0.02)  # so that a kernel that counts in ticks gives it another time
    path.write_text("new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (status.st_mtime_ns, status.st_size)
    assert stamp(tmp_path) != before


def test_change_in_a_linked_version_directory_changes_the_stamp(tmp_path):
    (tmp_path / "elsewhere" / "variables").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "1").symlink_to(tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / "variables" / "a"
    file.write_text("1")
    before = stamp(tmp_path / "base")
    file.write_text("12")
    assert stamp(tmp_path / "base") != before


def test_updated_config_map_of_kubernetes_has_another_stamp(tmp_path):
    """Files are links to ..data/NAME, and ..data is a link to a directory, which an update replaces."""
    base = tmp_path / "base"
    for name in ("..old", "..new"):
        (base / name / "1").mkdir(parents=True)
        (base / name / "1" / "a.onnx").write_text("same")
    (base / "..data").symlink_to("..old")
    (base / "1").symlink_to("..data/1")
    before = stamp(base)
    (base / "..data_tmp").symlink_to("..new")
    (base / "..data_tmp").replace(base / "..data")
    assert stamp(base) != before


def test_link_to_a_parent_is_followed_once(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.onnx").write_text("")
    before = stamp(tmp_path)
    (tmp_path / "1" / "up").symlink_to(tmp_path)
    assert stamp(tmp_path) == before
    assert len(before) == 1


def test_walk_of_a_large_linked_tree_is_cut_off(tmp_path):
    for name in range(150):
        for below in range(100):
            (tmp_path / "large" / str(name) / str(below)).mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "link").symlink_to(tmp_path / "large")
    began = time.process_time()
    assert stamp(tmp_path / "base") == ()
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", formats.FORMATS)
def test_all_files_read_with_a_single_file_belong_to_its_stamp(tmp_path, name):
    written = formats.FORMATS[name](tmp_path / "1")
    if written.model.is_dir():
        (written.model / "variables" / "variables.index").write_text("")
    path = written.model / "saved_model.pb" if written.model.is_dir() else written.model
    for file in [file for file in (tmp_path / "1").rglob("*") if file.is_file() and file.name != "fingerprint.pb"]:
        before = stamp(path)
        with file.open("ab") as stream:
            stream.write(b"x")
        assert stamp(path) != before, file
