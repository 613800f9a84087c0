"""libcustom_node_horizontal_ocr: the crops of horizontal texts."""

import math

import pytest
from node_cases import NODES, SCENE, batch, close, crop, floats, gray, images

NODE = NODES["horizontal_ocr"]


def read_horizontal(*rows, layout="NCHW", **params):
    """Run horizontal_ocr on the scene."""
    arrays = {"image": batch(SCENE, layout), "boxes": floats(rows, -1, 5)}
    return NODE.run(arrays, original_image_layout=layout, **params)


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_texts_are_cut_out_in_their_order(source, target):
    found = read_horizontal(
        (1.9, 2.9, 7.5, 6.2, 0.5),
        (0, 0, 16, 12, 0.4999),
        (4, 1, 8, 12, 0.75),
        layout=source,
        target_image_layout=target,
        debug="false",
    )
    # Of a corner and of a size the whole part, of the size as it is between the corners.
    assert found["text_coordinates"].tolist() == [[[1, 2, 5, 3]], [[4, 1, 4, 11]]]
    assert found["confidence_levels"].tolist() == [[[0.5]], [[0.75]]]
    assert close(found["text_images"], images(crop(1, 2, 5, 3), crop(4, 1, 4, 11), layout=target))


def test_texts_can_be_gray():
    found = read_horizontal((1, 2, 6, 5, 1), convert_to_gray_scale="true")
    assert close(found["text_images"], images(gray(crop(1, 2, 5, 3))))


def test_the_first_texts_are_kept_when_there_are_too_many():
    rows = [(x, 0, 16, 12, 0.5 + x / 10) for x in range(4)]
    assert read_horizontal(*rows, max_output_batch="2")["text_coordinates"][:, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("rows", [(), ((0, 0, 16, 12, 0.4),), ((0, 0, 0, 0, 0.4),), ((0, 0, 16, 12, math.nan),)])
def test_no_texts_are_empty_arrays(rows):
    found = read_horizontal(*rows)
    assert {name: array.shape for name, array in found.items()} == {
        "text_images": (0, 1, 3, 4, 5),
        "text_coordinates": (0, 1, 4),
        "confidence_levels": (0, 1, 1),
    }


def test_a_text_beyond_the_edge_is_moved_into_the_image_but_its_coordinates_are_kept():
    found = read_horizontal((-2, 6, 6, 20, 1))
    assert found["text_coordinates"].tolist() == [[[-2, 6, 8, 14]]]
    assert close(found["text_images"], images(crop(0, 6, 8, 6)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((3, 1, 3, 2, 1), "input boxes has a box from x 3, y 1 to x 3, y 2; its width and height must be above 0"),
        ((0.5, 4, 1, 2, 1), "input boxes has a box from x 0.5, y 4 to x 1, y 2; its width and height must be above 0"),
        ((3, 1, 3.5, 2, 1), "the box at x 3, y 1 of 0x1 pixels (width x height) has no pixels in the image of 16x12"),
        ((16, 1, 20, 2, 1), "the box at x 16, y 1 of 4x1 pixels (width x height) has no pixels in the image of 16x12"),
        ((math.nan, 0, 1, 1, 1), "input boxes: expected pixels or labels between -2**31 and 2**31, got nan"),
        ((-2e9, 0, 2e9, 1, 1), "input boxes: expected pixels or labels between -2**31 and 2**31, got 4000000000.0"),
    ],
)
def test_a_text_without_pixels_is_rejected(row, expected):
    arrays = {"image": batch(SCENE), "boxes": floats([(0, 0, 1, 1, 1), row], 2, 5)}
    assert NODE.refusal(arrays) == expected


def test_horizontal_ocr_describes_its_tensors():
    assert NODE.inputs() == {"image": ("FP32", (1, 3, 12, 16)), "boxes": ("FP32", (-1, 5))}
    assert NODE.outputs(target_image_layout="NHWC") == {
        "text_images": ("FP32", (-1, 1, 4, 5, 3)),
        "text_coordinates": ("INT32", (-1, 1, 4)),
        "confidence_levels": ("FP32", (-1, 1, 1)),
    }
