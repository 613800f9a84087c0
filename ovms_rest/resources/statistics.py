"""Triton's statistics extension (protocol/README.md section 8)."""

from typing import Protocol

import falcon
import orjson

from ovms_rest.shared_memory.statistics import ModelStatistics


class StatisticsSource(Protocol):
    """The counters of all workers."""

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the statistics of a version, of all versions of a model, or of all models. Raises NotFoundError."""


class Statistics:
    """GET /v2/models/stats and /v2/models/{name}[/versions/{version}]/stats."""

    def __init__(self, source: StatisticsSource) -> None:
        self._source = source

    def on_get(
        self, req: falcon.Request, resp: falcon.Response, name: str | None = None, version: str | None = None
    ) -> None:
        """Respond with the statistics of the models in the path."""
        statistics = self._source.statistics(name, version)
        resp.data = orjson.dumps({"model_stats": [model.to_json() for model in statistics]})

    on_head = on_get
