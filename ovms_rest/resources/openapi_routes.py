"""The routes of the OpenAPI document, a row each.

To describe a new route, add its row; the test of this module fails for a route without one.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ovms_rest.resources.openapi_schemas import Schema, refer

Responses = Mapping[str, Schema]

JSON = "application/json"
BINARY = "application/octet-stream"
FORM = "multipart/form-data"
IMAGE = "image/*"
TEXT = "text/plain"

# The meaning of each status of an error; the text of one that needs more is in its row.
_ERRORS = {
    400: "The request is invalid; the message says what was wrong.",
    403: "The change is not allowed from where the request came; the message names the setting that allows it.",
    404: "There is no such model or version, or it does not serve.",
    405: "The path has no such method; `Allow` lists those that it has.",
    408: "The request did not arrive in time.",
    412: "A model could not be loaded; the message has the reason.",
    413: "The body is over the limit.",
    415: "The `Content-Encoding` is not supported.",
    431: "The headers are over the limit.",
    500: "A bug, or an inference that failed; the server's log has the reason.",
    503: "Overload, a `timeout` that has passed, or a service that is shutting down.",
}
# Every route may respond with these.
_COMMON = (400, 405, 408, 431, 500, 503)
_OF_BODIES = (413, 415)
_RETRY_AFTER: Schema = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until the next try."}}


class Route(NamedTuple):
    """A route: its method, path, tag, purpose, and the schema of its response in JSON, None without a body.

    `errors` are statuses beyond those of every route; `body` is the schema of the request's body, which may be empty.
    `more` are responses of other kinds.
    """

    method: str
    path: str
    tag: str
    summary: str
    schema: Schema | None = None
    errors: tuple[int, ...] = ()
    body: Schema | None = None
    more: Responses = MappingProxyType({})


_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"
_TFS = ("/v1/models/{name}", "/v1/models/{name}/versions/{version}")


def _of_models(suffix: str, summary: str, schema: Schema | None) -> tuple[Route, Route]:
    """Return the two routes of a model: of its highest version that serves, and of one version."""
    first = Route("GET", f"{_MODEL}{suffix}", "models", summary, schema, (404,))
    return first, first._replace(path=f"{_VERSION}{suffix}", summary=f"{summary}, of one version")


def _of_tensorflow_serving() -> Iterator[Route]:
    """Yield the routes of TensorFlow Serving's API besides predictions."""
    for path, which in zip(_TFS, ("all versions", "one version"), strict=True):
        status = f"The states of {which}, in TensorFlow Serving's format"
        yield Route("GET", path, "models", status, refer("ModelStatus"), (404,))
        metadata = "Metadata, in TensorFlow Serving's format"
        yield Route("GET", f"{path}/metadata", "models", metadata, refer("SignatureMetadata"), (404,))
        for verb in ("classify", "regress"):
            yield Route(
                "POST", f"{path}:{verb}", "inference", "400: OpenVINO models have no such signature", errors=(404,)
            )


_METRICS: Responses = {"200": {"description": "Metrics", "content": {TEXT: {"schema": {"type": "string"}}}}}
_RELOADED: Responses = {"201": {"description": "Something changed", "content": {JSON: {"schema": refer("Statuses")}}}}

_HTML = "text/html; charset=utf-8"
_TO_CONSOLE: Responses = {"302": {"description": "To the console, for clients that prefer HTML"}}
_CONSOLE: Responses = {
    "200": {"description": "The page", "content": {_HTML: {"schema": {"type": "string"}}}},
    "304": {"description": "The page has not changed"},
}

ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "server", "The main routes; browsers get the console", refer("EntryPoints"), more=_TO_CONSOLE),
    Route("GET", "/v2", "server", "Name, version and extensions of the server", refer("Server")),
    Route(
        "GET",
        "/v2/openapi.json",
        "server",
        "This document",
        {"type": "object"},
        more={"304": {"description": "The document has not changed"}},
    ),
    Route("GET", "/v2/health/live", "server", "200 while the server responds"),
    Route(
        "GET", "/v2/health/ready", "server", "200 when every model and pipeline serves, otherwise 400 with the reasons"
    ),
    Route("GET", "/v2/models", "models", "All models and pipelines with the states of their versions", refer("Models")),
    *_of_models("", "Metadata: inputs and outputs", refer("ModelMetadata")),
    *_of_models("/ready", "200 when the model serves, otherwise 404 with the reason", None),
    *_of_models("/config", "Configuration, in Triton's format", refer("ModelConfiguration")),
    *_of_models("/stats", "Statistics, in Triton's format", refer("Statistics")),
    *_of_tensorflow_serving(),
    Route("GET", "/v2/models/stats", "models", "Statistics of all models, in Triton's format", refer("Statistics")),
    Route(
        "POST",
        "/v2/repository/index",
        "models",
        "All versions with their states, in Triton's format",
        refer("Index"),
        body=refer("IndexRequest"),
    ),
    Route(
        "POST",
        "/v2/repository/models/{name}/load",
        "operation",
        "Load a model or pipeline",
        errors=(403, 404, 412),
        body=refer("LoadRequest"),
    ),
    Route(
        "POST",
        "/v2/repository/models/{name}/unload",
        "operation",
        "Unload a model or pipeline",
        errors=(403, 404, 412),
        body=refer("UnloadRequest"),
    ),
    Route("GET", "/v2/logging", "operation", "The settings of the log", refer("LogSettings")),
    Route(
        "POST",
        "/v2/logging",
        "operation",
        "Change settings of the log",
        refer("LogSettings"),
        (403,),
        refer("LogChanges"),
    ),
    Route("GET", "/v1/config", "operation", "The status of all models, in OVMS's format", refer("Statuses")),
    Route(
        "POST",
        "/v1/config/reload",
        "operation",
        "Load changes to the config and to the model files",
        refer("Statuses"),
        (403, 412),
        more=_RELOADED,
    ),
    Route(
        "GET", "/metrics", "operation", "Prometheus metrics; 404 unless they are enabled", errors=(404,), more=_METRICS
    ),
    Route("GET", "/console", "operation", "The console, for browsers", errors=(404,), more=_CONSOLE),
    Route(
        "GET",
        "/console/settings",
        "operation",
        "The settings of the console",
        refer("ConsoleSettings"),
        (404,),
    ),
    Route(
        "GET",
        "/console/errors",
        "operation",
        "The last warnings and errors in the log",
        refer("ConsoleErrors"),
        (403, 404),
    ),
)

_PARAMETERS: dict[str, Schema] = {
    "name": {
        "name": "name",
        "in": "path",
        "required": True,
        "description": "The name of a model or pipeline, percent-encoded.",
        "schema": {"type": "string", "minLength": 1},
    },
    "version": {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "A version that serves; a pipeline has version 1 only.",
        "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,18}$"},
    },
    "version_or_0": {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "A version that serves, or 0 for the default.",
        "schema": {"type": "string", "pattern": "^(0|[1-9][0-9]{0,18})$"},
    },
}
# The header is described here and not as a parameter: tools would send it with JSON, too.
_BINARY_BODY: Schema = {
    "schema": {
        "description": "With the header `Inference-Header-Content-Length: N`, the first N bytes are the request in "
        "JSON, and the elements of the inputs without `data` follow, little-endian, in row-major order. Without the "
        "header, the body is the elements of the only input; its shape is that of the model, with an open dim computed "
        "from the size, or the one in the header `X-Tensor-Shape: 1,224,224,3`."
    }
}
_FORM_BODY: Schema = {"schema": {"type": "object", "description": "A part for each input, named by it."}}
_IMAGE_BODY: Schema = {"schema": {"description": "One encoded image, for the only input."}}
_INFERRED: Responses = {
    "200": {
        "description": "The outputs: in JSON, or as binary tensors after the JSON if the request asks for them",
        "headers": {
            "Inference-Header-Content-Length": {
                "schema": {"type": "integer"},
                "description": "The bytes of JSON, if binary tensors follow.",
            }
        },
        "content": {JSON: {"schema": refer("InferenceResponse")}, BINARY: {}},
    },
    "204": {"description": "A demultiplexer of the pipeline made no shards"},
}


def describe_routes() -> dict[str, dict[str, Any]]:
    """Return the paths of the document for all routes of any model or none."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route)
    for path, summary in ((_MODEL, "Infer"), (_VERSION, "Infer with one version")):
        operation = describe_inference(f"{path}/infer", summary, refer("InferenceRequest"))
        operation["requestBody"]["content"] |= {FORM: _FORM_BODY, IMAGE: _IMAGE_BODY}
        paths[f"{path}/infer"] = {"post": operation}
    for path in _TFS:
        paths[f"{path}:predict"] = {"post": _describe_prediction(path)}
    return paths


def describe_inference(path: str, summary: str, schema: Schema) -> dict[str, Any]:
    """Return the operation of an inference route; `schema` is that of its body in JSON."""
    parameters = _describe_parameters(path)
    return {
        "tags": ["inference"],
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": schema},
                BINARY: _BINARY_BODY,
            },
        },
        "responses": {**_INFERRED, **_describe_errors((404, *_OF_BODIES))},
    }


def _describe_prediction(path: str) -> dict[str, Any]:
    predicted = {"description": "The outputs", "content": {JSON: {"schema": refer("PredictResponse")}}}
    return {
        "tags": ["inference"],
        "summary": "Infer, in the forms of TensorFlow Serving",
        "parameters": _describe_parameters(path),
        "requestBody": {"required": True, "content": {JSON: {"schema": refer("PredictRequest")}}},
        "responses": {
            "200": predicted,
            "204": _INFERRED["204"],
            **_describe_errors((404, *_OF_BODIES)),
        },
    }


def _describe(route: Route) -> dict[str, Any]:
    success: Schema = {"description": "Success"}
    if route.schema is not None:
        success["content"] = {JSON: {"schema": route.schema}}
    errors = (*route.errors, *(() if route.body is None else _OF_BODIES))
    operation: dict[str, Any] = {"tags": [route.tag], "summary": route.summary}
    if parameters := _describe_parameters(route.path):
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": False, "content": {JSON: {"schema": route.body}}}
    operation["responses"] = {"200": success, **route.more, **_describe_errors(errors)}
    return operation


def _describe_parameters(path: str) -> list[Schema]:
    version = "version_or_0" if path.startswith(_TFS) else "version"
    names = {"name": "name", "version": version}
    return [{"$ref": f"#/components/parameters/{names[name]}"} for name in names if f"{{{name}}}" in path]


def _describe_errors(statuses: tuple[int, ...]) -> Responses:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted({*_COMMON, *statuses})}


def describe_components() -> dict[str, Any]:
    """Return the responses and parameters that operations refer to."""
    return {"responses": dict(_describe_responses()), "parameters": _PARAMETERS}


def _describe_responses() -> Iterator[tuple[str, Schema]]:
    for status, text in _ERRORS.items():
        response: Schema = {"description": text, "content": {JSON: {"schema": refer("Error")}}}
        if status == 503:
            response["headers"] = _RETRY_AFTER
        yield str(status), response
