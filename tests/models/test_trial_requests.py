"""Inputs of a model's trial: invented ones, those of a trial request, or none."""

import json

import model_zoo
import numpy as np
import pytest
from opened_models import EXACT, open_model, open_path
from openvino import Type
from service import serve, write_config

from ovms_rest.errors import LoadError
from ovms_rest.models.options import ModelOptions, parse_options
from ovms_rest.models.runtime import Model
from ovms_rest.models.trial_requests import read_trial
from ovms_rest.models.trials import Task, run_trials

X = {"name": "x", "shape": [6], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}


def lengths(*values):
    return {"name": "lengths", "shape": [2], "datatype": "INT64", "data": list(values)}


def encode(*inputs):
    return json.dumps({"inputs": inputs}).encode()


def save_split(base_path, *trial):
    """Write a model whose first inference fails with invented inputs, and a trial request beside it."""
    model_zoo.save(model_zoo.split(), base_path)
    if trial:
        (base_path / "1" / "request.json").write_bytes(encode(*trial))
    return base_path


def infer(model, *values):
    arrays = {"x": np.arange(1, 7, dtype=np.float32), "lengths": np.array(values, np.int64)}
    return [tensor.array.tolist() for tensor in model.infer(arrays).values()]


# --- Invented inputs


def test_model_that_computes_no_invented_input_opens_with_a_warning(tmp_path):
    model = open_path(save_split(tmp_path) / "1")
    assert model.warning.startswith("the trial with invented inputs failed: ")
    assert "Total length of splits" in model.warning
    assert infer(model, 2, 4) == [[1, 2], [3, 4, 5, 6]]
    assert infer(model, 5, 1) == [[1, 2, 3, 4, 5], [6]]


def test_model_that_computes_an_invented_input_opens_without_a_warning(tmp_path):
    assert open_model(model_zoo.relu(), tmp_path).warning == ""


def test_result_of_a_trial_has_the_warning_of_the_model(tmp_path):
    (result,) = run_trials([Task(save_split(tmp_path) / "1", EXACT)], timeout=60)
    assert result.reason == ""
    assert "Total length of splits" in result.warning


def test_nothing_is_inferred_without_a_trial(tmp_path):
    endless = Task(model_zoo.save(model_zoo.endless(), tmp_path / "a") / "1", EXACT, ModelOptions(trial=False))
    split = Task(save_split(tmp_path / "b") / "1", EXACT, ModelOptions(trial=False))
    assert [(result.reason, result.warning) for result in run_trials([endless, split], timeout=60)] == [("", "")] * 2


# --- A trial request


def test_model_is_tried_with_its_trial_request(tmp_path):
    model = open_path(save_split(tmp_path, X, lengths(2, 4)) / "1", trial="request.json")
    assert model.warning == ""
    assert infer(model, 2, 4) == [[1, 2], [3, 4, 5, 6]]


def test_model_that_fails_at_its_trial_request_is_refused(tmp_path):
    save_split(tmp_path, X, lengths(2, 5))
    with pytest.raises(LoadError, match=r"^fails at its trial request .*/1/request\.json: .*Total length of splits: 7"):
        open_path(tmp_path / "1", trial="request.json")


def test_dynamic_model_is_tried_with_the_shapes_of_its_trial_request(tmp_path):
    model_zoo.save(model_zoo.product(), tmp_path)
    left = {"name": "left", "shape": [2, 3], "datatype": "FP32", "data": [0] * 6}
    right = {"name": "right", "shape": [3, 1], "datatype": "FP32", "data": [0] * 3}
    (tmp_path / "1" / "request.json").write_bytes(encode(left, right))
    model = open_path(tmp_path / "1", trial="request.json")
    arrays = {"left": np.ones((4, 2), np.float32), "right": np.ones((2, 2), np.float32)}
    assert model.infer(arrays)["product"].array.tolist() == [[2, 2]] * 4
    (tmp_path / "1" / "request.json").write_bytes(encode(left, {**right, "shape": [1, 3]}))
    with pytest.raises(LoadError, match=r"^fails at its trial request .*: .*Incompatible MatMul matrix dimension"):
        open_path(tmp_path / "1", trial="request.json")


def test_trial_request_of_a_model_file_is_read_beside_it(tmp_path):
    save_split(tmp_path, X, lengths(2, 5))
    with pytest.raises(LoadError, match=r"^fails at its trial request "):
        open_path(tmp_path / "1" / "model.xml", trial="request.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../2/request.json", "a/../../b", "a\0b"])
def test_trial_request_outside_the_version_is_refused(path):
    with pytest.raises(LoadError, match=r"^trial: expected the path of a file within the directory of the version"):
        parse_options(ModelOptions(trial=path))


# --- The file


@pytest.fixture
def metadata(tmp_path):
    model = model_zoo.passthrough(a=(Type.f32, (-1,)), b=(Type.u8, (-1,)), c=(Type.string, (-1,)))
    return Model("m", 1, model_zoo.save(model, tmp_path) / "1", EXACT).metadata


A = {"name": "a", "shape": [2], "datatype": "FP32"}
B = {"name": "b", "shape": [1], "datatype": "UINT8"}
C = {"name": "c", "shape": [2], "datatype": "BYTES", "data": ["ä", "}"]}


@pytest.mark.parametrize(
    ("inputs", "binary"),
    [
        ([{**A, "data": [1, 2]}, {**B, "data": [10]}, C], b""),
        ([{**A, "data": [1, 2]}, {**B, "data": [10]}, C], b"\r\n"),
        ([{**A, "data": [1, 2]}, B, C], b"\n"),  # the byte 10
        ([A, B, C], np.float32([1, 2]).tobytes() + b"\n"),
        ([{**A, "parameters": {"binary_data_size": 8}}, {**B, "data": [10]}, C], np.float32([1, 2]).tobytes()),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_file_is_json_followed_by_binary_tensors(inputs, binary, indent, tmp_path, metadata):
    file = tmp_path / "request"
    text = json.dumps({"inputs": inputs, "id": '}\\"'}, indent=indent, ensure_ascii=False)
    file.write_bytes(text.encode() + binary)
    arrays = read_trial(file, metadata)
    assert arrays["a"].tolist() == [1, 2]
    assert arrays["b"].tolist() == [10]
    assert arrays["c"].elements() == ["ä".encode(), b"}"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the request has no JSON, "),
        (b"\xff\xd8\xff\xe0", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: depth limit exceeded"),
        (b"[]", "the request is an array, expected an object"),
        (b'{"inputs": []}', "inputs is empty"),
        (json.dumps({"inputs": [{**A, "data": [1]}]}).encode(), r"data has 1 element, but shape \[2\] needs 2"),
        (json.dumps({"inputs": [{**A, "data": [1, 2]}, {**B, "data": [1]}, C]}).encode() + b"left", "4 instead of 0"),
        (
            json.dumps({"inputs": [A, {**B, "data": [1]}, C]}).encode() + b"few",
            "needs 8 bytes .*, but the body has 3 left",
        ),
        (json.dumps({"inputs": [{**A, "data": [1, 2]}]}).encode(), r"inputs 'b', 'c' of model 'm' are missing"),
    ],
)
def test_invalid_request_is_refused_with_the_reason(content, reason, tmp_path, metadata):
    file = tmp_path / "request"
    file.write_bytes(content)
    with pytest.raises(LoadError, match=rf"^trial request .*/request: .*{reason}"):
        read_trial(file, metadata)


def test_missing_file_is_named(tmp_path, metadata):
    with pytest.raises(LoadError, match=r"^trial request: .*/request is missing or not a file$"):
        read_trial(tmp_path / "request", metadata)


# --- In a service


def test_service_serves_models_by_their_trials_and_a_fixed_request_loads_a_model(tmp_path):
    warned = save_split(tmp_path / "warned")
    tried = save_split(tmp_path / "tried", X, lengths(1, 5))
    failing = save_split(tmp_path / "failing", X, lengths(1, 1))
    latency = {"plugin_config": {"PERFORMANCE_HINT": "LATENCY"}}  # which each worker compiles
    config = write_config(
        tmp_path,
        {"name": "warned", "base_path": str(warned)},
        {"name": "tried", "base_path": str(tried), "trial": "request.json"},
        {"name": "latency", **latency, "base_path": str(tried), "trial": "request.json"},
        {"name": "untried", **latency, "base_path": str(warned), "trial": False},
        {"name": "failing", "base_path": str(failing), "trial": "request.json"},
    )
    with serve(tmp_path, "-w", "1", config=config) as service:
        request = {"inputs": [X, lengths(2, 4)]}
        for name in ("warned", "tried", "latency", "untried"):
            outputs = service.infer(name, request).json()["outputs"]
            assert [output["data"] for output in outputs] == [[1, 2], [3, 4, 5, 6]], name
        assert service.log.count("the trial with invented inputs failed") == 1
        reason = service.get("/v2/models/failing/ready").json()["error"]
        assert "fails at its trial request" in reason
        assert "Total length of splits: 2" in reason
        (failing / "1" / "request.json").write_bytes(encode(X, lengths(3, 3)))
        assert service.request("POST", "/v1/config/reload").status == 201
        assert service.infer("failing", request).status == 200
