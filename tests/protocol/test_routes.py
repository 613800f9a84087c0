"""The path of a request: its authority, and the model of an inference; tests/resources/test_routing.py reads paths."""

import pytest

from ovms_rest.protocol.routes import drop_slash, read_authority, read_inference


@pytest.mark.parametrize(
    ("target", "authority"),
    [
        ("/v2", None),
        ("*", None),
        ("http://host:8000/v2", "host:8000"),
        ("http://user:secret@host/v2?a=http://b", "host"),
        ("HTTPS://[::1]:1", "[::1]:1"),
        ("/v2?http://host/", None),
    ],
)
def test_authority_is_that_of_an_absolute_target(target, authority):
    assert read_authority(target) == authority


@pytest.mark.parametrize(("path", "dropped"), [("/", "/"), ("/v2/", "/v2"), ("/v2", "/v2"), ("/v2//", "/v2/")])
def test_one_trailing_slash_is_dropped(path, dropped):
    assert drop_slash(path) == dropped


@pytest.mark.parametrize(
    ("path", "model", "version"),
    [
        ("/v2/models/m/infer", "m", None),
        ("/v2/models/m/versions/3/infer", "m", "3"),
        ("/v2/models/a b/infer", "a b", None),
        ("/v2/models/\u00c3\u00a9/infer", "\u00e9", None),  # as WSGI has UTF-8
    ],
)
def test_inference_has_its_model_and_version(path, model, version):
    assert read_inference("POST", path) == (model, version)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/m/infer"),
        ("POST", "/v2/models/m/ready"),
        ("POST", "/v2/models/a/b/infer"),
        ("POST", "/v2/models/m/versions/1/2/infer"),
        ("POST", "/infer"),
    ],
)
def test_other_request_is_not_an_inference(method, path):
    assert read_inference(method, path) is None
