"""A custom node in Python that finds handwritten digits, white on black, in a picture and cuts them out.

Its three functions are those of ovms_rest/pipelines/README.md, "Custom nodes in Python"; config.json has its pipeline.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Params = Mapping[str, str]

# The size of the digits that the model was trained on.
SIZE = 8


def inputs(params: Params) -> dict[str, Any]:
    """Declare a grey picture [1,height,width,1] of values from 0 to 255."""
    return {"picture": ("FP32", [1, -1, -1, 1])}


def outputs(params: Params) -> dict[str, Any]:
    """Declare n digits [n,1,8,8,1] from left to right, and their boxes [n,4]: left, top, width and height."""
    return {"digits": ("FP32", [-1, 1, SIZE, SIZE, 1]), "boxes": ("INT32", [-1, 4])}


def execute(inputs: Mapping[str, NDArray[Any]], params: Params) -> dict[str, NDArray[Any]]:
    """Find connected areas that are brighter than `threshold` and at least `min_height` pixels high."""
    picture = np.rint(inputs["picture"][0, :, :, 0]).astype(np.uint8)
    bright = (picture > int(params.get("threshold", "40"))).astype(np.uint8)
    found = _find_areas(bright) if picture.size else []  # OpenCV refuses a picture without pixels
    boxes = sorted(box for box in found if box[3] >= int(params.get("min_height", "12")))
    digits = np.zeros((len(boxes), 1, SIZE, SIZE, 1), np.float32)
    for digit, box in zip(digits, boxes, strict=True):
        digit[0, :, :, 0] = _cut(picture, *box)
    return {"digits": digits, "boxes": np.array(boxes, np.int32).reshape(-1, 4)}


def _find_areas(bright: NDArray[np.uint8]) -> list[list[int]]:
    """Return the boxes of connected areas."""
    joined = cv2.dilate(bright, np.ones((3, 3), np.uint8))  # a stroke may have gaps
    count, _, stats, _ = cv2.connectedComponentsWithStats(joined)
    return [stats[index, :4].tolist() for index in range(1, count)]


def _cut(picture: NDArray[np.uint8], left: int, top: int, width: int, height: int) -> NDArray[Any]:
    """Cut out a digit, centre it in a square and resize it for the model."""
    side = max(width, height)
    square = np.zeros((side, side), np.uint8)
    at_x, at_y = (side - width) // 2, (side - height) // 2
    square[at_y : at_y + height, at_x : at_x + width] = picture[top : top + height, left : left + width]
    return cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
