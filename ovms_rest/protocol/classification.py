"""Triton's classification extension: the highest values of an output with their indices and labels."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.strings import MAX_BYTES, BytesArray
from ovms_rest.protocol.tensors import Tensor

# In longer rows, the highest values are partitioned off before they are sorted: 31 ms instead of 760 ms for five
# million. In shorter ones that makes no difference, and all rows are sorted together.
_MANY = 16_384
# numpy sorts these more slowly than FP32, which holds all of their values.
_HALVES = frozenset({"FP16", "BF16"})
# A string has up to 317 characters (of the lowest FP64), an index, and its label. _FEW strings always fit.
_LONGEST = 340
# A string costs 1.2 us and 350 bytes until it is sent: five million blocked a worker for 7 s.
_MAX_STRINGS = 2**20
_FEW = 500


def classify(tensor: Tensor, k: int, labels: Sequence[str]) -> Tensor:
    """Return the `k` highest values of an output as BYTES, each "<value>:<index>" or "<value>:<index>:<label>".

    The highest comes first, equal values by index, NaNs last. A `k` above the number of classes means all of them. The
    shape is [batch, k] for an output of rank 2 or more, whose other dims are flattened, else [k]. Floats have six
    decimals, as C's "%f" (Triton's std::to_string) writes them, BOOL is 0 or 1. Missing and empty labels are left out.
    Raises InvalidRequestError for an output of BYTES, and for more strings than fit into a tensor.
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
        most = min(_MAX_STRINGS, MAX_BYTES // longest)
        if count > most:
            raise InvalidRequestError(
                f"output {tensor.name!r}: parameters.classification asks for {count} strings of up to {longest} bytes, "
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
    # Keys in reverse order: numpy puts NaNs last, and unlike a minus the complement (of BOOL too) does not overflow.
    keys = -values if values.dtype.kind == "f" else ~values
    if k < keys.shape[1] and keys.shape[1] > _MANY:
        return np.stack([_find_lowest(row, k) for row in keys])
    return np.argsort(keys, axis=1, kind="stable")[:, :k]


def _find_lowest(keys: NDArray[Any], k: int) -> NDArray[np.intp]:
    """Return the indices of the lowest keys of one long row, lowest first."""
    bound = np.partition(keys, k - 1)[k - 1]
    candidates = np.flatnonzero(~(keys > bound))  # all that equal the last one, and NaNs, included
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
