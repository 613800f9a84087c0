"""The files that the training of the demo model has written; the training itself needs scikit-learn."""

import json

import numpy as np
import pytest
from service import ROOT

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
