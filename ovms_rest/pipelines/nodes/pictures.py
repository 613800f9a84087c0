"""Pictures and boxes, for all nodes that work on images.

A picture is a float32 array [H,W,C] or [H,W], as OpenCV takes it. A box is the x and y of its upper left corner, its
width and its height, in pixels.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovms_rest.models.opencv import cv2
from ovms_rest.pipelines.nodes.params import CropOptions, ImageOptions, crops_form

Picture = NDArray[Any]

_TOO_LARGE = 2.0**31  # for OVMS's conversion to int


class Box(NamedTuple):
    """A part of a picture, which may reach beyond its edges."""

    x: int
    y: int
    width: int
    height: int


def read_picture(array: NDArray[np.float32], layout: str) -> Picture:
    """Return the image of an array [1,...]."""
    # cv2.merge takes a fifteenth of the time of copying a transposed view.
    picture: Picture = cv2.merge(tuple(array[0])) if layout == "NCHW" else array[0]
    return picture


def write_picture(picture: Picture, target: NDArray[np.float32], layout: str) -> None:
    """Write a picture into an array [C,H,W] or [H,W,C]."""
    if layout == "NHWC":
        target[...] = picture.reshape(target.shape)
    else:
        target[...] = picture.reshape(*target.shape[1:], target.shape[0]).transpose(2, 0, 1)


def resize(picture: Picture, width: int, height: int) -> Picture:
    return picture if picture.shape[:2] == (height, width) else cv2.resize(picture, (width, height))


def cut_boxes(array: NDArray[np.float32], boxes: Iterable[Box], options: ImageOptions) -> Iterator[Picture]:
    """Cut boxes out of the original image. Raises ValueError for one outside it."""
    picture = read_picture(array, options.original_image_layout)
    for box in boxes:
        yield _cut(picture, box)


def _cut(picture: Picture, box: Box) -> Picture:
    """Return the part of a picture inside a box. Raises ValueError if that is empty.

    As in OVMS, a box that begins left of the picture or above it is moved to the edge, at its full width and height.
    """
    x, y = max(box.x, 0), max(box.y, 0)
    part = picture[y : y + box.height, x : x + box.width]
    if not part.size:
        height, width = picture.shape[:2]
        raise ValueError(
            f"the box at x {box.x}, y {box.y} of {box.width}x{box.height} pixels (width x height) has no pixels in "
            f"the image of {width}x{height}"
        )
    return part


def stack_crops(crops: Iterable[Picture], count: int, options: CropOptions) -> NDArray[np.float32]:
    """Resize crops to the target's size, convert them to gray if requested, and stack them."""
    _, dims = crops_form(options)
    stacked = np.empty((count, *dims[1:]), np.float32)
    size = (options.target_image_width, options.target_image_height)
    for crop, target in zip(crops, stacked, strict=True):
        picture = cv2.resize(crop, size)
        if options.convert_to_gray_scale:
            picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        write_picture(picture, target[0], options.target_image_layout)
    return stacked


def stack_texts(
    crops: Iterable[Picture], boxes: list[Box], confidences: NDArray[np.float32], options: CropOptions
) -> dict[str, NDArray[Any]]:
    """Return the outputs of a text node: images, boxes [N,1,4], and confidences [N,1,1] from [N]."""
    return {
        "text_images": stack_crops(crops, len(boxes), options),
        "text_coordinates": np.array(boxes, np.int32).reshape(len(boxes), 1, 4),
        "confidence_levels": np.ascontiguousarray(confidences).reshape(-1, 1, 1),
    }


def select_detections(detection: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Return the rows of `detection` [1,1,D,7] for the first image with a confidence of at least `threshold`.

    A row is image, label, confidence, and the corners x_min, y_min, x_max, y_max as fractions of the image's sides.
    """
    rows: NDArray[np.float32] = detection[0, 0]
    return rows[(np.abs(rows[:, 0]) < 1) & (rows[:, 2] >= threshold)]


def detected_boxes(rows: NDArray[np.float32], width: int, height: int) -> list[Box]:
    """Return the boxes of `detection` rows in an image of that size; the corners may be in any order."""
    corners = rows[:, 3:] * np.array([width, height, width, height], np.float32)
    check_numbers(corners, "detection")
    x1, y1, x2, y2 = corners.astype(np.int64).T
    boxes = np.stack((np.minimum(x1, x2), np.minimum(y1, y2), np.abs(x2 - x1), np.abs(y2 - y1)), axis=1)
    return [Box(*box) for box in boxes.tolist()]


def check_numbers(values: NDArray[np.float32], name: str) -> None:
    """Raise ValueError for a value whose integer part is not an int of 32 bits."""
    fit = np.abs(values) < _TOO_LARGE  # NaN is not
    if not fit.all():
        raise ValueError(f"input {name}: expected pixels or labels between -2**31 and 2**31, got {values[~fit][0]}")
