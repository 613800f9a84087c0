"""Rehearsals of pipelines: the inputs that are tried, and the choice of those that are computed."""

import itertools

import numpy as np

from ovms_rest.errors import InferenceError, NoContentError
from ovms_rest.models.registry import Entry
from ovms_rest.models.servable import NOT_COUNTED
from ovms_rest.pipelines import rehearsal
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.plan import REQUEST_STEP, ModelPart, Output, Plan, Step, Wire
from ovms_rest.pipelines.rehearsal import choose_inputs, find_computable, rehearse_pipelines
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata


def tensor(name, *sizes, datatype="FP32"):
    return TensorMetadata(name, datatype, tuple(Dim(0, None) if size == -1 else Dim(size, size) for size in sizes))


class FakeModel:
    """A model x -> y = x whose inference may raise an error chosen by the first element."""

    batch_limit = 0

    def __init__(self, *sizes, example=None, errors=None):
        self.metadata = ModelMetadata("m", "1", {"x": tensor("x", *sizes)}, {"y": tensor("y", *sizes)})
        self.counters = object()
        self.example = example
        self.errors = errors or {}
        self.is_open = False

    def open(self, retire):
        self.is_open = True

    def infer(self, arrays, record=None):
        x = arrays["x"]
        if error := self.errors.get(float(x.flat[0])):
            raise error
        x[...] = -1  # its own copy
        return {"y": Tensor("y", "FP32", x)}


def pipeline_of(model, *sizes, count=None):
    """Return a pipeline that runs one model; `sizes` are those of its input."""
    metadata = ModelMetadata("p", "1", {"in": tensor("in", *sizes)}, {"out": tensor("out", *sizes)})
    level = () if count is None else (REQUEST_STEP,)
    step = Step("n", ModelPart(model), (Wire("x", REQUEST_STEP, "in"),), level, used=("y",))
    return Pipeline(Plan(metadata, (step,), (Output("out", 0, "y"),), count))


def constants(*values):
    return [{"in": np.full((1, 2), value, np.float32)} for value in values]


# --- Inputs


def test_the_inputs_that_a_model_has_computed_come_first():
    example = {"x": np.full((7, 2), 3, np.float32)}
    first = next(choose_inputs(pipeline_of(FakeModel(-1, 2, example=example), -1, 2).plan))
    assert first["in"] is example["x"]


def test_inputs_of_a_demultiplexed_request_have_a_shard_for_each_session():
    example = {"x": np.full((1, 2), 3, np.float32)}
    first = next(choose_inputs(pipeline_of(FakeModel(1, 2, example=example), 4, 1, 2, count=4).plan))
    assert np.array_equal(first["in"], np.full((4, 1, 2), 3))


def test_an_example_of_a_model_that_does_not_fit_the_pipeline_is_not_used():
    example = {"x": np.full((7, 2), 3, np.float32)}
    first = next(choose_inputs(pipeline_of(FakeModel(-1, 2, example=example), 1, 2).plan))
    assert first["in"].shape == (1, 2)


def test_generated_inputs_have_several_shapes_and_values():
    found = list(choose_inputs(pipeline_of(FakeModel(1, -1, -1, 3), 1, -1, -1, 3).plan))
    shapes = [arrays["in"].shape for arrays in found]
    assert shapes[0] == (1, 1, 1, 3)
    assert (1, 224, 224, 3) in shapes
    assert {float(arrays["in"].flat[0]) for arrays in found} == {0, 1}


def test_large_inputs_are_not_generated():
    plan = pipeline_of(FakeModel(-1, -1, -1, -1), -1, -1, -1, -1).plan
    assert max(arrays["in"].size for arrays in choose_inputs(plan)) <= 2**22


# --- The choice


def test_the_first_inputs_that_are_computed_are_chosen():
    model = FakeModel(1, 2, errors={0: InferenceError("x"), 1: NoContentError("x")})
    pipeline = pipeline_of(model, 1, 2)
    candidates = constants(0, 1, 2, 3)
    assert find_computable(pipeline, candidates) == 2
    assert model.is_open
    assert model.counters is NOT_COUNTED
    assert [arrays["in"].flat[0] for arrays in candidates] == [0, 1, 2, 3]


def test_inputs_without_shards_are_chosen_if_no_others_are_computed():
    model = FakeModel(1, 2, errors={0: InferenceError("x"), 1: NoContentError("x")})
    assert find_computable(pipeline_of(model, 1, 2), constants(0, 1)) == 1


def test_no_inputs_are_chosen_if_none_is_computed():
    model = FakeModel(1, 2, errors={0: InferenceError("x")})
    assert find_computable(pipeline_of(model, 1, 2), constants(0, 0)) == 2


def test_a_pipeline_is_rehearsed_once(monkeypatch):
    calls = itertools.count()

    def run(work, seconds, stop):
        next(calls)
        return work()

    monkeypatch.setattr(rehearsal, "run_forked", run)
    monkeypatch.setattr(rehearsal, "_is_shared", lambda model: True)
    pipeline = pipeline_of(FakeModel(1, 2), 1, 2)
    entries = {"p": Entry({1: pipeline}, kind="pipeline")}
    assert rehearse_pipelines(entries) is entries
    rehearse_pipelines(entries)
    assert pipeline.example["in"].shape == (1, 2)
    assert next(calls) == 1


def test_a_pipeline_of_models_that_a_fork_would_compile_is_not_rehearsed(monkeypatch):
    monkeypatch.setattr(rehearsal, "run_forked", lambda work, seconds, stop: 0)
    pipeline = pipeline_of(FakeModel(1, 2), 1, 2)
    rehearse_pipelines({"p": Entry({1: pipeline}, kind="pipeline")})
    assert pipeline.example is None
