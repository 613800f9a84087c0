"""CORS headers, on responses of every kind."""

import falcon
import falcon.testing
import pytest

from ovms_rest.resources.cors import Cors
from ovms_rest.resources.health import Live
from ovms_rest.settings import Settings


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 200), ("POST", "/", 405), ("GET", "/x", 404)])
def test_headers_are_the_settings_on_every_response(method, path, status):
    settings = Settings(allowed_origins="https://a", allowed_methods="GET", allowed_headers="X", allow_credentials=True)
    app = falcon.App(middleware=[Cors(settings)])
    app.add_route("/", Live())
    response = falcon.testing.TestClient(app).simulate_request(method, path)
    assert response.status_code == status
    assert {name: value for name, value in response.headers.items() if name.startswith("access-control-")} == {
        "access-control-allow-origin": "https://a",
        "access-control-allow-methods": "GET",
        "access-control-allow-headers": "X",
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": "Inference-Header-Content-Length",
    }
