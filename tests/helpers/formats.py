"""The formats of models that OpenVINO reads, each as a small model written byte by byte: x FP32 [-1,4] -> y = relu(x).

TensorFlow, TensorFlow Lite and PaddlePaddle are not needed: their files are protobuf messages and a FlatBuffer, and
this module writes the parts that a relu needs. The numbers of fields are those of the formats' schemas:
tensorflow/core/framework/graph.proto and protobuf/saved_model.proto, paddle/fluid/framework/framework.proto,
tensorflow/lite/schema/schema.fbs.
"""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from model_zoo import relu, save


class Written(NamedTuple):
    """A version on disk: the path that OpenVINO reads, and the names of its input and output."""

    model: Path
    input: str = "x"
    output: str = "y"


def _write(directory: Path, name: str, data: bytes = b"") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)
    return directory / name


def write_ir(directory: Path) -> Written:
    save(relu(), directory.parent, directory.name)
    return Written(directory / "model.xml")


# --- ONNX


def write_onnx(directory: Path, external: bool = False) -> Written:
    """Write y = relu(x), or y = relu(x * w) where w is ones in an external file."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx import save as save_onnx

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    nodes, weights, options = [helper.make_node("Relu", ["x"], ["y"])], [], {}
    if external:
        weights = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
        nodes = [helper.make_node("Mul", ["x", "w"], ["product"]), helper.make_node("Relu", ["product"], ["y"])]
        options = {"save_as_external_data": True, "location": "relu.weights", "size_threshold": 0}
    graph = helper.make_graph(nodes, "relu", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    directory.mkdir(parents=True)
    save_onnx(model, directory / "relu.onnx", **options)
    return Written(directory / "relu.onnx")


write_onnx_with_external_data = partial(write_onnx, external=True)

# --- Protobuf: a message is a sequence of fields, each a key of number and wire type followed by the value


def varint(value: int) -> bytes:
    """Encode an integer like protobuf, negative ones as 64 bits."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Encode a message of fields (number, value); bytes are a nested message."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            encoded += varint(number << 3 | 2) + varint(len(data)) + data
    return encoded


# --- TensorFlow

_DT_FLOAT = 1


def write_tensorflow_frozen_graph(directory: Path) -> Written:
    return Written(_write(directory, "frozen.pb", _graph_def()), "x:0", "y:0")


def write_tensorflow_saved_model(directory: Path) -> Written:
    """Write a SavedModel without variables, with the other files and folders that TensorFlow writes."""
    shape = message((2, message((1, -1))), (2, message((1, 4))))
    x, y = (message((1, f"{name}:0"), (2, _DT_FLOAT), (3, shape)) for name in "xy")
    signature = message(
        (1, message((1, "x"), (2, x))), (2, message((1, "y"), (2, y))), (3, "tensorflow/serving/predict")
    )
    graph = message((1, message((4, "serve"))), (2, _graph_def()), (5, message((1, "serving_default"), (2, signature))))
    for name in ("assets", "variables"):
        (directory / name).mkdir(parents=True)
    _write(directory, "fingerprint.pb", message((1, 1)))
    _write(directory, "saved_model.pb", message((1, 1), (2, graph)))
    return Written(directory)


def _graph_def() -> bytes:
    shape = message((2, message((1, -1))), (2, message((1, 4))))
    placeholder = message(
        (1, "x"),
        (2, "Placeholder"),
        (5, message((1, "dtype"), (2, message((6, _DT_FLOAT))))),
        (5, message((1, "shape"), (2, message((7, shape))))),
    )
    relu = message((1, "y"), (2, "Relu"), (3, "x"), (5, message((1, "T"), (2, message((6, _DT_FLOAT))))))
    return message((1, placeholder), (1, relu), (4, message((1, 1882))))


# --- PaddlePaddle

_FP32, _LOD_TENSOR, _FEED_MINIBATCH, _FETCH_LIST = 5, 7, 9, 10


def write_paddle(directory: Path) -> Written:
    """Write a ProgramDesc and an empty file of weights."""

    def tensor(name: str) -> bytes:
        description = message((1, _FP32), (2, -1), (2, 4))
        return message((1, name), (2, message((1, _LOD_TENSOR), (3, message((1, description))))))

    def operator(kind: str, source: tuple[str, str], target: tuple[str, str], *attributes: bytes) -> bytes:
        (read, read_from), (written, written_to) = source, target
        return message(
            (1, message((1, read), (2, read_from))),
            (2, message((1, written), (2, written_to))),
            (3, kind),
            *((4, attribute) for attribute in attributes),
        )

    column = message((1, "col"), (2, 0), (3, 0))
    block = message(
        (1, 0),
        (2, -1),
        (3, message((1, "feed"), (2, message((1, _FEED_MINIBATCH))), (3, 1))),
        (3, message((1, "fetch"), (2, message((1, _FETCH_LIST))), (3, 1))),
        (3, tensor("x")),
        (3, tensor("y")),
        (4, operator("feed", ("X", "feed"), ("Out", "x"), column)),
        (4, operator("relu", ("X", "x"), ("Out", "y"))),
        (4, operator("fetch", ("X", "y"), ("Out", "fetch"), column)),
    )
    _write(directory, "inference.pdiparams")
    return Written(_write(directory, "inference.pdmodel", message((1, block), (4, message((1, 2_006_000))))))


# --- TensorFlow Lite: a FlatBuffer of tables (dicts of fields by number), vectors (lists) and strings. All numbers are
# written with 32 bits; as they are little-endian, the first bytes are right for narrower ones as well


def flatbuffer(identifier: bytes, root: dict) -> bytes:
    """Encode a table and everything below it; every object follows the one that refers to it."""
    buffer = bytearray(struct.pack("<I4s", 0, identifier))
    _append(buffer, root, 0)
    return bytes(buffer)


def _append(buffer: bytearray, node: dict | list | str, reference: int) -> None:
    """Append an object, point the four bytes at `reference` to it, and append the objects that it refers to."""
    buffer += bytes(-len(buffer) % 4)
    fields: dict[int, Any] = {}
    if isinstance(node, str):
        head = struct.pack("<I", len(node)) + node.encode("ascii") + b"\0"
    elif isinstance(node, list):
        head, fields = struct.pack("<I", len(node)), dict(enumerate(node))
    else:
        vtable = _vtable(node)
        buffer += vtable
        head, fields = struct.pack("<i", len(vtable)), node  # the distance from the table back to its vtable
    struct.pack_into("<I", buffer, reference, len(buffer) - reference)
    buffer += head
    places = {number: len(buffer) + 4 * place for place, number in enumerate(fields)}
    for value in fields.values():
        buffer += struct.pack("<i", value if isinstance(value, int) else 0)
    for number, value in fields.items():
        if not isinstance(value, int):
            _append(buffer, value, places[number])


def _vtable(fields: dict) -> bytes:
    """Return the sizes of vtable and table, and the offset of each field in the table, 0 if it is absent."""
    slots = [0] * (max(fields, default=-1) + 1)
    for place, number in enumerate(fields):
        slots[number] = 4 + 4 * place
    slots += [0] * (len(slots) % 2)  # so that the table after it is aligned
    return struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), 4 + 4 * len(fields), *slots)


_RELU, _FLOAT32 = 19, 0


def write_tensorflow_lite(directory: Path) -> Written:
    def tensor(name: str) -> dict:
        return {0: [1, 4], 1: _FLOAT32, 2: 0, 3: name, 7: [-1, 4]}

    operator = {0: 0, 1: [0], 2: [1]}
    subgraph = {0: [tensor("x"), tensor("y")], 1: [0], 2: [1], 3: [operator], 4: "main"}
    model = {0: 3, 1: [{0: _RELU, 2: 1, 3: _RELU}], 2: [subgraph], 3: "relu", 4: [{}]}
    return Written(_write(directory, "relu.tflite", flatbuffer(b"TFL3", model)))


FORMATS: dict[str, Callable[[Path], Written]] = {
    "ir": write_ir,
    "onnx": write_onnx,
    "onnx_external_data": write_onnx_with_external_data,
    "tensorflow_frozen_graph": write_tensorflow_frozen_graph,
    "tensorflow_saved_model": write_tensorflow_saved_model,
    "tensorflow_lite": write_tensorflow_lite,
    "paddle": write_paddle,
}
