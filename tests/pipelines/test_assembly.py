"""Assembling pipelines from models and libraries: finding, reusing, and the reasons of failures."""

import os

import pytest
from node_cases import PYTHON_NODE

from ovms_rest.errors import NotReadyError
from ovms_rest.models.loading import LoadSettings
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.pipelines.assembly import assemble_pipelines
from ovms_rest.pipelines.definition import Library, NodeDefinition, PipelineDefinition, Source
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata

SETTINGS = LoadSettings(cores=1, load_timeout=60)


class FakeModel:
    """A model x FP32 [1,2] -> y FP32 [1,2] that is never run."""

    batch_limit = 0

    def __init__(self, name="m", version="1", datatype="FP32"):
        dims = (Dim(1, 1), Dim(2, 2))
        self.metadata = ModelMetadata(
            name, version, {"x": TensorMetadata("x", datatype, dims)}, {"y": TensorMetadata("y", datatype, dims)}
        )


def definition(version=None, library="", count=None):
    inputs, outputs = (("x", Source("request", "in")),), (("out", "y"),)
    model = "" if library else "m"
    node = NodeDefinition("n", model, version, library, {}, inputs, outputs)
    return PipelineDefinition("p", ("in",), (node,), (("out", Source("n", "out")),), count)


def assemble(models, previous=None, pipeline=None, libraries=None):
    """Assemble the pipeline p; return its entry."""
    found = assemble_pipelines([pipeline or definition()], libraries or {}, models, previous or {}, SETTINGS)
    assert list(found) == ["p"]
    return found["p"]


def test_a_pipeline_uses_the_highest_version_or_the_one_it_names():
    models = {"m": Entry({2: FakeModel(version="2"), 10: FakeModel(version="10")})}
    for pipeline, version in ((definition(), 10), (definition(version=2), 2)):
        entry = assemble(models, pipeline=pipeline)
        assert (entry.kind, list(entry.versions), entry.reason) == ("pipeline", [1], "")
        assert entry.versions[1].dependencies == (models["m"].versions[version],)


@pytest.mark.parametrize(
    ("models", "version", "why"),
    [
        ({"a": Entry(), "b": Entry()}, None, "model 'm' is not configured; configured: 'a', 'b'"),
        ({}, None, "model 'm' is not configured; configured: none"),
        ({"m": Entry(ended=(1,))}, None, "model 'm' was unloaded"),
        ({"m": Entry(reason="has no versions")}, None, "model 'm' does not serve: has no versions"),
        ({"m": Entry(failures={1: "is broken"})}, 1, "model 'm' does not serve: version 1 is broken"),
        ({"m": Entry({1: FakeModel()})}, 2, "version 2 of model 'm' is not served; served: 1"),
        ({"m": Entry({1: FakeModel()}, {2: "is broken"})}, 2, "version 2 of model 'm' is broken"),
    ],
)
def test_a_missing_model_is_reported_with_its_reason(models, version, why):
    entry = assemble(models, pipeline=definition(version=version))
    assert entry.versions == {}
    assert (entry.reason, entry.details) == (f"node 'n': {why}", (f"node 'n': {why}",))
    assert entry.problems("p") == [f"pipeline 'p': node 'n': {why}"]


def test_an_unchanged_pipeline_is_reused():
    models = {"m": Entry({1: FakeModel()})}
    first = assemble(models)
    assert assemble(models, {"p": first}) is first
    assert assemble({"m": Entry({1: FakeModel()})}, {"p": first}) is not first
    assert assemble(models, {"p": first.end()}) is not first


def test_a_pipeline_with_a_wrong_new_definition_keeps_the_old_one_while_its_models_serve():
    models = {"m": Entry({1: FakeModel()})}
    first = assemble(models)
    wrong = definition(version=2)
    second = assemble(models, {"p": first}, wrong)
    assert second.versions == first.versions
    assert second.failures == {1: "node 'n': version 2 of model 'm' is not served; served: 1"}
    assert assemble(models, {"p": second}, wrong) is second
    third = assemble({"m": Entry(ended=(1,))}, {"p": second}, wrong)
    assert (third.versions, third.reason) == ({}, "node 'n': model 'm' was unloaded")


def test_a_pipeline_replaces_a_model_of_the_same_name():
    models = {"m": Entry({1: FakeModel()})}
    entry = assemble(models, {"p": Entry({1: FakeModel("p")})})
    assert entry.kind == "pipeline"
    assert entry.versions[1].dependencies == tuple(models["m"].versions.values())


def assemble_node(directory, previous=None, file="node.py"):
    """Assemble the pipeline p with a node of a file."""
    libraries = {"own": Library("own", file, directory)}
    return assemble({}, {"p": previous} if previous else {}, definition(library="own"), libraries)


def test_a_library_is_loaded_again_only_after_it_has_changed(tmp_path):
    file = tmp_path / "node.py"
    file.write_text(PYTHON_NODE)
    first = assemble_node(tmp_path)
    assert first.versions
    assert assemble_node(tmp_path, first) is first
    file.write_text(PYTHON_NODE + "\n")
    second = assemble_node(tmp_path, first)
    assert second.versions[1] is not first.versions[1]
    file.write_text("garbage")
    third = assemble_node(tmp_path, second)
    assert third.versions == second.versions
    assert third.failures[1].startswith("node 'n': library 'own': ")


def test_a_library_is_loaded_again_after_a_module_beside_it_has_changed(tmp_path):
    """Also after a change of the same size in the same second, which Python's bytecode cache misses."""
    file = tmp_path / "helper.py"
    file.write_text("WIDTH = 2\n")
    os.utime(file, ns=(10**18, 10**18))
    (tmp_path / "node.py").write_text("from helper import WIDTH\n" + PYTHON_NODE.replace("[1, 2]", "[1, WIDTH]"))
    first = assemble_node(tmp_path)
    assert first.versions[1].metadata.inputs["in"].static_shape == (1, 2)
    file.write_text("WIDTH = 3\n")
    os.utime(file, ns=(10**18 + 1, 10**18 + 1))
    assert assemble_node(tmp_path, first).versions[1].metadata.inputs["in"].static_shape == (1, 3)


def test_an_unknown_library_is_reported():
    entry = assemble({}, pipeline=definition(library="own"))
    assert entry.reason == "node 'n': library 'own' is not in custom_node_library_config_list"


@pytest.mark.parametrize(
    ("base_path", "is_there"),
    [
        ("absent.py", False),
        ("absent.so", False),
        ("no_such_module_anywhere", False),
        ("no_such_module_anywhere.part:Node", False),
        ("node.py", True),
        ("libcustom_node_add_one.so", True),
        ("json", True),
        ("ovms_rest.pipelines.nodes.add_one", True),
    ],
)
def test_an_unused_library_without_code_is_a_warning(tmp_path, caplog, base_path, is_there):
    """Its code is not loaded: the file would end the process."""
    (tmp_path / "node.py").write_text("import os; os._exit(1)")
    libraries = {"own": Library("own", base_path, tmp_path)}
    assemble({"m": Entry({1: FakeModel()})}, libraries=libraries)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (0 if is_there else 1)
    assert is_there or warnings[0].startswith("library 'own', which no pipeline uses: there is no file ")


def test_a_broken_library_is_loaded_again_at_the_next_load(tmp_path):
    first = assemble_node(tmp_path)
    assert first.versions == {}
    (tmp_path / "node.py").write_text(PYTHON_NODE)
    assert assemble_node(tmp_path, first).versions


@pytest.mark.parametrize(
    ("models", "is_ready"),
    [
        ({"m": Entry(ended=(1,))}, True),
        ({"m": Entry(reason="has no versions")}, False),
        ({"other": Entry(ended=(1,))}, False),
    ],
)
def test_a_pipeline_that_lacks_only_unloaded_models_does_not_make_the_service_unready(models, is_ready):
    registry = ModelRegistry({"p": assemble(models)})
    if is_ready:
        registry.check_ready()
    else:
        with pytest.raises(NotReadyError, match="pipeline 'p' does not serve"):
            registry.check_ready()


def test_a_library_that_is_being_written_is_marked_as_changing(tmp_path, monkeypatch):
    monkeypatch.setattr("ovms_rest.models.copies._PATIENCE_SECONDS", 0.1)
    file = tmp_path / "node.so"
    file.write_text("garbage")
    with file.open("r+b"):
        entry = assemble_node(tmp_path, file="node.so")
    assert (entry.is_changing, entry.versions) == (True, {})
    assert f"library 'own': {file}: {file} is open for writing in another process" in entry.reason
    entry = assemble_node(tmp_path, entry, "node.so")
    assert not entry.is_changing
    assert "cannot be opened" in entry.reason
