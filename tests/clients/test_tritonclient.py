"""NVIDIA's client against the service, as its users call it."""

import asyncio
import json

import model_zoo
import numpy as np
import pytest
from conftest import ELEMENT_TYPES
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
    assert error.value.message().startswith("unknown model 'no such model'; configured: 'relu'")


def test_asynchronous_calls(client):
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    calls = [client.async_infer("relu", [tensor("x", array * index, "FP32")]) for index in range(5)]
    for index, call in enumerate(calls):
        assert call.get_result().as_numpy("y").tolist() == (array * index).tolist()


# --- What else is asked of a server


def test_the_configuration_of_a_model(client):
    config = client.get_model_config("add", "1")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("add", "openvino", 0)
    assert [tensor["name"] for tensor in config["output"]] == ["difference", "sum"]
    assert client.get_model_config("add")["input"] == config["input"]


def test_the_repository_index(client):
    assert {"name": "relu", "version": "1", "state": "READY"} in client.get_model_repository_index()


def inferences(client, model, version=""):
    """Return how often a model was inferred, by its statistics."""
    (entry,) = client.get_inference_statistics(model, version)["model_stats"]
    assert (entry["name"], entry["version"]) == (model, "1")
    return entry["inference_stats"]["success"]["count"]


def test_statistics_of_a_model_and_of_all(client, service):
    before = inferences(client, "scalar")
    client.infer("scalar", [tensor("x", np.array(1, np.float32), "FP32")])
    service.wait_for(lambda: inferences(client, "scalar") == inferences(client, "scalar", "1") == before + 1)
    assert "scalar" in [entry["name"] for entry in client.get_inference_statistics()["model_stats"]]


def test_the_settings_of_the_log(client):
    before = client.get_log_settings()
    assert client.update_log_settings({"log_verbose_level": 1}) == {**before, "log_verbose_level": 1}
    assert client.update_log_settings({"log_verbose_level": 0}) == client.get_log_settings() == before
    with pytest.raises(InferenceServerException) as error:
        client.update_log_settings({"log_info": None})
    assert error.value.message() == "log_info is null, expected true or false"


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/v2/trace/setting", lambda client: client.get_trace_settings()),
        ("/v2/models/relu/trace/setting", lambda client: client.get_trace_settings("relu")),
        ("/v2/trace/setting", lambda client: client.update_trace_settings(settings={"trace_level": ["OFF"]})),
        ("/v2/systemsharedmemory/status", lambda client: client.get_system_shared_memory_status()),
        ("/v2/systemsharedmemory/region/r/status", lambda client: client.get_system_shared_memory_status("r")),
        (
            "/v2/systemsharedmemory/region/r/register",
            lambda client: client.register_system_shared_memory("r", "/key", 64),
        ),
        ("/v2/systemsharedmemory/unregister", lambda client: client.unregister_system_shared_memory()),
        ("/v2/cudasharedmemory/status", lambda client: client.get_cuda_shared_memory_status()),
        (
            "/v2/cudasharedmemory/region/r/register",
            lambda client: client.register_cuda_shared_memory("r", b"handle", 0, 64),
        ),
        ("/v2/cudasharedmemory/unregister", lambda client: client.unregister_cuda_shared_memory()),
    ],
)
def test_unsupported_route_is_refused_with_its_path(client, path, call):
    with pytest.raises(InferenceServerException) as error:
        call(client)
    assert (error.value.status(), error.value.message()) == ("404", f"path {path!r} is unknown")


# --- Other ways to infer


def test_a_version_that_is_asked_for_answers(client):
    inputs = [tensor("x", np.ones((1, 4), np.float32), "FP32")]
    assert client.infer("relu", inputs, "1").get_response()["model_version"] == "1"
    with pytest.raises(InferenceServerException) as error:
        client.infer("relu", inputs, "2")
    assert error.value.message() == "version '2' of model 'relu' is not served; served: 1"


def test_without_an_id_there_is_none_in_the_answer(client):
    result = client.infer("relu", [tensor("x", np.ones((1, 4), np.float32), "FP32")])
    assert "id" not in result.get_response()


@pytest.mark.parametrize("sequence", [7, "a name"])
def test_a_sequence_is_accepted(client, sequence):
    inputs = [tensor("x", np.ones((1, 4), np.float32), "FP32")]
    for start, end in ((True, False), (False, False), (False, True)):
        result = client.infer("relu", inputs, sequence_id=sequence, sequence_start=start, sequence_end=end)
        assert result.as_numpy("y").tolist() == [[1, 1, 1, 1]]


def test_strings_of_any_bytes_in_binary(client):
    array = np.array([b"\xff\0", b"", b"\0"], dtype=object)
    result = client.infer("strings", [tensor("text", array, "BYTES")])
    assert result.as_numpy("text").tolist() == array.tolist()


def test_strings_that_are_no_text_are_refused_as_json_with_advice(client):
    wanted = [InferRequestedOutput("text", binary_data=False)]
    with pytest.raises(InferenceServerException) as error:
        client.infer("strings", [tensor("text", np.array([b"\xff"], dtype=object), "BYTES")], outputs=wanted)
    assert error.value.status() == "400"
    assert "binary" in error.value.message()


def test_a_request_sent_by_a_transport_of_the_users_own(client, service):
    array = np.array([[1, -1, 2, -2]], np.float32)
    body, header_length = InferenceServerClient.generate_request_body([tensor("x", array, "FP32")])
    answer = service.infer("relu", body, Inference_Header_Content_Length=str(header_length))
    result = InferenceServerClient.parse_response_body(
        answer.body, header_length=int(answer.headers["inference-header-content-length"])
    )
    assert result.as_numpy("y").tolist() == [[1, 0, 2, 0]]


def test_asynchronous_calls_at_the_same_time(service):
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    with InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=4) as client:
        calls = [client.async_infer("relu", [tensor("x", array * index, "FP32")]) for index in range(20)]
        for index, call in enumerate(calls):
            assert call.get_result().as_numpy("y").tolist() == (array * index).tolist()


def test_failed_asynchronous_call_raises_when_its_result_is_read(client):
    call = client.async_infer("relu", [tensor("x", np.ones((1, 5), np.float32), "FP32")])
    with pytest.raises(InferenceServerException) as error:
        call.get_result()
    assert error.value.message() == "input 'x': shape is [1,5], the model takes [-1,4]"


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
def test_compressed_answers(compressing, capsys, algorithm, binary):
    array = np.ones((10, 4), np.float32)
    with InferenceServerClient(f"127.0.0.1:{compressing.port}", verbose=True) as client:
        result = client.infer(
            "relu",
            [tensor("x", array, "FP32", binary)],
            outputs=[InferRequestedOutput("y", binary_data=binary)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
    assert f"'content-encoding': '{algorithm}'" in capsys.readouterr().out  # the client's own line about the response
    assert result.as_numpy("y").tolist() == array.tolist()


# --- The client for asyncio, which accepts compressed answers always and undoes them for inferences only


@pytest.mark.parametrize("service_name", ["service", "compressing"])
def test_the_asynchronous_client(request, service_name):
    port = request.getfixturevalue(service_name).port

    async def call():
        array = np.array([[1, -1, 2, -2]], np.float32)
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
                result = await client.infer("relu", [tensor("x", array, "FP32", binary)], outputs=wanted)
                assert result.as_numpy("y").tolist() == [[1, 0, 2, 0]]
            with pytest.raises(InferenceServerException) as error:
                await client.infer("none", [tensor("x", array, "FP32")])
            assert error.value.message().startswith("unknown model 'none'")

    asyncio.run(call())


def test_many_asynchronous_requests_at_the_same_time(service):
    async def call():
        array = np.arange(8, dtype=np.float32).reshape(2, 4)
        async with aio.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
            results = await asyncio.gather(
                *(client.infer("relu", [tensor("x", array * index, "FP32")]) for index in range(20))
            )
        return [result.as_numpy("y").tolist() for result in results] == [(array * i).tolist() for i in range(20)]

    assert asyncio.run(call())


# --- Models loaded and unloaded by call, in a service of its own


@pytest.fixture
def control(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu", 1)
    model_zoo.save(model_zoo.relu(), tmp_path / "relu", 2)
    model_zoo.save(model_zoo.add(), tmp_path / "add")
    config = write_config(tmp_path, {"name": "relu", "base_path": "relu"}, {"name": "add", "base_path": "add"})
    with (
        serve(tmp_path, "-w", "2", config=config, OVMS_REST_MODEL_CONTROL="local") as running,
        InferenceServerClient(f"127.0.0.1:{running.port}") as client,
    ):
        yield client


def index(client, name):
    """Return the entries of a model in the repository index."""
    return [entry for entry in client.get_model_repository_index() if entry["name"] == name]


def test_a_model_is_unloaded_and_loaded_again(control):
    control.unload_model("relu")
    assert not control.is_model_ready("relu")
    assert control.is_model_ready("add")
    assert control.is_server_ready()
    unloaded = {"name": "relu", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index(control, "relu") == [unloaded]
    control.load_model("relu")
    assert index(control, "relu") == [{"name": "relu", "version": "2", "state": "READY"}]
    result = control.infer("relu", [tensor("x", np.ones((1, 4), np.float32), "FP32")])
    assert result.get_response()["model_version"] == "2"


def test_a_model_that_serves_is_loaded_with_another_configuration(control):
    control.load_model("relu", config=json.dumps({"model_version_policy": {"specific": {"versions": [1]}}}))
    assert control.get_model_config("relu")["version_policy"] == {"specific": {"versions": [1]}}
    assert control.get_model_metadata("relu")["versions"] == ["1"]


def test_a_model_of_no_name_is_neither_loaded_nor_unloaded(control):
    for call in (control.load_model, control.unload_model):
        with pytest.raises(InferenceServerException) as error:
            call("none")
        assert error.value.status() == "404"
        assert error.value.message().startswith("model 'none' is ")


def test_files_are_not_accepted(control):
    with pytest.raises(InferenceServerException) as error:
        control.load_model("relu", config="{}", files={"file:1/model.xml": b"<net/>"})
    assert error.value.status() == "400"
    assert error.value.message().startswith("parameters.file:1/model.xml: files are not accepted over HTTP")


def test_a_load_that_fails_leaves_the_model_as_it_was(control):
    with pytest.raises(InferenceServerException) as error:
        control.load_model("relu", config=json.dumps({"shape": {"none": "(1,4)"}}))
    assert error.value.status() == "412"
    assert "shape: the model has no input 'none'; it has 'x'" in error.value.message()
    result = control.infer("relu", [tensor("x", np.ones((1, 4), np.float32), "FP32")])
    assert result.as_numpy("y").tolist() == [[1, 1, 1, 1]]
