"""The datatypes of KServe v2: what one element is in JSON, in binary and in numpy.

Names: `datatype` is the protocol's word ("FP32"), `dtype` numpy's (float32).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BOOL = "BOOL"
UINT8 = "UINT8"
BYTES = "BYTES"


@dataclass(frozen=True, slots=True)
class Datatype:
    """One row of the table: a datatype other than BYTES.

    - `dtype`: an element in binary, which is little-endian, as is every CPU that OpenVINO supports.
    - `wide_dtype`: the 64-bit type of the same kind, which holds each JSON element before it is rounded.
    - `json_types`: the Python types that a parsed JSON element may have.
    - `json_kind`, `json_values`: the same in words, without and with the range.
    - `shortest_json`, `longest_json`: no element has fewer or more characters in JSON.
    - `bound`: numpy converts numbers closer to zero as the protocol asks; 0 where it does not.
    - `size`: bytes of an element in binary.
    """

    name: str
    dtype: np.dtype[Any]
    wide_dtype: np.dtype[Any]
    json_types: frozenset[type]
    json_kind: str
    json_values: str
    shortest_json: int
    longest_json: int
    bound: float = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.dtype.itemsize)

    def read(self, elements: list[Any]) -> NDArray[Any]:
        """Return JSON elements as an array. A float beyond the range is an infinity, an integer an OverflowError."""
        return np.array(elements, self.dtype)

    def narrow(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values of `wide_dtype` as this datatype, rounded once; a float beyond the range is an infinity."""
        return values.astype(self.dtype, copy=False)

    def widen(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array as a dtype that orjson writes."""
        return array


class _BFloat16(Datatype):
    """BF16, which numpy rounds twice and orjson does not know."""

    __slots__ = ()

    def read(self, elements: list[Any]) -> NDArray[Any]:
        return round_to_bfloat16(np.array(elements, np.float64))

    def narrow(self, values: NDArray[Any]) -> NDArray[Any]:
        return round_to_bfloat16(values)

    def widen(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.astype(np.float32)


def _integer(name: str, dtype: type) -> Datatype:
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return Datatype(
        name,
        np.dtype(dtype),
        np.dtype(np.int64 if low else np.uint64),
        frozenset({int}),
        "integers",
        f"integers from {low} to {high}",
        shortest_json=1,
        longest_json=max(len(str(low)), len(str(high))),
        bound=high if low else 0,
    )


def _float(name: str, dtype: type, row: type[Datatype] = Datatype) -> Datatype:
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return row(
        name,
        np.dtype(dtype),
        np.dtype(np.float64),
        frozenset({int, float}),
        "numbers",
        f"numbers up to {largest:.6g}",
        shortest_json=1,
        longest_json=25,
        bound=largest if row is Datatype else 0,
    )


_BOOL = np.dtype(np.bool_)
_EITHER = "true or false"
_ROWS = (
    Datatype(BOOL, _BOOL, _BOOL, frozenset({bool}), _EITHER, _EITHER, len("true"), len("false")),
    _integer("INT8", np.int8),
    _integer("INT16", np.int16),
    _integer("INT32", np.int32),
    _integer("INT64", np.int64),
    _integer(UINT8, np.uint8),
    _integer("UINT16", np.uint16),
    _integer("UINT32", np.uint32),
    _integer("UINT64", np.uint64),
    _float("FP16", np.float16),
    _float("BF16", ml_dtypes.bfloat16, _BFloat16),
    _float("FP32", np.float32),
    _float("FP64", np.float64),
)
DATATYPES: Mapping[str, Datatype] = MappingProxyType({row.name: row for row in _ROWS})
DATATYPE_NAMES: tuple[str, ...] = (*DATATYPES, BYTES)


def round_to_bfloat16(values: NDArray[np.float64]) -> NDArray[Any]:
    """Return FP64 values rounded to BF16 once, ties to even; one that is too large becomes an infinity.

    A plain cast goes by way of FP32 and so rounds twice: 1 + 2**-8 + 2**-40 would become 1. Rounding to FP32 "to odd"
    (an inexact result gets an odd last bit) keeps the information that the second rounding needs.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    widened = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    bits -= np.abs(widened) > np.abs(values)  # back to the FP32 next to the value, towards zero
    bits |= widened != values
    return nearest.astype(ml_dtypes.bfloat16)
