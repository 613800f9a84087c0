"""W3C Trace Context (https://www.w3.org/TR/trace-context/): reading it, handing it on, and naming it in the log."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ovms_rest.log import log

# Where a request's environ has its TraceContext. Without `traceparent`, and without traces, there is none.
TRACE = "ovms_rest.trace"

SAMPLED = 1
_KNOWN_FLAGS = 3  # sampled, and random of Level 2; a sender sets the others to 0

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_INVALID_VERSION, _VERSION = "ff", "00"
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16

# The members of `tracestate`, whose spaces around commas are not part of them.
_KEY = r"(?:[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_MEMBER = re.compile(rf"({_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")
_MAX_MEMBERS = 32
# What the specification asks to hand on at least; members of more than the second number are dropped first.
_MAX_STATE, _LONG_MEMBER = 512, 128


class TraceContext(NamedTuple):
    """The place of a request, or of a part of it, in a trace: ids in lower-case hexadecimal.

    `span_id` is the span to hand on as the parent. `parent_id` is None unless this process records that span; then it
    is the client's span, "" for none.
    """

    trace_id: str
    span_id: str
    flags: int
    tracestate: str = ""  # as received
    parent_id: str | None = None

    def child(self, number: int) -> "TraceContext":
        """Return the context of a span below a recorded one; the numbers of all of them differ."""
        return self._replace(span_id=child_id(self.span_id, number), parent_id=self.span_id)


def child_id(span_id: str, number: int) -> str:
    """Return the id of a span below another one, which both the worker and the sender of the spans can derive."""
    return f"{(int(span_id, 16) + number) % 2**64 or 2**63:016x}"


def read_trace_context(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """Return the context that the two headers describe, None if `traceparent` is invalid, which is ignored then.

    Fields that versions after 00 have added are not read. A header that was sent twice is invalid, since gunicorn joins
    its values by a comma.
    """
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == _INVALID_VERSION or (version == _VERSION and rest) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & _KNOWN_FLAGS, tracestate)


def read_context_of(environ: Mapping[str, Any]) -> TraceContext | None:
    """Return the context of a request: the one noted for it, else that of its headers."""
    context: TraceContext | None = environ.get(TRACE)
    if context is None and "HTTP_TRACEPARENT" in environ:
        return read_trace_context(environ["HTTP_TRACEPARENT"], environ.get("HTTP_TRACESTATE", ""))
    return context


def clean_tracestate(tracestate: str) -> str:
    """Return what is handed on of a `tracestate`: "" if it is invalid, and at most 512 characters of whole members."""
    members = [member for part in tracestate.split(",") if (member := part.strip(" \t"))]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    if len(members) > _MAX_MEMBERS or len(keys) < len(members):
        return ""
    if len(",".join(members)) > _MAX_STATE:
        members = [member for member in members if len(member) <= _LONG_MEMBER]
    while len(",".join(members)) > _MAX_STATE:
        members.pop()
    return ",".join(members)


# --- The current request; each greenlet has its own

_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


class _Within:
    """A block with a context of its own; a generator would cost four times as much."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: TraceContext | None) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._token = _current.set(self._context)

    def __exit__(self, *exception: object) -> None:
        _current.reset(self._token)


def within(context: TraceContext | None) -> AbstractContextManager[None]:
    """Make a context the current one for log lines and calls in the block; None for no trace."""
    return _Within(context)


def current_context() -> TraceContext | None:
    """Return the context of the current request or node, None without a trace."""
    return _current.get()


@contextmanager
def within_child(number: int) -> Iterator[None]:
    """Make a span below the current, recorded one the current one in the block; its number is one of `spans`."""
    context = _current.get()
    if context is None:  # as in an application that another server runs
        yield
        return
    with within(context.child(number)):
        yield


def trace_headers() -> dict[str, str]:
    """Return the headers by which a call to another service joins the trace of the current request.

    For custom nodes of pipelines. {} if the request belongs to no trace.
    """
    context = _current.get()
    if context is None:
        return {}
    headers = {"traceparent": f"{_VERSION}-{context.trace_id}-{context.span_id}-{context.flags:02x}"}
    if tracestate := clean_tracestate(context.tracestate):
        headers["tracestate"] = tracestate
    return headers


class _TraceOfLine(logging.Filter):
    """Adds the trace to the warnings and errors that are logged while a request of a trace runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the trace id to the message; pass every record."""
        if record.levelno >= logging.WARNING and (context := _current.get()) is not None:
            record.msg = f"{record.msg} (trace {context.trace_id})"
        return True


_filter = _TraceOfLine()


def name_traces_in_log() -> None:
    """Have the warnings and errors of this process name the trace of the current request."""
    log.addFilter(_filter)  # once, however often this is called
