"""gunicorn's own error responses in the form of all others."""

import inspect
import json
import ssl

import pytest
from gunicorn.http import errors

from ovms_rest.worker.http_errors import encode_refusal

REFUSALS = [
    (errors.LimitRequestLine(5000, 4094), 414, "Request Line is too large (5000 > 4094)"),
    (errors.LimitRequestLine("request line too long"), 414, "request line too long"),
    (errors.LimitRequestHeaders("limit request headers fields"), 431, "limit request headers fields"),
    (errors.InvalidHTTPVersion((3, 0)), 505, "Invalid HTTP Version: (3, 0)"),
    (errors.UnsupportedTransferCoding("gzip"), 501, "Unsupported transfer coding: 'gzip'"),
    (errors.ExpectationFailed("tea"), 417, "Unable to comply with expectation: 'tea'"),
    (errors.ForbiddenProxyRequest("10.0.0.1"), 403, "Proxy request from '10.0.0.1' not allowed"),
    (errors.InvalidRequestLine("GET"), 400, "Invalid HTTP request line: 'GET'"),
    (errors.InvalidRequestMethod("g(t"), 400, "Invalid HTTP method: 'g(t'"),
    (errors.InvalidHeader("CONTENT-LENGTH"), 400, "Invalid HTTP Header: 'CONTENT-LENGTH'"),
    (errors.InvalidHeaderName('a"b\\'), 400, "Invalid HTTP header name: 'a\"b\\\\'"),
    (errors.ObsoleteFolding("A"), 400, "Obsolete line folding is unacceptable: 'A'"),
    (errors.InvalidProxyLine("PROXY x"), 400, "Invalid PROXY line: 'PROXY x'"),
    (errors.InvalidProxyHeader("unsupported version 3"), 400, "Invalid PROXY header: unsupported version 3"),
    (errors.InvalidSchemeHeaders(), 400, "Contradictory scheme headers"),
    (errors.InvalidH2CPreface(b"x"), 400, "Expected HTTP/2 connection preface, got b'x'"),
    (errors.ParseException("ä"), 400, "ä"),
]
# Errors of bodies, for which gunicorn's own workers do not call this.
BODY_REFUSALS = [
    (errors.NoMoreData(b"x"), 400, "No more data after: b'x'"),
    (errors.InvalidChunkSize(b"x"), 400, "Invalid chunk size: b'x'"),
    (errors.ChunkMissingTerminator(b"x"), 400, "Invalid chunk terminator is not '\\r\\n': b'x'"),
    (errors.InvalidChunkExtension("bare CR not allowed"), 400, "Invalid chunk extension: bare CR not allowed"),
]
FAILURES = [
    errors.ConfigurationProblem("secret of the configuration"),
    RuntimeError("secret of the program"),
    KeyError("secret"),
    OSError(5, "secret"),
    SystemExit("secret"),
]
PHRASES = {
    400: {"Bad Request"},
    403: {"Forbidden"},
    414: {"Request-URI Too Long", "URI Too Long"},  # Python 3.11 and 3.13
    417: {"Expectation Failed"},
    431: {"Request Header Fields Too Large"},
    500: {"Internal Server Error"},
    501: {"Not Implemented"},
    505: {"HTTP Version Not Supported"},
}


def parse(response):
    head, _, body = response.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    return status_line, dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(("error", "status", "text"), REFUSALS)
def test_refusal_has_its_status_and_reason(error, status, text):
    found, response = encode_refusal(error)
    status_line, _, body = parse(response)
    assert (found, json.loads(body)) == (status, {"error": f"malformed request: {text}"})
    assert status_line.startswith(f"HTTP/1.1 {status} ")


@pytest.mark.parametrize(("error", "status", "text"), BODY_REFUSALS)
def test_malformed_body_is_a_client_error(error, status, text):
    found, response = encode_refusal(error)
    assert (found, json.loads(parse(response)[2])) == (status, {"error": f"malformed request: {text}"})


def test_failed_tls_handshake_is_a_client_error():
    """The error of plain HTTP on a port with TLS comes from gunicorn."""
    status, _ = encode_refusal(ssl.SSLError(1, "[SSL: HTTP_REQUEST] http request (_ssl.c:1006)"))
    assert 400 <= status < 500


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_server_error_is_a_500_without_its_reason(error):
    status, response = encode_refusal(error)
    assert status == 500
    assert parse(response)[2] == b'{"error":"internal error; the reason is in the server\'s log"}'


@pytest.mark.parametrize(
    "error", [*(error for error, *_ in REFUSALS), *FAILURES], ids=lambda error: type(error).__name__
)
def test_every_refusal_is_a_complete_response_that_closes_the_connection(error):
    status, response = encode_refusal(error)
    status_line, headers, body = parse(response)
    assert status_line.removeprefix(f"HTTP/1.1 {status} ") in PHRASES[status]
    assert headers == {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }


def test_tables_have_every_error_of_gunicorn():
    known = {type(error) for error, *_ in (*REFUSALS, *BODY_REFUSALS)} | {type(error) for error in FAILURES}
    all_errors = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert all_errors - known == set()
