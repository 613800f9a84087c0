"""libcustom_node_model_zoo_intel_object_detection: the boxes of a detection model, cut out of the image.

OVMS's documentation has the centre and the size of a box in `coordinates`; its library gives the corners as they came,
and so does this. When more boxes than `max_output_batch` are found, OVMS cuts off the images and the confidences, but
writes the coordinates and labels of all beyond its memory; here all are cut off.
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
    integer,
    original_form,
    param,
    parse_params,
    size,
)
from ovms_rest.pipelines.nodes.pictures import (
    check_numbers,
    cut,
    detected_boxes,
    read_picture,
    select_detections,
    stack_crops,
)

_EVERY_LABEL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options(CropOptions):
    filter_label_id: int = param(integer(), _EVERY_LABEL)
    buffer_queue_size: int = param(size, 24)  # of memory that OVMS keeps


def inputs(params: Params) -> Forms:
    """Take the image and what was detected in it."""
    return _inputs(parse_params(_Options, params))


def outputs(params: Params) -> Forms:
    """Give the images of what was detected, its corners as parts of the image's sides, confidences and labels."""
    return {
        "images": crops_form(parse_params(_Options, params)),
        "coordinates": ("FP32", (ANY, 1, 4)),
        "confidences": ("FP32", (ANY, 1, 1)),
        "label_ids": ("INT32", (ANY, 1, 1)),
    }


def execute(arrays: Arrays, params: Params) -> dict[str, NDArray[Any]]:
    """Cut out what was detected, in its order. Raises ValueError."""
    options = parse_params(_Options, params)
    check_arrays(arrays, _inputs(options))
    if not arrays["detection"].size:
        raise ValueError("input detection has no rows, it has to have one at least")
    rows = select_detections(arrays["detection"], options.confidence_threshold)
    check_numbers(rows[:, 1], "detection")
    labels = rows[:, 1].astype(np.int32)
    if options.filter_label_id != _EVERY_LABEL:
        rows, labels = rows[labels == options.filter_label_id], labels[labels == options.filter_label_id]
    rows, labels = rows[: options.max_output_batch], labels[: options.max_output_batch]
    boxes = detected_boxes(rows, options.original_image_width, options.original_image_height)
    image = read_picture(arrays["image"], options.original_image_layout)
    return {
        "images": stack_crops((cut(image, box) for box in boxes), len(boxes), options),
        "coordinates": rows[:, np.newaxis, 3:].copy(),
        "confidences": rows[:, np.newaxis, 2:3].copy(),
        "label_ids": labels.reshape(-1, 1, 1),
    }


def _inputs(options: _Options) -> Forms:
    return {"image": original_form(options), "detection": ("FP32", (1, 1, ANY, 7))}
