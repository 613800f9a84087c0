"""Changes as functions: from a description of what is wanted, with a loader that loads nothing, to the next."""

from functools import partial

import pytest

from ovms_rest.arbiter.changes import Loader, Wanted, differ, load, load_model, unload_model
from ovms_rest.config import Config
from ovms_rest.errors import ConfigError, ForbiddenError, InvalidConfigError, LoadFailedError, NotFoundError
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.registry import Entry
from ovms_rest.models.roots import find_roots
from ovms_rest.models.watching import CHANGING, stamp
from ovms_rest.pipelines.definition import Library, NodeDefinition, PipelineDefinition

NOW = (("config.json", 1, 1, 1, 1),)


class Loading:
    """Loads models, and assembles pipelines, as the entries that it was given; `loaded` are the names it was asked."""

    def __init__(self, **entries):
        self.entries, self.loaded = entries, []

    def load(self, configs, previous, housekeep):
        self.loaded += [config.name for config in configs]
        return {config.name: self.entries.get(config.name) or Entry({1: config}) for config in configs}

    def assemble(self, pipelines, libraries, models, previous, housekeep):
        return {
            pipeline.name: self.entries.get(pipeline.name) or Entry({1: pipeline}, kind="pipeline")
            for pipeline in pipelines
        }


@pytest.fixture
def path(tmp_path):
    for name in ("m", "n", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_text(name)
    return tmp_path / "config.json"


def models(path, *names):
    return tuple(ModelConfig(name, path.parent / name) for name in names)


def pipeline(name="p", model="m", library=""):
    nodes = (NodeDefinition("node", model=model, library=library),)
    return PipelineDefinition(name, nodes=nodes)


def change(function, wanted, *arguments, entries, loading=None):
    loading = loading or Loading()
    return function(wanted, *arguments, Loader(loading.load, loading.assemble, entries, lambda: False))


def begin(path, *names, pipelines=(), libraries=None):
    file = Config(models(path, *names), tuple(pipelines), libraries or {})
    return change(load, Wanted(path), file, NOW, entries={})


def load_one(wanted, entries, name, given=None, names=("m", "n"), pipelines=(), loading=None):
    file = Config(models(wanted.path, *names), tuple(pipelines), {})
    return change(load_model, wanted, file, name, given, find_roots, entries=entries, loading=loading)


def test_load_serves_the_models_and_pipelines_of_the_file_with_their_stamps(path):
    library = Library("l", "node.py", path.parent)
    wanted, entries = begin(path, "m", "n", pipelines=[pipeline(library="l")], libraries={"l": library})
    assert list(entries) == ["m", "n", "p"]
    assert wanted.models == {model.name: model for model in models(path, "m", "n")}
    assert wanted.stamps == {
        path: NOW,
        **{path.parent / name: stamp(path.parent / name) for name in ("m", "n")},
        library.path: stamp(library.path),
    }


def test_load_forgets_what_left_the_file_and_keeps_what_was_given_by_call(path):
    wanted, entries = begin(path, "m", "n")
    wanted, entries = load_one(wanted, entries, "g", {"base_path": "m"})
    wanted, entries = change(load, wanted, Config(models(path, "m")), NOW, entries=entries)
    assert list(entries) == ["m", "g"]


def test_load_forgets_the_configuration_given_for_a_model_that_leaves_the_file(path):
    wanted, entries = begin(path, "m", "n")
    wanted, entries = load_one(wanted, entries, "n", {"base_path": "n", "nireq": 1})
    assert wanted.models["n"].nireq == 1
    wanted, entries = change(load, wanted, Config(models(path, "m")), NOW, entries=entries)
    assert (list(entries), wanted.given) == (["m"], {})


def test_load_leaves_unloaded_models_unloaded(path):
    wanted, entries = begin(path, "m", "n")
    wanted, entries = change(unload_model, wanted, "n", False, entries=entries)
    loading = Loading()
    wanted, entries = change(load, wanted, Config(models(path, "m", "n")), NOW, entries=entries, loading=loading)
    assert (loading.loaded, entries["n"].ended, set(wanted.stamps)) == (["m"], (1,), {path, path.parent / "m"})


def test_files_that_were_being_written_get_a_stamp_that_no_files_have(path):
    loading = Loading(m=Entry(is_changing=True))
    file = Config(models(path, "m", "n"))
    wanted, _ = change(load, Wanted(path), file, NOW, entries={}, loading=loading)
    assert (wanted.stamps[path.parent / "m"], wanted.stamps[path]) == (CHANGING, NOW)
    wanted, _ = load_one(wanted, {}, "m")
    assert wanted.stamps[path.parent / "m"] == stamp(path.parent / "m")


def test_library_that_was_being_written_gets_a_stamp_that_no_files_have(path):
    library = Library("l", "node.py", path.parent)
    loading = Loading(p=Entry(is_changing=True, kind="pipeline"))
    file = Config((), (pipeline(model="", library="l"),), {"l": library})
    wanted, _ = change(load, Wanted(path), file, NOW, entries={}, loading=loading)
    assert wanted.stamps[library.path] == CHANGING


def test_change_leaves_the_description_before_it_as_it_was(path):
    before, entries = begin(path, "m", "n")
    copy = (dict(before.configured), dict(before.given), dict(before.stamps))
    load_one(before, entries, "m", {"nireq": 2})
    change(unload_model, before, "m", True, entries=entries)
    assert (before.configured, before.given, before.stamps) == copy
    assert before.unloaded == frozenset()


def test_load_model_loads_that_model_alone(path):
    wanted, entries = begin(path, "m", "n")
    loading = Loading()
    load_one(wanted, entries, "m", loading=loading)
    assert loading.loaded == ["m"]


def test_load_model_without_configuration_drops_the_one_given_before(path):
    wanted, entries = load_one(*begin(path, "m", "n"), "m", {"nireq": 2})
    assert wanted.models["m"].nireq == 2
    wanted, _ = load_one(wanted, entries, "m")
    assert (wanted.models["m"].nireq, wanted.given) == (0, {})


def test_load_model_loads_an_unloaded_model_again(path):
    wanted, entries = begin(path, "m", "n")
    wanted, entries = change(unload_model, wanted, "m", False, entries=entries)
    wanted, entries = load_one(wanted, entries, "m")
    assert (wanted.unloaded, list(entries["m"].versions)) == (frozenset(), [1])
    assert path.parent / "m" in wanted.stamps


def test_load_model_of_a_model_that_does_not_serve_fails_when_it_was_given(path):
    broken = Loading(m=Entry(reason="broken"))
    wanted, entries = begin(path, "m", "n")
    with pytest.raises(LoadFailedError, match=r"^model 'm': broken$"):
        load_one(wanted, entries, "m", {"nireq": 2}, loading=broken)
    assert load_one(wanted, entries, "m", loading=broken)[1]["m"].reason == "broken"


@pytest.mark.parametrize("given", [None, {"nireq": 2}])
def test_unloaded_model_that_cannot_be_loaded_stays_so_with_the_reasons(path, given):
    broken = Loading(m=Entry({2: "loads"}, {1: "is broken"}))
    wanted, entries = begin(path, "m", "n")
    before, entries = change(unload_model, wanted, "m", False, entries=entries)
    wanted, failed = load_one(before, entries, "m", given, loading=broken)
    assert (wanted, failed["n"]) == (before, entries["n"])
    assert (failed["m"].ended, failed["m"].versions, failed["m"].failures) == ((1,), {}, {1: "is broken"})
    _, unloaded = change(unload_model, wanted, "m", False, entries=failed)
    assert (unloaded["m"].ended, unloaded["m"].failures) == ((1,), {})


def test_unloaded_pipeline_that_cannot_be_loaded_stays_so_with_the_reason(path):
    broken = Loading(p=Entry(reason="broken", kind="pipeline"))
    wanted, entries = begin(path, "m", "n", pipelines=[pipeline()])
    before, entries = change(unload_model, wanted, "p", False, entries=entries)
    wanted, failed = load_one(before, entries, "p", pipelines=[pipeline()], loading=broken)
    assert (wanted, failed["p"].ended, failed["p"].reason) == (before, (1,), "broken")


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("x", None, NotFoundError, "model 'x' is not in .*; it has 'm', 'n'"),
        ("gone", None, NotFoundError, "pipeline 'gone' is not in .* any more"),
        ("p", {}, InvalidConfigError, "'p' is a pipeline; parameters.config is for models only"),
        ("m", {"nope": 1}, ConfigError, "config.nope: unknown key"),
        ("m", {"base_path": "/etc"}, ForbiddenError, "/etc"),
    ],
)
def test_load_model_refuses_what_it_may_not_load(path, name, given, error, message):
    wanted, entries = begin(path, "m", "n", pipelines=[pipeline(), pipeline("gone")])
    with pytest.raises(error, match=message):
        load_one(wanted, entries, name, given, pipelines=[pipeline()])


def test_load_model_takes_a_pipeline_from_the_file(path):
    wanted, entries = begin(path, "m", "n")
    wanted, entries = load_one(wanted, entries, "p", pipelines=[pipeline()])
    assert (list(entries), list(wanted.pipelines)) == (["m", "n", "p"], ["p"])


def test_unload_ends_a_model_and_with_dependents_the_pipelines_that_use_it(path):
    wanted, entries = begin(path, "m", "n", pipelines=[pipeline(), pipeline("q", model="n")])
    unload = partial(change, unload_model, entries=entries)
    after, left = unload(wanted, "m", False)
    assert (after.unloaded, [name for name, entry in left.items() if entry.ended]) == ({"m"}, ["m"])
    after, left = unload(wanted, "m", True)
    assert (after.unloaded, [name for name, entry in left.items() if entry.ended]) == ({"m", "p"}, ["m", "p"])
    with pytest.raises(NotFoundError, match="unknown model 'x'"):
        unload(wanted, "x", False)


def test_entries_differ_by_what_serves_by_status_and_by_order(path):
    _, entries = begin(path, "m", "n")
    assert not differ(entries, dict(entries))
    assert differ(entries, {name: entries[name] for name in ("n", "m")})
    assert differ(entries, {**entries, "m": Entry({1: object()})})
    assert differ(entries, {"m": entries["m"]})
    assert differ({"m": entries["m"]}, {"m": entries["m"].end()})
