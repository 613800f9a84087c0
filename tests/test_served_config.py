"""The effect of a config on the served models, through a service: OVMS's example, devices, images."""

import copy
import json

import cv2
import model_zoo
import numpy as np
import pytest
from openvino import Type, opset15
from service import serve, write_config
from test_config import EVERY_KEY

PHOTO = {"base_path": "models/photo", "layout": "NHWC:NCHW", "precision": "uint8:fp32"}
FURTHER = [{"name": "photo", **PHOTO}, {"name": "broken", "base_path": "models/photo", "shape": "(1,x)"}]


def example_config():
    """Return the example with a relative path, and further models."""
    config = copy.deepcopy(EVERY_KEY)
    models = config["model_config_list"]
    models[1]["config"]["base_path"] = "models/bert"
    return {**config, "model_config_list": [*models, *({"config": model} for model in FURTHER)]}


def classifier():
    """A model with the tensors of ResNet-50: image FP32 [1,3,224,224] -> means FP32 [1,3]."""
    image = model_zoo.parameter("image", (1, 3, 224, 224), Type.f32)
    return model_zoo.model_of({"means": opset15.reduce_mean(image, np.int64([2, 3]), keep_dims=False)}, [image])


def encoder():
    """A model with the inputs of BERT, both INT64 [-1,-1] -> tokens, attended FP32 [-1]."""
    ids, mask = (model_zoo.parameter(name, (-1, -1), Type.i64) for name in ("input_ids", "attention_mask"))
    sums = {
        name: opset15.reduce_sum(opset15.convert(node, "f32"), np.int64([1]), keep_dims=False)
        for name, node in (("tokens", ids), ("attended", mask))
    }
    return model_zoo.model_of(sums, [ids, mask])


def photo():
    """A model of pictures: image FP32 [1,3,4,6] -> the same pixels."""
    image = model_zoo.parameter("image", (1, 3, 4, 6), Type.f32)
    return model_zoo.model_of({"pixels": opset15.relu(image)}, [image])


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    directory = tmp_path_factory.mktemp("example")
    for version in (1, 3, 7):
        model_zoo.save(classifier(), directory / "models" / "resnet50", version)
    model_zoo.save(encoder(), directory / "models" / "bert")
    model_zoo.save(photo(), directory / "models" / "photo")
    config = directory / "config.json"
    config.write_text(json.dumps(example_config()))
    with serve(directory, "-w", "2", config=config) as running:
        yield running


def infer(service, model, inputs, binary=b""):
    text = json.dumps({"inputs": inputs}).encode()
    return service.infer(model, text + binary, Inference_Header_Content_Length=str(len(text)))


def infer_image(service, model, array):
    """Send an image [n,224,224,3] in binary form."""
    return infer(service, model, [{"name": "image", "datatype": "FP32", "shape": list(array.shape)}], array.tobytes())


def tensor(name, datatype, array):
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}


def test_config_determines_the_metadata(example):
    resnet, bert = (example.get(f"/v2/models/{name}").json() for name in ("resnet", "bert"))
    assert resnet["versions"] == ["3", "7"]
    assert resnet["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 224, 224, 3]}]
    assert bert["inputs"] == [
        {"name": "attention_mask", "datatype": "INT64", "shape": [1, -1]},
        {"name": "input_ids", "datatype": "INT64", "shape": [1, -1]},
    ]


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_batches_within_the_range_are_accepted(example, batch):
    array = np.random.default_rng(0).random((batch, 224, 224, 3), np.float32)
    answer = infer_image(example, "resnet", array)
    means = np.reshape(answer.json()["outputs"][0]["data"], (batch, 3))
    np.testing.assert_allclose(means, array.mean((1, 2)), rtol=0.02)


def test_batch_outside_the_range_is_400_with_the_range(example):
    answer = infer_image(example, "resnet", np.zeros((17, 224, 224, 3), np.float32))
    assert answer.status == 400
    assert answer.json()["error"].endswith("shape is [17,224,224,3], the model takes [1:16,224,224,3]")


def test_versions_of_the_policy_are_served(example):
    answer = infer_image(example, "resnet/versions/3", np.zeros((1, 224, 224, 3), np.float32))
    assert answer.json()["model_version"] == "3"
    assert example.get("/v2/models/resnet/versions/1").status == 404


def test_each_input_has_its_own_shape(example):
    ids, mask = np.arange(20).reshape(1, 20), np.ones((1, 20), int)
    answer = infer(example, "bert", [tensor("input_ids", "INT64", ids), tensor("attention_mask", "INT64", mask)])
    assert {item["name"]: item["data"] for item in answer.json()["outputs"]} == {"tokens": [190], "attended": [20]}
    short = np.ones((1, 15), int)
    answer = infer(example, "bert", [tensor("input_ids", "INT64", ids), tensor("attention_mask", "INT64", short)])
    assert answer.status == 400
    assert answer.json()["error"].endswith("shape is [1,15], the model takes [1,16:512]")


def test_ignored_streams_are_logged_and_a_mistake_concerns_its_model_alone(example):
    assert "PERFORMANCE_HINT=THROUGHPUT" in example.log
    assert "NUM_STREAMS=4" in example.log
    answer = example.get("/v2/models/broken")
    assert answer.status == 404
    assert "shape" in answer.json()["error"]
    ready = example.get("/v2/health/ready")
    assert (ready.status, "'broken'" in ready.json()["error"]) == (400, True)


# --- Devices and the cache

DEVICES = ["CPU", "cpu", "AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU", "BATCH:CPU(4)"]


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """The same model on every device of a machine with a CPU, named by its index in the list, with a cache."""
    directory = tmp_path_factory.mktemp("devices")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "relu")
    models = [{"name": f"m{index}", "base_path": "relu", "target_device": name} for index, name in enumerate(DEVICES)]
    models += [{"name": "gone", "base_path": "relu", "target_device": "GPU.7"}]
    config = write_config(directory, *models)
    with serve(directory, "-w", "2", config=config, OVMS_REST_CACHE_DIR=str(directory / "cache")) as running:
        running.cache = directory / "cache"
        yield running


@pytest.mark.parametrize("index", range(len(DEVICES)))
def test_devices_infer_and_all_but_a_plain_cpu_are_compiled_by_each_worker(devices, index):
    for _ in range(2):
        answer = infer(devices, f"m{index}", [tensor("x", "FP32", np.float32([[1, -2, 3, -4]]))])
        assert answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]
    (line,) = [line for line in devices.log.splitlines() if f"model 'm{index}' version 1 serves from" in line]
    assert ("compiled once" in line, f"target_device is {DEVICES[index]})" in line) == (index < 2, index >= 2)


def test_missing_device_fails_its_model_and_inferences_do_not_get_the_reason(devices):
    asked = devices.get("/v2/models/gone/ready")
    assert (asked.status, "cannot be compiled for GPU.7: " in asked.json()["error"]) == (404, True)
    inferred = infer(devices, "gone", [tensor("x", "FP32", np.zeros((1, 4), np.float32))])
    expected = {"error": "model 'gone' does not serve; GET /v2/models/gone/ready says why"}
    assert (inferred.status, inferred.json()) == (404, expected)


def test_compiled_models_are_cached(devices):
    assert list(devices.cache.glob("*.blob"))


def test_unwritable_cache_is_reported(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    config = write_config(tmp_path, {"name": "relu", "base_path": "relu"})
    (tmp_path / "file").touch()
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_CACHE_DIR=str(tmp_path / "file")) as service:
        error = service.get("/v2/models/relu/ready").json()["error"]
    assert f"the cache directory {tmp_path}/file cannot be written: File exists" in error


# --- Images


def encoded(*images):
    return b"".join(len(image).to_bytes(4, "little") + image for image in images)


def picture(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def infer_encoded(service, data, shape=(1,)):
    return infer(service, "photo", [{"name": "image", "datatype": "BYTES", "shape": shape}], data)


@pytest.mark.parametrize("size", [(4, 6), (8, 9), (40, 60)])
def test_image_is_decoded_and_resized(example, size):
    image = picture(*size)
    (output,) = infer_encoded(example, encoded(png(image))).json()["outputs"]
    assert output["shape"] == [1, 3, 4, 6]
    expected = cv2.resize(image, (6, 4)).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.reshape(output["data"], (3, 4, 6)), expected)


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([1], encoded(b"no image"), "image 0"),
        ([2], encoded(png(picture(4, 6)), png(picture(4, 6))), "got 2 images, the model takes 1"),
        ([1, 1], encoded(png(picture(4, 6))), "[1,1]"),
    ],
)
def test_unsuitable_images_are_400(example, shape, data, message):
    answer = infer_encoded(example, data, shape)
    assert answer.status == 400
    assert answer.json()["error"].startswith("input 'image'")
    assert message in answer.json()["error"]


def test_grey_image_becomes_three_equal_channels(example):
    grey = picture(4, 6)[..., 0]
    (output,) = infer_encoded(example, encoded(png(grey))).json()["outputs"]
    np.testing.assert_array_equal(np.reshape(output["data"], (3, 4, 6)), [grey] * 3)


def test_shape_in_the_models_own_layout_is_recognized(example):
    answer = infer(example, "photo", [tensor("image", "UINT8", np.zeros((1, 3, 4, 6), int))])
    assert answer.status == 400
    assert answer.json()["error"].endswith(
        "the model takes [1,4,6,3]; [1,3,4,6] is in the layout of the model itself, NCHW, but its configuration has "
        '"layout": "NHWC:NCHW", so clients send NHWC'
    )


def test_refused_datatype_names_the_precision_that_would_accept_it(tmp_path):
    model_zoo.save(photo(), tmp_path / "plain")
    config = write_config(
        tmp_path,
        {"name": "plain", "base_path": "plain"},
        {"name": "uint8", "base_path": "plain", "precision": "uint8:fp32"},
    )
    inputs = [tensor("image", "UINT8", np.full((1, 3, 4, 6), 7))]
    with serve(tmp_path, config=config) as service:
        refused, answer = (infer(service, name, inputs) for name in ("plain", "uint8"))
    assert refused.status == 400
    assert refused.json()["error"].endswith(
        '; "precision": "uint8:fp32" in the configuration of the model makes it take UINT8'
    )
    assert answer.json()["outputs"][0]["data"] == [7.0] * 72
