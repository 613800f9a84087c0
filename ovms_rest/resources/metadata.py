"""Metadata of the server and of models."""

from collections.abc import Sequence

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.models.servable import Registry

# Exactly those that work.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)


class ServerDescription:
    """GET /v2."""

    def __init__(self, extensions: Sequence[str]) -> None:
        self._body = orjson.dumps({"name": "ovms_rest", "version": __version__, "extensions": extensions})

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the name, the version and the extensions of the server."""
        resp.data = self._body

    on_head = on_get


class ModelDescription:
    """GET /v2/models/{name}[/versions/{version}]."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Respond with the names, datatypes and shapes of the model's tensors."""
        servable = self._registry.find(name, version, explain=True)
        servable.counters.answer("ModelMetadata")
        resp.data = orjson.dumps(servable.metadata.to_json(self._registry.versions(name)))

    on_head = on_get
