"""Entry points: GET / lists the routes, GET /v2/models the models; and hints for the paths of other servers."""

import re
from typing import Protocol

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.resources.control import Statuses

_ROUTES = {
    "server metadata": "GET /v2",
    "OpenAPI document, with the inputs and outputs of all models": "GET /v2/openapi.json",
    "models and their states": "GET /v2/models",
    "metadata of a model": "GET /v2/models/{name}",
    "inference": "POST /v2/models/{name}/infer",
    "liveness": "GET /v2/health/live",
    "readiness": "GET /v2/health/ready",
    "status of all models with the reasons of failures": "GET /v1/config",
    "statistics": "GET /v2/models/stats",
    "metrics": "GET /metrics",
}

_CONSOLE = {"console, for browsers": "GET /console"}
# What a client may ask for by Accept; the first for those that take both alike.
_FORMS = (falcon.MEDIA_JSON, falcon.MEDIA_HTML)

_PREDICT = "use POST /v2/models/{name}/infer with requests of KServe v2"
# Paths of other servers, and the routes to use instead.
_HINTS = tuple(
    (re.compile(pattern), hint)
    for pattern, hint in (
        (r"/v1/models/[^:]+:\w+", f"TensorFlow Serving's API is not served; {_PREDICT}"),
        (r"/v1/models/[^/]+(/versions/[^/]+|/labels/[^/]+)?/metadata", "GET /v2/models/{name} returns the metadata"),
        (r"/v1/models(/.*)?", "GET /v2/models lists the models, GET /v2/models/{name}/ready is the readiness of one"),
        (r"/v3(/.*)?", f"OVMS's generative API is not served; {_PREDICT}"),
        (
            r"/(docs|redoc|swagger.*|openapi\.(json|ya?ml)|api)",
            "GET /v2/openapi.json describes all routes, GET / lists the main ones",
        ),
        (r"/(v2/)?(health|healthz|livez?|ping|status)", "GET /v2/health/live is the liveness probe"),
        (r"/(readyz?|v2/(ready|live))", "GET /v2/health/ready and GET /v2/health/live are the probes"),
        (r"/v2/models/[^/]+(/versions/[^/]+)?([:/](predict|inference|explain|generate))", _PREDICT),
        (r"/(predict|invocations|predictions/.*|infer|v2/infer)", _PREDICT),
        (r"/v2/repository/models(/[^/]+)?", "POST /v2/repository/index lists the models"),
        (r"/v1/config/.*|/config", "GET /v1/config returns the status of all models"),
    )
)


def find_hint(path: str) -> str:
    """Return a hint to the route that replaces a path of another server, "" for any other path."""
    return next((hint for pattern, hint in _HINTS if pattern.fullmatch(path)), "")


class Console(Protocol):
    """The console: whether the settings turn it on, and whether this process serves it."""

    is_on: bool

    def is_here(self) -> bool:
        """Return whether this process serves the console."""


class EntryPoints:
    """GET /."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        routes = {**_ROUTES, **_CONSOLE} if console and console.is_on else _ROUTES
        self._body = orjson.dumps({"name": "ovms_rest", "version": __version__, "routes": routes})

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the routes and their purposes; redirect browsers to the console."""
        resp.data = self._body
        if self._console and self._console.is_here():
            resp.set_header("Vary", "Accept")
            if req.client_prefers(_FORMS) == falcon.MEDIA_HTML:
                resp.status = 302
                resp.set_header("Location", _find_console(req))

    on_head = on_get


def _find_console(req: falcon.Request) -> str:
    """Return the console's URL relative to that of the request, for a proxy may have removed a prefix of the path."""
    last = str(req.env.get("RAW_URI", "/")).partition("?")[0].rpartition("/")[2]
    return f"./{last}/console" if last else "./console"


class Models:
    """GET /v2/models."""

    def __init__(self, models: Statuses) -> None:
        self._models = models

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with all models and pipelines, each with its versions and their states."""
        models = [
            {
                "name": name,
                "versions": [
                    {"version": item["version"], "state": item["state"]} for item in entry["model_version_status"]
                ],
            }
            for name, entry in self._models.status().items()
        ]
        resp.data = orjson.dumps({"models": models})

    on_head = on_get
