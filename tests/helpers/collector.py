"""A collector of traces: it takes spans by OTLP/HTTP and reads their protobuf, or refuses them, or never answers."""

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtobufSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

PATIENCE = 60


class Received(NamedTuple):
    """A span as it came: ids in hexadecimal, times in nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    is_server: bool
    is_error: bool
    message: str
    tracestate: str
    flags: int
    resource: dict[str, Any]
    scope: str


class Collector:
    """The collector; `mode` is "take", "refuse" or "hang"."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.spans: list[Received] = []
        self.paths: set[str] = set()
        self.headers: dict[str, str] = {}
        self.requests = 0
        self.is_over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for(self, count: int = 1, **expected: Any) -> list[Received]:
        """Wait for as many spans with these fields or attributes (`_` for `.`), and return them by their begin."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [span for span in list(self.spans) if matches(span, expected)]) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} spans came: {self.spans}"
            time.sleep(0.02)
        return sorted(found, key=lambda span: (span.began_ns, -span.ended_ns))

    def trace(self, trace_id: str, count: int) -> dict[str, Received]:
        """Wait for as many spans of a trace, and return all of them by name."""
        return {span.name: span for span in self.wait_for(count, trace_id=trace_id)}

    def _make_handler(collector):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests += 1
                if collector.mode == "hang":
                    collector.is_over.wait()
                    return
                if collector.mode == "take":
                    collector.paths.add(self.path)
                    collector.headers = {name.lower(): value for name, value in self.headers.items()}
                    if self.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    collector.spans += read_spans(body)
                self.send_response(200 if collector.mode == "take" else 400)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


def matches(span: Received, expected: dict[str, Any]) -> bool:
    return all(getattr(span, name) == value for name, value in expected.items())


def read_spans(body: bytes) -> list[Received]:
    """Return the spans of an ExportTraceServiceRequest."""
    message = ExportTraceServiceRequest.FromString(body)
    return [
        Received(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _read_attributes(span.attributes),
            span.kind == ProtobufSpan.SPAN_KIND_SERVER,
            span.status.code == Status.STATUS_CODE_ERROR,
            span.status.message,
            span.trace_state,
            span.flags,
            _read_attributes(group.resource.attributes),
            scoped.scope.name,
        )
        for group in message.resource_spans
        for scoped in group.scope_spans
        for span in scoped.spans
    ]


def _read_attributes(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


@contextmanager
def collecting(mode: str = "take") -> Iterator[Collector]:
    """Run a collector."""
    collector = Collector(mode)
    try:
        yield collector
    finally:
        collector.close()
