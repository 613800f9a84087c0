"""What becomes of a request: its spans, their times and attributes."""

import pytest

from ovms_rest.tracing.spans import InferenceTimes, NodeTimes, RequestTrace, decode, make_spans, tracestate_of


def replace(value, **fields):
    return value._replace(**fields)


INFERENCE = InferenceTimes("relu", "1", "mine", 4, queue_ns=100, input_ns=20, infer_ns=300, output_ns=40)
REQUEST = RequestTrace(
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="00000000000000f0",
    parent_id="b7ad6b7169203331",
    flags=1,
    tracestate="a=1, b=2",
    clock_ns=10_000,
    received_ns=1000,
    ended_ns=1500,
    method="POST",
    path="/v2/models/relu/infer",
    route="/v2/models/{name}/infer",
    scheme="http",
    protocol="HTTP/1.1",
    host="127.0.0.1:8000",
    client="127.0.0.2",
    user_agent="test",
    request_id="abc-1",
    status=200,
    request_bytes=110,
    response_bytes=120,
    inference=INFERENCE,
)
BATCH = replace(INFERENCE, queue_ns=100 + 50, parked_ns=50, began_ns=1150, batch_rows=9)
NODES = [
    tuple(NodeTimes("find", "", "", 1120, 1200, 1, False)),
    tuple(NodeTimes("read", "m", "2", 1200, 1400, 5, False)),
]
ERROR = '{"error":"bad"}'
# By what happened: the request, and name, begin and end of each span after the first; times since it was received.
CASES = {
    "inference": (
        REQUEST,
        [("queue", 0, 100), ("decode", 100, 120), ("infer relu", 120, 420), ("encode", 420, 460)],
    ),
    "inference in a batch": (
        replace(REQUEST, inference=BATCH),
        [
            *(("queue", 0, 100), ("decode", 100, 120), ("wait for batch", 120, 150)),
            # It waits 20 for others of the batch after its inference.
            *(("infer relu", 150, 450), ("encode", 470, 510)),
        ],
    ),
    "pipeline": (
        replace(REQUEST, inference=replace(INFERENCE, nodes=NODES)),
        [
            *(("queue", 0, 100), ("decode", 100, 120), ("infer relu", 120, 420)),
            *(("node find", 120, 200), ("node read", 200, 400), ("encode", 420, 460)),
        ],
    ),
    "refused before it was started": (
        replace(REQUEST, status=503, error=ERROR, inference=InferenceTimes()),
        [("queue", 0, 500)],
    ),
    "not decoded": (
        replace(REQUEST, status=400, error=ERROR, inference=replace(INFERENCE, input_ns=0, infer_ns=0, output_ns=0)),
        [("queue", 0, 100), ("decode", 100, 500)],
    ),
    "not inferred": (
        replace(REQUEST, status=500, error=ERROR, inference=replace(INFERENCE, infer_ns=0, output_ns=0)),
        [("queue", 0, 100), ("decode", 100, 120), ("infer relu", 120, 500)],
    ),
    "not encoded": (
        replace(REQUEST, status=400, error=ERROR, inference=replace(INFERENCE, output_ns=0)),
        [("queue", 0, 100), ("decode", 100, 120), ("infer relu", 120, 420), ("encode", 420, 500)],
    ),
    "no inference": (replace(REQUEST, method="GET", inference=None), []),
}


@pytest.mark.parametrize(("request_", "expected"), CASES.values(), ids=CASES)
def test_stages_follow_each_other_below_the_request(request_, expected):
    server, *stages = make_spans(request_)
    assert (server.began_ns, server.ended_ns, server.is_server) == (11_000, 11_500, True)
    assert (server.span_id, server.parent_id) == ("00000000000000f0", "b7ad6b7169203331")
    assert [(span.name, span.began_ns - 11_000, span.ended_ns - 11_000) for span in stages] == expected
    ids = {span.name: span.span_id for span in stages}
    for span in stages:
        above = ids["infer relu"] if span.name.startswith("node") else server.span_id
        assert (span.parent_id, span.is_server) == (above, False)
    assert len({span.span_id for span in (server, *stages)}) == 1 + len(stages)


@pytest.mark.parametrize("request_", [request for request, _ in CASES.values()], ids=CASES)
def test_spans_are_counted_before_they_are_made(request_):
    assert request_.count_spans() == len(make_spans(request_))


@pytest.mark.parametrize("request_", [request for request, _ in CASES.values()], ids=CASES)
def test_message_is_read_as_it_was_written(request_):
    assert make_spans(decode(b"\1\0" + request_.encode())) == make_spans(request_)


def test_request_has_the_attributes_of_the_semantic_conventions():
    server = make_spans(REQUEST)[0]
    assert server.name == "POST /v2/models/{name}/infer"
    assert server.attributes == {
        "http.request.method": "POST",
        "url.path": "/v2/models/relu/infer",
        "url.scheme": "http",
        "http.route": "/v2/models/{name}/infer",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "client.address": "127.0.0.2",
        "user_agent.original": "test",
        "network.protocol.version": "1.1",
        "http.request.body.size": 110,
        "http.response.body.size": 120,
        "ovms_rest.request_id": "abc-1",
        "ovms_rest.model.name": "relu",
        "ovms_rest.model.version": "1",
        "ovms_rest.inference.id": "mine",
        "ovms_rest.batch_size": 4,
    }
    assert not server.is_error


def test_unknown_method_and_path_are_not_in_the_name():
    server = make_spans(replace(REQUEST, method="BREW", route="", host="[::1]:80", inference=None))[0]
    assert server.name == "HTTP"
    assert server.attributes["http.request.method"] == "_OTHER"
    assert server.attributes["http.request.method_original"] == "BREW"
    assert (server.attributes["server.address"], server.attributes["server.port"]) == ("::1", 80)
    bare = make_spans(replace(REQUEST, host="example.com", user_agent=""))[0].attributes
    assert bare["server.address"] == "example.com"
    assert not {"server.port", "user_agent.original"} & bare.keys()


@pytest.mark.parametrize(("status", "is_error"), [(400, False), (404, False), (500, True), (503, True)])
def test_only_faults_of_the_server_are_errors(status, is_error):
    server, _, stage = make_spans(replace(CASES["not decoded"][0], status=status))
    assert server.attributes["ovms_rest.error"] == "bad"
    assert stage.attributes["error.type"] == str(status)
    assert server.attributes.get("error.type") == (str(status) if is_error else None)
    assert (server.is_error, stage.is_error) == (is_error, is_error)
    if is_error:
        assert server.error == stage.error == "bad"


def test_failed_node_is_an_error():
    nodes = [NODES[0], (*NODES[1][:-1], True)]
    failed = replace(REQUEST, status=500, inference=replace(INFERENCE, infer_ns=0, output_ns=0, nodes=nodes))
    found = {span.name: span for span in make_spans(failed)}
    assert [found[name].is_error for name in ("node find", "node read", "infer relu")] == [False, True, True]
    assert found["node read"].attributes == {
        "ovms_rest.node.name": "read",
        "ovms_rest.node.sessions": 5,
        "ovms_rest.model.name": "m",
        "ovms_rest.model.version": "2",
        "error.type": "500",
    }


def test_success_without_shards_is_not_an_error():
    empty = replace(REQUEST, status=204, inference=replace(INFERENCE, infer_ns=0, output_ns=0))
    assert not any(span.is_error or "error.type" in span.attributes for span in make_spans(empty))


def test_request_whose_client_was_gone_has_no_status():
    server = make_spans(replace(REQUEST, status=0, inference=InferenceTimes()))[0]
    assert server.attributes["error.type"] == "canceled"
    assert "http.response.status_code" not in server.attributes


def test_batch_has_its_rows():
    infer = make_spans(CASES["inference in a batch"][0])[4]
    assert infer.attributes["ovms_rest.batch.rows"] == 9


@pytest.mark.parametrize("error", ["not JSON", '{"error":1}', "{}", "[]", '{"error":"cut'])
def test_error_that_is_not_ours_is_shown_as_it_is(error):
    assert make_spans(replace(REQUEST, status=500, error=error))[0].error == error


def test_tracestate_is_that_of_the_client():
    assert tracestate_of(REQUEST) == "a=1,b=2"
