"""Recording requests in a worker."""

import types

import pytest

from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.channel import SpanChannel, read_count
from ovms_rest.tracing.context import TRACE
from ovms_rest.tracing.recorder import Recorder
from ovms_rest.tracing.sampling import choose_sampler
from ovms_rest.tracing.spans import NodeTimes, decode, make_spans

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
ROUTES = {"/v2/models/relu/infer": "/v2/models/{name}/infer"}


@pytest.fixture
def channel():
    made = SpanChannel(slots=1)
    made.receiver.setblocking(False)
    yield made
    made.close()


def record(channel, sampler="parentbased_always_on"):
    return Recorder(channel, choose_sampler(sampler, ""), 0, lambda path: ROUTES.get(path, ""))


def environ_of(**more):
    return {
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/v2/models/relu/infer?secret=1",
        "PATH_INFO": "/v2/models/relu/infer",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_X_REQUEST_ID": "abc-1",
        "wsgi.url_scheme": "http",
        "wsgi.input": types.SimpleNamespace(buffer=b"1234"),
        **more,
    }


def take(channel):
    """Return the request that was handed over, None if none was."""
    try:
        message = channel.receiver.recv(100_000)
    except BlockingIOError:
        return None
    request = decode(message)
    assert read_count(message) == len(make_spans(request))
    return request


def test_request_without_parent_begins_a_trace(channel):
    contexts = []
    for _ in range(2):
        environ = environ_of()
        record(channel).begin(environ, infers=True)
        contexts.append(environ[TRACE])
    first, second = contexts
    assert first.trace_id != second.trace_id
    assert first.span_id != second.span_id
    assert (len(first.trace_id), len(first.span_id), first.flags, first.parent_id) == (32, 16, 1, "")


def test_request_with_parent_continues_its_trace(channel):
    environ = environ_of(HTTP_TRACEPARENT=PARENT[:-1] + "3", HTTP_TRACESTATE="a=1")
    record(channel).begin(environ, infers=True)
    context = environ[TRACE]
    assert (context.trace_id, context.parent_id, context.flags) == (TRACE_ID, SPAN_ID, 3)
    assert context.span_id != SPAN_ID
    assert context.tracestate == "a=1"


def test_request_that_is_not_sampled_hands_its_parent_on(channel):
    recorder = record(channel)
    environ = environ_of(HTTP_TRACEPARENT=PARENT[:-1] + "2")
    recorder.begin(environ, infers=True)
    assert environ[TRACE] == (TRACE_ID, SPAN_ID, 2, "", None)
    recorder.end(environ, "200 OK", 0, [], 0)
    assert take(channel) is None


def test_sampler_may_refuse_a_sampled_parent(channel):
    environ = environ_of(HTTP_TRACEPARENT=PARENT)
    record(channel, "always_off").begin(environ, infers=True)
    assert environ[TRACE] == (TRACE_ID, SPAN_ID, 0, "", None)


def test_invalid_parent_begins_a_trace(channel):
    environ = environ_of(HTTP_TRACEPARENT=PARENT.upper(), HTTP_TRACESTATE="a=1")
    record(channel).begin(environ, infers=True)
    assert environ[TRACE].trace_id != TRACE_ID
    assert (environ[TRACE].parent_id, environ[TRACE].tracestate) == ("", "")


def test_request_that_does_not_infer_is_recorded_only_with_a_parent(channel):
    recorder = record(channel, "always_on")
    for more, expected in (({}, None), ({"HTTP_TRACEPARENT": PARENT}, TRACE_ID)):
        environ = environ_of(REQUEST_METHOD="GET", **more)
        recorder.begin(environ, infers=False)
        recorder.end(environ, "200 OK", 7, [b"content"], 5)
        request = take(channel)
        assert (request and request.trace_id) == expected
    assert request.inference is None
    assert request.error == ""


def test_request_is_handed_over_with_its_record(channel):
    recorder = record(channel)
    inference = InferenceRecord(5, "relu", "1", "mine", 1, 2, 3, 4, batch=6)
    inference.nodes = [NodeTimes("a", "m", "1", 7, 8, 1, False)]
    environ = environ_of(**{"HTTP_TRACEPARENT": PARENT, "HTTP_HOST": "h:1", "ovms_rest.inference": inference})
    recorder.begin(environ, infers=True)
    recorder.end(environ, "200 OK", 9, [b"content"], 5)
    request = take(channel)
    assert request.span_id == environ[TRACE].span_id
    assert (request.path, request.route) == ("/v2/models/relu/infer", "/v2/models/{name}/infer")
    assert (request.status, request.request_bytes, request.response_bytes) == (200, 4, 9)
    stages = request.inference
    assert (stages.model, stages.version, stages.id, stages.batch) == ("relu", "1", "mine", 6)
    assert (stages.queue_ns, stages.input_ns, stages.infer_ns, stages.output_ns) == (1, 2, 3, 4)
    assert [NodeTimes(*node) for node in stages.nodes] == inference.nodes
    assert request.received_ns == 5 < request.ended_ns


def test_error_is_handed_over_with_the_beginning_of_its_body(channel):
    recorder = record(channel)
    recorder.begin(environ := environ_of(), infers=True)
    recorder.end(environ, "500 Internal Server Error", 20, [memoryview(b'{"error":"' + b"x" * 5000)], 5)
    request = take(channel)
    assert request.error == '{"error":"' + "x" * 1014


def test_client_that_is_gone_has_no_status(channel):
    recorder = record(channel)
    recorder.begin(environ := environ_of(), infers=True)
    recorder.end(environ, "", 0, (), 5)
    assert take(channel).status == 0


def test_values_of_clients_are_cut(channel):
    long = "x" * 8000
    recorder = record(channel)
    environ = environ_of(
        HTTP_USER_AGENT=long, HTTP_HOST=long, RAW_URI=f"/{long}", REQUEST_METHOD=long, HTTP_TRACEPARENT=PARENT
    )
    environ |= {"HTTP_TRACESTATE": "x" * 9000, "ovms_rest.inference": InferenceRecord(0, "m", "1", long)}
    recorder.begin(environ, infers=True)
    recorder.end(environ, "404 Not Found", 0, [], 5)
    assert len(take(channel).encode()) < 12_000


def test_record_that_cannot_be_written_is_dropped(channel):
    recorder = record(channel)
    recorder.begin(environ := environ_of(HTTP_USER_AGENT="\ud800"), infers=True)
    recorder.end(environ, "200 OK", 0, [], 5)
    assert take(channel) is None
    assert channel.counters.read().full == 1


def test_workers_make_different_ids(channel):
    """Recorders are made after the fork; ones made before would repeat each other's ids."""
    made = set()
    for _ in range(50):
        record(channel).begin(environ := environ_of(), infers=True)
        made.add(environ[TRACE].trace_id)
    assert len(made) == 50
