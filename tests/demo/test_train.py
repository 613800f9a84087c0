"""The files that the training of the demo model has written, and its drawings; the training needs scikit-learn."""

import json

import numpy as np
import openvino
import pytest
from service import ROOT

from ovms_rest.demo.drawings import draw

DEMO = ROOT / "ovms_rest" / "demo"


def read(pattern):
    """Return the only sample of a name, and the length of the JSON in it if its name has one."""
    (file,) = (DEMO / "samples").glob(pattern)
    length = file.stem.split("-")[-1]
    return file.read_bytes(), int(length) if length.isdecimal() else 0


def test_model_is_small():
    assert sum(file.stat().st_size for file in (DEMO / "digits" / "1").iterdir()) < 300_000


@pytest.mark.parametrize("digit", [3, 5, 7])
def test_every_sample_request_has_its_picture(digit):
    assert read(f"digit-{digit}.png")[0].startswith(b"\x89PNG")
    (tensor,) = json.loads(read(f"digit-{digit}.json")[0])["inputs"]
    binary, length = read(f"digit-{digit}-*.bin")
    assert tensor["data"] == np.frombuffer(binary[length:], np.float32).tolist()


def test_sample_picture_is_the_one_in_its_request():
    assert read("number-*-*.bin")[0].endswith(read("number-*.png")[0])


def test_drawings_of_a_seed_are_the_same_each_time():
    first, digits = draw(2, seed=5)
    assert np.array_equal(first, draw(2, seed=5)[0])
    assert not np.array_equal(first, draw(2, seed=6)[0])
    assert digits.tolist() == [digit for digit in range(10) for _ in range(2)]


def test_at_least_97_of_100_drawings_are_read():
    drawings, digits = draw(20, seed=99)
    read = openvino.compile_model(DEMO / "digits" / "1" / "digits.xml", "CPU")(drawings)["digit"]
    assert np.mean(read == digits) >= 0.97
