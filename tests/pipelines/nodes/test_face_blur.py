"""libcustom_node_face_blur: detections are blurred in the image."""

import numpy as np
import pytest
from node_cases import NODES, SCENE, batch, blurred, close, detection, resized

NODE = NODES["face_blur"]
KERNELS = {"1": [1], "3": [0.25, 0.5, 0.25], "5": [0.0625, 0.25, 0.375, 0.25, 0.0625]}


def blur(*rows, layout="NCHW", **params):
    """Run face_blur on the scene."""
    arrays = {"image": batch(SCENE, layout), "detection": detection(*rows, count=200)}
    return NODE.run(arrays, **{"original_image_layout": layout, "target_image_layout": layout} | params)["image"]


@pytest.mark.parametrize("size", KERNELS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_face_is_blurred_with_the_pixels_around_it(layout, size):
    found = blur((0, 0, 0.5, 0.25, 0.25, 0.5, 0.75), layout=layout, gaussian_blur_kernel_size=size, debug="true")
    assert close(found, batch(blurred(SCENE, (4, 3, 4, 6), KERNELS[size]), layout))


def test_a_large_kernel_has_opencvs_sigma():
    sigma = 0.3 * ((11 - 1) * 0.5 - 1) + 0.8
    weights = np.exp([-(distance**2) / (2 * sigma**2) for distance in range(-5, 6)])
    found = blur((0, 0, 1, 0.25, 0.25, 0.5, 0.75), gaussian_blur_kernel_size="11")
    assert close(found, batch(blurred(SCENE, (4, 3, 4, 6), weights / weights.sum())))


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ((0, 0, 1, 1), (0, 0, 16, 12)),
        ((0, 0, 0.125, 0.25), (0, 0, 2, 3)),
        ((0.9375, 0.75, 1, 1), (15, 9, 1, 3)),
        ((-0.5, -0.5, 0.25, 0.25), (0, 0, 4, 3)),  # the part in the image
        ((0.5, 0.5, 1.5, 1.5), (8, 6, 8, 6)),
        ((-1, 0, -0.25, 1), (0, 0, 0, 0)),  # nothing is
        ((1.5, 0, 2, 1), (0, 0, 0, 0)),
        ((0.5, 0.5, 0.5, 1), (0, 0, 0, 0)),
    ],
)
def test_only_the_part_of_a_face_inside_the_image_is_blurred(corners, box):
    found = blur((0, 0, 1, *corners), gaussian_blur_kernel_size="5")
    assert close(found, batch(blurred(SCENE, box, KERNELS["5"])))


def test_faces_are_blurred_one_after_the_other():
    found = blur((0, 0, 1, 0, 0, 0.5, 0.5), (0, 1, 1, 0.25, 0.25, 1, 1))
    first = blurred(SCENE, (0, 0, 8, 6), KERNELS["3"])
    assert close(found, batch(blurred(first, (4, 3, 12, 9), KERNELS["3"])))


def test_a_face_below_the_threshold_is_not_blurred():
    rows = [(0, 0, 0.4999, 0, 0, 1, 1), (1, 0, 1, 0, 0, 1, 1)]
    assert np.array_equal(blur(*rows), batch(SCENE))


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_the_image_is_resized_after_blurring(source, target):
    found = blur(
        (0, 0, 1, 0, 0, 0.5, 0.5),
        layout=source,
        target_image_layout=target,
        target_image_width="5",
        target_image_height="4",
    )
    assert close(found, batch(resized(blurred(SCENE, (0, 0, 8, 6), KERNELS["3"]), 5, 4), target))


def test_face_blur_describes_its_tensors():
    assert NODE.inputs() == {"image": ("FP32", (1, 3, 12, 16)), "detection": ("FP32", (1, 1, 200, 7))}
    nhwc = {"original_image_layout": "NHWC", "target_image_layout": "NHWC"}
    assert NODE.inputs(**nhwc)["image"] == ("FP32", (1, 12, 16, 3))
    assert NODE.outputs(**nhwc, target_image_width="8") == {"image": ("FP32", (1, 12, 8, 3))}
