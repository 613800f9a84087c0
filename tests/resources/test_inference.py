"""Inference requests and their responses, how they are counted, and the forms in which a server gets a response."""

import gzip
import io
import json
import re
import time
import zlib

import falcon
import numpy as np
import pytest
from fake_app import (
    ANY,
    BINARY,
    INFER,
    ONE,
    FakeRegistry,
    FakeServable,
    by_name,
    doubler,
    failing,
    infer,
    make,
    received,
    request,
    servable,
    speaker,
)
from falcon.testing import create_environ

from ovms_rest.errors import BusyError, InferenceError, InvalidRequestError, NoContentError
from ovms_rest.protocol.tensors import Tensor
from ovms_rest.resources.crash_guard import CrashGuard
from ovms_rest.resources.inference import Infer
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.crash_table import CrashTable
from ovms_rest.shared_memory.inference_notes import InferenceNotes
from ovms_rest.shared_memory.statistics import InferenceRecord


def binary_request(count):
    """Return a request for x whose elements follow as binary."""
    return {"inputs": [{"name": "x", "shape": [count], "datatype": "FP32"}]}


def split(answer):
    """Split a binary response; return its JSON and the bytes after it."""
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


def adder():
    def infer(arrays):
        return by_name(Tensor("c", "FP32", arrays["a"] + arrays["b"]))

    return servable(infer, dict.fromkeys("ab", ("FP32", (ONE,))), {"c": ("FP32", (ONE,))}, "adder")


def spy(seen):
    """Return a model that keeps the arrays of its inferences."""
    model = doubler()

    def infer(arrays):
        seen.append(arrays)
        return model.infer(arrays)

    return FakeServable(model.metadata, infer)


# --- Requests in JSON


@pytest.mark.parametrize("headers", [{}, {"X-Tensor-Shape": "0,2097153"}], ids=["JSON", "octets"])
def test_limit_of_a_body_limits_the_dims_of_a_tensor_without_elements(headers):
    tensor = ("UINT8", (ANY, ANY))
    model = servable(lambda arrays: by_name(Tensor("y", "UINT8", arrays["x"])), {"x": tensor}, {"y": tensor})
    body = b"" if headers else {"inputs": [{"name": "x", "shape": [0, 2**21 + 1], "datatype": "UINT8", "data": []}]}
    statuses = [
        infer(make(model, max_body_bytes=limit), body, headers=headers, CONTENT_TYPE="application/octet-stream").status
        for limit in (2**21, 2**22)
    ]
    assert statuses == [400, 200]


def test_response_has_all_outputs_in_the_order_of_their_names():
    answer = infer(make(), request(1.5, -2))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "inference-header-content-length" not in answer.headers
    assert answer.json() == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "n", "datatype": "INT64", "shape": [1], "data": [2]},
            {"name": "y", "datatype": "FP32", "shape": [2], "data": [3.0, -4.0]},
        ],
    }


@pytest.mark.parametrize("names", [["y", "n"], ["y"]], ids=["in the requested order", "one left out"])
def test_response_has_the_requested_outputs(names):
    answer = infer(make(), request(1, outputs=[{"name": name} for name in names]))
    assert [output["name"] for output in answer.json()["outputs"]] == names


@pytest.mark.parametrize(("keys", "echoed"), [({"id": "42"}, "42"), ({"id": ""}, None), ({}, None)])
def test_id_is_echoed(keys, echoed):
    assert infer(make(), request(1, **keys)).json().get("id") == echoed


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml"),
        *("garbage;;=", "\xff"),
    ],
)
def test_content_type_of_a_request_does_not_matter(content_type):
    assert infer(make(), request(1), CONTENT_TYPE=content_type).status == 200


def test_chunked_request_is_answered():
    assert infer(make(), request(1), CONTENT_LENGTH="", HTTP_TRANSFER_ENCODING="chunked").status == 200


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_request_is_answered(encoding, compress):
    request_json = json.dumps(binary_request(2)).encode()
    body = compress(request_json + np.array([1, 2], np.float32).tobytes())
    headers = {"Content-Encoding": encoding, "Inference-Header-Content-Length": str(len(request_json))}
    assert infer(make(), body, headers=headers).json()["outputs"][1]["data"] == [2.0, 4.0]


# --- Requests that are refused


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "the request has no JSON, expected an object with the key 'inputs'"),
        (b"[]", "the request is an array, expected an object with the key 'inputs'"),
        (b"{}", "inputs is missing, expected an array of one or more objects"),
        (request(1, outputs=[{"name": "z"}]), "model 'm' has no output 'z'; it has 'n', 'y'"),
    ],
)
def test_invalid_request_is_a_400_with_the_reason(body, error):
    answer = infer(make(), body)
    assert (answer.status, answer.json()) == (400, {"error": error})


def test_unknown_model_is_reported_before_the_body_is_read():
    assert infer(make(), b"no JSON", target="/v2/models/x/infer").status == 404


@pytest.mark.parametrize(
    ("error", "status"), [(InferenceError("it failed"), 500), (InvalidRequestError("no image"), 400)]
)
def test_error_of_an_inference_is_the_response(error, status):
    answer = infer(make(failing(error)), request(1))
    assert (answer.status, answer.json()) == (status, {"error": str(error)})


def test_object_nested_in_data_is_a_400():
    """Orjson reads 1024 levels but writes only 254."""
    data = b'{"a":' * 300 + b"1" + b"}" * 300
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[' + data + b"]}]}"
    assert infer(make(), body).status == 400


def test_string_that_json_cannot_hold_is_a_400():
    answer = infer(make(speaker(b"\xff")), request(1), target="/v2/models/speaker/infer")
    assert answer.status == 400
    assert answer.json()["error"].startswith("output 'text': string 0 is not valid UTF-8")


# --- Binary data


def test_binary_input_is_read():
    answer = infer(make(), binary_request(2), np.array([1.5, -2], np.float32).tobytes())
    assert answer.json()["outputs"][1]["data"] == [3.0, -4.0]


@pytest.mark.parametrize("padding", range(4))
def test_binary_input_reaches_the_model_on_64_bytes_and_writable(padding):
    """OpenVINO can read it in place."""
    seen = []
    infer(make(spy(seen)), json.dumps(binary_request(100)).encode() + b" " * padding, bytes(400))
    x = seen[0]["x"]
    assert (x.__array_interface__["data"][0] % 64, x.flags.writeable) == (0, True)


@pytest.mark.parametrize("header", ["{0}, {0}", "0{0}", "{0},00{0}"])
def test_header_length_may_be_repeated(header):
    body = json.dumps(binary_request(1)).encode()
    headers = {"Inference-Header-Content-Length": header.format(len(body))}
    assert infer(make(), body, bytes(4), headers=headers).status == 200


@pytest.mark.parametrize("header", ["", "x", "-1", "1.0", "1,2", "100000", "9" * 5000])
def test_invalid_header_length_is_a_400(header):
    answer = infer(make(), request(1), headers={"Inference-Header-Content-Length": header})
    assert answer.status == 400
    assert answer.json()["error"].startswith("Inference-Header-Content-Length is ")


def test_binary_response_is_json_and_the_bytes_of_its_outputs():
    answer = infer(make(), request(1.5, -2, **BINARY))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    assert answer.headers["content-length"] == str(len(answer.body))
    head, data = split(answer)
    assert head == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "n", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
            {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
        ],
    }
    assert data == np.array([2], np.int64).tobytes() + np.array([3, -4], np.float32).tobytes()


def test_binary_and_json_outputs_mix():
    outputs = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "n"}]
    head, data = split(infer(make(), request(0.5, outputs=outputs)))
    assert head["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}},
        {"name": "n", "datatype": "INT64", "shape": [1], "data": [1]},
    ]
    assert data == np.array([1], np.float32).tobytes()


def test_response_whose_binary_outputs_are_all_empty_is_plain_json():
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    answer = infer(make(), request(outputs=outputs))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert "inference-header-content-length" not in answer.headers
    assert answer.json()["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [0], "parameters": {"binary_data_size": 0}}
    ]


def test_strings_of_any_bytes_are_returned_in_binary():
    answer = infer(make(speaker(b"\xff\0")), request(1, **BINARY), target="/v2/models/speaker/infer")
    assert split(answer)[1] == b"\x02\0\0\0\xff\0"


RAW = {"Inference-Header-Content-Length": "0"}


def test_raw_body_is_the_data_of_the_only_input_and_is_answered_in_binary():
    answer = infer(make(), np.array([1.5, -2], np.float32).tobytes(), headers=RAW)
    head, data = split(answer)
    assert [output["name"] for output in head["outputs"]] == ["n", "y"]
    assert data == np.array([2], np.int64).tobytes() + np.array([3, -4], np.float32).tobytes()


@pytest.mark.parametrize("header", ["0", "00", "0,0"])
def test_raw_body_may_be_empty(header):
    answer = infer(make(), b"", headers={"Inference-Header-Content-Length": header})
    assert split(answer)[0]["outputs"][1]["parameters"] == {"binary_data_size": 0}


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/v2/models/m/infer", "input 'x': shape [-1] takes a multiple of 4 bytes of FP32, the body has 3"),
        (
            "/v2/models/adder/infer",
            "Inference-Header-Content-Length is 0, which makes the body the data of a model's only input, "
            "but this model has 2 inputs: [a,b]",
        ),
    ],
)
def test_raw_body_that_does_not_fit_the_model_is_a_400(target, error):
    answer = infer(make(doubler(), adder()), b"abc", target=target, headers=RAW)
    assert (answer.status, answer.json()) == (400, {"error": error})


# --- Classes


def classifier(labels=()):
    """Return a model of two outputs of numbers that are the same as its input, with these labels."""

    def infer(arrays):
        return by_name(*(Tensor(name, "FP32", arrays["x"]) for name in "ab"))

    return servable(infer, {"x": ("FP32", (ANY,))}, dict.fromkeys("ab", ("FP32", (ANY,))), labels=labels)


def classes(name, count=1, **parameters):
    """Return a requested output as its highest values."""
    return {"name": name, "parameters": {"classification": count, **parameters}}


def test_classes_are_strings_with_labels():
    answer = infer(make(classifier(("cat", "dog"))), request(1, 3, 2, outputs=[classes("a", 2)]))
    assert answer.json()["outputs"] == [
        {"name": "a", "datatype": "BYTES", "shape": [2], "data": ["3.000000:1:dog", "2.000000:2"]}
    ]


@pytest.mark.parametrize(
    "keys",
    [{"outputs": [classes("a", binary_data=True)]}, {"outputs": [classes("a")], **BINARY}],
    ids=["for the output", "for the request"],
)
def test_classes_are_returned_in_binary_as_other_strings(keys):
    head, data = split(infer(make(classifier()), request(1, 3, **keys)))
    assert head["outputs"] == [{"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 14}}]
    assert data == b"\x0a\0\0\x003.000000:1"


def test_outputs_and_their_classes_mix():
    answer = infer(make(classifier()), request(1, 3, outputs=[{"name": "b"}, classes("a")]))
    assert [output["data"] for output in answer.json()["outputs"]] == [[1.0, 3.0], ["3.000000:1"]]


def test_classification_of_strings_is_a_400():
    body = request(1, outputs=[classes("text")])
    answer = infer(make(speaker(b"a")), body, target="/v2/models/speaker/infer")
    assert (answer.status, answer.json()) == (
        400,
        {"error": "output 'text': parameters.classification needs an output of numbers, but its datatype is BYTES"},
    )


# --- How long a request may wait


def waited(ns, timeout_us, model=None, **environ):
    """Request an inference that arrived this long ago, with a timeout; return the response."""
    body = request(1, parameters={"timeout": timeout_us})
    return infer(make(model or doubler()), body, **received(ns), **environ)


def test_late_request_is_a_503_with_the_time_it_was_queued():
    answer = waited(5_321_000, 1000)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    message = re.fullmatch(
        r"the request could not start within its timeout of 1000 us; it waited (\d+) us", answer.json()["error"]
    )
    assert int(message[1]) >= 5321


def test_late_request_is_not_inferred():
    seen = []
    assert waited(10**9, 1000, spy(seen)).status == 503
    assert seen == []


@pytest.mark.parametrize("timeout_us", [0, 3_600_000_000])
def test_request_within_its_timeout_is_inferred(timeout_us):
    assert waited(10**9, timeout_us).status == 200


def test_request_without_a_start_time_was_not_queued():
    assert infer(make(), request(1, parameters={"timeout": 60_000_000})).status == 200


def test_invalid_request_is_reported_before_a_late_one():
    body = request(1, parameters={"timeout": 1}, outputs=[{"name": "z"}])
    assert infer(make(), body, **{"ovms_rest.inference": InferenceRecord(0)}).status == 400


HOUR = 3600


@pytest.mark.usefixtures("new_clock")
@pytest.mark.parametrize("form", ["t={:.3f}", "{:.3f}"])
@pytest.mark.parametrize("ago", [2, HOUR - 10])
def test_time_since_the_proxy_received_the_request_counts(form, ago):
    answer = waited(0, 1_000_000, HTTP_X_REQUEST_START=form.format(time.time() - ago))
    assert answer.status == 503
    assert int(answer.json()["error"].split()[-2]) >= ago * 1_000_000 - 1000


@pytest.mark.parametrize("seconds", [-HOUR - 10, -1_000_000_000, 10, HOUR, 1_000_000_000])
def test_proxy_time_in_the_future_or_more_than_an_hour_ago_is_ignored(seconds):
    assert waited(0, 60_000_000, HTTP_X_REQUEST_START=f"t={time.time() + seconds:.3f}").status == 200


@pytest.mark.parametrize("value", ["", "nan", "t=", "yesterday", "-1", "9" * 100])
def test_invalid_proxy_time_is_ignored(value):
    assert waited(0, 60_000_000, HTTP_X_REQUEST_START=value).status == 200


def test_queue_time_of_the_worker_takes_precedence_over_that_of_a_proxy():
    assert waited(10**9, 500_000, HTTP_X_REQUEST_START=f"t={time.time():.3f}").status == 503


def test_proxy_time_does_not_make_a_request_without_timeout_late():
    assert waited(0, 0, HTTP_X_REQUEST_START=f"t={time.time() - 100:.3f}").status == 200


# --- The record of an inference


def observe(model, body):
    """Request an inference; return its record."""
    record = InferenceRecord(time.monotonic_ns() - 10**6)
    infer(make(model), body, **{"ovms_rest.inference": record})
    return record


def times_of(record):
    return record.input_ns, record.infer_ns, record.output_ns


def test_record_of_an_inference_has_model_times_and_id():
    served = observe(doubler(version="7"), request(1, id="42"))
    assert (served.model_name, served.model_version, served.id) == ("m", "7", "42")
    assert served.queue_ns >= 10**6
    assert min(times_of(served)) > 0


def test_recorded_times_and_sizes_equal_the_counted_ones():
    model = doubler()
    served, seen = observe(model, request(1, 2)), model.counters.read()
    counted = (seen.queue, seen.compute_input, seen.compute_infer, seen.compute_output)
    assert (served.queue_ns, *times_of(served)) == tuple(times.ns for times in counted)
    sizes = (seen.inference_count, seen.request_bytes, seen.response_bytes)
    assert (served.batch, served.request_bytes, served.response_bytes) == sizes


def test_request_that_cannot_be_decoded_is_recorded_without_an_id():
    served = observe(doubler(), b"{")
    assert (served.model_name, served.model_version, served.id) == ("m", "1", "")
    assert served.queue_ns >= 10**6
    assert times_of(served) == (0, 0, 0)


@pytest.mark.parametrize(
    "keys", [{"outputs": [{"name": "z"}]}, {"parameters": {"timeout": 1}}], ids=["does not fit the model", "is late"]
)
def test_request_that_is_not_inferred_is_recorded_with_its_id(keys):
    served = observe(doubler(), request(1, id="42", **keys))
    assert (served.id, times_of(served)) == ("42", (0, 0, 0))


def test_failed_inference_is_recorded_with_the_time_until_the_failure():
    served = observe(failing(InferenceError("failed")), request(1, id="42"))
    assert served.id == "42"
    assert served.input_ns > 0
    assert (served.infer_ns, served.output_ns) == (0, 0)


# --- How it is counted


def failures_of(model):
    return {kind: failure.count for kind, failure in model.counters.read().failures.items() if failure.count}


def test_an_inference_is_counted_with_its_times_batch_and_sizes():
    model, body = doubler(), json.dumps(request(1, 2, 3)).encode()
    answer = infer(make(model), body, **received(10**9))
    counted = model.counters.read()
    assert (counted.success.count, failures_of(model)) == (1, {})
    assert counted.queue.ns >= 10**9
    assert (counted.inference_count, counted.request_bytes, counted.response_bytes) == (3, len(body), len(answer.body))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((InvalidRequestError(""), "invalid"), (BusyError(""), "overload")),
        *((error(""), "failed") for error in (InferenceError, RuntimeError, MemoryError)),
    ],
)
def test_a_failed_inference_is_counted_by_the_kind_of_its_error(error, kind):
    model = failing(error)
    infer(make(model), request(1))
    assert failures_of(model) == {kind: 1}
    assert model.counters.read().success.count == 0


def test_a_request_that_cannot_be_decoded_is_counted_as_invalid():
    model = doubler()
    infer(make(model), b"{")
    assert failures_of(model) == {"invalid": 1}


def test_late_request_is_counted_with_the_time_it_was_queued():
    model = doubler()
    waited(10**9, 1000, model)
    assert failures_of(model) == {"timeout": 1}
    assert 10**9 <= model.counters.read().failures["timeout"].ns < 60 * 10**9


def test_an_empty_response_is_counted_as_a_success():
    model = failing(NoContentError("node 'n' found nothing"))
    answer = infer(make(model), request(1))
    assert (answer.status, answer.body, "content-type" in answer.headers) == (204, b"", False)
    assert (model.counters.read().success.count, failures_of(model)) == (1, {})


def test_a_request_for_an_unknown_model_is_not_counted():
    model = doubler()
    infer(make(model), request(1), target="/v2/models/n/infer")
    assert (model.counters.read().success.count, failures_of(model)) == (0, {})


# --- How a server gets a response

WORKER = {"ovms_rest.buffers": True}


def respond(*, settings=None, environ=(), **keys):
    """Call the resource with a request for y; return Falcon's response."""
    body = json.dumps(request(1.5, outputs=[{"name": "y"}], **keys)).encode()
    called = create_environ(INFER, "POST") | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    response = falcon.Response()
    resource = Infer(FakeRegistry(doubler()), settings or Settings(), CrashGuard(InferenceNotes(1), CrashTable()))
    resource.on_post(falcon.Request(called | dict(environ)), response, "m")
    return response


@pytest.mark.parametrize("server", [{}, WORKER])
def test_json_is_one_buffer(server):
    response = respond(environ=server)
    assert json.loads(response.data)["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1], "data": [3.0]}]
    assert response.get_header("Inference-Header-Content-Length") is None


def test_our_own_worker_gets_binary_outputs_as_buffers():
    response = respond(environ=WORKER, **BINARY)
    head, tensor = response.stream
    assert bytes(tensor) == np.float32([3]).tobytes()
    assert response.get_header("Inference-Header-Content-Length") == str(len(head))
    assert response.get_header("Content-Length") == str(len(head) + 4)


def test_another_server_gets_binary_outputs_as_one_buffer():
    response = respond(**BINARY)
    head = int(response.get_header("Inference-Header-Content-Length"))
    assert (json.loads(response.data[:head])["model_name"], response.data[head:]) == ("m", np.float32([3]).tobytes())


def test_a_compressed_response_is_one_buffer():
    accepts = {"HTTP_ACCEPT_ENCODING": "gzip"}
    response = respond(settings=Settings(response_compression=True), environ=accepts | WORKER, **BINARY)
    assert (response.data[:2], response.get_header("Content-Encoding")) == (b"\x1f\x8b", "gzip")
