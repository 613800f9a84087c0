"""The params of the shipped nodes, and the rules that all these nodes follow."""

import pytest
from node_cases import NODES, NUMBERS, Node, refusal

from ovms_rest.pipelines.nodes import add_one
from ovms_rest.pipelines.nodes.params import MAX_INT, parse_params

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
def test_an_invalid_param_is_reported_with_its_text_and_the_allowed_values(node, name, text, expected):
    assert refusal(NODES[node].options, **{name: text}) == f'param {name}: {expected}, got "{text}"'


@pytest.mark.parametrize(("node", "name"), [(node, name) for node in NODES for name in NODES[node].params])
def test_a_missing_param_is_reported(node, name):
    others = {key: text for key, text in NODES[node].params.items() if key != name}
    assert refusal(parse_params, NODES[node].module.Options, others) == f"param {name} is missing"


@pytest.mark.parametrize("node", NODES)
def test_an_unknown_param_is_reported_with_the_nearest_known_one(node):
    near = {"add_one": "add_number"}.get(node, "target_image_width")
    assert refusal(NODES[node].options, **{f"{near}s": "1"}) == (
        f"unknown param {near}s; the nearest known one is {near}"
    )


def test_all_mistakes_are_reported_together():
    assert refusal(NODES["add_one"].options, add_number="a", ad_number="1", sub_number="b") == (
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
def test_the_declared_inputs_exclude_shapes_that_a_node_cannot_compute(node, name, shape):
    """The pipeline checks these, so the node does not."""
    declared = NODES[node].load().inputs[name]
    assert declared.datatype == "FP32"
    assert not declared.holds(shape)


@pytest.mark.parametrize("node", NODES)
def test_every_node_loads_in_a_pipeline(node):
    loaded = NODES[node].load()
    assert list(loaded.inputs) == sorted(NODES[node].inputs())
    assert list(loaded.outputs) == sorted(NODES[node].outputs())


def test_a_node_reads_its_params_once(monkeypatch):
    node = Node(add_one, {"add_number": "5"}).load()
    monkeypatch.delattr(add_one, "Options")
    assert node.execute({"input_numbers": NUMBERS})["output_numbers"].tolist() == [[*range(5, 15)]]
