"""The configured models: found, loaded, or remembered with the reason why not."""

import model_zoo
import numpy as np
import pytest

from ovms_rest.config import ModelConfig
from ovms_rest.errors import NotFoundError, NotReadyError
from ovms_rest.models.registry import ModelRegistry, load_models


def load(tmp_path, *names, timeout=60, **plugin_config):
    configs = [ModelConfig(name, tmp_path / name, "CPU", plugin_config) for name in names]
    return load_models(configs, cores=2, load_timeout=timeout)


def open_all(models):
    models.open(opening=lambda name: None, retire=lambda: None)


def infer(model):
    return model.infer({"x": np.array([[-1, 2, -3, 4]], np.float32)})["y"].array.tolist()


def test_the_highest_version_serves(tmp_path):
    for version in (2, 10, 9):
        model_zoo.save(model_zoo.relu(), tmp_path / "m", version)
    models = load(tmp_path, "m")
    open_all(models)
    assert models.versions("m") == ["10"]
    assert models.find("m").metadata.version == "10"
    assert models.find("m", "10") is models.find("m")
    assert infer(models.find("m")) == [[0, 2, 0, 4]]


def test_a_model_that_each_worker_compiles_is_compiled_when_opened(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    models = load(tmp_path, "m", PERFORMANCE_HINT="LATENCY")
    assert not models.find("m").compilation.shared
    open_all(models)
    assert infer(models.find("m")) == [[0, 2, 0, 4]]


def test_unknown_names_are_told_with_the_known_ones():
    models = ModelRegistry({}, {f"m{index}": "why" for index in range(12)})
    with pytest.raises(NotFoundError) as error:
        models.find("x")
    assert str(error.value) == (
        "model 'x' is unknown; configured are 'm0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9', ..."
    )


@pytest.mark.parametrize("version", ["0", "01", "2", "x", "-1", "1.0", "", "9223372036854775808"])
def test_versions_that_are_not_served_are_told_with_those_that_are(tmp_path, version):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    with pytest.raises(NotFoundError) as error:
        load(tmp_path, "m").find("m", version)
    assert str(error.value) == f"version {version!r} of model 'm' is not served; served: 1"


def test_models_that_cannot_be_served_are_kept_with_their_reason_and_the_others_serve(tmp_path, caplog):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    model_zoo.save_crashing(tmp_path / "crashing")
    model_zoo.save(model_zoo.endless(), tmp_path / "hanging")
    (tmp_path / "empty").mkdir()
    models = load(tmp_path, "missing", "empty", "crashing", "good", "hanging", timeout=5)
    open_all(models)
    assert infer(models.find("good")) == [[0, 2, 0, 4]]
    reasons = {
        "missing": f"cannot read the model directory {tmp_path}/missing: No such file or directory",
        "empty": (
            f"no version in {tmp_path}/empty: expected a directory per version with a name from 1 on, "
            f"such as {tmp_path}/empty/1"
        ),
        "crashing": "version 1 ended the process that tried it with SIGSEGV while being read",
        "hanging": "version 1 did not come up in 5 s; it was stopped while inferring for the first time",
    }
    with pytest.raises(NotReadyError) as error:
        models.check_ready()
    assert sorted(str(error.value).split("; model ")) == sorted(
        f"{'model ' if name == 'missing' else ''}{name!r} does not serve: {why}" for name, why in reasons.items()
    )
    for name, why in reasons.items():
        assert f"model {name!r} does not serve: {why}" in caplog.text
        with pytest.raises(NotFoundError, match=f"^model '{name}' does not serve: "):
            models.find(name)


def test_a_registry_of_models_that_serve_is_ready(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    load(tmp_path, "m").check_ready()


def test_opening_tells_the_name_of_each_model_before_it_is_begun(tmp_path):
    for name in ("a", "b"):
        model_zoo.save(model_zoo.relu(), tmp_path / name)
    told = []
    load(tmp_path, "a", "b").open(told.append, retire=lambda: None)
    assert told == ["a", "b", ""]


def test_a_model_that_is_given_up_serves_no_more(tmp_path, caplog):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    models = load(tmp_path, "m")
    models.give_up("m", "for a reason")
    with pytest.raises(NotFoundError, match=r"^model 'm' does not serve: for a reason$"):
        models.find("m")
    assert "model 'm' is given up: for a reason" in caplog.text


def test_a_model_that_does_not_open_is_given_up_and_the_others_are_opened(tmp_path):
    """A device that was there for the proof and is gone for the worker, say; here a key that it does not know."""
    for name in ("a", "b"):
        model_zoo.save(model_zoo.relu(), tmp_path / name)
    models = load(tmp_path, "a", "b", PERFORMANCE_HINT="LATENCY")
    models.find("a").compilation.properties["NO_SUCH_KEY"] = 1
    open_all(models)
    with pytest.raises(NotFoundError, match=r"version 1 cannot be compiled for CPU: .*NO_SUCH_KEY"):
        models.find("a")
