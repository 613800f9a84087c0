"""NVIDIA's client against the service, as its users call it."""

import asyncio
import json

import model_zoo
import numpy as np
import pytest
from model_zoo import ELEMENT_TYPES
from service import serve, write_config
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, aio
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


ONES = np.ones((1, 4), np.float32)
RANGE = np.arange(8, dtype=np.float32).reshape(2, 4)


def relu(array=ONES, binary=True):
    return "relu", [tensor("x", array, "FP32", binary)]


def refusal(call, *arguments, **options):
    """Return the status and the message of a call that fails."""
    with pytest.raises(InferenceServerException) as error:
        call(*arguments, **options)
    return error.value.status(), error.value.message()


def example(datatype):
    """Make a [2,2] array of a datatype."""
    values = [[1, 0], [0, 1]] if datatype == "BOOL" else [[1, 2], [3, 100]]
    return np.array(values, DATATYPES[datatype].dtype)


def inputs(binary):
    # The client has no JSON for the 16-bit floats.
    return [tensor(name, example(name), name, binary or name in ("FP16", "BF16")) for name in ELEMENT_TYPES]


def test_health_and_metadata_are_returned(client):
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
def test_every_datatype_is_sent_and_received_in_every_form(client, binary_inputs, listed):
    wanted = None if listed is None else [InferRequestedOutput(name, binary_data=listed) for name in ELEMENT_TYPES]
    result = client.infer("types", inputs(binary_inputs), outputs=wanted, request_id="42")
    assert result.get_response()["id"] == "42"
    for name in ELEMENT_TYPES:
        assert result.as_numpy(name).tolist() == example(name).tolist(), name


def test_only_listed_outputs_are_returned(client):
    array = np.array([[1, 2, 3]], np.float32)
    pair = [tensor("left", array, "FP32"), tensor("right", array, "FP32", binary=False)]
    result = client.infer("add", pair, outputs=[InferRequestedOutput("sum")])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["sum"]
    assert result.as_numpy("sum").tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("binary", [True, False])
def test_strings_are_returned_unchanged(client, binary):
    array = np.array(["zebra", "", "größe"], dtype=object)
    result = client.infer("strings", [tensor("text", array, "BYTES", binary)])
    assert [item.decode() for item in result.as_numpy("text")] == ["zebra", "", "größe"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_may_ask_for_compressed_responses(client, algorithm):
    array = np.ones((10, 4), np.float32)
    compression = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    assert client.infer(*relu(array), **compression).as_numpy("y").tolist() == array.tolist()


def test_tensor_may_have_no_elements(client):
    assert client.infer(*relu(np.zeros((0, 4), np.float32))).as_numpy("y").shape == (0, 4)


def test_parameters_are_accepted(client):
    parameters = {"anything": "goes", "number": 1.5}
    options = {"sequence_id": 7, "sequence_start": True, "priority": 1, "timeout": 5_000_000_000}
    assert client.infer(*relu(), **options, parameters=parameters).as_numpy("y").shape == (1, 4)


WRONG_SHAPE = "input 'x': shape is [1,5], the model takes [-1,4]"


def test_errors_have_the_servers_message(client):
    assert refusal(client.infer, *relu(np.ones((1, 5), np.float32))) == ("400", WRONG_SHAPE)
    _, message = refusal(client.get_model_metadata, "no such model")
    assert message.startswith("unknown model 'no such model'; configured: 'relu'")


def test_asynchronous_calls_return_their_own_results(client):
    calls = [client.async_infer(*relu(RANGE * index)) for index in range(5)]
    for index, call in enumerate(calls):
        assert call.get_result().as_numpy("y").tolist() == (RANGE * index).tolist()


# --- Other calls


def test_model_has_a_configuration(client):
    config = client.get_model_config("add", "1")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("add", "openvino", 0)
    assert [tensor["name"] for tensor in config["output"]] == ["difference", "sum"]
    assert client.get_model_config("add")["input"] == config["input"]


def test_repository_index_lists_models(client):
    assert {"name": "relu", "version": "1", "state": "READY"} in client.get_model_repository_index()


def inferences(client, model, version=""):
    """Return how often a model was inferred, by its statistics."""
    (entry,) = client.get_inference_statistics(model, version)["model_stats"]
    assert (entry["name"], entry["version"]) == (model, "1")
    return entry["inference_stats"]["success"]["count"]


def test_statistics_count_an_inference(client, service):
    before = inferences(client, "scalar")
    client.infer("scalar", [tensor("x", np.array(1, np.float32), "FP32")])
    service.wait_for(lambda: inferences(client, "scalar") == inferences(client, "scalar", "1") == before + 1)
    assert "scalar" in [entry["name"] for entry in client.get_inference_statistics()["model_stats"]]


def test_settings_of_the_log_are_changed(client):
    before = client.get_log_settings()
    assert client.update_log_settings({"log_verbose_level": 1}) == {**before, "log_verbose_level": 1}
    assert client.update_log_settings({"log_verbose_level": 0}) == client.get_log_settings() == before
    _, message = refusal(client.update_log_settings, {"log_info": None})
    assert message == "log_info is null, expected true or false"


@pytest.mark.parametrize(
    ("path", "name", "arguments"),
    [
        ("trace/setting", "get_trace_settings", ()),
        ("models/relu/trace/setting", "get_trace_settings", ("relu",)),
        ("trace/setting", "update_trace_settings", (None, {"trace_level": ["OFF"]})),
        ("systemsharedmemory/status", "get_system_shared_memory_status", ()),
        ("systemsharedmemory/region/r/status", "get_system_shared_memory_status", ("r",)),
        ("systemsharedmemory/region/r/register", "register_system_shared_memory", ("r", "/key", 64)),
        ("systemsharedmemory/unregister", "unregister_system_shared_memory", ()),
        ("cudasharedmemory/status", "get_cuda_shared_memory_status", ()),
        ("cudasharedmemory/region/r/register", "register_cuda_shared_memory", ("r", b"handle", 0, 64)),
        ("cudasharedmemory/unregister", "unregister_cuda_shared_memory", ()),
    ],
)
def test_unsupported_route_is_refused_with_its_path(client, path, name, arguments):
    assert refusal(getattr(client, name), *arguments) == ("404", f"path '/v2/{path}' is unknown")


# --- Other ways to infer


def test_requested_version_responds(client):
    assert client.infer(*relu(), "1").get_response()["model_version"] == "1"
    _, message = refusal(client.infer, *relu(), "2")
    assert message == "version '2' of model 'relu' is not served; served: 1"


def test_response_to_a_request_without_id_has_none(client):
    assert "id" not in client.infer(*relu()).get_response()


@pytest.mark.parametrize("sequence", [7, "a name"])
def test_sequence_is_accepted(client, sequence):
    for start, end in ((True, False), (False, False), (False, True)):
        result = client.infer(*relu(), sequence_id=sequence, sequence_start=start, sequence_end=end)
        assert result.as_numpy("y").tolist() == [[1, 1, 1, 1]]


def test_binary_strings_may_have_any_bytes(client):
    array = np.array([b"\xff\0", b"", b"\0"], dtype=object)
    result = client.infer("strings", [tensor("text", array, "BYTES")])
    assert result.as_numpy("text").tolist() == array.tolist()


def test_strings_that_are_not_utf_8_are_refused_as_json_with_advice(client):
    wanted = [InferRequestedOutput("text", binary_data=False)]
    text = tensor("text", np.array([b"\xff"], dtype=object), "BYTES")
    status, message = refusal(client.infer, "strings", [text], outputs=wanted)
    assert (status, "binary" in message) == ("400", True)


MIXED = np.array([[1, -1, 2, -2]], np.float32)


def test_client_writes_and_reads_bodies_for_another_transport(service):
    _, inputs = relu(MIXED)
    body, length = InferenceServerClient.generate_request_body(inputs)
    answer = service.infer("relu", body, Inference_Header_Content_Length=str(length))
    length = int(answer.headers["inference-header-content-length"])
    result = InferenceServerClient.parse_response_body(answer.body, header_length=length)
    assert result.as_numpy("y").tolist() == [[1, 0, 2, 0]]


def test_simultaneous_calls_return_their_own_results(service):
    with InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=4) as client:
        calls = [client.async_infer(*relu(RANGE * index)) for index in range(20)]
        for index, call in enumerate(calls):
            assert call.get_result().as_numpy("y").tolist() == (RANGE * index).tolist()


def test_failed_asynchronous_call_raises_when_its_result_is_read(client):
    call = client.async_infer(*relu(np.ones((1, 5), np.float32)))
    assert refusal(call.get_result)[1] == WRONG_SHAPE


# --- A service of its own, which compresses


@pytest.fixture(scope="module")
def compressing(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compressing")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    config = write_config(directory, {"name": "relu", "base_path": "relu"})
    with serve(directory, "-w", "1", config=config, OVMS_REST_RESPONSE_COMPRESSION="true") as running:
        yield running


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_responses_are_compressed_as_requested(compressing, capsys, algorithm, binary):
    array = np.ones((10, 4), np.float32)
    compression = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    wanted = [InferRequestedOutput("y", binary_data=binary)]
    with InferenceServerClient(f"127.0.0.1:{compressing.port}", verbose=True) as client:
        result = client.infer(*relu(array, binary), outputs=wanted, **compression)
    assert f"'content-encoding': '{algorithm}'" in capsys.readouterr().out  # the client's own line about the response
    assert result.as_numpy("y").tolist() == array.tolist()


# --- The client for asyncio, which always accepts compressed responses and decompresses those of inferences only


@pytest.mark.parametrize("service_name", ["service", "compressing"])
def test_client_for_asyncio_makes_every_call(request, service_name):
    port = request.getfixturevalue(service_name).port

    async def call():
        async with aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("relu", "1")
            assert not await client.is_model_ready("none")
            assert (await client.get_server_metadata())["name"] == "ovms_rest"
            assert (await client.get_model_metadata("relu"))["inputs"][0]["name"] == "x"
            assert (await client.get_model_config("relu"))["input"][0]["data_type"] == "TYPE_FP32"
            assert (await client.get_inference_statistics("relu"))["model_stats"][0]["name"] == "relu"
            assert "relu" in [model["name"] for model in await client.get_model_repository_index()]
            assert (await client.get_log_settings())["log_info"]
            for binary in (True, False):
                wanted = [aio.InferRequestedOutput("y", binary_data=binary)]
                result = await client.infer(*relu(MIXED, binary), outputs=wanted)
                assert result.as_numpy("y").tolist() == [[1, 0, 2, 0]]
            with pytest.raises(InferenceServerException) as error:
                await client.infer("none", relu()[1])
            assert error.value.message().startswith("unknown model 'none'")

    asyncio.run(call())


def test_simultaneous_requests_of_asyncio_return_their_own_results(service):
    async def call():
        async with aio.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
            return await asyncio.gather(*(client.infer(*relu(RANGE * index)) for index in range(20)))

    results = [result.as_numpy("y").tolist() for result in asyncio.run(call())]
    assert results == [(RANGE * index).tolist() for index in range(20)]


# --- Models loaded and unloaded by call, in a service of its own


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    directory = tmp_path_factory.mktemp("control")
    for version in (1, 2):
        model_zoo.save(model_zoo.relu(), directory / "relu", version)
    config = write_config(directory, *({"name": name, "base_path": "relu"} for name in ("relu", "other")))
    with (
        serve(directory, "-w", "2", config=config, OVMS_REST_MODEL_CONTROL="local") as running,
        InferenceServerClient(f"127.0.0.1:{running.port}") as client,
    ):
        yield client


def index(client, name):
    """Return the entries of a model in the repository index."""
    return [entry for entry in client.get_model_repository_index() if entry["name"] == name]


def test_model_is_unloaded_and_loaded_again(control):
    control.unload_model("relu")
    assert not control.is_model_ready("relu")
    assert control.is_model_ready("other")
    assert control.is_server_ready()
    unloaded = {"name": "relu", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index(control, "relu") == [unloaded]
    control.load_model("relu")
    assert index(control, "relu") == [{"name": "relu", "version": "2", "state": "READY"}]
    assert control.infer(*relu()).get_response()["model_version"] == "2"


def test_served_model_is_loaded_with_another_configuration(control):
    control.load_model("other", config=json.dumps({"model_version_policy": {"specific": {"versions": [1]}}}))
    assert control.get_model_config("other")["version_policy"] == {"specific": {"versions": [1]}}
    assert control.get_model_metadata("other")["versions"] == ["1"]


def test_unknown_model_is_neither_loaded_nor_unloaded(control):
    status, message = refusal(control.load_model, "none")
    assert (status, message[:23]) == ("404", "model 'none' is not in ")
    assert refusal(control.unload_model, "none") == ("404", "unknown model 'none'")


def test_files_are_not_accepted(control):
    status, message = refusal(control.load_model, "relu", config="{}", files={"file:1/model.xml": b"<net/>"})
    assert status == "400"
    assert message.startswith("parameters.file:1/model.xml: files are not accepted over HTTP")


def test_failed_load_leaves_the_model_as_it_was(control):
    status, message = refusal(control.load_model, "relu", config=json.dumps({"shape": {"none": "(1,4)"}}))
    assert status == "412"
    assert "shape: the model has no input 'none'; it has 'x'" in message
    assert control.infer(*relu()).as_numpy("y").tolist() == [[1, 1, 1, 1]]
