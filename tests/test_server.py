"""The service end to end: gunicorn with two workers, OpenVINO, requests over sockets."""

import gzip
import json
import zlib

import numpy as np
import pytest
from model_zoo import ELEMENT_TYPES
from raw_http import chunk, head, post

from ovms_rest import __version__
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.resources.metadata import EXTENSIONS

RELU = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, -2, 3, -4]}]}


def tensor(name, datatype, shape, **rest):
    return {"name": name, "datatype": datatype, "shape": shape, **rest}


def binary(request, *sections):
    """Return the body of a request with binary tensors, and its header."""
    head = json.dumps(request).encode()
    return b"".join([head, *sections]), {"Inference_Header_Content_Length": str(len(head))}


def split(answer):
    """Return the JSON of a response and the binary data after it."""
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


def ask_binary(service, model, request, *sections):
    """Infer with binary tensors; return the JSON of the response and the binary data after it."""
    body, header = binary(request, *sections)
    return split(service.infer(model, body, **header))


# --- Routes


def test_server_metadata_name_version_and_extensions(service):
    assert service.get("/v2").json() == {"name": "ovms_rest", "version": __version__, "extensions": list(EXTENSIONS)}


def test_healthy_server_and_model_respond_200_without_body(service):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/relu/ready", "/v2/models/relu/versions/1/ready"):
        answer = service.get(path)
        assert (answer.status, answer.body) == (200, b"")


def test_model_metadata_name_all_tensors(service):
    for path in ("/v2/models/add", "/v2/models/add/versions/1", "/v2/models/add/"):
        assert service.get(path).json() == {
            "name": "add",
            "versions": ["1"],
            "platform": "OpenVINO",
            "inputs": [tensor("left", "FP32", [1, 3]), tensor("right", "FP32", [1, 3])],
            "outputs": [tensor("difference", "FP32", [1, 3]), tensor("sum", "FP32", [1, 3])],
        }


def test_model_metadata_name_every_datatype(service):
    inputs = service.get("/v2/models/types").json()["inputs"]
    assert [item["datatype"] for item in inputs] == sorted(ELEMENT_TYPES)
    assert service.get("/v2/models/strings").json()["inputs"] == [tensor("text", "BYTES", [-1])]
    assert service.get("/v2/models/scalar").json()["inputs"] == [tensor("x", "FP32", [])]


def test_head_is_get_without_body(service):
    for path in ("/v2", "/v2/models/add", "/v2/health/ready"):
        head, get = service.request("HEAD", path), service.get(path)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/relu/foo", 404, "path '/v2/models/relu/foo' is unknown"),
        ("GET", "/v2/models/x", 404, "unknown model 'x'; configured: 'relu', 'add', 'types', "),
        ("GET", "/v2/models/x%20%C3%A9.y/ready", 404, "unknown model 'x é.y'; "),
        ("GET", "/v2/models/relu%2Fready", 404, "unknown model 'relu%2Fready'; "),
        ("GET", "/v2/models/relu/versions/2", 404, "version '2' of model 'relu' is not served; served: 1"),
        ("GET", "/v2/models/relu/versions/01/ready", 404, "version '01' of model 'relu' is not served; served: 1"),
        ("POST", "/v2/models/x/infer", 404, "unknown model 'x'; "),
        ("POST", "/v2/models/relu/versions/0/infer", 404, "version '0' of model 'relu' is not served; served: 1"),
        ("POST", "/v2", 405, "method POST is not allowed for '/v2', allowed: GET, HEAD, OPTIONS"),
        ("GET", "/v2/models/relu/infer", 405, "method GET is not allowed for '/v2/models/relu/infer', allowed: "),
        ("FOO", "/v2/health/live", 405, "method FOO is not allowed for '/v2/health/live', allowed: GET, HEAD"),
    ],
)
def test_unknown_paths_are_404_and_wrong_methods_405(service, method, path, status, message):
    answer = service.request(method, path)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"].startswith(message)
    assert ("allow" in answer.headers) == (status == 405)


def test_options_names_the_allowed_methods(service):
    answer = service.request("OPTIONS", "/v2/models/relu/infer")
    assert (answer.status, answer.headers["allow"], answer.body) == (200, "OPTIONS, POST", b"")
    answer = service.raw(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (answer.status, answer.headers["allow"]) == (200, "GET, HEAD, OPTIONS, POST")


# --- Inference


def test_json_request_has_a_json_response(service):
    answer = service.infer("relu", {**RELU, "id": "seven"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "model_name": "relu",
        "model_version": "1",
        "id": "seven",
        "outputs": [tensor("y", "FP32", [1, 4], data=[1, 0, 3, 0])],
    }


def test_binary_request_has_a_binary_response(service):
    array = np.array([[0.5, -1, 2, -3], [-4, 5, -6, 7]], np.float32)
    request = {"inputs": [tensor("x", "FP32", [2, 4])], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    body, header = binary(request, array.tobytes())
    answer = service.infer("relu", body, **header)
    assert answer.headers["content-type"] == "application/octet-stream"
    head, data = split(answer)
    assert head["outputs"] == [tensor("y", "FP32", [2, 4], parameters={"binary_data_size": 32})]
    assert data == np.maximum(array, 0).tobytes()


def test_json_and_binary_tensors_mix(service):
    request = {
        "inputs": [
            tensor("right", "FP32", [1, 3], parameters={"binary_data_size": 12}),
            tensor("left", "FP32", [1, 3], data=[[10, 20, 30]]),
        ],
        "outputs": [{"name": "sum"}, {"name": "difference", "parameters": {"binary_data": True}}],
    }
    head, data = ask_binary(service, "add", request, np.array([1, 2, 3], np.float32).tobytes())
    assert head["outputs"] == [
        tensor("sum", "FP32", [1, 3], data=[11, 22, 33]),
        tensor("difference", "FP32", [1, 3], parameters={"binary_data_size": 12}),
    ]
    assert np.frombuffer(data, np.float32).tolist() == [9, 18, 27]


def test_unlisted_outputs_are_in_alphabetical_order(service):
    request = {
        "inputs": [tensor(name, "FP32", [1, 3], data=[1, 2, 3]) for name in ("left", "right")],
        "parameters": {"binary_data_output": True},
    }
    head, data = split(service.infer("add", request))
    assert [output["name"] for output in head["outputs"]] == ["difference", "sum"]
    assert np.frombuffer(data, np.float32).tolist() == [0, 0, 0, 2, 4, 6]


def test_every_datatype_works_in_json_and_binary(service):
    values = {"BOOL": [True, False]} | {
        name: [1, 0] if name.startswith("U") else [-1, 1] for name in ELEMENT_TYPES if name != "BOOL"
    }
    values |= {"INT64": [-(2**63), 2**63 - 1], "UINT64": [2**64 - 1, 0], "FP64": [0.1, 1e300]}
    as_json = {"inputs": [tensor(name, name, [1, 2], data=data) for name, data in values.items()]}
    answer = service.infer("types", as_json).json()
    assert {output["name"]: output["data"] for output in answer["outputs"]} == values

    sections = [np.array(data, DATATYPES[name].dtype).tobytes() for name, data in values.items()]
    as_binary = {
        "inputs": [tensor(name, name, [1, 2]) for name in values],
        "outputs": [{"name": name} for name in values],
        "parameters": {"binary_data_output": True},
    }
    head, data = ask_binary(service, "types", as_binary, *sections)
    assert [output["name"] for output in head["outputs"]] == list(values)
    assert data == b"".join(sections)


def test_empty_tensor_is_plain_json(service):
    request = {
        "inputs": [tensor("x", "FP32", [0, 4], data=[])],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    answer = service.infer("relu", request)
    assert answer.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in answer.headers
    assert answer.json()["outputs"] == [tensor("y", "FP32", [0, 4], parameters={"binary_data_size": 0})]


def test_scalar_has_an_empty_shape(service):
    answer = service.infer("scalar", {"inputs": [tensor("x", "FP32", [], data=[0.1])]})
    assert answer.json()["outputs"] == [tensor("y", "FP32", [], data=[0.1])]
    assert b'"data":[0.1]' in answer.body


def test_nan_is_null_in_json_and_intact_in_binary(service):
    array = np.array([[1, np.inf, np.nan, 2]], np.float32)
    body, header = binary({"inputs": [tensor("x", "FP32", [1, 4])]}, array.tobytes())
    assert service.infer("relu", body, **header).json()["outputs"][0]["data"] in (
        [1, None, None, 2],
        [1, None, 0, 2],  # relu of NaN is NaN or 0
    )
    others = [tensor(name, name, [0, 2], data=[]) for name in ELEMENT_TYPES if name != "FP32"]
    request = {
        "inputs": [tensor("FP32", "FP32", [1, 2]), *others],
        "outputs": [{"name": "FP32", "parameters": {"binary_data": True}}],
    }
    assert ask_binary(service, "types", request, array[0, 1:3].tobytes())[1] == array[0, 1:3].tobytes()


def test_strings_keep_every_byte(service):
    request = {"inputs": [tensor("text", "BYTES", [3], data=["zebra", "", "größe\u0000"])]}
    assert service.infer("strings", request).json()["outputs"] == [
        tensor("text", "BYTES", [3], data=["zebra", "", "größe\u0000"])
    ]
    section = b"\x02\0\0\0\xff\0" + b"\0\0\0\0"
    request = {"inputs": [tensor("text", "BYTES", [1, 2])], "parameters": {"binary_data_output": True}}
    head, data = ask_binary(service, "text2d", request, section)
    assert head["outputs"] == [tensor("text", "BYTES", [1, 2], parameters={"binary_data_size": len(section)})]
    assert data == section


def test_string_that_is_not_utf_8_requires_binary(service):
    body, header = binary({"inputs": [tensor("text", "BYTES", [1])]}, b"\x01\0\0\0\xff")
    answer = service.infer("strings", body, **header)
    assert answer.status == 400
    assert answer.json()["error"].startswith("output 'text': string 0 is not valid UTF-8")


def test_strings_become_rows_of_a_matrix(service):
    request = {"inputs": [tensor("rows", "BYTES", [2], data=["String_123", ""])]}
    assert service.infer("matrix", request).json()["outputs"] == [
        tensor("rows_string", "BYTES", [2], data=["String_123", ""])
    ]


def test_raw_body_is_the_data_of_the_only_input(service):
    array = np.array([[1, -2, 3, -4], [5, -6, 7, -8]], np.float32)
    answer = service.infer("relu", array.tobytes(), Inference_Header_Content_Length="0")
    head, data = split(answer)
    assert head["outputs"] == [tensor("y", "FP32", [2, 4], parameters={"binary_data_size": 32})]
    assert data == np.maximum(array, 0).tobytes()
    empty = service.infer("relu", b"", Inference_Header_Content_Length="0")
    assert empty.json()["outputs"] == [tensor("y", "FP32", [0, 4], parameters={"binary_data_size": 0})]
    head, data = split(service.infer("strings", b"any \xff bytes", Inference_Header_Content_Length="0"))
    assert (head["outputs"][0]["shape"], data) == ([1], b"\x0b\0\0\0any \xff bytes")


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("Deflate", zlib.compress)])
def test_compressed_request_is_decoded(service, encoding, compress):
    answer = service.infer("relu", compress(json.dumps(RELU).encode()), Content_Encoding=encoding)
    assert answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]


def test_onnx_model_is_served(service):
    answer = service.infer("onnx", {"inputs": [tensor("x", "FP32", [1, 2], data=[1, 2])]})
    assert answer.json()["outputs"] == [tensor("y", "FP32", [1, 2], data=[2, 3])]


def test_large_tensor_is_returned_completely(service):
    array = np.random.default_rng(0).standard_normal((50_000, 4), np.float32)
    request = {"inputs": [tensor("x", "FP32", [50_000, 4])], "parameters": {"binary_data_output": True}}
    assert ask_binary(service, "relu", request, array.tobytes())[1] == np.maximum(array, 0).tobytes()


# --- Mistakes of clients

LEFT = {"inputs": [tensor("left", "FP32", [1, 3], data=[1, 2, 3])]}


@pytest.mark.parametrize(
    ("model", "request_", "message"),
    [
        ("relu", b"", "the request has no JSON, expected an object with the key 'inputs'"),
        ("relu", b"{", "the request is not valid JSON: "),
        ("relu", {}, "inputs is missing, expected an array of one or more objects"),
        ("relu", {"inputs": [tensor("y", "FP32", [1, 4], data=[1, 2, 3, 4])]}, "model 'relu' has no input 'y'"),
        ("relu", {"inputs": [tensor("x", "FP32", [4], data=[1, 2, 3, 4])]}, "input 'x': shape is [4], the model takes"),
        ("relu", {"inputs": [tensor("x", "INT8", [1, 4], data=[1, 2, 3, 4])]}, "input 'x': datatype is INT8, the mode"),
        ("relu", {"inputs": [tensor("x", "FP32", [1, 4], data=[1, 2, 3])]}, "inputs[0] 'x': data has 3 elements, but "),
        ("relu", {**RELU, "outputs": [{"name": "z"}]}, "model 'relu' has no output 'z'; it has 'y'"),
        ("add", LEFT, "input 'right' of model 'add' is missing from the request"),
    ],
)
def test_mistakes_are_400_and_name_their_place(service, model, request_, message):
    answer = service.infer(model, request_)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json()["error"].startswith(message)


def test_unsupported_encodings_are_415(service):
    answer = service.infer("relu", b"x", Content_Encoding="br")
    assert (answer.status, answer.headers["accept-encoding"]) == (415, "gzip, deflate, identity")
    assert answer.json()["error"] == "unsupported Content-Encoding 'br'; supported: gzip, deflate, identity"


def test_repeated_header_lengths_must_be_equal(service):
    body = json.dumps(RELU).encode()
    length = f"Inference-Header-Content-Length: {len(body)}"
    assert service.raw(post("/v2/models/relu/infer", body, length, length)).status == 200
    answer = service.raw(post("/v2/models/relu/infer", body, length, "Inference-Header-Content-Length: 1"))
    assert answer.status == 400


# --- HTTP


def test_chunked_body_is_decoded(service):
    body = json.dumps(RELU).encode()
    begin = head("POST", "/v2/models/relu/infer", "Transfer-Encoding: chunked")
    answer = service.raw(begin + chunk(body[:7]) + chunk(body[7:]) + chunk(b""))
    assert answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]
    answer = service.raw(begin + b"zz\r\n")
    assert (answer.status, list(answer.json())) == (400, ["error"])


def test_only_the_expectation_100_continue_is_accepted(service):
    body = json.dumps(RELU).encode()
    answer = service.raw(post("/v2/models/relu/infer", body, "Expect: 100-continue", "Connection: close"))
    assert answer.status == 200
    answer = service.raw(post("/v2/models/relu/infer", body, "Expect: something"))
    assert (answer.status, list(answer.json())) == (417, ["error"])


def test_http_1_0_is_served(service):
    assert service.raw(b"GET /v2/health/live HTTP/1.0\r\n\r\n").status == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nName : value\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /v2 HTTP/1.1\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: foo\r\n\r\n", 501),
        (b"GET /v2 HTTP/3.0\r\n\r\n", 505),
    ],
)
def test_malformed_requests_are_refused_in_json(service, data, status):
    answer = service.raw(data)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"]


def test_body_that_ends_early_is_not_logged_as_a_bug(service):
    before = service.log.count("Traceback")
    answer = service.raw(post("/v2/models/relu/infer", json.dumps(RELU).encode())[:-10], half=True)
    assert (answer.status, answer.json()["error"]) == (400, "the body ended after 78 of 88 bytes")
    assert service.log.count("Traceback") == before
