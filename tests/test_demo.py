"""The demo that is served by default: its model, pipeline and sample requests."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from service import ROOT, serve

DEMO = ROOT / "ovms_rest" / "demo"
DIGITS = (3, 5, 7)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("demo"), "-w", "1") as running:
        yield running


def test_the_model_is_small_and_knows_its_labels(demo):
    assert sum(file.stat().st_size for file in (DEMO / "digits" / "1").iterdir()) < 300_000
    metadata = demo.get("/v2/models/digits").json()
    assert metadata["rt_info"]["model_info"]["labels"] == "0 1 2 3 4 5 6 7 8 9"


def sample(pattern: str) -> Path:
    (path,) = (DEMO / "samples").glob(pattern)
    return path


@pytest.mark.parametrize("digit", DIGITS)
def test_the_sample_requests_are_classified_correctly(demo, digit):
    as_json = demo.infer("digits", sample(f"digit-{digit}.json").read_bytes())
    binary = sample(f"digit-{digit}-*.bin")
    length = binary.stem.split("-")[-1]
    as_binary = demo.infer("digits", binary.read_bytes(), Inference_Header_Content_Length=length)
    for answer in (as_json, as_binary):
        found, probabilities = answer.json()["outputs"]
        assert found["data"] == [digit]
        assert np.argmax(probabilities["data"]) == digit


def infer_number(demo, picture):
    """Send a picture to the pipeline."""
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    head = json.dumps({"inputs": [{"name": "picture", "datatype": "BYTES", "shape": [1]}]}).encode()
    body = head + len(encoded).to_bytes(4, "little") + encoded
    return demo.infer("number", body, Inference_Header_Content_Length=str(len(head)))


def test_the_pipeline_finds_the_digits_of_a_picture(demo):
    file = sample("number-*-*.bin")
    _, number, length = file.stem.split("-")
    answer = demo.infer("number", file.read_bytes(), Inference_Header_Content_Length=length)
    boxes, digits = answer.json()["outputs"]
    assert "".join(map(str, digits["data"])) == number
    assert boxes["shape"] == [len(number), 4]
    lefts = boxes["data"][::4]
    assert lefts == sorted(lefts)


def test_a_picture_without_digits_is_a_204(demo):
    answer = infer_number(demo, np.zeros((40, 60), np.uint8))
    assert (answer.status, answer.body) == (204, b"")


def test_a_colour_picture_is_rejected_with_a_message(demo):
    answer = infer_number(demo, np.zeros((40, 60, 3), np.uint8))
    assert answer.status == 400
    assert "image 0 has 3 channels, the model takes 1" in answer.json()["error"]


def test_the_sample_picture_is_the_one_in_its_request():
    picture = sample("number-*.png").read_bytes()
    assert sample("number-*-*.bin").read_bytes().endswith(picture)


@pytest.mark.parametrize("digit", DIGITS)
def test_every_sample_request_has_its_picture(digit):
    assert sample(f"digit-{digit}.png").read_bytes().startswith(b"\x89PNG")
    (tensor,) = json.loads(sample(f"digit-{digit}.json").read_bytes())["inputs"]
    binary = sample(f"digit-{digit}-*.bin")
    pixels = np.frombuffer(binary.read_bytes()[int(binary.stem.split("-")[-1]) :], np.float32)
    assert tensor["data"] == pixels.tolist()
