"""A model on disk: its versions, the version policy, the model's file, and the names of its tensors."""

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

import formats
import pytest

from ovms_rest.errors import LoadError
from ovms_rest.models.repository import (
    LATEST,
    NameMapping,
    VersionPolicy,
    check_model_file,
    find_external_data,
    find_model_file,
    find_versions,
    find_weights,
    list_model_files,
    parse_version,
    read_mapping,
)


def make_dangling_link(path):
    path.symlink_to("none")


def make_loop(path):
    path.symlink_to(path.name)


LARGEST = 2**63 - 1
EXPECTED = "a .xml with its .bin, a .onnx, a .pdmodel with its .pdiparams, a .pb, or a .tflite"
OF_SAVED_MODEL = ("variables", "assets", "assets.extra")


@pytest.mark.parametrize(
    ("text", "version"), [("1", 1), ("9", 9), ("10", 10), ("20250131", 20250131), (str(LARGEST), LARGEST)]
)
def test_version_is_digits_without_leading_zeros(text, version):
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
def test_other_texts_are_not_versions(text):
    assert parse_version(text) is None


# --- VersionPolicy


@pytest.mark.parametrize(
    ("policy", "existing", "wanted"),
    [
        (VersionPolicy(), [2, 10, 1], [10, 2, 1]),
        (VersionPolicy(), [], []),
        (LATEST, [2, 10, 1], [10]),
        (LATEST, [], []),
        (VersionPolicy(latest=2), [2, 10, 1], [10, 2]),
        (VersionPolicy(latest=5), [2, 10, 1], [10, 2, 1]),
        (VersionPolicy(specific=frozenset({1, 10})), [2, 10, 1], [10, 1]),
        (VersionPolicy(specific=frozenset({1, 3})), [2, 10, 1], [1]),
        (VersionPolicy(specific=frozenset({3})), [2, 10, 1], []),
        (VersionPolicy(specific=frozenset()), [2, 10, 1], []),
        (VersionPolicy(specific=frozenset({LARGEST})), [LARGEST, LARGEST - 1], [LARGEST]),
    ],
)
def test_policy_selects_existing_versions_highest_first(policy, existing, wanted):
    assert policy.choose(iter(existing)) == wanted


def test_policy_selects_from_the_found_versions(tmp_path):
    make_directories(tmp_path, "1", "2", "10")
    assert LATEST.choose(find_versions(tmp_path)) == [10]


# --- find_versions


def make_directories(parent, *names):
    for name in names:
        (parent / name).mkdir()


def make_files(parent, *names):
    for name in names:
        (parent / name).write_bytes(b"content")


def refusal(function, path):
    with pytest.raises(LoadError) as caught:
        function(path)
    return str(caught.value)


def warnings(caplog):
    assert {record.name for record in caplog.records} <= {"gunicorn.error.ovms_rest"}
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def test_versions_are_found_lowest_first(tmp_path):
    make_directories(tmp_path, "10", "9", "2", str(LARGEST))
    found = find_versions(tmp_path)
    assert list(found.items()) == [(version, tmp_path / str(version)) for version in (2, 9, 10, LARGEST)]


def test_directories_with_other_names_are_not_versions(tmp_path):
    make_directories(tmp_path, "1", "0", "02", "-3", "v4", "4.5", "latest", ".6", str(LARGEST + 1), "٣")
    assert find_versions(tmp_path) == {1: tmp_path / "1"}


def test_directories_with_other_names_are_listed_in_one_warning(tmp_path, caplog):
    make_directories(tmp_path, "1", "0", "02", "new\nline", "latest")
    find_versions(tmp_path)
    assert warnings(caplog) == [
        f"ignored in {tmp_path}: '0', '02', 'latest', 'new\\nline'; "
        "a version is a directory named by a number from 1 without leading zeros"
    ]


def test_warning_lists_ten_directories(tmp_path, caplog):
    make_directories(tmp_path, "1", *(f"v{letter}" for letter in "abcdefghijk"))
    find_versions(tmp_path)
    (warning,) = warnings(caplog)
    assert "'va', " in warning
    assert "'vj', ...;" in warning
    assert "vk" not in warning


@pytest.mark.parametrize(
    ("directories", "files", "ignored"),
    [
        *(((name,), (), "") for name in (".git", ".snapshot", "lost+found", "@eaDir", *OF_SAVED_MODEL)),
        ((), ("README.md", "model.onnx"), ""),
        ((), ("2",), "'2'"),
    ],
)
def test_only_what_may_be_a_misnamed_version_causes_a_warning(tmp_path, caplog, directories, files, ignored):
    make_directories(tmp_path, "1", *directories)
    make_files(tmp_path, *files)
    assert find_versions(tmp_path) == {1: tmp_path / "1"}
    assert [line.partition(";")[0] for line in warnings(caplog)] == [f"ignored in {tmp_path}: {ignored}"] * bool(
        ignored
    )


def test_link_to_a_directory_is_a_version(tmp_path):
    make_directories(tmp_path, "store")
    (tmp_path / "3").symlink_to(tmp_path / "store")
    assert find_versions(tmp_path) == {3: tmp_path / "3"}


@pytest.mark.parametrize("target", ["none", "2", "a" * 300])
def test_broken_link_is_not_a_version_and_causes_a_warning(tmp_path, caplog, target):
    make_directories(tmp_path, "1")
    (tmp_path / "2").symlink_to(target)
    assert find_versions(tmp_path) == {1: tmp_path / "1"}
    assert warnings(caplog)[0].startswith(f"ignored in {tmp_path}: '2';")


@pytest.mark.parametrize(
    "files",
    [
        *("model.xml model.bin", "model.xml", "model.onnx", "model.pdmodel model.pdiparams", "frozen.pb"),
        *("saved_model.pb", "model.tflite", "mapping_config.json labels.txt model.onnx"),
    ],
)
def test_directory_with_a_model_in_it_is_version_1(tmp_path, files):
    make_files(tmp_path, *files.split())
    assert find_versions(tmp_path) == {1: tmp_path}


def test_flat_model_that_lacks_a_file_is_version_1_too(tmp_path):
    """The reason given later then names the file."""
    make_files(tmp_path, "model.pdmodel")
    (version,) = find_versions(tmp_path).values()
    assert refusal(find_model_file, version) == (f"no model in {tmp_path}: 'model.pdmodel' needs 'model.pdiparams'")


def test_versions_have_precedence_over_a_model_beside_them(tmp_path):
    make_files(tmp_path, "model.onnx")
    make_directories(tmp_path, "3")
    assert find_versions(tmp_path) == {3: tmp_path / "3"}


@pytest.mark.parametrize("suffix", ["xml", "onnx", "pdmodel", "pdiparams", "pb", "tflite"])
def test_model_file_is_version_1(tmp_path, suffix):
    make_files(tmp_path, f"model.{suffix}")
    assert find_versions(tmp_path / f"model.{suffix}") == {1: tmp_path / f"model.{suffix}"}


@pytest.mark.parametrize("name", ["model.bin", "model.json", "model", "onnx", "model.ONNX", "1"])
def test_other_file_is_not_a_model(tmp_path, name):
    make_files(tmp_path, name)
    assert refusal(find_versions, tmp_path / name) == (
        f"{tmp_path}/{name} is not a model: expected a directory with a directory per version, such as {tmp_path}/1, "
        "or a file that ends in .xml, .onnx, .pdmodel, .pdiparams, .pb, .tflite"
    )


@pytest.mark.parametrize(
    ("directories", "files", "message"),
    [
        ((), (), "it is empty"),
        ((".git",), (".model.onnx",), "it is empty"),
        (("0",), (), "it has '0'"),
        (("latest", "01"), ("README.md", "2"), "it has '01', '2', 'README.md', 'latest'"),
        (("model.onnx",), (), "it has 'model.onnx'"),
        ((), ("model.bin", "config.json"), "it has 'config.json', 'model.bin'"),
        ((), ("fingerprint.pb",), "it has 'fingerprint.pb'"),
        (tuple("abcdefghijk"), (), "it has 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', ..."),
    ],
)
def test_model_directory_without_versions_is_refused(tmp_path, caplog, directories, files, message):
    make_directories(tmp_path, *directories)
    make_files(tmp_path, *files)
    assert refusal(find_versions, tmp_path) == (
        f"no version in {tmp_path}: expected a directory per version, named by a number from 1 without leading "
        f"zeros, such as {tmp_path}/1 with {EXPECTED}; {message}"
    )
    assert warnings(caplog) == []


# --- find_model_file


@pytest.mark.parametrize(
    ("files", "model"),
    [
        # A model may have any name.
        ("model.xml model.bin", "model.xml"),
        ("saved.xml saved.bin", "saved.xml"),
        ("model.onnx", "model.onnx"),
        ("a.b.onnx", "a.b.onnx"),
        ("inference.pdmodel inference.pdiparams", "inference.pdmodel"),
        ("frozen.pb", "frozen.pb"),
        ("model.tflite", "model.tflite"),
        ("model.xml model.bin labels.txt model.mapping README", "model.xml"),
        ("relu.onnx relu.weights relu.onnx.data", "relu.onnx"),
        # Complete models have precedence, in the order of OVMS.
        ("a.tflite b.pb c.pdmodel c.pdiparams d.onnx e.xml e.bin", "e.xml"),
        ("a.tflite b.pb c.pdmodel c.pdiparams d.onnx", "d.onnx"),
        ("a.tflite b.pb c.pdmodel c.pdiparams", "c.pdmodel"),
        ("a.tflite b.pb", "b.pb"),
        ("a.onnx z.xml", "a.onnx"),
        ("a.xml z.tflite", "z.tflite"),
        ("a.onnx z.bin", "a.onnx"),
        ("a.pdmodel z.tflite", "z.tflite"),
        ("a.xml b.bin z.onnx", "a.xml"),
        ("a.xml b.bin b.xml z.onnx", "b.xml"),
        # OpenVINO reads the weights of a.xml only from a.bin.
        ("a.xml b.xml b.bin", "b.xml"),
    ],
)
def test_model_of_a_version_is_the_complete_one_of_the_first_format(tmp_path, files, model):
    make_files(tmp_path, *files.split())
    assert find_model_file(tmp_path) == tmp_path / model


@pytest.mark.parametrize("given", ["", "a.xml"])
def test_xml_without_its_bin_is_read_with_the_first_bin_without_a_xml(tmp_path, caplog, given):
    make_files(tmp_path, "a.xml", "w.bin", "v.bin")
    assert find_model_file(tmp_path / given) == tmp_path / "a.xml"
    assert warnings(caplog) == [f"{tmp_path}/a.xml has no .bin of its name: using 'v.bin'"]


@pytest.mark.parametrize(
    ("files", "file", "weights"),
    [
        ("a.xml w.bin v.bin", "a.xml", "v.bin"),
        ("a.xml a.bin 0.bin", "a.xml", None),
        ("a.xml b.xml b.bin", "a.xml", None),
        ("a.xml b.xml b.bin c.bin", "a.xml", "c.bin"),
        ("a.xml", "a.xml", None),
        ("a.xml .v.bin", "a.xml", None),
        ("a.onnx w.bin", "a.onnx", None),
    ],
)
def test_weights_are_returned_where_openvino_does_not_find_them(tmp_path, files, file, weights):
    make_files(tmp_path, *files.split())
    assert find_weights(tmp_path / file) == (weights and tmp_path / weights)


def test_xml_alone_is_a_model_without_weights_and_causes_a_warning(tmp_path, caplog):
    make_files(tmp_path, "model.xml")
    assert find_model_file(tmp_path) == tmp_path / "model.xml"
    assert warnings(caplog) == [f"{tmp_path}/model.xml has no .bin: reading it without weights"]


@pytest.mark.parametrize(
    ("files", "model", "used", "others"),
    [
        ("b.xml b.bin a.xml a.bin", "a.xml", "a.xml", "'b.xml'"),
        ("b.onnx c.onnx a.onnx", "a.onnx", "a.onnx", "'b.onnx', 'c.onnx'"),
        ("b.pdmodel b.pdiparams a.pdmodel a.pdiparams", "a.pdmodel", "a.pdmodel", "'b.pdmodel'"),
        ("b.pb a.pb", "a.pb", "a.pb", "'b.pb'"),
        ("b.tflite a.tflite", "a.tflite", "a.tflite", "'b.tflite'"),
        ("saved_model.pb frozen.pb", "", "saved_model.pb", "'frozen.pb'"),
    ],
)
def test_first_of_several_models_is_used_and_the_others_are_logged(tmp_path, caplog, files, model, used, others):
    make_files(tmp_path, *files.split())
    assert find_model_file(tmp_path) == tmp_path / model
    assert warnings(caplog) == [f"several models in {tmp_path}: using {used!r}, ignoring {others}"]


@pytest.mark.parametrize(
    ("files", "model"),
    [
        (".a.onnx b.onnx", "b.onnx"),  # the first is hidden
        ("._b.onnx b.onnx", "b.onnx"),
        ("saved_model.pb fingerprint.pb keras_metadata.pb", ""),
    ],
)
def test_single_model_causes_no_warning(tmp_path, caplog, files, model):
    make_files(tmp_path, *files.split())
    make_directories(tmp_path, "variables", "assets")
    assert find_model_file(tmp_path) == tmp_path / model
    assert warnings(caplog) == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_dangling_link])
def test_path_that_is_not_a_file_does_not_affect_other_models(tmp_path, make):
    make(tmp_path / "a.onnx")
    make_files(tmp_path, "b.onnx")
    assert find_model_file(tmp_path) == tmp_path / "b.onnx"


def test_link_to_a_file_is_a_model_file(tmp_path):
    make_files(tmp_path, "blob")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "blob")
    assert find_model_file(tmp_path) == tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("name", "beside", "message"),
    [
        ("model.onnx", (), "no model in {}: 'model.onnx'"),
        ("model.xml", ("model.bin",), "no model in {}: 'model.xml'"),
        ("model.bin", ("model.xml",), "{}/model.xml has no weights: 'model.bin'"),
        ("model.bin", ("model.xml", "other.bin"), "{}/model.xml has no weights: 'model.bin'"),
    ],
)
def test_broken_link_is_refused(tmp_path, name, beside, message):
    make_files(tmp_path, *beside)
    make_dangling_link(tmp_path / name)
    why = f"{message.format(tmp_path)} cannot be read: No such file or directory"
    assert refusal(find_model_file, tmp_path) == why


@pytest.mark.parametrize("name", ["1", "model.onnx"])
def test_inaccessible_version_is_refused_when_there_is_no_other(tmp_path, name):
    make_dangling_link(tmp_path / name)
    message = f"no version in {tmp_path}: '{name}' cannot be read: No such file or directory"
    assert refusal(find_versions, tmp_path) == message


@pytest.mark.parametrize("name", ["model.onnx", "saved_model.pb"])
def test_empty_file_is_not_a_model(tmp_path, name):
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        assert refusal(find_model_file, path) == f"{tmp_path}/{name} is empty"


def test_model_without_weights_may_have_an_empty_bin(tmp_path):
    make_files(tmp_path, "model.xml")
    (tmp_path / "model.bin").touch()
    assert find_model_file(tmp_path) == tmp_path / "model.xml"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258da\n"


@pytest.mark.parametrize(
    ("pointer", "files", "model"),
    [
        ("model.onnx", "", "model.onnx"),
        ("saved_model.pb", "", "saved_model.pb"),
        ("model.bin", "model.xml", "model.xml"),
        ("weights.bin", "model.xml", "model.xml"),
        ("model.pdiparams", "model.pdmodel", "model.pdmodel"),
    ],
)
def test_git_lfs_pointer_is_refused(tmp_path, pointer, files, model):
    make_files(tmp_path, *files.split())
    (tmp_path / pointer).write_bytes(POINTER)
    message = f"{tmp_path}/{pointer} is only a Git LFS pointer; `git lfs pull` fetches the file"
    assert refusal(find_model_file, tmp_path) == message
    assert refusal(check_model_file, tmp_path / model) == message


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ("", "", f"expected {EXPECTED}; it is empty"),
        ("model.bin", "", f"expected {EXPECTED}; it has 'model.bin'"),
        ("model.PB model.txt", "", f"expected {EXPECTED}; it has 'model.PB', 'model.txt'"),
        ("a.pdmodel", "", "'a.pdmodel' needs 'a.pdiparams'"),
        ("a.pdiparams a.json", "", "'a.pdiparams' needs 'a.pdmodel'"),
        ("a.pdmodel b.pdiparams", "", "'a.pdmodel' needs 'a.pdiparams'"),
        ("a.pdmodel b.onnx", "a.pdmodel", "'a.pdmodel' needs 'a.pdiparams'"),
        ("a.pdiparams b.onnx", "a.pdiparams", "'a.pdiparams' needs 'a.pdmodel'"),
        ("a.txt b.onnx", "a.txt", f"expected {EXPECTED}; it has 'a.txt'"),
    ],
)
def test_version_without_a_complete_model_is_refused(tmp_path, files, given, message):
    make_files(tmp_path, *files.split())
    assert refusal(find_model_file, tmp_path / given) == f"no model in {tmp_path}: {message}"


@pytest.mark.parametrize(
    ("files", "given", "model"),
    [
        ("b.xml b.bin", "b.xml", "b.xml"),
        ("b.xml a.onnx", "b.xml", "b.xml"),
        ("b.onnx b.xml b.bin a.onnx", "b.onnx", "b.onnx"),
        ("b.pdmodel b.pdiparams", "b.pdmodel", "b.pdmodel"),
        ("b.pdmodel b.pdiparams", "b.pdiparams", "b.pdmodel"),
        ("b.pb a.pb saved_model.pb", "b.pb", "b.pb"),
        ("b.tflite b.onnx", "b.tflite", "b.tflite"),
        ("saved_model.pb a.pb", "saved_model.pb", ""),
        (".hidden.onnx", ".hidden.onnx", ".hidden.onnx"),
    ],
)
def test_single_file_is_used_whatever_is_beside_it(tmp_path, files, given, model):
    make_files(tmp_path, *files.split())
    assert find_model_file(tmp_path / given) == tmp_path / model


def test_path_that_is_not_utf8_is_refused(tmp_path):
    """Messages and the tasks of trials are text."""
    (tmp_path / os.fsdecode(b"\xff.onnx")).touch()
    assert refusal(find_model_file, tmp_path) == f"cannot read '{tmp_path}/\\udcff.onnx': the path is not UTF-8"


# --- read_mapping


def write_mapping(directory, text):
    (directory / "mapping_config.json").write_bytes(text.encode() if isinstance(text, str) else text)


def test_no_name_is_mapped_without_a_file(tmp_path):
    assert read_mapping(tmp_path) == NameMapping({}, {})


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("{}", NameMapping()),
        ('{"inputs": {}, "outputs": {}}', NameMapping()),
        ('{"inputs": {"x": "image"}}', NameMapping({"x": "image"}, {})),
        ('{"outputs": {"y": "scores"}}', NameMapping({}, {"y": "scores"})),
        ('{"inputs": {"a": "b", "b": "a"}, "outputs": {"y": "a"}}', NameMapping({"a": "b", "b": "a"}, {"y": "a"})),
        ('{"inputs": {"x:0": "größe"}}', NameMapping({"x:0": "größe"}, {})),
        ('\ufeff{"inputs": {"x": "image"}}', NameMapping({"x": "image"}, {})),
    ],
)
def test_mapping_is_from_the_models_names_to_the_clients(tmp_path, text, mapping):
    write_mapping(tmp_path, text)
    assert read_mapping(tmp_path) == mapping


@pytest.mark.parametrize("given", ["model.onnx", "none.onnx"])
def test_mapping_is_read_beside_a_single_file(tmp_path, given):
    make_files(tmp_path, "model.onnx")
    write_mapping(tmp_path, '{"inputs": {"x": "image"}}')
    assert read_mapping(tmp_path / given).inputs == {"x": "image"}


OBJECT = "expected an object with a name for clients by the model's name"
STRING = "expected a non-empty string"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object with 'inputs' or 'outputs', got []"),
        ("null", "expected an object with 'inputs' or 'outputs', got null"),
        ('{"input": {}}', "'input': unknown key; allowed are 'inputs' and 'outputs'"),
        ('{"inputs": ["x"]}', f'inputs: {OBJECT}, got ["x"]'),
        ('{"outputs": null}', f"outputs: {OBJECT}, got null"),
        ('{"inputs": {"x": 1}}', f'inputs["x"]: {STRING}, got 1'),
        ('{"inputs": {"x": ""}}', f'inputs["x"]: {STRING}, got ""'),
        ('{"outputs": {"y": {"z": true}}}', f'outputs["y"]: {STRING}, got {{"z":true}}'),
        ('{"inputs": {"a": "x", "b": "x"}}', "inputs[\"b\"]: 'x' is already the name for 'a'"),
        ('{"outputs": {"a": "x", "b": "x"}}', "outputs[\"b\"]: 'x' is already the name for 'a'"),
        ('{"inputs": {}, "inputs": {"x": "a", "x": "b"}}', "inputs: duplicate key; inputs.x: duplicate key"),
        (b'{"inputs": {\n"x": "\xff"}}', "is not valid JSON: line 2 column 7: byte 0xff is not UTF-8"),
        ('{"inputs": {}}'.encode("utf-16"), "is not valid JSON: it is UTF-16 by its first two bytes, expected UTF-8"),
        (
            '{"inputs": {"x": 1}, "more": 2, "outputs": 3}',
            f"inputs[\"x\"]: {STRING}, got 1; 'more': unknown key; allowed are 'inputs' and 'outputs'; "
            f"outputs: {OBJECT}, got 3",
        ),
    ],
)
def test_problems_of_a_mapping_are_reported(tmp_path, text, message):
    write_mapping(tmp_path, text)
    assert refusal(read_mapping, tmp_path) == f"{tmp_path}/mapping_config.json: {message}"


def test_at_most_ten_problems_of_a_mapping_are_reported(tmp_path):
    write_mapping(tmp_path, f'{{"inputs": {{{", ".join(f"{chr(34)}{index}{chr(34)}: 0" for index in range(1000))}}}}}')
    assert refusal(read_mapping, tmp_path).count(STRING) == 10


@pytest.mark.parametrize(
    "text", ["", "{", '{"inputs": {"x": "y"},}', "{} {}", b'{"inputs": {"x": "\xff"}}', "[" * 9999]
)
def test_mapping_that_is_not_json_is_refused(tmp_path, text):
    write_mapping(tmp_path, text)
    message = refusal(read_mapping, tmp_path)
    assert message.startswith(f"{tmp_path}/mapping_config.json: is not valid JSON: ")
    assert "\n" not in message


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_dangling_link, make_loop])
def test_mapping_that_is_not_a_file_is_refused(tmp_path, make):
    make(tmp_path / "mapping_config.json")
    assert refusal(read_mapping, tmp_path) == f"{tmp_path}/mapping_config.json is missing or not a file"


# --- Unreadable files


@contextlib.contextmanager
def without_rights():
    """Become a user without rights on the tests' files, if the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def reachable():
    """Return a directory that every user can access, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path
        for below in ("1", "m"):  # so that it can be removed
            if (path / below).exists():
                (path / below).chmod(0o755)


@pytest.mark.parametrize(("function", "what"), [(find_versions, "model"), (find_model_file, "version")])
def test_directory_without_permission_is_refused(reachable, function, what):
    make_directories(reachable, "closed")
    (reachable / "closed").chmod(0)
    message = f"cannot read the {what} directory {reachable}/closed: Permission denied"
    with without_rights():
        assert refusal(function, reachable / "closed") == message


@pytest.mark.parametrize(
    ("closed", "mode", "message"),
    [
        ("1", 0o444, "no model in {}/1: 'model.onnx' cannot be read: Permission denied"),
        ("1/model.onnx", 0, "cannot read the file {}/1/model.onnx: Permission denied"),
    ],
)
def test_model_without_permission_is_refused(reachable, closed, mode, message):
    make_directories(reachable, "1")
    make_files(reachable / "1", "model.onnx")
    (reachable / closed).chmod(mode)
    with without_rights():
        assert refusal(find_model_file, reachable / "1") == message.format(reachable)


def test_versions_without_permission_to_enter_are_refused(reachable):
    make_directories(reachable, "m", "m/1")
    (reachable / "m").chmod(0o444)
    message = f"no version in {reachable}/m: '1' cannot be read: Permission denied"
    with without_rights():
        assert refusal(find_versions, reachable / "m") == message


@pytest.mark.parametrize("closed", ["1", "1/mapping_config.json"])
def test_mapping_without_permission_is_refused(reachable, closed):
    make_directories(reachable, "1")
    write_mapping(reachable / "1", "{}")
    (reachable / closed).chmod(0)
    message = f"cannot read the file {reachable}/1/mapping_config.json: Permission denied"
    with without_rights():
        assert refusal(read_mapping, reachable / "1") == message


def test_version_without_permission_does_not_affect_the_others(reachable):
    make_directories(reachable, "1", "2")
    (reachable / "2").chmod(0)
    with without_rights():
        assert list(find_versions(reachable)) == [1, 2]


@pytest.mark.parametrize(("function", "what"), [(find_versions, "model"), (find_model_file, "version")])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "No such file or directory"),
        ("file/1", "Not a directory"),
        ("dangling", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("pipe", "Not a directory"),
        ("a" * 300, "File name too long"),
    ],
)
def test_path_that_is_not_a_directory_is_refused(tmp_path, function, what, name, reason):
    make_files(tmp_path, "file")
    make_dangling_link(tmp_path / "dangling")
    make_loop(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(function, tmp_path / name) == f"cannot read the {what} directory {tmp_path}/{name}: {reason}"


@pytest.mark.parametrize(("function", "what"), [(find_versions, "model"), (find_model_file, "version")])
@pytest.mark.parametrize(("name", "shown"), [("a\0b", "a\\x00b"), ("\ud800", "\\ud800")])
def test_impossible_path_of_a_directory_is_refused(tmp_path, function, what, name, shown):
    assert refusal(function, tmp_path / name).startswith(f"cannot read the {what} directory '{tmp_path}/{shown}': ")


@pytest.mark.parametrize("path", ["file/1", "a\0b/1", "\ud800/1"])
def test_impossible_path_of_a_mapping_is_refused(tmp_path, path):
    make_files(tmp_path, "file")
    assert refusal(read_mapping, tmp_path / path).startswith("cannot read the file ")


@pytest.mark.parametrize("function", [find_versions, find_model_file, read_mapping])
def test_directory_swapped_while_it_is_read_raises_no_other_error(tmp_path, function):
    place, other = tmp_path / "place", tmp_path / "other"
    make_directories(tmp_path, "place", "place/1")
    make_files(tmp_path, "place/1/model.onnx", "place/model.onnx", "other")
    write_mapping(place, "{}")

    def swap():
        for _ in range(1000):
            place.rename(tmp_path / "aside")
            other.rename(place)
            place.rename(other)
            (tmp_path / "aside").rename(place)

    thread = threading.Thread(target=swap)
    thread.start()
    while thread.is_alive():
        with contextlib.suppress(LoadError):
            function(place)


# --- The files of a model


def relative(files, directory):
    return [str(file.relative_to(directory)) for file in files]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ir", ["model.xml", "model.bin"]),
        ("onnx", ["relu.onnx"]),
        ("onnx_external_data", ["relu.onnx", "relu.weights"]),
        ("tensorflow_frozen_graph", ["frozen.pb"]),
        ("tensorflow_saved_model", ["saved_model.pb", "assets/words/a.txt", "variables/variables.index"]),
        ("tensorflow_lite", ["relu.tflite"]),
        ("paddle", ["inference.pdmodel", "inference.pdiparams"]),
    ],
)
def test_all_files_of_a_model_are_listed(tmp_path, name, files):
    formats.FORMATS[name](tmp_path / "1")
    if name == "tensorflow_saved_model":
        (tmp_path / "1" / "assets" / "words").mkdir()
        for file in files[1:]:
            (tmp_path / "1" / file).touch()
    (tmp_path / "1" / "README").touch()
    assert relative(list_model_files(find_model_file(tmp_path / "1")), tmp_path / "1") == files


def test_weights_with_another_name_are_among_the_files_of_an_ir(tmp_path):
    formats.write_ir(tmp_path / "1")
    (tmp_path / "1" / "model.bin").rename(tmp_path / "1" / "weights.bin")
    files = list_model_files(tmp_path / "1" / "model.xml")
    assert relative(files, tmp_path / "1") == ["model.xml", "weights.bin"]


@pytest.mark.parametrize("length", [1, 127, 128, 200])
@pytest.mark.parametrize("place", [0, 2**22 - 140, 2**22 - 5, 2**22 + 3])
def test_external_data_is_found_anywhere_in_an_onnx_file(tmp_path, length, place):
    """Long files are read in pieces."""
    from onnx import StringStringEntryProto

    names = ["w" * length, "ä"]
    for name in names:
        (tmp_path / name).touch()
    entries = [StringStringEntryProto(key="location", value=name).SerializeToString() for name in (*names, "missing")]
    file = tmp_path / "m.onnx"
    file.write_bytes(bytes(place) + b"".join(entries) + bytes(100))
    assert find_external_data(file) == [tmp_path / name for name in names]


def test_truncated_location_is_ignored(tmp_path):
    file = tmp_path / "m.onnx"
    (tmp_path / "ab").touch()
    for content in (b"\n\x08location\x12\x05ab", b"\n\x08location\x12"):
        file.write_bytes(content)
        assert find_external_data(file) == []


def test_replaced_onnx_file_is_searched_again(tmp_path):
    file = tmp_path / "m.onnx"
    for name in ("a", "b"):
        (tmp_path / name).touch()
        file.write_bytes(b"\n\x08location\x12\x01" + name.encode())
        assert find_external_data(file) == [tmp_path / name]
        time.sleep(0.02)  # so that a kernel that counts in ticks gives the file another time
