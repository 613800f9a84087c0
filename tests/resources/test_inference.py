"""The resource of inferences alone: how it counts, and the forms in which it hands its response to a server."""

import io
import json
import time

import falcon
import numpy as np
import pytest
from falcon.testing import create_environ

from ovms_rest.errors import (
    BusyError,
    DeadlineError,
    InferenceError,
    InvalidRequestError,
    NoContentError,
    NotFoundError,
)
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.resources.inference import Infer
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.counters import Counters
from ovms_rest.shared_memory.statistics import InferenceRecord

ANY = (Dim(0, None),)
METADATA = ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", ANY)}, {"y": TensorMetadata("y", "FP32", ANY)})


class FakeServable:
    """A model that returns its input, or raises an error."""

    def __init__(self, error=None):
        self.metadata = METADATA
        self.counters = Counters(1).of("m", "1")
        self.error = error

    def infer(self, arrays):
        if self.error:
            raise self.error
        return {"y": Tensor("y", "FP32", arrays["x"])}


class FakeRegistry:
    """One model, m."""

    def __init__(self, servable):
        self.servable = servable

    def find(self, name, version=None, explain=False):
        if name != "m":
            raise NotFoundError(f"model {name!r} is unknown")
        return self.servable


def body_of(values, **keys):
    inputs = [{"name": "x", "datatype": "FP32", "shape": [len(values)], "data": values}]
    return json.dumps({"inputs": inputs, **keys}).encode()


def infer(servable, body, *, name="m", settings=None, **environ):
    """Call the resource; return Falcon's response."""
    environ = {
        **create_environ("/", "POST"),
        "wsgi.input": io.BytesIO(body),
        "CONTENT_LENGTH": str(len(body)),
        **environ,
    }
    response = falcon.Response()
    Infer(FakeRegistry(servable), settings or Settings()).on_post(falcon.Request(environ), response, name)
    return response


def failures_of(servable):
    return {kind: failure.count for kind, failure in servable.counters.read().failures.items() if failure.count}


# --- How it counts


def test_an_inference_is_counted_with_its_times_batch_and_sizes():
    servable, body = FakeServable(), body_of([1, 2, 3])
    received = {"ovms_rest.inference": InferenceRecord(time.monotonic_ns() - 10**9)}
    response = infer(servable, body, **received)
    counted = servable.counters.read()
    assert (counted.success.count, failures_of(servable)) == (1, {})
    assert counted.queue.ns >= 10**9
    assert (counted.inference_count, counted.request_bytes, counted.response_bytes) == (
        3,
        len(body),
        len(response.data),
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError(""), "invalid"),
        (BusyError(""), "overload"),
        (InferenceError(""), "failed"),
        (RuntimeError(""), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_a_failed_inference_is_counted_by_the_kind_of_its_error(error, kind):
    servable = FakeServable(error)
    with pytest.raises(type(error)):
        infer(servable, body_of([1]))
    assert failures_of(servable) == {kind: 1}
    assert servable.counters.read().success.count == 0


def test_a_request_that_cannot_be_decoded_is_counted_as_invalid():
    servable = FakeServable()
    with pytest.raises(InvalidRequestError):
        infer(servable, b"{")
    assert failures_of(servable) == {"invalid": 1}


def test_a_request_past_its_deadline_is_counted_as_a_timeout():
    servable = FakeServable()
    received = {"ovms_rest.inference": InferenceRecord(time.monotonic_ns() - 10**9)}
    with pytest.raises(DeadlineError):
        infer(servable, body_of([1], parameters={"timeout": 1}), **received)
    assert failures_of(servable) == {"timeout": 1}


def test_an_empty_response_is_counted_as_a_success():
    servable = FakeServable(NoContentError(""))
    with pytest.raises(NoContentError):
        infer(servable, body_of([1]))
    assert (servable.counters.read().success.count, failures_of(servable)) == (1, {})


def test_a_request_for_an_unknown_model_is_not_counted():
    servable = FakeServable()
    with pytest.raises(NotFoundError):
        infer(servable, body_of([1]), name="n")
    assert (servable.counters.read().success.count, failures_of(servable)) == (0, {})


# --- How it hands on its response

BINARY = {"parameters": {"binary_data_output": True}}
WORKER = {"ovms_rest.buffers": True}


@pytest.mark.parametrize("server", [{}, WORKER])
def test_json_is_one_buffer(server):
    response = infer(FakeServable(), body_of([1.5]), **server)
    assert json.loads(response.data)["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1], "data": [1.5]}]
    assert response.get_header("Inference-Header-Content-Length") is None


def test_our_own_worker_gets_binary_outputs_as_buffers():
    response = infer(FakeServable(), body_of([1.5], **BINARY), **WORKER)
    head, tensor = response.stream
    assert bytes(tensor) == np.float32([1.5]).tobytes()
    assert response.get_header("Inference-Header-Content-Length") == str(len(head))
    assert response.get_header("Content-Length") == str(len(head) + 4)


def test_another_server_gets_binary_outputs_as_one_buffer():
    response = infer(FakeServable(), body_of([1.5], **BINARY))
    head = int(response.get_header("Inference-Header-Content-Length"))
    assert (json.loads(response.data[:head])["model_name"], response.data[head:]) == ("m", np.float32([1.5]).tobytes())


def test_a_compressed_response_is_one_buffer():
    accepts = {"HTTP_ACCEPT_ENCODING": "gzip"}
    settings = Settings(response_compression=True)
    response = infer(FakeServable(), body_of([1.5], **BINARY), settings=settings, **accepts, **WORKER)
    assert (response.data[:2], response.get_header("Content-Encoding")) == (b"\x1f\x8b", "gzip")
