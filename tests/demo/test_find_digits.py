"""The demo's custom node, with arrays: the digits of a picture, cut out and resized, and their boxes."""

import numpy as np
import pytest

from ovms_rest.demo.find_digits import SIZE, execute


def find(*boxes, **params):
    """Find the digits in a picture [40,80] with white boxes (left, top, width, height)."""
    picture = np.zeros((1, 40, 80, 1), np.float32)
    for left, top, width, height in boxes:
        picture[0, top : top + height, left : left + width] = 255
    return execute({"picture": picture}, params)


def test_digits_are_found_from_left_to_right():
    found = find((50, 8, 10, 20), (10, 4, 6, 24))
    # A box has a pixel more on each side, since strokes are widened to close their gaps.
    assert found["boxes"].tolist() == [[9, 3, 8, 26], [49, 7, 12, 22]]
    assert found["digits"].shape == (2, 1, SIZE, SIZE, 1)


def test_digit_is_centred_in_a_square():
    (digit,) = find((30, 5, 8, 24))["digits"]
    assert digit[0, :, 0, 0].max() == digit[0, :, -1, 0].max() == 0
    assert digit[0, SIZE // 2, SIZE // 2, 0] == 255


@pytest.mark.parametrize("boxes", [[], [(10, 10, 9, 9)]])
def test_picture_without_large_areas_has_no_digits(boxes):
    found = find(*boxes)
    assert (found["digits"].shape, found["boxes"].shape) == ((0, 1, SIZE, SIZE, 1), (0, 4))


def test_picture_without_pixels_has_no_digits():
    assert execute({"picture": np.zeros((1, 0, 0, 1), np.float32)}, {})["boxes"].shape == (0, 4)


def test_parameters_set_the_limits():
    assert len(find((10, 10, 9, 9), min_height="5")["boxes"]) == 1
    assert len(find((10, 4, 6, 24), threshold="255")["boxes"]) == 0
