"""The spans of a request: what a worker hands over about it, and what becomes of that in the process that sends them.

Attributes of HTTP are those of OpenTelemetry's semantic conventions
(https://opentelemetry.io/docs/specs/semconv/http/http-spans/); ours begin with `ovms_rest.`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

from ovms_rest.tracing.channel import read_content
from ovms_rest.tracing.context import child_id, clean_tracestate

Attributes = dict[str, str | int | bool]

# The numbers of the spans below that of the request, whose ids they make (context.child_id).
QUEUE, DECODE, PARKED, INFER, ENCODE = range(1, 6)
FIRST_NODE = 16

_FAILURE, _SERVER_FAULT = 400, 500
# Known methods of HTTP (RFC 9110 and PATCH); others are `_OTHER`.
_METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}


class NodeTimes(NamedTuple):
    """One run of a pipeline's node for all its sessions, by the monotonic clock."""

    name: str
    model: str  # "" for custom code
    version: str
    began_ns: int
    ended_ns: int
    sessions: int
    failed: bool


class InferenceTimes(NamedTuple):
    """The stages of an inference, in nanoseconds; 0 for those that it did not reach, "" for what was not known yet."""

    model: str = ""
    version: str = ""
    id: str = ""
    batch: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    parked_ns: int = 0  # part of `queue_ns` once the inference succeeded
    began_ns: int = 0  # of the model with others in a batch, by the monotonic clock; else 0
    batch_rows: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    nodes: Sequence[tuple[str, str, str, int, int, int, bool]] = ()  # NodeTimes


class RequestTrace(NamedTuple):
    """A request as a worker hands it over; times by the monotonic clock, which `clock_ns` takes to those since 1970."""

    trace_id: str
    span_id: str
    parent_id: str  # "" for none
    flags: int
    tracestate: str
    clock_ns: int
    received_ns: int
    ended_ns: int
    method: str
    path: str
    route: str  # "" if unknown
    scheme: str
    protocol: str  # HTTP/1.1
    host: str
    client: str
    user_agent: str
    request_id: str
    status: int  # 0 without a response, because the client was gone
    request_bytes: int
    response_bytes: int
    error: str = ""  # the body, or its beginning, of a response that reports an error
    inference: InferenceTimes | None = None

    def count_spans(self) -> int:
        """Return how many spans `make_spans` makes."""
        inference = self.inference
        if inference is None or not inference.model:
            return 1 if inference is None else 2
        infers, encodes = bool(inference.input_ns), bool(inference.input_ns and inference.infer_ns)
        return 3 + infers * (1 + bool(inference.began_ns) + len(inference.nodes)) + encodes

    def encode(self) -> bytes:
        """Return it as a message. Raises orjson.JSONEncodeError for a string that is not Unicode."""
        inference = None if self.inference is None else tuple(self.inference)
        return orjson.dumps((*self[:-1], inference))  # it does not write named tuples


def decode(message: bytes) -> RequestTrace:
    """Return the request of a message of `SpanChannel`."""
    *values, inference = orjson.loads(read_content(message))
    return RequestTrace._make((*values, inference and InferenceTimes._make(inference)))


class Span(NamedTuple):
    """A span; times in nanoseconds since 1970, `parent_id` "" for none."""

    name: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: Attributes
    is_server: bool = False
    is_error: bool = False
    error: str = ""  # the message of `is_error`


def make_spans(request: RequestTrace) -> list[Span]:
    """Return the spans of a request, that of the request itself first."""
    error = _read_error(request.error)
    spans = [_make_server_span(request, error)]
    if request.inference is not None:
        spans += _make_stages(request, request.inference, error)
    return spans


def tracestate_of(request: RequestTrace) -> str:
    """Return the `tracestate` of all spans of a request."""
    return clean_tracestate(request.tracestate)


def _make_server_span(request: RequestTrace, error: str) -> Span:
    route = request.route
    method = request.method if request.method in _METHODS else "_OTHER"
    attributes: Attributes = {"http.request.method": method, "url.path": request.path, "url.scheme": request.scheme}
    if method != request.method:
        attributes["http.request.method_original"] = request.method
    address, _, port = request.host.rpartition(":") if _has_port(request.host) else (request.host, "", "")
    if port:
        attributes["server.port"] = int(port)
    if request.status:
        attributes["http.response.status_code"] = request.status
    attributes |= {
        name: value
        for name, value in {
            "http.route": route,
            "server.address": address.strip("[]"),
            "client.address": request.client,
            "user_agent.original": request.user_agent,
            "network.protocol.version": request.protocol.removeprefix("HTTP/"),
            "ovms_rest.request_id": request.request_id,
            "ovms_rest.error": error,
        }.items()
        if value
    }
    attributes |= {
        "http.request.body.size": request.request_bytes,
        "http.response.body.size": request.response_bytes,
    }
    if request.inference is not None:
        attributes |= _describe_inference(request.inference)
    is_error = request.status >= _SERVER_FAULT
    if is_error:
        attributes["error.type"] = str(request.status)
    elif not request.status:
        attributes["error.type"] = "canceled"
    return Span(
        f"{'HTTP' if method == '_OTHER' else method}{' ' if route else ''}{route}",
        request.span_id,
        request.parent_id,
        request.clock_ns + request.received_ns,
        request.clock_ns + request.ended_ns,
        attributes,
        is_server=True,
        is_error=is_error,
        error=error if is_error else "",
    )


def _has_port(host: str) -> bool:
    port = host.rpartition(":")[2]
    return ":" in host and port.isascii() and port.isdigit() and len(port) <= len("65535")


def _describe_inference(inference: InferenceTimes) -> Attributes:
    attributes: Attributes = {}
    if inference.model:
        attributes["ovms_rest.model.name"] = inference.model
        attributes["ovms_rest.model.version"] = inference.version
    if inference.id:
        attributes["ovms_rest.inference.id"] = inference.id
    if inference.batch:
        attributes["ovms_rest.batch_size"] = inference.batch
    return attributes


def _make_stages(request: RequestTrace, inference: InferenceTimes, error: str) -> Iterator[Span]:
    """Yield the spans below that of the request.

    The stage in which an inference failed has no time of its own: it lasts until the end of the request.
    """
    clock, end = request.clock_ns, request.ended_ns

    def make(number: int, name: str, began: int, ended: int, **attributes: str | int | bool) -> Span:
        span_id = child_id(request.span_id, number)
        return Span(name, span_id, request.span_id, clock + began, clock + ended, attributes)

    def make_last(number: int, name: str, began: int, **attributes: str | int | bool) -> Span:
        span = make(number, name, began, end, **attributes)
        if request.status < _FAILURE:
            return span
        span.attributes["error.type"] = str(request.status)
        return span._replace(is_error=request.status >= _SERVER_FAULT, error=error)

    received = request.received_ns
    if not inference.model:
        yield make_last(QUEUE, "queue", received)
        return
    has_inferred = inference.infer_ns > 0
    began = received + inference.queue_ns - (inference.parked_ns if has_inferred else 0)
    yield make(QUEUE, "queue", received, began)
    if not inference.input_ns:
        yield make_last(DECODE, "decode", began)
        return
    decoded = began + inference.input_ns
    yield make(DECODE, "decode", began, decoded)
    inferring = inference.began_ns or decoded
    if inference.began_ns:
        yield make(PARKED, "wait for batch", decoded, inferring)
    rows = {"ovms_rest.batch.rows": inference.batch_rows} if inference.batch_rows else {}
    about: Attributes = {"ovms_rest.model.name": inference.model, "ovms_rest.model.version": inference.version, **rows}
    name = f"infer {inference.model}"
    if has_inferred:
        yield make(INFER, name, inferring, inferring + inference.infer_ns, **about)
    else:
        yield make_last(INFER, name, inferring, **about)
    yield from _make_nodes(request, inference)
    if not has_inferred:
        return
    inferred = decoded + inference.parked_ns + inference.infer_ns
    if inference.output_ns:
        yield make(ENCODE, "encode", inferred, inferred + inference.output_ns)
    else:
        yield make_last(ENCODE, "encode", inferred)


def _make_nodes(request: RequestTrace, inference: InferenceTimes) -> Iterator[Span]:
    """Yield the spans of a pipeline's nodes, below that of its inference."""
    parent = child_id(request.span_id, INFER)
    for number, values in enumerate(inference.nodes, FIRST_NODE):
        node = NodeTimes(*values)
        attributes: Attributes = {"ovms_rest.node.name": node.name, "ovms_rest.node.sessions": node.sessions}
        if node.model:
            attributes |= {"ovms_rest.model.name": node.model, "ovms_rest.model.version": node.version}
        if node.failed:
            attributes["error.type"] = str(request.status)
        yield Span(
            f"node {node.name}",
            child_id(request.span_id, number),
            parent,
            request.clock_ns + node.began_ns,
            request.clock_ns + node.ended_ns,
            attributes,
            is_error=node.failed and request.status >= _SERVER_FAULT,
        )


def _read_error(body: str) -> str:
    """Return the message of a response that reports an error."""
    try:
        message = orjson.loads(body)["error"]
    except (ValueError, TypeError, KeyError, IndexError):
        return body
    return message if isinstance(message, str) else body
