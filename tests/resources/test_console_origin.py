"""CORS for the console's page on the control address: one origin, and no more than it needs."""

import pytest

from ovms_rest.resources.console_origin import ConsoleOrigin, ConsolePorts

OWN = "http://host:9000"


def headers(method="GET", path="/v2", origin=OWN, host="host:8000", scheme="http", control=9000, **environ):
    origin_of = ConsoleOrigin(ConsolePorts(8000, control))
    return origin_of.find_headers(
        {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "HTTP_ORIGIN": origin,
            "HTTP_HOST": host,
            "wsgi.url_scheme": scheme,
            **environ,
        }
    )


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        (OWN, "host:8000", "http"),
        (OWN, "HOST:8000", "http"),
        (OWN, "host", "http"),
        ("https://host:9000", "host:8000", "https"),
        ("http://[::1]:9000", "[::1]:8000", "http"),
    ],
)
def test_origin_of_the_same_host_at_the_control_port_is_allowed(origin, host, scheme):
    found = headers(origin=origin, host=host, scheme=scheme)
    assert (found["Access-Control-Allow-Origin"], found["Vary"]) == (origin, "Origin")


@pytest.mark.parametrize(
    "origin",
    ["http://host:9001", "http://host", "https://host:9000", "http://other:9000", "null", "", "http://host:9000.evil"],
)
def test_other_origins_are_not_allowed(origin):
    assert headers(origin=origin) == {}


def test_nothing_is_allowed_without_a_control_port():
    assert headers(control=None) == {}
    assert headers(control=None, origin="http://host") == {}


def test_request_without_its_head_gets_no_headers():
    assert ConsoleOrigin(ConsolePorts(8000, 9000)).find_headers({"HTTP_ORIGIN": OWN}) == {}


@pytest.mark.parametrize(
    ("method", "path", "is_open"),
    [
        *((method, "/v1/config", True) for method in ("GET", "HEAD")),
        *(("POST", f"/v2/models/m{version}/infer", True) for version in ("", "/versions/1")),
        ("POST", "/v1/models/m:predict", True),
        ("POST", "/v2/repository/models/m/load", False),
        ("POST", "/v2/logging", False),
        ("POST", "/v1/config/reload", False),
        ("DELETE", "/v2/models/m/infer", False),
    ],
)
def test_only_reading_and_inferences_are_allowed(method, path, is_open):
    assert bool(headers(method, path)) is is_open
    assert bool(headers("OPTIONS", path, HTTP_ACCESS_CONTROL_REQUEST_METHOD=method)) is is_open
