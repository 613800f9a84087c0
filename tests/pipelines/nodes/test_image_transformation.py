"""libcustom_node_image_transformation: size, layout, colour order, mean and scale."""

import numpy as np
import pytest
from node_cases import NODES, batch, close, gray, random_image, refusal, resized

NODE = NODES["image_transformation"]


def transform(picture, layout="NHWC", **params):
    """Return the transformed tensor."""
    return NODE.run({"image": batch(picture, layout)}, original_image_layout=layout, **params)["image"]


PICTURE = random_image(6, 8)
MEAN = np.array([10, 20, 30])
SCALES = np.array([2, 4, 8])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PICTURE),
        ({"debug": "true"}, PICTURE),
        ({"target_image_width": "-1", "target_image_height": "-1"}, PICTURE),
        ({"target_image_width": "4", "target_image_height": "3"}, resized(PICTURE, 4, 3)),
        ({"target_image_width": "13", "target_image_height": "9"}, resized(PICTURE, 13, 9)),
        ({"target_image_width": "3"}, resized(PICTURE, 3, 6)),
        ({"target_image_height": "11"}, resized(PICTURE, 8, 11)),
        ({"target_image_color_order": "RGB"}, PICTURE[:, :, ::-1]),
        ({"original_image_color_order": "RGB", "target_image_color_order": "BGR"}, PICTURE[:, :, ::-1]),
        ({"original_image_color_order": "RGB"}, PICTURE),
        ({"target_image_color_order": "GRAY"}, gray(PICTURE)),
        ({"original_image_color_order": "RGB", "target_image_color_order": "GRAY"}, gray(PICTURE[:, :, ::-1])),
        ({"mean_values": "[10,20,30]"}, PICTURE - MEAN),
        ({"scale": "2.5"}, PICTURE / 2.5),
        ({"scale": "-2.5"}, PICTURE / -2.5),
        ({"scale_values": "[2, 4, 8]"}, PICTURE / SCALES),
        ({"scale_values": "[]", "mean_values": "[ ]"}, PICTURE),
        # The mean first, then the scale.
        ({"mean_values": "[10,20,30]", "scale": "2"}, (PICTURE - MEAN) / 2),
        ({"mean_values": "[10,20,30]", "scale_values": "[2,4,8]"}, (PICTURE - MEAN) / SCALES),
        # The values of the channels go before the one for all.
        ({"scale": "100", "scale_values": "[2,4,8]"}, PICTURE / SCALES),
        # They are in the target's colour order.
        (
            {"target_image_color_order": "RGB", "mean_values": "[10,20,30]", "scale_values": "[2,4,8]"},
            (PICTURE[:, :, ::-1] - MEAN) / SCALES,
        ),
        ({"target_image_color_order": "GRAY", "mean_values": "[10]", "scale_values": "[4]"}, (gray(PICTURE) - 10) / 4),
        (
            {"target_image_color_order": "GRAY", "scale": "4", "target_image_width": "4"},
            resized(gray(PICTURE) / 4, 4, 6),
        ),
        # Before the resize where that enlarges, after it else; both come to the same.
        ({"mean_values": "[10,20,30]", "scale": "2", "target_image_width": "16"}, (resized(PICTURE, 16, 6) - MEAN) / 2),
        ({"mean_values": "[10,20,30]", "scale": "2", "target_image_width": "4"}, (resized(PICTURE, 4, 6) - MEAN) / 2),
    ],
)
@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_an_image_is_transformed(source, target, params, expected):
    assert close(transform(PICTURE, source, target_image_layout=target, **params), batch(np.asarray(expected), target))


@pytest.mark.parametrize(("target", "channels"), [("BGR", 3), ("RGB", 3), ("GRAY", 1)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_gray_image_gets_equal_channels(layout, target, channels):
    picture = random_image(3, 4, 1)
    found = transform(picture, layout, original_image_color_order="GRAY", target_image_color_order=target)
    assert close(found, batch(np.repeat(picture, channels, axis=2), layout))


def test_a_gray_image_is_resized():
    picture = random_image(4, 6, 1)
    found = transform(picture, "NHWC", original_image_color_order="GRAY", target_image_width="3")
    assert close(found, batch(resized(picture, 3, 4), "NHWC"))


def test_the_target_has_the_originals_layout_by_default():
    assert transform(PICTURE, "NCHW").shape == (1, 3, 6, 8)
    assert transform(PICTURE, "NHWC").shape == (1, 6, 8, 3)


def test_the_scale_is_applied_as_an_fp32_factor_as_in_opencv():
    found = transform(PICTURE, scale="57.12")
    assert np.array_equal(found[0], PICTURE * np.float32(1 / float(np.float32(57.12))))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"mean_values": "[1]"}, "param mean_values: expected 3 for the target's colour order BGR, got 1"),
        (
            {"target_image_color_order": "GRAY", "scale_values": "[1,2,3]"},
            "param scale_values: expected 1 for the target's colour order GRAY, got 3",
        ),
    ],
)
def test_a_wrong_number_of_values_for_the_channels_is_reported(params, expected):
    assert refusal(NODE.options, **params) == expected


def test_an_image_without_pixels_is_rejected():
    image = np.zeros((1, 0, 4, 3), np.float32)
    assert NODE.refusal({"image": image}) == ("input image has the shape [1, 0, 4, 3], which has no pixels")


@pytest.mark.parametrize(
    ("layout", "order", "shape", "expected"),
    [
        ("NHWC", "BGR", [1, 2, 2, 1], [1, -1, -1, 3]),
        ("NHWC", "GRAY", [1, 2, 2, 3], [1, -1, -1, 1]),
        ("NCHW", "RGB", [1, 4, 3, 3], [1, 3, -1, -1]),
        ("NCHW", "GRAY", [1, 0, 3, 3], [1, 1, -1, -1]),
    ],
)
def test_an_image_with_the_wrong_channels_is_rejected(layout, order, shape, expected):
    params = {"original_image_layout": layout, "original_image_color_order": order}
    assert NODE.refusal({"image": np.zeros(shape, np.float32)}, **params) == (
        f"input image has the shape {shape}, expected {expected}"
    )


def test_image_transformation_describes_its_tensors():
    assert NODE.inputs() == {"image": ("FP32", (1, -1, -1, -1))}
    assert NODE.outputs() == {"image": ("FP32", (1, -1, -1, 3))}
    params = {"target_image_layout": "NCHW", "target_image_color_order": "GRAY", "target_image_width": "7"}
    assert NODE.outputs(**params) == {"image": ("FP32", (1, 1, -1, 7))}
