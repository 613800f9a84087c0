"""The datatypes of KServe v2: what one element is in JSON, in binary and in numpy.

Names: `datatype` is the protocol's word ("FP32"), `dtype` numpy's (float32).
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """One row of the table: a datatype that is not BYTES.

    `dtype` is the element on the wire, which is little-endian as every CPU that OpenVINO supports. `json_types` are
    the Python types that a JSON element may have once parsed; `json_values` says the same in words. Every number
    closer to zero than `bound` is in range and converted by numpy as the protocol asks; 0 is no such promise.
    """

    name: str
    dtype: np.dtype[Any]
    json_types: frozenset[type]
    json_values: str
    bound: float = 0

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize


def _integer(name: str, dtype: type) -> Datatype:
    limits = np.iinfo(dtype)
    bound = limits.max if limits.min < 0 else 0
    return Datatype(name, np.dtype(dtype), frozenset({int}), f"integers from {limits.min} to {limits.max}", bound)


def _float(name: str, dtype: type) -> Datatype:
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    bound = 0 if dtype is ml_dtypes.bfloat16 else largest
    return Datatype(name, np.dtype(dtype), frozenset({int, float}), f"numbers up to {largest:.6g}", bound)


DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        row.name: row
        for row in (
            Datatype(BOOL, np.dtype(np.bool_), frozenset({bool}), "true or false"),
            _integer("INT8", np.int8),
            _integer("INT16", np.int16),
            _integer("INT32", np.int32),
            _integer("INT64", np.int64),
            _integer(UINT8, np.uint8),
            _integer("UINT16", np.uint16),
            _integer("UINT32", np.uint32),
            _integer("UINT64", np.uint64),
            _float("FP16", np.float16),
            _float("BF16", ml_dtypes.bfloat16),
            _float("FP32", np.float32),
            _float("FP64", np.float64),
        )
    }
)

DATATYPE_NAMES: tuple[str, ...] = (*DATATYPES, BYTES)


def round_to_bfloat16(values: NDArray[np.float64]) -> NDArray[Any]:
    """Round FP64 values to BF16 once, ties to even; what is too large becomes an infinity.

    A plain cast goes by way of FP32 and so rounds twice: 1 + 2**-8 + 2**-40 would become 1. Rounding to FP32 "to odd"
    (an inexact result gets an odd last bit) keeps what the second rounding has to know.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    widened = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    bits -= np.abs(widened) > np.abs(values)  # back to the FP32 next to the value, towards zero
    bits |= widened != values
    return nearest.astype(ml_dtypes.bfloat16)
