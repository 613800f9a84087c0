"""The one way out for errors: the table from errors to statuses, and their form, `{"error": "<message>"}`."""

from typing import Any

import falcon

from ovms_rest.errors import (
    BodyTooLargeError,
    BusyError,
    DeadlineError,
    EndingError,
    ForbiddenError,
    InferenceError,
    InvalidConfigError,
    InvalidRequestError,
    LoadFailedError,
    NoContentError,
    NotFoundError,
    NotReadyError,
    ReloadError,
    ServingError,
    UnavailableError,
    UnsupportedEncodingError,
)
from ovms_rest.protocol.encoding import encode_error
from ovms_rest.protocol.routes import OUTSIDE
from ovms_rest.resources.entry_points import find_hint

STATUSES: dict[type[ServingError], int] = {
    NoContentError: 204,
    InvalidRequestError: 400,
    ForbiddenError: 403,
    NotFoundError: 404,
    BodyTooLargeError: 413,
    UnsupportedEncodingError: 415,
    NotReadyError: 400,
    InvalidConfigError: 400,
    LoadFailedError: 412,
    UnavailableError: 503,
    ReloadError: 500,
    BusyError: 503,
    EndingError: 503,
    InferenceError: 500,
    DeadlineError: 503,
}

# What a client could not read from the status and the message alone.
_HEADERS: dict[type[ServingError], dict[str, str]] = {
    BusyError: {"Retry-After": "1"},
    DeadlineError: {"Retry-After": "1"},
    UnsupportedEncodingError: {"Accept-Encoding": "gzip, deflate, identity"},
}


def handle_serving_error(req: falcon.Request, resp: falcon.Response, error: ServingError, params: Any) -> None:
    """Answer an error of ours."""
    resp.status = STATUSES[type(error)]
    if resp.status == 204:  # which has neither body nor Content-Type
        return
    resp.set_headers(_HEADERS.get(type(error), {}))
    resp.content_type = falcon.MEDIA_JSON
    resp.data = encode_error(str(error))


def hand_on(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """Leave an error to the worker, as it is."""
    raise error


def serialize_falcon_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Write the errors that Falcon finds: unknown paths, wrong methods, and the 500 that a bug becomes."""
    if isinstance(error, falcon.HTTPRouteNotFound):
        if req.path == OUTSIDE:
            message = f"the path is not below {req.env['SCRIPT_NAME']!r}, where the service is mounted by SCRIPT_NAME"
        else:
            hint = find_hint(req.path)
            message = f"path {req.path!r} is unknown{hint and '; '}{hint}"
    elif isinstance(error, falcon.HTTPMethodNotAllowed):
        allowed = (error.headers or {}).get("Allow") if isinstance(error.headers, dict) else None
        message = f"method {req.method} is not allowed for {req.path!r}, allowed: {allowed}"
    elif error.status_code == 500:
        message = "internal error; the reason is in the log of the server"
    else:
        message = error.description or str(error.status)
    resp.content_type = falcon.MEDIA_JSON
    resp.data = encode_error(message)
