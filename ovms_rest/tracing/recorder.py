"""Recording requests in a worker: which ones, and what is handed over about them once they have their response."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.channel import SpanChannel
from ovms_rest.tracing.context import SAMPLED, TRACE, TraceContext, read_context_of
from ovms_rest.tracing.sampling import Sampler
from ovms_rest.tracing.spans import InferenceTimes, RequestTrace

# The characters of a client's value, and of the body of an error, that are handed over.
_SHOWN = 256
_SHOWN_ERROR = 1024
_SHOWN_STATE = 8192

Environ = dict[str, Any]
Buffer = bytes | memoryview


class Recorder:
    """Records requests in a worker; made after the fork, so that each worker makes ids of its own."""

    def __init__(self, channel: SpanChannel, sample: Sampler, slot: int, find_route: Callable[[str], str]) -> None:
        """Record for the worker with this slot; `find_route` returns the template of a path's route, "" for none."""
        self._channel = channel
        self._sample = sample
        self._slot = slot
        self._find_route = find_route
        self._bits = random.Random().getrandbits

    def begin(self, environ: Environ, infers: bool) -> None:
        """Note the context of a request in its environ.

        Inferences, and whatever a client sends with a `traceparent`, may be recorded. Others, such as probes, would
        only fill the traces.
        """
        parent = read_context_of(environ)
        if parent is None and not infers:
            return
        trace_id = f"{self._bits(128) or 1:032x}" if parent is None else parent.trace_id
        if self._sample(parent, trace_id):
            span_id = f"{self._bits(64) or 1:016x}"
            flags, state, above = (0, "", "") if parent is None else (parent.flags, parent.tracestate, parent.span_id)
            environ[TRACE] = TraceContext(trace_id, span_id, flags | SAMPLED, state, above)
        elif parent is not None:
            environ[TRACE] = parent._replace(flags=parent.flags & ~SAMPLED)

    def end(self, environ: Environ, status: str, size: int, parts: Sequence[Buffer], received_ns: int) -> None:
        """Hand a request over, if it is recorded; `status` is "" if the client was gone before it got a response."""
        context: TraceContext | None = environ.get(TRACE)
        if context is None or context.parent_id is None:
            return
        now = time.monotonic_ns()
        is_error = status[:1] in ("4", "5") and parts
        trace = RequestTrace(
            trace_id=context.trace_id,
            span_id=context.span_id,
            parent_id=context.parent_id,
            flags=context.flags,
            tracestate=context.tracestate[:_SHOWN_STATE],
            clock_ns=time.time_ns() - now,
            received_ns=received_ns,
            ended_ns=now,
            method=environ["REQUEST_METHOD"][:_SHOWN],
            path=environ["RAW_URI"].partition("?")[0][:_SHOWN],
            route=self._find_route(environ["PATH_INFO"]),
            scheme=environ["wsgi.url_scheme"],
            protocol=environ["SERVER_PROTOCOL"],
            host=environ.get("HTTP_HOST", "")[:_SHOWN],
            client=environ["REMOTE_ADDR"],
            user_agent=environ.get("HTTP_USER_AGENT", "")[:_SHOWN],
            request_id=environ["HTTP_X_REQUEST_ID"],
            status=int(status.split()[0]) if status else 0,
            request_bytes=len(environ["wsgi.input"].buffer) if "wsgi.input" in environ else 0,
            response_bytes=size,
            error=bytes(parts[0][:_SHOWN_ERROR]).decode(errors="replace") if is_error else "",
            inference=_describe(environ.get("ovms_rest.inference")),
        )
        try:
            message = trace.encode()
        except orjson.JSONEncodeError:
            self._channel.counters.count_lost(self._slot, trace.count_spans())
            return
        self._channel.send(self._slot, trace.count_spans(), message)


def _describe(record: InferenceRecord | None) -> InferenceTimes | None:
    if record is None:
        return None
    return InferenceTimes(
        model=record.model_name,
        version=record.model_version,
        id=record.id[:_SHOWN],
        batch=record.batch if record.output_ns else 0,
        queue_ns=record.queue_ns,
        input_ns=record.input_ns,
        parked_ns=record.parked_ns,
        began_ns=record.began_ns,
        batch_rows=record.batch_rows,
        infer_ns=record.infer_ns,
        output_ns=record.output_ns,
        nodes=[tuple(node) for node in record.nodes] if record.nodes else (),
    )
