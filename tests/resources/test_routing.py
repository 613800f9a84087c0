"""From the target of a request to its path and its responder, in every spelling."""

import json
import re
import secrets
import socket
from urllib.parse import quote

import pytest
import slow_models
from fake_app import ask, doubler, infer, make, request
from hypothesis import example, given
from hypothesis import strategies as st
from raw_http import RELU, connected, exchange, head, parse, post, receive
from service import Answer, serve

from ovms_rest.protocol.routes import read_inference, read_path
from ovms_rest.resources.inference import Infer
from ovms_rest.resources.routing import Router

SEGMENTS = ["", "v2", "models", "m", "versions", "1", "infer"]
SEGMENTS += ["%2F", "%2finfer", "a b", "\xc3\xa4", "\n", "..", "infer\n"]
APP = make()


@given(st.lists(st.sampled_from(SEGMENTS), max_size=8), st.sampled_from(["/", "//", "", "http://x/"]))
@example(["v2", "models", "m", "infer"], "/")
@example(["v2", "models", "m", "infer"], "")
@example(["v2", "models", "", "infer"], "/")
@example(["v2", "models", "m", "versions", "", "infer", ""], "/")
def test_worker_recognizes_an_inference_exactly_where_falcon_routes_to_one(segments, start):
    path = read_path(start + "/".join(segments))
    found = APP._router.find(path.encode("latin-1").decode("utf-8", "replace"))
    assert (read_inference("POST", path) is not None) == (found is not None and isinstance(found[0], Infer))


class Echo:
    def on_get(self, req, resp, name):
        """Never called."""


def test_remembered_responders_have_their_own_parameters():
    router = Router()
    router.add_route("/{name}", Echo())
    first, second = router.find("/a"), router.find("/a")
    assert first == second
    assert first[2] == {"name": "a"}
    second[2]["name"] = "changed by the caller"
    assert router.find("/a")[2] == {"name": "a"}
    for number in range(1000):  # more than are remembered
        assert router.find(f"/{number}")[2] == {"name": str(number)}
    assert router.find("/a") == first


def test_added_route_applies_to_remembered_paths():
    router, later = Router(), Echo()
    router.add_route("/{name}", Echo())
    assert router.find("/later")[0] is not later
    router.add_route("/later", later)
    assert router.find("/later")[0] is later


# --- Names


@pytest.mark.parametrize(
    "name",
    [
        *("resnet 50", "a.b", ".", "..", "a%b", "100%", "%41", "a%20b", "a+b", "a;b=c", "a:b@c", "~a", "a\\b", '"'),
        *("'", "modèle", "模型", "\U0001f600", "ready", "infer", "versions", "models", "{name}", "a?b", "a#b", "a\tb"),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_model_may_have_any_name_without_a_slash(name, raw):
    """With RAW_URI, which gunicorn sets, and without it, as on other servers."""
    app = make(doubler(name))
    model, raw_uri = f"/v2/models/{quote(name, safe='')}", {} if raw else {"RAW_URI": ""}
    assert ask(app, "GET", model, **raw_uri).json()["name"] == name
    assert ask(app, "GET", f"{model}/ready", **raw_uri).status == 200
    assert ask(app, "GET", f"{model}/versions/1", **raw_uri).json()["name"] == name
    assert infer(app, request(1), target=f"{model}/infer", **raw_uri).json()["model_name"] == name


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        *(
            ("GET", f"/v2{target}", 404)
            for target in (
                *("/models/m%2Fready", "/models/m%2fready", "/models/m%2Fready?a=b", "/models/m%2Fversions%2F1"),
                *("/models/m%2Fversions/1", "/models/m/versions/1%2Fready", "/models/%2Fm", "/models/m%2F"),
                *("/models/m%2F/", "%2Fmodels/m"),
            )
        ),
        ("HEAD", "/v2/models/m%2Fready", 404),
        *(("POST", f"/v2/models/m%2F{end}/infer", 404) for end in ("versions/1", "x")),
        ("POST", "/v2/models/m%2Finfer", 405),  # of the metadata of a model
    ],
)
def test_encoded_slash_does_not_separate_segments(method, target, status):
    assert ask(make(), method, target, json.dumps(request(1)).encode()).status == status


def test_encoded_slash_in_a_target_of_absolute_form_does_not_separate_segments():
    """RFC 9112, 3.2.2: a server accepts it; gunicorn decodes PATH_INFO and sets RAW_URI to the whole target."""
    target = "/v2/models/m%2Fready"
    answer = ask(make(), "GET", target, RAW_URI=f"http://localhost{target}", PATH_INFO="/v2/models/m/ready")
    assert answer.status == 404


def test_target_of_absolute_form_is_answered_as_its_path():
    assert ask(make(), "GET", "/v2/models/m/ready", RAW_URI="http://localhost/v2/models/m/ready").status == 200


def test_encoded_slash_stays_encoded_in_the_error():
    assert ask(make(), "GET", "/v2/models/a%2Fb").json() == {"error": "no model 'a%2Fb' of version None"}


def test_encoded_slash_does_not_affect_other_encoded_characters():
    assert ask(make(), "GET", "/v2/models/%C3%A4%20%25%2Fb").json() == {"error": "no model 'ä %%2Fb' of version None"}


def test_encoded_slash_below_a_mount_path_does_not_separate_segments():
    answer = ask(make(), "GET", "/v2/models/m%2Fready", SCRIPT_NAME="/ovms", RAW_URI="/ovms/v2/models/m%2Fready")
    assert answer.json() == {"error": "no model 'm%2Fready' of version None"}


@pytest.mark.parametrize("target", ["/v2/models/%FF", "/v2/models/%C3", "/v2/models/%00", "/v2/models/%ED%A0%80/ready"])
def test_name_that_is_not_utf_8_is_unknown(target):
    answer = ask(make(), "GET", target)
    assert answer.status == 404
    assert answer.json()["error"].startswith("no model ")


@pytest.mark.parametrize("target", ["/v2/models//ready", "/v2/models//infer", "/v2/models//versions/1"])
def test_empty_name_is_unknown(target):
    assert ask(make(), "POST" if target.endswith("infer") else "GET", target).status == 404


# --- In the worker

PATHS = ("/v2/models/relu/infer", "/v2/models/relu/versions/1/infer")


def spell(mount):
    """Return targets of an inference when the service is mounted at `mount`."""
    spellings = [f"{mount}{path}{end}" for path in PATHS for end in ("", "/", "?", "?%2", "/?a=%2F")]
    base = mount + PATHS[0]
    spellings += [
        base.replace("relu", "r%65lu"),
        base.replace("infer", "%69nfer/?%2f"),
        f"{base.replace('v2', '%762')}?%2",
    ]
    spellings += [f"http://x{base}", f"HTTP://u@x:1{base}/?%2", f"/%{ord(base[1]):x}{base[2:]}?%2"]
    return spellings


def misspell(mount):
    """Return targets that resemble an inference without being one."""
    base = mount + PATHS[0]
    return [
        f"{base}//",
        f"{base}%2F",
        f"{base}%2f?%2",
        f"/{base}",
        f"{mount}/{PATHS[0]}",
        f"{mount}{PATHS[0].replace('/infer', '%2Finfer')}",
        f"{mount}/v2%2Fmodels/relu/infer?%2",
        f"{mount}/{PATHS[0]}?%2",
        base[1:],
        f"http:/{base}",
        f"http://{base[1:]}",
        f"{mount}v2/models/relu/infer" if mount else "/V2/models/relu/infer",
        f"{mount}{mount}{PATHS[0]}?%2" if mount else "/api/v2/models/relu/infer?%2",
        PATHS[0] if mount else "/v2/models/relu/infer;a",
        f"{PATHS[0]}?%2" if mount else "/v2/./models/relu/infer",
    ]


@pytest.fixture(scope="module", params=["", "/api"])
def mounted(request, tmp_path_factory):
    """A service with a worker and a control worker, mounted at a path."""
    directory = tmp_path_factory.mktemp("mounted")
    variables = {"OVMS_REST_CONTROL_BIND": "127.0.0.1:0", "OVMS_REST_ACCESS_LOG": "json"}
    if request.param:
        variables["SCRIPT_NAME"] = request.param
    with serve(directory, "-w", "1", config=slow_models.save(directory), **variables) as running:
        running.mount = request.param
        running.wait_for(lambda: len(running.workers()) == 2)
        control = running.wait_for(lambda: re.search(r"control address: http://127\.0\.0\.1:(\d+)", running.log))
        running.control = int(control[1])
        yield running


def ask_control(service, data) -> Answer:
    with socket.create_connection(("127.0.0.1", service.control), timeout=60) as connection:
        connection.sendall(data)
        return receive(connection, "POST")


def test_control_address_refuses_an_inference_in_every_spelling(mounted):
    for target in spell(mounted.mount):
        answer = ask_control(mounted, post(target, RELU))
        assert (answer.status, answer.json()) == (404, {"error": "inferences are not served on the control address"})
    for target in misspell(mounted.mount):
        assert ask_control(mounted, post(target, RELU)).status in (400, 404, 405), target


def test_listen_address_infers_in_every_spelling(mounted):
    for target in spell(mounted.mount):
        (answer,) = parse(exchange(mounted, post(target, RELU)), "POST")
        assert answer.status == 200, (target, answer)
        assert answer.json()["outputs"][0]["data"] == [1.0, 0.0, 3.0, 0.0]
    for target in misspell(mounted.mount):
        (answer,) = parse(exchange(mounted, post(target, RELU)), "POST")
        assert answer.status in (400, 404, 405), target
        assert list(answer.json()) == ["error"]


def access_of(service, target):
    """Send an inference to a target; return its line of the access log."""
    name = f"id-{secrets.token_hex(8)}"
    # The sending side stays open: a worker that is not idle yet would take its end for a cancellation.
    exchange(service, post(target, RELU, f"X-Request-ID: {name}", "Connection: close"), half=False)
    pattern = re.compile(rf'^{{.*"request_id":"{name}".*}}$', re.MULTILINE)
    return json.loads(service.wait_for(lambda: pattern.search(service.log))[0])


def test_inference_is_queued_in_every_spelling(mounted):
    """The access log shows no queue time for other requests."""
    for target in spell(mounted.mount):
        access = access_of(mounted, target)
        assert (access["status"], access["queue_us"] > 0) == (200, True), target


def test_request_outside_script_name_is_404_and_keeps_its_connection(mounted):
    if not mounted.mount:
        pytest.skip("no path is outside")
    with connected(mounted) as connection:
        for path in ("/v2", "/apiv2", "/apiv2/v2?%2"):
            connection.sendall(head("GET", path))
            answer = receive(connection)
            reason = "the path is not below '/api', where SCRIPT_NAME mounts the service"
            assert (answer.status, answer.json()) == (404, {"error": reason})
        connection.sendall(head("GET", "/api/v2/"))
        assert receive(connection).status == 200


def test_gunicorns_own_workers_respond_404_outside_script_name(tmp_path):
    with serve(tmp_path, "-w", "1", "-k", "sync", config=slow_models.save(tmp_path), SCRIPT_NAME="/api") as service:
        for path in ("/v2/health/live", "/apiv2/health/live?%2"):
            assert service.get(path).status == 404
            assert service.get("/api/v2/health/live/").status == 200
        assert "Traceback" not in service.log
