"""W3C Trace Context: the headers, the context of the current request, and its log lines."""

import logging
import subprocess
import sys

import pytest
from greenlet import greenlet

from ovms_rest.log import log
from ovms_rest.tracing.context import (
    TRACE,
    TraceContext,
    child_id,
    clean_tracestate,
    name_traces_in_log,
    read_context_of,
    read_trace_context,
    trace_headers,
    within,
    within_child,
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
CONTEXT = TraceContext(TRACE_ID, SPAN_ID, 1)

# --- traceparent (sections 3.2 and 4.3, and the cases of the test suite of the working group)


@pytest.mark.parametrize(
    ("traceparent", "flags"),
    [
        (PARENT, 1),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", 0),
        (f"00-{TRACE_ID}-{SPAN_ID}-03", 3),  # random, of Level 2
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", 3),  # unknown flags are not handed on
        (f"cc-{TRACE_ID}-{SPAN_ID}-01", 1),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be-like", 1),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-", 1),
    ],
)
def test_traceparent_is_read(traceparent, flags):
    assert read_trace_context(traceparent, "a=1") == TraceContext(TRACE_ID, SPAN_ID, flags, "a=1")


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        PARENT.upper(),
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID.upper()}-01",
        f"{PARENT}-more",  # version 00 has four fields
        f"{PARENT}.",
        f"cc-{TRACE_ID}-{SPAN_ID}-01.what-the-future-will-be-like",
        f"0-{TRACE_ID}-{SPAN_ID}-01",
        f"000-{TRACE_ID}-{SPAN_ID}-01",
        f".0-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID[1:]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}0-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID[1:]}-01",
        f"00-{TRACE_ID}-{SPAN_ID}0-01",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"00-{TRACE_ID}-{SPAN_ID}-.0",
        f"00-.{TRACE_ID[1:]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-.{SPAN_ID[1:]}-01",
        f"{PARENT},{PARENT}",  # sent twice
        f"{PARENT}\n",
    ],
)
def test_invalid_traceparent_is_ignored(traceparent):
    assert read_trace_context(traceparent) is None


def test_noted_context_comes_before_that_of_the_headers():
    environ = {"HTTP_TRACEPARENT": PARENT, "HTTP_TRACESTATE": "a=1"}
    assert read_context_of(environ) == CONTEXT._replace(tracestate="a=1")
    noted = CONTEXT._replace(span_id="1" * 16)
    assert read_context_of({**environ, TRACE: noted}) is noted
    assert read_context_of({}) is None


# --- tracestate (section 3.3)


@pytest.mark.parametrize(
    ("tracestate", "cleaned"),
    [
        ("", ""),
        ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("a=1 , b=2\t,, c=3", "a=1,b=2,c=3"),
        ("fw529a3039@dt=FfAIAqL", "fw529a3039@dt=FfAIAqL"),
        ("a=b c!\"#$%&'()*+-./:;<>?@[]^_`{|}~", "a=b c!\"#$%&'()*+-./:;<>?@[]^_`{|}~"),
        (",".join(f"k{number}=1" for number in range(32)), ",".join(f"k{number}=1" for number in range(32))),
        (",".join(f"k{number}=1" for number in range(33)), ""),
        ("a=1,a=2", ""),
        ("a", ""),
        ("a=", ""),
        ("=1", ""),
        ("A=1", ""),
        ("a=1=2", ""),
        ("a=\x7f", ""),
        ("a@=1", ""),
        ("a@b@c=1", ""),
        (f"{'k' * 257}=1", ""),
        (f"a={'v' * 257}", ""),
    ],
)
def test_tracestate_is_handed_on_if_it_is_valid(tracestate, cleaned):
    assert clean_tracestate(tracestate) == cleaned


def test_long_tracestate_loses_its_long_members_first_and_then_its_last_ones():
    short = [f"k{number}={'v' * 96}" for number in range(6)]
    assert clean_tracestate(",".join([f"long={'v' * 200}", *short])) == ",".join(short[:5])


# --- The current request


def test_calls_of_a_request_without_a_trace_have_no_headers():
    assert trace_headers() == {}


def test_headers_continue_the_trace():
    with within(CONTEXT):
        assert trace_headers() == {"traceparent": PARENT}
    with within(CONTEXT._replace(tracestate="a=1, b=2", flags=0)):
        assert trace_headers() == {"traceparent": f"{PARENT[:-1]}0", "tracestate": "a=1,b=2"}
    with within(CONTEXT._replace(tracestate="INVALID")):
        assert trace_headers() == {"traceparent": PARENT}
    assert trace_headers() == {}


def test_headers_within_a_node_have_its_span_as_the_parent():
    with within(CONTEXT), within_child(16):
        assert trace_headers() == {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203341-01"}
    with within_child(16):
        assert trace_headers() == {}


def test_ids_of_children_differ_and_are_never_zero():
    assert child_id("ffffffffffffffff", 2) == "0000000000000001"
    assert child_id("ffffffffffffffff", 1) == "8000000000000000"
    assert len({child_id(SPAN_ID, number) for number in range(100)}) == 100


def test_requests_that_wait_for_each_other_keep_their_traces():
    found = []

    def run(context):
        with within(context):
            parent.switch()
            found.append(trace_headers()["traceparent"])

    parent = greenlet.getcurrent()
    contexts = [CONTEXT._replace(span_id=f"{number:016x}") for number in (1, 2)]
    running = [greenlet(run) for _ in contexts]
    for one, context in zip(running, contexts, strict=True):
        one.switch(context)
    assert trace_headers() == {}
    for one in running:
        one.switch()
    assert [header.split("-")[2] for header in found] == [context.span_id for context in contexts]


# --- The log


def test_warnings_and_errors_name_the_trace_of_the_current_request(caplog):
    name_traces_in_log()
    name_traces_in_log()
    caplog.set_level(logging.INFO)
    with within(CONTEXT):
        log.warning("model %r failed", "m")
        log.info("as usual")
    log.error("elsewhere")
    assert caplog.messages == [f"model 'm' failed (trace {TRACE_ID})", "as usual", "elsewhere"]


# --- Imports


def test_service_without_traces_does_not_import_opentelemetry():
    program = "import sys, ovms_rest.app, ovms_rest.worker.worker; print([n for n in sys.modules if 'telemetry.' in n])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
