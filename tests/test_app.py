"""The application as a whole: its routes, versions of the real registry, and what holds for every response."""

import pytest
from fake_app import BINARY, GET_ROUTES, POST_ROUTES, ask, doubler, failing, infer, make, received, request

from ovms_rest.app import create_app, get_app, load_app
from ovms_rest.errors import ConfigError, InferenceError
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.settings import Settings

# --- Routes

UNKNOWN_PATHS = [
    *("/v1", "/v3", "/v2x", "/V2", "/v2/health", "/v2/health/alive", "/v2/health/live/x", "/v2/models/m/versions"),
    *("/v2/models/m/versions/1/x", "/v2/models/m/x", "/v2/models/m/ready/x", "/v2/models/m/infer/x"),
    *("/v2/models/m/n/infer", "/v2//", "/v2/health//live", "/%2Fv2", "/favicon.ico"),
]


@pytest.mark.parametrize("target", GET_ROUTES)
def test_get_route_responds(target):
    assert ask(make(), "GET", target).status == 200


@pytest.mark.parametrize("target", POST_ROUTES)
def test_inference_route_responds(target):
    assert infer(make(), request(1), target=target).status == 200


@pytest.mark.parametrize("target", UNKNOWN_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "FOO"])
def test_unknown_path_is_a_404_for_every_method(method, target):
    answer = ask(make(), method, target)
    assert answer.status == 404
    assert answer.json()["error"].startswith("path '/")


@pytest.mark.parametrize("target", ["/*", "//v2", "///v2/health/live", "/v2/models/m//"])
def test_path_that_looks_like_a_known_one_is_unknown(target):
    assert ask(make(), "GET", target).status == 404


@pytest.mark.parametrize(
    ("allowed", "method", "target"),
    [
        *(
            ({"GET", "HEAD", "OPTIONS"}, method, target)
            for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "FOO", "get")
            for target in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/ready")
        ),
        ({"GET", "HEAD", "OPTIONS"}, "DELETE", "/v2/models/unknown"),
        *(
            ({"POST", "OPTIONS"}, method, target)
            for method in ("GET", "PUT", "DELETE", "FOO")
            for target in POST_ROUTES
        ),
    ],
)
def test_wrong_method_is_a_405_that_names_the_allowed_ones(allowed, method, target):
    answer = ask(make(), method, target)
    assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, allowed)
    assert answer.json() == {
        "error": f"method {method} is not allowed for {target!r}, allowed: {answer.headers['allow']}"
    }


def test_method_that_falcon_reserves_is_not_allowed_either():
    assert ask(make(), "WEBSOCKET", "/v2").status == 405


@pytest.mark.parametrize(
    ("target", "methods"),
    [
        *((target, "GET, HEAD, OPTIONS") for target in [*GET_ROUTES, "/"]),
        *((target, "OPTIONS, POST") for target in POST_ROUTES),
    ],
)
def test_options_and_a_wrong_method_are_answered_with_the_methods_of_the_path(target, methods):
    options, wrong = ask(make(), "OPTIONS", target), ask(make(), "DELETE", target)
    assert (options.status, options.body) == (200, b"")
    assert (wrong.status, wrong.headers["allow"], options.headers["allow"]) == (405, methods, methods)


def test_options_of_the_server_answers_with_all_methods():
    answer = ask(make(), "OPTIONS", "*")
    assert (answer.status, answer.body) == (200, b"")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


@pytest.mark.parametrize("target", [*GET_ROUTES, "/v2/models/unknown", "/v2/models/m/versions/9/ready", "/unknown"])
@pytest.mark.parametrize("reason", ["", "model 'n' does not serve"])
def test_head_answers_as_get_without_the_body(target, reason):
    app = make(reason=reason, allowed_origins="*")
    head, get = ask(app, "HEAD", target), ask(app, "GET", target)
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
    assert head.headers["content-length"] == str(len(get.body))


def test_head_of_an_inference_route_is_a_405():
    answer = ask(make(), "HEAD", "/v2/models/m/infer")
    assert (answer.status, answer.body) == (405, b"")


@pytest.mark.parametrize("target", GET_ROUTES)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_slash_at_the_end_is_tolerated(method, target):
    with_slash, without = ask(make(), method, f"{target}/"), ask(make(), method, target)
    assert with_slash == without
    assert with_slash.status == 200


@pytest.mark.parametrize("target", POST_ROUTES)
def test_slash_at_the_end_of_an_inference_route_is_tolerated(target):
    assert infer(make(), request(1), target=f"{target}/").json()["outputs"][1]["data"] == [2.0]


@pytest.mark.parametrize("target", ["/v2?x", "/v2?x=1&x=2", "/v2?=", "/v2?%", "/v2?a=%2F", "/v2?a=%ff", "/v2/?x=/"])
def test_query_is_ignored(target):
    assert ask(make(), "GET", target).status == 200


def test_application_may_be_mounted_below_a_path():
    assert ask(make(), "GET", "/v2", SCRIPT_NAME="/ovms", RAW_URI="/ovms/v2").status == 200


# --- Versions, of the registry that a service has

NOT_SERVING = "model 'n' does not serve: no version in /srv/n"


@pytest.fixture(scope="module")
def versioned():
    """An application with versions 2 and 10 of m, and n that does not serve."""
    models = {2: doubler("m", "2"), 10: doubler("m", "10")}
    return create_app(ModelRegistry({"m": Entry(models), "n": Entry(reason="no version in /srv/n")}), Settings())


@pytest.mark.parametrize("version", ["2", "10"])
def test_requested_version_responds(versioned, version):
    model = f"/v2/models/m/versions/{version}"
    assert ask(versioned, "GET", f"{model}/ready").status == 200
    assert ask(versioned, "GET", model).json()["versions"] == ["2", "10"]
    assert infer(versioned, request(1), target=f"{model}/infer").json()["model_version"] == version


def test_highest_version_responds_by_default(versioned):
    assert infer(versioned, request(1)).json()["model_version"] == "10"


@pytest.mark.parametrize(
    "version",
    [
        *("1", "3", "0", "02", "010", "+2", "-2", "2.0", "2e0", "0x2", "2%20", "%202", "two", "latest", "2a", "-1"),
        *("None", "%D9%A2", "%C2%B2", "%00", "2%2F", "2%0A", str(2**63 - 1), str(2**63), str(2**64 + 2), "9" * 5000),
    ],
)
def test_every_other_version_is_a_404(versioned, version):
    model = f"/v2/models/m/versions/{version}"
    for method, target in (("GET", model), ("GET", f"{model}/ready"), ("POST", f"{model}/infer")):
        answer = ask(versioned, method, target)
        assert answer.status == 404
        assert " of model 'm' is not served" in answer.json()["error"]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/v2/models/x", "unknown model 'x'; configured: 'm', 'n'"),
        ("/v2/models/x/ready", "unknown model 'x'; configured: 'm', 'n'"),
        ("/v2/models/M/ready", "unknown model 'M'; configured: 'm', 'n'"),
        ("/v2/models/n", NOT_SERVING),
        ("/v2/models/n/ready", NOT_SERVING),
        ("/v2/models/n/versions/1/ready", NOT_SERVING),
    ],
)
def test_model_that_does_not_serve_is_a_404_with_the_reason(versioned, target, error):
    answer = ask(versioned, "GET", target)
    assert (answer.status, answer.json()) == (404, {"error": error})


def test_server_readiness_names_a_model_that_does_not_serve(versioned):
    answer = ask(versioned, "GET", "/v2/health/ready")
    assert (answer.status, answer.json()) == (400, {"error": NOT_SERVING})


# --- Every response

ERRORS = [
    ("unknown path", 404, lambda app: ask(app, "GET", "/unknown")),
    ("wrong method", 405, lambda app: ask(app, "DELETE", "/v2")),
    ("unknown method", 405, lambda app: ask(app, "FOO", "/v2")),
    ("not ready", 400, lambda app: ask(app, "GET", "/v2/health/ready")),
    ("unknown model", 404, lambda app: ask(app, "GET", "/v2/models/x")),
    ("unknown model of an inference", 404, lambda app: infer(app, request(1), target="/v2/models/x/infer")),
    ("no JSON", 400, lambda app: infer(app, b"{")),
    ("no body", 400, lambda app: infer(app, b"")),
    ("wrong input", 400, lambda app: infer(app, {"inputs": [{"name": "z", "shape": [0], "datatype": "FP32"}]})),
    ("wrong header", 400, lambda app: infer(app, b"{}", headers={"Inference-Header-Content-Length": "x"})),
    ("too large", 413, lambda app: infer(app, b" " * 2000)),
    ("wrong encoding", 415, lambda app: infer(app, request(1), headers={"Content-Encoding": "br"})),
    ("failed inference", 500, lambda app: infer(app, request(1), target="/v2/models/failing/infer")),
    ("waited too long", 503, lambda app: infer(app, request(1, parameters={"timeout": 1}), **received(10**9))),
    ("bug", 500, lambda app: infer(app, request(1), target="/v2/models/buggy/infer")),
]
errors = pytest.mark.parametrize(("status", "cause"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])


def faulty(**settings):
    """Return an application in which every error can occur."""
    servables = (doubler(), failing(InferenceError("failed"), "failing"), failing(RuntimeError("private"), "buggy"))
    return make(*servables, reason="not ready", max_body_bytes=1000, **settings)


@errors
def test_every_error_is_json(status, cause):
    answer = cause(faulty())
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.headers["content-length"] == str(len(answer.body))
    ((key, message),) = answer.json().items()
    assert key == "error"
    assert message


@pytest.mark.parametrize("target", [*GET_ROUTES, "/unknown"])
def test_only_inference_responses_are_compressed(target):
    answer = ask(make(response_compression=True), "GET", target, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert answer.body[:1] in (b"", b"{")


@errors
def test_errors_are_not_compressed(status, cause):
    def app(environ, start_response):
        return faulty(response_compression=True)(environ | {"HTTP_ACCEPT_ENCODING": "gzip"}, start_response)

    answer = cause(app)
    assert (answer.status, "content-encoding" in answer.headers) == (status, False)
    assert answer.json()["error"]


OTHERS = [
    ("metadata", 200, lambda app: ask(app, "GET", "/v2")),
    ("liveness", 200, lambda app: ask(app, "GET", "/v2/health/live")),
    ("HEAD", 200, lambda app: ask(app, "HEAD", "/v2/models/m")),
    ("OPTIONS", 200, lambda app: ask(app, "OPTIONS", "/v2/models/m/infer")),
    ("OPTIONS *", 200, lambda app: ask(app, "OPTIONS", "*")),
    ("inference", 200, lambda app: infer(app, request(1))),
    ("binary inference", 200, lambda app: infer(app, request(1, **BINARY))),
]
every_answer = pytest.mark.parametrize(
    ("status", "cause"), [case[1:] for case in ERRORS + OTHERS], ids=[case[0] for case in ERRORS + OTHERS]
)


def cors_headers(answer):
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@every_answer
def test_cors_is_disabled_by_default(status, cause):
    answer = cause(faulty(allow_credentials=True, allowed_methods="GET", allowed_headers="X"))
    assert (answer.status, cors_headers(answer)) == (status, {})


@every_answer
def test_cors_headers_are_on_every_response_when_origins_are_set(status, cause):
    answer = cause(faulty(allowed_origins="*"))
    assert answer.status == status
    assert cors_headers(answer) == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "*",
        "access-control-allow-headers": "*",
        "access-control-expose-headers": "Inference-Header-Content-Length",
    }


# --- The start


def test_invalid_settings_are_reported_before_models_are_loaded():
    with pytest.raises(ConfigError) as caught:
        load_app({"OVMS_REST_MAX_BODY_BYTES": "x", "OVMS_REST_CONFIG": "/none"})
    assert caught.value.problems == ("OVMS_REST_MAX_BODY_BYTES: expected an integer from 1 to 2147483647, got 'x'",)


def test_invalid_environment_ends_the_process_with_its_lines(monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_config_list": 1, "mediapipe_config_list": [1]}')
    monkeypatch.setenv("OVMS_REST_CONFIG", str(config))
    with pytest.raises(SystemExit) as caught:
        get_app()
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"ovms_rest: {config}: model_config_list: expected an array, got 1",
        f"ovms_rest: {config}: mediapipe_config_list: is not supported: MediaPipe graphs are not served here; "
        "expected [], got [1]",
    ]
