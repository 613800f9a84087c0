"""The process that sends spans: what it queues, drops, counts and reports."""

import socket
import threading

import pytest
from collector import collecting

from ovms_rest.shared_memory.statistics import SpanCounts
from ovms_rest.tracing.channel import SpanChannel
from ovms_rest.tracing.sender import Batches, SpanQueue, make_export, read_batches, receive, send
from ovms_rest.tracing.spans import InferenceTimes, RequestTrace


def message_of(spans, content=b""):
    return spans.to_bytes(2, "little") + content


@pytest.fixture
def channel():
    made = SpanChannel(slots=1)
    yield made
    made.close()


# --- Settings


def test_batches_have_the_defaults_of_opentelemetry():
    assert read_batches({}) == Batches(2048, 512, 5.0)


def test_batches_are_read_from_the_variables():
    environ = {"OTEL_BSP_MAX_QUEUE_SIZE": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    assert read_batches(environ) == Batches(20, 10, 0.05)
    assert read_batches({"OTEL_BSP_MAX_QUEUE_SIZE": "20"}) == Batches(20, 20, 5.0)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "many", "9" * 5000, "²"])
def test_invalid_size_counts_as_unset(text):
    assert read_batches(dict.fromkeys(["OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_SCHEDULE_DELAY"], text)) == Batches()


# --- The queue


def test_queue_has_room_for_a_number_of_spans():
    queue = SpanQueue(Batches(10, 10, 5))
    assert queue.put(message_of(6))
    assert not queue.put(message_of(5))
    assert queue.put(message_of(4))
    assert queue.take() == [message_of(6), message_of(4)]
    assert queue.put(message_of(10))


def test_full_batch_is_taken_without_waiting():
    queue = SpanQueue(Batches(100, 10, 3600))
    for number in range(4):
        queue.put(message_of(4, bytes([number])))
    assert queue.take() == [message_of(4, b"\0"), message_of(4, b"\1")]


def test_batch_is_taken_when_its_time_has_come():
    queue = SpanQueue(Batches(100, 10, 0.02))
    queue.put(message_of(1))
    assert queue.take() == [message_of(1)]


def test_message_larger_than_a_batch_is_taken_alone():
    queue = SpanQueue(Batches(100, 10, 3600))
    queue.put(message_of(20))
    queue.put(message_of(1))
    assert queue.take() == [message_of(20)]


def test_closed_queue_returns_its_rest_and_ends():
    queue = SpanQueue(Batches(100, 10, 3600))
    queue.put(message_of(9))
    queue.put(message_of(9))
    queue.close()
    assert [queue.take() for _ in range(3)] == [[message_of(9)], [message_of(9)], []]


def test_waiting_thread_is_woken_by_the_end():
    queue, taken = SpanQueue(Batches(100, 10, 3600)), []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.close()
    thread.join()
    assert taken == [[]]


# --- Receiving and sending


def test_what_the_queue_has_no_room_for_is_dropped_and_counted(channel):
    queue, receiver = SpanQueue(Batches(10, 10, 5)), channel.receiver.dup()
    for spans in (6, 5, 4):
        channel.send(0, spans, b"content")
    channel.close()
    receive(receiver, queue, channel.counters)
    receiver.close()
    assert channel.counters.read() == SpanCounts(0, 5, 0)
    assert queue.take() == [message_of(6, b"content"), message_of(4, b"content")]
    assert queue.take() == []


def test_failures_are_reported_once_and_their_end_too(channel):
    queue, reports, answers = SpanQueue(Batches(100, 1, 5)), [], ["", "down" * 100, "down again", "", "", "down"]
    for spans in range(1, 7):
        queue.put(message_of(spans))
    queue.close()
    send(queue, lambda batch: answers.pop(0), channel.counters, reports.append)
    assert channel.counters.read() == SpanCounts(1 + 4 + 5, 0, 2 + 3 + 6)
    assert reports == [
        f"spans cannot be sent and are dropped: {'down' * 75}",
        "spans are sent again",
        "spans cannot be sent and are dropped: down",
    ]


# --- OpenTelemetry

REQUEST = RequestTrace(
    *("0af7651916cd43dd8448eb211c80319c", "00000000000000f0", "b7ad6b7169203331", 1, "a=1", 10**18, 1000, 1500),
    *("POST", "/v2", "/v2", "http", "HTTP/1.1", "h", "127.0.0.1", "test", "abc-1", 503, 1, 2, '{"error":"full"}'),
    InferenceTimes(),
)


def export(monkeypatch, endpoint, *batch, **environ):
    """Send with these variables; return the reason of a failure."""
    for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **environ}.items():
        monkeypatch.setenv(name, value)
    return make_export(environ)(batch)


MESSAGE = message_of(2, REQUEST.encode())


def test_spans_are_written_as_protobuf(monkeypatch):
    with collecting() as collector:
        more = {
            "OTEL_SERVICE_NAME": "mine",
            "OTEL_RESOURCE_ATTRIBUTES": "a=1",
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        }
        assert export(monkeypatch, collector.endpoint, MESSAGE, **more) == ""
        server, queue = collector.spans
    assert collector.paths == {"/v1/traces"}
    assert collector.headers["api-key"] == "secret"
    assert collector.headers["content-type"] == "application/x-protobuf"
    assert (server.name, server.is_server, server.is_error, server.message) == ("POST /v2", True, True, "full")
    assert (server.trace_id, server.span_id, server.parent_id) == (REQUEST.trace_id, REQUEST.span_id, REQUEST.parent_id)
    assert (server.began_ns, server.ended_ns) == (10**18 + 1000, 10**18 + 1500)
    assert (server.tracestate, server.scope) == ("a=1", "ovms_rest")
    assert server.flags & 0x300 == 0x300  # the parent is known to be remote
    assert (queue.name, queue.is_server, queue.parent_id, queue.flags & 0x300) == (
        "queue",
        False,
        server.span_id,
        0x100,
    )
    assert server.resource["service.name"] == "mine"
    assert server.resource["a"] == "1"
    assert server.attributes["http.response.status_code"] == 503


def test_service_has_a_name_by_default(monkeypatch):
    with collecting() as collector:
        export(monkeypatch, collector.endpoint, MESSAGE)
        export(monkeypatch, collector.endpoint, MESSAGE, OTEL_RESOURCE_ATTRIBUTES="service.name=other")
    assert [span.resource["service.name"] for span in collector.spans] == ["ovms_rest"] * 2 + ["other"] * 2


def test_failures_have_a_reason(monkeypatch):
    with collecting("refuse") as collector:
        assert "400" in export(monkeypatch, collector.endpoint, MESSAGE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert "refused" in export(monkeypatch, endpoint, MESSAGE, OTEL_EXPORTER_OTLP_TIMEOUT="2").lower()
    assert "JSONDecodeError" in export(monkeypatch, endpoint, message_of(1, b"garbage"))
