"""Whether a response fits into the memory that a worker has left for requests and responses.

A response is refused before its inference where the shapes of its outputs are static, otherwise before it is encoded.
Under servers other than our own worker, responses are not limited.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import orjson

from ovms_rest.errors import BusyError
from ovms_rest.protocol.datatypes import BYTES, DATATYPES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import ModelMetadata, RequestedOutput, Tensor

# Outputs with no more bytes than this together are not measured.
SMALL_OUTPUTS = 2**16
# A string in binary comes after its length; in JSON it has two quotes and a comma. While it is encoded it also is a
# bytes object and a str.
_LENGTH = 4
_QUOTED = 3
_STRING_OBJECTS = 110
# Elements that are encoded at a time to find their size.
_STEP = 2**16


class Room(NamedTuple):
    """Bytes: the total of unfinished requests and responses, and the limit of that total."""

    held: int
    limit: int


def unlimited() -> Room:
    """Return the room under a server that does not limit its memory."""
    return Room(0, 2**63)


def describe_lack(what: str, size: int, room: Room) -> str:
    """Return the message for a request or response of `size` bytes that does not fit."""
    if size > room.limit:
        return f"no room for {what} of {size} bytes: OVMS_REST_MAX_HELD_BYTES allows {room.limit}"
    return f"no room for {what} of {size} bytes: unfinished requests and responses hold {room.held} of {room.limit}"


def check_requested(requested: Sequence[RequestedOutput], metadata: ModelMetadata, room: Room) -> None:
    """Raise BusyError when those of the outputs whose shapes are static cannot fit."""
    size = 0
    for name, is_binary, classification in requested:
        output = metadata.outputs[name]
        if output.static_shape is not None and not classification:
            size += math.prod(output.static_shape) * _least_size(output.datatype, is_binary)
    _check(size, room)


def check_outputs(outputs: Sequence[tuple[Tensor, bool]], find_room: Callable[[], Room], structure: int = 0) -> None:
    """Raise BusyError when a response with these outputs, each binary or not, does not fit.

    `structure` is how many bytes the response has beyond its elements, if they are many.
    """
    size = structure
    for tensor, _ in outputs:
        size += tensor.array.nbytes
    if size <= SMALL_OUTPUTS:
        return
    room, least, most = find_room(), structure, structure
    for tensor, is_binary in outputs:
        low, high = _measure(tensor, is_binary)
        least, most = least + low, most + high
    _check(least, room)
    if room.held + most > room.limit:
        _check_encoded(outputs, room, structure)


def _check(size: int, room: Room) -> None:
    if room.held + size > room.limit:
        raise BusyError(describe_lack("a response", size, room))


def _least_size(datatype: str, is_binary: bool) -> int:
    """Return the fewest bytes that an element takes in a response."""
    if datatype == BYTES:
        return _LENGTH if is_binary else _QUOTED
    row = DATATYPES[datatype]
    return row.size if is_binary else row.shortest_json + 1  # with a comma


def _measure(tensor: Tensor, is_binary: bool) -> tuple[int, int]:
    """Return the least and the most bytes that a tensor may take in a response, or while it is encoded."""
    array = tensor.array
    if isinstance(array, BytesArray):
        count, size = array.begins.size, int((array.ends - array.begins).sum(dtype=np.int64))
        if is_binary:
            return size + _LENGTH * count, size + _LENGTH * count
        objects = 2 * size + _STRING_OBJECTS * count
        # An escaped character takes up to six.
        return size + _QUOTED * count + objects, 6 * size + _QUOTED * count + objects
    if is_binary:
        return array.nbytes, array.nbytes
    row = DATATYPES[tensor.datatype]
    return array.size * (row.shortest_json + 1), array.size * (row.longest_json + 1)


def _check_encoded(outputs: Sequence[tuple[Tensor, bool]], room: Room, structure: int) -> None:
    """Find the exact size of numbers in JSON piece by piece, until they no longer fit."""
    size = structure
    for tensor, is_binary in outputs:
        array = tensor.array
        if is_binary or isinstance(array, BytesArray):
            size += _measure(tensor, is_binary)[1]
            _check(size, room)
            continue
        flat, widen = np.ascontiguousarray(array).reshape(-1), DATATYPES[tensor.datatype].widen
        for start in range(0, flat.size, _STEP):
            numbers = widen(flat[start : start + _STEP])
            size += len(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)) - 1
            _check(size, room)
