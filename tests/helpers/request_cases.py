"""Requests of every form, and malformed ones: for the parts that read them, the connection and the worker."""

from raw_http import LIVE, RELU, RELU_PATH, chunk, head, post_chunked
from raw_http import post as post_body
from workers import CHUNKED


def lines(*texts: str) -> bytes:
    """Write lines and an empty one."""
    return "\r\n".join([*texts, "", ""]).encode("latin-1")


def get(*fields: str, target: str = "/v2", version: str = "1.1") -> bytes:
    """Write the head of a GET."""
    return lines(f"GET {target} HTTP/{version}", "Host: x", *fields)


def post(*fields: str, version: str = "1.1") -> bytes:
    """Write the head of an inference."""
    return lines(f"POST /v2/models/m/infer HTTP/{version}", "Host: x", *fields)


TRAILED = CHUNKED + chunk(RELU[:7], b";name=value") + chunk(RELU[7:], b';a="b;c"') + b"0;last\r\nA: b\r\nC:\r\n\r\n"
# Requests that a client may send one after another, their methods and the statuses of their responses.
CONVERSATION = [
    (LIVE, "GET", 200),
    (post_body(RELU_PATH, RELU), "POST", 200),
    (head("HEAD", "/v2"), "HEAD", 200),
    (post_chunked(RELU_PATH, RELU[:7], RELU[7:]), "POST", 200),
    (head("GET", "/v2/nothing?there=is"), "GET", 404),
    (TRAILED, "POST", 200),
    (post_body(RELU_PATH, b"{broken"), "POST", 400),
    (head("HEAD", "/v2/models/unknown"), "HEAD", 404),
    (post_body(RELU_PATH, RELU, "Expect: 100-continue"), "POST", 200),
    (b"\r\n" + post_body(RELU_PATH, b""), "POST", 400),
    (head("GET", "/v2", "Content-Length: 4") + b"GET ", "GET", 200),
    (post_chunked("/v2", b"PUT"), "POST", 405),
    (post_body(RELU_PATH, RELU), "POST", 200),
]
STREAM = b"".join(data for data, _, _ in CONVERSATION)

# Heads, the status of their refusal, and a part of its message.
REFUSED = [
    # the request line
    (lines("GET"), 400, "Invalid HTTP request"),
    (lines("GET /v2"), 400, "Invalid HTTP request"),
    (lines("GET /v2 HTTP/1.1 ", "Host: x"), 400, ""),
    (lines(" GET /v2 HTTP/1.1", "Host: x"), 400, ""),
    (lines("GET  /v2 HTTP/1.1", "Host: x"), 400, "more than one space"),
    (lines("GET /v2  HTTP/1.1", "Host: x"), 400, "more than one space"),
    (lines("GET\t/v2 HTTP/1.1", "Host: x"), 400, ""),
    (lines("get /v2 HTTP/1.1", "Host: x"), 400, "Lowercase"),
    (lines("G\x00T /v2 HTTP/1.1", "Host: x"), 400, ""),
    (lines("G(T /v2 HTTP/1.1", "Host: x"), 400, ""),
    (lines("GE /v2 HTTP/1.1", "Host: x"), 400, "method length"),
    (lines("GET v2 HTTP/1.1", "Host: x"), 400, "relative"),
    (lines("GET example.org:80 HTTP/1.1", "Host: x"), 400, "authority-form"),
    (lines("GET /v2\x01 HTTP/1.1", "Host: x"), 400, ""),
    (lines("GET /v2\x7f HTTP/1.1", "Host: x"), 400, ""),
    (lines("GET /v2 HTTP/3.0", "Host: x"), 505, "version"),
    (lines("GET /v2 HTTP/0.9", "Host: x"), 505, "version"),
    (lines("GET /v2 HTTP/1.2", "Host: x"), 505, "version"),
    (lines("GET /v2 HTTP/2", "Host: x"), 505, ""),
    (lines("GET /v2 http/1.1", "Host: x"), 505, "version"),
    (lines("PRI * HTTP/2.0", "", "SM", ""), 505, "version"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 " + b"\x00" * 100 + b"\r\n\r\n", 400, ""),
    (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + get(), 400, ""),
    # lines
    (b"GET /v2 HTTP/1.1\nHost: x\n\n", 400, "Bare LF"),
    (b"GET /v2 HTTP/1.1\r\nHost: x\n\r\n", 400, "\\x0a"),
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\n\r\n", 400, ""),
    (b"GET /v2 HTTP/1.1\rHost: x\r\r", 400, ""),
    (b"GET /v2 HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400, ""),
    (b"\r\n\r\nGET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""),
    (b"\n" + get(), 400, ""),
    (b"\r" + get(), 400, ""),
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\nContent-Length: 5\r\n\r\n", 400, ""),
    (b"GET /v2 HTTP/1.1\r\nHost: x\rContent-Length: 5\r\n\r\n", 400, ""),
    (b"GET /v2 HTTP/1.1\r\nHost: x\r\n\nContent-Length: 5\r\n\r\n", 400, ""),
    # fields
    (lines("GET /v2 HTTP/1.1", "Host : x"), 400, "header name"),
    (lines("GET /v2 HTTP/1.1", "Host\t: x"), 400, "header name"),
    (lines("GET /v2 HTTP/1.1", " Host: x"), 400, ""),
    (get("no colon"), 400, ""),
    (get(": no name"), 400, ""),
    (get("A b: c"), 400, "header name"),
    (get("A(b): c"), 400, "header name"),
    (get("\xc4: b"), 400, "header name"),
    (get("A: b", " folded"), 400, ""),
    (get("A: b", "\tfolded"), 400, ""),
    (get("A: b\x00c"), 400, ""),
    (get("A: b\x0bc"), 400, ""),
    (get("A: b\x7fc"), 400, ""),
    # the host: RFC 9112 section 3.2
    (lines("GET /v2 HTTP/1.1"), 400, "Host"),
    (get("Host: y"), 400, "Host"),
    (get("host: x"), 400, "Host"),
    # the length
    (post("Content-Length:"), 400, "Content-Length"),
    (post("Content-Length: x"), 400, "Content-Length"),
    (post("Content-Length: -1"), 400, "Content-Length"),
    (post("Content-Length: +1"), 400, "Content-Length"),
    (post("Content-Length: 1.0"), 400, "Content-Length"),
    (post("Content-Length: 0x1"), 400, "Content-Length"),
    (post("Content-Length: 1 1"), 400, "Content-Length"),
    (post("Content-Length: 1,1"), 400, "Content-Length"),
    (post("Content-Length: 1, 2"), 400, "Content-Length"),
    (post("Content-Length: \xb2"), 400, "Content-Length"),
    (post("Content-Length: 1_0"), 400, "Content-Length"),
    (post("Content-Length: 1", "Content-Length: 2"), 400, "Content-Length"),
    (post("Content-Length: 1", "content-length: 1"), 400, "Content-Length"),
    (post("Content-Length : 1"), 400, ""),
    (post("Content-Length\t: 1"), 400, ""),
    (post(" Content-Length: 1"), 400, ""),
    (post("Content-Length: -0"), 400, "Content-Length"),
    (post("Content-Length: 1, 1"), 400, "Content-Length"),
    (post("Content-Length: 18446744073709551616"), 400, "Content-Length"),
    (get("Content-Length: 0", "content-length: 41"), 400, "Content-Length"),
    (post("Content-Type: a", "Content-Type: b"), 400, "Content-Type"),
    # the transfer coding
    (post("Transfer-Encoding: chunked", "Content-Length: 1"), 400, "Content-Length"),
    (post("Content-Length: 1", "Transfer-Encoding: chunked"), 400, "Content-Length"),
    (post("Transfer-Encoding: chunked", version="1.0"), 400, "HTTP/1.0"),
    (post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, "chunked"),
    (post("Transfer-Encoding: chunked, chunked"), 400, "chunked"),
    (post("Transfer-Encoding: chunked, gzip"), 400, ""),
    (post("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), 400, ""),
    (post("Transfer-Encoding : chunked"), 400, ""),
    (post("Transfer-Encoding: \x0bchunked"), 400, ""),
    (post("Transfer-Encoding:\x00chunked"), 400, ""),
    (post(" Transfer-Encoding: chunked"), 400, ""),
    (post("A: b", " Transfer-Encoding: chunked"), 400, ""),
    (post("Transfer-Encoding: chunked, identity"), 400, ""),
    (post("Transfer-Encoding: chunked", "Transfer-Encoding: x"), 501, ""),
    (post("Transfer-Encoding: foo"), 501, "Transfer-Encoding"),
    (post("Transfer-Encoding: xchunked"), 501, "Transfer-Encoding"),
    (post('Transfer-Encoding: "chunked"'), 501, "Transfer-Encoding"),
    (post("Transfer-Encoding: chunked;a=b"), 501, "Transfer-Encoding"),
    (post("Transfer-Encoding:"), 501, "Transfer-Encoding"),
    (post("Transfer-Encoding: ,chunked"), 501, "Transfer-Encoding"),
    (post("Transfer-Encoding: gzip"), 501, "gzip"),
    (post("Transfer-Encoding: gzip, chunked"), 501, "gzip"),
    (post("Transfer-Encoding: gzip", "Transfer-Encoding: chunked"), 501, "gzip"),
    (post("Transfer-Encoding: identity"), 501, "identity"),
    (post("Transfer-Encoding: identity", "Content-Length: 1"), 501, "identity"),
    # expectations
    (post("Content-Length: 1", "Expect: tea"), 417, "tea"),
    (post("Content-Length: 1", "Expect: 100-continue, tea"), 417, "tea"),
    (post("Content-Length: 1", "Expect:"), 417, ""),
]

SIZE = b"%x" % len(RELU)
END = b"\r\n0\r\n\r\n"
# A chunk of each form, and the end of the body.
VALID_CHUNKS = [
    SIZE + b"\r\n" + RELU + END,
    SIZE.upper() + b"\r\n" + RELU + END,
    b"0000" + SIZE + b"\r\n" + RELU + b"\r\n000\r\n\r\n",
    SIZE + b";a\r\n" + RELU + END,
    SIZE + b";a=b;c\r\n" + RELU + END,
    SIZE + b';a="b c;d"\r\n' + RELU + END,
    SIZE + b"\r\n" + RELU + b"\r\n0;a=b\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\r\nC-D:\r\n\r\n",
]
REFUSED_CHUNKS = [
    b"\r\n" + RELU + END,
    b"x\r\n" + RELU + END,
    b"-1\r\n" + RELU + END,
    b"+" + SIZE + b"\r\n" + RELU + END,
    b"0x" + SIZE + b"\r\n" + RELU + END,
    b" " + SIZE + b"\r\n" + RELU + END,
    SIZE + b" \r\n" + RELU + END,
    SIZE + b"\t\r\n" + RELU + END,
    SIZE[:1] + b"_" + SIZE[1:] + b"\r\n" + RELU + END,
    b"1" * 17 + b"\r\n" + RELU + END,
    SIZE + b"\n" + RELU + END,
    SIZE + b"\r" + RELU + END,
    SIZE + b"\r\r\n" + RELU + END,
    SIZE + b";a\n" + RELU + END,
    SIZE + b";a\rb\r\n" + RELU + END,
    SIZE + b"\r\n" + RELU + b"0\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\n0\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"x\r\n0\r\n\r\n",
    SIZE + b"\r\n" + RELU[:-1] + END,
    SIZE + b"\r\n" + RELU + b"\r\n0\n\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: b\rc\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nHost: x\r\n\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n",
    SIZE + b"\r\n" + RELU + b"\r\n0\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
    SIZE + b";" + b"a" * 9000 + b"\r\n" + RELU + END,
]
# Not field lines, of which a trailer section consists (RFC 9112 section 7.1.2).
REFUSED_TRAILERS = [b"no colon", b": b", b"A : b", b" A: b", b"A: b\r\n folded", b"A(: b", b"A: b\0", b"GET / HTTP/1.1"]
# Parts of a body that no byte can make valid: RFC 9112 section 2.2 lets a bare LF end the lines of heads only.
BARE_CR_OR_LF = [
    b"3\nabc\n0\n\n",
    b"3\n",
    b"3;a\n",
    b"\n",
    b"3\rabc",
    b"3\r\nabc\n",
    b"3\r\nabc\r0",
    b"0\n\n",
    b"0\r\n\n",
    b"0\r\nA: b\n\n",
    b"0\r\nA: b\r\n\n",
    b"0\r\nA: b\rC",
]
