"""Heads of requests and responses as values: reading, refusing and writing them."""

import email.utils
import json

import pytest
from gunicorn.config import Config
from hypothesis import example, given
from hypothesis import strategies as st
from request_cases import REFUSED, get, lines, post

from ovms_rest.protocol.header_length import read_header_length
from ovms_rest.worker.http1 import (
    Head,
    HeadReader,
    Refusal,
    RequestBody,
    encode_head,
    encode_refusal,
    encode_server_lines,
    is_request_id,
)

TEMPLATE = {"wsgi.url_scheme": "http", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "SCRIPT_NAME": ""}


def reader(**settings):
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    return HeadReader(cfg)


READER = reader()


def read(data, **settings):
    found = (reader(**settings) if settings else READER).read(data, 0, TEMPLATE)
    assert found is not None, "the head is not whole"
    return found


def refused(data, **settings):
    with pytest.raises(Refusal) as caught:
        read(data, **settings)
    return caught.value


# --- Valid heads


def test_head_becomes_an_environ():
    data = lines(
        "POST /v2/models/a%20b/infer?c=d&e HTTP/1.1",
        "Host: example.org:8000",
        "content-TYPE: application/json",
        "Content-Length: 12",
        "X-Request-Start: t=1.5",
        "Accept: a",
        "Accept: b",
        "Empty:",
    )
    assert read(data + b"the body....").environ == {
        **TEMPLATE,
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/v2/models/a%20b/infer?c=d&e",
        "PATH_INFO": "/v2/models/a b/infer",
        "QUERY_STRING": "c=d&e",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "example.org:8000",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": "12",
        "HTTP_X_REQUEST_START": "t=1.5",
        "HTTP_ACCEPT": "a,b",
        "HTTP_EMPTY": "",
        "ovms_rest.header_length": read_header_length(None),
    }
    assert len(TEMPLATE) == 4, "the template is the connection's and stays as it is"


@pytest.mark.parametrize(
    ("data", "length", "expects_continue", "keep_alive"),
    [
        (get(), 0, False, True),
        (get("Content-Length: 3"), 3, False, True),
        (post(), 0, False, True),
        (post("Content-Length: 0"), 0, False, True),
        (post("Content-Length: 0007"), 7, False, True),
        (post("Content-Length: 9223372036854775807"), 2**63 - 1, False, True),
        (post("Content-Length: \t7 \t"), 7, False, True),
        (post("Transfer-Encoding: chunked"), None, False, True),
        (post("transfer-encoding: CHUNKED"), None, False, True),
        (post("Content-Length: 7", "Expect: 100-continue"), 7, True, True),
        (post("Content-Length: 7", "Expect: 100-Continue"), 7, True, True),
        (post("Transfer-Encoding: chunked", "Expect: 100-continue"), None, True, True),
        (post("Content-Length: 7", "Expect: 100-continue", "Expect: 100-continue"), 7, True, True),
        (post("Content-Length: 7", "Expect: 100-continue", version="1.0"), 7, False, False),
        (get("Connection: close"), 0, False, False),
        (get("Connection: Close"), 0, False, False),
        (get("Connection: keep-alive"), 0, False, True),
        (get("Connection: upgrade, close"), 0, False, False),
        (get("Connection: upgrade"), 0, False, True),
        (get(version="1.0"), 0, False, False),
        (get("Connection: keep-alive", version="1.0"), 0, False, True),
        (get("Connection: Keep-Alive", version="1.0"), 0, False, True),
        (get("Connection: close", version="1.0"), 0, False, False),
    ],
)
def test_head_has_framing_and_connection(data, length, expects_continue, keep_alive):
    found = read(data + b"what follows")
    assert found[1:5] == (len(data), length, expects_continue, keep_alive)


@pytest.mark.parametrize(
    ("method", "path", "inference"),
    [
        ("POST", "/v2/models/m/infer", ("m", None)),
        ("POST", "/v2/models/m/versions/2/infer?a=b", ("m", "2")),
        ("POST", "/v2/models/%C3%A4/infer", ("ä", None)),
        ("GET", "/v2/models/m/infer", None),
        ("POST", "/v2/models/m/load", None),
    ],
)
def test_inference_has_its_model_and_version(method, path, inference):
    assert read(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).inference == inference


@pytest.mark.parametrize("text", [None, "0", "17", "x"])
def test_head_has_the_header_length(text):
    head = read(post("Content-Length: 20", *([] if text is None else [f"Inference-Header-Content-Length: {text}"])))
    assert head.header_length == head.environ["ovms_rest.header_length"] == read_header_length(text)


@pytest.mark.parametrize("values", [("close", "keep-alive"), ("keep-alive", "close"), ("close, keep-alive",)])
def test_close_wins_over_keep_alive(values):
    """RFC 9112 section 9.3: the connection does not persist when the close option is present."""
    assert not read(get(*(f"Connection: {value}" for value in values))).keep_alive


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_environ_has_the_http_version(version):
    assert read(get(version=version)).environ["SERVER_PROTOCOL"] == f"HTTP/{version}"


def test_http_1_0_needs_no_host():
    assert read(lines("GET /v2 HTTP/1.0")).environ["PATH_INFO"] == "/v2"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/v2?", "/v2", ""),
        ("/v2?a?b", "/v2", "a?b"),
        ("/v2?a%20b", "/v2", "a%20b"),
        ("//v2", "//v2", ""),
        ("/a%2Fb%25", "/a%2Fb%", ""),
        ("/a/?b/", "/a", "b/"),
        ("/a%zz%", "/a%zz%", ""),
        ("/%c3%a9", "/\xc3\xa9", ""),
        ("/\xc3\xa9", "/\xc3\xa9", ""),
        ("/\xc3\xa9%20", "/\xc3\xa9 ", ""),
        ("http://example.org/v2?a", "/v2", "a"),
        ("http://example.org", "/", ""),
        ("http://example.org?a", "/", "a"),
        ("HTTPS://u@example.org:1/v2/http://x", "/v2/http://x", ""),
        ("/v2/http://x", "/v2/http://x", ""),
    ],
)
def test_target_becomes_path_and_query(target, path, query):
    """PATH_INFO holds bytes as latin-1 characters (PEP 3333); percent-encoding is decoded except that of a slash."""
    environ = read(get(target=target)).environ
    assert (environ["PATH_INFO"], environ["QUERY_STRING"], environ["RAW_URI"]) == (path, query, target)


def test_asterisk_is_a_target():
    assert read(lines("OPTIONS * HTTP/1.1", "Host: x")).environ["PATH_INFO"] == "*"
    assert refused(get(target="*")).status == 400


def test_field_names_with_underscores_do_not_pass_for_dashes():
    data = get("X_Forwarded_For: evil", "X-Forwarded-For: good", "Content_Length: 5", "Transfer_Encoding: chunked")
    found = read(data)
    assert (found.environ["HTTP_X_FORWARDED_FOR"], found.length) == ("good", 0)
    assert {"CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"}.isdisjoint(found.environ)
    assert refused(data, header_map="refuse").status == 400


def test_field_names_with_underscores_need_header_map_dangerous():
    assert read(get("A_B: c"), header_map="dangerous").environ["HTTP_A_B"] == "c"


def test_remembered_field_names_are_bounded():
    """Clients may send any names; later ones are read like the first ones."""
    heads = reader()
    for index in range(2000):
        heads.read(get(f"Name-{index}: value"), 0, TEMPLATE)
    assert heads.read(get("Name-1999: a", "X-Y: b"), 0, TEMPLATE).environ["HTTP_NAME_1999"] == "a"
    assert heads.read(get("x-Y: b"), 0, TEMPLATE).environ["HTTP_X_Y"] == "b"
    assert len(heads._keys) < 1000


# --- Refused heads


@pytest.mark.parametrize(("data", "status", "message"), REFUSED)
def test_malformed_heads_are_refused(data, status, message):
    refusal = refused(data)
    assert refusal.status == status
    assert message in str(refusal)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lines("GET /v2", "Host: x"),
            "Invalid HTTP request; the request line is 'GET /v2', expected a method, a target and a version",
        ),
        (
            lines("get /v2 HTTP/1.1"),
            "Lowercase letters not allowed in HTTP method; the request line is 'get /v2 HTTP/1.1'",
        ),
        (
            get("A: b", "no colon", "C: d"),
            "Invalid HTTP request; the line 'no colon' does not begin with a header name and a colon",
        ),
        (
            get("A: b", "C d: e"),
            "Invalid character '\\x20' in header name; the line 'C d: e' does not begin with a header name and a colon",
        ),
        (get("A: b", "C: d\x00"), "Invalid control character '\\x00' in header value of 'C'"),
        (get("host: y"), "Duplicate Host header: 'x', 'y'; expected one"),
        (
            post("Content-Length: 1_0"),
            "Invalid Content-Length value: '1_0'; expected one integer from 0 to 9223372036854775807",
        ),
        (post("Content-Length: 1", "Transfer-Encoding: chunked"), "Content-Length with Transfer-Encoding"),
        (post("Transfer-Encoding: foo"), "Unsupported Transfer-Encoding: 'foo'; only chunked is supported"),
    ],
)
def test_refusal_shows_the_line_or_the_values(data, message):
    assert str(refused(data + b"the body: 1\r\n\r\n")) == f"malformed request: {message}"


def test_only_a_few_values_of_a_repeated_header_are_shown():
    message = str(refused(get(*[f"Host: {name}" for name in "bcde"])))
    assert message == "malformed request: Duplicate Host header: 'x', 'b', 'c', ...; expected one"


@pytest.mark.parametrize(("line", "shown"), [("Content-Length: {}", "value: {};"), ("{}", "the line {} does not")])
def test_line_and_value_of_a_malformed_head_are_cut_in_one_line(line, shown):
    message = str(refused(get(line.format("x\x85" + "y" * 5000))))
    assert shown.format(f"'x\\x85{'y' * 58}...'") in message


@pytest.mark.parametrize("name", ["Transfer-Encoding", "Expect"])
def test_long_value_is_cut_in_the_message(name):
    value = "gzip, " * 1000 + "chunked"
    assert str(refused(post(f"{name}: {value}"))).startswith(f"{name} is '{value[:60]}...', only ")


def test_long_name_with_an_underscore_is_cut_in_the_message():
    refusal = refused(get(f"A_{'x' * 8000}: b"), header_map="refuse")
    assert str(refusal) == f"malformed request: header name 'A_{'X' * 58}...' has an underscore"


@pytest.mark.parametrize("data", [b"GET /v2 HTTP/1.1\nHost: x\n\n", b"\x16\x03\x01\r\n\r\n"])
def test_bytes_after_a_malformed_head_are_not_counted_as_fields(data):
    assert refused(data + b"\n" * 300).status == 400


@pytest.mark.parametrize("host", ["a b", "a/b", "a@b", "a?b", "a#b", "a:b", "[::1", "http://a"])
def test_invalid_host_is_refused(host):
    """RFC 9112 section 3.2: a server MUST answer 400 to a Host field with an invalid field value."""
    assert refused(lines("GET /v2 HTTP/1.1", f"Host: {host}")).status == 400


@pytest.mark.parametrize(
    "host",
    ["", "a", "a:", "a:80", "127.0.0.1:8000", "[::1]", "[::1]:80", "a_b", "a-b.c", "a%20b", "a,b", "x!$&'()*+;=~"],
)
def test_valid_host_is_accepted(host):
    assert read(lines("GET /v2 HTTP/1.1", f"Host: {host}")).environ["HTTP_HOST"] == host


def test_unconventional_methods_and_versions_need_their_settings():
    data = lines("get /v2 HTTP/1.1", "Host: x")
    assert read(data, permit_unconventional_http_method=True).environ["REQUEST_METHOD"] == "get"
    data = lines("GET /v2 HTTP/1.2", "Host: x")
    assert read(data, permit_unconventional_http_version=True).environ["PATH_INFO"] == "/v2"


# --- Limits


def test_request_line_has_a_limit():
    target = "/" + "a" * 82
    data = get(target=target)
    size = len(data.split(b"\r\n", 1)[0])
    assert read(data, limit_request_line=size).environ["PATH_INFO"] == target
    refusal = refused(data, limit_request_line=size - 1)
    assert (refusal.status, str(size) in str(refusal)) == (414, True)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get(target="/" + "a" * (4094 - 14)), None),
        (get(target="/" + "a" * (4095 - 14)), 414),
        (get(*["A: b"] * 99), None),
        (get(*["A: b"] * 100), 431),
        (get("A: " + "b" * (8190 - 5)), None),
        (get("A: " + "b" * (8191 - 5)), 431),
        (get(*["A: " + "b" * 8000] * 99), None),
    ],
)
def test_heads_have_gunicorns_limits(data, status):
    if status is None:
        assert read(data).size == len(data)
    else:
        assert refused(data).status == status


def test_leading_empty_line_does_not_lift_the_limit_of_the_request_line():
    assert refused(b"\r\n" + get(target="/" + "a" * 5000)).status == 414


def test_limit_of_the_request_line_may_be_off():
    target = "/" + "a" * 100_000
    assert read(get(target=target), limit_request_line=0).environ["PATH_INFO"] == target


def test_number_of_fields_has_a_limit():
    data = get(*(f"A{index}: b" for index in range(9)))
    assert read(data, limit_request_fields=10).environ["HTTP_A8"] == "b"
    assert refused(data, limit_request_fields=9).status == 431


@pytest.mark.parametrize("limit", [0, 257, 32768])
def test_number_of_fields_is_never_unlimited(limit):
    fields = [f"A{index}: b" for index in range(255)]
    assert read(get(*fields), limit_request_fields=limit).environ["HTTP_A254"] == "b"
    assert refused(get(*fields, "B: c", "C: d"), limit_request_fields=limit).status == 431


@pytest.mark.parametrize(
    ("count", "end"), [(120, b""), (255, b""), (256, b""), (300, b""), (300, b"body\r\n"), (5000, b"")]
)
def test_refusal_of_too_many_fields_has_their_number(count, end):
    """After the 256th field the parser only reports a malformed request."""
    refusal = refused(get(*["A: b"] * (count - 1)) + end)
    assert refusal.status == 431
    assert str(refusal) == f"malformed request: Number of headers ({count}) exceeds limit (100)"


def test_too_many_fields_are_refused_before_the_end_of_the_head():
    refusal = refused(get(*["A: b"] * 299)[:-2])
    assert (refusal.status, str(refusal)) == (431, "malformed request: Number of headers (300) exceeds limit (100)")


def test_size_of_a_field_has_a_limit():
    field = "A: " + "b" * 95
    assert read(get(field), limit_request_field_size=len(field) + 2).environ["HTTP_A"] == "b" * 95
    assert refused(get(field), limit_request_field_size=len(field) + 1).status == 431


def test_limit_of_a_head_follows_from_its_parts():
    assert reader(limit_request_line=100, limit_request_fields=10, limit_request_field_size=50).limits == (100, 10, 50)
    assert reader(limit_request_line=100, limit_request_fields=10, limit_request_field_size=50).limits.head == 624


# --- Heads in pieces

WHOLE = [
    get(),
    get("A: b", "Connection: close", version="1.0"),
    b"\r\n" + get(),
    post("Content-Length: 5", "Expect: 100-continue"),
    post("Transfer-Encoding: chunked"),
]


@pytest.mark.parametrize("data", WHOLE)
def test_head_is_complete_at_its_last_byte_and_not_before(data):
    for size in range(len(data)):
        for seen in {0, size // 2, size}:
            assert READER.read(data[:size], seen, TEMPLATE) is None
    whole = READER.read(data, 0, TEMPLATE)
    assert whole.size == len(data)
    for seen in range(len(data)):
        assert READER.read(data, seen, TEMPLATE) == whole


def feed(data, places):
    """Read a head in pieces cut at these places, as a connection does."""
    buffer, seen = bytearray(), 0
    for start, end in zip([0, *places], [*places, len(data)], strict=True):
        buffer += data[start:end]
        try:
            found = READER.read(buffer, seen, TEMPLATE)
        except Refusal as refusal:
            return refusal.status
        if found is not None:
            return found
        seen = len(buffer)
    return None


# Of a line that begins with a space and ends early, the parser rejects the version, not the method.
@given(st.sampled_from([*WHOLE, *(data for data, _, _ in REFUSED if data[:1] != b" ")]), st.data())
def test_head_in_any_pieces_is_the_same(data, draw):
    places = draw.draw(st.lists(st.integers(0, len(data)), max_size=8).map(sorted))
    assert feed(data, places) == feed(data, [])


fragments = st.sampled_from(
    [
        *(b"GET", b"POST", b" ", b"/", b"/v2", b"*", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\r", b"\n", b":", b": "),
        *(b"Host", b"Host: x\r\n", b"Content-Length", b"Transfer-Encoding", b"chunked", b"1", b",", b"\t", b"\0", b"_"),
        *(b"Connection", b"close", b"Expect", b"100-continue", b"\r\n\r\n", b"%", b"\xff", b"?", b"://"),
    ]
)


@given(st.lists(fragments | st.binary(max_size=3), max_size=30).map(b"".join))
@example(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
def test_any_bytes_are_complete_or_incomplete_or_refused(data):
    try:
        found = READER.read(data, 0, TEMPLATE)
    except Refusal as refusal:
        found = refusal
    assert found is None or isinstance(found, Head | Refusal)
    if isinstance(found, Refusal):
        assert 400 <= found.status < 600
    elif found is not None:
        assert found.size <= len(data)
        assert found.length is None or found.length >= 0
        assert found.environ.pop("ovms_rest.header_length") == found.header_length
        assert all(isinstance(value, str) for value in found.environ.values())


# --- Bodies


def body(data=b"one\ntwo\nthree"):
    return RequestBody(memoryview(data))


def test_body_is_read_like_a_file():
    assert (body().read(), body().read(5), body().read(None), body().read(0)) == (
        b"one\ntwo\nthree",
        b"one\nt",
        b"one\ntwo\nthree",
        b"",
    )
    assert (body().readline(), body().readline(2)) == (b"one\n", b"on")
    assert body().readlines() == list(body()) == [b"one\n", b"two\n", b"three"]
    assert body().readlines(4) == [b"one\n"]
    stream = body()
    assert (stream.read(4), stream.readline(), stream.read(), stream.read()) == (b"one\n", b"two\n", b"three", b"")
    assert body(b"").read() == b""


def test_body_is_not_copied():
    data = memoryview(bytearray(b"abc"))
    stream = RequestBody(data)
    data[0] = ord("x")
    assert stream.buffer[0] == ord("x")


# --- Responses


def test_response_head_has_status_and_headers():
    written = encode_head("200 OK", [("Content-Type", "a/b"), ("Content-Length", "3")], "S: x\r\nConnection: close\r\n")
    assert written == b"HTTP/1.1 200 OK\r\nS: x\r\nConnection: close\r\nContent-Type: a/b\r\nContent-Length: 3\r\n"
    assert encode_head("200 OK", [], "") == b"HTTP/1.1 200 OK\r\n"
    assert encode_head("200 OK", [("A", "\xe9")], "") == b"HTTP/1.1 200 OK\r\nA: \xe9\r\n"


@pytest.mark.parametrize("text", ["a\r\nB: c", "a\nB: c", "a\r\n\r\n<html>", "a\n", "a\rB: c", "\u20ac"])
def test_line_break_in_a_response_header_is_an_error(text):
    with pytest.raises(ValueError):  # noqa: PT011  any will do
        encode_head("200 OK", [("A", text)], "")
    with pytest.raises(ValueError):  # noqa: PT011
        encode_head("200 OK", [(text, "b")], "")
    with pytest.raises(ValueError):  # noqa: PT011
        encode_head(f"200 {text}", [], "")


@pytest.mark.parametrize("text", ["a", "!", "~", "0b6f-1/=,;", "a" * 128])
def test_request_id_of_visible_characters_is_accepted(text):
    assert is_request_id(text)


@pytest.mark.parametrize("text", ["", "a" * 129, "a b", "a\t", "\x7f", "\xe9", "a\n", "a\r\nB: c", "\x00", "\x1b[2J"])
def test_any_other_request_id_is_rejected(text):
    assert not is_request_id(text)


def test_server_lines_have_the_date():
    server, date, end = encode_server_lines(784111777.9).split("\r\n")
    assert (server, end) == ("Server: ovms_rest", "")
    assert date == "Date: Sun, 06 Nov 1994 08:49:37 GMT"
    assert email.utils.parsedate_to_datetime(date.removeprefix("Date: ")).timestamp() == 784111777


@pytest.mark.parametrize("status", [400, 404, 408, 413, 414, 417, 431, 501, 503, 505])
def test_refusal_is_encoded_as_json(status):
    line, headers, written = encode_refusal(Refusal(status, 'the "reason"\n\xe9', {"Retry-After": "1"}))
    assert line.startswith(f"{status} ")
    assert json.loads(written) == {"error": 'the "reason"\n\xe9'}
    assert dict(headers) == {
        "Content-Type": "application/json",
        "Content-Length": str(len(written)),
        "Retry-After": "1",
    }
