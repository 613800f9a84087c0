"""NVIDIA's client against the service, as its users call it."""

import numpy as np
import pytest
from conftest import ELEMENT_TYPES
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from ovms_rest.protocol.datatypes import DATATYPES


@pytest.fixture
def client(service):
    with InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        yield client


def tensor(name, array, datatype, binary=True):
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def example(datatype):
    """Make a [2,2] array of a datatype."""
    values = [[1, 0], [0, 1]] if datatype in ("BOOL",) else [[1, 2], [3, 100]]
    return np.array(values, DATATYPES[datatype].dtype)


def inputs(binary):
    # The client has no JSON for the 16-bit floats.
    return [tensor(name, example(name), name, binary or name in ("FP16", "BF16")) for name in ELEMENT_TYPES]


def test_live_ready_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("relu")
    assert client.is_model_ready("relu", "1")
    assert not client.is_model_ready("relu", "2")
    assert not client.is_model_ready("no such model")
    assert client.get_server_metadata()["name"] == "ovms_rest"
    assert client.get_model_metadata("relu", "1")["inputs"][0]["shape"] == [-1, 4]


@pytest.mark.parametrize("binary_inputs", [True, False])
@pytest.mark.parametrize("listed", [None, True, False], ids=["all outputs", "listed binary", "listed JSON"])
def test_every_datatype_in_every_way(client, binary_inputs, listed):
    wanted = None if listed is None else [InferRequestedOutput(name, binary_data=listed) for name in ELEMENT_TYPES]
    result = client.infer("types", inputs(binary_inputs), outputs=wanted, request_id="42")
    assert result.get_response()["id"] == "42"
    for name in ELEMENT_TYPES:
        assert result.as_numpy(name).tolist() == example(name).tolist(), name


def test_only_the_outputs_that_are_listed_come(client):
    array = np.array([[1, 2, 3]], np.float32)
    pair = [tensor("left", array, "FP32"), tensor("right", array, "FP32", binary=False)]
    result = client.infer("add", pair, outputs=[InferRequestedOutput("sum")])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["sum"]
    assert result.as_numpy("sum").tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("binary", [True, False])
def test_strings(client, binary):
    array = np.array(["zebra", "", "größe"], dtype=object)
    result = client.infer("strings", [tensor("text", array, "BYTES", binary)])
    assert [item.decode() for item in result.as_numpy("text")] == ["zebra", "", "größe"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_and_answers_asked_for_compressed(client, algorithm):
    array = np.ones((10, 4), np.float32)
    result = client.infer(
        "relu",
        [tensor("x", array, "FP32")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert result.as_numpy("y").tolist() == array.tolist()


def test_no_elements(client):
    result = client.infer("relu", [tensor("x", np.zeros((0, 4), np.float32), "FP32")])
    assert result.as_numpy("y").shape == (0, 4)


def test_parameters_are_accepted(client):
    result = client.infer(
        "relu",
        [tensor("x", np.ones((1, 4), np.float32), "FP32")],
        sequence_id=7,
        sequence_start=True,
        priority=1,
        timeout=5_000_000_000,
        parameters={"anything": "goes", "number": 1.5},
    )
    assert result.as_numpy("y").shape == (1, 4)


def test_errors_have_the_servers_message(client):
    with pytest.raises(InferenceServerException) as error:
        client.infer("relu", [tensor("x", np.ones((1, 5), np.float32), "FP32")])
    assert error.value.status() == "400"
    assert error.value.message() == "input 'x': shape is [1,5], the model takes [-1,4]"
    with pytest.raises(InferenceServerException) as error:
        client.get_model_metadata("no such model")
    assert error.value.message().startswith("model 'no such model' is unknown; configured are 'relu'")


def test_asynchronous_calls(client):
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    calls = [client.async_infer("relu", [tensor("x", array * index, "FP32")]) for index in range(5)]
    for index, call in enumerate(calls):
        assert call.get_result().as_numpy("y").tolist() == (array * index).tolist()
