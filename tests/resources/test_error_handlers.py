"""Error responses: the status, headers and body of each error."""

import pytest
from fake_app import FakeRegistry, FakeServable, ask, client_of, doubler, failing, infer, make, request

from ovms_rest import errors
from ovms_rest.app import create_app
from ovms_rest.resources.error_handlers import STATUSES, hand_on
from ovms_rest.settings import Settings

INTERNAL_ERROR = {"error": "internal error; the reason is in the server's log"}
PRIVATE = "/etc/private.key"


class Failing:
    def __init__(self, error):
        self.error = error

    def on_get(self, req, resp):
        raise self.error


def respond(error, path="/fails", method="GET"):
    """Return the response of an application whose only route, /fails, raises an error."""
    client = client_of({"/fails": Failing(error)})
    client.app.add_error_handler(errors.TryLaterError, hand_on)
    return client.simulate_request(method, path)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((400, error) for error in (errors.InvalidRequestError, errors.NotReadyError, errors.InvalidConfigError)),
        *((403, errors.ForbiddenError), (404, errors.NotFoundError), (412, errors.LoadFailedError)),
        *((413, errors.BodyTooLargeError), (415, errors.UnsupportedEncodingError)),
        *((500, errors.InferenceError), (500, errors.ReloadError)),
        *((503, error) for error in (errors.UnavailableError, errors.BusyError, errors.EndingError)),
    ],
)
def test_error_has_its_status_and_its_message_as_json(status, error):
    response = respond(error("reason"))
    assert (response.status_code, response.json) == (status, {"error": "reason"})
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (errors.BusyError(""), "retry-after", "1"),
        (errors.DeadlineError(1, 2000), "retry-after", "1"),
        (errors.UnsupportedEncodingError(""), "accept-encoding", "gzip, deflate, identity"),
        (errors.EndingError(""), "retry-after", None),
    ],
)
def test_error_has_its_headers(error, header, value):
    assert respond(error).headers.get(header) == value


def test_every_error_has_a_status():
    found, left = set(), [errors.ServingError]
    while left:
        found.update(subclasses := left.pop().__subclasses__())
        left += subclasses
    assert found == STATUSES.keys()


def test_error_without_content_is_204():
    response = respond(errors.NoContentError("no faces"))
    assert (response.status_code, response.content, "content-type" in response.headers) == (204, b"", False)


def test_deferred_request_is_passed_on_to_the_worker():
    with pytest.raises(errors.TryLaterError):
        respond(errors.TryLaterError(lambda: True))


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


def test_long_path_is_cut_in_the_message():
    path = "/" + "x" * 4000
    assert respond(None, path).json == {"error": f"path '{path[:300]}...' is unknown"}
    assert ask(make(), "PUT", f"/v2/models{path}").json() == {
        "error": f"method PUT is not allowed for '{f'/v2/models{path}'[:300]}...', allowed: GET, HEAD, OPTIONS"
    }


def test_wrong_method_is_405_with_the_allowed_ones():
    response = respond(None, method="POST")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, OPTIONS")
    assert response.json == {"error": "method POST is not allowed for '/fails', allowed: GET, OPTIONS"}


# --- In the application


@pytest.mark.parametrize(
    "bug", [RuntimeError(PRIVATE), KeyError(PRIVATE), ValueError(PRIVATE), OSError(2, PRIVATE), MemoryError(PRIVATE)]
)
def test_bug_is_a_500_whose_text_is_in_the_log_alone(bug):
    answer = infer(make(failing(bug)), request(1))
    assert (answer.status, answer.json()) == (500, INTERNAL_ERROR)
    assert PRIVATE not in answer.body.decode() + str(answer.headers)
    assert "Traceback (most recent call last)" in answer.log
    assert PRIVATE in answer.log


def test_missing_output_of_a_servable_is_a_bug():
    model = FakeServable(doubler().metadata, lambda arrays: {})
    assert infer(make(model), request(1)).json() == INTERNAL_ERROR


@pytest.mark.parametrize("target", ["/v2/models/m", "/v2/models/m/ready", "/v2/health/ready"])
def test_bug_of_the_registry_is_a_500_whose_text_is_in_the_log_alone(target):
    class BuggyRegistry(FakeRegistry):
        def find(self, name, version=None, explain=False):
            raise RuntimeError(PRIVATE)

        def check_ready(self):
            self.find("")

    answer = ask(create_app(BuggyRegistry(), Settings()), "GET", target)
    assert (answer.status, answer.json()) == (500, INTERNAL_ERROR)
    assert PRIVATE in answer.log


@pytest.mark.parametrize("accept", ["application/xml", "text/html", "image/*;q=0.1", "garbage", ""])
def test_error_is_json_whatever_the_client_accepts(accept):
    answer = ask(make(), "GET", "/unknown", headers={"Accept": accept})
    assert (answer.headers["content-type"], answer.json()) == (
        "application/json",
        {"error": "path '/unknown' is unknown"},
    )
