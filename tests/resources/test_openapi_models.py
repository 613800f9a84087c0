"""The part of the OpenAPI document about each model: its extension, limits and odd names."""

import model_zoo
import numpy as np
import orjson
import pytest

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.registry import Entry
from ovms_rest.models.runtime import Model
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.resources import openapi_models
from ovms_rest.resources.openapi_models import ModelPaths


class FakeServable:
    """A version x FP32 [-1,2] -> y FP32 [-1,3] that has computed zeros."""

    def __init__(self, name="m", version="1", labels=(), outputs=None):
        dims = (Dim(0, None), Dim(2, 2))
        outputs = outputs or {"y": TensorMetadata("y", "FP32", (Dim(0, None), Dim(3, 3)))}
        inputs = {"x": TensorMetadata("x", "FP32", dims)}
        self.metadata = ModelMetadata(name, version, inputs, outputs, labels=labels)
        self.example = {"x": np.zeros((1, 2), np.float32)}


def describe(entries):
    return dict(ModelPaths().describe(entries))


def describe_one(servable, **entry):
    ((_, methods),) = describe({"m": Entry({1: servable}, **entry)}).items()
    return methods["post"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a b", "a%20b"),
        ("a.b-c_d~e", "a.b-c_d~e"),
        ("é", "%C3%A9"),
        ("{a}'\"?#%/", "%7Ba%7D%27%22%3F%23%25%2F"),
    ],
)
def test_the_name_in_a_path_is_percent_encoded(name, path):
    assert list(describe({name: Entry({1: FakeServable(name)})})) == [f"/v2/models/{path}/infer"]


def test_the_paths_of_several_versions_are_those_of_the_highest_and_of_each():
    versions = {number: FakeServable(version=str(number)) for number in (2, 10)}
    found = describe({"m": Entry(versions)})
    assert {path: methods["post"]["x-ovms-rest"]["version"] for path, methods in found.items()} == {
        "/v2/models/m/infer": "10",
        "/v2/models/m/versions/10/infer": "10",
        "/v2/models/m/versions/2/infer": "2",
    }


def test_a_model_without_versions_has_no_path():
    assert describe({"m": Entry(reason="is broken"), "n": Entry(ended=(1,))}) == {}


def test_labels_belong_to_outputs_with_as_many_classes():
    any_, three, two = Dim(0, None), Dim(3, 3), Dim(2, 2)
    outputs = {
        "boxes": TensorMetadata("boxes", "FP32", (any_, two)),
        "index": TensorMetadata("index", "INT64", (any_,)),
        "names": TensorMetadata("names", "BYTES", (three,)),
        "scalar": TensorMetadata("scalar", "FP32", ()),
        "scores": TensorMetadata("scores", "FP32", (any_, three)),
        "unknown": TensorMetadata("unknown", "FP32", None),
    }
    found = describe_one(FakeServable(labels=("a", "b", "c"), outputs=outputs))["x-ovms-rest"]["outputs"]
    assert {tensor["name"]: tensor.get("labels") for tensor in found} == {
        **dict.fromkeys(("boxes", "index", "names", "scalar", "unknown")),
        "scores": ["a", "b", "c"],
    }
    assert found[-1]["shape"] == ["-1"]


def test_many_labels_are_left_out():
    count = 10_001
    outputs = {"y": TensorMetadata("y", "FP32", (Dim(count, count),))}
    assert (
        "labels" not in describe_one(FakeServable(labels=("a",) * count, outputs=outputs))["x-ovms-rest"]["outputs"][0]
    )


def test_examples_and_labels_of_all_models_together_are_limited(monkeypatch):
    entries = {f"m{index}": Entry({1: FakeServable(f"m{index}")}) for index in range(4)}
    bodies = [methods["post"]["requestBody"]["content"]["application/json"] for methods in describe(entries).values()]
    size = len(orjson.dumps(bodies[0]["example"]))
    monkeypatch.setattr(openapi_models, "MAX_EXTRAS_BYTES", 2 * size)
    bodies = [methods["post"]["requestBody"]["content"]["application/json"] for methods in describe(entries).values()]
    assert ["example" in body for body in bodies] == [True, True, False, False]


def test_a_request_of_the_configuration_comes_before_a_generated_one():
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [3, 4]}]}
    content = describe_one(FakeServable(), example=request)["requestBody"]["content"]
    assert content["application/json"]["example"] == request


def test_a_path_that_is_not_utf_8_is_shown_with_escapes(tmp_path):
    compilation = plan_compilation("CPU", {}, cores=1, cache_dir=str(tmp_path / "cache\udcff"))
    model = Model("m", 1, model_zoo.save(model_zoo.relu(), tmp_path / "m") / "1", compilation)
    found = describe_one(model)["x-ovms-rest"]["compiled"]
    assert found["CACHE_DIR"] == f"{tmp_path}/cache\\udcff"
    assert found["NUM_STREAMS"] == "0"
