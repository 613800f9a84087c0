"""Triton's classification extension: an output answered as its highest values with their indices and labels."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Tensor

# From so many values in a row on it is quicker to set the highest apart before they are sorted: 31 ms instead of 760 ms
# for five million. Up to there it makes no difference, and all rows are sorted at once.
_MANY = 16_384
# numpy sorts these slower than FP32, which holds all of their values.
_HALVES = frozenset({"FP16", "BF16"})
# What `BytesArray` can number. A string has the 317 characters of the lowest FP64, an index, and its label. So few of
# them fit whatever labels there are.
_MAX_BYTES = 2**31 - 1
_LONGEST = 340
# A string takes 1.2 us and 350 bytes until it is sent: five million held a worker for 7 s.
_MAX_STRINGS = 2**20
_FEW = 500


def classify(tensor: Tensor, k: int, labels: Sequence[str]) -> Tensor:
    """Return the `k` highest values of an output as BYTES, each "<value>:<index>" or "<value>:<index>:<label>".

    The highest comes first, of equal ones that of the lower index; NaNs come last. `k` beyond the number of classes
    means all. The shape is [batch, k] for an output of rank 2 or more, whose other dims are flattened, else [k]. Floats
    are written with six decimals, as C's "%f" does it (Triton's std::to_string), BOOL as 0 and 1. An index without a
    label, or with an empty one, gets none. Raises InvalidRequestError for an output of BYTES, and for more than fits
    into a tensor.
    """
    array = tensor.array
    if isinstance(array, BytesArray):
        refuse_strings(tensor.name)
    batch = array.shape[:1] if array.ndim >= 2 else ()
    rows, classes = math.prod(batch), math.prod(array.shape[len(batch) :])
    k = min(k, classes)
    count = rows * k
    if count > _FEW:
        longest = _LONGEST + 4 * max(map(len, labels), default=0)
        most = min(_MAX_STRINGS, _MAX_BYTES // longest)
        if count > most:
            raise InvalidRequestError(
                f"output {tensor.name!r}: parameters.classification means {count} strings of up to {longest} bytes, "
                f"at most {most} are allowed"
            )
    elements: list[bytes] = []
    if count:
        values = array.reshape(rows, classes)
        if tensor.datatype in _HALVES:
            values = values.astype(np.float32)
        indices = _find_highest(values, k)
        elements = _write(np.take_along_axis(values, indices, 1).ravel().tolist(), indices.ravel().tolist(), labels)
    return Tensor(tensor.name, BYTES, BytesArray.of(elements, (*batch, k)))


def refuse_strings(name: str) -> NoReturn:
    """Refuse an output whose elements are strings."""
    raise InvalidRequestError(
        f"output {name!r}: parameters.classification needs an output of numbers, but its datatype is {BYTES}"
    )


def _find_highest(values: NDArray[Any], k: int) -> NDArray[np.intp]:
    """Return the indices of the highest values of every row, [rows, k], highest first."""
    # What sorts the other way round: numpy puts NaNs last, and the complement (of BOOL too) has no overflow as minus.
    keys = -values if values.dtype.kind == "f" else ~values
    if k < keys.shape[1] and keys.shape[1] > _MANY:
        return np.stack([_find_lowest(row, k) for row in keys])
    return np.argsort(keys, axis=1, kind="stable")[:, :k]


def _find_lowest(keys: NDArray[Any], k: int) -> NDArray[np.intp]:
    """Do the same for the keys of one long row."""
    bound = np.partition(keys, k - 1)[k - 1]
    candidates = np.flatnonzero(~(keys > bound))  # with all that equal the last one, and NaNs
    return candidates[np.argsort(keys[candidates], kind="stable")[:k]]


def _write(values: list[Any], indices: list[int], labels: Sequence[str]) -> list[bytes]:
    form = "%f:%d" if type(values[0]) is float else "%d:%d"
    texts = []
    for value, index in zip(values, indices, strict=True):
        text = form % (value, index)
        if index < len(labels) and labels[index]:
            text = f"{text}:{labels[index]}"
        texts.append(text.encode())
    return texts
