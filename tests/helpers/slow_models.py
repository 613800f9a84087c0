"""Models with inference times and response sizes set by the request."""

from pathlib import Path

import model_zoo
import numpy as np
import openvino
from openvino import Type, opset5, opset15

# Steps of `counting` that take some 50 to 100 ms of a core.
SLOW = 50_000
# Elements in the output of `wide`.
WIDE = 3_000_000


def counting():
    """Return a model that loops for the requested steps: steps INT64 [] -> count FP32 [1], the number of steps."""
    steps = model_zoo.parameter("steps", (), Type.i64)
    count = _count_to(steps)
    count.set_names({"count"})
    return openvino.Model([opset15.result(count)], [steps], "counting")


def slow_relu():
    """Return a relu that takes as many steps of a loop as its largest input: x FP32 [-1,-1] -> y of the same shape."""
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    largest = opset15.reduce_max(x, opset15.constant(np.int64([0, 1])), keep_dims=False)
    count = _count_to(opset15.convert(largest, "i64"))
    return model_zoo.model_of({"y": opset15.maximum(x, opset15.minimum(count, opset15.constant(np.float32(0))))}, [x])


def _count_to(steps):
    value = opset15.parameter((1,), Type.f32)
    body = openvino.Model(
        [opset15.result(opset15.add(value, opset15.constant(np.float32([1])))), opset15.result(opset15.constant(True))],
        [value],
        "body",
    )
    loop = opset5.loop(steps, opset15.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    result = body.get_results()[0]
    loop.set_merged_input(value, opset15.constant(np.float32([0])).output(0), result.input_value(0))
    return loop.get_iter_value(result.output(0), -1)


def filling():
    """Return a model of copies of a value: value FP32 [], size INT64 [1] -> filled FP32 [size]."""
    value, size = model_zoo.parameter("value", (), Type.f32), model_zoo.parameter("size", (1,), Type.i64)
    return model_zoo.model_of({"filled": opset15.broadcast(value, size)}, [value, size])


def wide():
    """Return a model of WIDE copies of a value, value FP32 [] -> filled FP32 [WIDE], a size known when it loads."""
    value = model_zoo.parameter("value", (), Type.f32)
    size = opset15.constant(np.int64([WIDE]))
    return model_zoo.model_of({"filled": opset15.broadcast(value, size)}, [value])


def growing():
    """Return convolutions of pictures, x FP32 [1,3,?,?] -> y FP32 [1,32]: each new size takes more memory."""
    pictures = value = model_zoo.parameter("x", (1, 3, -1, -1), Type.f32)
    generator = np.random.default_rng(0)
    for channels in (3, 32, 32):
        kernel = opset15.constant(generator.standard_normal((32, channels, 3, 3), np.float32))
        value = opset15.relu(opset15.convolution(value, kernel, [1, 1], [1, 1], [1, 1], [1, 1]))
    mean = opset15.reduce_mean(value, opset15.constant(np.int64([2, 3])), keep_dims=False)
    return model_zoo.model_of({"y": mean}, [pictures])


def count(steps: int) -> dict:
    """Return a request to `counting`."""
    return {"inputs": [{"name": "steps", "datatype": "INT64", "shape": [], "data": [steps]}]}


def fill(value: float, size: int) -> dict:
    """Return a request to `filling` for binary output."""
    return {
        "inputs": [
            {"name": "value", "datatype": "FP32", "shape": [], "data": [value]},
            {"name": "size", "datatype": "INT64", "shape": [1], "data": [size]},
        ],
        "parameters": {"binary_data_output": True},
    }


def save(directory: Path) -> Path:
    """Write relu, counting, filling and wide; return a config that serves them."""
    models = {"relu": model_zoo.relu(), "counting": counting(), "filling": filling(), "wide": wide()}
    return model_zoo.save_all(directory, models)
