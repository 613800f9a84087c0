"""An application that serves models which are Python functions, called as a WSGI server calls it."""

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes
from wsgiref.util import setup_testing_defaults

import falcon
import falcon.testing
import numpy as np

from ovms_rest.app import create_app
from ovms_rest.errors import NotFoundError, NotReadyError, ServingError
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.words import quote
from ovms_rest.resources.error_handlers import handle_serving_error, serialize_falcon_error
from ovms_rest.resources.routing import Request, Router
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.counters import Counters
from ovms_rest.shared_memory.statistics import InferenceRecord

ANY = Dim(0, None)
ONE = Dim(1, 1)
BINARY = {"parameters": {"binary_data_output": True}}
INFER = "/v2/models/m/infer"
GET_ROUTES = [
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/versions/1", "/v2/models/m/ready"),
    "/v2/models/m/versions/1/ready",
]
POST_ROUTES = [INFER, "/v2/models/m/versions/1/infer"]


# --- Models


def by_name(*tensors):
    return {tensor.name: tensor for tensor in tensors}


@dataclass
class FakeServable:
    """A model whose inference is a function."""

    metadata: ModelMetadata
    function: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    counters: Any = field(default_factory=lambda: Counters(1).of("m", "1"))

    def infer(self, arrays, record=None):
        return self.function(arrays)


class FakeRegistry:
    """Models of version 1 by name; with a reason it is not ready."""

    def __init__(self, *servables, reason=""):
        self.servables = {servable.metadata.name: servable for servable in servables}
        self.reason = reason

    def find(self, name, version=None, explain=False):
        if name not in self.servables or version not in (None, "1"):
            raise NotFoundError(f"no model {quote(name)}{f' of version {version}' if explain else ''}")
        return self.servables[name]

    def versions(self, name):
        return ["1"]

    def check_ready(self):
        if self.reason:
            raise NotReadyError(self.reason)


def servable(infer, inputs, outputs, name="m", version="1", **metadata):
    """Return a model from its inference, and the datatype and dims of its tensors by name."""
    tensors = [{key: TensorMetadata(key, *value) for key, value in each.items()} for each in (inputs, outputs)]
    return FakeServable(ModelMetadata(name, version, *tensors, **metadata), infer)


def doubler(name="m", version="1"):
    """Return a model with y = 2x and n, how many elements x has."""

    def infer(arrays):
        x = arrays["x"]
        return by_name(Tensor("y", "FP32", x * 2), Tensor("n", "INT64", np.array([x.size], np.int64)))

    return servable(infer, {"x": ("FP32", (ANY,))}, {"n": ("INT64", (ONE,)), "y": ("FP32", (ANY,))}, name, version)


def speaker(element):
    """Return a model with a constant output."""
    response = by_name(Tensor("text", "BYTES", BytesArray.of([element], (1,))))
    return servable(lambda arrays: response, {"x": ("FP32", (ANY,))}, {"text": ("BYTES", (ONE,))}, "speaker")


def failing(error, name="m"):
    def infer(arrays):
        raise error

    return FakeServable(doubler(name).metadata, infer)


# --- Requests


def make(*servables, reason="", **settings):
    """Return an application that serves these models, or a doubler called m."""
    return create_app(FakeRegistry(*(servables or (doubler(),)), reason=reason), Settings(**settings))


def client_of(routes):
    """Return a client of an application that has these resources by path, and the server's responses to errors."""
    app = falcon.App(router=Router(), request_type=Request)
    app.add_error_handler(ServingError, handle_serving_error)
    app.set_error_serializer(serialize_falcon_error)
    for path, resource in routes.items():
        app.add_route(path, resource)
    return falcon.testing.TestClient(app)


class Answer(NamedTuple):
    """A response, its header names in lower case, and what was written to the server's log."""

    status: int
    headers: dict[str, str]
    body: bytes
    log: str

    def json(self):
        return json.loads(self.body)


def ask(app, method, target, body=b"", *, headers=None, **environ):
    """Call an application as gunicorn does: PATH_INFO decoded, RAW_URI the unchanged target."""
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "RAW_URI": target,
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "SCRIPT_NAME": "",
        "QUERY_STRING": query,
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        **({"CONTENT_LENGTH": str(len(body))} if body or method == "POST" else {}),
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()},
        **environ,
    }
    setup_testing_defaults(environ)
    started = []
    chunks = app(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
    body = b"".join(chunks)
    ((status, fields),) = started
    assert len({name.lower() for name, _ in fields}) == len(fields)
    log = environ["wsgi.errors"].getvalue()
    return Answer(int(status.split()[0]), {name.lower(): value for name, value in fields}, body, log)


def infer(app, request, binary=None, target=INFER, headers=None, **environ):
    """Request an inference; `binary` follows the JSON."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    lengths = {} if binary is None else {"Inference-Header-Content-Length": str(len(body))}
    return ask(app, "POST", target, body + (binary or b""), headers={**lengths, **(headers or {})}, **environ)


def request(*values, **keys):
    """Return a request for x as JSON."""
    return {"inputs": [{"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}], **keys}


def received(ns_ago):
    """Return the environ of an inference that the worker received this long ago."""
    return {"ovms_rest.inference": InferenceRecord(time.monotonic_ns() - ns_ago)}
