"""TensorFlow Serving's REST API, as its clients call it: with the requests of its documentation, and beyond them."""

import base64
import gzip
import json
import re
import socket
import urllib.request
from collections import Counter

import cv2
import model_zoo
import numpy as np
import pytest
from fake_app import ANY, ask, by_name, doubler, failing, make, servable
from openvino import Type, opset15
from raw_http import head, post, post_chunked
from service import receive, serve, write_config
from workers import send_together

from ovms_rest.errors import InferenceError, NoContentError
from ovms_rest.protocol.room import Room
from ovms_rest.protocol.routes import read_inference
from ovms_rest.protocol.tensors import Tensor
from ovms_rest.resources.inference import Infer

LIMIT = 8


def half_plus(number):
    """TensorFlow Serving's toy model: x FP32 [n] -> y = x / 2 + number."""
    x = model_zoo.parameter("x", (-1,), Type.f32)
    half = opset15.multiply(x, opset15.constant(np.float32(0.5)))
    return model_zoo.model_of({"y": opset15.add(half, opset15.constant(np.float32(number)))}, [x])


def concatenation():
    """Inputs of different first dims: a FP32 [n], b FP32 [m] -> y FP32 [n + m], n INT64 [1] its length."""
    a, b = (model_zoo.parameter(name, (-1,), Type.f32) for name in "ab")
    y = opset15.concat([a, b], 0)
    return model_zoo.model_of({"y": y, "n": opset15.shape_of(y)}, [a, b])


def pipeline(name, model):
    node = {
        "name": "a",
        "model_name": model,
        "type": "DL model",
        "inputs": [{"x": {"node_name": "request", "data_item": "x"}}],
        "outputs": [{"data_item": "y", "alias": "y"}],
    }
    return {"name": name, "inputs": ["x"], "nodes": [node], "outputs": [{"z": {"node_name": "a", "data_item": "y"}}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One worker, and a control worker, that serve some models, a pipeline, and a model that fails to load."""
    directory = tmp_path_factory.mktemp("tfs")
    model_zoo.save(half_plus(2), directory / "half_plus_two")
    model_zoo.save(half_plus(3), directory / "half_plus_two", version=3)
    models = {"sum": model_zoo.add((-1, 2)), "concatenation": concatenation(), "images": model_zoo.relu((-1, 4, 4, 3))}
    models["text"] = model_zoo.passthrough(text=(Type.string, (-1,)), raw_bytes=(Type.string, (-1,)))
    models["many"] = half_plus(2)
    for name, model in models.items():
        model_zoo.save(model, directory / name)
    every = {"model_version_policy": {"all": {}}}
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_text("no model")
    config = write_config(
        directory,
        {"name": "half_plus_two", "base_path": "half_plus_two", **every},
        {"name": "many", "base_path": "many", "max_batch_size": LIMIT},
        *({"name": name, "base_path": name} for name in ("sum", "concatenation", "images", "text", "broken")),
        pipeline_config_list=[pipeline("piped", "half_plus_two")],
    )
    control = tmp_path_factory.mktemp("sockets") / "control.sock"
    variables = {"OVMS_REST_METRICS_ENABLE": "true", "OVMS_REST_ACCESS_LOG": "text", "OVMS_REST_MAX_WAITING": "6"}
    with serve(directory, "-w", "1", config=config, OVMS_REST_CONTROL_BIND=f"unix:{control}", **variables) as running:
        running.wait_for_workers(2)
        running.control = control
        yield running


def predict(service, model, request, **headers):
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return service.request("POST", f"/v1/models/{model}:predict", body, headers)


def predicted(service, model, request, **headers):
    answer = predict(service, model, request, **headers)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json"), answer
    return json.loads(answer.body)


def refused(service, model, request):
    answer = predict(service, model, request)
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    return answer.status, answer.json()["error"]


# --- The documentation's requests


def test_request_of_the_documentation(service):
    """As `curl -d` sends it."""
    url = f"http://127.0.0.1:{service.port}/v1/models/half_plus_two/versions/1:predict"
    with urllib.request.urlopen(urllib.request.Request(url, b'{"instances": [1.0, 2.0, 5.0]}')) as response:
        assert json.load(response) == {"predictions": [2.5, 3.0, 4.5]}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("half_plus_two/versions/1", 2.5),
        ("half_plus_two/versions/3", 3.5),
        ("half_plus_two", 3.5),
        ("half_plus_two/versions/0", 3.5),
    ],
)
def test_highest_version_is_the_default_and_so_is_version_0(service, path, expected):
    assert predicted(service, path, {"instances": [1.0]}) == {"predictions": [expected]}


def test_status_of_the_documentation(service):
    version = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in ("half_plus_two", "half_plus_two/versions/0", "half_plus_two/"):
        answer = service.get(f"/v1/models/{path}")
        assert answer.json() == {"model_version_status": [{"version": "3", **version}, {"version": "1", **version}]}
    answer = service.get("/v1/models/half_plus_two/versions/1")
    assert answer.json() == {"model_version_status": [{"version": "1", **version}]}
    assert service.request("HEAD", "/v1/models/half_plus_two").status == 200


def test_status_gives_the_reason_why_a_model_does_not_serve(service):
    (status,) = service.get("/v1/models/broken").json()["model_version_status"]
    assert (status["version"], status["state"], status["status"]["error_code"]) == ("1", "LOADING", "UNKNOWN")
    assert status["status"]["error_message"]
    assert refused(service, "broken", {"instances": [1]})[0] == 404


def test_metadata_is_that_of_the_version(service):
    for path, version in (("half_plus_two", "3"), ("half_plus_two/versions/1", "1"), ("half_plus_two/versions/0", "3")):
        answer = service.get(f"/v1/models/{path}/metadata")
        assert answer.json()["model_spec"] == {"name": "half_plus_two", "signature_name": "", "version": version}
        signature = answer.json()["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["inputs"]["x"]["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]
    assert service.request("HEAD", "/v1/models/half_plus_two/metadata").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/models/half:predict", 404, "unknown model 'half'; configured: "),
        ("GET", "/v1/models/half", 404, "unknown model 'half'; configured: "),
        ("GET", "/v1/models/half/metadata", 404, "unknown model 'half'; configured: "),
        ("POST", "/v1/models/half_plus_two/versions/2:predict", 404, "version '2' of model 'half_plus_two' is not "),
        ("GET", "/v1/models/half_plus_two/versions/2", 404, "version '2' of model 'half_plus_two' is unknown; known: "),
        ("GET", "/v1/models/half_plus_two/versions/x/metadata", 404, "version 'x' of model "),
        ("POST", "/v1/models/half_plus_two/labels/stable:predict", 404, "path '/v1/models/half_plus_two/labels/stable"),
        ("GET", "/v1/models/half_plus_two/labels/stable", 404, "path '/v1/models/half_plus_two/labels/stable'"),
        ("POST", "/v1/models/half_plus_two:regress", 400, "model 'half_plus_two' has no 'regress' signature"),
        ("POST", "/v1/models/sum/versions/1:classify", 400, "model 'sum' has no 'classify' signature"),
        ("POST", "/v1/models/half:classify", 404, "unknown model 'half'; configured: "),
        ("GET", "/v1/models/half_plus_two:predict", 405, "method GET is not allowed"),
        ("POST", "/v1/models/half_plus_two", 405, "method POST is not allowed"),
        ("GET", "/v1/models", 404, "path '/v1/models' is unknown; GET /v2/models lists the models"),
    ],
)
def test_errors_have_the_status_and_form_of_tensorflow_serving(service, method, path, status, message):
    answer = service.request(method, path, b'{"examples": [{"x": 1}]}' if method == "POST" else None)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith(message)


# --- Models of several kinds


def test_rows_and_columns_of_two_inputs_and_two_outputs(service):
    rows = [{"left": [1, 2], "right": [10, 20]}, {"left": [3, 4], "right": [30, 40]}]
    columns = {"left": [[1, 2], [3, 4]], "right": [[10, 20], [30, 40]]}
    expected = {"sum": [[11.0, 22.0], [33.0, 44.0]], "difference": [[-9.0, -18.0], [-27.0, -36.0]]}
    assert predicted(service, "sum", {"inputs": columns}) == {"outputs": expected}
    predictions = [
        {"sum": [11.0, 22.0], "difference": [-9.0, -18.0]},
        {"sum": [33.0, 44.0], "difference": [-27.0, -36.0]},
    ]
    assert predicted(service, "sum", {"instances": rows}) == {"predictions": predictions}


def test_columns_may_have_batches_of_their_own_but_rows_may_not(service):
    expected = {"outputs": {"y": [1.0, 2.0, 3.0], "n": [3]}}
    assert predicted(service, "concatenation", {"inputs": {"a": [1, 2], "b": [3]}}) == expected
    status, error = refused(service, "concatenation", {"instances": [{"a": 1, "b": 2}]})
    assert status == 400
    assert error.startswith("the outputs are not rows of one batch, their shapes are 'n' [1], 'y' [2]; ")


def test_strings_are_returned_as_text_or_as_base64_by_the_name_of_the_output(service):
    values = [{"text": "\u00e4", "raw_bytes": {"b64": "/wA="}}, {"text": "", "raw_bytes": "ab"}]
    expected = [values[0] | {}, {"text": "", "raw_bytes": {"b64": "YWI="}}]
    assert predicted(service, "text", {"instances": values}) == {"predictions": expected}
    status, error = refused(service, "text", {"instances": [{"text": {"b64": "/wA="}, "raw_bytes": ""}]})
    assert (status, error.split(";")[0]) == (
        400,
        "output 'text': string 0 is not valid UTF-8 and cannot be returned in JSON, except as base64 from an output "
        "whose name ends in '_bytes'",
    )


@pytest.mark.parametrize("form", ["instances", "named instances", "inputs", "named inputs"])
def test_encoded_images_are_base64(service, form):
    pictures = [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8) for seed in (1, 2)]
    files = [{"b64": base64.b64encode(cv2.imencode(".png", picture)[1]).decode()} for picture in pictures]
    values = [{"x": file} for file in files] if form == "named instances" else files
    request = {form.split()[-1]: {"x": values} if form == "named inputs" else values}
    (outputs,) = predicted(service, "images", request).values()
    assert np.array_equal(np.array(outputs), np.array(pictures, np.float32))


def test_image_that_cannot_be_decoded_is_the_clients_mistake(service):
    status, error = refused(service, "images", {"instances": [{"b64": base64.b64encode(b"no image").decode()}]})
    assert (status, error[:16]) == (400, "input 'x': image")


def test_pipeline_predicts(service):
    assert predicted(service, "piped", {"instances": [1, 2]}) == {"predictions": [3.5, 4.0]}
    assert service.get("/v1/models/piped").json()["model_version_status"][0]["state"] == "AVAILABLE"
    signature = service.get("/v1/models/piped/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert list(signature["serving_default"]["outputs"]) == ["z"]


def test_nan_and_infinity_come_and_go(service):
    answer = predict(service, "half_plus_two", b'{"instances": [NaN, -Infinity, 1]}')
    assert (answer.status, answer.body) == (200, b'{"predictions":[NaN,-Infinity,3.5]}')


def test_large_requests_are_predicted(service):
    values = np.random.default_rng(3).normal(size=20_000).astype(np.float32)
    (outputs,) = predicted(service, "half_plus_two", {"instances": values.tolist()}).values()
    assert np.array_equal(np.float32(outputs), values * np.float32(0.5) + 3)


def test_shape_that_does_not_fit_is_refused(service):
    assert refused(service, "half_plus_two", {"instances": [[1], [2]]}) == (
        400,
        "input 'x': shape is [2,1], the model takes [-1]",
    )
    assert refused(service, "sum", {"instances": [{"left": [1, 2]}]}) == (
        400,
        "input 'right' of model 'sum' is missing from the request",
    )


# --- The way of an inference


def test_body_may_be_compressed_or_chunked(service):
    body = b'{"instances": [1]}'
    headers = {"Content-Encoding": "gzip"}
    assert predicted(service, "half_plus_two", gzip.compress(body), **headers) == {"predictions": [3.5]}
    answer = service.raw(post_chunked("/v1/models/half_plus_two:predict", body[:5], body[5:]))
    assert (answer.status, answer.json()) == (200, {"predictions": [3.5]})


def ask_control(service, data):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(service.control))
        connection.sendall(data)
        return receive(connection)


def test_control_address_serves_status_and_metadata_but_no_predictions(service):
    answer = ask_control(service, post("/v1/models/sum:predict", b'{"instances": [1]}'))
    assert (answer.status, answer.json()) == (404, {"error": "inferences are not served on the control address"})
    for path in ("", "/metadata"):
        assert ask_control(service, head("GET", f"/v1/models/sum{path}")).status == 200


def test_queued_predictions_are_inferred_together_with_inferences_of_v2(service):
    v2 = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [4]}]}).encode()
    requests = [post("/v1/models/many:predict", b'{"instances": [%d]}' % number) for number in (1, 2, 3)]
    requests.append(post("/v2/models/many/infer", v2))
    for _ in range(20):
        before = service.get("/v2/models/many/stats").json()["model_stats"][0]["execution_count"]
        answers = send_together(service, requests)
        assert [answer.json() for answer in answers[:3]] == [{"predictions": [value]} for value in (2.5, 3.0, 3.5)]
        assert answers[3].json()["outputs"][0]["data"] == [4.0]
        taken = service.get("/v2/models/many/stats").json()["model_stats"][0]["execution_count"] - before
        if taken == 1:  # on a busy machine the worker may read some of them in its next turn
            return
    pytest.fail(f"{taken} inferences instead of 1")


def counts(service, model):
    """Return the requests of a model, all versions together, by result and method."""
    found = re.findall(
        rf'^ovms_requests_(\w+){{api="\w+",interface="REST",method="(\w+)",name="{model}".*}} (\d+)',
        service.get("/metrics").body.decode(),
        re.MULTILINE,
    )
    requests = Counter()
    for result, method, number in found:
        requests[result, method] += int(number)
    return requests


def test_predictions_beyond_the_queue_are_refused_and_counted(service):
    for _ in range(20):
        before = counts(service, "half_plus_two")
        answers = send_together(service, [post("/v1/models/half_plus_two:predict", b'{"instances": [1]}')] * 12)
        statuses = Counter(answer.status for answer in answers)
        assert (
            counts(service, "half_plus_two") - before
            == Counter({("success", "Predict"): statuses[200], ("fail", "Predict"): statuses[503]}) - Counter()
        )
        if statuses[503]:  # on a busy machine the worker may read some of them in its next turn
            (refused,) = {answer.body for answer in answers if answer.status == 503}
            assert refused == b'{"error":"overloaded: 6 requests are already queued, the limit per worker"}'
            return
    pytest.fail(f"no request was refused: {statuses}")


def test_requests_are_counted_by_api_and_method(service):
    before = counts(service, "sum")
    predicted(service, "sum", {"inputs": {"left": [[1, 2]], "right": [[1, 2]]}})
    refused(service, "sum", {"inputs": [1]})
    for path in ("", "", "/metadata"):
        service.get(f"/v1/models/sum{path}")
    assert counts(service, "sum") - before == {
        ("success", "Predict"): 1,
        ("fail", "Predict"): 1,
        ("success", "GetModelStatus"): 2,
        ("success", "GetModelMetadata"): 1,
    }
    assert (
        'api="TensorFlowServing",interface="REST",method="Predict",name="sum"' in service.get("/metrics").body.decode()
    )


def test_access_log_names_the_model(service):
    predicted(service, "half_plus_two/versions/1", {"instances": [1]}, **{"X-Request-ID": "logged-prediction"})
    lines = service.wait_for(lambda: [line for line in service.log.splitlines() if "logged-prediction" in line])
    assert "half_plus_two" in lines[0].replace("/v1/models/half_plus_two", "")


# --- Without a worker of our own


def test_failures_have_the_status_of_an_inference():
    def predict(model, body=b'{"instances": [1]}'):
        return ask(make(model), "POST", "/v1/models/m:predict", body)

    for error, status, kind in ((InferenceError("no"), 500, "failed"), (NoContentError(), 204, None)):
        model = failing(error)
        assert predict(model).status == status
        outcomes = model.counters.read().apis["TensorFlowServing"]
        assert outcomes == ((1, 0) if kind is None else (0, 1))
        assert model.counters.read().apis["KServe"] == (0, 0)


def test_body_over_the_limit_is_refused():
    answer = ask(make(max_body_bytes=20), "POST", "/v1/models/m:predict", b'{"instances": [1, 2, 3]}')
    assert (answer.status, answer.json()) == (413, {"error": "the body has 24 bytes, at most 20 are allowed"})


def test_header_of_binary_tensors_has_no_effect():
    headers = {"Inference-Header-Content-Length": "5"}
    assert ask(make(), "POST", "/v1/models/m:predict", b'{"inputs": [1, 2]}', headers=headers).status == 200


def test_response_without_room_is_refused():
    """Each element of these outputs is in a list of its own, which is most of the response."""
    count = 20_000
    output = Tensor("y", "BOOL", np.zeros((count, 1, 1, 1), np.bool_))
    model = servable(lambda arrays: by_name(output), {"x": ("FP32", (ANY,))}, {"y": ("BOOL", (ANY,) * 4)})
    size = len(ask(make(model), "POST", "/v1/models/m:predict", b'{"inputs": [1]}').body)
    for limit, status in ((size, 200), (size - 100, 503)):
        environ = {"ovms_rest.room": lambda limit=limit: Room(0, limit)}
        answer = ask(make(model), "POST", "/v1/models/m:predict", b'{"inputs": [1]}', **environ)
        assert answer.status == status
    assert answer.json()["error"].startswith("no room for a response of ")


def test_name_may_have_a_colon():
    answer = ask(make(doubler("a:b")), "POST", "/v1/models/a%3Ab:predict", b'{"inputs": [1]}')
    assert answer.json() == {"outputs": {"n": [1], "y": [2.0]}}


def test_responses_are_compressed_if_enabled():
    headers = {"Accept-Encoding": "gzip"}
    answer = ask(make(response_compression=True), "POST", "/v1/models/m:predict", b'{"inputs": [1]}', headers=headers)
    assert json.loads(gzip.decompress(answer.body)) == {"outputs": {"n": [1], "y": [2.0]}}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models/m:predict", "/v1/models/a:b:predict", "/v1/models/m:predict:predict", "/v1/models/:predict"),
        *("/v1/models/m/versions/1:predict", "/v1/models/m/versions/:predict", "/v1/models/m:predict/versions/1"),
        *("/v1/models/m:predict/versions/1:predict", "/v1/models/m/labels/a:predict", "/v1/models/m/predict"),
        *("/v1/models/m", "/v1/models/m:classify", "/v1/models/m:predict/metadata", "/v1/models/versions/1:predict"),
        *("/v1/models/m:PREDICT", "/v1/models/a%2Fb:predict", "//v1/models/m:predict", "/v1/models//m:predict"),
        *("/v2/models/m:predict/infer", "/v2/models/m/infer:predict", "/v1/models/m/infer", "/v1/models/m:predict:"),
    ],
)
def test_worker_queues_exactly_the_requests_that_infer(path):
    """The worker decides by the path what is an inference, the router what infers."""
    found = make()._router.find(path)
    infers = found is not None and isinstance(found[0], Infer)
    queued = read_inference("POST", path)
    assert infers == (queued is not None) or path.endswith("s/:predict")  # without a name or version: 404
    if infers:
        name, version = found[2]["name"], found[2].get("version")
        assert queued == (name, version)
