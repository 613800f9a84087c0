"""Models with `max_batch_size` in a worker: what is queued together is inferred together, and answered as alone."""

import contextlib
import json
import os
import random
import select
import signal

import cv2
import model_zoo
import numpy as np
import pytest
import slow_models
from openvino import Type, opset15
from raw_http import infer, post
from service import receive, serve, write_config
from workers import send_together

LIMIT = 8
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def pipeline(name, model):
    """Configure a pipeline of two nodes of the same model, y = model(model(x))."""
    first = {"name": "a", "model_name": model, "type": "DL model"}
    return {
        "name": name,
        "inputs": ["x"],
        "nodes": [
            {**first, "inputs": [{"x": {"node_name": "request", "data_item": "x"}}], "outputs": [OUTPUT]},
            {**first, "name": "b", "inputs": [{"x": {"node_name": "a", "data_item": "y"}}], "outputs": [OUTPUT]},
        ],
        "outputs": [{"y": {"node_name": "b", "data_item": "y"}}],
    }


OUTPUT = {"data_item": "y", "alias": "y"}


def halving():
    """Half of x, x FP32 [-1,-1] -> y: the values of a pipeline of it change at each node."""
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    return model_zoo.model_of({"y": opset15.multiply(x, opset15.constant(0.5, Type.f32))}, [x])


def cutting():
    """Rows cut in two, x FP32 [-1,4] -> y FP32 [-1,2]: an output does not have the rows of the input."""
    x = model_zoo.parameter("x", (-1, 4), Type.f32)
    return model_zoo.model_of({"y": opset15.reshape(opset15.relu(x), opset15.constant([-1, 2]), False)}, [x])


MODELS = {
    "slow": slow_models.slow_relu(),
    "relu": model_zoo.relu((-1, -1)),
    "halving": halving(),
    "strings": model_zoo.strings(),
    "state": model_zoo.accumulating(),
    "passing": model_zoo.passthrough(x=(Type.f32, (-1, 4))),
    "product": model_zoo.product(),
    "images": model_zoo.relu((-1, 4, 4, 3)),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Serve every model twice, as NAME with batches, and as NAME_alone; with one worker."""
    directory = tmp_path_factory.mktemp("batches")
    entries = []
    for name, model in MODELS.items():
        model_zoo.save(model, directory / name)
        entry = {"name": name, "base_path": name, "plugin_config": F32}
        if name == "images":
            entry["shape"] = f"(1:{LIMIT},4,4,3)"
        entries += [{**entry, "max_batch_size": LIMIT}, {**entry, "name": f"{name}_alone"}]
    model_zoo.save(cutting(), directory / "cutting")
    entries.append({"name": "cutting", "base_path": "cutting", "max_batch_size": LIMIT})
    model_zoo.save(model_zoo.relu((1, 4)), directory / "static")
    entries.append({"name": "static", "base_path": "static", "max_batch_size": LIMIT})
    pipelines = [pipeline("both", "halving"), pipeline("both_alone", "halving_alone")]
    config = write_config(directory, *entries, pipeline_config_list=pipelines)
    with serve(directory, "-w", "1", config=config, OVMS_REST_METRICS_ENABLE="true") as running:
        running.wait_for_workers(1)
        yield running


def values_of(rows):
    shape = [len(rows), len(rows[0])] if rows else [0, 4]
    return {"name": "x", "datatype": "FP32", "shape": shape, "data": rows}


def statistics(service, model):
    return service.get(f"/v2/models/{model}/stats").json()["model_stats"][0]


def send_in(service, model, requests, executions):
    """Send requests together until the model takes that number of inferences for them; return the last responses.

    On a busy machine the worker may read some of them in its next turn.
    """
    for _ in range(20):
        before = statistics(service, model)["execution_count"]
        answers = send_together(service, requests)
        assert [answer.status for answer in answers] == [200] * len(requests), answers
        taken = statistics(service, model)["execution_count"] - before
        assert executions <= taken <= len(requests)
        if taken == executions:
            break
    else:
        pytest.fail(f"{taken} inferences instead of {executions}")
    return answers


def relu_of(*rows, model="relu", **keys):
    return infer(model, {"inputs": [values_of(list(rows))], **keys})


def test_queued_requests_are_inferred_together(service):
    before = statistics(service, "relu")
    answers = send_in(service, "relu", [relu_of([k, -k, k]) for k in range(5)], executions=1)
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [[k, 0, k] for k in range(5)]
    after = statistics(service, "relu")
    counted = after["inference_count"] - before["inference_count"]
    assert counted % 5 == 0
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == counted
    assert 5 in [entry["batch_size"] for entry in after["batch_stats"]]
    assert 'ovms_rest_batch_size_bucket{le="8",name="relu",version="1"} ' in service.get("/metrics").body.decode()


def test_requests_with_and_without_the_version_are_inferred_together(service):
    requests = [relu_of([k, -k], model=f"relu{version}") for k, version in enumerate(("", "/versions/1", ""))]
    answers = send_in(service, "relu", requests, executions=1)
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [[k, 0] for k in range(3)]


def test_batch_has_at_most_max_batch_size_rows(service):
    requests = [relu_of([1, 2], [3, 4], [5, 6]) for _ in range(4)]
    for answer in send_in(service, "relu", requests, executions=2):  # of 6 rows each
        assert answer.json()["outputs"][0]["shape"] == [3, 2]


def test_request_with_more_rows_is_400(service):
    answer = service.raw(relu_of(*[[1, 2]] * (LIMIT + 1)))
    assert answer.status == 400
    assert "has 9 rows, at most 8 are allowed, max_batch_size of model 'relu' version 1" in answer.json()["error"]


def test_model_without_a_dynamic_first_dim_does_not_load(service):
    answer = service.get("/v2/models/static/ready")
    assert answer.status == 404
    assert (
        "max_batch_size: input 'x' has the shape [1,4], and its first dim cannot be 1 to 8 rows"
        in answer.json()["error"]
    )


def test_invalid_request_in_a_batch_fails_alone(service):
    bad = infer("relu", {"inputs": [{**values_of([[1, 2]]), "datatype": "FP64"}]})
    answers = send_together(service, [relu_of([1, -1]), bad, relu_of([2, -2])])
    assert [answer.status for answer in answers] == [200, 400, 200]


def test_request_that_the_model_cannot_compute_fails_alone(service):
    def product(*left, model="product"):
        right = {"name": "right", "datatype": "FP32", "shape": [1, 1], "data": [2]}
        return infer(model, {"inputs": [{**values_of([list(left)]), "name": "left"}, right]})

    answers = send_together(service, [product(1), product(1, 2), product(3)])
    assert [answer.status for answer in answers] == [200, 400, 200]
    assert answers[1].json()["error"] == service.raw(product(1, 2)).json()["error"]


def test_requests_of_a_model_with_other_rows_are_answered_one_by_one(service):
    answers = send_together(service, [relu_of([k] * 4, model="cutting") for k in range(3)])
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == [[k] * 4 for k in range(3)]
    assert "model 'cutting' version 1 cannot infer batches" in service.log


def a_request(generator):
    """Return a random request to a model of the fixture, as a function of that model's name."""
    count = generator.choice([1, 1, 1, 2, 3])
    priority = {"parameters": {"priority": generator.randint(0, 3)}} if generator.random() < 0.3 else {}
    model = generator.choice(["relu", "halving", "both", "strings", "state", "passing"])
    if model == "strings":
        data = ["".join(generator.choices("abé ", k=generator.randint(0, 5))) for _ in range(count)]
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [count], "data": data}]
    else:
        width = {"state": 2, "passing": 4}.get(model, generator.randint(1, 3))
        numbers = [[generator.uniform(-9, 9) for _ in range(width)] for _ in range(count)]
        inputs = [values_of(numbers)]
    if generator.random() < 0.2:
        priority = {**priority, "outputs": [{"name": name_of_output(model), "parameters": {"classification": 1}}]}
        if model == "strings":
            priority.pop("outputs")
    return model, lambda name: infer(name, {"inputs": inputs, **priority})


def name_of_output(model):
    return "x" if model == "passing" else "y"


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_is_answered_as_if_each_request_were_alone(service, seed):
    generator = random.Random(seed)
    requests = [a_request(generator) for _ in range(40)]
    together = send_together(service, [make(model) for model, make in requests])
    for (model, make), answer in zip(requests, together, strict=True):
        alone = service.raw(make(f"{model}_alone"))
        assert answer.status == alone.status == 200, (answer, alone)
        assert answer.json()["outputs"] == alone.json()["outputs"]


def test_client_that_disconnects_while_it_is_parked_leaves_the_others_alone(service):
    """Requests of three shapes: while the first batch is inferred, the others are parked."""
    (worker,) = service.workers()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(6)]
        os.kill(worker, signal.SIGSTOP)
        for index, connection in enumerate(connections):
            connection.sendall(relu_of([1.0] * (1 + index // 2)))
        connections[3].close()
        connections[4].close()
        os.kill(worker, signal.SIGCONT)
        for index in (0, 1, 2, 5):
            assert receive(connections[index], "POST").json()["outputs"][0]["data"] == [1.0] * (1 + index // 2)
    assert service.workers() == [worker]
    assert "Traceback" not in service.log


def test_request_of_a_higher_priority_overtakes_those_that_are_parked(service):
    """Those of three other shapes are parked when the first response comes."""
    (worker,) = service.workers()
    steps = 5 * slow_models.SLOW
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(4)]
        os.kill(worker, signal.SIGSTOP)
        for index, connection in enumerate(connections):
            connection.sendall(relu_of([steps] * (1 + index), model="slow"))
        os.kill(worker, signal.SIGCONT)
        assert receive(connections[0], "POST").status == 200
        urgent = service.raw(relu_of([2, -2], parameters={"priority": 1}))
        assert urgent.json()["outputs"][0]["data"] == [2, 0]
        assert not select.select(connections[3:], [], [], 0)[0], "it overtakes all but the one being inferred"
        for index in (1, 2, 3):
            assert receive(connections[index], "POST").json()["outputs"][0]["data"] == [steps] * (1 + index)


def test_images_are_decoded_before_they_join_a_batch(service):
    generator, encoded = np.random.default_rng(0), []
    for _ in range(4):
        encoded.append(cv2.imencode(".png", generator.integers(0, 255, (4, 4, 3), np.uint8))[1].tobytes())
    head = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": []}], "outputs": [{"name": "y"}]}
    head["inputs"][0].pop("data")
    requests = []
    for data in encoded:
        head["inputs"][0]["parameters"] = {"binary_data_size": 4 + len(data)}
        text = json.dumps(head).encode()
        body = text + len(data).to_bytes(4, "little") + data
        requests.append((body, f"Inference-Header-Content-Length: {len(text)}"))
    batched = [post("/v2/models/images/infer", *request) for request in requests]
    together = send_in(service, "images", batched, executions=1)
    for request, answer in zip(requests, together, strict=True):
        alone = service.raw(post("/v2/models/images_alone/infer", *request))
        assert answer.json()["outputs"] == alone.json()["outputs"]


def test_no_rows_and_binary_data(service):
    header = {"inputs": [{**values_of([]), "parameters": {"binary_data_size": 0}}]}
    header["inputs"][0].pop("data")
    text = json.dumps(header).encode()
    empty = post("/v2/models/relu/infer", text, f"Inference-Header-Content-Length: {len(text)}")
    answers = send_together(service, [relu_of([1, 2, 3, 4]), empty, relu_of([4, 3, 2, 1])])
    assert [answer.json()["outputs"][0]["shape"] for answer in answers] == [[1, 4], [0, 4], [1, 4]]


def test_config_of_the_model_names_the_batches(service):
    batched, alone = (service.get(f"/v2/models/{name}/config").json() for name in ("state", "state_alone"))
    assert (batched["max_batch_size"], batched["input"][0]["dims"]) == (LIMIT, [2])
    assert batched["dynamic_batching"] == {"max_queue_delay_microseconds": 0}
    assert (alone["max_batch_size"], alone["input"][0]["dims"]) == (0, [-1, 2])
    assert "dynamic_batching" not in alone


def test_batches_survive_reloads(service):
    """A reload under load: every request is answered, and right."""
    generator, base = random.Random(9), service.log.count("serves from")
    for _ in range(3):
        file = next(iter(service._log.parent.glob("relu/1/*.xml")))
        os.utime(file)
        with service.connect() as reload:
            reload.sendall(post("/v1/config/reload", b""))
            for _ in range(10):
                number = generator.randint(1, 9)
                with contextlib.ExitStack() as stack:
                    connections = [stack.enter_context(service.connect()) for _ in range(8)]
                    for connection in connections:
                        connection.sendall(relu_of([number, -1]))
                    for connection in connections:
                        assert receive(connection, "POST").json()["outputs"][0]["data"] == [number, 0]
            assert receive(reload, "POST").status == 412  # for the model that never loads
    assert service.log.count("serves from") > base
    service.wait_for_workers(1)


def test_sync_worker_infers_alone(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    config = write_config(tmp_path, {"name": "relu", "base_path": "relu", "max_batch_size": 2})
    with serve(tmp_path, "-w", "1", "-k", "sync", config=config) as running:
        assert running.raw(relu_of([1, -1, 2, 3])).json()["outputs"][0]["data"] == [1, 0, 2, 3]
        assert running.raw(relu_of(*[[1, 2, 3, 4]] * 3)).status == 400
