"""A Tile with computed repeats is correct for every rank and never returns old memory."""

import itertools

import model_zoo
import numpy as np
import openvino
import pytest
from opened_models import open_model
from openvino import Type, opset8, opset15


def tile(shape, count):
    """Make x FP32, repeats INT64 [count] -> y."""
    x, repeats = model_zoo.parameter("x", shape, Type.f32), model_zoo.parameter("repeats", (count,), Type.i64)
    return model_zoo.model_of({"y": opset15.tile(x, repeats)}, [x, repeats])


def check(model, size, repeats):
    x = np.arange(np.prod(size), dtype=np.float32).reshape(size) + 1
    response = model.infer({"x": x, "repeats": np.array(repeats, np.int64)})["y"].array
    np.testing.assert_array_equal(response, np.tile(x, repeats))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (-1, -1, -1, -1), (1, 3, 1, 5)])
def test_every_combination_of_four_repeats_is_correct(shape, tmp_path):
    model = open_model(tile(shape, 4), tmp_path)
    size = [2 if dim == -1 else dim for dim in shape]
    for repeats in itertools.product((1, 2), repeat=4):
        check(model, size, repeats)
    check(model, size, (3, 2, 5, 2))
    check(model, size, (2, 2, 0, 2))


@pytest.mark.parametrize(
    ("size", "repeats"),
    [
        ((2, 3, 2, 3, 2), (2, 3, 2, 2, 3)),
        ((2, 2, 2, 2, 2, 2, 2), (2, 2, 2, 2, 2, 2, 2)),
        ((2, 3, 4, 5), (2, 3, 2)),
        ((2, 3, 4, 5, 6), (2, 3)),
        ((2, 3, 4), (2, 3, 2)),
        ((2, 3, 4), (2, 3, 2, 2, 3)),
        ((2, 3, 4, 5), (2, 3, 2, 2, 3)),
        ((5,), (2, 3, 2, 2, 3)),
    ],
)
def test_more_and_fewer_repeats_than_dims_are_correct(size, repeats, tmp_path):
    check(open_model(tile([-1] * len(size), len(repeats)), tmp_path), size, repeats)


def test_tile_within_a_branch_is_correct(tmp_path):
    x, repeats = model_zoo.parameter("x", (2, 3, 4, 5), Type.f32), model_zoo.parameter("repeats", (4,), Type.i64)
    yes = model_zoo.parameter("yes", (), Type.boolean)
    bodies = []
    for scale in (1, 2):
        data, counts = opset15.parameter((2, 3, 4, 5), Type.f32), opset15.parameter((4,), Type.i64)
        scaled = opset15.multiply(opset15.tile(data, counts), opset15.constant(np.float32(scale)))
        bodies.append(openvino.Model([opset15.result(scaled)], [data, counts], "body"))
    node = opset8.if_op(yes.output(0))
    node.set_then_body(bodies[0])
    node.set_else_body(bodies[1])
    node.set_input(x.output(0), *(body.get_parameters()[0] for body in bodies))
    node.set_input(repeats.output(0), *(body.get_parameters()[1] for body in bodies))
    output = node.set_output(*(body.get_results()[0] for body in bodies))
    model = open_model(model_zoo.model_of({"y": output.get_node()}, [x, repeats, yes]), tmp_path)
    array = np.random.default_rng(1).random((2, 3, 4, 5), np.float32)
    for choice, scale in ((True, 1), (False, 2)):
        arrays = {"x": array, "repeats": np.array([2, 2, 2, 2], np.int64), "yes": np.array(choice)}
        np.testing.assert_array_equal(model.infer(arrays)["y"].array, np.tile(array, (2, 2, 2, 2)) * np.float32(scale))
