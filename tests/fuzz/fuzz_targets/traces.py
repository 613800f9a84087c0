"""The headers of W3C Trace Context.

The input: `traceparent`, a line feed, and `tracestate`.
"""

import re

from ovms_rest.tracing.context import clean_tracestate, read_trace_context, trace_headers, within

TOKENS = [
    b"00-",
    b"-01",
    b"\n",
    b",",
    b"=",
    b"@",
    b"a=1",
    b"0" * 16,
    b"0" * 32,
    b"ff-",
    b"cc-",
    b"\t",
    b"a" * 240,
    b"4bf92f3577b34da6",
]
_VALID = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def seeds() -> list[bytes]:
    """Return valid and invalid headers."""
    states = [b"", b"a=1", b"a=1,b=2", b" a=1 , ,b=2\t", b"a@b=1", b"a=1,a=2", b"A=1", b"a=" + b"x" * 256, b"a= "]
    states += [b",".join(b"k%d=v" % index for index in range(count)) for count in (32, 33)]
    states += [b",".join(b"k%d=%s" % (index, b"v" * 120) for index in range(6))]
    parents = [
        b"",
        b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01",
        _VALID + b"-x",
        b"cc" + _VALID[2:] + b"-x",
        _VALID.upper(),
    ]
    return [_VALID + b"\n" + state for state in states] + [parent + b"\na=1" for parent in parents]


def check(data: bytes) -> None:
    """Read a context; what is handed on of it must be valid, bounded and the same when it is read again."""
    parent, _, state = data.decode("latin-1").partition("\n")
    cleaned = clean_tracestate(state)
    assert len(cleaned) <= 512
    assert clean_tracestate(cleaned) == cleaned
    members = cleaned.split(",") if cleaned else []
    assert len(members) <= 32
    assert len({member.partition("=")[0] for member in members}) == len(members)
    assert all(re.fullmatch("[ -~]+", member) and "=" in member for member in members)
    context = read_trace_context(parent, state)
    valid = re.fullmatch("[0-9a-f]{2}(?<!ff)-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[^\n]*)?", parent)
    assert (context is not None) == (valid is not None and not (parent.startswith("00") and len(parent) != 55))
    if context is None:
        return
    with within(context):
        headers = trace_headers()
    again = read_trace_context(headers["traceparent"], headers.get("tracestate", ""))
    assert again == context._replace(tracestate=cleaned)
    child = context.child(1)
    assert re.fullmatch("[0-9a-f]{16}", child.span_id)
    assert child.span_id != context.span_id
