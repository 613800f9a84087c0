"""A model's directory on disk: its versions, and the file that is the model."""

import pytest

from ovms_rest.errors import LoadError
from ovms_rest.models.repository import find_model_file, find_versions, parse_version

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "version"), [("1", 1), ("9", 9), ("10", 10), ("20250131", 20250131), (str(LARGEST), LARGEST)]
)
def test_a_version_is_digits_without_leading_zeros(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "00", "01", "007", "-1", "+1", "1.0", "1e3", "0x1", "1_0", " 1", "1 ", "1\n", "a", "1a", "v1"),
        *("٣", "²", "1,2"),
        str(LARGEST + 1),
        "9" * 19,
        "1" + "0" * 19,
        "9" * 5000,
    ],
)
def test_everything_else_is_no_version(text):
    assert parse_version(text) is None


# --- find_versions


def make_directories(parent, *names):
    for name in names:
        (parent / name).mkdir()


def make_files(parent, *names):
    for name in names:
        (parent / name).touch()


def test_versions_are_found_lowest_first(tmp_path):
    make_directories(tmp_path, "10", "9", "2", str(LARGEST))
    found = find_versions(tmp_path)
    assert list(found.items()) == [(version, tmp_path / str(version)) for version in (2, 9, 10, LARGEST)]


def test_directories_of_other_names_are_no_versions(tmp_path):
    make_directories(tmp_path, "1", "0", "02", "-3", "v4", "4.5", "latest", ".6", str(LARGEST + 1), "٣")
    assert find_versions(tmp_path) == {1: tmp_path / "1"}


def test_a_file_is_no_version(tmp_path):
    make_directories(tmp_path, "1")
    make_files(tmp_path, "2", "README.md")
    assert find_versions(tmp_path) == {1: tmp_path / "1"}


def test_a_link_to_a_directory_is_a_version(tmp_path):
    make_directories(tmp_path, "store")
    (tmp_path / "3").symlink_to(tmp_path / "store")
    assert find_versions(tmp_path) == {3: tmp_path / "3"}


def test_a_link_to_nothing_is_no_version(tmp_path):
    make_directories(tmp_path, "1")
    (tmp_path / "2").symlink_to(tmp_path / "none")
    assert find_versions(tmp_path) == {1: tmp_path / "1"}


@pytest.mark.parametrize("names", [(), ("0",), ("latest", "01")])
def test_a_model_directory_without_versions_is_told(tmp_path, names):
    make_directories(tmp_path, *names)
    with pytest.raises(LoadError) as caught:
        find_versions(tmp_path)
    assert str(caught.value) == (
        f"no version in {tmp_path}: expected a directory per version with a name from 1 on, such as {tmp_path}/1"
    )


def test_a_missing_model_directory_is_told(tmp_path):
    with pytest.raises(LoadError) as caught:
        find_versions(tmp_path / "none")
    assert str(caught.value) == f"cannot read the model directory {tmp_path}/none: No such file or directory"


def test_a_model_directory_that_is_a_file_is_told(tmp_path):
    make_files(tmp_path, "model.xml")
    with pytest.raises(LoadError) as caught:
        find_versions(tmp_path / "model.xml")
    assert str(caught.value) == f"cannot read the model directory {tmp_path}/model.xml: Not a directory"


@pytest.mark.parametrize(
    ("files", "model"),
    [
        (("model.xml", "model.bin"), "model.xml"),
        (("saved.xml", "saved.bin"), "saved.xml"),
        (("model.onnx",), "model.onnx"),
        (("a.onnx", "z.xml", "z.bin"), "z.xml"),
        (("a.onnx", "z.xml"), "a.onnx"),
        (("a.onnx", "z.bin"), "a.onnx"),
        (("b.xml", "b.bin", "a.xml", "a.bin"), "a.xml"),
        (("b.onnx", "a.onnx"), "a.onnx"),
        (("model.xml", "model.bin", "labels.txt", "model.mapping", "README"), "model.xml"),
    ],
)
def test_ir_goes_before_onnx_and_names_in_their_order(tmp_path, files, model):
    make_files(tmp_path, *files)
    assert find_model_file(tmp_path) == tmp_path / model


def test_ir_is_a_xml_with_the_bin_of_its_name(tmp_path):
    """OpenVINO reads the weights of a.xml from a.bin, so that a.xml alone is no model."""
    make_files(tmp_path, "a.xml", "b.xml", "b.bin")
    assert find_model_file(tmp_path) == tmp_path / "b.xml"


def test_a_directory_is_no_model_file(tmp_path):
    make_directories(tmp_path, "a.onnx")
    make_files(tmp_path, "b.onnx")
    assert find_model_file(tmp_path) == tmp_path / "b.onnx"


def test_a_link_to_a_file_is_a_model_file(tmp_path):
    make_files(tmp_path, "blob")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "blob")
    assert find_model_file(tmp_path) == tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ((), "expected a .xml with its .bin, or a .onnx"),
        (("model.bin",), "expected a .xml with its .bin, or a .onnx"),
        (("model.pb", "model.txt"), "expected a .xml with its .bin, or a .onnx"),
        (("model.xml",), "model.xml has no .bin beside it"),
        (("b.xml", "a.xml"), "a.xml has no .bin beside it"),
    ],
)
def test_a_version_directory_without_a_model_is_told(tmp_path, files, missing):
    make_files(tmp_path, *files)
    with pytest.raises(LoadError) as caught:
        find_model_file(tmp_path)
    assert str(caught.value) == f"no model in {tmp_path}: {missing}"


def test_a_missing_version_directory_is_told(tmp_path):
    with pytest.raises(LoadError) as caught:
        find_model_file(tmp_path / "1")
    assert str(caught.value) == f"cannot read the version directory {tmp_path}/1: No such file or directory"
