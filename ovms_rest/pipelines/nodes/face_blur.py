"""libcustom_node_face_blur: blurs the boxes of a detection model in the image, one after the other.

OVMS's library blurs an NHWC image of the request in place, so that other nodes see it blurred; this one does not.
For a box that reaches beyond the image, OVMS's library ends with an uncaught exception; here the part inside the image
is blurred.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_rest.models.opencv import cv2
from ovms_rest.pipelines.nodes.params import (
    Arrays,
    Form,
    Forms,
    ImageOptions,
    image_form,
    integer,
    original_form,
    param,
)
from ovms_rest.pipelines.nodes.pictures import (
    Box,
    Picture,
    detected_boxes,
    read_picture,
    resize,
    select_detections,
    write_picture,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ImageOptions):
    gaussian_blur_kernel_size: int = param(integer(1, "an odd number", lambda number: number % 2 == 1))


def inputs(options: Options) -> Forms:
    """Return the forms of the image and of the detections."""
    return {"image": original_form(options), "detection": ("FP32", (1, 1, 200, 7))}


def outputs(options: Options) -> Forms:
    return {"image": _target_form(options)}


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[np.float32]]:
    """Blur the detections, then resize the image. Raises ValueError for corners that are not numbers."""
    rows = select_detections(arrays["detection"], options.confidence_threshold)
    boxes = detected_boxes(rows, options.original_image_width, options.original_image_height)
    picture = read_picture(arrays["image"], options.original_image_layout)
    if options.original_image_layout == "NHWC":
        picture = picture.copy()
    for box in boxes:
        _blur(picture, box, options.gaussian_blur_kernel_size)
    _, dims = _target_form(options)
    blurred = np.empty(dims, np.float32)
    resized = resize(picture, options.target_image_width, options.target_image_height)
    write_picture(resized, blurred[0], options.target_image_layout)
    return {"image": blurred}


def _blur(picture: Picture, box: Box, kernel_size: int) -> None:
    """Blur a box in place, including the influence of the pixels around it, as OpenCV does for a submatrix in C++."""
    x, y = max(box.x, 0), max(box.y, 0)
    part = picture[y : max(y, box.y + box.height), x : max(x, box.x + box.width)]
    if not part.size:
        return
    height, width = part.shape[:2]
    reach = kernel_size // 2
    left, top = max(x - reach, 0), max(y - reach, 0)
    around = picture[top : y + height + reach, left : x + width + reach]
    blurred = cv2.GaussianBlur(around, (kernel_size, kernel_size), 0)
    part[...] = blurred[y - top : y - top + height, x - left : x - left + width]


def _target_form(options: Options) -> Form:
    return image_form(options.target_image_layout, 3, options.target_image_height, options.target_image_width)
