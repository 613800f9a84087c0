"""libcustom_node_east_ocr: cuts out the texts found by an EAST model, without overlapping ones, and levels them.

OVMS's documentation has the centre of a box in `text_coordinates` and 0 as the default of `rotation_angle_threshold`;
its library has the upper left corner and 20, as here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovms_rest.models.opencv import cv2
from ovms_rest.pipelines.nodes.params import (
    Arrays,
    CropOptions,
    Forms,
    fraction,
    integer,
    not_negative,
    original_form,
    param,
    text_forms,
)
from ovms_rest.pipelines.nodes.pictures import Box, Picture, check_numbers, cut_boxes, stack_texts

_CELL = 4  # pixels per score, in each direction

_size = integer(_CELL, f"a multiple of {_CELL}", lambda number: number % _CELL == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(CropOptions):
    original_image_width: int = param(_size)
    original_image_height: int = param(_size)
    overlap_threshold: float = param(fraction, 0.3)
    box_width_adjustment: float = param(not_negative, 0.0)
    box_height_adjustment: float = param(not_negative, 0.0)
    rotation_angle_threshold: int = param(integer(0), 20)  # degrees


class _Texts(NamedTuple):
    """The texts found: boxes (x1, y1, x2, y2) as rows, angles in radians, heights and scores."""

    corners: NDArray[np.int64]
    angles: NDArray[np.float32]
    heights: NDArray[np.float32]
    scores: NDArray[np.float32]


def inputs(options: Options) -> Forms:
    """Return the forms of the image and of the model's scores and geometry for each 4x4 pixels of it."""
    cells = (options.original_image_height // _CELL, options.original_image_width // _CELL)
    return {
        "image": original_form(options),
        "scores": ("FP32", (1, *cells, 1)),
        "geometry": ("FP32", (1, *cells, 5)),
    }


def outputs(options: Options) -> Forms:
    """Return the forms of the texts' images, boxes and confidences."""
    return text_forms(options)


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[Any]]:
    """Cut out the texts, the most confident first. Raises ValueError for one that cannot be cut out."""
    texts = _find_texts(arrays["scores"][0, :, :, 0], arrays["geometry"][0], options)
    kept = _suppress_overlaps(texts, options)
    boxes = [Box(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in texts.corners[kept].tolist()]
    crops = _level_texts(cut_boxes(arrays["image"], boxes, options), texts, kept, options)
    return stack_texts(crops, boxes, texts.scores[kept], options)


def _find_texts(scores: NDArray[np.float32], geometry: NDArray[np.float32], options: Options) -> _Texts:
    """Return the texts of all cells with a sufficient score.

    The geometry of a cell has the distances to a text's upper, right, lower and left edge, and its rotation. Each
    corner is rounded toward the cell, or toward the corner that it is computed from, as in OVMS.
    """
    rows, columns = np.nonzero(scores >= options.confidence_threshold)
    cells = geometry[rows, columns]
    check_numbers(cells, "geometry")
    up, right, down, left, angles = cells.T
    cos, sin = np.cos(angles), np.sin(angles)
    heights, widths = up + down, right + left
    x2 = columns * _CELL + _to_pixels(cos * right + sin * down)
    y2 = rows * _CELL + _to_pixels(-sin * right + cos * down)
    x1, y1 = x2 + _to_pixels(-sin * heights), y2 + _to_pixels(-cos * heights)
    x3, y3 = x2 + _to_pixels(-cos * widths), y2 + _to_pixels(sin * widths)
    xs = np.stack((x1, x2, x3, x3 + x1 - x2))
    ys = np.stack((y1, y2, y3, y3 + y1 - y2))
    low_x, high_x = _widen(xs, options.box_width_adjustment, options.original_image_width)
    low_y, high_y = _widen(ys, options.box_height_adjustment, options.original_image_height)
    corners = np.stack((low_x, low_y, high_x, high_y), axis=1)
    empty = (high_x <= low_x) | (high_y <= low_y)
    if empty.any():
        x, y, x_end, y_end = corners[empty][0].tolist()
        raise ValueError(
            f"input geometry has a text whose box from x {x}, y {y} to x {x_end}, y {y_end} has no pixels in the image"
        )
    heights = heights * (np.float32(1) + np.float32(options.box_height_adjustment))
    return _Texts(corners, angles, heights, scores[rows, columns])


def _to_pixels(distances: NDArray[np.float32]) -> NDArray[np.int64]:
    return distances.astype(np.int64)


def _widen(corners: NDArray[np.int64], adjustment: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the beginning and end of boxes in one direction, widened at both ends.

    The end is widened by a fraction of the size that includes the widened beginning, as in OVMS.
    """
    low, high = corners.min(axis=0), corners.max(axis=0)
    widened = low.astype(np.float32) - (high - low).astype(np.float32) * np.float32(adjustment)
    low = np.maximum(0, _to_pixels(widened))
    widened = high.astype(np.float32) + (high - low).astype(np.float32) * np.float32(adjustment)
    return low, np.minimum(size, _to_pixels(widened))


def _suppress_overlaps(texts: _Texts, options: Options) -> list[int]:
    """Return the indices of the texts that do not overlap a more confident one, the most confident first.

    The overlap is intersection over union. Of equally confident texts the later one goes first.
    """
    x1, y1, x2, y2 = texts.corners.T
    areas = (x2 - x1) * (y2 - y1)
    left = np.argsort(texts.scores, kind="stable")[::-1]
    kept: list[int] = []
    while len(left) and len(kept) < options.max_output_batch:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        widths = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        heights = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        common = (np.maximum(widths, 0) * np.maximum(heights, 0)).astype(np.float32)
        overlaps = common / ((areas[best] + areas[left]).astype(np.float32) - common)
        left = left[overlaps <= options.overlap_threshold]
    return kept


def _level_texts(crops: Iterator[Picture], texts: _Texts, kept: list[int], options: Options) -> Iterator[Picture]:
    for crop, index in zip(crops, kept, strict=True):
        degrees = np.float32(float(texts.angles[index]) * (180 / np.pi))
        turned = abs(degrees) > options.rotation_angle_threshold
        yield _level(crop, -float(degrees), texts.heights[index]) if turned else crop


def _level(crop: Picture, degrees: float, text_height: np.float32) -> Picture:
    """Rotate a crop about its centre and return the rows of the text, at full width. Raises ValueError."""
    height, width = crop.shape[:2]
    matrix = cv2.getRotationMatrix2D((width // 2, height // 2), degrees, 1)
    rows = int(text_height)
    first = int((np.float32(height) - text_height) / 2)
    if rows <= 0 or first + rows > height:
        raise ValueError(
            f"input geometry has a text of height {float(text_height):g} that is turned by {-degrees:g} degrees; it "
            f"does not fit its box of {width}x{height} pixels (width x height) when turned back"
        )
    return cv2.warpAffine(crop, matrix, (width, height))[first : first + rows]
