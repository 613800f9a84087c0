"""Statistics and metrics over real workers: exact sums, kept when workers die and when the service reloads."""

import json
import os
import signal
import threading

import model_zoo
import pytest
from openvino import Type
from prometheus_client.parser import text_string_to_metric_families
from service import serve, write_config
from tritonclient import http

REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": list(range(8))}]}
WRONG = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [1]}]}


@pytest.fixture
def service(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    model_zoo.save(model_zoo.relu(), tmp_path / "idle")
    config = write_config(
        tmp_path,
        {"name": "m", "base_path": "m"},
        {"name": "idle", "base_path": "idle"},
        monitoring={"metrics": {"enable": True}},
    )
    with serve(tmp_path, "-w", "4", config=config) as running:
        running.wait_for(lambda: len(running.workers()) == 4)
        yield running


def infer(service, count, request=REQUEST, model="m"):
    threads = [threading.Thread(target=lambda: service.infer(model, request)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def statistics(service, path="/v2/models/m/stats"):
    (entry,) = service.get(path).json()["model_stats"]
    return entry


def metric(service, sample_name, /, **labels):
    """Return the sum of the samples with this name and these labels."""
    families = text_string_to_metric_families(service.get("/metrics").body.decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name in (sample_name, f"{sample_name}_total") and labels.items() <= sample.labels.items()
    )


def test_statistics_are_exact_over_all_workers_and_survive_their_death(service):
    infer(service, 20)
    infer(service, 5, WRONG)
    before = set(service.workers())
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda: len(service.workers()) == 4 and not before & set(service.workers()))
    infer(service, 10)
    entry = statistics(service)
    assert (entry["name"], entry["version"]) == ("m", "1")
    assert (entry["inference_count"], entry["execution_count"]) == (60, 30)
    assert entry["inference_stats"]["success"]["count"] == 30
    assert entry["inference_stats"]["fail"]["count"] == 5
    times = [entry["inference_stats"][key]["ns"] for key in ("compute_input", "compute_infer", "compute_output")]
    assert all(time > 0 for time in times)
    assert sum(times) <= entry["inference_stats"]["success"]["ns"]


def test_tensor_without_elements_counts_as_no_batch(tmp_path):
    """Its other dims may be larger than the counters hold."""
    model_zoo.save(model_zoo.passthrough(x=(Type.f32, (-1, -1))), tmp_path / "m")
    with serve(tmp_path, "-w", "1", config=write_config(tmp_path, {"name": "m", "base_path": "m"})) as service:
        for shape in ([3, 0], [0, 3], [2, 3]):
            data = [1] * (shape[0] * shape[1])
            answer = service.infer("m", {"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": data}]})
            assert answer.status == 200, answer.json()
        entry = statistics(service)
        assert (entry["inference_count"], entry["execution_count"]) == (2, 3)
        assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in entry["batch_stats"]] == [(2, 1)]


def test_statistics_survive_a_reload(service, tmp_path):
    infer(service, 7)
    model_zoo.save(model_zoo.relu(), tmp_path / "idle", 2)
    assert service.request("POST", "/v1/config/reload").status == 201
    infer(service, 4)
    assert statistics(service)["execution_count"] == 11


def test_statistics_are_selected_by_model_and_version(service):
    names = [(entry["name"], entry["version"]) for entry in service.get("/v2/models/stats").json()["model_stats"]]
    assert sorted(names) == [("idle", "1"), ("m", "1")]
    assert statistics(service, "/v2/models/idle/versions/1/stats")["inference_count"] == 0
    for path in ("/v2/models/x/stats", "/v2/models/m/versions/2/stats"):
        answer = service.get(path)
        assert (answer.status, list(answer.json())) == (404, ["error"])


def test_tritonclient_reads_the_statistics(service):
    infer(service, 3)
    client = http.InferenceServerClient(f"127.0.0.1:{service.port}")
    (entry,) = client.get_inference_statistics("m")["model_stats"]
    assert entry["inference_stats"]["success"]["count"] == 3
    client.close()


def test_metrics_have_ovms_s_names_and_are_exact(service):
    infer(service, 12)
    infer(service, 2, WRONG)
    labels = {"name": "m", "interface": "REST", "method": "ModelInfer"}
    assert metric(service, "ovms_requests_success", **labels) == 12
    assert metric(service, "ovms_requests_fail", **labels) == 2
    assert metric(service, "ovms_request_time_us_count", name="m") == 12
    assert metric(service, "ovms_inference_time_us_count", name="m") == 12
    assert metric(service, "ovms_rest_requests_refused", name="m", kind="invalid") == 2


def test_metrics_describe_the_workers(service):
    service.wait_for(lambda: metric(service, "ovms_streams", name="m") == 4)  # all of them are up
    (pid, *_) = service.workers()
    os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda: len(service.workers()) == 4 and pid not in service.workers())
    text = service.get("/metrics").body.decode()
    restarts = [line for line in text.splitlines() if "restarts" in line and not line.startswith("#")]
    assert [line.split()[1] for line in restarts] == ["1.0"]


def test_refusals_because_of_overload_are_counted(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_MAX_WAITING="1", OVMS_REST_METRICS_ENABLE="1") as service:
        body = json.dumps(REQUEST).encode()
        request = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        (pid,) = service.wait_for(service.workers)
        os.kill(pid, signal.SIGSTOP)
        connections = [service.connect() for _ in range(6)]
        for connection in connections:
            connection.sendall(request)
        os.kill(pid, signal.SIGCONT)
        statuses = [int(connection.recv(65536).split()[1]) for connection in connections]
        for connection in connections:
            connection.close()
        assert set(statuses) == {200, 503}
        refused = metric(service, "ovms_rest_requests_refused", name="m", kind="overload")
        assert refused == statuses.count(503)


def test_metrics_are_disabled_by_default(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    with serve(tmp_path, "-w", "1", config=write_config(tmp_path, {"name": "m", "base_path": "m"})) as service:
        answer = service.get("/metrics")
        assert (answer.status, "monitoring" in answer.json()["error"]) == (404, True)


def test_metrics_show_readiness_of_expected_models_and_busy_workers_that_infer(tmp_path):
    """A model that was unloaded is not expected to serve, nor its pipeline; the control worker never infers."""
    model_zoo.save(model_zoo.relu(), tmp_path / "m")
    model_zoo.save(model_zoo.relu(), tmp_path / "m", 2)
    (tmp_path / "m" / "2" / "model.xml").write_text("no model")
    model_zoo.save(model_zoo.relu(), tmp_path / "unloaded")
    node = {
        "name": "only",
        "type": "DL model",
        "model_name": "unloaded",
        "inputs": [{"x": {"node_name": "request", "data_item": "x"}}],
        "outputs": [{"data_item": "y", "alias": "y"}],
    }
    pipeline = {
        "name": "pipeline",
        "inputs": ["x"],
        "nodes": [node],
        "outputs": [{"y": {"node_name": "only", "data_item": "y"}}],
    }
    config = write_config(
        tmp_path,
        {"name": "m", "base_path": "m"},
        {"name": "missing", "base_path": "missing"},
        {"name": "unloaded", "base_path": "unloaded"},
        pipeline_config_list=[pipeline],
        monitoring={"metrics": {"enable": True}},
    )
    variables = {"OVMS_REST_MODEL_CONTROL": "local", "OVMS_REST_CONTROL_BIND": f"unix:{tmp_path / 'control'}"}
    with serve(tmp_path, "-w", "2", config=config, **variables) as service:
        ready = {("m", "1"): 1, ("m", "2"): 0, ("missing", "1"): 0, ("unloaded", "1"): 1, ("pipeline", "1"): 1}
        service.wait_for(lambda: readiness(service) == ready)
        assert service.request("POST", "/v2/repository/models/unloaded/unload").status == 200
        del ready["unloaded", "1"], ready["pipeline", "1"]
        assert readiness(service) == ready
        # The two that infer, and besides them the control worker.
        service.wait_for(lambda: [len(workers(service, name)) for name in ("busy", "cpu_seconds")] == [2, 3])
        service.wait_until_idle()
        assert sum(workers(service, "busy").values()) <= 1  # the one that answers
        # The clock ticks every 10 ms: each look costs the worker that answers about one.
        service.wait_for(lambda: 0 < max(workers(service, "cpu_seconds").values()) < 60)
        memory = [metric(service, f"ovms_rest_memory_{what}_bytes") for what in ("available", "limit")]
        assert 0 < memory[0] < memory[1] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def families(service):
    text = service.get("/metrics").body.decode()
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def readiness(service):
    samples = families(service).get("ovms_rest_model_ready", ())
    return {(sample.labels["name"], sample.labels["version"]): sample.value for sample in samples}


def workers(service, what):
    return {sample.labels["worker"]: sample.value for sample in families(service)[f"ovms_rest_worker_{what}"]}
