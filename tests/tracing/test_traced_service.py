"""Traces of a real service: its spans at a collector, its logs, and what happens when something fails."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import model_zoo
import pytest
from collector import collecting
from processes import adopting, memory
from raw_http import RELU, infer
from service import is_running, serve, wait_for_end, write_config
from workers import send_together

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FAST = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
# A node in Python: it shows which headers its calls to other services would have, and fails for negative numbers.
NODE = """
import numpy as np
from ovms_rest.tracing.context import trace_headers

def inputs(params):
    return {"x": ("FP32", [-1, 4])}

def outputs(params):
    return {"x": ("FP32", [-1, 4]), "headers": ("BYTES", [2])}

def execute(inputs, params):
    if inputs["x"].min() < 0:
        raise ValueError("negative")
    headers = trace_headers()
    return {"x": inputs["x"], "headers": np.array([headers.get(k, "") for k in ("traceparent", "tracestate")], object)}
"""
PIPELINE = {
    "name": "line",
    "inputs": ["x"],
    "nodes": [
        {
            "name": "code",
            "type": "custom",
            "library_name": "code",
            "inputs": [{"x": {"node_name": "request", "data_item": "x"}}],
            "outputs": [{"data_item": name, "alias": name} for name in ("x", "headers")],
        },
        {
            "name": "model",
            "type": "DL model",
            "model_name": "relu",
            "inputs": [{"x": {"node_name": "code", "data_item": "x"}}],
            "outputs": [{"data_item": "y", "alias": "y"}],
        },
    ],
    "outputs": [
        {"y": {"node_name": "model", "data_item": "y"}},
        {"headers": {"node_name": "code", "data_item": "headers"}},
    ],
}
POSITIVE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def save(directory, *more):
    """Save the model relu and the pipeline; return the config, which has more models."""
    model_zoo.save(model_zoo.relu(), directory / "relu")
    (directory / "node.py").write_text(NODE)
    models = [{"name": "relu", "base_path": "relu"}, *more]
    codes = [{"name": "code", "base_path": "node.py"}]
    return write_config(directory, *models, pipeline_config_list=[PIPELINE], custom_node_library_config_list=codes)


@pytest.fixture(scope="module")
def collector():
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory, collector):
    """Serve with one worker, an access log in JSON, and traces."""
    directory = tmp_path_factory.mktemp("traced")
    variables = {
        **FAST,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_SERVICE_NAME": "digits-east",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OVMS_REST_ACCESS_LOG": "json",
        "OVMS_REST_ACCESS_LOG_FILE": str(directory / "access.log"),
        "OVMS_REST_METRICS_ENABLE": "true",
    }
    config = save(directory, {"name": "batches", "base_path": "relu", "max_batch_size": 8})
    with serve(directory, "-w", "1", config=config, **variables) as running:
        running.access_log = directory / "access.log"
        running.wait_for(lambda: workers_of(running))
        yield running


def sender_of(service):
    """Return the process that sends spans, None if there is none."""
    return next((pid for pid in service.workers() if is_sender(pid)), None)


def workers_of(service):
    return [pid for pid in service.workers() if not is_sender(pid)]


def is_sender(pid):
    with contextlib.suppress(OSError):
        return b"ovms_rest.tracing.sender" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def parent_of(trace_id, flags=1):
    return f"00-{trace_id}-{SPAN_ID}-{flags:02x}"


def ids(count):
    """Return ids of traces that no other test uses."""
    return [os.urandom(16).hex() for _ in range(count)]


def access_of(service, request_id):
    """Wait for the line of a request in the access log."""

    def find():
        lines = map(json.loads, service.access_log.read_text().splitlines())
        return next((line for line in lines if line["request_id"] == request_id), None)

    return service.wait_for(find)


def dropped(service):
    """Return the counts of sent and dropped spans, by reason."""
    text = service.get("/metrics").body.decode()
    found = re.findall(r'^ovms_rest_spans_(?:sent|dropped\{reason="(\w+)"\}) (\d+)', text, re.MULTILINE)
    return {reason or "sent": int(count) for reason, count in found}


# --- Spans


def test_inference_continues_the_trace_of_its_client(service, collector):
    (trace_id,) = ids(1)
    before = time.time_ns()
    answer = service.infer("relu", RELU, traceparent=parent_of(trace_id), tracestate="vendor=1")
    spans = collector.trace(trace_id, 5)
    server = spans["POST /v2/models/{name}/infer"]
    assert (server.parent_id, server.tracestate) == (SPAN_ID, "vendor=1")
    assert (server.is_server, server.is_error) == (True, False)
    assert set(spans) == {server.name, "queue", "decode", "infer relu", "encode"}
    stages = [spans[name] for name in ("queue", "decode", "infer relu", "encode")]
    assert {stage.parent_id for stage in stages} == {server.span_id}
    times = [server.began_ns, *(time for stage in stages for time in (stage.began_ns, stage.ended_ns)), server.ended_ns]
    assert times == sorted(times)
    assert before < server.began_ns < server.ended_ns < time.time_ns()
    assert all(stage.ended_ns > stage.began_ns for stage in stages)
    assert server.resource["service.name"] == "digits-east"
    assert server.resource["deployment.environment.name"] == "test"
    assert server.attributes["http.response.status_code"] == answer.status == 200
    assert server.attributes["ovms_rest.request_id"] == answer.headers["x-request-id"]
    assert server.attributes["http.response.body.size"] == len(answer.body)
    assert collector.paths == {"/v1/traces"}
    line = access_of(service, answer.headers["x-request-id"])
    assert line["trace_id"] == trace_id
    assert line["inference_us"] == (spans["infer relu"].ended_ns - spans["infer relu"].began_ns) // 1000


def test_inference_without_parent_begins_a_trace_which_the_access_log_names(service, collector):
    answer = service.infer("relu", RELU)
    trace_id = access_of(service, answer.headers["x-request-id"])["trace_id"]
    assert collector.trace(trace_id, 5)["POST /v2/models/{name}/infer"].parent_id == ""


def test_client_decides_what_is_recorded(service, collector):
    unsampled, sampled = ids(2)
    answer = service.infer("relu", RELU, traceparent=parent_of(unsampled, flags=0))
    assert access_of(service, answer.headers["x-request-id"])["trace_id"] == unsampled
    service.infer("relu", RELU, traceparent=parent_of(sampled))
    collector.trace(sampled, 5)
    assert not [span for span in collector.spans if span.trace_id == unsampled]


def test_request_that_does_not_infer_is_recorded_only_with_a_parent(service, collector):
    (trace_id,) = ids(1)
    service.get("/v2/health/ready")
    service.request("GET", "/v2/models/relu", headers={"traceparent": parent_of(trace_id)})
    collector.trace(trace_id, 1)
    names = {span.name for span in collector.spans}
    assert "GET /v2/models/{name}" in names
    assert "GET /v2/health/ready" not in names


def test_pipeline_has_a_span_for_each_node(service, collector):
    (trace_id,) = ids(1)
    assert service.infer("line", POSITIVE, traceparent=parent_of(trace_id)).status == 200
    spans = collector.trace(trace_id, 7)
    whole, code, model = (spans[name] for name in ("infer line", "node code", "node model"))
    assert code.parent_id == model.parent_id == whole.span_id
    assert whole.began_ns <= code.began_ns < code.ended_ns <= model.began_ns < model.ended_ns <= whole.ended_ns
    assert model.attributes["ovms_rest.model.name"] == "relu"
    assert code.attributes == {"ovms_rest.node.name": "code", "ovms_rest.node.sessions": 1}


def test_node_hands_the_trace_on_to_what_it_calls(service, collector):
    recorded, unrecorded = ids(2)
    answer = service.infer("line", POSITIVE, traceparent=parent_of(recorded), tracestate="a=1")
    span_id = collector.trace(recorded, 7)["node code"].span_id
    assert headers_of(answer) == [f"00-{recorded}-{span_id}-01", "a=1"]
    answer = service.infer("line", POSITIVE, traceparent=parent_of(unrecorded, flags=0))
    assert headers_of(answer) == [parent_of(unrecorded, flags=0), ""]


def headers_of(answer):
    return next(output["data"] for output in answer.json()["outputs"] if output["name"] == "headers")


def test_requests_of_a_batch_share_the_times_of_its_inference(service, collector):
    """On a busy machine the worker may read the requests in several turns; then they are sent again."""
    for _ in range(20):
        traces = ids(3)
        request = json.loads(RELU)
        requests = [infer("batches", request, f"traceparent: {parent_of(trace)}") for trace in traces]
        assert [answer.status for answer in send_together(service, requests)] == [200] * len(requests)
        spans = [collector.trace(trace, 6) for trace in traces]
        inferences = [found["infer batches"] for found in spans]
        if {span.attributes["ovms_rest.batch.rows"] for span in inferences} == {3}:
            break
    assert {span.attributes["ovms_rest.batch.rows"] for span in inferences} == {3}
    first = inferences[0]
    for span in inferences:
        assert abs(span.began_ns - first.began_ns) < 1_000_000  # each request converts between clocks for itself
    for found in spans:
        waiting = found["wait for batch"]
        assert found["decode"].ended_ns == waiting.began_ns < waiting.ended_ns == found["infer batches"].began_ns


# --- Errors


def test_mistake_of_a_client_is_no_error_of_the_service(service, collector):
    (trace_id,) = ids(1)
    answer = service.infer("relu", b"{}", traceparent=parent_of(trace_id))
    spans = collector.trace(trace_id, 3)
    server = spans["POST /v2/models/{name}/infer"]
    assert (server.attributes["http.response.status_code"], server.is_error) == (400, False)
    assert server.attributes["ovms_rest.error"] == answer.json()["error"]
    assert spans["decode"].attributes["error.type"] == "400"


def test_failure_is_an_error_and_the_log_names_its_trace(service, collector):
    (trace_id,) = ids(1)
    answer = service.infer("line", RELU, traceparent=parent_of(trace_id))
    assert answer.status == 500
    spans = collector.trace(trace_id, 5)
    assert {name for name, span in spans.items() if span.is_error} == {
        "POST /v2/models/{name}/infer",
        "infer line",
        "node code",
    }
    assert f"custom node library 'code' failed (trace {trace_id})" in service.log


def test_request_that_is_refused_before_the_application_sees_it_has_a_span(service, collector):
    (trace_id,) = ids(1)
    head = f"POST /v2/models/relu/infer HTTP/1.1\r\nHost: x\r\ntraceparent: {parent_of(trace_id)}\r\n"
    assert service.raw(f"{head}Content-Length: 99999999999\r\n\r\n".encode()).status == 413
    assert collector.trace(trace_id, 1)["POST /v2/models/{name}/infer"].attributes["http.response.status_code"] == 413


# --- Processes


def test_workers_and_arbiter_do_not_load_opentelemetry(service):
    """Its protobuf library would show among the mapped files, as it does in the process that sends."""
    service.wait_for(lambda: has_loaded(sender_of(service)))
    assert not any(map(has_loaded, (service.process.pid, *workers_of(service))))


def has_loaded(pid):
    """Return whether a process has loaded OpenTelemetry."""
    return pid is not None and "google/_upb" in Path(f"/proc/{pid}/maps").read_text()


def works(service, collector):
    """Check that a new request reaches the collector."""
    (trace_id,) = ids(1)
    assert service.infer("relu", RELU, traceparent=parent_of(trace_id)).status == 200
    collector.trace(trace_id, 5)


def test_sender_that_dies_is_started_again(service, collector):
    pid = service.wait_for(lambda: sender_of(service))
    os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda: sender_of(service) not in (None, pid))
    assert "the process that sends spans ended with signal 9; it is started again" in service.log
    works(service, collector)


def test_sender_ignores_the_signals_that_end_a_service(service, collector):
    """Systemd sends them to all processes, but the last spans of the workers are still to come."""
    works(service, collector)  # so that it has set its handlers
    pid = sender_of(service)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        os.kill(pid, number)
    works(service, collector)
    assert sender_of(service) == pid


def test_traces_go_on_after_a_worker_died_and_after_a_reload(service, collector):
    (worker,) = workers_of(service)
    os.kill(worker, signal.SIGKILL)
    wait_for_end(worker)
    works(service, collector)
    before = workers_of(service)
    service.signal(signal.SIGHUP)
    service.wait_for(lambda: (now := workers_of(service)) and not set(now) & set(before))
    works(service, collector)


def test_metrics_count_the_spans(service, collector):
    works(service, collector)
    service.wait_for(lambda: dropped(service)["sent"] >= 5)
    assert dropped(service).keys() == {"sent", "full", "failed"}


# --- Collectors that fail


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A service whose collector refuses spans at first, with room for 20 spans; yield both."""
    directory = tmp_path_factory.mktemp("failing")
    with collecting("refuse") as collector:
        variables = {
            **FAST,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.endpoint}/own/path",
            "OTEL_BSP_MAX_QUEUE_SIZE": "20",
            "OVMS_REST_METRICS_ENABLE": "true",
        }
        with serve(directory, "-w", "1", config=save(directory), **variables) as service:
            yield service, collector


def test_inferences_go_on_while_the_collector_refuses_spans(failing):
    service, collector = failing
    collector.mode = "refuse"
    service.infer("relu", RELU)
    service.wait_for(lambda: dropped(service)["failed"] >= 5)
    service.infer("relu", RELU)
    service.wait_for(lambda: dropped(service)["failed"] >= 10)
    collector.mode = "take"
    service.infer("relu", RELU)
    service.wait_for(lambda: "traces: spans are sent again" in service.log)
    assert service.log.count("traces: spans cannot be sent and are dropped: ") == 1
    assert collector.paths == {"/own/path"}


def test_spans_are_dropped_while_the_collector_does_not_answer(failing):
    """300 requests have 1500 spans; 20 are in a request that is not answered, 20 wait, the socket has room for more."""
    service, collector = failing
    collector.mode, before = "hang", collector.requests
    service.infer("relu", RELU)
    service.wait_for(lambda: collector.requests > before)
    full, size = dropped(service)["full"], memory(sender_of(service), "VmRSS")
    for _ in range(300):
        assert service.infer("relu", RELU).status == 200
    service.wait_for(lambda: dropped(service)["full"] - full > 1400)
    assert memory(sender_of(service), "VmRSS") - size < 8 * 2**20


def test_service_ends_promptly_while_the_collector_does_not_answer(tmp_path):
    with collecting("hang") as collector:
        variables = {**FAST, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        with serve(tmp_path, "-w", "1", config=save(tmp_path), **variables) as service:
            service.infer("relu", RELU)
            service.wait_for(lambda: collector.requests)
            sender, began = sender_of(service), time.monotonic()
            service.process.terminate()
            assert service.process.wait(60) == 0
            # A worker drains for a second, and the sender gets another one.
            assert time.monotonic() - began < 8
            assert not is_running(sender)


def test_last_spans_are_sent_when_the_service_ends(tmp_path):
    (trace_id,) = ids(1)
    with collecting() as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        with serve(tmp_path, "-w", "1", config=save(tmp_path), **variables) as service:
            service.wait_for(lambda: has_loaded(sender_of(service)))
            service.infer("relu", RELU, traceparent=parent_of(trace_id))
        assert len([span for span in collector.spans if span.trace_id == trace_id]) == 5


def test_sender_ends_after_an_arbiter_that_was_killed(tmp_path):
    with collecting() as collector:
        variables = {**FAST, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        with adopting(), serve(tmp_path, "-w", "1", config=save(tmp_path), **variables) as service:
            sender = service.wait_for(lambda: sender_of(service))
            service.wait_for(lambda: has_loaded(sender))
            workers = workers_of(service)
            assert workers
            service.process.kill()
            service.process.wait()
            for pid in (*workers, sender):
                wait_for_end(pid)
                os.waitpid(pid, 0)


# --- Without traces


def test_traceparent_is_handed_on_and_logged_without_traces(tmp_path):
    (trace_id,) = ids(1)
    variables = {"OVMS_REST_ACCESS_LOG": "text", "OVMS_REST_METRICS_ENABLE": "true"}
    with serve(tmp_path, "-w", "1", config=save(tmp_path), **variables) as service:
        answer = service.infer("line", POSITIVE, traceparent=parent_of(trace_id), tracestate="a=1")
        assert headers_of(answer) == [parent_of(trace_id), "a=1"]
        assert headers_of(service.infer("line", POSITIVE)) == ["", ""]
        assert service.infer("line", RELU, traceparent=parent_of(trace_id)).status == 500
        assert f"custom node library 'code' failed (trace {trace_id})" in service.log
        service.wait_for(lambda: service.log.count(f" trace_id={trace_id}\n") == 2)
        assert service.log.count("trace_id=") == 2
        assert dropped(service) == {}
        assert sender_of(service) is None


def test_other_workers_of_gunicorn_send_no_spans_and_the_log_says_so(tmp_path):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with serve(tmp_path, "-k", "sync", config=save(tmp_path), **variables) as service:
        assert service.infer("relu", RELU).status == 200
        assert "no traces are sent: gunicorn's sync worker records none" in service.log
        assert sender_of(service) is None
