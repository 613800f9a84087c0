"""OVMS's own client for TensorFlow Serving's REST API, from when OVMS served it."""

import cv2
import model_zoo
import numpy as np
import ovmsclient
import pytest
from openvino import Type
from service import serve


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Serve images (relu of BGR), sum and words."""
    directory = tmp_path_factory.mktemp("ovmsclient")
    models = {
        "images": model_zoo.relu((-1, 4, 4, 3)),
        "sum": model_zoo.add((-1, 2)),
        "words": model_zoo.passthrough(words=(Type.string, (-1, -1))),
    }
    with serve(directory, "-w", "1", config=model_zoo.save_all(directory, models)) as running:
        yield running


@pytest.fixture
def client(service):
    client = ovmsclient.make_http_client(f"127.0.0.1:{service.port}")
    with client.session:
        yield client


@pytest.mark.parametrize("version", [0, 1])
def test_predict(client, version):
    inputs = {"left": np.float32([[1, 2], [3, 4]]), "right": [[10, 20], [30, 40]]}
    outputs = client.predict(inputs, "sum", version)
    assert outputs["sum"].tolist() == [[11, 22], [33, 44]]
    assert outputs["difference"].tolist() == [[-9, -18], [-27, -36]]


def test_predict_with_encoded_images(client):
    picture = np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)
    outputs = client.predict({"x": [cv2.imencode(".png", picture)[1].tobytes()]}, "images")
    assert np.array_equal(outputs, picture[np.newaxis])


def test_predict_with_strings(client):
    words = np.array([[b"ab", b"c"]])
    assert client.predict({"words": words}, "words").tolist() == [["ab", "c"]]


@pytest.mark.parametrize("version", [0, 1])
def test_metadata(client, version):
    assert client.get_model_metadata("sum", version) == {
        "model_version": 1,
        "inputs": {name: {"dtype": "DT_FLOAT", "shape": [-1, 2]} for name in ("left", "right")},
        "outputs": {name: {"dtype": "DT_FLOAT", "shape": [-1, 2]} for name in ("difference", "sum")},
    }


def test_status(client):
    assert client.get_model_status("sum") == {1: {"state": "AVAILABLE", "error_code": 0, "error_message": ""}}


def test_errors_have_their_classes(client):
    with pytest.raises(ovmsclient.ModelNotFoundError, match="unknown model 'absent'"):
        client.predict({"x": [1]}, "absent")
    with pytest.raises(ovmsclient.ModelNotFoundError, match="unknown model 'absent'"):
        client.get_model_status("absent")
    with pytest.raises(ovmsclient.InvalidInputError, match="model 'sum' has no input 'x'"):
        client.predict({"x": [1]}, "sum")
