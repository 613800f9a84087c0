"""Inference requests of KServe v2: JSON, and JSON with binary tensors.

The input: a byte of options, the header length in two bytes (65535 for none), and the body.
"""

import json
from typing import Any

import numpy as np
from fuzz_json import make_mutator
from fuzz_oracles import Failure, attempt, flatten, pack_numbers, read_python
from wire_cases import CASES, fingerprint

from ovms_rest.protocol.datatypes import DATATYPE_NAMES
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.encoding import encode_response
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, InferenceRequest, InferenceResponse, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs, validate_outputs

ANY = Dim(0, None)
NO_LENGTH = 0xFFFF
MAX_LENGTH = 4096

KEYS = [
    *("id", "parameters", "inputs", "outputs", "name", "shape", "datatype", "data", "binary_data_size", "b64"),
    *("binary_data", "binary_data_output", "timeout", "priority", "classification", "shared_memory_region"),
]
TOKENS = [f'"{word}"'.encode() for word in (*KEYS, *DATATYPE_NAMES)]
mutate = make_mutator(
    3,
    [*KEYS, "x", "s", "a\nb", "k" * 99],
    [*DATATYPE_NAMES, [], {}, [[1], [2]], [1, [2]], {"b64": "aGk="}, {"name": "x"}, "s", [0], [2**20, 0], [1] * 65],
)

_MODELS = (
    None,
    ModelMetadata(
        "m",
        "1",
        {
            "s": TensorMetadata("s", "BYTES", (ANY,)),
            "u": TensorMetadata("u", "UINT8", (ANY, ANY)),
            "x": TensorMetadata("x", "FP32", (Dim(1, 4), ANY)),
        },
        {"y": TensorMetadata("y", "FP32", (ANY,))},
    ),
)


def seeds() -> list[bytes]:
    """Return requests with the tensors of the table of wire cases, in JSON and in binary, and with options."""
    made = []
    for case in CASES:
        if len(case.binary) < 400 and 2**20 not in case.shape:
            made.append(_seed(0, {"inputs": [case.input(data=case.data)]}))
            sized = case.input(parameters={"binary_data_size": len(case.binary)})
            made.append(_seed(0, {"inputs": [sized]}, case.binary))
    x = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, 4.5]]}
    u = {"name": "u", "shape": [1], "datatype": "BYTES", "data": [{"b64": "aGk="}]}
    s = {"name": "s", "shape": [2], "datatype": "BYTES"}
    outputs = [{"name": "y", "parameters": {"classification": 2, "binary_data": True}}]
    options = {"binary_data_output": True, "timeout": 1000, "priority": 1}
    made.append(_seed(1, {"id": "1", "inputs": [x, u, s], "outputs": outputs, "parameters": options}, b"\1\0\0\0a" * 2))
    rounded = {"name": "x", "shape": [2], "datatype": "BF16", "data": [1 + 2**-8 + 2**-40, 1 + 2**-8]}
    made.append(_seed(0, {"inputs": [rounded]}))
    many = {"name": "x", "shape": [2, 100], "datatype": "FP32", "data": [[0.25, 1e3]] * 100}
    return [*made, _seed(1, {"inputs": [many]}), _seed(0, {"inputs": [x], "a": [[{"b": 1}]]})]


def _seed(options: int, root: Any, binary: bytes | None = None) -> bytes:
    text = json.dumps(root).encode()
    length = NO_LENGTH if binary is None else len(text)
    return bytes([options]) + length.to_bytes(2, "little") + text + (binary or b"")


def check(data: bytes) -> None:
    """Decode by both parsers, compare with Python's, and encode and decode again."""
    if len(data) < 3:
        return
    model = _MODELS[data[0] & 1]
    length = int.from_bytes(data[1:3], "little")
    body = memoryview(bytearray(data[3:]))
    header_length = None if length == NO_LENGTH else min(length, len(body))
    request = attempt(decode_request, body, header_length, 2**31, model)
    other = attempt(decode_request, body, header_length, 0, model)
    assert _comparable(request) == _comparable(other), "simdjson and orjson differ"
    if isinstance(request, Failure):
        return
    root = read_python(bytes(body if header_length is None else body[:header_length]))
    items = root["inputs"]
    for item, tensor in zip(items, request.inputs, strict=True):
        assert tensor.name == item["name"]
        assert tensor.shape == tuple(item["shape"])
        if "data" in item and tensor.datatype == "BYTES":
            assert len(tensor.array.elements()) == len(flatten(item["data"]))
        elif "data" in item:
            assert tensor.array.tobytes() == pack_numbers(flatten(item["data"]), tensor.datatype), "numbers differ"
        else:
            _check_memory(tensor.array, body)
    _check_round_trips(request)
    if model is not None:
        attempt(validate_inputs, request, model)
        attempt(validate_outputs, request, model)


def _comparable(request: InferenceRequest | Failure) -> Any:
    if isinstance(request, Failure):
        return request
    tensors = [(tensor.name, tensor.datatype, fingerprint(tensor.array)) for tensor in request.inputs]
    return tensors, repr(request._replace(inputs=()))


def _check_memory(array: Any, body: memoryview) -> None:
    """Check that binary data are views on the body, or small copies to align them."""
    if isinstance(array, BytesArray):
        assert not array.symbols.size or np.shares_memory(array.symbols, np.frombuffer(body, np.uint8))
    else:
        assert array.nbytes <= len(body)


def _check_round_trips(request: InferenceRequest) -> None:
    """Check that the encoding of the tensors decodes to the same bits, as binary and as JSON."""
    for binary in (True, False):
        outputs = [(tensor, binary) for tensor in request.inputs]
        response = attempt(encode_response, InferenceResponse("m", "1", outputs))
        if isinstance(response, Failure):  # a string that is not UTF-8, in JSON
            assert not binary
            continue
        text, sections = response
        root = json.loads(text)
        if not binary and any(None in output["data"] for output in root["outputs"]):  # NaN or infinities
            continue
        body = json.dumps({"inputs": root["outputs"]}).encode()
        whole = memoryview(b"".join([body, *sections]))
        again = decode_request(whole, len(body))
        assert _comparable(again)[0] == _comparable(request)[0], "not the same after encoding"
