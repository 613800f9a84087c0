"""libcustom_node_horizontal_ocr: the boxes of horizontal-text-detection, cut out of the image.

OVMS's documentation has the centre of a box in `text_coordinates`; its library gives the upper left corner, and so
does this. Where a box reaches beyond the image, OVMS's library ends with an exception that it does not catch; here the
box is cut as its other libraries do it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.pipelines.nodes.params import (
    ANY,
    Arrays,
    CropOptions,
    Forms,
    Params,
    check_arrays,
    crops_form,
    original_form,
    parse_params,
)
from ovms_rest.pipelines.nodes.pictures import Box, check_numbers, cut, read_picture, stack_boxes, stack_crops


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options(CropOptions):
    pass


def inputs(params: Params) -> Forms:
    """Take the image and the boxes, each x_min, y_min, x_max, y_max in pixels and its confidence."""
    return _inputs(parse_params(_Options, params))


def outputs(params: Params) -> Forms:
    """Give the images of the texts, their boxes and their confidences."""
    return {
        "text_images": crops_form(parse_params(_Options, params)),
        "text_coordinates": ("INT32", (ANY, 1, 4)),
        "confidence_levels": ("FP32", (ANY, 1, 1)),
    }


def execute(arrays: Arrays, params: Params) -> dict[str, NDArray[Any]]:
    """Cut out the texts, in their order. Raises ValueError."""
    options = parse_params(_Options, params)
    check_arrays(arrays, _inputs(options))
    rows = arrays["boxes"]
    rows = rows[rows[:, 4] >= options.confidence_threshold]
    check_numbers(rows[:, :4], "boxes")
    sides = rows[:, 2:4] - rows[:, :2]
    check_numbers(sides, "boxes")
    if not (sides > 0).all():
        x1, y1, x2, y2 = rows[(sides <= 0).any(axis=1)][0, :4].tolist()
        raise ValueError(
            f"input boxes has a box from x {x1:g}, y {y1:g} to x {x2:g}, y {y2:g}, which has to have a width and a "
            "height above 0"
        )
    rows = rows[: options.max_output_batch]
    numbers = np.concatenate((rows[:, :2], sides[: len(rows)]), axis=1).astype(np.int64)
    boxes = [Box(*box) for box in numbers.tolist()]
    image = read_picture(arrays["image"], options.original_image_layout)
    return {
        "text_images": stack_crops((cut(image, box) for box in boxes), len(boxes), options),
        "text_coordinates": stack_boxes(boxes),
        "confidence_levels": rows[:, np.newaxis, 4:].copy(),
    }


def _inputs(options: _Options) -> Forms:
    return {"image": original_form(options), "boxes": ("FP32", (ANY, 5))}
