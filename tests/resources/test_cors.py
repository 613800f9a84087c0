"""CORS headers as the settings have them; tests/test_app.py has responses of every kind."""

import pytest
from fake_app import INFER, ask, make


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [("GET", "/v2", 200), ("POST", "/v2", 405), ("GET", "/x", 404), ("OPTIONS", INFER, 200)],
)
def test_headers_are_the_settings_on_every_response(method, target, status):
    settings = {"allowed_origins": "https://a", "allowed_methods": "GET, POST", "allowed_headers": "X"}
    answer = ask(make(**settings, allow_credentials=True), method, target)
    assert answer.status == status
    assert {name: value for name, value in answer.headers.items() if name.startswith("access-control-")} == {
        "access-control-allow-origin": "https://a",
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "X",
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": "Inference-Header-Content-Length",
    }
