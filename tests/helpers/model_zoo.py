"""Small models built in code and saved in version directories."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from service import write_config

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino
from openvino import PartialShape, Type, opset5, opset15
from openvino.op.util import Variable, VariableInfo

# OpenVINO's types by the datatypes of the protocol.
ELEMENT_TYPES = {
    "BOOL": Type.boolean,
    "INT8": Type.i8,
    "INT16": Type.i16,
    "INT32": Type.i32,
    "INT64": Type.i64,
    "UINT8": Type.u8,
    "UINT16": Type.u16,
    "UINT32": Type.u32,
    "UINT64": Type.u64,
    "FP16": Type.f16,
    "BF16": Type.bf16,
    "FP32": Type.f32,
    "FP64": Type.f64,
}


def parameter(name, shape, element_type):
    node = opset15.parameter(PartialShape(shape), element_type, name=name)
    node.output(0).set_names({name})
    return node


def model_of(outputs, inputs):
    """Return a model with these outputs by name."""
    for name, node in outputs.items():
        node.output(0).set_names({name})
    return openvino.Model([opset15.result(node) for node in outputs.values()], inputs, "model")


def relu(shape=(-1, 4), element_type=Type.f32):
    """Return a model x -> y of the same shape, where negative numbers become 0."""
    x = parameter("x", shape, element_type)
    return model_of({"y": opset15.relu(x)}, [x])


def product():
    """Return a model that fails when its inputs do not fit each other: left, right FP32 [-1,-1] -> product."""
    left, right = parameter("left", (-1, -1), Type.f32), parameter("right", (-1, -1), Type.f32)
    return model_of({"product": opset15.matmul(left, right, transpose_a=False, transpose_b=False)}, [left, right])


def add(shape=(1, 3)):
    """Return a model of two inputs, left, right FP32 -> sum, difference."""
    left, right = parameter("left", shape, Type.f32), parameter("right", shape, Type.f32)
    return model_of({"sum": opset15.add(left, right), "difference": opset15.subtract(left, right)}, [right, left])


def split(size=6):
    """Return a model x FP32 [size], lengths INT64 [2] -> first, second; the lengths must add up to size."""
    x, lengths = parameter("x", (size,), Type.f32), parameter("lengths", (2,), Type.i64)
    node = opset15.variadic_split(x, opset15.constant(0), lengths)
    return model_of({"first": opset15.relu(node.output(0)), "second": opset15.relu(node.output(1))}, [x, lengths])


def passthrough(**tensors):
    """Return a model whose tensors name=(element type, shape) are inputs and outputs of the same name.

    With a node in between, the CPU plugin would compute 64-bit types in narrower ones.
    """
    inputs = [parameter(name, shape, element_type) for name, (element_type, shape) in tensors.items()]
    return openvino.Model([opset15.result(node) for node in inputs], inputs, "model")


def strings(shape=(-1,)):
    """Return a model text BYTES -> text BYTES, unchanged."""
    return passthrough(text=(Type.string, shape))


def matrix(shape=(-1, -1), output="rows_string"):
    """Return a model rows UINT8 [n,width] -> the same, named `output`."""
    rows = parameter("rows", shape, Type.u8)
    return model_of({output: opset15.reshape(rows, opset15.shape_of(rows), special_zero=False)}, [rows])


def reshaping(columns=None):
    """Return a model whose values must fit its shapes: x FP32 [n], dims INT64 [2] -> y = relu(x) in the shape dims."""
    x, dims = parameter("x", (-1,), Type.f32), parameter("dims", (2,), Type.i64)
    y = opset15.reshape(opset15.relu(x), dims, special_zero=False)
    if columns:
        y = opset15.concat([y, opset15.constant(np.ones((1, columns), np.float32))], 0)
    return model_of({"y": y}, [x, dims])


def accumulating(shape=(-1, 2)):
    """Return a model with state: y = state = concat(state, x)."""
    x = parameter("x", shape, Type.f32)
    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = PartialShape([-1, 2]), Type.f32, "state"
    variable = Variable(info)
    before = openvino.op.read_value(opset15.constant(np.zeros((0, 2), np.float32)), variable)
    after = opset15.concat([before, x], 0)
    after.output(0).set_names({"y"})
    return openvino.Model([opset15.result(after)], [openvino.op.assign(after, variable)], [x], "accumulating")


def totals():
    """Return the sum of all rows in each row, x FP32 [-1,4] -> y of the same shape."""
    x = parameter("x", (-1, 4), Type.f32)
    total = opset15.reduce_sum(x, opset15.constant([0]), keep_dims=True)
    return model_of({"y": opset15.add(opset15.subtract(x, x), total)}, [x])


def cutting():
    """Return rows cut in two, x FP32 [-1,4] -> y FP32 [-1,2]."""
    x = parameter("x", (-1, 4), Type.f32)
    return model_of({"y": opset15.reshape(opset15.relu(x), opset15.constant([-1, 2]), False)}, [x])


def endless():
    """Return a model that compiles but never finishes its first inference: a loop of 2**62 steps."""
    x = parameter("x", (1,), Type.f32)
    value = opset15.parameter((1,), Type.f32)
    more = opset15.constant(True)
    step = opset15.add(value, opset15.constant(np.float32([1])))
    body = openvino.Model([opset15.result(step), opset15.result(more)], [value], "body")
    loop = opset5.loop(opset15.constant(np.int64(2**62)), opset15.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    result = body.get_results()[0]
    loop.set_merged_input(value, x.output(0), result.input_value(0))
    return openvino.Model([opset15.result(loop.get_iter_value(result.output(0), -1))], [x], "endless")


def save(model, base_path: Path, version=1) -> Path:
    """Write a model as IR in a version directory; return base_path."""
    directory = base_path / str(version)
    directory.mkdir(parents=True)
    openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
    return base_path


def save_all(directory: Path, models, keys: Callable[[str], dict] = lambda name: {}, **sections) -> Path:
    """Save models by name; return a config that serves them, with further keys for each."""
    for name, model in models.items():
        save(model, directory / name)
    return write_config(directory, *({"name": name, "base_path": name, **keys(name)} for name in models), **sections)


def save_onnx_add_one(base_path: Path) -> Path:
    """Write x FP32 [-1,2] -> y = x + 1 as ONNX; return base_path."""
    from onnx import TensorProto, helper, save

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "add_one", [x], [y], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (base_path / "1").mkdir(parents=True)
    save(model, base_path / "1" / "add_one.onnx")
    return base_path


def save_crashing(base_path: Path) -> Path:
    """Write an IR with rt_info nested too deep for OpenVINO's stack, which ends the process that reads it."""
    save(relu(), base_path)
    file = base_path / "1" / "model.xml"
    text = file.read_text()
    depth = 200_000
    nested = f"<rt_info><model_info>{'<a>' * depth}{'</a>' * depth}</model_info></rt_info></net>"
    file.write_text(text[: text.rindex("<rt_info")] + nested)
    return base_path


def resnet50(seed=0):
    """Return ResNet-50 with random weights: image FP32 [1,3,224,224] -> scores FP32 [1,1000]; 25.5 million weights."""
    random = np.random.default_rng(seed)

    def convolve(data, channels_in, channels_out, size, stride):
        weights = random.standard_normal((channels_out, channels_in, size, size), np.float32)
        weights *= np.sqrt(2 / (channels_in * size * size), dtype=np.float32)
        pad = size // 2
        product = opset15.convolution(data, opset15.constant(weights), [stride, stride], [pad, pad], [pad, pad], [1, 1])
        return opset15.add(product, opset15.constant(np.zeros((1, channels_out, 1, 1), np.float32)))

    image = parameter("image", (1, 3, 224, 224), Type.f32)
    data = opset15.relu(convolve(image, 3, 64, 7, 2))
    data = opset15.max_pool(data, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            branch = opset15.relu(convolve(data, channels, width, 1, 1))
            branch = opset15.relu(convolve(branch, width, width, 3, stride))
            branch = convolve(branch, width, width * 4, 1, 1)
            shortcut = convolve(data, channels, width * 4, 1, stride) if block == 0 else data
            data, channels = opset15.relu(opset15.add(branch, shortcut)), width * 4
    pooled = opset15.reduce_mean(data, opset15.constant(np.int64([2, 3])), keep_dims=False)
    weights = random.standard_normal((2048, 1000), np.float32) * np.float32(0.02)
    scores = opset15.matmul(pooled, opset15.constant(weights), transpose_a=False, transpose_b=False)
    return model_of({"scores": scores}, [image])
