"""Models served as their configs say, through a real service: the complete example, images, strings, versions."""

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
    """Return the example but for its absolute path, and further models."""
    config = copy.deepcopy(EVERY_KEY)
    models = config["model_config_list"]
    models[1]["config"]["base_path"] = "models/bert"
    return {**config, "model_config_list": [*models, *({"config": model} for model in FURTHER)]}


def classifier():
    """Like ResNet-50 from outside: image FP32 [1,3,224,224] -> means FP32 [1,3]."""
    image = model_zoo.parameter("image", (1, 3, 224, 224), Type.f32)
    return model_zoo.model_of({"means": opset15.reduce_mean(image, np.int64([2, 3]), keep_dims=False)}, [image])


def encoder():
    """Like BERT from outside: input_ids INT64 [-1,-1], attention_mask INT64 [-1,-1] -> tokens, attended FP32 [-1]."""
    ids, mask = (model_zoo.parameter(name, (-1, -1), Type.i64) for name in ("input_ids", "attention_mask"))
    sums = {
        name: opset15.reduce_sum(opset15.convert(node, "f32"), np.int64([1]), keep_dims=False)
        for name, node in (("tokens", ids), ("attended", mask))
    }
    return model_zoo.model_of(sums, [ids, mask])


def photo():
    """A picture, image FP32 [1,3,4,6] -> the same pixels."""
    return model_zoo.model_of(
        {"pixels": opset15.relu(image := model_zoo.parameter("image", (1, 3, 4, 6), Type.f32))}, [image]
    )


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


def tensor(name, datatype, array):
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}


def test_the_metadata_are_those_that_the_config_asks_for(example):
    resnet, bert = (example.get(f"/v2/models/{name}").json() for name in ("resnet", "bert"))
    assert resnet["versions"] == ["3", "7"]
    assert resnet["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 224, 224, 3]}]
    assert bert["inputs"] == [
        {"name": "attention_mask", "datatype": "INT64", "shape": [1, -1]},
        {"name": "input_ids", "datatype": "INT64", "shape": [1, -1]},
    ]


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_batches_of_the_range_are_taken(example, batch):
    array = np.random.default_rng(0).random((batch, 224, 224, 3), np.float32)
    head = [{"name": "image", "datatype": "FP32", "shape": list(array.shape)}]
    answer = infer(example, "resnet", head, array.tobytes())
    means = np.reshape(answer.json()["outputs"][0]["data"], (batch, 3))
    np.testing.assert_allclose(means, array.mean((1, 2)), rtol=0.02)


def test_a_batch_outside_of_the_range_is_a_400_with_the_range(example):
    head = [{"name": "image", "datatype": "FP32", "shape": [17, 224, 224, 3]}]
    answer = infer(example, "resnet", head, bytes(17 * 224 * 224 * 3 * 4))
    assert answer.status == 400
    assert answer.json()["error"].endswith("shape is [17,224,224,3], the model takes [1:16,224,224,3]")


def test_a_version_of_the_policy_is_served_by_its_number(example):
    array = np.zeros((1, 224, 224, 3), np.float32)
    head = json.dumps({"inputs": [{"name": "image", "datatype": "FP32", "shape": list(array.shape)}]}).encode()
    answer = example.infer("resnet/versions/3", head + array.tobytes(), Inference_Header_Content_Length=str(len(head)))
    assert answer.json()["model_version"] == "3"
    assert example.get("/v2/models/resnet/versions/1").status == 404


def test_the_shapes_of_several_inputs_are_their_own(example):
    ids, mask = np.arange(20).reshape(1, 20), np.ones((1, 20), int)
    answer = infer(example, "bert", [tensor("input_ids", "INT64", ids), tensor("attention_mask", "INT64", mask)])
    assert {item["name"]: item["data"] for item in answer.json()["outputs"]} == {"tokens": [190], "attended": [20]}
    short = np.ones((1, 15), int)
    answer = infer(example, "bert", [tensor("input_ids", "INT64", ids), tensor("attention_mask", "INT64", short)])
    assert answer.status == 400
    assert answer.json()["error"].endswith("shape is [1,15], the model takes [1,16:512]")


def test_what_is_done_with_streams_and_the_mistake_of_one_model_are_told(example):
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
    """The same model on every device that a machine with a CPU has, named by its place in the list, with a cache."""
    directory = tmp_path_factory.mktemp("devices")
    model_zoo.save(model_zoo.relu((1, 4)), directory / "relu")
    models = [{"name": f"m{index}", "base_path": "relu", "target_device": name} for index, name in enumerate(DEVICES)]
    models += [{"name": "gone", "base_path": "relu", "target_device": "GPU.7"}]
    config = write_config(directory, *models)
    with serve(directory, "-w", "2", config=config, OVMS_REST_CACHE_DIR=str(directory / "cache")) as running:
        running.cache = directory / "cache"
        yield running


@pytest.mark.parametrize("index", range(len(DEVICES)))
def test_devices_answer_and_those_that_are_no_plain_cpu_are_compiled_by_each_worker(devices, index):
    for _ in range(2):
        answer = infer(devices, f"m{index}", [tensor("x", "FP32", np.float32([[1, -2, 3, -4]]))])
        assert answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]
    (line,) = [line for line in devices.log.splitlines() if f"model 'm{index}' version 1 serves from" in line]
    assert ("compiled once" in line, f"target_device is {DEVICES[index]})" in line) == (index < 2, index >= 2)


def test_a_device_that_is_not_there_fails_its_model_and_its_reason_is_not_for_those_who_infer(devices):
    asked = devices.get("/v2/models/gone/ready")
    assert (asked.status, "cannot be compiled for GPU.7: " in asked.json()["error"]) == (404, True)
    inferred = infer(devices, "gone", [tensor("x", "FP32", np.zeros((1, 4), np.float32))])
    expected = {"error": "model 'gone' does not serve; GET /v2/models/gone/ready says why"}
    assert (inferred.status, inferred.json()) == (404, expected)


def test_compiled_models_are_cached(devices):
    assert list(devices.cache.glob("*.blob"))


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
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


@pytest.mark.parametrize("size", [(4, 6), (8, 9), (40, 60)])
def test_an_image_is_decoded_and_resized(example, size):
    image = picture(*size)
    answer = infer(example, "photo", [{"name": "image", "datatype": "BYTES", "shape": [1]}], encoded(png(image)))
    (output,) = answer.json()["outputs"]
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
def test_images_that_do_not_fit_are_a_400(example, shape, data, message):
    answer = infer(example, "photo", [{"name": "image", "datatype": "BYTES", "shape": shape}], data)
    assert answer.status == 400
    assert answer.json()["error"].startswith("input 'image'")
    assert message in answer.json()["error"]


def test_a_grey_image_is_three_equal_channels(example):
    grey = picture(4, 6)[..., 0]
    answer = infer(example, "photo", [{"name": "image", "datatype": "BYTES", "shape": [1]}], encoded(png(grey)))
    (output,) = answer.json()["outputs"]
    np.testing.assert_array_equal(np.reshape(output["data"], (3, 4, 6)), [grey] * 3)


def test_a_shape_in_the_layout_of_the_model_is_called_that(example):
    root = {"inputs": [{"name": "image", "shape": [1, 3, 4, 6], "datatype": "UINT8", "data": [0] * 72}]}
    answer = example.request("POST", "/v2/models/photo/infer", json.dumps(root))
    assert answer.status == 400
    assert answer.json()["error"].endswith(
        "the model takes [1,4,6,3]; [1,3,4,6] is in the layout of the model itself, NCHW, but its configuration has "
        '"layout": "NHWC:NCHW", so clients send NHWC'
    )


def test_the_precision_that_a_model_lacks_is_named_and_makes_it_take_the_datatype(tmp_path):
    model_zoo.save(photo(), tmp_path / "plain")
    config = write_config(
        tmp_path,
        {"name": "plain", "base_path": "plain"},
        {"name": "uint8", "base_path": "plain", "precision": "uint8:fp32"},
    )
    root = {"inputs": [{"name": "image", "shape": [1, 3, 4, 6], "datatype": "UINT8", "data": [7] * 72}]}
    with serve(tmp_path, config=config) as service:
        refused = service.request("POST", "/v2/models/plain/infer", json.dumps(root))
        answer = service.request("POST", "/v2/models/uint8/infer", json.dumps(root))
    assert refused.status == 400
    assert refused.json()["error"].endswith(
        '; "precision": "uint8:fp32" in the configuration of the model makes it take UINT8'
    )
    assert answer.json()["outputs"][0]["data"] == [7.0] * 72
