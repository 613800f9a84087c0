"""Bodies that are not a request but the data of its inputs: an image, raw elements or a form.

Their Content-Type says so (protocol/README.md section 10). But clients send requests in JSON with any Content-Type, so
a body that begins like a JSON object is one, except raw elements with X-Tensor-Shape.

Every function raises only InvalidRequestError, for a mistake of the client, and BodyTooLargeError for JSON that would
take too much memory.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import orjson

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.body_forms import explain_form
from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.decoding import (
    DEFAULT_LIMITS,
    MAX_RANK,
    TextLabel,
    check_empty,
    decode_json_data,
    decode_request,
    decode_shape,
    view_strings,
)
from ovms_rest.protocol.json_memory import OBJECTS, BodyLimits, check_memory
from ovms_rest.protocol.multipart import Part, read_media_type, split_parts
from ovms_rest.protocol.raw_bodies import Source, fit_shape, read_raw, read_raw_body, shape_strings
from ovms_rest.protocol.strings import MAX_ELEMENTS
from ovms_rest.protocol.tensors import MAX_DIM, InferenceRequest, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.validation import unknown_input
from ovms_rest.protocol.words import cut, explain_invalid_json, list_names, show

JSON, OCTETS, FORM, IMAGE = "application/json", "application/octet-stream", "multipart/form-data", "image/"

# An object begins with a key or ends at once. That much of a check takes raw elements for JSON less often than a look
# at the first byte, which is "{" in every 256th body.
_OBJECT = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*(?:["}]|\Z)')
_SHAPE = re.compile(r"[0-9]{1,19}(?:[ \t]*,[ \t]*[0-9]{1,19})*")

# What a part is: one image or string, the bytes of all elements, or JSON.
_ELEMENT, _RAW, _NUMBERS = "element", "raw", "numbers"

_PART = Source("the part", "the size of the part does not determine; give the part the header 'X-Tensor-Shape: 1,...'")
_ARRAY = Source("the array", "the length of a flat array does not determine; nest it")
_BODY = Source("the body", "the size of the body does not determine; send the header 'X-Tensor-Shape: 1,...'")


def holds_json(body: memoryview, content_type: str | None, tensor_shape: str | None) -> bool:
    """Return whether a body without Inference-Header-Content-Length can be a request in JSON.

    `tensor_shape` is the header X-Tensor-Shape. False is certain; True only says that nothing else is possible.
    """
    if tensor_shape is not None and read_media_type(content_type or "") == OCTETS:
        return False
    return _OBJECT.match(body) is not None


def decode_typed_request(
    body: memoryview,
    content_type: str,
    tensor_shape: str | None,
    model: ModelMetadata,
    limits: BodyLimits = DEFAULT_LIMITS,
) -> InferenceRequest:
    """Decode a body without Inference-Header-Content-Length, by its Content-Type; `limits` as for `decode_request`."""
    kind = read_media_type(content_type)
    if not (kind in (OCTETS, FORM) or kind.startswith(IMAGE)):
        return decode_request(body, model=model, limits=limits)
    if holds_json(body, content_type, tensor_shape):
        return _decode_json(body, kind, model, limits)
    if kind == FORM:
        return InferenceRequest(_read_form(body, content_type, model, limits))
    metadata = _find_only_input(kind, model)
    if kind != OCTETS:
        return InferenceRequest((_read_image(body, kind, metadata, model),))
    if not len(body) and tensor_shape is None:
        raise InvalidRequestError(f"the body is empty, expected the data of input {metadata.name!r}")
    shape = None if tensor_shape is None else _read_shape(tensor_shape, metadata, limits)
    return InferenceRequest((read_raw_body(body, metadata, _BODY, model.name, shape),))


def _decode_json(body: memoryview, kind: str, model: ModelMetadata, limits: BodyLimits) -> InferenceRequest:
    try:
        return decode_request(body, model=model, limits=limits)
    except InvalidRequestError as error:
        if kind != OCTETS:
            raise
        raise InvalidRequestError(
            f"{error}; the body begins like JSON, and {OCTETS} that does so needs the header X-Tensor-Shape"
        ) from error


def _find_only_input(kind: str, model: ModelMetadata) -> TensorMetadata:
    if len(model.inputs) != 1:
        raise InvalidRequestError(
            f"Content-Type is {cut(kind)}, which makes the body the data of a model's only input, but model "
            f"{model.name!r} has {len(model.inputs)} inputs: {list_names(model.inputs)}; "
            f"{explain_form(model.inputs, model.name)}"
        )
    (metadata,) = model.inputs.values()
    return metadata


def _read_image(body: memoryview, kind: str, metadata: TensorMetadata, model: ModelMetadata) -> Tensor:
    if metadata.images is None and metadata.datatype != BYTES:
        raise InvalidRequestError(
            f"Content-Type is {cut(kind)}, but input {metadata.name!r} of model {model.name!r} does not take images; "
            f"it takes {metadata.datatype} of shape {metadata.describe_shape()}, for example as {OCTETS}"
        )
    return _view_elements(body, [Part(metadata.name, body, 0)], metadata)


def _read_shape(text: str, metadata: TensorMetadata, limits: BodyLimits) -> tuple[int, ...]:
    label = f"input {metadata.name!r}"
    if not _SHAPE.fullmatch(text.strip(" \t")):
        raise InvalidRequestError(
            f"{label}: X-Tensor-Shape is {show(text)}, expected integers from 0 to {MAX_DIM}, separated by commas"
        )
    shape = decode_shape({"shape": list(map(int, text.split(",")))}, label)
    check_empty(shape, metadata.datatype, limits.body, label)
    return shape


def _view_elements(body: memoryview, parts: Sequence[Part], metadata: TensorMetadata) -> Tensor:
    """Return the data of parts of a body as the elements of an input: images or strings."""
    shape = shape_strings(metadata, len(parts)) if metadata.datatype == BYTES else (len(parts),)
    begins, ends = [part.begin for part in parts], [part.begin + len(part.data) for part in parts]
    return Tensor(metadata.name, BYTES, view_strings(begins, ends, body, shape))


# --- Forms: a part is named by its input, and an input of images or strings may have several


def _read_form(body: memoryview, content_type: str, model: ModelMetadata, limits: BodyLimits) -> tuple[Tensor, ...]:
    by_name: dict[str, list[Part]] = {}
    for part in split_parts(body, content_type):
        if part.name not in model.inputs:
            raise unknown_input(part.name, model)
        by_name.setdefault(part.name, []).append(part)
    return tuple(_read_input(body, found, model.inputs[name], limits) for name, found in by_name.items())


def _read_input(body: memoryview, parts: list[Part], metadata: TensorMetadata, limits: BodyLimits) -> Tensor:
    label = f"input {metadata.name!r}"
    kinds = {_find_kind(part, metadata) for part in parts}
    if kinds == {_ELEMENT}:
        return _view_elements(body, parts, metadata)
    if len(parts) > 1:
        raise InvalidRequestError(
            f"{label} has {len(parts)} parts; only images and strings may come in several parts, one in each"
        )
    (part,) = parts
    if kinds == {_NUMBERS}:
        return _read_json(part.data, metadata, limits)
    shape = None if part.tensor_shape is None else _read_shape(part.tensor_shape, metadata, limits)
    return read_raw(part.data, metadata, _PART, shape)


def _find_kind(part: Part, metadata: TensorMetadata) -> str:
    """Return what a part is for its input."""
    if part.tensor_shape is not None:
        return _RAW
    if part.media_type == JSON:
        return _NUMBERS
    if metadata.datatype == BYTES:
        return _ELEMENT
    is_text = part.media_type.startswith("text/") if part.media_type else not part.is_file
    if is_text:
        return _NUMBERS
    return _RAW if metadata.images is None else _ELEMENT


def _read_json(data: memoryview, metadata: TensorMetadata, limits: BodyLimits) -> Tensor:
    """Read elements in JSON. A nested array gives the shape; a flat one, or a single element, fills the model's."""
    label = f"input {metadata.name!r}"
    check_memory(data, OBJECTS, limits.json_values)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f"{label}: the part is not valid JSON: {explain_invalid_json(data, error)}"
        ) from error
    elements = value if type(value) is list else [value]
    shape, count = _measure(elements, label)
    if metadata.datatype == BYTES and count > MAX_ELEMENTS:
        raise InvalidRequestError(f"{label} has {count} strings, at most {MAX_ELEMENTS} are allowed")
    if len(shape) < 2:
        if metadata.datatype == BYTES:
            shape = shape_strings(metadata, count)
        else:
            shape = fit_shape(metadata, count, _ARRAY, 1, "element", "")
    return Tensor(
        metadata.name, metadata.datatype, decode_json_data(elements, metadata.datatype, shape, TextLabel(label))
    )


def _measure(data: list[Any], label: str) -> tuple[tuple[int, ...], int]:
    """Return the shape of a nested array, and the number of its elements. Raises for arrays of unequal lengths."""
    shape, items = [len(data)], data
    while (types := set(map(type, items))) == {list}:
        sizes = set(map(len, items))
        if len(sizes) > 1:
            raise InvalidRequestError(
                f"{label}: the arrays in dim {len(shape)} have lengths from {min(sizes)} to {max(sizes)}, expected one"
            )
        if len(shape) == MAX_RANK:
            raise InvalidRequestError(f"{label}: the array has more than {MAX_RANK} dims, the limit")
        shape.append(sizes.pop())
        items = list(chain.from_iterable(items))
    if list in types:
        raise InvalidRequestError(f"{label}: dim {len(shape) - 1} of the array has elements beside arrays")
    return tuple(shape), len(items)
