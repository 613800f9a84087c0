"""The rows of a picture that an interpolation reads, and the memory that pictures are converted in."""

import mmap
import resource

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_rest.models.image_resizing import PRECISIONS, _find_rows, write_image


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize(("dtype", "poison"), [("f4", np.nan), ("f8", np.nan), ("u1", 255), ("u2", 65535), ("i2", -1)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@given(target=st.tuples(st.integers(1, 40), st.integers(1, 9)), more=st.integers(0, 500), width=st.integers(1, 9))
def test_opencv_reads_no_other_rows(dtype, poison, channels, target, more, width):
    height = target[0] + more
    picture = np.random.default_rng(height).integers(0, 255, (height, width, channels)).astype(dtype)
    poisoned = np.full_like(picture, poison)
    rows = _find_rows(height, target[0])
    poisoned[rows] = picture[rows]
    size = target[::-1]
    assert cv2.resize(poisoned, size).tobytes() == cv2.resize(picture, size).tobytes()


@pytest.mark.parametrize(("height", "target"), [(2**18 + 1, 2**16), (2**20 - 1, 3), (300_007, 70_001)])
def test_rows_include_those_that_opencv_rounds_to_in_long_pictures(height, target):
    picture = np.random.default_rng(0).random((height, 1), np.float32)
    poisoned = np.full_like(picture, np.nan)
    rows = _find_rows(height, target)
    poisoned[rows] = picture[rows]
    assert cv2.resize(poisoned, (1, target)).tobytes() == cv2.resize(picture, (1, target)).tobytes()


def test_two_rows_are_read_per_row_of_the_result():
    assert _find_rows(1080, 224).size == 448
    assert _find_rows(10, 1).tolist() == [4, 5]


def write(picture, size, datatype):
    precision = PRECISIONS[datatype]
    target = np.empty((*size, picture.shape[2]), precision.dtype)
    write_image(picture, target, precision)
    return target


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_of_one_size_do_not_mix(dtype):
    """They are converted one after the other in the same memory."""
    kinds = [(2000, "FP32"), (2000, "FP32"), (2000, "FP64"), (1990, "FP32"), (2000, "FP32"), (90, "FP32")]
    for seed, (height, datatype) in enumerate(kinds):
        picture = noise(height, 1500, 3, dtype=dtype, seed=seed)
        expected = cv2.resize(picture.astype(PRECISIONS[datatype].dtype), (10, 9))
        assert write(picture, (9, 10), datatype).tobytes() == expected.tobytes()


def page_faults(picture, size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write(picture, size, "FP32")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_next_picture_of_a_size_reuses_the_pages():
    write(noise(40, 40, 3), (4, 4), "FP32")
    picture = noise(3000, 2000, 3)
    pages = 2 * 100 * 2000 * 3 * 4 // mmap.PAGESIZE
    assert page_faults(picture, (100, 100)) > pages
    assert page_faults(picture, (100, 100)) < pages / 2


def test_pages_beyond_the_limit_are_not_kept():
    picture = noise(6000, 1500, 3)
    pages = 2 * 1000 * 1500 * 3 * 4 // mmap.PAGESIZE
    assert pages * mmap.PAGESIZE > 2**25
    for _ in range(2):
        assert page_faults(picture, (1000, 10)) > pages
