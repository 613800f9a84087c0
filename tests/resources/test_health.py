"""Health of the server and of models."""

import falcon
import pytest
from fake_app import FakeRegistry, ask, doubler, make
from falcon.testing import create_req

from ovms_rest.errors import EndingError
from ovms_rest.resources.health import ModelReady, Ready

NOT_SERVING = "model 'n' does not serve: no version"


@pytest.mark.parametrize(
    "target", ["/v2/health/live", "/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready"]
)
def test_healthy_server_answers_200_without_body(target):
    answer = ask(make(), "GET", target)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


def test_model_that_does_not_serve_makes_the_server_not_ready():
    answer = ask(make(reason=NOT_SERVING), "GET", "/v2/health/ready")
    assert (answer.status, answer.json()) == (400, {"error": NOT_SERVING})


def test_server_that_is_not_ready_is_live():
    assert ask(make(reason=NOT_SERVING), "GET", "/v2/health/live").status == 200


@pytest.mark.parametrize("reason", ["", NOT_SERVING])
def test_a_service_that_is_shutting_down_is_not_ready(reason):
    with pytest.raises(EndingError, match=r"^the service is shutting down$"):
        Ready(FakeRegistry(reason=reason), lambda: True, lambda: 1).on_get(create_req(), falcon.Response())


def test_the_readiness_of_a_model_is_counted():
    model = doubler()
    ModelReady(FakeRegistry(model)).on_get(create_req(), falcon.Response(), name="m", version="1")
    assert {question: count for question, count in model.counters.read().questions.items() if count} == {
        "ModelReady": 1
    }


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/v2/models/n/ready", "no model 'n' of version None"),
        ("/v2/models/m/versions/2/ready", "no model 'm' of version 2"),
    ],
)
def test_model_that_is_not_ready_is_a_404_with_the_reason(target, error):
    answer = ask(make(), "GET", target)
    assert (answer.status, answer.json()) == (404, {"error": error})
