"""The application as a WSGI server calls it, serving what a fake registry has."""

import gzip
import io
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes
from wsgiref.util import setup_testing_defaults

import numpy as np
import pytest

from ovms_rest import __version__
from ovms_rest.app import create_app, get_app, load_app
from ovms_rest.errors import (
    ConfigError,
    InferenceError,
    InvalidRequestError,
    NoContentError,
    NotFoundError,
    NotReadyError,
)
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.counters import Counters

ANY = Dim(0, None)
ONE = Dim(1, 1)
INTERNAL_ERROR = {"error": "internal error; the reason is in the log of the server"}


# --- What is served


def by_name(*tensors):
    return {tensor.name: tensor for tensor in tensors}


@dataclass
class FakeServable:
    """A model whose inference is a function."""

    metadata: ModelMetadata
    infer: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    counters: Any = field(default_factory=lambda: Counters(1).of("m", "1"))


class FakeRegistry:
    """Models of version 1 by name; with a reason it is not ready."""

    def __init__(self, *servables, reason=""):
        """Take what is served."""
        self.servables = {servable.metadata.name: servable for servable in servables}
        self.reason = reason

    def find(self, name, version=None, explain=False):
        """Return a model."""
        if name not in self.servables or version not in (None, "1"):
            raise NotFoundError(f"no model {name!r} of version {version}")
        return self.servables[name]

    def versions(self, name):
        """Return the one version of every model."""
        return ["1"]

    def check_ready(self):
        """Fail with the reason, if there is one."""
        if self.reason:
            raise NotReadyError(self.reason)


def doubler(name="m", version="1"):
    """Make a model with y = 2x and n, how many elements x has."""
    metadata = ModelMetadata(
        name,
        version,
        by_name(TensorMetadata("x", "FP32", (ANY,))),
        by_name(TensorMetadata("n", "INT64", (ONE,)), TensorMetadata("y", "FP32", (ANY,))),
    )

    def infer(arrays):
        x = arrays["x"]
        return by_name(Tensor("y", "FP32", x * 2), Tensor("n", "INT64", np.array([x.size], np.int64)))

    return FakeServable(metadata, infer)


def adder():
    """Make a model with two inputs."""
    inputs = by_name(TensorMetadata("a", "FP32", (ONE,)), TensorMetadata("b", "FP32", (ONE,)))
    metadata = ModelMetadata("adder", "1", inputs, by_name(TensorMetadata("c", "FP32", (ONE,))))
    return FakeServable(metadata, lambda arrays: by_name(Tensor("c", "FP32", arrays["a"] + arrays["b"])))


def speaker(element):
    """Make a model with a constant output."""
    outputs = by_name(TensorMetadata("text", "BYTES", (ONE,)))
    metadata = ModelMetadata("speaker", "1", by_name(TensorMetadata("x", "FP32", (ANY,))), outputs)
    answer = by_name(Tensor("text", "BYTES", BytesArray.of([element], (1,))))
    return FakeServable(metadata, lambda arrays: answer)


def failing(error, name="m"):
    """Make a model whose inference fails."""

    def infer(arrays):
        raise error

    return FakeServable(doubler(name).metadata, infer)


def spy(seen):
    """Make a model that keeps the arrays of its inferences."""
    model = doubler()

    def infer(arrays):
        seen.append(arrays)
        return model.infer(arrays)

    return FakeServable(model.metadata, infer)


def make(*servables, reason="", **settings):
    """Make an application that serves these models, or a doubler called m."""
    return create_app(FakeRegistry(*(servables or (doubler(),)), reason=reason), Settings(**settings))


# --- How it is asked


class Answer(NamedTuple):
    """A response, its header names in lower case, and what was written to the log of the server."""

    status: int
    headers: dict[str, str]
    body: bytes
    log: str

    def json(self):
        """Parse the body."""
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


def infer(app, request, binary=None, target="/v2/models/m/infer", headers=None):
    """Request an inference; `binary` follows the JSON."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    lengths = {} if binary is None else {"Inference-Header-Content-Length": str(len(body))}
    return ask(app, "POST", target, body + (binary or b""), headers={**lengths, **(headers or {})})


def request(*values, **keys):
    """Make a request for x as JSON."""
    return {"inputs": [{"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}], **keys}


def binary_request(count, **keys):
    """Make a request for x whose elements follow as binary."""
    return {"inputs": [{"name": "x", "shape": [count], "datatype": "FP32"}], **keys}


def split(answer):
    """Split a binary response; return its JSON and the bytes after it."""
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


BINARY = {"parameters": {"binary_data_output": True}}


# --- Routes

GET_ROUTES = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/m",
    "/v2/models/m/versions/1",
    "/v2/models/m/ready",
    "/v2/models/m/versions/1/ready",
]
POST_ROUTES = ["/v2/models/m/infer", "/v2/models/m/versions/1/infer"]
UNKNOWN_PATHS = [
    "/v1",
    "/v3",
    "/v2x",
    "/V2",
    "/v2/health",
    "/v2/health/alive",
    "/v2/health/live/x",
    "/v2/models/m/versions",
    "/v2/models/m/versions/1/x",
    "/v2/models/m/x",
    "/v2/models/m/ready/x",
    "/v2/models/m/infer/x",
    "/v2/models/m/n/infer",
    "/v2//",
    "/v2/health//live",
    "/%2Fv2",
    "/favicon.ico",
]


@pytest.mark.parametrize("target", GET_ROUTES)
def test_get_route_responds(target):
    assert ask(make(), "GET", target).status == 200


@pytest.mark.parametrize("target", POST_ROUTES)
def test_inference_route_responds(target):
    assert infer(make(), request(1), target=target).status == 200


@pytest.mark.parametrize("target", UNKNOWN_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "FOO"])
def test_unknown_path_is_a_404_for_every_method(method, target):
    answer = ask(make(), method, target)
    assert answer.status == 404
    assert answer.json()["error"].startswith("path '/")


@pytest.mark.parametrize("target", ["/*", "//v2", "///v2/health/live"])
def test_path_that_looks_like_a_known_one_is_unknown(target):
    assert ask(make(), "GET", target).status == 404


@pytest.mark.parametrize("target", ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/ready"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "FOO", "get"])
def test_wrong_method_on_a_get_route_is_a_405_that_names_the_allowed_ones(method, target):
    answer = ask(make(), method, target)
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert answer.json() == {
        "error": f"method {method} is not allowed for {target!r}, allowed: {answer.headers['allow']}"
    }


@pytest.mark.parametrize("target", POST_ROUTES)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "FOO"])
def test_wrong_method_on_an_inference_route_is_a_405_that_names_the_allowed_ones(method, target):
    answer = ask(make(), method, target)
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == {"POST", "OPTIONS"}
    assert answer.json() == {
        "error": f"method {method} is not allowed for {target!r}, allowed: {answer.headers['allow']}"
    }


def test_method_that_falcon_reserves_is_not_allowed_either():
    assert ask(make(), "WEBSOCKET", "/v2").status == 405


def test_wrong_method_is_a_405_even_for_an_unknown_model():
    assert ask(make(), "DELETE", "/v2/models/unknown").status == 405


@pytest.mark.parametrize(
    ("target", "methods"),
    [*((target, {"GET", "HEAD"}) for target in GET_ROUTES), *((target, {"POST"}) for target in POST_ROUTES)],
)
def test_options_answers_with_the_methods_of_the_path(target, methods):
    answer = ask(make(), "OPTIONS", target)
    assert (answer.status, answer.body) == (200, b"")
    assert set(answer.headers["allow"].split(", ")) - {"OPTIONS"} == methods


def test_options_of_the_server_answers_with_all_methods():
    answer = ask(make(), "OPTIONS", "*")
    assert (answer.status, answer.body) == (200, b"")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


@pytest.mark.parametrize("target", [*GET_ROUTES, "/v2/models/unknown", "/v2/models/m/versions/9/ready", "/unknown"])
@pytest.mark.parametrize("reason", ["", "model 'n' does not serve"])
def test_head_answers_as_get_without_the_body(target, reason):
    app = make(reason=reason, allowed_origins="*")
    head, get = ask(app, "HEAD", target), ask(app, "GET", target)
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
    assert head.headers["content-length"] == str(len(get.body))


def test_head_of_an_inference_route_is_a_405():
    answer = ask(make(), "HEAD", "/v2/models/m/infer")
    assert (answer.status, answer.body) == (405, b"")


@pytest.mark.parametrize("target", GET_ROUTES)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_slash_at_the_end_is_tolerated(method, target):
    with_slash, without = ask(make(), method, f"{target}/"), ask(make(), method, target)
    assert with_slash == without
    assert with_slash.status == 200


def test_two_slashes_at_the_end_are_not_tolerated():
    assert ask(make(), "GET", "/v2/models/m//").status == 404


@pytest.mark.parametrize("target", POST_ROUTES)
def test_slash_at_the_end_of_an_inference_route_is_tolerated(target):
    assert infer(make(), request(1), target=f"{target}/").json()["outputs"][1]["data"] == [2.0]


@pytest.mark.parametrize("target", ["/v2?x", "/v2?x=1&x=2", "/v2?=", "/v2?%", "/v2?a=%2F", "/v2?a=%ff", "/v2/?x=/"])
def test_query_is_ignored(target):
    assert ask(make(), "GET", target).status == 200


def test_application_may_be_mounted_below_a_path():
    assert ask(make(), "GET", "/v2", SCRIPT_NAME="/ovms", RAW_URI="/ovms/v2").status == 200


# --- Server, health, metadata


def test_server_metadata_is_returned():
    answer = ask(make(), "GET", "/v2")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "name": "ovms_rest",
        "version": __version__,
        "extensions": [
            "binary_tensor_data",
            "classification",
            "logging",
            "model_configuration",
            "model_repository",
            "parameters",
            "schedule_policy",
            "statistics",
        ],
    }


@pytest.mark.parametrize(
    "target", ["/v2/health/live", "/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready"]
)
def test_healthy_server_answers_200_without_body(target):
    answer = ask(make(), "GET", target)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


def test_model_that_does_not_serve_makes_the_server_not_ready():
    answer = ask(make(reason="model 'n' does not serve: no version"), "GET", "/v2/health/ready")
    assert (answer.status, answer.json()) == (400, {"error": "model 'n' does not serve: no version"})


def test_server_that_is_not_ready_is_live():
    assert ask(make(reason="model 'n' does not serve"), "GET", "/v2/health/live").status == 200


@pytest.mark.parametrize("target", ["/v2/models/m", "/v2/models/m/versions/1"])
def test_model_metadata_is_returned(target):
    answer = ask(make(), "GET", target)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "name": "m",
        "versions": ["1"],
        "platform": "OpenVINO",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
        "outputs": [
            {"name": "n", "datatype": "INT64", "shape": [1]},
            {"name": "y", "datatype": "FP32", "shape": [-1]},
        ],
    }


def test_model_metadata_has_the_rt_info():
    rt_info = {"model_info": {"labels": "cat dog", "nested": {"a": "1"}}}
    inputs, outputs = by_name(TensorMetadata("x", "FP32", ())), by_name(TensorMetadata("y", "FP32", None))
    metadata = ModelMetadata("m", "1", inputs, outputs, rt_info)
    assert ask(make(FakeServable(metadata, None)), "GET", "/v2/models/m").json()["rt_info"] == rt_info


@pytest.mark.parametrize("target", ["/v2/models/n", "/v2/models/n/ready", "/v2/models/m/versions/2/ready"])
def test_unknown_model_or_version_is_a_404_that_names_it(target):
    answer = ask(make(), "GET", target)
    assert answer.status == 404
    assert answer.json()["error"].startswith("no model ")


# --- Names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "resnet 50",
            "a.b",
            ".",
            "..",
            "a%b",
            "100%",
            "%41",
            "a%20b",
            "a+b",
            "a;b=c",
            "a:b@c",
            "~a",
            "a\\b",
            '"',
            "'",
        ),
        *("modèle", "模型", "\U0001f600", "ready", "infer", "versions", "models", "{name}", "a?b", "a#b", "a\tb"),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_model_may_have_any_name_without_a_slash(name, raw):
    """With RAW_URI, which gunicorn sets, and without it, as on other servers."""
    app = make(doubler(name))
    model, raw_uri = f"/v2/models/{quote(name, safe='')}", {} if raw else {"RAW_URI": ""}
    assert ask(app, "GET", model, **raw_uri).json()["name"] == name
    assert ask(app, "GET", f"{model}/ready", **raw_uri).status == 200
    assert ask(app, "GET", f"{model}/versions/1", **raw_uri).json()["name"] == name
    body = json.dumps(request(1)).encode()
    assert ask(app, "POST", f"{model}/infer", body, **raw_uri).json()["model_name"] == name


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/v2/models/m%2Fready", 404),
        ("GET", "/v2/models/m%2fready", 404),
        ("HEAD", "/v2/models/m%2Fready", 404),
        ("GET", "/v2/models/m%2Fversions%2F1", 404),
        ("GET", "/v2/models/m%2Fversions/1", 404),
        ("GET", "/v2/models/m/versions/1%2Fready", 404),
        ("GET", "/v2/models/%2Fm", 404),
        ("GET", "/v2/models/m%2F", 404),
        ("GET", "/v2/models/m%2F/", 404),
        ("GET", "/v2%2Fmodels/m", 404),
        ("GET", "/v2/models/m%2Fready?a=b", 404),
        ("POST", "/v2/models/m%2Fversions/1/infer", 404),
        ("POST", "/v2/models/m%2Fx/infer", 404),
        ("POST", "/v2/models/m%2Finfer", 405),  # of the metadata of a model
    ],
)
def test_encoded_slash_does_not_separate_segments(method, target, status):
    assert ask(make(), method, target, json.dumps(request(1)).encode()).status == status


def test_encoded_slash_in_a_target_of_absolute_form_does_not_separate_segments():
    """RFC 9112, 3.2.2: a server accepts it; gunicorn decodes PATH_INFO and sets RAW_URI to the whole target."""
    answer = ask(
        make(),
        "GET",
        "/v2/models/m%2Fready",
        RAW_URI="http://localhost/v2/models/m%2Fready",
        PATH_INFO="/v2/models/m/ready",
    )
    assert answer.status == 404


def test_target_of_absolute_form_is_answered_as_its_path():
    assert ask(make(), "GET", "/v2/models/m/ready", RAW_URI="http://localhost/v2/models/m/ready").status == 200


def test_encoded_slash_stays_encoded_in_the_error():
    assert ask(make(), "GET", "/v2/models/a%2Fb").json() == {"error": "no model 'a%2Fb' of version None"}


def test_encoded_slash_does_not_affect_other_encoded_characters():
    assert ask(make(), "GET", "/v2/models/%C3%A4%20%25%2Fb").json() == {"error": "no model 'ä %%2Fb' of version None"}


def test_encoded_slash_below_a_mount_path_does_not_separate_segments():
    answer = ask(make(), "GET", "/v2/models/m%2Fready", SCRIPT_NAME="/ovms", RAW_URI="/ovms/v2/models/m%2Fready")
    assert answer.json() == {"error": "no model 'm%2Fready' of version None"}


@pytest.mark.parametrize("target", ["/v2/models/%FF", "/v2/models/%C3", "/v2/models/%00", "/v2/models/%ED%A0%80/ready"])
def test_name_that_is_not_utf_8_is_unknown(target):
    answer = ask(make(), "GET", target)
    assert answer.status == 404
    assert answer.json()["error"].startswith("no model ")


@pytest.mark.parametrize("target", ["/v2/models//ready", "/v2/models//infer", "/v2/models//versions/1"])
def test_empty_name_is_unknown(target):
    assert ask(make(), "POST" if target.endswith("infer") else "GET", target).status == 404


# --- Versions, of the registry that a service has


@pytest.fixture(scope="module")
def versioned():
    """An application with versions 2 and 10 of m, and n that does not serve."""
    models = {2: doubler("m", "2"), 10: doubler("m", "10")}
    return create_app(ModelRegistry({"m": Entry(models), "n": Entry(reason="no version in /srv/n")}), Settings())


@pytest.mark.parametrize("version", ["2", "10"])
def test_requested_version_responds(versioned, version):
    model = f"/v2/models/m/versions/{version}"
    assert ask(versioned, "GET", f"{model}/ready").status == 200
    assert ask(versioned, "GET", model).json()["versions"] == ["2", "10"]
    assert infer(versioned, request(1), target=f"{model}/infer").json()["model_version"] == version


def test_highest_version_responds_by_default(versioned):
    assert infer(versioned, request(1)).json()["model_version"] == "10"


@pytest.mark.parametrize(
    "version",
    [
        *(
            "1",
            "3",
            "0",
            "02",
            "010",
            "+2",
            "-2",
            "2.0",
            "2e0",
            "0x2",
            "2%20",
            "%202",
            "two",
            "latest",
            "2a",
            "-1",
            "None",
        ),
        *("%D9%A2", "%C2%B2", "%00", "2%2F", "2%0A"),
        str(2**63 - 1),
        str(2**63),
        str(2**64 + 2),
        "9" * 5000,
    ],
)
def test_every_other_version_is_a_404(versioned, version):
    model = f"/v2/models/m/versions/{version}"
    answers = [
        ask(versioned, "GET", model),
        ask(versioned, "GET", f"{model}/ready"),
        infer(versioned, request(1), target=f"{model}/infer"),
    ]
    assert [answer.status for answer in answers] == [404, 404, 404]
    for answer in answers:
        assert " of model 'm' is not served" in answer.json()["error"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/v2/models/x", "unknown model 'x'; configured: 'm', 'n'"),
        ("/v2/models/x/ready", "unknown model 'x'; configured: 'm', 'n'"),
        ("/v2/models/M/ready", "unknown model 'M'; configured: 'm', 'n'"),
        ("/v2/models/n", "model 'n' does not serve: no version in /srv/n"),
        ("/v2/models/n/ready", "model 'n' does not serve: no version in /srv/n"),
        ("/v2/models/n/versions/1/ready", "model 'n' does not serve: no version in /srv/n"),
    ],
)
def test_model_that_does_not_serve_is_a_404_with_the_reason(versioned, target, error):
    answer = ask(versioned, "GET", target)
    assert (answer.status, answer.json()) == (404, {"error": error})


def test_server_readiness_names_a_model_that_does_not_serve(versioned):
    answer = ask(versioned, "GET", "/v2/health/ready")
    assert (answer.status, answer.json()) == (400, {"error": "model 'n' does not serve: no version in /srv/n"})


# --- Errors

PRIVATE = "/etc/private.key"
ERRORS = [
    ("unknown path", 404, lambda app: ask(app, "GET", "/unknown")),
    ("wrong method", 405, lambda app: ask(app, "DELETE", "/v2")),
    ("unknown method", 405, lambda app: ask(app, "FOO", "/v2")),
    ("not ready", 400, lambda app: ask(app, "GET", "/v2/health/ready")),
    ("unknown model", 404, lambda app: ask(app, "GET", "/v2/models/x")),
    ("unknown model of an inference", 404, lambda app: infer(app, request(1), target="/v2/models/x/infer")),
    ("no JSON", 400, lambda app: infer(app, b"{")),
    ("no body", 400, lambda app: ask(app, "POST", "/v2/models/m/infer")),
    ("wrong input", 400, lambda app: infer(app, {"inputs": [{"name": "z", "shape": [0], "datatype": "FP32"}]})),
    ("wrong header", 400, lambda app: infer(app, b"{}", headers={"Inference-Header-Content-Length": "x"})),
    ("too large", 413, lambda app: infer(app, b" " * 2000)),
    ("wrong encoding", 415, lambda app: infer(app, request(1), headers={"Content-Encoding": "br"})),
    ("failed inference", 500, lambda app: infer(app, request(1), target="/v2/models/failing/infer")),
    (
        "waited too long",
        503,
        lambda app: ask(
            app,
            "POST",
            "/v2/models/m/infer",
            json.dumps(request(1, parameters={"timeout": 1})).encode(),
            **{"ovms_rest.received": time.monotonic_ns() - 10**9},
        ),
    ),
    ("bug", 500, lambda app: infer(app, request(1), target="/v2/models/buggy/infer")),
]
errors = pytest.mark.parametrize(("status", "cause"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])


@pytest.fixture
def faulty():
    """Make an application with these settings in which every error can occur."""

    def faulty(**settings):
        servables = (doubler(), failing(InferenceError("failed"), "failing"), failing(RuntimeError(PRIVATE), "buggy"))
        return make(*servables, reason="not ready", max_body_bytes=1000, **settings)

    return faulty


@errors
def test_every_error_is_json(faulty, status, cause):
    answer = cause(faulty())
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.headers["content-length"] == str(len(answer.body))
    ((key, message),) = answer.json().items()
    assert key == "error"
    assert message


def test_unsupported_encoding_is_refused_with_the_allowed_ones():
    answer = infer(make(), request(1), headers={"Content-Encoding": "br"})
    assert answer.status == 415
    assert answer.headers["accept-encoding"] == "gzip, deflate, identity"
    assert answer.json() == {"error": "unsupported Content-Encoding 'br'; supported: gzip, deflate, identity"}


def test_failed_inference_is_a_500_with_the_servables_message():
    answer = infer(make(failing(InferenceError("model 'm' version 1 failed"))), request(1))
    assert (answer.status, answer.json()) == (500, {"error": "model 'm' version 1 failed"})


def test_no_content_is_a_204_without_body_and_content_type():
    answer = infer(make(failing(NoContentError("node 'n' found nothing"))), request(1))
    assert (answer.status, answer.body) == (204, b"")
    assert "content-type" not in answer.headers


def test_refusal_by_a_servable_is_a_400():
    answer = infer(make(failing(InvalidRequestError("input 'x' is no image"))), request(1))
    assert (answer.status, answer.json()) == (400, {"error": "input 'x' is no image"})


@pytest.mark.parametrize(
    "bug", [RuntimeError(PRIVATE), KeyError(PRIVATE), ValueError(PRIVATE), OSError(2, PRIVATE), MemoryError(PRIVATE)]
)
def test_bug_is_a_500_whose_text_is_in_the_log_alone(bug):
    answer = infer(make(failing(bug)), request(1))
    assert (answer.status, answer.json()) == (500, INTERNAL_ERROR)
    assert PRIVATE not in answer.body.decode() + str(answer.headers)
    assert "Traceback (most recent call last)" in answer.log
    assert PRIVATE in answer.log


def test_missing_output_of_a_servable_is_a_bug():
    model = FakeServable(doubler().metadata, lambda arrays: {})
    assert infer(make(model), request(1)).json() == INTERNAL_ERROR


@pytest.mark.parametrize("target", ["/v2/models/m", "/v2/models/m/ready", "/v2/health/ready"])
def test_bug_of_the_registry_is_a_500_whose_text_is_in_the_log_alone(target):
    class BuggyRegistry(FakeRegistry):
        def find(self, name, version=None, explain=False):
            raise RuntimeError(PRIVATE)

        def check_ready(self):
            raise RuntimeError(PRIVATE)

    answer = ask(create_app(BuggyRegistry(), Settings()), "GET", target)
    assert (answer.status, answer.json()) == (500, INTERNAL_ERROR)
    assert PRIVATE in answer.log


@pytest.mark.parametrize("accept", ["application/xml", "text/html", "image/*;q=0.1", "garbage", ""])
def test_error_is_json_whatever_the_client_accepts(accept):
    answer = ask(make(), "GET", "/unknown", headers={"Accept": accept})
    assert (answer.headers["content-type"], answer.json()) == (
        "application/json",
        {"error": "path '/unknown' is unknown"},
    )


def test_unknown_model_is_reported_before_the_body_is_read():
    assert infer(make(), b"no JSON", target="/v2/models/x/infer").status == 404


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "the request has no JSON, expected an object with the key 'inputs'"),
        (b"[]", "the request is an array, expected an object with the key 'inputs'"),
        (b"{}", "inputs is missing, expected an array of one or more objects"),
        (
            json.dumps(request(1, outputs=[{"name": "z"}])).encode(),
            "output 'z' is unknown to model 'm', whose outputs are 'n', 'y'",
        ),
    ],
)
def test_invalid_request_is_a_400_with_the_reason(body, error):
    answer = infer(make(), body)
    assert (answer.status, answer.json()) == (400, {"error": error})


def test_object_nested_in_data_is_a_400():
    """Orjson reads 1024 levels but writes only 254."""
    data = b'{"a":' * 300 + b"1" + b"}" * 300
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[' + data + b"]}]}"
    assert infer(make(), body).status == 400


def test_string_that_json_cannot_hold_is_a_400():
    answer = infer(make(speaker(b"\xff")), request(1), target="/v2/models/speaker/infer")
    assert answer.status == 400
    assert answer.json()["error"].startswith("output 'text': string 0 is not valid UTF-8")


# --- The limit of a body


@pytest.mark.parametrize(
    ("environ", "body", "error"),
    [
        ({}, b"x" * 11, "the body has 11 bytes, at most 10 are allowed"),
        ({"CONTENT_LENGTH": str(10**30)}, b"", f"the body has {10**30} bytes, at most 10 are allowed"),
        (
            {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"},
            b"x" * 11,
            "the body has more than the 10 bytes allowed",
        ),
        (
            {"HTTP_CONTENT_ENCODING": "deflate"},
            zlib.compress(b""),
            "the request has no JSON, expected an object with the key 'inputs'",
        ),
    ],
)
def test_body_limit_is_that_of_the_settings(environ, body, error):
    assert ask(make(max_body_bytes=10), "POST", "/v2/models/m/infer", body, **environ).json() == {"error": error}


def test_body_limit_applies_to_the_decompressed_size():
    body = gzip.compress(b" " * 101)
    answer = infer(make(max_body_bytes=100), body, headers={"Content-Encoding": "gzip"})
    assert answer.status == 413
    assert answer.json() == {"error": "the body decompresses to more than the 100 bytes allowed"}


# --- Inference


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


def test_response_has_requested_outputs_in_the_requested_order():
    answer = infer(make(), request(1, outputs=[{"name": "y"}, {"name": "n"}]))
    assert [output["name"] for output in answer.json()["outputs"]] == ["y", "n"]


def test_output_that_was_not_requested_is_left_out():
    answer = infer(make(), request(1, outputs=[{"name": "y"}]))
    assert [output["name"] for output in answer.json()["outputs"]] == ["y"]


@pytest.mark.parametrize(("keys", "echoed"), [({"id": "42"}, "42"), ({"id": ""}, None), ({}, None)])
def test_id_is_echoed(keys, echoed):
    assert infer(make(), request(1, **keys)).json().get("id") == echoed


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/xml",
        "garbage;;=",
        "\xff",
    ],
)
def test_content_type_of_a_request_does_not_matter(content_type):
    answer = ask(make(), "POST", "/v2/models/m/infer", json.dumps(request(1)).encode(), CONTENT_TYPE=content_type)
    assert answer.status == 200


def test_chunked_request_is_answered():
    body = json.dumps(request(1)).encode()
    chunked = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    assert ask(make(), "POST", "/v2/models/m/infer", body, **chunked).status == 200


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_request_is_answered(encoding, compress):
    request_json = json.dumps(binary_request(2)).encode()
    body = compress(request_json + np.array([1, 2], np.float32).tobytes())
    headers = {"Content-Encoding": encoding, "Inference-Header-Content-Length": str(len(request_json))}
    assert infer(make(), body, headers=headers).json()["outputs"][1]["data"] == [2.0, 4.0]


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
    """Make a model of two outputs of numbers that are the same as its input, with these labels."""
    outputs = by_name(TensorMetadata("a", "FP32", (ANY,)), TensorMetadata("b", "FP32", (ANY,)))
    inputs = by_name(TensorMetadata("x", "FP32", (ANY,)))
    metadata = ModelMetadata("m", "1", inputs, outputs, labels=labels)
    return FakeServable(metadata, lambda arrays: by_name(*(Tensor(name, "FP32", arrays["x"]) for name in "ab")))


def ask_for(name, **parameters):
    return {"name": name, "parameters": parameters}


def test_classes_are_strings_with_labels():
    model = classifier(("cat", "dog"))
    answer = infer(make(model), request(1, 3, 2, outputs=[ask_for("a", classification=2)]))
    assert answer.json()["outputs"] == [
        {"name": "a", "datatype": "BYTES", "shape": [2], "data": ["3.000000:1:dog", "2.000000:2"]}
    ]


def test_classes_are_returned_in_binary_as_other_strings():
    answer = infer(make(classifier()), request(1, 3, outputs=[ask_for("a", classification=1, binary_data=True)]))
    head, data = split(answer)
    assert head["outputs"] == [{"name": "a", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 14}}]
    assert data == b"\x0a\0\0\x003.000000:1"


def test_classes_are_returned_in_binary_if_the_request_says_so():
    _, data = split(infer(make(classifier()), request(1, 3, outputs=[ask_for("a", classification=1)], **BINARY)))
    assert data == b"\x0a\0\0\x003.000000:1"


def test_outputs_and_their_classes_mix():
    answer = infer(make(classifier()), request(1, 3, outputs=[{"name": "b"}, ask_for("a", classification=1)]))
    assert [output["data"] for output in answer.json()["outputs"]] == [[1.0, 3.0], ["3.000000:1"]]


def test_classification_of_strings_is_a_400():
    outputs = [ask_for("text", classification=1)]
    answer = infer(make(speaker(b"a")), request(1, outputs=outputs), target="/v2/models/speaker/infer")
    assert (answer.status, answer.json()) == (
        400,
        {"error": "output 'text': parameters.classification needs an output of numbers, but its datatype is BYTES"},
    )


# --- How long a request may wait


def waited(ns, timeout_us, model=None, **environ):
    """Request an inference that arrived this long ago, with a timeout; return the response."""
    body = json.dumps(request(1, parameters={"timeout": timeout_us})).encode()
    received = {"ovms_rest.received": time.monotonic_ns() - ns}
    return ask(make(model or doubler()), "POST", "/v2/models/m/infer", body, **{**received, **environ})


def test_late_request_is_a_503_with_the_time_it_was_queued():
    answer = waited(5_321_000, 1000)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    message = re.fullmatch(
        r"the request could not start within its timeout of 1000 us, it waited (\d+) us", answer.json()["error"]
    )
    assert int(message[1]) >= 5321


def test_late_request_is_not_inferred():
    seen = []
    assert waited(10**9, 1000, spy(seen)).status == 503
    assert seen == []


def test_late_request_is_counted_with_the_time_it_was_queued():
    model = doubler()
    waited(10**9, 1000, model)
    failures = {kind: failure for kind, failure in model.counters.read().failures.items() if failure.count}
    assert failures.keys() == {"timeout"}
    assert failures["timeout"].count == 1
    assert 10**9 <= failures["timeout"].ns < 60 * 10**9


@pytest.mark.parametrize("timeout_us", [0, 3_600_000_000])
def test_request_within_its_timeout_is_inferred(timeout_us):
    assert waited(10**9, timeout_us).status == 200


def test_request_without_a_start_time_was_not_queued():
    body = json.dumps(request(1, parameters={"timeout": 60_000_000})).encode()
    assert ask(make(), "POST", "/v2/models/m/infer", body).status == 200


def test_invalid_request_is_reported_before_a_late_one():
    body = json.dumps(request(1, parameters={"timeout": 1}, outputs=[{"name": "z"}])).encode()
    answer = ask(make(), "POST", "/v2/models/m/infer", body, **{"ovms_rest.received": 0})
    assert answer.status == 400


HOUR = 3600


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


# --- What the access log of the worker is told


def observe(model, body, observed=True):
    """Request an inference; return its record."""
    environ = {"ovms_rest.received": time.monotonic_ns() - 10**6, "ovms_rest.observed": observed}
    kept = {}

    def app(environ, start_response):
        kept["environ"] = environ
        return make(model)(environ, start_response)

    ask(app, "POST", "/v2/models/m/infer", body if isinstance(body, bytes) else json.dumps(body).encode(), **environ)
    return kept["environ"].get("ovms_rest.served")


def test_record_of_an_inference_has_model_times_and_id():
    served = observe(doubler(version="7"), request(1, id="42"))
    assert (served.model_name, served.model_version, served.id) == ("m", "7", "42")
    assert served.queue_ns >= 10**6
    assert min(served.input_ns, served.infer_ns, served.output_ns) > 0


def test_recorded_times_equal_the_counted_ones():
    model = doubler()
    served, seen = observe(model, request(1)), model.counters.read()
    assert served[2:6] == (seen.queue.ns, seen.compute_input.ns, seen.compute_infer.ns, seen.compute_output.ns)


def test_nothing_is_recorded_unless_observed():
    assert observe(doubler(), request(1), observed=False) is None


def test_request_that_cannot_be_decoded_is_recorded_without_an_id():
    served = observe(doubler(), b"{")
    assert (served.model_name, served.model_version, served.id) == ("m", "1", "")
    assert served.queue_ns >= 10**6
    assert served[3:6] == (0, 0, 0)


def test_request_that_does_not_fit_the_model_is_recorded_with_its_id():
    served = observe(doubler(), request(1, id="42", outputs=[{"name": "z"}]))
    assert (served.id, served[3:6]) == ("42", (0, 0, 0))


def test_late_request_is_recorded_with_its_id():
    served = observe(doubler(), request(1, id="42", parameters={"timeout": 1}))
    assert (served.id, served[3:6]) == ("42", (0, 0, 0))


def test_failed_inference_is_recorded_with_the_time_until_the_failure():
    served = observe(failing(InferenceError("failed")), request(1, id="42"))
    assert served.id == "42"
    assert served.input_ns > 0
    assert (served.infer_ns, served.output_ns) == (0, 0)


# --- Compression of responses


def test_compression_is_off_by_default():
    answer = infer(make(), request(1), headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert answer.json()["model_name"] == "m"


@pytest.mark.parametrize(("encoding", "decompress"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@pytest.mark.parametrize("keys", [{}, BINARY])
def test_response_is_compressed_if_enabled_and_requested(encoding, decompress, keys):
    plain = infer(make(), request(*range(100), **keys))
    answer = infer(make(response_compression=True), request(*range(100), **keys), headers={"Accept-Encoding": encoding})
    assert (answer.status, decompress(answer.body)) == (200, plain.body)
    assert answer.headers == plain.headers | {
        "content-encoding": encoding,
        "content-length": str(len(answer.body)),
        "vary": "Accept-Encoding",
    }


@pytest.mark.parametrize(
    "headers", [{}, *({"Accept-Encoding": value} for value in ("", "identity", "br", "*", "gzip;q=0"))]
)
def test_response_is_not_compressed_unless_requested(headers):
    answer = infer(make(response_compression=True), request(1), headers=headers)
    assert "content-encoding" not in answer.headers
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.json()["model_name"] == "m"


@pytest.mark.parametrize("target", [*GET_ROUTES, "/unknown"])
def test_only_inference_responses_are_compressed(target):
    answer = ask(make(response_compression=True), "GET", target, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert answer.body[:1] in (b"", b"{")


@errors
def test_errors_are_not_compressed(faulty, status, cause):
    def app(environ, start_response):
        return faulty(response_compression=True)(environ | {"HTTP_ACCEPT_ENCODING": "gzip"}, start_response)

    answer = cause(app)
    assert (answer.status, "content-encoding" in answer.headers) == (status, False)
    assert answer.json()["error"]


# --- CORS

OTHERS = [
    ("metadata", 200, lambda app: ask(app, "GET", "/v2")),
    ("liveness", 200, lambda app: ask(app, "GET", "/v2/health/live")),
    ("HEAD", 200, lambda app: ask(app, "HEAD", "/v2/models/m")),
    ("OPTIONS", 200, lambda app: ask(app, "OPTIONS", "/v2/models/m/infer")),
    ("OPTIONS *", 200, lambda app: ask(app, "OPTIONS", "*")),
    ("inference", 200, lambda app: infer(app, request(1))),
    ("binary inference", 200, lambda app: infer(app, request(1, **BINARY))),
]
every_answer = pytest.mark.parametrize(
    ("status", "cause"), [case[1:] for case in ERRORS + OTHERS], ids=[case[0] for case in ERRORS + OTHERS]
)


def cors_headers(answer):
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@every_answer
def test_cors_is_disabled_by_default(faulty, status, cause):
    answer = cause(faulty(allow_credentials=True, allowed_methods="GET", allowed_headers="X"))
    assert (answer.status, cors_headers(answer)) == (status, {})


@every_answer
def test_cors_headers_are_on_every_response_when_origins_are_set(faulty, status, cause):
    answer = cause(faulty(allowed_origins="*"))
    assert answer.status == status
    assert cors_headers(answer) == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "*",
        "access-control-allow-headers": "*",
        "access-control-expose-headers": "Inference-Header-Content-Length",
    }


def test_cors_headers_are_those_of_the_settings():
    settings = {
        "allowed_origins": "https://a.example",
        "allowed_methods": "GET, POST",
        "allowed_headers": "Content-Type",
        "allow_credentials": True,
    }
    assert cors_headers(ask(make(**settings), "OPTIONS", "/v2/models/m/infer")) == {
        "access-control-allow-origin": "https://a.example",
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "Content-Type",
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": "Inference-Header-Content-Length",
    }


# --- The start


def test_invalid_settings_are_reported_before_models_are_loaded():
    with pytest.raises(ConfigError) as caught:
        load_app({"OVMS_REST_MAX_BODY_BYTES": "x", "OVMS_REST_CONFIG": "/none"})
    assert caught.value.problems == ("OVMS_REST_MAX_BODY_BYTES: expected an integer from 1 to 2147483647, got 'x'",)


def test_invalid_environment_ends_the_process_with_its_lines(monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_config_list": 1, "mediapipe_config_list": [1]}')
    monkeypatch.setenv("OVMS_REST_CONFIG", str(config))
    with pytest.raises(SystemExit) as caught:
        get_app()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ovms_rest: {config}: model_config_list: expected an array, got 1",
        f"ovms_rest: {config}: mediapipe_config_list: is not supported: MediaPipe graphs are not served here; "
        "expected [], got [1]",
    ]
