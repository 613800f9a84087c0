"""Data without a shape of its own: raw bytes, whose shape is that of the model's input (protocol/README.md section 4).

Every function raises only InvalidRequestError, for a mistake of the client.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.body_forms import explain_image, name_image
from ovms_rest.protocol.datatypes import BYTES, DATATYPES
from ovms_rest.protocol.decoding import view_elements, view_strings
from ovms_rest.protocol.tensors import Dim, InferenceRequest, Tensor, TensorMetadata
from ovms_rest.protocol.words import count_of, join


class Source(NamedTuple):
    """For messages: what holds the data, and what to do when its size does not determine the shape."""

    name: str
    remedy: str


_BODY = Source("the body", "the size of a raw body does not determine; send JSON that gives the shape")


def decode_raw_request(body: memoryview, inputs: Mapping[str, TensorMetadata]) -> InferenceRequest:
    """Decode a body that is just the data of a model's only input (header length 0).

    All outputs are returned as binary.
    """
    if len(inputs) != 1:
        raise InvalidRequestError(
            "Inference-Header-Content-Length is 0, which makes the body the data of a model's only input, "
            f"but this model has {len(inputs)} inputs: {join(inputs)}"
        )
    (metadata,) = inputs.values()
    return InferenceRequest((read_raw_body(body, metadata, _BODY),), binary_output=True)


def read_raw_body(
    body: memoryview, metadata: TensorMetadata, source: Source, model: str = "", shape: tuple[int, ...] | None = None
) -> Tensor:
    """Return a body as the only input of a model, as `read_raw` does; without a `model` for the message, its header
    length was 0.
    """
    try:
        return read_raw(body, metadata, source, shape)
    except InvalidRequestError as error:
        if metadata.datatype != BYTES and (image := name_image(body)):
            hint = explain_image({metadata.name: metadata}, model or "MODEL", image, has_length=not model)
            raise InvalidRequestError(f"{error}; it is {image}; {hint}") from error
        raise


def read_raw(
    data: memoryview, metadata: TensorMetadata, source: Source, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Return the elements of an input from their bytes; for BYTES, these are its one element, without a length.

    Without a `shape`, it follows from the model's and the size of the data.
    """
    label = f"input {metadata.name!r}"
    if metadata.datatype == BYTES:
        if shape is not None and math.prod(shape) != 1:
            raise InvalidRequestError(f"{label}: {source.name} is one string, but X-Tensor-Shape is {join(shape)}")
        if shape is None:
            shape = shape_strings(metadata, 1)
        return Tensor(metadata.name, BYTES, view_strings([0], [len(data)], data, shape))
    datatype = DATATYPES[metadata.datatype]
    if shape is None:
        shape = fit_shape(metadata, len(data), source, datatype.size, "byte", f" of {datatype.name}")
    elif (needed := datatype.size * math.prod(shape)) != len(data):
        raise InvalidRequestError(
            f"{label}: X-Tensor-Shape {join(shape)} takes {count_of(needed, 'byte')} of {datatype.name}, "
            f"{source.name} has {len(data)}"
        )
    return Tensor(metadata.name, datatype.name, view_elements(data, datatype, shape, label))


def shape_strings(metadata: TensorMetadata, count: int) -> tuple[int, ...]:
    """Return the shape of that many strings for an input: the first open dim takes them all, any other counts as 1."""
    dims = metadata.dims or ()
    sizes = [1 if dim.size is None and dim.holds(1) else dim.low for dim in dims]
    place = next((index for index, dim in enumerate(dims) if dim.size is None), None)
    if place is not None:
        sizes[place] = 1
        sizes[place] = count // max(math.prod(sizes), 1)
    if math.prod(sizes) != count:
        found = "a raw body is one string" if count == 1 else f"got {count} strings"
        raise InvalidRequestError(
            f"input {metadata.name!r}: {found}, but the model's shape is {metadata.describe_shape()}"
        )
    return tuple(sizes)


def fit_shape(
    metadata: TensorMetadata, size: int, source: Source, of_element: int, unit: str, kind: str
) -> tuple[int, ...]:
    """Return the shape of data of a size, in units of which an element takes `of_element`.

    It is the model's. One dim that is not static is computed from the size; with more of them dim 0 counts as 1.
    """
    dims, label = metadata.dims or (), f"input {metadata.name!r}: shape {metadata.describe_shape()}"
    sizes = [dim.low for dim in dims]
    open_dims = _find_open(dims)
    if len(open_dims) > 1 and open_dims[0] == 0:
        sizes[open_dims.pop(0)] = 1
    if len(open_dims) > 1:
        raise InvalidRequestError(f"{label} has {len(open_dims)} open dims besides dim 0, which {source.remedy}")
    if open_dims:
        row = of_element * math.prod(dim for index, dim in enumerate(sizes) if index != open_dims[0])
        if row == 0 and size == 0:
            raise InvalidRequestError(
                f"{label} has the open dim {open_dims[0]} beside a dim of 0, which {source.remedy}"
            )
        if row and size % row:
            raise InvalidRequestError(
                f"{label} takes a multiple of {count_of(row, unit)}{kind}, {source.name} has {size}"
            )
        sizes[open_dims[0]] = size // row if row else 0
    needed = of_element * math.prod(sizes)
    if needed != size:
        raise InvalidRequestError(f"{label} takes {count_of(needed, unit)}{kind}, {source.name} has {size}")
    return tuple(sizes)


def _find_open(dims: tuple[Dim, ...]) -> list[int]:
    return [index for index, dim in enumerate(dims) if dim.size is None]
