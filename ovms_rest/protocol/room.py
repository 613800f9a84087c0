"""The memory that a worker has left for requests and responses, and what a response takes of it.

A response is refused before its inference where the shapes of its outputs are static, otherwise before it is encoded.
Other servers than our own worker say nothing of their memory; with them nothing is checked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from ovms_rest.errors import BusyError
from ovms_rest.protocol.datatypes import BYTES, DATATYPES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import ModelMetadata, RequestedOutput, Tensor

# Outputs with no more bytes than this together are not measured.
SMALL_OUTPUTS = 2**16
# The most characters that an element takes in JSON, with its comma.
_LONGEST = {
    "BOOL": 6,
    "INT8": 5,
    "INT16": 7,
    "INT32": 12,
    "INT64": 21,
    "UINT8": 4,
    "UINT16": 6,
    "UINT32": 11,
    "UINT64": 21,
    "FP16": 26,
    "BF16": 26,
    "FP32": 26,
    "FP64": 26,
}
# The fewest: a digit and a comma.
_SHORTEST = 2
# A string in binary has its length before it, in JSON two quotes and a comma behind it. While it is encoded it is a
# bytes object and a str besides.
_LENGTH = 4
_QUOTED = 3
_STRING_OBJECTS = 110
# So many elements are encoded at once to find their size.
_STEP = 2**16

Environ = dict[str, Any]


class Room(NamedTuple):
    """Bytes: what unfinished requests and responses hold, and the most that they may hold together."""

    held: int
    limit: int


_UNLIMITED = Room(0, 2**63)


def describe_lack(what: str, size: int, room: Room) -> str:
    """Return the message for a request or response of so many bytes that does not fit in."""
    if size > room.limit:
        return f"no room for {what} of {size} bytes: OVMS_REST_MAX_HELD_BYTES allows {room.limit}"
    return f"no room for {what} of {size} bytes: unfinished requests and responses hold {room.held} of {room.limit}"


def check_requested(requested: Sequence[RequestedOutput], metadata: ModelMetadata, environ: Environ) -> None:
    """Raise BusyError when the outputs cannot fit in, as far as their shapes are static."""
    size = 0
    for name, is_binary, classification in requested:
        output = metadata.outputs[name]
        if output.static_shape is not None and not classification:
            elements = math.prod(output.static_shape)
            size += elements * (_size_in_binary(output.datatype) if is_binary else _SHORTEST)
    _check(size, _find_room(environ))


def check_outputs(outputs: Sequence[tuple[Tensor, bool]], environ: Environ) -> None:
    """Raise BusyError when the response with these outputs, each binary or not, does not fit in."""
    size = 0
    for tensor, _ in outputs:
        size += tensor.array.nbytes
    if size <= SMALL_OUTPUTS:
        return
    room, least, most = _find_room(environ), 0, 0
    for tensor, is_binary in outputs:
        low, high = _measure(tensor, is_binary)
        least, most = least + low, most + high
    _check(least, room)
    if room.held + most > room.limit:
        _check_encoded(outputs, room)


def _find_room(environ: Environ) -> Room:
    find_room: Callable[[], Room] | None = environ.get("ovms_rest.room")  # our own worker's
    return _UNLIMITED if find_room is None else find_room()


def _check(size: int, room: Room) -> None:
    if room.held + size > room.limit:
        raise BusyError(describe_lack("a response", size, room))


def _size_in_binary(datatype: str) -> int:
    return _LENGTH if datatype == BYTES else DATATYPES[datatype].size


def _measure(tensor: Tensor, is_binary: bool) -> tuple[int, int]:
    """Return the least and the most bytes that a tensor may take in a response, or while that is made."""
    array = tensor.array
    if isinstance(array, BytesArray):
        count, size = array.begins.size, int((array.ends - array.begins).sum(dtype=np.int64))
        if is_binary:
            return size + _LENGTH * count, size + _LENGTH * count
        # What is escaped takes up to six characters.
        objects = 2 * size + _STRING_OBJECTS * count
        return size + _QUOTED * count + objects, 6 * size + _QUOTED * count + objects
    if is_binary:
        return array.nbytes, array.nbytes
    return array.size * _SHORTEST, array.size * _LONGEST[tensor.datatype]


def _check_encoded(outputs: Sequence[tuple[Tensor, bool]], room: Room) -> None:
    """Find the exact size of numbers in JSON piece by piece, no further than there is room."""
    size = 0
    for tensor, is_binary in outputs:
        array = tensor.array
        if is_binary or isinstance(array, BytesArray):
            size += _measure(tensor, is_binary)[1]
            _check(size, room)
            continue
        flat = np.ascontiguousarray(array).reshape(-1)
        for start in range(0, flat.size, _STEP):
            part = flat[start : start + _STEP]
            part = part.astype(np.float32) if tensor.datatype == "BF16" else part
            size += len(orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)) - 1
            _check(size, room)
