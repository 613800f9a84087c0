"""Requests of TensorFlow Serving's API, in the row and the column form.

The input: a byte that chooses the model, two unused bytes, and the JSON.
"""

import json
import math
from typing import Any

from fuzz_json import make_mutator
from fuzz_oracles import Failure, attempt, flatten, pack_numbers
from wire_cases import fingerprint

from ovms_rest.protocol.tensors import Dim, ImageDecoder, ImageSize, ModelMetadata, TensorMetadata
from ovms_rest.protocol.tfs import decode_prediction
from ovms_rest.protocol.validation import validate_inputs

ANY = Dim(0, None)
KEYS = ["instances", "inputs", "signature_name", "b64", "x", "y"]
TOKENS = [b"NaN", b"Infinity", b"-Infinity", *(f'"{key}"'.encode() for key in KEYS)]
mutate = make_mutator(
    3, [*KEYS, "a\nb"], [[], {}, {"b64": "aGk="}, {"x": [1.5]}, {"y": "a"}, [[1], [2]], math.nan, math.inf, [[[]]]]
)


class _Images(ImageDecoder):
    """Stands for the decoder of an input that takes images; decoding does not call it."""

    expected = ImageSize(1, 1, 3)


def _model(**inputs: tuple[str, int]) -> ModelMetadata:
    tensors = {name: TensorMetadata(name, kind, (ANY,) * rank) for name, (kind, rank) in inputs.items()}
    return ModelMetadata("m", "1", tensors, {})


_MODELS = (
    _model(x=("FP32", 2)),
    _model(x=("BYTES", 1)),
    _model(x=("UINT8", 2)),
    _model(x=("INT64", 1)),
    _model(x=("BF16", 1)),
    _model(x=("FP16", 1), y=("BYTES", 1)),
    _model(x=("BOOL", 1)),
    ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", (ANY,) * 4, images=_Images())}, {}),
)


def seeds() -> list[bytes]:
    """Return requests of both forms for every model."""
    roots = [
        {"instances": [1.5, 2]},
        {"instances": [[1, 2], [3, 4]]},
        {"instances": [[[1, 2]], [[3, 4]]], "signature_name": "serving_default"},
        {"instances": ["a", {"b64": "aGk="}]},
        {"instances": [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]},
        {"instances": [{"b64": "aGk="}]},
        {"instances": [True, False]},
        {"inputs": [[1, 2], [3, 4]]},
        {"inputs": {"x": [1, 2], "y": ["a", "b"]}},
        {"inputs": {"x": [[0.5] * 40] * 2}},
        {"inputs": {"b64": "aGk="}},
        {"inputs": [math.nan, -math.inf]},
        {"inputs": 2**63},
    ]
    return [bytes([number, 255, 255]) + json.dumps(root).encode() for number in range(8) for root in roots]


def check(data: bytes) -> None:
    """Decode by both parsers, and compare the elements with those that Python's parser finds."""
    if len(data) < 3:
        return
    model, body = _MODELS[data[0] % len(_MODELS)], memoryview(data[3:])
    request = attempt(decode_prediction, body, model, large_size=2**31)
    other = attempt(decode_prediction, body, model, large_size=0)
    assert _comparable(request) == _comparable(other), "simdjson and orjson differ"
    if isinstance(request, Failure):
        return
    root = json.loads(bytes(body))
    for tensor in request.inputs:
        if tensor.datatype != "BYTES":
            elements = flatten(_find(root, tensor.name, len(model.inputs)))
            if not any(isinstance(element, float) and not math.isfinite(element) for element in elements):
                assert tensor.array.tobytes() == pack_numbers(elements, tensor.datatype), "numbers differ"
    if model.inputs["x"].images is None:
        attempt(validate_inputs, request, model)


def _find(root: Any, name: str, inputs: int) -> Any:
    """Return the values of a tensor in a request that was decoded."""
    values = root["instances"] if request_is_rows(root) else root["inputs"]
    if request_is_rows(root) and type(values[0]) is dict:
        return [row[name] for row in values]
    return values[name] if type(values) is dict else values


def request_is_rows(root: Any) -> bool:
    """Return whether a request has the row form."""
    return "instances" in root


def _comparable(request: Any) -> Any:
    if isinstance(request, Failure):
        return request
    return [(tensor.name, tensor.datatype, fingerprint(tensor.array)) for tensor in request.inputs], request.is_rows
