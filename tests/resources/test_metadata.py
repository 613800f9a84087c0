"""Metadata of the server and of models."""

import falcon
import orjson
import pytest
from fake_app import ask, doubler, make, servable
from falcon.testing import create_req

from ovms_rest import __version__
from ovms_rest.resources.metadata import ServerDescription


def test_server_metadata_is_returned():
    answer = ask(make(), "GET", "/v2")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "name": "ovms_rest",
        "version": __version__,
        "extensions": [
            *("binary_tensor_data", "classification", "logging", "model_configuration", "model_repository"),
            *("parameters", "schedule_policy", "statistics"),
        ],
    }


def test_the_server_names_the_extensions_that_it_was_given():
    response = falcon.Response()
    ServerDescription(["a", "b"]).on_get(create_req(), response)
    assert orjson.loads(response.render_body())["extensions"] == ["a", "b"]


@pytest.mark.parametrize("target", ["/v2/models/m", "/v2/models/m/versions/1"])
def test_model_metadata_is_returned(target):
    answer = ask(make(), "GET", target)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "name": "m",
        "versions": ["1"],
        "platform": "OpenVINO",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
        "outputs": [{"name": "n", "datatype": "INT64", "shape": [1]}, {"name": "y", "datatype": "FP32", "shape": [-1]}],
    }


def test_model_metadata_has_the_rt_info():
    rt_info = {"model_info": {"labels": "cat dog", "nested": {"a": "1"}}}
    model = servable(None, {"x": ("FP32", ())}, {"y": ("FP32", None)}, rt_info=rt_info)
    assert ask(make(model), "GET", "/v2/models/m").json()["rt_info"] == rt_info


def test_a_request_for_the_metadata_of_a_model_is_counted():
    model = doubler()
    ask(make(model), "GET", "/v2/models/m/versions/1")
    asked = {question: count for question, count in model.counters.read().questions.items() if count}
    assert asked == {"ModelMetadata": 1}


def test_metadata_of_an_unknown_model_is_a_404_with_the_reason():
    answer = ask(make(), "GET", "/v2/models/n")
    assert (answer.status, answer.json()) == (404, {"error": "no model 'n' of version None"})
