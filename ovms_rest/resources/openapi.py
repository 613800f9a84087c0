"""GET /v2/openapi.json: the API as an OpenAPI 3.1 document, with a path of its own for each model and pipeline."""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.models.registry import Entry
from ovms_rest.resources.openapi_models import ModelPaths
from ovms_rest.resources.openapi_routes import describe_components, describe_routes
from ovms_rest.resources.openapi_schemas import SCHEMAS

_DESCRIPTION = """\
The KServe v2 REST API of ovms_rest. Each model and pipeline that serves has a path of its own here, with the names, \
datatypes and shapes of its tensors, and an example that can be sent as it is.

HEAD is allowed wherever GET is, and OPTIONS on every path. The `Content-Type` of a request is neither required nor \
checked. Every error is `{"error": "<message>"}`. A control address serves all routes but those of inferences.
"""
_TAGS = {
    "inference": "Inferences with models and pipelines",
    "models": "Models and pipelines: metadata, states, statistics",
    "server": "The server and its health",
    "operation": "For operators",
}


class Entries(Protocol):
    """The registry."""

    entries: dict[str, Entry]


class OpenApi:
    """GET /v2/openapi.json; the document is made once for all requests."""

    def __init__(self, registry: Entries) -> None:
        """Begin without a document; `make` makes it."""
        self._registry = registry
        self._served: list[tuple[str, list[int]]] = []
        self._body = b""
        self._tag = ""

    def make(self) -> None:
        """Make the document for the registry's entries; in the arbiter, for the workers forked from then on."""
        self._served = self._list_served()
        self._body = orjson.dumps(describe_api(self._registry.entries))
        self._tag = hashlib.sha256(self._body).hexdigest()[:32]

    def renew(self) -> None:
        """Make the document again if other versions serve now; in a worker, which may have given up some."""
        if self._served != self._list_served():
            self.make()

    def _list_served(self) -> list[tuple[str, list[int]]]:
        return [(name, list(entry.versions)) for name, entry in self._registry.entries.items()]

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the document, or 304 if the client has it."""
        resp.set_header("ETag", f'"{self._tag}"')
        resp.set_header("Cache-Control", "no-cache")
        if any(tag in ("*", self._tag) for tag in req.if_none_match or ()):
            resp.status = 304
        else:
            resp.data = self._body

    on_head = on_get


def describe_api(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the document for a registry's entries."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ovms_rest",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": {**describe_routes(), **dict(ModelPaths().describe(entries))},
        "components": {"schemas": SCHEMAS, **describe_components()},
    }
