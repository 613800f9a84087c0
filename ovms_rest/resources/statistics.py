"""Triton's statistics extension (protocol.md section 8)."""

from typing import Protocol

import falcon
import orjson

from ovms_rest.shared_memory.statistics import ModelStatistics


class StatisticsSource(Protocol):
    """Where the statistics come from."""

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return those of a version, of all versions of a model, or of all models. Raises NotFoundError."""


class Statistics:
    """GET /v2/models/stats and /v2/models/{name}[/versions/{version}]/stats."""

    def __init__(self, source: StatisticsSource) -> None:
        """Take where the statistics come from."""
        self._source = source

    def on_get(
        self, req: falcon.Request, resp: falcon.Response, name: str | None = None, version: str | None = None
    ) -> None:
        """Answer the statistics of what the path names."""
        statistics = self._source.statistics(name, version)
        resp.data = orjson.dumps({"model_stats": [model.to_json() for model in statistics]})

    on_head = on_get
