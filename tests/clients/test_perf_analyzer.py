"""The calls of perf_analyzer, in its order, and the parts of the responses that it reads without checking them."""

import http.client
import json

import numpy as np
import pytest
from service import PATIENCE

DURATIONS = ("success", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
MODEL = "/v2/models/add"


@pytest.fixture
def call(service):
    """Send requests on one connection that is kept, as libcurl does; return headers and body of each response."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)

    def send(method, path, body=None, **headers):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return response.headers, body

    yield send
    connection.close()


@pytest.fixture
def get(call):
    """GET a path and parse the response."""
    return lambda path: json.loads(call("GET", path)[1])


def infer(call, body, length, kind):
    """Send an inference as perf_analyzer does, with the length of its JSON in any case."""
    return call(
        "POST", f"{MODEL}/infer", body, Content_Type=f"application/{kind}", Inference_Header_Content_Length=str(length)
    )


def binary_request():
    """Make head and tensors as perf_analyzer sends them."""
    arrays = {"left": np.float32([[1, 2, 3]]), "right": np.float32([[10, 20, 30]])}
    head = {
        "id": "",
        "inputs": [
            {"name": name, "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
            for name in arrays
        ],
        "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in ("difference", "sum")],
    }
    return json.dumps(head).encode(), b"".join(array.tobytes() for array in arrays.values())


def statistics(get):
    (entry,) = get(f"{MODEL}/stats")["model_stats"]
    return entry


def counts(entry):
    return {name: entry["inference_stats"][name]["count"] for name in DURATIONS}


def test_measurement_runs_from_the_first_call_to_the_last(call, get, service):
    metadata, config = get(MODEL), get(f"{MODEL}/config")
    for configured, known in ((config["input"], metadata["inputs"]), (config["output"], metadata["outputs"])):
        assert [tensor["name"] for tensor in configured] == [tensor["name"] for tensor in known]
    assert "statistics" in get("/v2")["extensions"]
    before = statistics(get)

    head, tensors = binary_request()
    for _ in range(10):
        headers, body = infer(call, head + tensors, len(head), "octet-stream")
        length = int(headers["Inference-Header-Content-Length"])
        assert [output["name"] for output in json.loads(body[:length])["outputs"]] == ["difference", "sum"]
        assert np.frombuffer(body[length:], np.float32).tolist() == [-9, -18, -27, 11, 22, 33]

    service.wait_for(lambda: statistics(get)["inference_count"] == before["inference_count"] + 10)
    after = statistics(get)
    assert after["execution_count"] == before["execution_count"] + 10
    added = dict.fromkeys(DURATIONS[:5], 10) | dict.fromkeys(DURATIONS[5:], 0)
    assert counts(after) == {name: count + added[name] for name, count in counts(before).items()}
    for name in ("success", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][name]["ns"] > before["inference_stats"][name]["ns"]


def test_configuration_has_the_parts_read_unchecked(get):
    config = get(f"{MODEL}/config")
    assert config["max_batch_size"] == 0  # else the first dim would be taken off the shapes
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert [(tensor["optional"], tensor["is_shape_tensor"]) for tensor in config["input"]] == [(False, False)] * 2
    assert not config.keys() & {"sequence_batching", "dynamic_batching", "response_cache", "ensemble_scheduling"}


def test_statistics_have_the_parts_read_unchecked(get):
    entry = statistics(get)
    assert (entry["name"], entry["version"]) == ("add", "1")
    assert type(entry["inference_count"]) is type(entry["execution_count"]) is int
    for name in DURATIONS:
        duration = entry["inference_stats"][name]
        assert type(duration["count"]) is type(duration["ns"]) is int


@pytest.mark.parametrize("model", ["relu", "add", "types", "scalar", "strings", "text2d", "matrix", "onnx"])
def test_every_model_has_a_configuration_and_statistics_by_a_numeric_version(get, model):
    assert get(f"/v2/models/{model}/config")["name"] == model
    assert [int(entry["version"]) for entry in get(f"/v2/models/{model}/stats")["model_stats"]] == [1]


def test_json_tensors_are_returned_as_json(call):
    """As with --input-tensor-format json --output-tensor-format json."""
    inputs = [{"name": name, "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]} for name in ("left", "right")]
    outputs = [{"name": "sum", "parameters": {"binary_data": False}}]
    body = json.dumps({"id": "", "inputs": inputs, "outputs": outputs}).encode()
    headers, answered = infer(call, body, len(body), "json")
    assert "Inference-Header-Content-Length" not in headers
    assert json.loads(answered) == {
        "model_name": "add",
        "model_version": "1",
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [1, 3], "data": [2, 4, 6]}],
    }
