"""Conversion of pictures to the precision and size of a model's input.

Like OVMS, it converts first and then resizes, by OpenCV's bilinear interpolation in the input's precision.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovms_rest.models.opencv import cv2
from ovms_rest.protocol.datatypes import DATATYPES

# A smaller array gets the pages of an earlier one from malloc (worker/worker.py); a larger one gets new pages.
_LARGE = 2**25
# A worker keeps up to this many bytes of pages of one large array that it resized in.
_KEPT = 2**25
# With this many rows of a picture for one of the result, it pays to leave out rows that are not read.
_SPARSE = 4


class Precision(NamedTuple):
    """Rules that convert the values of a picture, UINT8 or UINT16, to a datatype."""

    dtype: np.dtype[Any]
    largest: int  # larger values are cut to it
    resized_as: np.dtype[Any]


# OpenCV interpolates UINT8, UINT16, INT16, FP32 and FP64; OVMS fails for the others. Here those are interpolated as
# FP32, which represents all their values from a picture, and rounded, ties to even as in OpenCV.
PRECISIONS: Mapping[str, Precision] = {
    datatype: Precision(DATATYPES[datatype].dtype, largest, DATATYPES[resized_as].dtype)
    for datatype, largest, resized_as in (
        ("FP64", 65535, "FP64"),
        ("FP32", 65535, "FP32"),
        ("FP16", 65504, "FP32"),
        ("BF16", 65535, "FP32"),
        ("INT32", 65535, "FP32"),
        ("INT16", 32767, "INT16"),
        ("UINT16", 65535, "UINT16"),
        ("UINT8", 255, "UINT8"),
        ("INT8", 127, "FP32"),
    )
}


def write_image(image: NDArray[Any], target: NDArray[Any], precision: Precision) -> None:
    """Write an image [height,width,channels] of UINT8 or UINT16 to `target`, in its size and precision."""
    if image.shape == target.shape:
        np.copyto(target, _cut_off(image, precision), casting="unsafe")
    elif image.dtype == precision.dtype == precision.resized_as:
        _resize(image, target)
    elif image.shape[0] < _SPARSE * target.shape[0]:
        _resize(_convert(image, precision).astype(precision.resized_as, copy=False), target)
    else:
        rows = _find_rows(image.shape[0], target.shape[0])
        with _canvas(image.shape, precision.resized_as, rows) as canvas:
            canvas[rows] = _convert(image[rows], precision)
            _resize(canvas, target)


def _convert(values: NDArray[Any], precision: Precision) -> NDArray[Any]:
    """Return values in the range and steps of a precision."""
    values = _cut_off(values, precision)
    return values if precision.dtype == precision.resized_as else values.astype(precision.dtype)


def _cut_off(values: NDArray[Any], precision: Precision) -> NDArray[Any]:
    return np.minimum(values, precision.largest) if np.iinfo(values.dtype).max > precision.largest else values


def _resize(image: NDArray[Any], target: NDArray[Any]) -> None:
    size = target.shape[1::-1]
    if image.dtype == target.dtype:
        cv2.resize(image, size, dst=target)
        return
    resized = cv2.resize(image, size).reshape(target.shape)
    # Interpolated values lie between their neighbours, so none can overflow.
    np.copyto(target, np.rint(resized) if np.issubdtype(target.dtype, np.integer) else resized, casting="unsafe")


def _find_rows(height: int, target: int) -> NDArray[np.intp]:
    """Return the rows of a picture of `height` rows that an interpolation to `target` rows reads, two for each."""
    places = (np.arange(target) + 0.5) * (height / target) - 0.5
    rounding = height * 2.0**-22  # OpenCV computes the places in FP32
    first = np.floor(np.concatenate((places - rounding, places + rounding))).astype(np.intp)
    return np.unique(np.clip(np.concatenate((first, first + 1)), 0, height - 1))


# The last large array, by the properties that decide which of its pages are written.
_kept: dict[tuple[Any, ...], NDArray[Any]] = {}


@contextmanager
def _canvas(shape: tuple[int, ...], dtype: np.dtype[Any], rows: NDArray[np.intp]) -> Iterator[NDArray[Any]]:
    """Lend an array of a picture's shape in which only some rows are written; in a large one only these have pages.

    An array without the other rows would change OpenCV's result in the last bits. A new page costs as much time as the
    conversion of its values.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        yield np.empty(shape, dtype)
        return
    key = (shape, dtype, len(rows))
    canvas = _kept.pop(key, None)
    if canvas is None:
        _kept.clear()
        memory = mmap.mmap(-1, size)
        with suppress(OSError):  # the kernel has no huge pages, which would back all rows
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        canvas = np.frombuffer(memory, dtype).reshape(shape)
    yield canvas
    if canvas[0].nbytes * len(rows) <= _KEPT:
        _kept[key] = canvas
