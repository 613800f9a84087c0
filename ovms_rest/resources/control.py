"""Resources to show the status of models, to reload, and to load and unload models."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import falcon
import orjson

from ovms_rest.errors import InvalidRequestError, TryLaterError
from ovms_rest.protocol.words import cut, describe, explain_invalid_json, explain_json_error
from ovms_rest.resources.body import read_body
from ovms_rest.resources.permission import Permission

# The limit of a body, as received and after decompression: the configuration of a model is smaller.
MAX_BODY_BYTES = 2**20

# How often gunicorn's own workers, which do nothing else meanwhile, check whether a change has been made.
_PAUSE_SECONDS = 0.05

Ticket = dict[str, Any]
T = TypeVar("T")


class Statuses(Protocol):
    """Statuses of models."""

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's format."""


class Reloading(Statuses, Protocol):
    """Reloads all models."""

    def request(self, ticket: Ticket) -> tuple[bool, dict[str, Any]]:
        """Reload; return whether the registry changed, and the status of all models.

        Raises TryLaterError until that is done, and then takes the same ticket; ReloadError if it failed.
        """


class ModelChanges(Protocol):
    """Loads and unloads models. Both raise TryLaterError as above, NotFoundError, BusyError and ReloadError."""

    def load_model(self, ticket: Ticket, name: str, config: dict[str, Any] | None) -> None:
        """Load a model, with a configuration of its own or as the config file says."""

    def unload_model(self, ticket: Ticket, name: str, dependents: bool) -> None:
        """Unload a model, with `dependents` also the pipelines that use it."""


def wait_until_made(req: falcon.Request, ask: Callable[[Ticket], T]) -> T:
    """Return the result of a change when it has been made; our own worker catches TryLaterError and calls again."""
    ticket: Ticket = req.env.setdefault("ovms_rest.ticket", {})
    while True:
        try:
            return ask(ticket)
        except TryLaterError as error:
            if "ovms_rest.buffers" in req.env:
                raise
            while not error.is_due():
                time.sleep(_PAUSE_SECONDS)


def read_object(req: falcon.Request, max_body_bytes: int) -> dict[str, Any]:
    """Return the body of a request, a JSON object; {} if it is empty. Raises InvalidRequestError."""
    body = bytes(read_body(req.env, max_body_bytes))
    if not body.strip():
        return {}
    try:
        root = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the request is not valid JSON: {explain_invalid_json(body, error)}") from error
    if type(root) is not dict:
        raise InvalidRequestError(f"the request is {describe(root)}, expected an object or an empty body")
    return root


class RepositoryIndex:
    """POST /v2/repository/index, of Triton's model repository extension."""

    def __init__(self, models: Statuses, max_body_bytes: int) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the state of every version, and the reason if it does not serve; the body may be empty."""
        only_ready = read_object(req, self._max_body_bytes).get("ready", False)
        if type(only_ready) is not bool:
            raise InvalidRequestError(f"ready is {describe(only_ready)}, expected a boolean")
        index = []
        for name, entry in self._models.status().items():
            for item in entry["model_version_status"]:
                ready = item["state"] == "AVAILABLE"
                reason = "unloaded" if item["state"] == "END" else item["status"]["error_message"]
                shown = {"name": name, "version": item["version"], "state": "READY" if ready else "UNAVAILABLE"}
                if ready or not only_ready:
                    index.append(shown if reason == "OK" else {**shown, "reason": reason})
        resp.data = orjson.dumps(index)


class ModelControl:
    """POST /v2/repository/models/{name}/load and /unload, by the suffixes of Falcon's routes."""

    def __init__(self, changes: ModelChanges, permission: Permission, max_body_bytes: int) -> None:
        self._changes = changes
        self._permission = permission
        self._max_body_bytes = max_body_bytes

    def on_post_load(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Load a model, also one that serves already; respond with 200 when every worker serves it."""
        self._permission.check(req)
        config = self._read_config(read_parameters(req, self._max_body_bytes))
        wait_until_made(req, lambda ticket: self._changes.load_model(ticket, name, config))

    def on_post_unload(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Unload a model; respond with 200 when no worker serves it any more."""
        self._permission.check(req)
        dependents = read_parameters(req, self._max_body_bytes).get("unload_dependents", False)
        if type(dependents) is not bool:
            raise InvalidRequestError(f"parameters.unload_dependents is {describe(dependents)}, expected a boolean")
        wait_until_made(req, lambda ticket: self._changes.unload_model(ticket, name, dependents))

    @staticmethod
    def _read_config(parameters: dict[str, Any]) -> dict[str, Any] | None:
        """Return the object in the parameter `config`, JSON in a string; None without it."""
        for key in parameters:
            if key.startswith("file:"):
                raise InvalidRequestError(
                    f"parameters.{cut(key)}: files are not accepted over HTTP; put them into a directory of the server "
                    "and set base_path in parameters.config to it"
                )
        if "config" not in parameters:
            return None
        text = parameters["config"]
        if type(text) is not str:
            raise InvalidRequestError(f"parameters.config is {describe(text)}, expected a string with a JSON object")
        try:
            config = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(
                f"parameters.config is not valid JSON: {explain_json_error(text, error)}"
            ) from error
        if type(config) is not dict:
            raise InvalidRequestError(f"parameters.config holds {describe(config)}, expected an object")
        return config


def read_parameters(req: falcon.Request, max_body_bytes: int) -> dict[str, Any]:
    """Return the `parameters` of a request to load or unload, {} by default. Raises InvalidRequestError."""
    parameters = read_object(req, max_body_bytes).get("parameters", {})
    if type(parameters) is not dict:
        raise InvalidRequestError(f"parameters is {describe(parameters)}, expected an object")
    return parameters


class ConfigStatus:
    """GET /v1/config."""

    def __init__(self, models: Statuses) -> None:
        self._models = models

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the status of all versions."""
        resp.data = orjson.dumps(self._models.status())

    on_head = on_get


class ConfigReload:
    """POST /v1/config/reload."""

    def __init__(self, reloads: Reloading, permission: Permission) -> None:
        self._reloads = reloads
        self._permission = permission

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the status of all versions when they serve: 201 if the registry changed, else 200.

        Raises ForbiddenError for a web page of another site: anybody else may have the service read its own files.
        """
        self._permission.check_page(req)
        has_changed, statuses = wait_until_made(req, self._reloads.request)
        resp.status = 201 if has_changed else 200
        resp.data = orjson.dumps(statuses)
