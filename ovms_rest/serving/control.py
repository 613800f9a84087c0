"""The resources that tell and change what is served, in the form of the OpenVINO Model Server."""

import time
from typing import Any, Protocol

import falcon
import orjson

from ovms_rest.errors import InvalidRequestError, TryLaterError
from ovms_rest.serving.body import read_body

# How often a worker that can do nothing else meanwhile looks whether a reload has ended.
_PAUSE_SECONDS = 0.05


class Statuses(Protocol):
    """What is served."""

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's form."""


class Reloading(Protocol):
    """What reloads."""

    def request(self, ticket: dict[str, int]) -> dict[str, Any] | None:
        """Reload; return the status of all models, None when nothing has changed.

        Raises TryLaterError until that is done, with the same ticket to be shown again, and ReloadError.
        """


class RepositoryIndex:
    """POST /v2/repository/index, of Triton's model repository extension."""

    def __init__(self, models: Statuses, max_body_bytes: int) -> None:
        """Take what is served."""
        self._models = models
        self._max_body_bytes = max_body_bytes

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer every version with its state, and the reason of one that does not serve; the body may be empty."""
        only_ready = self._read_ready(bytes(read_body(req.env, self._max_body_bytes, None)))
        index = []
        for name, entry in self._models.status().items():
            for item in entry["model_version_status"]:
                ready = item["state"] == "AVAILABLE"
                reason = item["status"]["error_message"]
                if ready or not only_ready:
                    state = "READY" if ready else "UNAVAILABLE"
                    shown = {"name": name, "version": item["version"], "state": state}
                    index.append(shown if reason == "OK" else {**shown, "reason": reason})
        resp.data = orjson.dumps(index)

    @staticmethod
    def _read_ready(body: bytes) -> bool:
        """Read the one key of the request, `ready`: whether only what serves is asked for."""
        if not body.strip():
            return False
        try:
            root = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the request is not valid JSON: {error}") from error
        if type(root) is not dict or type(root.get("ready", False)) is not bool:
            raise InvalidRequestError('the request has to be empty, or an object such as {"ready": true}')
        return bool(root.get("ready", False))


class ConfigStatus:
    """GET /v1/config."""

    def __init__(self, models: Statuses) -> None:
        """Take what is served."""
        self._models = models

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the status of all versions."""
        resp.data = orjson.dumps(self._models.status())

    on_head = on_get


class ConfigReload:
    """POST /v1/config/reload."""

    def __init__(self, models: Statuses, reloads: Reloading) -> None:
        """Take what is served and what reloads it."""
        self._models = models
        self._reloads = reloads

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the status of all versions when they serve: 201 when something was reloaded, 200 when not."""
        ticket: dict[str, int] = req.env.setdefault("ovms_rest.ticket", {})
        while True:
            try:
                statuses = self._reloads.request(ticket)
                break
            except TryLaterError:
                if "ovms_rest.buffers" in req.env:  # our own worker asks again itself
                    raise
                time.sleep(_PAUSE_SECONDS)
        resp.status = 200 if statuses is None else 201
        resp.data = orjson.dumps(self._models.status() if statuses is None else statuses)
