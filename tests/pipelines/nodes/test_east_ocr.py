"""libcustom_node_east_ocr: an EAST model's texts, cut out and levelled."""

import math

import numpy as np
import pytest
from node_cases import SIZES, Node, batch, close, gray, images, random_image, resized

from ovms_rest.pipelines.nodes import east_ocr

PAGE = random_image(40, 48)
EAST = Node(east_ocr, SIZES | {"original_image_width": "48", "original_image_height": "40"})


def maps(*texts):
    """Return scores and geometry of texts: cell (x, y), score, and up, right, down, left, angle."""
    scores = np.zeros((1, 10, 12, 1), np.float32)
    geometry = np.full((1, 10, 12, 5), math.nan, np.float32)  # where no score is, it is not looked at
    for (x, y), score, *shape in texts:
        scores[0, y, x, 0] = score
        geometry[0, y, x] = shape
    scores.flags.writeable = geometry.flags.writeable = False
    return {"scores": scores, "geometry": geometry}


def read_east(*texts, page=PAGE, layout="NCHW", **params):
    """Run east_ocr on the page."""
    return EAST.run({"image": batch(page, layout), **maps(*texts)}, original_image_layout=layout, **params)


def page_crop(x, y, width, height):
    """Return a part of the page at the target's size."""
    return resized(PAGE[y : y + height, x : x + width], 5, 4)


@pytest.mark.parametrize("source", ["NCHW", "NHWC"])
@pytest.mark.parametrize("target", ["NCHW", "NHWC"])
def test_a_level_text_extends_from_its_cell_by_its_geometry(source, target):
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


def test_a_text_box_can_be_widened():
    # The box is from x 14 to 30 and from y 13 to 20.
    found = read_east(((5, 4), 1, 3, 10, 4, 6, 0), box_width_adjustment="0.25", box_height_adjustment="0.5")
    # 14 - 16 * 0.25 = 10, then 30 + 20 * 0.25 = 35; 13 - 7 * 0.5 = 9.5, then 20 + 11 * 0.5 = 25.5.
    assert found["text_coordinates"].tolist() == [[[10, 9, 25, 16]]]


def test_a_text_box_is_not_widened_beyond_the_image():
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
def test_the_more_confident_of_two_overlapping_texts_is_kept(second, overlap, kept):
    texts = [((3, 3), 0.9, 0, 12, 8, 4, 0), (second, 0.7, 0, 12, 8, 4, 0)]
    found = read_east(*texts, overlap_threshold=overlap)
    assert found["confidence_levels"].ravel().tolist() == [np.float32(score / 10) for score in kept]


def test_a_text_is_left_out_only_for_one_that_is_kept():
    # Each overlaps its neighbour by 8x8 of 24x8, a third; the middle one is left out, so the third is kept.
    texts = [((x, 3), score, 0, 12, 8, 4, 0) for x, score in ((3, 0.9), (5, 0.8), (7, 0.7))]
    found = read_east(*texts, overlap_threshold="0.3")
    assert found["text_coordinates"].tolist() == [[[8, 12, 16, 8]], [[24, 12, 16, 8]]]


def test_texts_are_ordered_by_confidence_and_the_last_of_equals_first():
    texts = [((x, y), score, 0, 3, 3, 0, 0) for x, y, score in ((1, 1, 0.7), (5, 1, 0.9), (1, 5, 0.8), (5, 5, 0.8))]
    found = read_east(*texts)
    assert found["confidence_levels"].ravel().tolist() == [np.float32(score) for score in (0.9, 0.8, 0.8, 0.7)]
    assert found["text_coordinates"][:, 0, :2].tolist() == [[20, 4], [20, 20], [4, 20], [4, 4]]


def test_the_most_confident_texts_are_kept_when_there_are_too_many():
    texts = [((x, 1), score, 0, 3, 3, 0, 0) for x, score in ((1, 0.7), (4, 0.9), (7, 0.8))]
    found = read_east(*texts, max_output_batch="2")
    assert found["confidence_levels"].ravel().tolist() == [np.float32(0.9), np.float32(0.8)]
    assert found["text_coordinates"][:, 0].tolist() == [[16, 4, 3, 3], [28, 4, 3, 3]]
    assert close(found["text_images"], images(page_crop(16, 4, 3, 3), page_crop(28, 4, 3, 3)))


def read_cell_by_cell(scores, geometry, width, height, threshold, overlap, adjust_x, adjust_y):
    """Return the boxes and scores of OVMS's loops, in its int and float."""
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
    """Return the intersection over union of two boxes."""
    width = min(one[4], other[4]) - max(one[2], other[2])
    height = min(one[5], other[5]) - max(one[3], other[3])
    common = np.float32(width * height if width > 0 and height > 0 else 0)
    areas = [(box[4] - box[2]) * (box[5] - box[3]) for box in (one, other)]
    return common / (np.float32(sum(areas)) - common)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("adjust_x", "adjust_y"), [(0, 0), (0.1, 0.35)])
def test_many_texts_match_the_cell_by_cell_reference(seed, adjust_x, adjust_y):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 20, (1, 10, 12, 1)).astype(np.float32) / 20  # many are equal
    geometry = random.uniform(2, 9, (1, 10, 12, 5)).astype(np.float32)
    geometry[..., 4] = random.uniform(-0.3, 0.3, (1, 10, 12))
    expected = read_cell_by_cell(scores, geometry, 48, 40, 0.35, 0.25, adjust_x, adjust_y)
    found = EAST.run(
        {"image": batch(PAGE), "scores": scores, "geometry": geometry},
        confidence_threshold="0.35",
        overlap_threshold="0.25",
        box_width_adjustment=str(adjust_x),
        box_height_adjustment=str(adjust_y),
    )
    assert len(expected[0]) > 5
    assert found["text_coordinates"][:, 0].tolist() == expected[0]
    assert found["confidence_levels"].ravel().tolist() == expected[1]


def test_no_texts_of_east_are_empty_arrays():
    found = read_east()
    assert {name: array.shape for name, array in found.items()} == {
        "text_images": (0, 1, 3, 4, 5),
        "text_coordinates": (0, 1, 4),
        "confidence_levels": (0, 1, 1),
    }


TURNED = (3.3, 9.6, 4.2, 8.1)


@pytest.mark.parametrize("degrees", [-40, -10, 10, 30, 45])
def test_a_turned_text_has_the_box_around_its_corners(degrees):
    text = ((6, 5), 1, *TURNED, math.radians(degrees))
    (box,), _ = read_cell_by_cell(*maps(text).values(), 48, 40, 0.5, 1, 0, 0)
    assert read_east(text)["text_coordinates"].tolist() == [[box]]


def turned_back(picture, degrees, height):
    """Return the rows of a picture rotated about its centre, and a mask of those from well inside it."""
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
    # A text with a positive angle rises to the right: pixels to the right of another were above it before.
    expected, within = turned_back(page[y : y + height, x : x + width], degrees, text_height)
    # The target has the size of the crop, so nothing is resized.
    size = {"target_image_width": str(width), "target_image_height": str(int(text_height))}
    found = read_east(text, page=page, **params, **size)["text_images"][0, 0].transpose(1, 2, 0)
    assert within.mean() > 0.5
    assert np.abs(found - expected)[within].max() < 0.2


@pytest.mark.parametrize(
    ("params", "degrees", "turned"),
    [
        ({}, 24.5, True),
        ({}, -19.9, False),  # 20 degrees by default
        ({"rotation_angle_threshold": "20"}, 24.5, True),
        ({"rotation_angle_threshold": "24"}, 24.5, True),
        ({"rotation_angle_threshold": "25"}, 24.5, False),
        ({"rotation_angle_threshold": "90"}, 24.5, False),
    ],
)
def test_a_text_is_turned_back_above_the_threshold_angle(params, degrees, turned):
    found = read_east(((6, 5), 1, *TURNED, math.radians(degrees)), **params)
    (box,) = found["text_coordinates"][0].tolist()
    assert close(found["text_images"], images(page_crop(*box))) is not turned


BEYOND = "expected pixels or labels between -2**31 and 2**31, got"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ((0, 0, 0, 0.5, 0), " has a text whose box from x 20, y 16 to x 20, y 16 has no pixels in the image"),
        ((3, 40, 4, -35, 0), " has a text whose box from x 55, y 13 to x 48, y 20 has no pixels in the image"),
        ((3, math.inf, 4, 6, 0), f": {BEYOND} inf"),
        ((3, 10, 4, 6, math.nan), f": {BEYOND} nan"),
        (
            (0.4, 8, 0.4, 8, math.radians(45)),
            " has a text of height 0.8 that is turned by 45 degrees; it does not fit its box of "
            "11x11 pixels (width x height) when turned back",
        ),
    ],
)
def test_a_text_that_cannot_be_cut_out_is_rejected(text, fault):
    assert EAST.refusal({"image": batch(PAGE), **maps(((5, 4), 1, *text))}) == f"input geometry{fault}"


def test_a_text_that_lost_rows_at_the_upper_edge_is_rejected():
    text = ((5, 0), 1, 9, 8, 9, 8, math.radians(45))
    assert EAST.refusal({"image": batch(PAGE), **maps(text)}) == (
        "input geometry has a text of height 18 that is turned by 45 degrees; it does not fit its box of "
        "23x11 pixels (width x height) when turned back"
    )


def test_east_ocr_describes_its_tensors():
    assert EAST.inputs(original_image_layout="NHWC") == {
        "image": ("FP32", (1, 40, 48, 3)),
        "scores": ("FP32", (1, 10, 12, 1)),
        "geometry": ("FP32", (1, 10, 12, 5)),
    }
    assert EAST.outputs(convert_to_gray_scale="true") == {
        "text_images": ("FP32", (-1, 1, 1, 4, 5)),
        "text_coordinates": ("INT32", (-1, 1, 4)),
        "confidence_levels": ("FP32", (-1, 1, 1)),
    }
