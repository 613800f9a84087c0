"""Error responses: the status, headers and body of each error."""

import falcon
import falcon.testing
import pytest

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
    TryLaterError,
    UnavailableError,
    UnsupportedEncodingError,
)
from ovms_rest.resources.error_handlers import STATUSES, hand_on, handle_serving_error, serialize_falcon_error
from ovms_rest.resources.routing import Request, Router


class Failing:
    """A resource that raises an error."""

    def __init__(self, error):
        self.error = error

    def on_get(self, req, resp):
        raise self.error


def respond(error, path="/fails", method="GET"):
    """Return the response of an application whose only route, /fails, raises an error."""
    app = falcon.App(router=Router(), request_type=Request)
    app.add_error_handler(ServingError, handle_serving_error)
    app.add_error_handler(TryLaterError, hand_on)
    app.set_error_serializer(serialize_falcon_error)
    app.add_route("/fails", Failing(error))
    return falcon.testing.TestClient(app).simulate_request(method, path)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("reason"), 400),
        (NotReadyError("reason"), 400),
        (ForbiddenError("reason"), 403),
        (NotFoundError("reason"), 404),
        (BodyTooLargeError("reason"), 413),
        (UnsupportedEncodingError("reason"), 415),
        (InferenceError("reason"), 500),
        (InvalidConfigError("reason"), 400),
        (LoadFailedError("reason"), 412),
        (UnavailableError("reason"), 503),
        (ReloadError("reason"), 500),
        (BusyError("reason"), 503),
        (EndingError("reason"), 503),
    ],
)
def test_error_has_its_status_and_its_message_as_json(error, status):
    response = respond(error)
    assert (response.status_code, response.json) == (status, {"error": "reason"})
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (BusyError(""), "retry-after", "1"),
        (DeadlineError(1, 2000), "retry-after", "1"),
        (UnsupportedEncodingError(""), "accept-encoding", "gzip, deflate, identity"),
        (EndingError(""), "retry-after", None),
    ],
)
def test_error_has_its_headers(error, header, value):
    assert respond(error).headers.get(header) == value


def test_every_error_has_a_status():
    errors, found = [ServingError], set()
    while errors:
        found.update(subclasses := errors.pop().__subclasses__())
        errors += subclasses
    assert found == STATUSES.keys()


def test_error_without_content_is_204():
    response = respond(NoContentError("no faces"))
    assert (response.status_code, response.content, "content-type" in response.headers) == (204, b"", False)


def test_unexpected_exception_is_500_without_its_text():
    response = respond(RuntimeError("secret"))
    assert response.status_code == 500
    assert response.json == {"error": "internal error; the reason is in the log of the server"}


def test_deferred_request_is_passed_on_to_the_worker():
    with pytest.raises(TryLaterError):
        respond(TryLaterError(lambda: True))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/x", "path '/x' is unknown"),
        ("/health", "path '/health' is unknown; GET /v2/health/live is the liveness probe"),
    ],
)
def test_unknown_path_is_404_with_a_hint_where_there_is_one(path, error):
    response = respond(None, path)
    assert (response.status_code, response.json) == (404, {"error": error})


def test_wrong_method_is_405_with_the_allowed_ones():
    response = respond(None, method="POST")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, OPTIONS")
    assert response.json == {"error": "method POST is not allowed for '/fails', allowed: GET, OPTIONS"}
