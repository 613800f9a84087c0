"""The process that sends spans: it receives them from the workers and sends them in batches by OTLP/HTTP.

The only module that imports OpenTelemetry, which reads the variables of the exporter and of the resource. One thread
receives and never waits for the other, which sends; what the queue between them has no room for is dropped and counted.
The process gives way to workers, and ends when all of them, and the arbiter, are gone. What it prints is logged by the
arbiter.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ovms_rest import __version__
from ovms_rest.tracing.channel import SpanCounters, read_count
from ovms_rest.tracing.spans import decode, make_spans, tracestate_of

# After the last worker is gone the rest is sent for this time.
END_SECONDS = 1.0
# More than a socket takes as one message, whatever the system's limits.
_MESSAGE_BYTES = 2**20
_NICE = 10
_SHOWN = 300

# Sends spans; returns the reason if the collector did not accept them, else "".
Export = Callable[[Sequence[bytes]], str]


class Batches(NamedTuple):
    """How spans are collected: the most that are queued, and in a batch, and the seconds until a batch is sent."""

    queued: int = 2048
    size: int = 512
    seconds: float = 5.0


def read_batches(environ: Mapping[str, str]) -> Batches:
    """Read OpenTelemetry's variables of its batch processor; invalid values count as unset."""
    queued, size, milliseconds = (
        int(text) if text.isascii() and text.isdigit() and 0 < int(text[:10]) < 10**9 else default
        for name, default in (("MAX_QUEUE_SIZE", 2048), ("MAX_EXPORT_BATCH_SIZE", 512), ("SCHEDULE_DELAY", 5000))
        for text in [environ.get(f"OTEL_BSP_{name}", "")]
    )
    return Batches(queued, min(size, queued), milliseconds / 1000)


class SpanQueue:
    """Messages of workers between two threads, as many as have `Batches.queued` spans."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._messages: deque[bytes] = deque()
        self._spans = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, message: bytes) -> bool:
        """Add a message; return whether there was room."""
        spans = read_count(message)
        with self._changed:
            if self._spans + spans > self._batches.queued:
                return False
            self._messages.append(message)
            self._spans += spans
            if self._spans >= self._batches.size:
                self._changed.notify()
            return True

    def close(self) -> None:
        """Have `take` return what is left without waiting, and then []."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take(self) -> list[bytes]:
        """Wait for a batch that is full or whose time has come, and return it; [] at the end."""
        with self._changed:
            while not self._is_closed:
                if self._changed.wait_for(self._is_due, self._batches.seconds) or self._messages:
                    break
            taken, spans = list[bytes](), 0
            while self._messages and (not taken or spans + read_count(self._messages[0]) <= self._batches.size):
                taken.append(message := self._messages.popleft())
                spans += read_count(message)
            self._spans -= spans
            return taken

    def _is_due(self) -> bool:
        return self._is_closed or self._spans >= self._batches.size


def receive(receiver: socket.socket, queue: SpanQueue, counters: SpanCounters) -> None:
    """Queue what workers send, until all are gone."""
    buffer = memoryview(bytearray(_MESSAGE_BYTES))
    while size := receiver.recv_into(buffer):
        message = bytes(buffer[:size])
        if not queue.put(message):
            counters.count_full(read_count(message))
    queue.close()


def send(queue: SpanQueue, export: Export, counters: SpanCounters, report: Callable[[str], None]) -> None:
    """Send batches until the queue has ended; report when that begins to fail, and when it works again."""
    is_failing = False
    while batch := queue.take():
        spans = sum(map(read_count, batch))
        reason = export(batch)
        if reason:
            counters.count_failed(spans)
            if not is_failing:
                report(f"spans cannot be sent and are dropped: {reason[:_SHOWN]}")
        else:
            counters.count_sent(spans)
            if is_failing:
                report("spans are sent again")
        is_failing = bool(reason)


class _LastMessages(logging.Handler):
    """Keeps what OpenTelemetry logs, instead of writing it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first messages, which have the reason; later ones say that it was tried again."""
        if len(self._messages) < 1:
            self._messages.append(" ".join(record.getMessage().split()))

    def take(self) -> str:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return "; ".join(messages)


def make_export(environ: Mapping[str, str]) -> Export:
    """Import OpenTelemetry and return a function that sends by its variables, which are those of this process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

    messages = _LastMessages()
    logger = logging.getLogger("opentelemetry")
    logger.addHandler(messages)
    logger.propagate = False
    # An attribute given here would come before OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
    has_name = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if has_name else {"service.name": "ovms_rest"})
    scope = InstrumentationScope("ovms_rest", __version__)
    exporter = OTLPSpanExporter()

    def make(message: bytes) -> list[ReadableSpan]:
        request = decode(message)
        trace_id, flags = int(request.trace_id, 16), TraceFlags(request.flags)
        state = TraceState.from_header([tracestate_of(request)])

        def context_of(span_id: str, is_remote: bool) -> SpanContext | None:
            return SpanContext(trace_id, int(span_id, 16), is_remote, flags, state) if span_id else None

        return [
            ReadableSpan(
                span.name,
                context=context_of(span.span_id, is_remote=False),
                parent=context_of(span.parent_id, is_remote=span.is_server),
                resource=resource,
                attributes=span.attributes,
                kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, span.error or None) if span.is_error else Status(StatusCode.UNSET),
                start_time=span.began_ns,
                end_time=span.ended_ns,
                instrumentation_scope=scope,
            )
            for span in make_spans(request)
        ]

    def export(batch: Sequence[bytes]) -> str:
        messages.take()
        try:
            result = exporter.export([span for message in batch for span in make(message)])
        except Exception as error:  # a batch that cannot be encoded costs itself
            return f"{type(error).__name__}: {error}"
        return "" if result is SpanExportResult.SUCCESS else messages.take() or "no reason is known"

    return export


def main() -> None:
    """Send spans; the arguments are the descriptors of socket and counters, and the size of these."""
    descriptor, memory, size = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of the service; the workers' last spans follow
    os.nice(_NICE)
    counters = SpanCounters(memory, size)
    queue = SpanQueue(read_batches(os.environ))

    def work() -> None:
        try:
            export = make_export(os.environ)
        except Exception as error:
            _report(f"OpenTelemetry cannot be used: {type(error).__name__}: {error}")
            os._exit(1)
        send(queue, export, counters, _report)

    sending = threading.Thread(target=work, daemon=True)
    sending.start()
    receive(socket.socket(fileno=descriptor), queue, counters)
    sending.join(END_SECONDS)
    os._exit(0)


def _report(text: str) -> None:
    try:
        print(" ".join(text.split()), flush=True)
    except OSError:  # the arbiter is gone
        os._exit(0)
