"""Example requests: small, complete, and accepted by the model."""

import base64
import json

import ml_dtypes
import numpy as np
import pytest

from ovms_rest.errors import InvalidRequestError, LoadError
from ovms_rest.models.example_requests import (
    MAX_FILE_BYTES,
    MAX_GENERATED_BYTES,
    check_example,
    encode_example,
    encode_zeros,
    find_example,
    make_constant,
    read_example,
)
from ovms_rest.models.images import ImageLimits, take_images
from ovms_rest.protocol.datatypes import DATATYPE_NAMES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata

ANY = Dim(0, None)


def metadata(**inputs):
    """Describe a model with these inputs, each its datatype and rank."""
    ports = {name: TensorMetadata(name, datatype, (ANY,) * rank) for name, (datatype, rank) in inputs.items()}
    return ModelMetadata("m", "1", ports, {})


@pytest.mark.parametrize("datatype", DATATYPE_NAMES)
def test_an_example_of_each_datatype_has_the_arrays(datatype):
    model, array = metadata(x=(datatype, 2)), make_constant(datatype, (2, 3), 1)
    request = encode_example(model, {"x": array})
    assert request["inputs"][0]["shape"] == [2, 3]
    found = check_example(json.loads(json.dumps(request)), model)["x"]
    if datatype == "BYTES":
        assert found.elements() == [b""] * 6
    else:
        assert np.array_equal(found, array)


def test_constants_take_no_memory_for_each_element():
    assert make_constant("FP32", (2**20, 2**20), 0).strides == (0, 0)


def test_bytes_that_are_not_utf_8_are_in_base64():
    array = BytesArray.of([b"text", b"\xff"], (2,))
    (item,) = encode_example(metadata(x=("BYTES", 1)), {"x": array})["inputs"]
    assert item["data"] == ["text", {"b64": base64.b64encode(b"\xff").decode()}]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((MAX_GENERATED_BYTES,), np.float32),
        np.full((1000,), 0.1234567, np.float32),
        np.array([np.nan], np.float32),
        np.array([np.inf], np.float32),
    ],
)
def test_what_json_cannot_represent_within_the_limit_has_no_example(array):
    assert encode_example(metadata(x=("FP32", 1)), {"x": array}) is None


def test_the_limit_is_that_of_all_inputs():
    arrays = {"x": np.zeros(800, np.float32), "y": np.zeros(800, np.float32)}
    assert encode_example(metadata(x=("FP32", 1)), arrays) is not None
    assert encode_example(metadata(x=("FP32", 1), y=("FP32", 1)), arrays) is None


def test_a_bfloat16_is_a_number():
    array = np.array([1.5], ml_dtypes.bfloat16)
    assert encode_example(metadata(x=("BF16", 1)), {"x": array})["inputs"][0]["data"] == [1.5]


def test_a_large_image_is_a_small_picture():
    dims = (Dim(1, 1), Dim(224, 224), Dim(224, 224), Dim(3, 3))
    port = take_images(TensorMetadata("x", "FP32", dims), "NHWC", ImageLimits())
    model = ModelMetadata("m", "1", {"x": port}, {})
    request = encode_example(model, {"x": make_constant("FP32", (1, 224, 224, 3), 1)})
    assert len(json.dumps(request)) < 300
    assert (check_example(request, model)["x"] == 1).all()


# --- Zeros


def test_large_inputs_become_zeros_behind_the_json():
    model = metadata(large=("FP32", 1), small=("INT64", 1))
    arrays = {"large": make_constant("FP32", (5000,), 0), "small": make_constant("INT64", (1,), 1)}
    head, size = encode_zeros(model, arrays)
    assert size == 20_000
    assert json.loads(head) == {
        "inputs": [
            {"name": "large", "datatype": "FP32", "shape": [5000]},
            {"name": "small", "datatype": "INT64", "shape": [1], "data": [1]},
        ]
    }


@pytest.mark.parametrize(
    "array",
    [
        make_constant("FP32", (5000,), 1),
        np.zeros(5000, np.float32),
        BytesArray.of([b"x" * MAX_GENERATED_BYTES], (1,)),
    ],
)
def test_other_large_inputs_have_no_zeros(array):
    datatype = "BYTES" if isinstance(array, BytesArray) else "FP32"
    assert encode_zeros(metadata(x=(datatype, 1)), {"x": array}) is None


# --- Files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing"),
        (b"{", "is not valid JSON: "),
        (b'"\xff"', "is not valid JSON: line 1 column 2: byte 0xff is not UTF-8"),
        (b"[]", "is not a JSON object with an inference request"),
        (b" " * (MAX_FILE_BYTES + 1), "65536"),
    ],
)
def test_a_file_that_is_no_request_is_refused_with_the_reason(tmp_path, content, reason, caplog):
    file = tmp_path / "example.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LoadError, match=reason):
        read_example(file)
    assert find_example("model 'm'", file) is None
    assert "model 'm': its example is left out: " in caplog.text


def test_no_file_is_no_example(caplog):
    assert find_example("model 'm'", None) is None
    assert caplog.text == ""


def test_an_example_that_does_not_fit_is_refused():
    item = {"name": "y", "datatype": "FP32", "shape": [1], "data": [1]}
    with pytest.raises(InvalidRequestError, match="'y'"):
        check_example({"inputs": [item]}, metadata(x=("FP32", 1)))
    with pytest.raises(InvalidRequestError, match="output"):
        check_example({"inputs": [{**item, "name": "x"}], "outputs": [{"name": "z"}]}, metadata(x=("FP32", 1)))
