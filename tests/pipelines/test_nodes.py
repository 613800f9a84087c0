"""The nodes that OVMS ships, against the formulas of their params, computed here pixel by pixel."""

import math
from pathlib import Path

import numpy as np
import pytest

from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.libraries import OVMS_LIBRARIES, load_node
from ovms_rest.pipelines.nodes import (
    add_one,
    east_ocr,
    face_blur,
    horizontal_ocr,
    image_transformation,
    object_detection,
)
from ovms_rest.pipelines.nodes.params import MAX_INT, parse_params

# --- The formulas


def random_image(height, width, channels=3):
    """Return a picture [H,W,C] with values from 0 to 255."""
    return np.random.default_rng(height * width).uniform(0, 255, (height, width, channels)).astype(np.float32)


def batch(picture, layout="NCHW"):
    """Return the tensor of one picture, which cannot be written."""
    array = np.ascontiguousarray((picture.transpose(2, 0, 1) if layout == "NCHW" else picture)[np.newaxis])
    array.flags.writeable = False
    return array


def floats(values, *shape):
    """Return a tensor, which cannot be written."""
    array = np.array(values, np.float32).reshape(shape)
    array.flags.writeable = False
    return array


def resized(picture, width, height):
    """Interpolate between the four pixels next to where the middle of a pixel lies in the original."""
    rows, columns, channels = picture.shape
    result = np.empty((height, width, channels))
    for y in range(height):
        v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
        top = min(int(v), max(rows - 2, 0))
        bottom = min(top + 1, rows - 1)
        for x in range(width):
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            left = min(int(u), max(columns - 2, 0))
            right = min(left + 1, columns - 1)
            upper = picture[top, left] * (1 - u + left) + picture[top, right] * (u - left)
            lower = picture[bottom, left] * (1 - u + left) + picture[bottom, right] * (u - left)
            result[y, x] = upper * (1 - v + top) + lower * (v - top)
    return result


def gray(picture):
    """Weigh blue, green and red."""
    return (picture @ np.array([0.114, 0.587, 0.299]))[:, :, np.newaxis]


def blurred(picture, box, kernel):
    """Blur a box with a separable kernel; at the picture's edge it is mirrored, the edge itself once."""
    x, y, width, height = box
    rows, columns, _ = picture.shape
    reach = len(kernel) // 2
    result = picture.astype(np.float64)
    for row in range(y, y + height):
        for column in range(x, x + width):
            total = np.zeros(3)
            for dy, vertical in enumerate(kernel, -reach):
                for dx, horizontal in enumerate(kernel, -reach):
                    v, u = abs(row + dy), abs(column + dx)
                    v, u = min(v, 2 * (rows - 1) - v), min(u, 2 * (columns - 1) - u)
                    total += picture[v, u] * (vertical * horizontal)
            result[row, column] = total
    return result


def close(array, expected, tolerance=0.01):
    """Tell whether a tensor is of float32 and all but equal."""
    expected = np.asarray(expected)
    assert array.dtype == np.float32
    assert array.shape == expected.shape
    return bool(np.abs(array - expected).max(initial=0) < tolerance)


def inputs(module, params):
    """Return the forms of a node's inputs."""
    return module.inputs(parse_params(module.Options, params))


def outputs(module, params):
    """Return the forms of a node's outputs."""
    return module.outputs(parse_params(module.Options, params))


def execute(module, arrays, params):
    """Run a node."""
    return module.execute(arrays, parse_params(module.Options, params))


def load(module, params):
    """Load a node as a pipeline does."""
    (name,) = (name for name, known in OVMS_LIBRARIES.items() if known == module.__name__)
    return load_node(Library("lib", name, Path("/nowhere")), params, timeout=60)


def refusal(function, *arguments):
    """Return what is told of arguments."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        function(*arguments)
    return str(caught.value)


# --- What all have in common

SIZES = {
    "original_image_width": "16",
    "original_image_height": "12",
    "target_image_width": "5",
    "target_image_height": "4",
    "confidence_threshold": "0.5",
}
DETECTION = dict(SIZES)
BLUR = SIZES | {"target_image_width": "16", "target_image_height": "12", "gaussian_blur_kernel_size": "3"}
TRANSFORMATION = {"original_image_layout": "NHWC"}

NODES = {
    "add_one": (add_one, {}),
    "image_transformation": (image_transformation, TRANSFORMATION),
    "object_detection": (object_detection, DETECTION),
    "horizontal_ocr": (horizontal_ocr, SIZES),
    "east_ocr": (east_ocr, SIZES),
    "face_blur": (face_blur, BLUR),
}

INT = f"to {MAX_INT}"
SIZE = f"expected a whole number from 1 {INT}"
LAYOUT = "expected NCHW or NHWC"
FLAG = "expected true or false"
COLOR = "expected BGR or RGB or GRAY"
FRACTION = "expected a number from 0 to 1"
NUMBER = "expected a number that FP32 can hold"
DIVISOR = "expected a number that is not 0 in FP32"
LIST = "expected numbers such as [123.7,116.3,103.5]"
NOT_NEGATIVE = "expected a number of at least 0"
FOURS = f"expected a multiple of 4 from 4 {INT}"
FROM_0 = f"expected a whole number from 0 {INT}"
ODD = f"expected an odd number from 1 {INT}"

SIZED = ("object_detection", "horizontal_ocr", "east_ocr", "face_blur")
CROPPING = ("object_detection", "horizontal_ocr", "east_ocr")
WRONG = [
    *((node, f"target_image_{side}", "0", SIZE) for node in SIZED for side in ("width", "height")),
    *((node, f"original_image_{side}", "x", SIZE) for node in SIZED[:2] for side in ("width", "height")),
    ("face_blur", "original_image_width", "-1", SIZE),
    ("face_blur", "original_image_height", "1e2", SIZE),
    *((node, "original_image_layout", "NCWH", LAYOUT) for node in (*SIZED, "image_transformation")),
    *((node, "target_image_layout", "CHW", LAYOUT) for node in (*SIZED, "image_transformation")),
    *((node, "confidence_threshold", "1.1", FRACTION) for node in SIZED),
    ("face_blur", "confidence_threshold", "-0.1", FRACTION),
    ("face_blur", "confidence_threshold", "high", FRACTION),
    ("face_blur", "confidence_threshold", "nan", FRACTION),
    *((node, "debug", "yes", FLAG) for node in (*SIZED, "image_transformation")),
    *((node, "convert_to_gray_scale", "True", FLAG) for node in CROPPING),
    *((node, "max_output_batch", "0", SIZE) for node in CROPPING),
    ("object_detection", "filter_label_id", "car", f"expected a whole number from {-MAX_INT} {INT}"),
    ("object_detection", "buffer_queue_size", "0", SIZE),
    ("object_detection", "target_image_width", "2147483648", SIZE),
    ("object_detection", "target_image_width", "1_0", SIZE),
    ("object_detection", "target_image_width", "", SIZE),
    ("east_ocr", "original_image_width", "15", FOURS),
    ("east_ocr", "original_image_height", "0", FOURS),
    ("east_ocr", "overlap_threshold", "2", FRACTION),
    ("east_ocr", "box_width_adjustment", "-0.1", NOT_NEGATIVE),
    ("east_ocr", "box_height_adjustment", "1e39", NUMBER),
    ("east_ocr", "rotation_angle_threshold", "-1", FROM_0),
    ("face_blur", "gaussian_blur_kernel_size", "4", ODD),
    ("face_blur", "gaussian_blur_kernel_size", "-3", ODD),
    ("image_transformation", "target_image_width", "0", SIZE),
    ("image_transformation", "target_image_height", "-2", SIZE),
    ("image_transformation", "original_image_color_order", "bgr", COLOR),
    ("image_transformation", "target_image_color_order", "GREY", COLOR),
    ("image_transformation", "scale", "0", DIVISOR),
    ("image_transformation", "scale", "1_0", NUMBER),
    ("image_transformation", "scale_values", "1,2,3", LIST),
    ("image_transformation", "scale_values", "[", LIST),
    ("image_transformation", "scale_values", "[1,0,3]", DIVISOR),
    ("image_transformation", "mean_values", "[1,2,3", LIST),
    ("image_transformation", "mean_values", "[1,,3]", NUMBER),
    ("image_transformation", "mean_values", "[1,inf,3]", NUMBER),
    ("add_one", "add_number", "-1", FROM_0),
    ("add_one", "sub_number", "1.5", FROM_0),
    ("add_one", "output_queue_size", "0", SIZE),
    ("add_one", "info_queue_size", "ten", SIZE),
]


@pytest.mark.parametrize(("node", "name", "text", "expected"), WRONG)
def test_a_param_that_cannot_be_is_told_with_what_came_and_what_fits(node, name, text, expected):
    module, params = NODES[node]
    told = refusal(parse_params, module.Options, params | {name: text})
    assert told == f'param {name}: {expected}, got "{text}"'


@pytest.mark.parametrize("node", NODES)
def test_required_params_that_are_missing_are_told(node):
    module, params = NODES[node]
    for name in params:
        others = {key: text for key, text in params.items() if key != name}
        assert refusal(parse_params, module.Options, others) == f"param {name} is missing"


@pytest.mark.parametrize("node", NODES)
def test_an_unknown_param_is_told_with_the_nearest_known_one(node):
    module, params = NODES[node]
    near = {"add_one": "add_number"}.get(node, "target_image_width")
    assert refusal(parse_params, module.Options, params | {f"{near}s": "1"}) == (
        f"unknown param {near}s; the nearest known one is {near}"
    )


def test_all_mistakes_are_told_at_once():
    assert refusal(parse_params, add_one.Options, {"add_number": "a", "ad_number": "1", "sub_number": "b"}) == (
        f'unknown param ad_number; the nearest known one is add_number; param add_number: {FROM_0}, got "a"; '
        f'param sub_number: {FROM_0}, got "b"'
    )


@pytest.mark.parametrize(
    ("node", "name", "shape"),
    [
        ("add_one", "input_numbers", (1, 9)),
        ("add_one", "input_numbers", (2, 10)),
        ("image_transformation", "image", (2, 4, 4, 3)),
        ("image_transformation", "image", (4, 4, 3)),
        *((node, "image", (1, 3, 16, 12)) for node in SIZED),
        *((node, "image", (2, 3, 12, 16)) for node in SIZED),
        *((node, "image", (1, 4, 12, 16)) for node in SIZED),
        *((node, "image", (3, 12, 16)) for node in SIZED),
        ("object_detection", "detection", (1, 1, 5, 6)),
        ("object_detection", "detection", (1, 2, 5, 7)),
        ("object_detection", "detection", (5, 7)),
        ("horizontal_ocr", "boxes", (5, 4)),
        ("horizontal_ocr", "boxes", (1, 5, 5)),
        ("east_ocr", "scores", (1, 4, 3, 1)),  # 3 rows of 4 cells are in the image
        ("east_ocr", "scores", (1, 3, 4, 2)),
        ("east_ocr", "geometry", (1, 4, 3, 5)),
        ("east_ocr", "geometry", (1, 3, 4, 4)),
        ("face_blur", "detection", (1, 1, 199, 7)),
        ("face_blur", "detection", (1, 1, 200, 6)),
    ],
)
def test_what_a_node_cannot_take_its_declared_inputs_keep_away(node, name, shape):
    """It does not check again what the pipeline has checked."""
    declared = load(*NODES[node]).inputs[name]
    assert declared.datatype == "FP32"
    assert not declared.holds(shape)


@pytest.mark.parametrize("node", NODES)
def test_a_pipeline_can_use_the_node(node):
    module, params = NODES[node]
    loaded = load(module, params)
    assert list(loaded.inputs) == sorted(inputs(module, params))
    assert list(loaded.outputs) == sorted(outputs(module, params))


def test_a_node_reads_its_params_once(monkeypatch):
    node = load(add_one, {"add_number": "5"})
    monkeypatch.delattr(add_one, "Options")
    assert node.execute({"input_numbers": NUMBERS})["output_numbers"].tolist() == [[*range(5, 15)]]


# --- add_one

NUMBERS = floats(range(10), 1, 10)


@pytest.mark.parametrize(
    ("params", "added"),
    [
        ({}, 1),
        ({"add_number": "5"}, 5),
        ({"sub_number": "3"}, -2),
        ({"add_number": " +0 ", "sub_number": "2", "output_queue_size": "1", "info_queue_size": "1"}, -2),
    ],
)
def test_a_number_is_added_and_another_subtracted(params, added):
    found = execute(add_one, {"input_numbers": NUMBERS}, params)["output_numbers"]
    assert found.dtype == np.float32
    assert found.tolist() == [[number + added for number in range(10)]]


def test_add_one_describes_its_tensors():
    assert inputs(add_one, {}) == {"input_numbers": ("FP32", (1, 10))}
    assert outputs(add_one, {}) == {"output_numbers": ("FP32", (1, 10))}


# --- image_transformation


def transform(picture, layout="NHWC", **params):
    """Return the transformed tensor; check that it is as described and the input unchanged."""
    image = batch(picture, layout)
    before = image.copy()
    texts = {"original_image_layout": layout} | params
    found = execute(image_transformation, {"image": image}, texts)["image"]
    assert np.array_equal(image, before)
    assert not np.shares_memory(found, image)
    assert found.flags.carray
    (_, dims) = outputs(image_transformation, texts)["image"]
    assert all(dim in (-1, size) for dim, size in zip(dims, found.shape, strict=True))
    return found


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
        (
            {"target_image_color_order": "GRAY", "mean_values": "[10]", "scale_values": "[4]"},
            (gray(PICTURE) - 10) / 4,
        ),
        (
            {"target_image_color_order": "GRAY", "scale": "4", "target_image_width": "4"},
            resized(gray(PICTURE) / 4, 4, 6),
        ),
        # Before the resize where that enlarges, after it else; both come to the same.
        (
            {"mean_values": "[10,20,30]", "scale": "2", "target_image_width": "16"},
            (resized(PICTURE, 16, 6) - MEAN) / 2,
        ),
        (
            {"mean_values": "[10,20,30]", "scale": "2", "target_image_width": "4"},
            (resized(PICTURE, 4, 6) - MEAN) / 2,
        ),
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


def test_the_target_has_the_originals_layout_unless_told():
    assert transform(PICTURE, "NCHW").shape == (1, 3, 6, 8)
    assert transform(PICTURE, "NHWC").shape == (1, 6, 8, 3)


def test_the_scale_is_applied_as_a_factor_of_fp32_as_opencv_does():
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
def test_values_for_other_channels_than_the_targets_are_told(params, expected):
    assert refusal(parse_params, image_transformation.Options, TRANSFORMATION | params) == expected


def test_an_image_without_pixels_is_told():
    image = np.zeros((1, 0, 4, 3), np.float32)
    assert refusal(execute, image_transformation, {"image": image}, TRANSFORMATION) == (
        "input image has the shape [1, 0, 4, 3], which has no pixels"
    )


@pytest.mark.parametrize(
    ("layout", "order", "shape", "expected"),
    [
        ("NHWC", "BGR", [1, 2, 2, 1], [1, -1, -1, 3]),
        ("NHWC", "GRAY", [1, 2, 2, 3], [1, -1, -1, 1]),
        ("NCHW", "RGB", [1, 4, 3, 3], [1, 3, -1, -1]),
        ("NCHW", "GRAY", [1, 0, 3, 3], [1, 1, -1, -1]),
    ],
)
def test_an_image_of_other_channels_is_told(layout, order, shape, expected):
    params = {"original_image_layout": layout, "original_image_color_order": order}
    assert refusal(execute, image_transformation, {"image": np.zeros(shape, np.float32)}, params) == (
        f"input image has the shape {shape}, expected {expected}"
    )


def test_image_transformation_describes_its_tensors():
    assert inputs(image_transformation, TRANSFORMATION) == {"image": ("FP32", (1, -1, -1, -1))}
    assert outputs(image_transformation, TRANSFORMATION) == {"image": ("FP32", (1, -1, -1, 3))}
    params = {
        "original_image_layout": "NHWC",
        "target_image_layout": "NCHW",
        "target_image_color_order": "GRAY",
        "target_image_width": "7",
    }
    assert outputs(image_transformation, params) == {"image": ("FP32", (1, 1, -1, 7))}


# --- object_detection

SCENE = random_image(12, 16)


def detection(*rows, count=None):
    """Return rows of image, label, confidence, x1, y1, x2, y2 as a tensor; others are below any threshold."""
    filler = [(-1, 0, 0, 0, 0, 0, 0)] * ((count or len(rows)) - len(rows))
    return floats([*rows, *filler], 1, 1, -1, 7)


def run(module, arrays, params):
    """Return the outputs; check that they are as described and the inputs unchanged."""
    before = {name: array.copy() for name, array in arrays.items()}
    found = execute(module, arrays, params)
    assert all(np.array_equal(arrays[name], before[name], equal_nan=True) for name in arrays)
    forms = outputs(module, params)
    assert sorted(found) == sorted(forms)
    dtypes = {"FP32": np.float32, "INT32": np.int32}
    for name, (datatype, dims) in forms.items():
        array = found[name]
        assert array.dtype == dtypes[datatype]
        assert array.flags.carray
        assert all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True))
        assert not any(np.shares_memory(array, given) for given in arrays.values())
    return found


def detect(*rows, layout="NCHW", **params):
    """Run the object detection on the scene."""
    texts = DETECTION | {"original_image_layout": layout} | params
    return run(object_detection, {"image": batch(SCENE, layout), "detection": detection(*rows)}, texts)


def crop(x, y, width, height):
    """Return a part of the scene in the target's size."""
    return resized(SCENE[y : y + height, x : x + width], 5, 4)


def images(*pictures, layout="NCHW"):
    """Return pictures as the tensor [N,1,C,H,W]."""
    return np.stack([batch(picture, layout) for picture in pictures])


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_what_was_detected_is_cut_out_in_its_order(source, target):
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
def test_what_was_detected_can_be_gray(target):
    found = detect((0, 0, 1, 0.25, 0.25, 0.5, 0.75), convert_to_gray_scale="true", target_image_layout=target)
    assert close(found["images"], images(gray(crop(4, 3, 4, 6)), layout=target))


@pytest.mark.parametrize(
    ("threshold", "kept"), [("0", [0, 1, 2, 3]), ("0.3", [1, 2, 3]), ("0.7", [2, 3]), ("0.8", [3]), ("1.0", [])]
)
def test_a_confidence_at_the_threshold_is_enough(threshold, kept):
    confidences = [0.1, 0.3, 0.7, 0.9]
    found = detect(
        *((0, label, sure, 0, 0, 1, 1) for label, sure in enumerate(confidences)), confidence_threshold=threshold
    )
    assert found["label_ids"].ravel().tolist() == kept


def test_what_is_of_another_image_or_of_no_confidence_is_left_out():
    rows = [(image, label, 1, 0, 0, 1, 1) for label, image in enumerate((-1, 1, 0.5, -0.5, math.nan, 0))]
    assert detect(*rows, (0, 9, math.nan, 0, 0, 1, 1))["label_ids"].ravel().tolist() == [2, 3, 5]


@pytest.mark.parametrize(("label", "kept"), [("-1", [7, 8, 7]), ("7", [7, 7]), ("8", [8]), ("9", [])])
def test_one_label_can_be_asked_for(label, kept):
    rows = [(0, found, 1, 0, 0, 1, 1) for found in (7, 8, 7)]
    assert detect(*rows, filter_label_id=label)["label_ids"].ravel().tolist() == kept


def test_the_first_are_kept_when_too_many_are_found():
    rows = [(0, label, 0.5 + label / 10, label / 16, 0, 1, 1) for label in range(4)]
    found = detect(*rows, max_output_batch="3")
    assert found["label_ids"].ravel().tolist() == [0, 1, 2]
    assert found["confidences"].ravel().tolist() == [np.float32(0.5 + label / 10) for label in range(3)]
    assert found["coordinates"][:, 0, 0].tolist() == [0, 1 / 16, 2 / 16]
    assert close(found["images"], images(*(crop(label, 0, 16 - label, 12) for label in range(3))))


def test_nothing_detected_is_arrays_of_none():
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
def test_a_box_beyond_the_edge_is_brought_into_the_image(corners, box):
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
def test_a_box_without_pixels_is_told(corners, box):
    arrays = {"image": batch(SCENE), "detection": detection((0, 0, 1, *corners))}
    assert refusal(execute, object_detection, arrays, DETECTION) == (
        f"the box at {box} pixels (width x height) has no pixels in the image of 16x12"
    )


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ((0, 0, 1, math.nan, 0, 1, 1), "nan"),
        ((0, 0, 1, 0, 0, math.inf, 1), "inf"),
        ((0, 0, 1, 0, -1e9, 1, 1), "-1.2e+10"),
        ((0, math.nan, 1, 0, 0, 1, 1), "nan"),
        ((0, 3e9, 1, 0, 0, 1, 1), "3e+09"),
    ],
)
def test_a_detection_that_is_no_number_is_told(row, value):
    arrays = {"image": batch(SCENE), "detection": detection(row)}
    shown = "3000000000.0" if value == "3e+09" else "-12000000000.0" if value == "-1.2e+10" else value
    assert refusal(execute, object_detection, arrays, DETECTION) == (
        f"input detection: expected pixels or labels between -2**31 and 2**31, got {shown}"
    )


def test_a_detection_without_rows_is_told():
    arrays = {"image": batch(SCENE), "detection": np.zeros((1, 1, 0, 7), np.float32)}
    assert refusal(execute, object_detection, arrays, DETECTION) == (
        "input detection has no rows; at least one is required"
    )


def test_object_detection_describes_its_tensors():
    nhwc = DETECTION | {"original_image_layout": "NHWC", "target_image_layout": "NHWC", "convert_to_gray_scale": "true"}
    assert inputs(object_detection, DETECTION) == {
        "image": ("FP32", (1, 3, 12, 16)),
        "detection": ("FP32", (1, 1, -1, 7)),
    }
    assert inputs(object_detection, nhwc)["image"] == ("FP32", (1, 12, 16, 3))
    assert outputs(object_detection, DETECTION) == {
        "images": ("FP32", (-1, 1, 3, 4, 5)),
        "coordinates": ("FP32", (-1, 1, 4)),
        "confidences": ("FP32", (-1, 1, 1)),
        "label_ids": ("INT32", (-1, 1, 1)),
    }
    assert outputs(object_detection, nhwc)["images"] == ("FP32", (-1, 1, 4, 5, 1))


# --- horizontal_ocr


def read_horizontal(*rows, layout="NCHW", **params):
    """Run horizontal_ocr on the scene."""
    texts = SIZES | {"original_image_layout": layout} | params
    return run(horizontal_ocr, {"image": batch(SCENE, layout), "boxes": floats(rows, -1, 5)}, texts)


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


def test_the_first_texts_are_kept_when_too_many_are_found():
    rows = [(x, 0, 16, 12, 0.5 + x / 10) for x in range(4)]
    assert read_horizontal(*rows, max_output_batch="2")["text_coordinates"][:, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("rows", [(), ((0, 0, 16, 12, 0.4),), ((0, 0, 0, 0, 0.4),), ((0, 0, 16, 12, math.nan),)])
def test_no_texts_are_arrays_of_none(rows):
    found = read_horizontal(*rows)
    assert {name: array.shape for name, array in found.items()} == {
        "text_images": (0, 1, 3, 4, 5),
        "text_coordinates": (0, 1, 4),
        "confidence_levels": (0, 1, 1),
    }


def test_a_text_beyond_the_edge_is_brought_into_the_image_and_its_box_remains():
    found = read_horizontal((-2, 6, 6, 20, 1))
    assert found["text_coordinates"].tolist() == [[[-2, 6, 8, 14]]]
    assert close(found["text_images"], images(crop(0, 6, 8, 6)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            (3, 1, 3, 2, 1),
            "input boxes has a box from x 3, y 1 to x 3, y 2; its width and height must be above 0",
        ),
        (
            (0.5, 4, 1, 2, 1),
            "input boxes has a box from x 0.5, y 4 to x 1, y 2; its width and height must be above 0",
        ),
        ((3, 1, 3.5, 2, 1), "the box at x 3, y 1 of 0x1 pixels (width x height) has no pixels in the image of 16x12"),
        ((16, 1, 20, 2, 1), "the box at x 16, y 1 of 4x1 pixels (width x height) has no pixels in the image of 16x12"),
        ((math.nan, 0, 1, 1, 1), "input boxes: expected pixels or labels between -2**31 and 2**31, got nan"),
        ((-2e9, 0, 2e9, 1, 1), "input boxes: expected pixels or labels between -2**31 and 2**31, got 4000000000.0"),
    ],
)
def test_a_text_without_pixels_is_told(row, expected):
    arrays = {"image": batch(SCENE), "boxes": floats([(0, 0, 1, 1, 1), row], 2, 5)}
    assert refusal(execute, horizontal_ocr, arrays, SIZES) == expected


def test_horizontal_ocr_describes_its_tensors():
    assert inputs(horizontal_ocr, SIZES) == {"image": ("FP32", (1, 3, 12, 16)), "boxes": ("FP32", (-1, 5))}
    assert outputs(horizontal_ocr, SIZES | {"target_image_layout": "NHWC"}) == {
        "text_images": ("FP32", (-1, 1, 4, 5, 3)),
        "text_coordinates": ("INT32", (-1, 1, 4)),
        "confidence_levels": ("FP32", (-1, 1, 1)),
    }


# --- face_blur

KERNELS = {"1": [1], "3": [0.25, 0.5, 0.25], "5": [0.0625, 0.25, 0.375, 0.25, 0.0625]}


def blur(*rows, layout="NCHW", **params):
    """Run face_blur on the scene."""
    texts = BLUR | {"original_image_layout": layout, "target_image_layout": layout} | params
    arrays = {"image": batch(SCENE, layout), "detection": detection(*rows, count=200)}
    return run(face_blur, arrays, texts)["image"]


@pytest.mark.parametrize("size", KERNELS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_face_is_blurred_with_the_pixels_around_it(layout, size):
    found = blur((0, 0, 0.5, 0.25, 0.25, 0.5, 0.75), layout=layout, gaussian_blur_kernel_size=size, debug="true")
    assert close(found, batch(blurred(SCENE, (4, 3, 4, 6), KERNELS[size]), layout))


def test_a_large_kernel_has_the_sigma_of_opencv():
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
        ((-0.5, -0.5, 0.25, 0.25), (0, 0, 4, 3)),  # what is in the image
        ((0.5, 0.5, 1.5, 1.5), (8, 6, 8, 6)),
        ((-1, 0, -0.25, 1), (0, 0, 0, 0)),  # nothing is
        ((1.5, 0, 2, 1), (0, 0, 0, 0)),
        ((0.5, 0.5, 0.5, 1), (0, 0, 0, 0)),
    ],
)
def test_of_a_face_beyond_the_edge_the_part_in_the_image_is_blurred(corners, box):
    found = blur((0, 0, 1, *corners), gaussian_blur_kernel_size="5")
    assert close(found, batch(blurred(SCENE, box, KERNELS["5"])))


def test_faces_are_blurred_one_after_the_other():
    found = blur((0, 0, 1, 0, 0, 0.5, 0.5), (0, 1, 1, 0.25, 0.25, 1, 1))
    first = blurred(SCENE, (0, 0, 8, 6), KERNELS["3"])
    assert close(found, batch(blurred(first, (4, 3, 12, 9), KERNELS["3"])))


def test_what_is_not_sure_enough_is_not_blurred():
    rows = [(0, 0, 0.4999, 0, 0, 1, 1), (1, 0, 1, 0, 0, 1, 1)]
    assert np.array_equal(blur(*rows), batch(SCENE))


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_the_image_is_resized_when_it_is_blurred(source, target):
    found = blur(
        (0, 0, 1, 0, 0, 0.5, 0.5),
        layout=source,
        target_image_layout=target,
        target_image_width="5",
        target_image_height="4",
    )
    assert close(found, batch(resized(blurred(SCENE, (0, 0, 8, 6), KERNELS["3"]), 5, 4), target))


def test_face_blur_describes_its_tensors():
    assert inputs(face_blur, BLUR) == {"image": ("FP32", (1, 3, 12, 16)), "detection": ("FP32", (1, 1, 200, 7))}
    nhwc = BLUR | {"original_image_layout": "NHWC", "target_image_layout": "NHWC"}
    assert inputs(face_blur, nhwc)["image"] == ("FP32", (1, 12, 16, 3))
    assert outputs(face_blur, nhwc | {"target_image_width": "8"}) == {"image": ("FP32", (1, 12, 8, 3))}


# --- east_ocr

PAGE = random_image(40, 48)
EAST = SIZES | {"original_image_width": "48", "original_image_height": "40"}


def maps(*texts):
    """Return scores and geometry of texts, each a cell (x, y), a score, and up, right, down, left and angle."""
    scores = np.zeros((1, 10, 12, 1), np.float32)
    geometry = np.full((1, 10, 12, 5), math.nan, np.float32)  # where no score is, it is not looked at
    for (x, y), score, *shape in texts:
        scores[0, y, x, 0] = score
        geometry[0, y, x] = shape
    scores.flags.writeable = geometry.flags.writeable = False
    return {"scores": scores, "geometry": geometry}


def read_east(*texts, page=PAGE, layout="NCHW", **params):
    """Run east_ocr on the page."""
    names = EAST | {"original_image_layout": layout} | params
    return run(east_ocr, {"image": batch(page, layout), **maps(*texts)}, names)


def page_crop(x, y, width, height):
    """Return a part of the page in the target's size."""
    return resized(PAGE[y : y + height, x : x + width], 5, 4)


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_a_level_text_reaches_from_its_cell_as_far_as_the_geometry_says(source, target):
    # Cell (5, 4) is at pixel (20, 16).
    found = read_east(
        ((5, 4), 0.5, 3, 10.9, 4, 6, 0), ((1, 1), 0.4999, 1, 1, 1, 1, 0), layout=source, target_image_layout=target
    )
    # The lower right corner is 20 + 10, 16 + 4; the others are 16 and 7 from there, whole parts of 16.9 and 7.
    assert found["text_coordinates"].tolist() == [[[14, 13, 16, 7]]]
    assert found["confidence_levels"].tolist() == [[[0.5]]]
    assert close(found["text_images"], images(page_crop(14, 13, 16, 7), layout=target))


def test_a_text_of_east_can_be_gray():
    found = read_east(((5, 4), 1, 3, 10, 4, 6, 0), convert_to_gray_scale="true", debug="true")
    assert close(found["text_images"], images(gray(page_crop(14, 13, 16, 7))))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((3, 30, 4, 6, 0), (14, 13, 34, 7)),  # cut off at the right
        ((30, 10, 4, 30, 0), (0, 0, 30, 20)),  # at the left and above
        ((3, 10, 40, 6, 0), (14, 13, 16, 27)),  # below
    ],
)
def test_a_text_beyond_the_edge_is_cut_off(shape, box):
    assert read_east(((5, 4), 1, *shape))["text_coordinates"].tolist() == [[list(box)]]


def test_a_text_can_be_widened():
    # The box is from x 14 to 30 and from y 13 to 20.
    found = read_east(((5, 4), 1, 3, 10, 4, 6, 0), box_width_adjustment="0.25", box_height_adjustment="0.5")
    # 14 - 16 * 0.25 = 10, then 30 + 20 * 0.25 = 35; 13 - 7 * 0.5 = 9.5, then 20 + 11 * 0.5 = 25.5.
    assert found["text_coordinates"].tolist() == [[[10, 9, 25, 16]]]


def test_a_text_is_widened_no_further_than_the_image():
    found = read_east(((5, 4), 1, 3, 10, 4, 6, 0), box_width_adjustment="3", box_height_adjustment="3")
    assert found["text_coordinates"].tolist() == [[[0, 0, 48, 40]]]


@pytest.mark.parametrize(
    ("second", "overlap", "kept"),
    [
        # 16x8 at 8, 12 and the same 4 to the right: 12x8 of 20x8 are common, 0.6.
        ((4, 3), "0.3", [9]),
        ((4, 3), "0.59", [9]),
        ((4, 3), "0.6", [9, 7]),
        ((4, 3), "1", [9, 7]),
        ((7, 3), "0", [9, 7]),  # side by side
    ],
)
def test_of_two_texts_that_overlap_more_than_allowed_the_surer_is_kept(second, overlap, kept):
    texts = [((3, 3), 0.9, 0, 12, 8, 4, 0), (second, 0.7, 0, 12, 8, 4, 0)]
    found = read_east(*texts, overlap_threshold=overlap)
    assert found["confidence_levels"].ravel().tolist() == [np.float32(score / 10) for score in kept]


def test_a_text_is_left_out_only_for_one_that_is_kept():
    # Each overlaps its neighbour by 8x8 of 24x8, a third; the middle one is left out, so the third is kept.
    texts = [((x, 3), score, 0, 12, 8, 4, 0) for x, score in ((3, 0.9), (5, 0.8), (7, 0.7))]
    found = read_east(*texts, overlap_threshold="0.3")
    assert found["text_coordinates"].tolist() == [[[8, 12, 16, 8]], [[24, 12, 16, 8]]]


def test_texts_come_with_the_surest_first_and_of_equals_the_last():
    texts = [((x, y), score, 0, 3, 3, 0, 0) for x, y, score in ((1, 1, 0.7), (5, 1, 0.9), (1, 5, 0.8), (5, 5, 0.8))]
    found = read_east(*texts)
    assert found["confidence_levels"].ravel().tolist() == [np.float32(score) for score in (0.9, 0.8, 0.8, 0.7)]
    assert found["text_coordinates"][:, 0, :2].tolist() == [[20, 4], [20, 20], [4, 20], [4, 4]]


def test_the_surest_texts_are_kept_when_too_many_are_found():
    texts = [((x, 1), score, 0, 3, 3, 0, 0) for x, score in ((1, 0.7), (4, 0.9), (7, 0.8))]
    found = read_east(*texts, max_output_batch="2")
    assert found["confidence_levels"].ravel().tolist() == [np.float32(0.9), np.float32(0.8)]
    assert found["text_coordinates"][:, 0].tolist() == [[16, 4, 3, 3], [28, 4, 3, 3]]
    assert close(found["text_images"], images(page_crop(16, 4, 3, 3), page_crop(28, 4, 3, 3)))


def read_cell_by_cell(scores, geometry, width, height, threshold, overlap, adjust_x, adjust_y):
    """Return boxes and scores as OVMS's loops make them, with its int and float."""
    one = np.float32
    found = []
    for row, column in np.ndindex(scores.shape[1:3]):
        score = scores[0, row, column, 0]
        if score < one(threshold):
            continue
        up, right, down, left, angle = geometry[0, row, column]
        cos, sin = np.cos(angle), np.sin(angle)
        tall, wide = up + down, right + left
        x2, y2 = column * 4 + int(cos * right + sin * down), row * 4 + int(-sin * right + cos * down)
        x1, y1 = int(-sin * tall) + x2, int(-cos * tall) + y2
        x3, y3 = int(-cos * wide) + x2, int(sin * wide) + y2
        x4, y4 = x3 + x1 - x2, y3 + y1 - y2
        x_low, x_high = min(x1, x2, x3, x4), max(x1, x2, x3, x4)
        y_low, y_high = min(y1, y2, y3, y4), max(y1, y2, y3, y4)
        x_low = max(0, int(one(x_low) - one(x_high - x_low) * one(adjust_x)))
        x_high = min(width, int(one(x_high) + one(x_high - x_low) * one(adjust_x)))
        y_low = max(0, int(one(y_low) - one(y_high - y_low) * one(adjust_y)))
        y_high = min(height, int(one(y_high) + one(y_high - y_low) * one(adjust_y)))
        found.append((score, len(found), x_low, y_low, x_high, y_high))
    found.sort()
    kept = []
    while found:
        best = found.pop()
        kept.append(best)
        found = [other for other in found if not overlap_of(best, other) > one(overlap)]
    return [[x1, y1, x2 - x1, y2 - y1] for _, _, x1, y1, x2, y2 in kept], [float(score) for score, *_ in kept]


def overlap_of(one, other):
    """Return what two boxes have in common of what either has."""
    width = min(one[4], other[4]) - max(one[2], other[2])
    height = min(one[5], other[5]) - max(one[3], other[3])
    common = np.float32(width * height if width > 0 and height > 0 else 0)
    areas = [(box[4] - box[2]) * (box[5] - box[3]) for box in (one, other)]
    return common / (np.float32(sum(areas)) - common)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("adjust_x", "adjust_y"), [(0, 0), (0.1, 0.35)])
def test_many_texts_are_found_as_cell_by_cell(seed, adjust_x, adjust_y):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 20, (1, 10, 12, 1)).astype(np.float32) / 20  # many are equal
    geometry = random.uniform(2, 9, (1, 10, 12, 5)).astype(np.float32)
    geometry[..., 4] = random.uniform(-0.3, 0.3, (1, 10, 12))
    expected = read_cell_by_cell(scores, geometry, 48, 40, 0.35, 0.25, adjust_x, adjust_y)
    params = EAST | {
        "confidence_threshold": "0.35",
        "overlap_threshold": "0.25",
        "box_width_adjustment": str(adjust_x),
        "box_height_adjustment": str(adjust_y),
    }
    found = run(east_ocr, {"image": batch(PAGE), "scores": scores, "geometry": geometry}, params)
    assert len(expected[0]) > 5
    assert found["text_coordinates"][:, 0].tolist() == expected[0]
    assert found["confidence_levels"].ravel().tolist() == expected[1]


def test_no_texts_of_east_are_arrays_of_none():
    found = read_east()
    assert {name: array.shape for name, array in found.items()} == {
        "text_images": (0, 1, 3, 4, 5),
        "text_coordinates": (0, 1, 4),
        "confidence_levels": (0, 1, 1),
    }


def turned_box(cell, up, right, down, left, angle):
    """Return the box around a turned text, each corner computed from the lower right one."""
    cos, sin = math.cos(angle), math.sin(angle)
    x2 = cell[0] * 4 + int(cos * right + sin * down)
    y2 = cell[1] * 4 + int(-sin * right + cos * down)
    x1, y1 = x2 + int(-sin * (up + down)), y2 + int(-cos * (up + down))
    x3, y3 = x2 + int(-cos * (right + left)), y2 + int(sin * (right + left))
    xs, ys = (x1, x2, x3, x3 + x1 - x2), (y1, y2, y3, y3 + y1 - y2)
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


TURNED = (3.3, 9.6, 4.2, 8.1)


@pytest.mark.parametrize("degrees", [-40, -10, 10, 30, 45])
def test_a_turned_text_has_the_box_around_its_corners(degrees):
    angle = math.radians(degrees)
    found = read_east(((6, 5), 1, *TURNED, angle))
    assert found["text_coordinates"].tolist() == [[turned_box((6, 5), *TURNED, angle)]]


def turned_back(picture, degrees, height):
    """Return the rows of a picture that is turned about its middle, and where they came from well within it."""
    rows, columns, _ = picture.shape
    middle_x, middle_y = columns // 2, rows // 2
    first = int((rows - height) / 2)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result = np.zeros((int(height), columns, 3))
    within = np.zeros((int(height), columns), bool)
    for y in range(int(height)):
        for x in range(columns):
            dx, dy = x - middle_x, y + first - middle_y
            u, v = middle_x + cos * dx + sin * dy, middle_y - sin * dx + cos * dy
            if 0 <= u < columns - 1 and 0 <= v < rows - 1:
                left, top = int(u), int(v)
                upper = picture[top, left] * (1 - u + left) + picture[top, left + 1] * (u - left)
                lower = picture[top + 1, left] * (1 - u + left) + picture[top + 1, left + 1] * (u - left)
                result[y, x] = upper * (1 - v + top) + lower * (v - top)
                within[y, x] = True
            else:
                within[y, x] = not (-1 <= u <= columns and -1 <= v <= rows)  # black
    return result, within


@pytest.mark.parametrize("degrees", [-40, 30])
@pytest.mark.parametrize("adjustment", ["0", "0.2"])
def test_a_turned_text_is_turned_back_and_cut_to_its_height(degrees, adjustment):
    # A slope, so that a small difference of position is a small one of value.
    ys, xs = np.mgrid[:40, :48]
    page = np.stack((xs, ys, xs + ys), axis=2).astype(np.float32)
    angle = math.radians(degrees)
    text = ((6, 5), 1, *TURNED, angle)
    params = {"box_width_adjustment": adjustment, "box_height_adjustment": adjustment}
    ((x, y, width, height),) = read_east(text, page=page, **params)["text_coordinates"][0].tolist()
    text_height = (TURNED[0] + TURNED[2]) * (1 + float(adjustment))
    # A text of a positive angle rises to the right: what is to the right of a pixel then was up there before.
    expected, within = turned_back(page[y : y + height, x : x + width], degrees, text_height)
    # With the target as large as what is cut out, nothing is resized.
    size = {"target_image_width": str(width), "target_image_height": str(int(text_height))}
    found = read_east(text, page=page, **params, **size)["text_images"][0, 0].transpose(1, 2, 0)
    assert within.mean() > 0.5
    assert np.abs(found - expected)[within].max() < 0.2


@pytest.mark.parametrize(
    ("threshold", "turned"), [(None, True), ("20", True), ("24", True), ("25", False), ("90", False)]
)
def test_a_text_is_turned_back_when_its_angle_is_above_the_threshold(threshold, turned):
    params = {} if threshold is None else {"rotation_angle_threshold": threshold}
    found = read_east(((6, 5), 1, *TURNED, math.radians(24.5)), **params)
    (box,) = found["text_coordinates"][0].tolist()
    assert close(found["text_images"], images(page_crop(*box))) is not turned


def test_a_text_is_not_turned_back_for_20_degrees_or_less():
    found = read_east(((6, 5), 1, *TURNED, math.radians(-19.9)))
    (box,) = found["text_coordinates"][0].tolist()
    assert close(found["text_images"], images(page_crop(*box)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            ((5, 4), 1, 0, 0, 0, 0.5, 0),
            "input geometry has a text whose box from x 20, y 16 to x 20, y 16 has no pixels in the image",
        ),
        (
            ((5, 4), 1, 3, 40, 4, -35, 0),
            "input geometry has a text whose box from x 55, y 13 to x 48, y 20 has no pixels in the image",
        ),
        (
            ((5, 4), 1, 3, math.inf, 4, 6, 0),
            "input geometry: expected pixels or labels between -2**31 and 2**31, got inf",
        ),
        (
            ((5, 4), 1, 3, 10, 4, 6, math.nan),
            "input geometry: expected pixels or labels between -2**31 and 2**31, got nan",
        ),
        # At the upper edge the box has lost the rows that the text needs.
        (
            ((5, 0), 1, 9, 8, 9, 8, math.radians(45)),
            "input geometry has a text of height 18 that is turned by 45 degrees; it does not fit its box of "
            "23x11 pixels (width x height) when turned back",
        ),
        (
            ((5, 4), 1, 0.4, 8, 0.4, 8, math.radians(45)),
            "input geometry has a text of height 0.8 that is turned by 45 degrees; it does not fit its box of "
            "11x11 pixels (width x height) when turned back",
        ),
    ],
)
def test_a_text_that_cannot_be_cut_out_is_told(text, expected):
    assert refusal(execute, east_ocr, {"image": batch(PAGE), **maps(text)}, EAST) == expected


def test_east_ocr_describes_its_tensors():
    assert inputs(east_ocr, EAST | {"original_image_layout": "NHWC"}) == {
        "image": ("FP32", (1, 40, 48, 3)),
        "scores": ("FP32", (1, 10, 12, 1)),
        "geometry": ("FP32", (1, 10, 12, 5)),
    }
    assert outputs(east_ocr, EAST | {"convert_to_gray_scale": "true"}) == {
        "text_images": ("FP32", (-1, 1, 1, 4, 5)),
        "text_coordinates": ("INT32", (-1, 1, 4)),
        "confidence_levels": ("FP32", (-1, 1, 1)),
    }
