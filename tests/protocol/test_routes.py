"""The path of a request, its authority, and the model of an inference."""

import pytest

from ovms_rest.protocol.routes import OUTSIDE, drop_slash, read_authority, read_inference, read_path, read_script_name


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/api/v2", "/v2"),
        ("/%61pi/v2", "/v2"),
        ("/api/v2/", "/v2"),
        ("/api/v2?/api", "/v2"),
        ("http://x/api/v2", "/v2"),
        ("/api", "/"),
        ("/api/", "/"),
        ("/api//v2", "//v2"),
        ("/api/v2/models/a%2Fb%2f", "/v2/models/a%2Fb%2f"),
        ("/api/v2/models/a%252Fb", "/v2/models/a%2Fb"),
        ("*", "*"),
    ],
)
def test_script_name_matches_whole_segments(target, path):
    assert read_path(target, "/api") == path


@pytest.mark.parametrize(
    "target",
    [
        *("/apiv2", "/apiv2/v2", "/v2", "/", "/ap", "/api%2Fv2", "//api/v2", "api/v2"),
        *("http://x", "http://api/v2", "http:/api/v2", "x", "/API/v2"),
    ],
)
def test_other_targets_are_outside_the_script_name(target):
    assert read_path(target, "/api") == OUTSIDE


@pytest.mark.parametrize(
    ("variable", "name"),
    [("", ""), ("/", ""), ("/api", "/api"), ("/api/", "/api"), ("api", "/api"), ("/ä", "/\xc3\xa4")],
)
def test_script_name_begins_with_a_slash_and_does_not_end_with_one(variable, name):
    assert read_script_name(variable) == name


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
        ("/v2/models/m/versions/0/infer", "m", "0"),
        ("/v1/models/m:predict", "m", None),
        ("/v1/models/m/versions/3:predict", "m", "3"),
        ("/v1/models/m/versions/0:predict", "m", None),
        ("/v1/models/\u00c3\u00a9:1:predict", "\u00e9:1", None),
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
        ("GET", "/v1/models/m:predict"),
        ("POST", "/v1/models/m:classify"),
        ("POST", "/v1/models/m"),
        ("POST", "/v1/models/m/predict"),
        ("POST", "/v1/models/m/labels/stable:predict"),
        ("POST", "/v1/models/a/b:predict"),
        ("POST", "/v2/models/m:predict"),
    ],
)
def test_other_request_is_not_an_inference(method, path):
    assert read_inference(method, path) is None
