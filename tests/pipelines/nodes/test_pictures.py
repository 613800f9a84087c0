"""Pictures and boxes as values; the tests of the nodes cover boxes at and beyond the edges."""

import numpy as np
import pytest
from node_cases import batch, floats, random_image, refusal

from ovms_rest.pipelines.nodes.pictures import (
    Box,
    check_numbers,
    detected_boxes,
    read_picture,
    resize,
    select_detections,
    write_picture,
)

PICTURE = random_image(3, 5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_picture_is_read_and_written_in_its_layout(layout):
    tensor = batch(PICTURE, layout)
    written = np.empty_like(tensor)
    write_picture(read_picture(tensor, layout), written[0], layout)
    assert np.array_equal(read_picture(tensor, layout), PICTURE)
    assert np.array_equal(written, tensor)


def test_a_picture_that_has_the_size_is_not_copied():
    assert resize(PICTURE, 5, 3) is PICTURE
    assert resize(PICTURE, 4, 2).shape == (2, 4, 3)


def test_detections_are_selected_by_image_and_confidence():
    rows = floats([[0, 1, 0.5, 0, 0, 1, 1], [0, 2, 0.4, 0, 0, 1, 1], [1, 3, 0.9, 0, 0, 1, 1]], 1, 1, 3, 7)
    assert select_detections(rows, 0.5)[:, 1].tolist() == [1]


def test_the_corners_of_a_detection_may_be_in_any_order():
    rows = floats([[0, 1, 1, 0.75, 0.5, 0.25, 1]], 1, 7)
    assert detected_boxes(rows, 16, 12) == [Box(4, 6, 8, 6)]


@pytest.mark.parametrize("value", [2.0**31, -(2.0**31), np.nan, np.inf])
def test_a_number_beyond_32_bits_is_rejected(value):
    assert refusal(check_numbers, floats([1, value], 2), "boxes") == (
        f"input boxes: expected pixels or labels between -2**31 and 2**31, got {np.float32(value)}"
    )
