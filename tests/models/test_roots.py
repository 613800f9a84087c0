"""Paths that the configuration in a call may name."""

import json

import pytest

from ovms_rest.config import parse_model
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.roots import check_paths, find_roots


@pytest.fixture
def tree(tmp_path):
    """Make directories of a configured model, a cache, a root, and others, with links between them."""
    for name in ("served/1", "served.old", "cache", "root/m", "outside/m"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "served" / "away").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "single.onnx").touch()
    return tmp_path


def problems(tree, given, roots="", cache=""):
    configured = [
        ModelConfig("m", tree / "served", plugin_config={"CACHE_DIR": str(tree / "cache")}),
        ModelConfig("single", tree / "single.onnx"),
        ModelConfig("remote", tree / "s3://bucket", remote="s3://bucket"),
    ]
    config = parse_model("new", {"base_path": "served", **given}, tree, None)
    found = check_paths(given, config, find_roots(configured, roots.replace("TREE", str(tree)), cache))
    return [problem.partition(":")[0] for problem in found]


ALLOWED = ["served", "served/1", "served/../served/1/", "served/absent", "single.onnx", "./served//1"]
OUTSIDE = [
    *(".", "..", "/", "/etc", "outside", "absent", "served.old", "servedx", "served/..", "served/1/../../outside/m"),
    *("served/away", "served/away/m", "served/away/absent", "link/m", "root/m", "loop", "loop/m", "cache"),
    *("single.onnx.old", "~", "x" * 300, "d/" * 3000),
]


@pytest.mark.parametrize("path", ALLOWED)
def test_path_below_a_configured_model_is_allowed(tree, path):
    assert problems(tree, {"base_path": path}) == []
    assert problems(tree, {"base_path": str(tree / path)}) == []


@pytest.mark.parametrize("path", OUTSIDE)
def test_path_outside_is_refused(tree, path):
    assert problems(tree, {"base_path": path}) == ["config.base_path"]
    assert problems(tree, {"base_path": str(tree / path)}) == ["config.base_path"]


@pytest.mark.parametrize("path", ["root", "root/m", "link/m", "link/absent"])
@pytest.mark.parametrize("roots", ["TREE/root", "/absent:TREE/link/:", "TREE/outside/../root", "/"])
def test_path_below_a_root_of_the_setting_is_allowed(tree, path, roots):
    assert problems(tree, {"base_path": path}, roots) == []


@pytest.mark.parametrize("roots", ["", ":", "::", "TREE/root/m/x", "TREE/roo", "TREE/outside"])
def test_empty_root_is_ignored(tree, roots):
    assert problems(tree, {"base_path": "root"}, roots) == ["config.base_path"]


def test_path_that_is_not_in_the_call_is_not_checked(tree):
    base = ModelConfig("m", tree / "outside")
    config = parse_model("m", {"nireq": 1}, tree, base)
    assert list(check_paths({"nireq": 1}, config, find_roots([]))) == []


def test_values_that_are_not_paths_are_left_to_the_load(tree):
    """A URL is not read, and no file has a NUL in its path."""
    assert problems(tree, {"base_path": "s3://bucket/../../etc"}) == []
    assert problems(tree, {"base_path": "served/m\0"}) == []
    assert problems(tree, {"base_path": "/etc/m\0"}) == ["config.base_path"]


@pytest.mark.parametrize("name", ["CACHE_DIR", "cache_dir", "WEIGHTS_PATH", "CONFIG_FILE", "NPUW_DUMP_SUBS_DIR", "NEW"])
@pytest.mark.parametrize("place", ["outside", "absent", "served/../outside", "served/away"])
def test_properties_that_are_paths_are_checked(tree, name, place):
    given = {"plugin_config": {name: str(tree / place)}}
    assert problems(tree, given) == [f"config.plugin_config.{name}"]
    assert problems(tree, given, roots="TREE") == []
    assert problems(tree, {"plugin_config": {name: str(tree / "served" / "1")}}) == []


@pytest.mark.parametrize("value", ["cache", "..", 5, True])
def test_relative_path_needs_no_slash(tree, monkeypatch, value):
    monkeypatch.chdir(tree / "outside")
    assert problems(tree, {"plugin_config": {"CACHE_DIR": value}}) == ["config.plugin_config.CACHE_DIR"]
    monkeypatch.chdir(tree / "served" / "1")
    assert problems(tree, {"plugin_config": {"CACHE_DIR": value}}) == []


def test_cache_may_be_below_a_configured_cache(tree):
    for place in (tree / "cache", tree / "cache" / "x"):
        assert problems(tree, {"plugin_config": {"CACHE_DIR": str(place)}}) == []
        assert problems(tree, {"plugin_config": {"WEIGHTS_PATH": str(place)}}) == ["config.plugin_config.WEIGHTS_PATH"]
    given = {"plugin_config": {"CACHE_DIR": str(tree / "outside")}}
    assert problems(tree, given, cache=str(tree / "outside")) == []


@pytest.mark.parametrize(
    "properties", [{"CACHE_DIR": "cache"}, {"NEW": "/etc"}, {"NEW": "\u2028/"}, {"weights_path": ""}]
)
def test_properties_of_devices_may_not_name_paths(tree, properties):
    given = {"plugin_config": {"DEVICE_PROPERTIES": json.dumps({"CPU": properties})}}
    assert problems(tree, given, roots="/") == ["config.plugin_config.DEVICE_PROPERTIES"]


def test_other_properties_are_not_checked(tree):
    words = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_MODE": "OPTIMIZE_SIZE", "PERFORMANCE_HINT": "LATENCY"}
    others = {"CACHE_DIR": "", "ENABLE_MMAP": "NO", "DEVICE_PROPERTIES": '{"CPU":{"NUM_STREAMS":"1"}}'}
    assert problems(tree, {"plugin_config": {**words, **others, "NUM_STREAMS": 2}}) == []


def test_refusal_does_not_depend_on_whether_a_path_exists(tree):
    def words(place):
        given = {"base_path": place, "plugin_config": {"CACHE_DIR": place}}
        config = parse_model("new", given, tree, None)
        return [problem.replace(place, "PLACE") for problem in check_paths(given, config, find_roots([]))]

    below, root = '"PLACE" is not below a model in the config file', "or a root in OVMS_REST_MODEL_ROOTS"
    expected = [
        f"config.base_path: {below} {root}",
        f"config.plugin_config.CACHE_DIR: {below}, a configured cache directory {root}",
    ]
    assert [words(place) for place in ("/etc", "/absent", "/etc/shadow/x")] == [expected] * 3
