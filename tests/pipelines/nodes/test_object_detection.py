"""libcustom_node_model_zoo_intel_object_detection: the crops of detections."""

import math

import numpy as np
import pytest
from node_cases import NODES, SCENE, batch, close, crop, detection, floats, gray, images

NODE = NODES["object_detection"]


def detect(*rows, layout="NCHW", **params):
    """Run the object detection on the scene."""
    arrays = {"image": batch(SCENE, layout), "detection": detection(*rows)}
    return NODE.run(arrays, original_image_layout=layout, **params)


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_detections_are_cut_out_in_their_order(source, target):
    found = detect(
        (0, 3, 0.6, 0.25, 0.25, 0.5, 0.75),
        (0, 1, 0.9, 0, 0, 1, 1),
        layout=source,
        target_image_layout=target,
        buffer_queue_size="1",
        debug="true",
    )
    assert close(found["images"], images(crop(4, 3, 4, 6), crop(0, 0, 16, 12), layout=target))
    assert found["coordinates"].tolist() == [[[0.25, 0.25, 0.5, 0.75]], [[0, 0, 1, 1]]]
    assert found["confidences"].tolist() == [[[np.float32(0.6)]], [[np.float32(0.9)]]]
    assert found["label_ids"].tolist() == [[[3]], [[1]]]


@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_crops_of_detections_can_be_gray(target):
    found = detect((0, 0, 1, 0.25, 0.25, 0.5, 0.75), convert_to_gray_scale="true", target_image_layout=target)
    assert close(found["images"], images(gray(crop(4, 3, 4, 6)), layout=target))


@pytest.mark.parametrize(
    ("threshold", "kept"), [("0", [0, 1, 2, 3]), ("0.3", [1, 2, 3]), ("0.7", [2, 3]), ("0.8", [3]), ("1.0", [])]
)
def test_a_confidence_equal_to_the_threshold_is_kept(threshold, kept):
    confidences = [0.1, 0.3, 0.7, 0.9]
    found = detect(
        *((0, label, sure, 0, 0, 1, 1) for label, sure in enumerate(confidences)), confidence_threshold=threshold
    )
    assert found["label_ids"].ravel().tolist() == kept


def test_rows_of_other_images_or_with_a_nan_confidence_are_left_out():
    rows = [(image, label, 1, 0, 0, 1, 1) for label, image in enumerate((-1, 1, 0.5, -0.5, math.nan, 0))]
    assert detect(*rows, (0, 9, math.nan, 0, 0, 1, 1))["label_ids"].ravel().tolist() == [2, 3, 5]


@pytest.mark.parametrize(("label", "kept"), [("-1", [7, 8, 7]), ("7", [7, 7]), ("8", [8]), ("9", [])])
def test_detections_can_be_filtered_by_label(label, kept):
    rows = [(0, found, 1, 0, 0, 1, 1) for found in (7, 8, 7)]
    assert detect(*rows, filter_label_id=label)["label_ids"].ravel().tolist() == kept


def test_the_first_detections_are_kept_when_there_are_too_many():
    rows = [(0, label, 0.5 + label / 10, label / 16, 0, 1, 1) for label in range(4)]
    found = detect(*rows, max_output_batch="3")
    assert found["label_ids"].ravel().tolist() == [0, 1, 2]
    assert found["confidences"].ravel().tolist() == [np.float32(0.5 + label / 10) for label in range(3)]
    assert found["coordinates"][:, 0, 0].tolist() == [0, 1 / 16, 2 / 16]
    assert close(found["images"], images(*(crop(label, 0, 16 - label, 12) for label in range(3))))


def test_no_detections_are_empty_arrays():
    found = detect((0, 0, 0.1, 0, 0, 1, 1))
    assert {name: array.shape for name, array in found.items()} == {
        "images": (0, 1, 3, 4, 5),
        "coordinates": (0, 1, 4),
        "confidences": (0, 1, 1),
        "label_ids": (0, 1, 1),
    }


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ((0.99, 0.99, 0.1, 0.1), (1, 1, 14, 10)),  # any two opposite corners; pixels are whole parts
        ((0.5, 0, 1.5, 1), (8, 0, 8, 12)),  # cut off at the right
        ((0, 0.5, 1, 1.5), (0, 6, 16, 6)),  # and below
        ((-0.25, 0, 0.25, 1), (0, 0, 8, 12)),  # moved from the left, its width remains
        ((0, -0.5, 1, 0.25), (0, 0, 16, 9)),  # and from above
        ((-1, -1, -0.5, -0.5), (0, 0, 8, 6)),  # even when all of it was outside
        ((-1, -1, 2, 2), (0, 0, 16, 12)),
    ],
)
def test_a_box_beyond_the_edge_is_moved_into_the_image(corners, box):
    found = detect((0, 0, 1, *corners))
    assert close(found["images"], images(crop(*box)))
    assert np.array_equal(found["coordinates"], floats(corners, 1, 1, 4))


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ((0.5, 0, 0.5, 1), "x 8, y 0 of 0x12"),
        ((0, 0.5, 1, 0.5), "x 0, y 6 of 16x0"),
        ((1, 0, 2, 1), "x 16, y 0 of 16x12"),
        ((0, 1.5, 1, 2), "x 0, y 18 of 16x6"),
    ],
)
def test_a_box_without_pixels_is_rejected(corners, box):
    arrays = {"image": batch(SCENE), "detection": detection((0, 0, 1, *corners))}
    assert NODE.refusal(arrays) == (f"the box at {box} pixels (width x height) has no pixels in the image of 16x12")


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ((0, 0, 1, math.nan, 0, 1, 1), "nan"),
        ((0, 0, 1, 0, 0, math.inf, 1), "inf"),
        ((0, 0, 1, 0, -1e9, 1, 1), "-12000000000.0"),
        ((0, math.nan, 1, 0, 0, 1, 1), "nan"),
        ((0, 3e9, 1, 0, 0, 1, 1), "3000000000.0"),
    ],
)
def test_a_detection_that_is_not_a_number_is_rejected(row, shown):
    arrays = {"image": batch(SCENE), "detection": detection(row)}
    assert NODE.refusal(arrays) == (f"input detection: expected pixels or labels between -2**31 and 2**31, got {shown}")


def test_a_detection_without_rows_is_rejected():
    arrays = {"image": batch(SCENE), "detection": np.zeros((1, 1, 0, 7), np.float32)}
    assert NODE.refusal(arrays) == ("input detection has no rows; at least one is required")


def test_object_detection_describes_its_tensors():
    nhwc = {"original_image_layout": "NHWC", "target_image_layout": "NHWC", "convert_to_gray_scale": "true"}
    assert NODE.inputs() == {"image": ("FP32", (1, 3, 12, 16)), "detection": ("FP32", (1, 1, -1, 7))}
    assert NODE.inputs(**nhwc)["image"] == ("FP32", (1, 12, 16, 3))
    assert NODE.outputs() == {
        "images": ("FP32", (-1, 1, 3, 4, 5)),
        "coordinates": ("FP32", (-1, 1, 4)),
        "confidences": ("FP32", (-1, 1, 1)),
        "label_ids": ("INT32", (-1, 1, 1)),
    }
    assert NODE.outputs(**nhwc)["images"] == ("FP32", (-1, 1, 4, 5, 1))
