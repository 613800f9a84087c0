"""The same requests, valid and broken, to the service's own worker and to gunicorn's `gthread`.

A request that one accepts the other must accept, with an equal response; DIFFERENCES lists the intended exceptions.
Every connection shuts down its sending side after the requests, so that a server that waits for more sees the end.
"""

import http.client
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import slow_models
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_http import LIVE, RELU, RELU_PATH, exchange, head, parse, post, post_chunked
from service import serve


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two services that differ in their worker: ours and gthread."""
    directory = tmp_path_factory.mktemp("differential")
    config = slow_models.save(directory)
    for kind in ("ours", "theirs"):
        (directory / kind).mkdir()
    with (
        serve(directory / "ours", "-w", "1", config=config) as ours,
        serve(directory / "theirs", "-w", "1", "-k", "gthread", "--threads", "1", config=config) as theirs,
    ):
        yield ours, theirs


# --- Requests, parsed independently


class Request(NamedTuple):
    """A request, as far as it can be parsed."""

    method: str
    version: str
    target: str
    fields: list[tuple[str, str]]
    body: bytes
    has_spare_spaces: bool  # in the request line

    def values(self, name):
        """Return the values of all fields of a name."""
        return [value for found, value in self.fields if found == name]


def read(data):
    text, _, body = data.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    first, *lines = text.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, version = rest.strip().rpartition(" ")
    pairs = [line.partition(":") for line in lines]
    fields = [(name.lower(), value.strip(" \t")) for name, _, value in pairs]
    return Request(method, version, target.strip(), fields, body, "  " in first)


_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[^\r\n]*)?\r\n")
# RFC 9110 section 6.5.1 forbids these as trailers.
_FORBIDDEN = rb"(?!(?:host|content-length|transfer-encoding|trailer|authorization|te):)"
_TRAILERS = re.compile(rb"(" + _FORBIDDEN + rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)*\r\n", re.IGNORECASE)


def has_whole_body(request):
    """Return whether the body is complete and framed as RFC 9112 sections 6 and 7.1 say."""
    if request.values("transfer-encoding"):
        rest = request.body
        while size := _SIZE.match(rest):
            count, rest = int(size[1], 16), rest[size.end() :]
            if count == 0:
                return _TRAILERS.match(rest) is not None
            if rest[count : count + 2] != b"\r\n":
                return False
            rest = rest[count + 2 :]
        return False
    return len(request.body) >= int((request.values("content-length") or ["0"])[0])


# --- Where ours differs


class Difference(NamedTuple):
    """Requests that gthread's application responds to, and ours refuses with one of these statuses.

    Without statuses the response is the same, and only one of the two closes the connection.
    """

    reason: str
    applies: Callable[[Request], bool]
    statuses: tuple[int, ...] = ()


def has_option(request, option):
    """Return whether a field Connection has an option that gunicorn does not see: in a list, or after another field."""
    values = [value.lower() for value in request.values("connection")]
    return any(option in value for value in values) and values[0] != option


def has_too_large_body(request):
    return any(value.isdecimal() and int(value) > 2**28 for value in request.values("content-length"))


DIFFERENCES = [
    Difference(
        "RFC 9112 section 3.2: a server MUST answer 400 to a request of HTTP/1.1 that lacks a Host",
        lambda request: request.version == "HTTP/1.1" and not request.values("host"),
        (400,),
    ),
    Difference(
        "RFC 9112 section 3.2: a server MUST answer 400 to a Host with an invalid value",
        lambda request: not all(re.fullmatch(r"[0-9A-Za-z._-]*(:[0-9]*)?", value) for value in request.values("host")),
        (400,),
    ),
    Difference(
        "RFC 9112 section 6.1: 501 for an unknown transfer coding; gunicorn passes the coded body on",
        lambda request: any(value.lower() != "chunked" for value in request.values("transfer-encoding")),
        (501,),
    ),
    Difference(
        "protocol/README.md section 1: malformed framing is refused whatever the route; gunicorn may not read the body",
        lambda request: not has_whole_body(request),
        (400,),
    ),
    Difference("a body over the limit is refused whatever the route, before it is read", has_too_large_body, (413,)),
    Difference("and the connection closed, since that body follows", has_too_large_body),
    Difference(
        "the request line is limited after an empty line too, where gunicorn does not check it",
        lambda request: len(request.target) > 4000,
        (400, 414),
    ),
    Difference(
        "RFC 9112 section 3: single spaces separate the parts of a request line; gunicorn takes any number",
        lambda request: request.has_spare_spaces,
        (400,),
    ),
    Difference(
        "RFC 9112 section 3.2: a target has no fragment; gunicorn cuts it off, for ours it is a part of the path",
        lambda request: "#" in request.target,
        (400, 404, 405),
    ),
    Difference(
        "RFC 9112 section 3.2.3: the target of CONNECT is not a path; gunicorn takes the port for one",
        lambda request: request.method == "CONNECT",
        (404, 405),
    ),
    Difference(
        "RFC 3986 section 2: a target has no bytes above 127; gunicorn encodes them twice",
        lambda request: not request.target.isascii(),
        (404, 405),
    ),
    Difference(
        "RFC 9112 section 9.3: close is an option in a list; gunicorn knows it alone, and in the first field",
        lambda request: has_option(request, "close"),
    ),
    Difference(
        "RFC 9112 section 9.3: and so is keep-alive, without which HTTP/1.0 closes",
        lambda request: request.version == "HTTP/1.0" and has_option(request, "keep-alive"),
    ),
]


# --- The comparison


def is_from_the_application(answer):
    """Return whether gthread's response is the application's, and not one to a body that it could not receive."""
    if "server" not in answer.headers:
        return False
    text = answer.body.decode("latin-1")
    return not text.startswith(('{"error":"the body could not be received', '{"error":"the body ended after'))


def comparable(answer):
    """Return the parts of a response that must be equal."""
    length, kind = (answer.headers.get(name) for name in ("content-length", "content-type"))
    body = json.loads(answer.body) if answer.body and kind == "application/json" else answer.body
    return answer.status, kind, length, body


def compare(servers, requests):
    """Send the requests, pipelined, to both; check that they are handled alike."""
    data = b"".join(requests)
    taken = list(map(read, requests))
    methods = [request.method for request in taken]
    ours, theirs = (final(exchange(server, data), methods) for server in servers)
    for request, our, their in zip(taken, padded(ours, len(taken)), padded(theirs, len(taken)), strict=True):
        if their is None or not is_from_the_application(their):
            assert our is None or our.status >= 400, f"only ours accepts {request}"
            assert is_last(ours, our)
            return
        if our is None or comparable(our) != comparable(their):
            assert explained(request, our), f"ours answers {our} to {request}, gthread {their}"
            return
        if is_closing(our) != is_closing(their):
            assert explained(request, None), f"only one keeps the connection after {request}"
            return
        if is_closing(our):
            assert is_last(ours, our)
            return


def final(data, methods):
    """Take responses apart and leave out interim ones.

    A refusal of HEAD may have a body: gunicorn does not know the method of a request that it could not read.
    """
    data = data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    try:
        return parse(data, *methods)
    except http.client.BadStatusLine:
        return parse(data, *methods[: len(re.findall(rb"HTTP/1\.[01] \d{3} ", data)) - 1])


def padded(answers, count):
    """Return this number of responses, None for missing ones."""
    return [*answers, *[None] * count][:count]


def is_closing(answer):
    return answer.headers.get("connection") == "close"


def is_last(answers, answer):
    """Return whether a response is the last, or missing."""
    return answer is None or answers[-1] is answer


def explained(request, answer):
    """Return whether this response of ours, or None for the end of the connection, is a known difference."""
    status = answer and answer.status
    return any(
        difference.applies(request) and (status in difference.statuses if status else not difference.statuses)
        for difference in DIFFERENCES
    )


# --- Requests that are known to matter

PREFIX = head("POST", RELU_PATH, "Transfer-Encoding: chunked")
BODY = b"%x\r\n%s\r\n" % (len(RELU), RELU)


@pytest.mark.parametrize(
    "requests",
    [
        [LIVE],
        [LIVE, LIVE, LIVE],
        [post(RELU_PATH, RELU), LIVE, post_chunked(RELU_PATH, RELU[:5], RELU[5:]), LIVE],
        [b"\r\n" + LIVE, b"\r\n" + post(RELU_PATH, RELU), LIVE],
        [head("HEAD", "/v2"), head("HEAD", "/nothing"), LIVE],
        [head("OPTIONS", "*"), head("OPTIONS", "/v2"), LIVE],
        [head("GET", "/v2", "Content-Length: 5") + b"GET /", LIVE],
        [post(RELU_PATH, b""), post("/v2", b"x"), head("DELETE", "/v2"), LIVE],
        [post(RELU_PATH, RELU, "Expect: 100-continue"), LIVE],
        [post(RELU_PATH, RELU, "Expect: 100-continue", version="1.0")],
        [head("GET", "/v2", version="1.0")],
        [head("GET", "/v2", "Connection: keep-alive", version="1.0"), head("GET", "/v2", version="1.0")],
        [head("GET", "/v2", "Connection: close"), LIVE],
        [head("GET", "/v2", "Connection: keep-alive"), LIVE],
        [head("GET", "/v2", "Connection: close", "Connection: keep-alive"), LIVE],
        [head("GET", "/v2/models/a%2Fb%20c/ready"), head("GET", "/v2/models/%C3%A9/ready"), LIVE],
        [b"GET http://example.org/v2?a=b HTTP/1.1\r\nHost: x\r\n\r\n", LIVE],
        [b"CONNECT example.org:80 HTTP/1.1\r\nHost: x\r\n\r\n", LIVE],
        [head("GET", "//v2"), head("GET", "/v2/"), head("GET", "/v2?"), head("GET", "/%"), LIVE],
        [head("GET", "/v2", "X_A: b", "X-A: c"), LIVE],
        [PREFIX + BODY + b"0\r\nA: b\r\nC-D:\r\n\r\n", LIVE],
        [PREFIX + BODY + b"0;a=b\r\n\r\n", LIVE],
        [PREFIX + BODY + b"0\r\nno colon\r\n\r\n"],
        [PREFIX + BODY + b"0\r\nA : b\r\n\r\n"],
        [PREFIX + BODY + b"0\r\nA: b\r\n folded\r\n\r\n"],
        [PREFIX + BODY + b"0\r\nA: \0\r\n\r\n"],
        [PREFIX + BODY + b"0\r\nHost: x\r\n\r\n"],
        [PREFIX + BODY + b"0\r\n"],
        [PREFIX + BODY],
        [LIVE, b"BROKEN\r\n\r\n", LIVE],
        [LIVE, LIVE[:10]],
        [b""],
        [b"\r\n"],
        [b"\r\n\r\n" + LIVE],
    ],
)
def test_known_requests_are_handled_alike(servers, requests):
    compare(servers, requests)


# --- Requests that are generated

mostly = st.sampled_from


def seldom(usual, *others):
    """Choose the usual in three of four cases."""
    return mostly([usual] * 3 * len(others) + list(others))


methods = seldom("POST", "GET", "HEAD", "OPTIONS", "PUT", "get", "P(ST", "PO", "CONNECT", "BREW", "")
targets = seldom(
    RELU_PATH,
    *("/v2", "/v2/", "/v2?a", "/v2/health/live", "/v2/models/relu", "/v2/models/x", "/v2/models/relu%2Fready", "/v2#a"),
    *("http://example.org/v2", "http://example.org", "*", "//v2", "v2", "/" + "a" * 4100, "/%zz", "a:80", "/v2\x01"),
)
versions = seldom("HTTP/1.1", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "http/1.1", "HTTP/1.1 ", "HTTP/11", "")
hosts = seldom(["Host: x"], [], ["Host: x", "Host: y"], ["host:x:80"], ["Host:"], ["Host: a/b"])
ends = seldom("\r\n", "\n", "\r", "\r\r\n", "\n\r\n")
valid_fields = mostly(
    [
        *("Accept: */*", "A: b", "A: c", "a:b", "A:", "A:\tb\t", "X_A: b", "A: \x80", "A" * 200 + ": b", "Trailer: A"),
        *("Connection: close", "Connection: keep-alive", "Connection: Close", "Connection: x, close", "Connection: x"),
        *("Expect: 100-continue", "Expect: 100-Continue", "Upgrade: h2c", "TE: trailers", "Content-Type: a"),
        *("Inference-Header-Content-Length: 0", "Content-Encoding: identity", "Keep-Alive: 5", "Date: x"),
    ]
)
broken_fields = mostly(
    [
        *("A : b", " A: b", "A: b\0", "A: b\x0b", "A b: c", "no colon", ": b", "A: b\r\n c", "A\r\n", "\x80: b"),
        *(
            "A(: b",
            "A: " + "b" * 8300,
            "Expect: x",
            "Transfer-Encoding : chunked",
            "Content-Length : 5",
            " Content-Length: 5",
        ),
    ]
)
lengths = mostly(
    [
        *("x", "", "-1", "+5", "0x5", "5 5", "5,5", "5, 5", " 5", "5 ", "05", "1e1", "5.0", "\xb2", "_5", "\t5"),
        *("9" * 18, "9" * 30),
    ]
)
codings = mostly(
    [
        *("Chunked", "CHUNKED", " chunked ", "chunked,", ",chunked", "chunked, chunked", "chunked, gzip"),
        *("chunked;a=b", "identity", "gzip, chunked", "gzip", "xchunked", '"chunked"', "", "chunked\0", "\x0bchunked"),
    ]
)
sizes = mostly([b"%x", b"%X", b"000%x", b"%x;a", b"%x;a=b", b'%x;a="b;c"', b"%x;"])
broken_sizes = mostly(
    [
        *(b"0x%x", b"-%x", b"+%x", b" %x", b"%x ", b"%x\t", b"%x ;a", b"%x_0", b"%xg", b"", b";%x", b"%x;a\r"),
        *(b"1%014x0", b"%x\n", b"%x;\n"),
    ]
)
trailers = mostly(
    [b"", b"", b"", b"A: b\r\n", b"A:\r\nB: c\r\n", b"Content-Length: 5\r\n", b"Host: x\r\n", b"TE: x\r\n"]
)
data_ends = seldom(b"\r\n", b"\n", b"", b"\r", b"x\r\n", b"\r\r\n")


@st.composite
def chunked_bodies(draw, broken):
    """Draw the body in chunks, malformed ones if `broken`."""
    place = draw(st.integers(0, len(RELU)))
    parts = [part for part in (RELU[:place], RELU[place:]) if part]
    written = []
    for part in parts:
        size = draw(broken_sizes if broken and draw(st.booleans()) else sizes)
        end = draw(data_ends) if broken else b"\r\n"
        written.append((size % len(part) if b"%" in size else size) + b"\r\n" + part + end)
    last = draw(mostly([b"0\r\n", b"000\r\n", b"0;a\r\n"]))
    return b"".join(written) + last + draw(trailers) + b"\r\n"


@st.composite
def bodies(draw):
    """Draw the fields that frame a body, and the body."""
    kind = draw(
        mostly(["length"] * 4 + ["chunks"] * 4 + ["none", "short", "odd", "two", "both", "coding", "broken", "cut"])
    )
    if kind == "length":
        return [f"Content-Length: {len(RELU)}"], RELU
    if kind == "none":
        return [], b""
    if kind == "short":
        return [f"Content-Length: {len(RELU) + draw(st.integers(1, 100))}"], RELU
    if kind == "odd":
        return [f"Content-Length:{draw(lengths)}"], draw(mostly([b"", b"12345", RELU]))
    if kind == "two":
        return [f"Content-Length: {draw(mostly([0, 5, len(RELU)]))}", f"content-length: {len(RELU)}"], RELU
    chunks = draw(chunked_bodies(kind == "broken"))
    if kind == "cut":
        chunks = chunks[: draw(st.integers(0, len(chunks) - 1))]
    coding = draw(codings) if kind == "coding" else "chunked"
    fields = [f"Transfer-Encoding: {coding}"]
    if kind == "both":
        fields.insert(draw(st.integers(0, 1)), f"Content-Length: {draw(mostly([0, 5, len(RELU), len(chunks)]))}")
    return fields, chunks


@st.composite
def generated(draw):
    """Draw a request, valid or not."""
    framing, body = draw(bodies())
    extras = draw(st.lists(valid_fields, max_size=3)) + draw(seldom([], [draw(broken_fields)]))
    fields = draw(st.permutations([*draw(hosts), *extras, *framing]))
    first = draw(seldom(" ", "  ", "\t")).join([draw(methods), draw(targets), draw(versions)])
    end = draw(ends)
    lines = [line + "\r\n" for line in (first, *fields)]
    if end != "\r\n":
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = lines[place].removesuffix("\r\n") + end
    return draw(seldom(b"", b"\r\n", b"\n", b" ")) + ("".join(lines) + "\r\n").encode("latin-1") + body


@settings(max_examples=400)
@given(generated())
def test_generated_requests_are_handled_alike(servers, request_bytes):
    compare(servers, [request_bytes, LIVE])


@settings(max_examples=100)
@given(st.lists(generated(), min_size=2, max_size=4))
def test_generated_pipelines_are_handled_alike(servers, requests):
    compare(servers, requests)


valid = [LIVE, post(RELU_PATH, RELU), post_chunked(RELU_PATH, RELU[:9], RELU[9:]), PREFIX + BODY + b"0\r\nA: b\r\n\r\n"]
insertions = mostly([b"", b"\r", b"\n", b"\0", b" ", b":", b"0", b"a", b"\xff"])
mutations = st.tuples(st.integers(0, 300), st.integers(0, 1), insertions)


@settings(max_examples=200)
@given(mostly(valid), st.lists(mutations, max_size=3))
def test_mutated_requests_are_handled_alike(servers, data, mutations):
    """At each place a byte may be removed and others inserted."""
    for place, out, instead in mutations:
        place %= len(data)
        data = data[:place] + instead + data[place + out :]
    compare(servers, [data])
