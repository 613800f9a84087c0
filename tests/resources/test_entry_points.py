"""Entry points of the API, and hints for clients of other servers."""

import pytest

from ovms_rest.resources.entry_points import find_hint


def test_root_lists_existing_routes(service):
    answer = service.get("/")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert (body["name"], list(body)) == ("ovms_rest", ["name", "version", "routes"])
    for route in body["routes"].values():
        method, path = route.split()
        found = service.request(method, path.replace("{name}", "relu"), b"" if method == "POST" else None)
        assert found.status != 405
        assert "is unknown" not in found.body.decode()
        assert found.status in ((200, 404) if path == "/metrics" else (400,) if method == "POST" else (200,))


def test_models_are_listed_with_their_versions_and_states(service):
    for path in ("/v2/models", "/v2/models/"):
        answer = service.get(path)
        assert answer.status == 200
        models = {model["name"]: model["versions"] for model in answer.json()["models"]}
        assert models["relu"] == [{"version": "1", "state": "AVAILABLE"}]
        assert sorted(models) == sorted(service.get("/v1/config").json())


@pytest.mark.parametrize("path", ["/", "/v2/models"])
def test_entry_points_allow_get_and_head_only(service, path):
    assert service.request("HEAD", path).status == 200
    answer = service.request("POST", path, b"")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        *(
            (path, "/v2/models/{name}/infer")
            for path in (
                "/v3/chat/completions",
                *("/predictions/x", "/invocations", "/v2/models/x/predict"),
            )
        ),
        *(("/v1/models", "/v2/models"), ("/v1/models/x/labels/stable", "/v1/models/{name}/versions/{version}")),
        ("/v1/models/x/labels/stable:predict", "/v1/models/{name}/versions/{version}"),
        *(("/docs", "GET /"), ("/openapi.json", "GET /")),
        *(("/health", "/v2/health/live"), ("/v2/ready", "/v2/health/ready")),
    ],
)
def test_paths_of_other_servers_name_the_route_to_use(service, path, named):
    for method in ("GET", "POST"):
        answer = service.request(method, path, b"" if method == "POST" else None)
        assert answer.status == 404
        assert answer.json()["error"].startswith(f"path '{path}' is unknown; ")
        assert named in answer.json()["error"]


def test_other_paths_have_no_hint():
    assert find_hint("/unknown") == ""
