"""Example requests: what a client can send to a model or pipeline as it is, for the description of the API.

They come from the inputs that a servable has computed before it serves (`Servable.example`), or from a file that the
configuration names. They are small: the description has one for every version.
"""

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ovms_rest.errors import InvalidRequestError, LoadError
from ovms_rest.log import log
from ovms_rest.models.repository import read_file
from ovms_rest.protocol.datatypes import BYTES, DATATYPES
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.protocol.words import explain_invalid_json

# Limits of the JSON of a generated example, and of one from a file.
MAX_GENERATED_BYTES = 4096
MAX_FILE_BYTES = 65_536
# An array with more elements is not written as numbers, which would exceed the limit.
_MOST_ELEMENTS = MAX_GENERATED_BYTES // 2

Request = dict[str, Any]


def make_constant(datatype: str, shape: tuple[int, ...], value: int) -> Array:
    """Return an array of equal elements, which takes no memory for each; strings are empty."""
    if datatype == BYTES:
        return BytesArray(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(0, np.uint8))
    return np.broadcast_to(np.asarray(value).astype(DATATYPES[datatype].dtype), shape)


def read_example(file: Path) -> Request:
    """Read the example of a model or pipeline, an inference request in JSON. Raises LoadError."""
    content = read_file(file, MAX_FILE_BYTES)
    try:
        request = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise LoadError(f"{file} is not valid JSON: {explain_invalid_json(content, error)}") from error
    if type(request) is not dict:
        raise LoadError(f"{file} is not a JSON object with an inference request")
    return request


def find_example(owner: str, file: Path | None) -> Request | None:
    """Return the example in the file that the configuration of a model or pipeline names, None if it is not usable."""
    if file is None:
        return None
    try:
        return read_example(file)
    except LoadError as error:
        log.warning("%s: its example is left out: %s", owner, error)
        return None


def check_example(request: Request, metadata: ModelMetadata) -> dict[str, Array]:
    """Return the arrays of an example by input. Raises InvalidRequestError unless it fits the inputs and outputs."""
    decoded = decode_request(memoryview(bytearray(orjson.dumps(request))), model=metadata)
    validate_outputs(decoded, metadata)
    return validate_inputs(decoded, metadata)


def encode_example(metadata: ModelMetadata, arrays: Mapping[str, Array]) -> Request | None:
    """Return a request with these inputs in JSON, None if it cannot be written within the limit.

    An input that is too large for numbers and takes encoded images is a small picture.
    """
    inputs = []
    for port in metadata.inputs.values():
        array = arrays[port.name]
        item = _encode_numbers(port, array)
        if item is None or len(orjson.dumps(item)) > MAX_GENERATED_BYTES:
            item = _encode_images(port, array)
        if item is None:
            return None
        inputs.append(item)
    request = {"inputs": inputs}
    if len(orjson.dumps(request)) > MAX_GENERATED_BYTES:
        return None
    try:
        check_example(request, metadata)
    except InvalidRequestError:  # such as a picture of a size that the model does not take
        return None
    return request


def encode_zeros(metadata: ModelMetadata, arrays: Mapping[str, Array]) -> tuple[bytes, int] | None:
    """Return JSON for these inputs and how many bytes of zeros follow it, as the data of inputs too large for JSON.

    Return None if such an input has other elements.
    """
    inputs, size = [], 0
    for port in metadata.inputs.values():
        array = arrays[port.name]
        item = _encode_numbers(port, array)
        if item is None or len(orjson.dumps(item)) > MAX_GENERATED_BYTES:
            if isinstance(array, BytesArray) or any(array.strides) or array.reshape(-1)[0]:
                return None
            item = {"name": port.name, "datatype": port.datatype, "shape": list(array.shape)}
            size += array.nbytes
        inputs.append(item)
    head = orjson.dumps({"inputs": inputs})
    return (head, size) if len(head) <= MAX_GENERATED_BYTES else None


def _encode_numbers(port: TensorMetadata, array: Array) -> Request | None:
    """Return an input with its elements in JSON, None if there are too many or JSON cannot represent them."""
    if math.prod(array.shape) > _MOST_ELEMENTS:
        return None
    data: list[Any]
    if isinstance(array, BytesArray):
        data = list(map(_encode_string, array.elements()))
    else:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return None
        data = DATATYPES[port.datatype].widen(array.reshape(-1)).tolist()
    return _input(port.name, BYTES if isinstance(array, BytesArray) else port.datatype, array.shape, data)


def _encode_images(port: TensorMetadata, array: Array) -> Request | None:
    """Return an input with a PNG for each image of an array, None if the input takes none."""
    if port.images is None or isinstance(array, BytesArray):
        return None
    files = port.images.draw(array)
    if files is None:
        return None
    return _input(port.name, BYTES, (len(files),), [{"b64": base64.b64encode(file).decode()} for file in files])


def _encode_string(element: bytes) -> str | dict[str, str]:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(element).decode()}


def _input(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> Request:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}
