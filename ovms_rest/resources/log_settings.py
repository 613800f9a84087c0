"""Triton's logging extension: the log's settings are read and changed while the service runs."""

from typing import Any

import falcon
import orjson

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.words import show
from ovms_rest.resources.control import read_object
from ovms_rest.resources.permission import Permission
from ovms_rest.shared_memory.log_levels import LOG_FORMATS, Changes, LogLevels

MAX_VERBOSE_LEVEL = 2**31 - 1


class Logging:
    """GET and POST /v2/logging."""

    def __init__(self, control: LogLevels, permission: Permission, max_body_bytes: int) -> None:
        self._control = control
        self._permission = permission
        self._max_body_bytes = max_body_bytes

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the settings."""
        resp.data = orjson.dumps(self._control.read())

    on_head = on_get

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Change the settings in the body, which may be empty, and respond with all settings."""
        self._permission.check(req)
        self._control.change(_choose_changes(read_object(req, self._max_body_bytes)))
        self.on_get(req, resp)


def _choose_changes(root: dict[str, Any]) -> Changes:
    """Return the settings in a request, without unknown keys. Raises InvalidRequestError if any of them is invalid."""
    if "log_file" in root:
        raise InvalidRequestError(
            "log_file cannot be changed while the service runs; --log_path or gunicorn's --error-logfile set it"
        )
    for key, (is_allowed, allowed) in _ALLOWED.items():
        if key in root and not is_allowed(root[key]):
            raise InvalidRequestError(f"{key} is {show(root[key])}, expected {allowed}")
    return {key: root[key] for key in _ALLOWED if key in root}


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_VERBOSE_LEVEL


def _is_format(value: Any) -> bool:
    return value in LOG_FORMATS


_FLAG = (_is_flag, "true or false")
_ALLOWED = {
    "log_info": _FLAG,
    "log_warning": _FLAG,
    "log_error": _FLAG,
    "log_verbose_level": (_is_level, f"an integer from 0 to {MAX_VERBOSE_LEVEL}"),
    "log_format": (_is_format, " or ".join(f'"{name}"' for name in LOG_FORMATS)),
}
