"""The demo that is served by default: responses to its sample requests."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from service import ROOT, serve

SAMPLES = ROOT / "ovms_rest" / "demo" / "samples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("demo"), "-w", "1") as running:
        yield running


def sample(pattern: str) -> Path:
    (path,) = SAMPLES.glob(pattern)
    return path


def infer_sample(demo, model, pattern):
    """Send the binary sample request whose name ends in the length of its JSON."""
    file = sample(pattern)
    return demo.infer(model, file.read_bytes(), Inference_Header_Content_Length=file.stem.split("-")[-1])


def test_model_knows_its_labels(demo):
    metadata = demo.get("/v2/models/digits").json()
    assert metadata["rt_info"]["model_info"]["labels"] == "0 1 2 3 4 5 6 7 8 9"


@pytest.mark.parametrize("digit", [3, 5, 7])
def test_sample_requests_are_classified_correctly(demo, digit):
    as_json = demo.infer("digits", sample(f"digit-{digit}.json").read_bytes())
    for answer in (as_json, infer_sample(demo, "digits", f"digit-{digit}-*.bin")):
        found, probabilities = answer.json()["outputs"]
        assert found["data"] == [digit]
        assert np.argmax(probabilities["data"]) == digit


def test_pipeline_finds_the_digits_of_a_picture(demo):
    boxes, digits = infer_sample(demo, "number", "number-*-*.bin").json()["outputs"]
    number = sample("number-*.png").stem.split("-")[1]
    assert "".join(map(str, digits["data"])) == number
    assert boxes["shape"] == [len(number), 4]
    lefts = boxes["data"][::4]
    assert lefts == sorted(lefts)


def infer_number(demo, picture):
    """Send a picture to the pipeline."""
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    head = json.dumps({"inputs": [{"name": "picture", "datatype": "BYTES", "shape": [1]}]}).encode()
    body = head + len(encoded).to_bytes(4, "little") + encoded
    return demo.infer("number", body, Inference_Header_Content_Length=str(len(head)))


def test_response_to_a_picture_without_digits_is_204(demo):
    answer = infer_number(demo, np.zeros((40, 60), np.uint8))
    assert (answer.status, answer.body) == (204, b"")


def test_colour_picture_is_rejected_with_a_message(demo):
    answer = infer_number(demo, np.zeros((40, 60, 3), np.uint8))
    assert answer.status == 400
    assert "image 0 has 3 channels, the model takes 1" in answer.json()["error"]
