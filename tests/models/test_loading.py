"""Models from a directory to a registry: found, tried, compiled, or listed with the reason why not."""

import os
from pathlib import Path

import formats
import model_zoo
import numpy as np
import pytest
from timeouts import is_only_hang, keep_trying

from ovms_rest.errors import NotFoundError, NotReadyError
from ovms_rest.host.throwaway import STOPPED
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.loading import LoadSettings, load_models
from ovms_rest.models.options import ModelOptions
from ovms_rest.models.repository import LATEST, VersionPolicy
from ovms_rest.settings import DEMO_CONFIG


def load_all(*configs, timeout=60, **options):
    return load_models(configs, LoadSettings(cores=2, load_timeout=timeout), **options)


def load(tmp_path, *names, timeout=60, begin=lambda *at: None, **values):
    return load_all(*(ModelConfig(name, tmp_path / name, **values) for name in names), timeout=timeout, begin=begin)


def open_all(models):
    models.open(opening=lambda name: None, retire=lambda: None)


def why_not_ready(models) -> str:
    with pytest.raises(NotReadyError) as error:
        models.check_ready()
    return str(error.value)


def infer(model):
    return model.infer({"x": np.array([[-1, 2, -3, 4]], np.float32)})["y"].array.tolist()


def test_highest_version_serves(tmp_path):
    for version in (2, 10, 9):
        model_zoo.save(model_zoo.relu(), tmp_path / "m", version)
    models = load(tmp_path, "m")
    open_all(models)
    assert models.versions("m") == ["10"]
    assert models.find("m").metadata.version == "10"
    assert models.find("m", "10") is models.find("m")
    assert infer(models.find("m")) == [[0, 2, 0, 4]]


def test_model_compiled_by_each_worker_is_compiled_when_opened(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    models = load(tmp_path, "m", plugin_config={"PERFORMANCE_HINT": "LATENCY"})
    assert not models.find("m").compilation.shared
    open_all(models)
    assert infer(models.find("m")) == [[0, 2, 0, 4]]


def test_failed_models_are_listed_with_their_reason_and_the_others_serve(tmp_path, caplog):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    model_zoo.save_crashing(tmp_path / "crashing")
    model_zoo.save(model_zoo.endless(), tmp_path / "hanging")
    (tmp_path / "empty").mkdir()
    timeout, models = keep_trying(
        lambda timeout: load(tmp_path, "missing", "empty", "crashing", "good", "hanging", timeout=timeout),
        lambda models: is_only_hang(why_not_ready(models)),
    )
    open_all(models)
    assert infer(models.find("good")) == [[0, 2, 0, 4]]
    reasons = {
        "missing": f"cannot read the model directory {tmp_path}/missing: No such file or directory",
        "empty": f"no version in {tmp_path}/empty: expected a directory per version, named by a number from 1 ",
        "crashing": "version 1 ended its trial process with SIGSEGV while being read",
        "hanging": f"version 1 timed out after {timeout} s while inferring for the first time",
    }
    for name, why in reasons.items():
        assert f"model {name!r} does not serve: {why}" in why_not_ready(models)
        assert why.removeprefix("version 1 ") in caplog.text
        with pytest.raises(NotFoundError, match=f"^model '{name}' does not serve: "):
            models.find(name, explain=True)


# --- Versions


def save_versions(tmp_path, *good, broken=()):
    for version in good:
        model_zoo.save(model_zoo.relu(), tmp_path / "m", version)
    for version in broken:
        (tmp_path / "m" / str(version)).mkdir(parents=True)
        (tmp_path / "m" / str(version) / "model.onnx").write_text("garbage")


SELECTED = [
    (LATEST, ["4"]),
    (VersionPolicy(latest=2), ["3", "4"]),
    (VersionPolicy(latest=9), ["1", "3", "4"]),
    (VersionPolicy(), ["1", "3", "4"]),
    (VersionPolicy(specific=frozenset({1, 2, 3})), ["1", "3"]),
]
REPLACED = [
    (LATEST, ["3"]),
    (VersionPolicy(latest=2), ["1", "3"]),
    (VersionPolicy(), ["1", "3"]),
    (VersionPolicy(specific=frozenset({3, 4})), ["3"]),
]


@pytest.fixture(scope="module")
def by_policy(tmp_path_factory):
    """Models with good versions 1, 3, 4, and others with broken versions 4 and 5, each by its policy."""
    good, broken = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("broken")
    save_versions(good, 1, 3, 4)
    save_versions(broken, 1, 3, broken=(4, 5))
    models = load_all(
        *(ModelConfig(f"good {policy}", good / "m", version_policy=policy) for policy, _ in SELECTED),
        *(ModelConfig(f"broken {policy}", broken / "m", version_policy=policy) for policy, _ in REPLACED),
    )
    open_all(models)
    return models


@pytest.mark.parametrize(("policy", "served"), SELECTED)
def test_policy_selects_the_versions_and_the_highest_is_the_default(by_policy, policy, served):
    name = f"good {policy}"
    assert by_policy.versions(name) == served
    assert by_policy.find(name).metadata.version == served[-1]
    assert by_policy.find(name, served[0]).metadata.version == served[0]


@pytest.mark.parametrize(("policy", "served"), REPLACED)
def test_next_lower_version_replaces_a_broken_one(by_policy, policy, served):
    name = f"broken {policy}"
    assert by_policy.versions(name) == served
    by_policy.check_ready()
    assert infer(by_policy.find(name)) == [[0, 2, 0, 4]]
    with pytest.raises(NotFoundError, match=r"^version '4' of model 'broken .*' does not serve: cannot read "):
        by_policy.find(name, "4", explain=True)


def test_policy_that_selects_no_version_is_the_reason(tmp_path):
    save_versions(tmp_path, 1, 3)
    models = load(tmp_path, "m", version_policy=VersionPolicy(specific=frozenset({2, 7})))
    with pytest.raises(NotFoundError, match=r": model_version_policy selects none of the available versions: 1, 3$"):
        models.find("m", explain=True)


def test_begin_is_called_before_each_trial_and_failures_are_logged(tmp_path, caplog):
    save_versions(tmp_path, 1, broken=(2,))
    begun = []
    load(tmp_path, "m", begin=lambda *at: begun.append(at))
    assert begun == [("m", 2), ("m", 1)]
    assert "version 2 of model 'm' does not serve: cannot read " in caplog.text


# --- Options


def test_invalid_option_fails_its_model_alone(tmp_path):
    for name in ("a", "b"):
        model_zoo.save(model_zoo.relu(), tmp_path / name)
    models = load_all(
        ModelConfig("a", tmp_path / "a", options=ModelOptions(shape="(1,x)")),
        ModelConfig("b", tmp_path / "b", options=ModelOptions(shape="(3,4)")),
        ModelConfig("c", tmp_path / "b", plugin_config={"INFERENCE_NUM_THREADS": "many"}),
    )
    assert models.find("b").metadata.inputs["x"].static_shape == (3, 4)
    for name, reason in (("a", "shape"), ("c", "plugin_config.INFERENCE_NUM_THREADS")):
        with pytest.raises(NotFoundError, match=f"^model '{name}' does not serve: .*{reason}: "):
            models.find(name, explain=True)


def test_all_problems_of_a_model_are_reported_once_before_it_is_tried(tmp_path, caplog):
    save_versions(tmp_path, 1, 2, 3)
    wrong = {"options": ModelOptions(shape="(1", layout="Q:"), "plugin_config": {"NUM_STREAMS": "many"}}
    begun = []
    models = load(tmp_path, "m", "absent", begin=lambda *at: begun.append(at), version_policy=VersionPolicy(), **wrong)
    assert begun == []
    for name in ("m", "absent"):
        options, plugin_config, *missing = models.entries[name].problems(name)
        assert options.startswith(f"model '{name}': layout: expected ")
        assert "; shape: expected " in options
        assert plugin_config.startswith(f"model '{name}': plugin_config.NUM_STREAMS: expected ")
        assert models.entries[name].reason.count("shape: ") == 1
        assert caplog.text.count(f"model '{name}' does not serve: layout: ") == 1
        assert [line.startswith("model 'absent': cannot read ") for line in missing] == [True] * (name == "absent")


INVALID = [
    ({"base_path": Path("/x"), "remote": "s3://b/m"}, "base_path: only local directories and files can be served"),
    ({"base_path": DEMO_CONFIG.parent / "digits", "nireq": 100_001}, "nireq: expected at most 100000, got 100001"),
    ({"base_path": Path("/x" * 300)}, "cannot read the model directory /x"),
    ({"base_path": Path("/" + "x" * 300)}, "File name too long"),
    ({"base_path": Path("/" + "x" * 5000 + ".xml")}, "File name too long"),
    ({"base_path": Path("/x\0y")}, "the path has a null character"),
]


@pytest.fixture(scope="module")
def beside_invalid(tmp_path_factory):
    """A good model 'm', and a model for each invalid configuration."""
    directory = tmp_path_factory.mktemp("invalid")
    model_zoo.save(model_zoo.relu(), directory / "m")
    configs = (ModelConfig(f"a{index}", **values) for index, (values, _) in enumerate(INVALID))
    return load_all(*configs, ModelConfig("m", directory / "m"))


@pytest.mark.parametrize("index", range(len(INVALID)))
def test_invalid_value_fails_its_model_alone(beside_invalid, index):
    assert beside_invalid.versions("m") == ["1"]
    (problem,) = beside_invalid.entries[f"a{index}"].problems(f"a{index}")
    assert problem.startswith(f"model 'a{index}': ")
    assert INVALID[index][1] in problem
    assert len(beside_invalid.problems()) == len(INVALID)


def test_batch_size_beside_a_shape_causes_a_warning(tmp_path, caplog):
    model_zoo.save(model_zoo.relu((2, 4)), tmp_path / "m")
    load(tmp_path, "m", options=ModelOptions(shape="(3,4)", batch_size=7))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    message = "Both shape and batch size have been defined. Batch size parameter will be ignored."
    assert warnings == [f"model 'm': {message}"]


def test_keys_without_effect_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    models = load(tmp_path, "m", nireq=8, allow_cache=True)
    nireq, allow_cache = models.entries["m"].notes
    assert nireq.startswith("nireq=8 is ignored: each worker runs one inference at a time; ")
    assert allow_cache.startswith("allow_cache=true is ignored: ")
    for note in (nireq, allow_cache):
        assert f"model 'm': {note}" in caplog.text


def test_nothing_is_compiled_once_the_service_shuts_down(tmp_path):
    """The service shuts down while the second version is tried."""
    save_versions(tmp_path, 1, 2)
    tried = []
    config = ModelConfig("m", tmp_path / "m", version_policy=VersionPolicy())
    models = load_all(config, begin=lambda *at: tried.append(at), stop=lambda: len(tried) == 2)
    assert (models.entries["m"].versions, models.entries["m"].failures) == ({}, {1: STOPPED, 2: STOPPED})


@pytest.mark.parametrize("options", [ModelOptions(shape="auto"), ModelOptions(batch_size="AUTO")])
def test_auto_is_logged_as_deprecated(tmp_path, options, caplog):
    model_zoo.save(model_zoo.relu((2, 4)), tmp_path / "m")
    assert load(tmp_path, "m", options=options).find("m").metadata.inputs["x"].holds((7, 4))
    assert "model 'm': \"auto\" is deprecated" in caplog.text


def test_model_that_fails_to_open_is_given_up_and_the_others_are_opened(tmp_path):
    """A device may be gone after the trial; here a property is unknown to it."""
    for name in ("a", "b"):
        model_zoo.save(model_zoo.relu(), tmp_path / name)
    models = load(tmp_path, "a", "b", plugin_config={"PERFORMANCE_HINT": "LATENCY"})
    models.find("a").compilation.properties["NO_SUCH_KEY"] = 1
    open_all(models)
    assert infer(models.find("b")) == [[0, 2, 0, 4]]
    message = r"version 1 cannot be compiled for CPU: .*Unsupported property NO_SUCH_KEY"
    with pytest.raises(NotFoundError, match=message):
        models.find("a", explain=True)


# --- Files that are being written


def test_version_that_is_being_written_keeps_serving_and_no_lower_one_replaces_it(tmp_path, caplog):
    for version in (1, 2):
        model_zoo.save(model_zoo.product(), tmp_path / "m", version)
    config = ModelConfig("m", tmp_path / "m")
    before = load_all(config)
    file = tmp_path / "m" / "2" / "model.xml"
    with file.open("r+b"):
        os.utime(file)
        meanwhile = load_all(config, previous=before)
    entry = meanwhile.entries["m"]
    assert entry.versions == before.entries["m"].versions
    assert list(entry.versions) == [2]
    assert entry.failures == {2: f"{file} is open for writing in another process"}
    assert entry.is_changing
    assert "model 'm' keeps serving version 2 as it was" in caplog.messages
    (status,) = entry.status()
    assert (status["state"], status["status"]["error_message"]) == ("AVAILABLE", entry.failures[2])

    after = load_all(config, previous=meanwhile).entries["m"]
    assert (list(after.versions), after.failures, after.is_changing) == ([2], {}, False)
    assert after.versions[2] is not entry.versions[2]


def test_version_that_is_being_written_at_the_start_is_replaced_by_a_lower_one(tmp_path):
    for version in (1, 2):
        model_zoo.save(model_zoo.product(), tmp_path / "m", version)
    with (tmp_path / "m" / "2" / "model.xml").open("r+b"):
        entry = load(tmp_path, "m").entries["m"]
    assert (list(entry.versions), list(entry.failures), entry.is_changing) == ([1], [2], True)


def test_many_models_are_tried_in_batches(tmp_path, monkeypatch):
    """Each model has two open files while it is being loaded."""
    monkeypatch.setattr("ovms_rest.models.loading._BATCH", 2)
    tried = []
    configs = [ModelConfig(f"m{index}", tmp_path / f"m{index}") for index in range(5)]
    for config in configs:
        model_zoo.save(model_zoo.product(), config.base_path)
    models = load_all(*configs, begin=lambda *at: tried.append(at))
    assert tried == [(config.name, 1) for config in configs]
    assert [list(entry.versions) for entry in models.entries.values()] == [[1]] * 5


def test_model_that_is_read_in_place_is_logged(tmp_path, monkeypatch, caplog):
    formats.write_onnx(tmp_path / "m" / "1")
    monkeypatch.setattr("ovms_rest.models.copies._find_temporary_directories", lambda: iter(()))
    load(tmp_path, "m")
    assert (
        "version 1 of model 'm' was read in place, without a private copy: no temporary directory can be written"
        in caplog.messages
    )
