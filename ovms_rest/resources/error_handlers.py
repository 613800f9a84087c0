"""Error responses: the table from errors to HTTP statuses, and their JSON form, `{"error": "<message>"}`."""

from typing import Any

import falcon

from ovms_rest.errors import (
    BodyTooLargeError,
    BusyError,
    CrashedError,
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
    PausedError,
    ReloadError,
    ServingError,
    UnavailableError,
    UnsupportedEncodingError,
)
from ovms_rest.protocol.encoding import encode_error
from ovms_rest.protocol.routes import OUTSIDE
from ovms_rest.protocol.words import SHOWN_OF_PATH, quote
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
    CrashedError: 500,
    PausedError: 503,
    DeadlineError: 503,
}

# Headers that go with an error.
_HEADERS: dict[type[ServingError], dict[str, str]] = {
    BusyError: {"Retry-After": "1"},
    DeadlineError: {"Retry-After": "1"},
    UnsupportedEncodingError: {"Accept-Encoding": "gzip, deflate, identity"},
}


def handle_serving_error(req: falcon.Request, resp: falcon.Response, error: ServingError, params: Any) -> None:
    """Respond with the status and the message of an error."""
    resp.status = STATUSES[type(error)]
    if resp.status == 204:  # without body and Content-Type
        return
    resp.set_headers(_HEADERS.get(type(error), {}))
    if isinstance(error, PausedError):
        resp.set_header("Retry-After", str(error.seconds))
    resp.content_type = falcon.MEDIA_JSON
    resp.data = encode_error(str(error))


def hand_on(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """Pass an error on to the worker."""
    raise error


def serialize_falcon_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Write Falcon's own errors: an unknown path, a wrong method, and the 500 that an unexpected exception becomes."""
    path = quote(req.path, SHOWN_OF_PATH)
    if isinstance(error, falcon.HTTPRouteNotFound):
        if req.path == OUTSIDE:
            message = f"the path is not below {req.env['SCRIPT_NAME']!r}, where SCRIPT_NAME mounts the service"
        else:
            message = "; ".join(filter(None, (f"path {path} is unknown", find_hint(req.path))))
    elif isinstance(error, falcon.HTTPMethodNotAllowed):
        message = f"method {req.method} is not allowed for {path}, allowed: {dict(error.headers or {})['Allow']}"
    elif error.status_code == 500:
        message = "internal error; the reason is in the server's log"
    else:
        message = error.description or str(error.status)
    resp.content_type = falcon.MEDIA_JSON
    resp.data = encode_error(message)
