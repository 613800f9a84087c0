"""Paths on the command line: their models, and the names of these."""

import os
from pathlib import Path

import pytest

from ovms_rest.paths import find_models


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Work in a directory called work, so that `.` has a known name."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def make(*files):
    for file in files:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(*arguments):
    found = find_models(arguments)
    assert found.problems == ()
    return [model.name for model in found.models]


def problems(*arguments):
    return list(find_models(arguments).problems)


NAMES = [
    # A file is named after itself.
    ("resnet50.xml", "resnet50.xml", "resnet50"),
    ("bert.onnx", "bert.onnx", "bert"),
    ("yolo.v8.onnx", "yolo.v8.onnx", "yolo.v8"),
    ("net.pdmodel", "net.pdmodel", "net"),
    ("a b.tflite", "a b.tflite", "a b"),
    # A file with a generic name is named after its directory.
    ("resnet/model.xml", "resnet/model.xml", "resnet"),
    ("resnet/openvino_model.xml", "resnet/openvino_model.xml", "resnet"),
    ("resnet/saved_model.pb", "resnet/saved_model.pb", "resnet"),
    ("resnet/inference.pdmodel", "resnet/inference.pdmodel", "resnet"),
    ("resnet/3/model.onnx", "resnet/3/model.onnx", "resnet"),
    ("resnet/3.onnx", "resnet/3.onnx", "resnet"),
    ("resnet/1/saved_model/saved_model.pb", "resnet/1/saved_model/saved_model.pb", "resnet"),
    ("resnet/1/model.savedmodel/saved_model.pb", "resnet/1/model.savedmodel", "resnet"),
    ("model.onnx", "model.onnx", "work"),
    ("models/model.onnx", "models/model.onnx", "model"),
    ("models/1.onnx", "models/1.onnx", "models"),
    # A directory is named after itself.
    ("resnet/1/anything.onnx", "resnet", "resnet"),
    ("resnet/1/anything.onnx", "resnet/", "resnet"),
    ("resnet/1/anything.onnx", "./resnet/.", "resnet"),
    ("resnet/1/anything.onnx", "resnet/1", "resnet"),
    ("resnet/anything.onnx", "resnet", "resnet"),
    ("resnet/saved_model.pb", "resnet", "resnet"),
    ("resnet/1/x.onnx", "resnet/1/..", "resnet"),
    ("1/x.onnx", ".", "work"),
    ("1/x.onnx", "1", "work"),
    ("check/1/x.onnx", "./check", "check"),
    # NAME=PATH.
    ("resnet/1/x.onnx", "other=resnet", "other"),
    ("a=b/x.onnx", "x=a=b/x.onnx", "x"),
    # A path with "=".
    ("lr=0.1/x.onnx", "lr=0.1/x.onnx", "x"),
    ("lr=0.1.onnx", "lr=0.1.onnx", "lr=0.1"),
    ("a/lr=1/1/x.onnx", "a/lr=1", "lr=1"),
]


@pytest.mark.parametrize(("file", "argument", "name"), NAMES)
def test_model_is_named_after_its_path(file, argument, name):
    make(file)
    assert names(argument) == [name]


def test_paths_are_absolute_and_keep_their_symbolic_links(directory):
    make("releases/2024/resnet50.onnx")
    Path("current").symlink_to("releases/2024")
    Path("resnet.onnx").symlink_to("current/resnet50.onnx")
    found = find_models(["resnet.onnx", "current"]).models
    assert found == (("resnet", directory / "resnet.onnx"), ("current", directory / "current"))


def test_every_model_of_a_repository_is_found(directory):
    make("models/a/1/x.onnx", "models/b/2/model.xml", "models/c/c.onnx", "models/README", "models/.git/1/x.onnx")
    Path("models/lost+found").mkdir()
    found = find_models(["models"])
    assert found.models == tuple((name, directory / "models" / name) for name in "abc")
    assert (found.problems, found.notes) == ((), ())


def test_repository_of_one_model_may_be_named():
    make("models/a/1/x.onnx")
    assert names("n=models") == ["n"]


def test_directories_without_a_model_are_ignored_with_a_note():
    make("models/a/1/x.onnx", "models/scripts/x.py")
    found = find_models(["models"])
    assert [model.name for model in found.models] == ["a"]
    assert found.notes == (f"ignored in {Path.cwd()}/models: 'scripts', without a model",)


def test_weights_beside_their_model_are_skipped():
    """A shell expands `models/*` to them."""
    make("m/a.xml", "m/a.bin", "m/b.pdmodel", "m/b.pdiparams")
    assert names(*sorted(map(str, Path("m").iterdir()))) == ["a", "b"]


def test_formats_of_one_model_in_a_directory_are_one_model():
    make("m/net.xml", "m/net.onnx")
    assert names("m") == ["m"]


def test_problems_begin_with_their_argument():
    make("x.txt", "net.xml", "net.bin", "c.json", "two/a.onnx", "two/b.onnx", "models/a/1/x.onnx", "models/b/1/x.onnx")
    make("notes/x.txt", "Big.ONNX")
    Path("empty").mkdir()
    os.mkfifo("pipe")
    suffixes = "model files end in .xml, .onnx, .pdmodel, .pb, .tflite"
    expected = f"expected a model file, or a directory per version named by a number from 1 on; {suffixes}"
    cases = {
        "absent": "No such file or directory",
        "n=absent.onnx": "No such file or directory",
        "net.xml/1": "Not a directory",
        "x.txt": f"not a model file; {suffixes}",
        "Big.ONNX": f"not a model file; {suffixes}",
        "net.bin": "the weights of net.xml; give that file instead",
        "c.json": "a JSON file, not a model; for a config use --config_path",
        "pipe": "not a file and not a directory",
        "empty": f"no model in this directory, which is empty; {expected}",
        "notes": f"no model in this directory, which has 'x.txt'; {expected}",
        "two": f"several models in {Path.cwd()}/two: 'a.onnx', 'b.onnx'; give the files instead of the directory",
        "n=models": "one name for several models: 'a', 'b'; give their directories instead",
        "s3://bucket/m": "only local files and directories can be served",
        "\udcff.onnx": "the path is not UTF-8",
        "a\0b": "the path has a null character",
    }
    assert problems(*cases) == [f"{argument}: {problem}" for argument, problem in cases.items()]


@pytest.mark.parametrize(
    ("argument", "shown"), [("=m.onnx", '""'), ("a\nb=m.onnx", '"a\\nb"'), ("a\nb.onnx", '"a\\nb"')]
)
def test_invalid_name_is_refused(argument, shown):
    make("m.onnx", "a\nb.onnx")
    assert problems(argument) == [
        f"{argument}: invalid name: expected a non-empty string without '/' and control characters, "
        f"got {shown}; give another one as NAME=PATH"
    ]


def test_models_of_the_same_name_are_refused_with_a_way_to_name_them():
    make("a/net.onnx", "b/net.onnx", "c/net.onnx")
    first, second = Path("a/net.onnx").absolute(), Path("b/net.onnx").absolute()
    assert problems("a/net.onnx", "b/net.onnx", "n=c/net.onnx") == [
        f"'net' would be the name of {first} and {second}; give each its own name, as in net-2={second}"
    ]
    assert names("a/net.onnx", f"net-2={second}", "n=c/net.onnx") == ["net", "net-2", "n"]
