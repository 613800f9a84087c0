"""libcustom_node_model_zoo_intel_object_detection: cuts the boxes of a detection model out of the image.

OVMS's documentation has the centre and size of a box in `coordinates`; its library returns the corners unchanged, as
here. With more boxes than `max_output_batch`, OVMS's library limits the images and confidences, but writes all
coordinates and labels, beyond the end of its memory; here all outputs are limited.
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
    crops_form,
    integer,
    original_form,
    param,
    size,
)
from ovms_rest.pipelines.nodes.pictures import (
    check_numbers,
    cut_boxes,
    detected_boxes,
    select_detections,
    stack_crops,
)

_EVERY_LABEL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(CropOptions):
    filter_label_id: int = param(integer(), _EVERY_LABEL)
    buffer_queue_size: int = param(size, 24)  # accepted without effect; OVMS pools memory


def inputs(options: Options) -> Forms:
    """Return the forms of the image and of the detections."""
    return {"image": original_form(options), "detection": ("FP32", (1, 1, ANY, 7))}


def outputs(options: Options) -> Forms:
    """Return the forms of the crops, their corners as fractions of the image's sides, confidences and labels."""
    return {
        "images": crops_form(options),
        "coordinates": ("FP32", (ANY, 1, 4)),
        "confidences": ("FP32", (ANY, 1, 1)),
        "label_ids": ("INT32", (ANY, 1, 1)),
    }


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[Any]]:
    """Cut out the detections in their order. Raises ValueError without rows and for a box that cannot be cut out."""
    if not arrays["detection"].size:
        raise ValueError("input detection has no rows; at least one is required")
    rows = select_detections(arrays["detection"], options.confidence_threshold)
    check_numbers(rows[:, 1], "detection")
    labels = rows[:, 1].astype(np.int32)
    if options.filter_label_id != _EVERY_LABEL:
        rows, labels = rows[labels == options.filter_label_id], labels[labels == options.filter_label_id]
    rows, labels = rows[: options.max_output_batch], labels[: options.max_output_batch]
    boxes = detected_boxes(rows, options.original_image_width, options.original_image_height)
    return {
        "images": stack_crops(cut_boxes(arrays["image"], boxes, options), len(boxes), options),
        "coordinates": rows[:, np.newaxis, 3:].copy(),
        "confidences": rows[:, np.newaxis, 2:3].copy(),
        "label_ids": labels.reshape(-1, 1, 1),
    }
