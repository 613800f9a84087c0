"""BYTES: strings of any bytes, as arrays, on the wire and as rows of a UINT8 matrix."""

import binascii
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.words import count_of, show

# Limit for the strings of all inputs of a request, and of an output: each takes 250 ns. OVMS allows 33,554,432 in a
# tensor, which would block a worker for 8 s.
MAX_ELEMENTS = 2**23
# OVMS's limit for strings that become a matrix.
MAX_MATRIX_BYTES = 2**30
# The range of OpenVINO's 32-bit offsets.
MAX_BYTES = 2**31 - 1

# From this many strings on, the memory of their offsets matters more than the time to make an array.
_MANY = 256
# Strings that are joined or packed at a time: meanwhile each has Python objects, or the 80 bytes that bytes.join takes.
_STEP = 4096
# Bytes of a matrix that are searched for NULs at a time, so that the arrays made of them stay in the cache.
_BLOCK = 2**18

_LENGTH = struct.Struct("<I")

_OUTSIDE_BASE64 = re.compile("[^A-Za-z0-9+/=]")
# What characters outside the alphabet come from.
_BASE64_HINTS = {
    "\n": "; `base64 -w 0` writes no line breaks",
    "\r": "; `base64 -w 0` writes no line breaks",
    "-": "; the URL-safe alphabet is not supported",
    "_": "; the URL-safe alphabet is not supported",
    ":": '; leave out the beginning of a data URL, such as "data:image/png;base64,"',
}


@dataclass(frozen=True, slots=True, eq=False)
class BytesArray:
    """An array of byte strings, the counterpart of an ndarray for BYTES.

    Element i is `symbols[begins.flat[i]:ends.flat[i]]`; the shape of `begins` and `ends` (int32) is the array's.
    These are the three tensors of OpenVINO's StringTensorPack. `symbols` (uint8, one dimension) may hold bytes that
    belong to no element, so it can be a view on a received body. Its length stays below 2**31 because the limit of a
    body does (`settings`).
    """

    begins: NDArray[np.int32]
    ends: NDArray[np.int32]
    symbols: NDArray[np.uint8]

    @classmethod
    def of(cls, elements: Iterable[bytes], shape: tuple[int, ...]) -> Self:
        """Return elements, in row-major order, as an array of that shape."""
        elements = list(elements)
        sizes = np.fromiter(map(len, elements), np.int64, len(elements))
        ends = np.cumsum(sizes).astype(np.int32)
        begins = np.zeros_like(ends)
        begins[1:] = ends[:-1]
        symbols = bytearray().join(elements[:_STEP])  # OpenVINO needs writable memory
        for start in range(_STEP, len(elements), _STEP):
            symbols += b"".join(elements[start : start + _STEP])
        return cls(begins.reshape(shape), ends.reshape(shape), np.frombuffer(symbols, np.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.begins.shape

    @property
    def nbytes(self) -> int:
        return self.begins.nbytes + self.ends.nbytes + self.symbols.nbytes

    def elements(self) -> list[bytes]:
        """Return the elements in row-major order."""
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the elements in row-major order."""
        symbols = self.symbols.data
        return (bytes(symbols[begin:end]) for spans in self.spans() for begin, end in spans)

    def spans(self) -> Iterator[Iterator[tuple[int, int]]]:
        """Yield where elements begin and end, many at a time, in row-major order."""
        begins, ends = self.begins.reshape(-1), self.ends.reshape(-1)
        for start in range(0, len(begins), _STEP):
            yield zip(begins[start : start + _STEP].tolist(), ends[start : start + _STEP].tolist(), strict=True)


def unpack(section: memoryview, count: int, label: object) -> tuple[MutableSequence[int], MutableSequence[int]]:
    """Return where the elements of a binary BYTES tensor begin, and where they end, in `section`.

    Each is a 4-byte little-endian length and that many bytes. Raises InvalidRequestError, beginning with `label`,
    unless exactly `count` elements fill the section.
    """
    begins: MutableSequence[int]
    ends: MutableSequence[int]
    begins, ends = ([], []) if count < _MANY else (array("i"), array("i"))
    position, size = 0, len(section)
    while position < size:
        if len(begins) == count:
            raise InvalidRequestError(
                f"{label}: its shape needs {count_of(count, 'string')}, "
                f"which leaves {count_of(size - position, 'byte')} of the data unused"
            )
        if position + 4 > size:
            raise InvalidRequestError(
                f"{label}: the data ends after {size - position} of the 4 bytes that give the length of string "
                f"{len(begins)}"
            )
        begin = position + 4
        position = begin + _LENGTH.unpack_from(section, position)[0]
        if position > size:
            raise InvalidRequestError(
                f"{label}: the length of string {len(begins)} is {count_of(position - begin, 'byte')}, "
                f"but the data has only {size - begin} left"
            )
        begins.append(begin)
        ends.append(position)
    if len(begins) != count:
        raise InvalidRequestError(
            f"{label}: its shape needs {count_of(count, 'string')}, but the data has {len(begins)}"
        )
    return begins, ends


def pack(array: BytesArray) -> memoryview:
    """Return an array as a binary BYTES tensor, the reverse of `unpack`.

    It has no object for each string: room.py counts nothing but the bytes of the result.
    """
    packed, symbols = bytearray(), array.symbols.data
    for spans in array.spans():
        for begin, end in spans:
            packed += _LENGTH.pack(end - begin)
            packed += symbols[begin:end]
    return memoryview(packed)


def decode_base64(text: str, label: object) -> bytes:
    """Return bytes from base64 with padding and nothing else (RFC 4648 section 4).

    Raises InvalidRequestError, beginning with `label`, for any other text.
    """
    try:
        # binascii of Python 3.11 lets "=" after a complete group of four pass even in strict mode.
        if len(text) % 4 or text.find("=", 0, -2) >= 0:
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise InvalidRequestError(f"{label} is not valid base64: {_explain_base64(text)}") from error


def _explain_base64(text: str) -> str:
    outside = _OUTSIDE_BASE64.search(text)
    if outside:
        character = outside[0]
        return f"character {outside.start()} is {show(character)}{_BASE64_HINTS.get(character, '')}"
    if len(text) % 4:
        return f"it has {count_of(len(text), 'character')}, expected a multiple of 4, padded with '='"
    return "'=' is only allowed as padding, at most twice and at the end"


def measure_matrix(array: BytesArray, label: str) -> tuple[int, int]:
    """Return the shape of the matrix of strings of shape [n]: [n, longest + 1].

    Raises InvalidRequestError, beginning with `label`, when the matrix would be larger than 1 GiB.
    """
    count, longest = len(array.begins), int((array.ends - array.begins).max(initial=0))
    if count * (longest + 1) > MAX_MATRIX_BYTES:
        raise InvalidRequestError(
            f"{label}: {count} strings, the longest of {longest} bytes, make a matrix of "
            f"{count * (longest + 1)} bytes, at most {MAX_MATRIX_BYTES} are allowed"
        )
    return count, longest + 1


def to_matrix(array: BytesArray, label: str) -> NDArray[np.uint8]:
    """Return strings of shape [n] as UINT8 rows [n, longest + 1], each padded with at least one NUL, as in OVMS.

    Raises InvalidRequestError as `measure_matrix` does.
    """
    matrix = np.zeros(measure_matrix(array, label), np.uint8)
    begins, ends, symbols = array.begins.tolist(), array.ends.tolist(), array.symbols
    for row, begin, end in zip(matrix, begins, ends, strict=True):
        row[: end - begin] = symbols[begin:end]
    return matrix


def from_matrix(matrix: NDArray[np.uint8]) -> BytesArray:
    """Return UINT8 rows [n, width] as n strings, each up to its first NUL, the reverse of `to_matrix`.

    The strings of a contiguous matrix are views on it. It may have up to MAX_BYTES.
    """
    count, width = matrix.shape
    if not matrix.size:
        return BytesArray(np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(0, np.uint8))
    sizes = np.full(count, width, np.int32)
    rows = max(_BLOCK // width, 1)
    for start in range(0, count, rows):
        is_nul = matrix[start : start + rows] == 0
        np.copyto(sizes[start : start + rows], is_nul.argmax(1), "same_kind", where=is_nul.any(1))
    begins = np.arange(count, dtype=np.int32) * np.int32(width)
    return BytesArray(begins, begins + sizes, np.ascontiguousarray(matrix).reshape(-1))
