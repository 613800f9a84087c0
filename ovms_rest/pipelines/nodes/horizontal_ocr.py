"""libcustom_node_horizontal_ocr: cuts the boxes of horizontal-text-detection out of the image.

OVMS's documentation has the centre of a box in `text_coordinates`; its library returns the upper left corner, as here.
For a box that reaches beyond the image, OVMS's library ends with an uncaught exception; here it is cut as in OVMS's
other libraries.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.pipelines.nodes.params import ANY, Arrays, CropOptions, Forms, original_form, text_forms
from ovms_rest.pipelines.nodes.pictures import Box, check_numbers, cut_boxes, stack_texts

Options = CropOptions


def inputs(options: Options) -> Forms:
    """Return the forms of the image and of the boxes: x_min, y_min, x_max, y_max in pixels and a confidence."""
    return {"image": original_form(options), "boxes": ("FP32", (ANY, 5))}


def outputs(options: Options) -> Forms:
    """Return the forms of the texts' images, boxes and confidences."""
    return text_forms(options)


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[Any]]:
    """Cut out the texts in their order. Raises ValueError for a box that cannot be cut out."""
    rows = arrays["boxes"]
    rows = rows[rows[:, 4] >= options.confidence_threshold]
    check_numbers(rows[:, :4], "boxes")
    sides = rows[:, 2:4] - rows[:, :2]
    check_numbers(sides, "boxes")
    if not (sides > 0).all():
        x1, y1, x2, y2 = rows[(sides <= 0).any(axis=1)][0, :4].tolist()
        raise ValueError(
            f"input boxes has a box from x {x1:g}, y {y1:g} to x {x2:g}, y {y2:g}; its width and height must be above 0"
        )
    rows = rows[: options.max_output_batch]
    numbers = np.concatenate((rows[:, :2], sides[: len(rows)]), axis=1).astype(np.int64)
    boxes = [Box(*box) for box in numbers.tolist()]
    return stack_texts(cut_boxes(arrays["image"], boxes, options), boxes, rows[:, 4], options)
