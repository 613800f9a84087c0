"""Recovery from failed inferences, of models that are functions."""

import numpy as np
import pytest

from ovms_rest.models.recovery import Recovery, fill
from ovms_rest.protocol.tensors import Dim, Tensor, TensorMetadata

X = TensorMetadata("x", "FP32", (Dim(0, None), Dim(3, 3)))


class FakeModel:
    """A model that doubles x, unless it fails at a number of rows or is damaged."""

    def __init__(self, failing=()):
        self.failing = failing
        self.factor = 2
        self.rows = []

    def infer(self, arrays):
        self.rows.append(len(arrays["x"]))
        if len(arrays["x"]) in self.failing:
            raise RuntimeError("fails")
        return {"y": Tensor("y", "FP32", arrays["x"] * np.float32(self.factor))}


def make(model, *trials):
    return Recovery([X], [{"x": shape} for shape in trials], lambda shapes: None, model.infer)


def keep(recovery, model, rows):
    arrays = {"x": np.ones((rows, 3), np.float32)}
    recovery.keep(arrays, model.infer(arrays))


def test_model_recovers_by_an_example_of_another_shape():
    model = FakeModel()
    recovery = make(model)
    keep(recovery, model, 2)
    keep(recovery, model, 4)
    assert recovery.recover({"x": (9, 3)})
    assert model.rows[2] == 2
    assert recovery.is_sane()


def test_model_recovers_by_a_shape_of_its_trials():
    model = FakeModel()
    recovery = make(model, (5, 3))
    assert recovery.recover({"x": (9, 3)})
    assert recovery.last == ((5, 3),)


def test_model_that_fails_at_everything_does_not_recover():
    model = FakeModel(failing=range(1000))
    assert not make(model, (5, 3)).recover({"x": (9, 3)})
    assert 0 < len(model.rows) <= 16


def test_model_with_other_outputs_than_before_is_not_sane():
    model = FakeModel()
    recovery = make(model)
    assert recovery.is_sane()
    keep(recovery, model, 2)
    assert recovery.is_sane()
    model.factor = 3
    assert not recovery.is_sane()
    assert not recovery.recover({"x": (9, 3)})


@pytest.mark.parametrize(("shape", "differs"), [((4, 3), True), ((2, 3), False), ((4,), False)])
def test_shape_differs_from_the_last_in_all_dynamic_dims(shape, differs):
    model = FakeModel()
    recovery = make(model)
    keep(recovery, model, 2)
    assert recovery.differs_from_last({"x": shape}) == differs


def test_integers_are_first_filled_with_1_and_others_with_0():
    count = TensorMetadata("n", "INT64", (Dim(1, 1),))
    text = TensorMetadata("s", "BYTES", (Dim(2, 2),))
    filled = list(fill([X, count, text], {"x": (1, 3), "n": (1,), "s": (2,)}))
    assert [(each["x"].max(), each["n"].tolist()) for each in filled] == [(0, [1]), (0, [0]), (1, [1])]
    assert filled[0]["s"].elements() == [b"", b""]
