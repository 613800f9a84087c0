"""Large requests whose data are numbers, read by simdjson without a Python object for each number.

orjson decides what valid JSON is. This module reads only requests that orjson would read to the same bits, and raises
UnsuitedError for all others, so that orjson reads or rejects them.
"""

import math
import threading
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import simdjson
from numpy.typing import NDArray

from ovms_rest.protocol.datatypes import DATATYPES

# A JSON array inside simdjson. While one lives, its parser cannot parse anything else.
NumberArray = simdjson.Array

# A parser's memory is kept for the next request up to this size of JSON: new pages from the kernel double the time. A
# parser takes 2 bytes for each byte of numbers of 18 digits, and up to 13 for 1,1,1,1.
MAX_KEPT_SIZE = 2**23
# simdjson counts no more items of an array than this.
_MANY_ITEMS: Final = 2**24 - 1
# Limit for the keys of an object, and the items of an array other than data: simdjson searches keys one by one.
MAX_MEMBERS = 256

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_NUMBERS_AND_SPACE: Final = b"0123456789+-.eE \t\r\n"
_NUMERIC: Final = _NUMBERS_AND_SPACE + b",[]"
_QUOTE, _BACKSLASH = b'"\\'
# The change of depth at each byte.
_STEPS = np.zeros(256, np.int8)
_STEPS[[*b"[{"]] = 1
_STEPS[[*b"]}"]] = -1
# Bytes examined at a time, so that the arrays made of them stay in the cache and in memory that the process has.
_BLOCK = 3 * 2**15
# Bytes whose brackets are held at a time: in arrays of one digit, the positions take 16 times the bytes of the text.
_PIECE = 10 * _BLOCK

# simdjson's names for FP64, INT64 and UINT64.
_WIDE_TYPES: dict[str, Literal["d", "i", "u"]] = {"f": "d", "i": "i", "u": "u"}


class UnsuitedError(Exception):
    """A request that this module cannot read; it may be valid or not."""


def looks_numeric(part: memoryview) -> bool:
    """Guess from three places whether a large JSON is mostly numbers, to avoid parsing texts twice."""
    quarter = len(part) // 4
    return any(not bytes(part[place : place + 32]).strip(_NUMERIC) for place in (quarter, 2 * quarter, 3 * quarter))


def parse_numeric(part: memoryview, max_depth: int) -> dict[str, Any]:
    """Parse the JSON of a request as orjson does, except that an array as `data` becomes a NumberArray.

    Raises UnsuitedError for invalid JSON, for anything but an object with an array of objects as `inputs`, for nesting
    deeper than `max_depth` levels, for repeated keys and for integers of more than 64 bits.
    """
    skips_mark = bytes(part[:3]) == _BYTE_ORDER_MARK  # simdjson would
    if skips_mark or not is_shallow(np.frombuffer(part, np.uint8), max_depth):
        raise UnsuitedError
    root = _members(_parse(part))
    inputs = [_input(item) for item in _items(root.pop("inputs", None))]
    return {name: _to_python(value) for name, value in root.items()} | {"inputs": inputs}


class NestedNumbers(NamedTuple):
    """An array of numbers whose arrays of one level all have the same length, with its shape."""

    numbers: NumberArray
    shape: tuple[int, ...]


def parse_nested(part: memoryview, keys: frozenset[str], max_depth: int) -> dict[str, Any]:
    """Parse JSON as orjson does, except that the arrays of some keys become NestedNumbers.

    These are the arrays that are the value of one of `keys`, or members of an object that is. Raises UnsuitedError as
    `parse_numeric` does, for arrays that are empty, or whose arrays of one level differ in length, and if there is any
    other bracket.
    """
    if bytes(part[:3]) == _BYTE_ORDER_MARK or not is_shallow(np.frombuffer(part, np.uint8), max_depth):
        raise UnsuitedError
    outline = _Outline(part)
    root: dict[str, Any] = {}
    for name, value in _members(_parse(part)).items():
        if name in keys and type(value) is simdjson.Array:
            root[name] = outline.match(value)
        elif name in keys and type(value) is simdjson.Object:
            members = _members(value).items()
            root[name] = {
                key: outline.match(item) if type(item) is simdjson.Array else _to_python(item) for key, item in members
            }
        else:
            root[name] = _to_python(value)
    outline.check_end()
    return root


class _Outline:
    """The brackets and commas of a JSON text, in which its arrays of numbers are matched one after the other.

    An array matches the brackets and commas that its shape has if its first elements are any guide. Every match is
    within a string of the text or outside of all, and no match spans two members, whose names have quotes. So, if the
    matches are as many as the arrays and contain all brackets of the text, each is the whole of its array.
    """

    def __init__(self, part: memoryview) -> None:
        self._text = bytes(part).translate(None, _NUMBERS_AND_SPACE)
        self._position = 0
        self._brackets = 0

    def match(self, numbers: NumberArray) -> NestedNumbers:
        """Return an array with its shape, unless the rest of the text has no array of this shape."""
        shape, item = [], numbers
        while type(item) is simdjson.Array:
            if not 0 < len(item) < _MANY_ITEMS:
                raise UnsuitedError
            shape.append(len(item))
            item = item[0]
        expected = b""
        for size in reversed(shape):
            if size * (len(expected) + 1) >= len(self._text):
                raise UnsuitedError
            expected = b"[%b]" % ((expected + b",") * (size - 1) + expected)  # bytes.join takes 80 bytes per item
        begin = self._text.find(expected, self._position)
        if begin < 0:
            raise UnsuitedError
        self._position = begin + len(expected)
        self._brackets += expected.count(b"[")
        return NestedNumbers(numbers, tuple(shape))

    def check_end(self) -> None:
        """Raise UnsuitedError unless the matches contain all brackets of the text."""
        if self._text.count(b"[") != self._brackets:
            raise UnsuitedError


def to_array(numbers: NumberArray, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return numbers, nested in any form, as an array of a datatype and shape; floats are rounded once from FP64.

    Raises UnsuitedError for BOOL and BYTES, for elements that do not fit the datatype, and if their number does not fit
    the shape.
    """
    row = DATATYPES.get(datatype)
    if row is None or row.wide_dtype.kind not in _WIDE_TYPES:
        raise UnsuitedError
    try:
        values = np.frombuffer(numbers.as_buffer(of_type=_WIDE_TYPES[row.wide_dtype.kind]), row.wide_dtype)
    except (TypeError, ValueError, MemoryError) as error:  # another type, or out of range
        raise UnsuitedError from error
    if len(values) != math.prod(shape):
        raise UnsuitedError
    with np.errstate(over="ignore"):
        array = row.narrow(values)
    fits = np.isfinite(array) if float in row.json_types else array == values
    if not fits.all():
        raise UnsuitedError
    return array.reshape(shape)


# --- From simdjson's values to Python's


class _Kept(threading.local):
    """The parser of each thread."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_kept = _Kept()


def _parse(part: memoryview) -> Any:
    parser = _kept.parser if len(part) <= MAX_KEPT_SIZE else simdjson.Parser()
    try:
        return parser.parse(part)
    except (ValueError, RuntimeError, MemoryError) as error:
        # An array that outlived its request may hold the parser: then the next request needs another.
        _kept.parser = simdjson.Parser()
        raise UnsuitedError from error


def _members(value: Any) -> dict[str, Any]:
    if type(value) is not simdjson.Object or len(value) > MAX_MEMBERS:
        raise UnsuitedError
    names = list(value)
    # simdjson finds the first of equal keys, but the last counts, and it compares keys up to a NUL.
    if len(set(names)) < len(names) or "\0" in "".join(names):
        raise UnsuitedError
    return {name: value[name] for name in names}


def _items(value: Any) -> list[Any]:
    if type(value) is not simdjson.Array or len(value) > MAX_MEMBERS:
        raise UnsuitedError
    return list(value)


def _input(item: Any) -> dict[str, Any]:
    return {
        name: value if name == "data" and type(value) is NumberArray else _to_python(value)
        for name, value in _members(item).items()
    }


def _to_python(value: Any) -> Any:
    # Without simdjson's as_dict and as_list, which write past the end of an array of 2**24 items.
    if type(value) is simdjson.Object:
        return {name: _to_python(member) for name, member in _members(value).items()}
    if type(value) is simdjson.Array:
        return [_to_python(item) for item in _items(value)]
    return value


# --- Depth


def is_shallow(text: NDArray[np.uint8], max_depth: int) -> bool:
    """Return whether JSON is nested no deeper than `max_depth` levels.

    False may be wrong if a quote follows a backslash, True never is. For invalid JSON the result means nothing.
    """
    depth, quotes_before, brackets_before = 0, 0, 0
    held: list[tuple[int, NDArray[np.intp]]] = []  # examined only if there are many brackets
    for begin in range(0, len(text), _PIECE):
        # With these bits all four brackets are 0x7f; so are only Y, y, _ and DEL, which do not change the depth.
        brackets = _places(text[begin : begin + _PIECE], 0x26, 0x7F)
        held.append((begin, brackets))
        brackets_before += len(brackets)
        if brackets_before <= 2 * max_depth:
            continue
        for start, places in held:
            piece = text[start : start + _PIECE]
            quotes = _places(piece, 0, _QUOTE)
            if (text[start + quotes - 1] == _BACKSLASH).any():  # the quote may be part of a string
                return False
            outside = (np.searchsorted(quotes, places) + quotes_before) % 2 == 0
            depths = np.cumsum(_STEPS[piece[places[outside]]]) + depth
            if depths.max(initial=0) > max_depth:
                return False
            depth = int(depths[-1]) if len(depths) else depth
            quotes_before += len(quotes)
        held.clear()
    return True


def _places(text: NDArray[np.uint8], bits: int, value: int) -> NDArray[np.intp]:
    """Return where a byte with the bits set is the value. Few are, so eight bytes are tested together."""
    whole = len(text) // 8 * 8
    found = np.empty(whole // 8, np.bool_)
    for begin in range(0, whole, _BLOCK):
        end = min(begin + _BLOCK, whole)
        marks = (text[begin:end] | bits) == value
        np.not_equal(marks.view(np.uint64), 0, out=found[begin // 8 : end // 8])
    near = (np.flatnonzero(found)[:, np.newaxis] * 8 + np.arange(8)).ravel()
    near = np.concatenate((near, np.arange(whole, len(text))))
    places: NDArray[np.intp] = near[(text[near] | bits) == value]
    return places
