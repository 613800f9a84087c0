"""HTTP/1.1 without I/O: from the bytes of a head to a WSGI environ, and from a response to bytes.

The parser is gunicorn's C one, `gunicorn_h1c`. It refuses what RFC 9112 calls malformed (smuggling forms, bare CR and
LF, spaces before colons, obsolete folding, ...); the checks that it leaves to a server are here.
"""

import email.utils
import io
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import gunicorn_h1c
from gunicorn_h1c import parse_request_fast

from ovms_rest.protocol.encoding import encode_error
from ovms_rest.protocol.header_length import HeaderLength, read_header_length
from ovms_rest.protocol.routes import read_inference, read_path
from ovms_rest.protocol.words import list_names, quote

Environ = dict[str, Any]

# The parser's two modules each have an exception of their own for an incomplete head.
INCOMPLETE: tuple[type[Exception], ...] = (gunicorn_h1c.IncompleteError, gunicorn_h1c._parser_fast.IncompleteError)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# How many names of header fields, and hosts, are remembered at most; clients may send any.
_REMEMBERED = 512
_CR, _SPACE = b"\r "
_HEADER_LENGTH = "HTTP_INFERENCE_HEADER_CONTENT_LENGTH"
# RFC 3986 section 3.2.2 and 3.2.3: an address in brackets or a name, and a port.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Refusal(Exception):  # noqa: N818  not a ServingError
    """A request that does not reach the application: the status, message and headers of its response."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.is_of_head = False  # then the response has no body


class Limits(NamedTuple):
    """The limits of a head: bytes of the request line, number of fields, and bytes of a field."""

    request_line: int
    fields: int
    field_size: int

    @property
    def head(self) -> int:
        """The bytes of a whole head, as gunicorn computes them."""
        return self.request_line + self.fields * (self.field_size + 2) + 4


class Head(NamedTuple):
    """The head of a request, interpreted."""

    environ: Environ
    size: int  # of the head in bytes
    length: int | None  # of the body in bytes, None for a chunked one
    expects_continue: bool
    keep_alive: bool
    inference: tuple[str, str | None] | None  # the model and version of an inference, which may have to be queued
    header_length: HeaderLength


# The head of a request that could not be read, for the access log.
UNREAD = Head(
    {"REQUEST_METHOD": "-", "RAW_URI": "-", "PATH_INFO": "-", "QUERY_STRING": "", "SERVER_PROTOCOL": "HTTP/1.1"},
    size=0,
    length=0,
    expects_continue=False,
    keep_alive=False,
    inference=None,
    header_length=read_header_length(None),
)


class RequestBody:
    """`wsgi.input` for a body that was received whole; `buffer` is its memory, which can be read in place."""

    __slots__ = ("_stream", "buffer")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self._stream: io.BytesIO | None = None

    def _open(self) -> io.BytesIO:
        if self._stream is None:
            self._stream = io.BytesIO(self.buffer)
        return self._stream

    def read(self, size: int | None = -1) -> bytes:
        """Read like a file."""
        return self._open().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        """Read a line like a file."""
        return self._open().readline(size)

    def readlines(self, hint: int = -1) -> list[bytes]:
        """Read lines like a file."""
        return self._open().readlines(hint)

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over lines like a file."""
        return iter(self._open())


class HeadReader:
    """Reads heads by gunicorn's settings; `script_name` comes from `read_script_name`."""

    def __init__(self, cfg: Any, script_name: str = "") -> None:
        self._script_name = script_name
        self.limits = Limits(
            min(cfg.limit_request_line, 8190) or 2**20,  # 0 is no limit, which the parser does not know
            min(cfg.limit_request_fields or 256, 256),  # the parser's own limit
            cfg.limit_request_field_size or 8190,
        )
        self._arguments = (
            *self.limits,
            cfg.permit_unconventional_http_method,
            cfg.permit_unconventional_http_version,
        )
        self._header_map = cfg.header_map
        self._hosts: set[str | None] = set()
        self._keys: dict[bytes, str | None] = {b"Content-Type": "CONTENT_TYPE", b"Content-Length": "CONTENT_LENGTH"}

    def read(self, data: bytes | bytearray | memoryview, seen: int, template: Environ) -> Head | None:
        """Return the head at the start of `data`, None while it is incomplete. Raises Refusal.

        The first `seen` bytes are known not to be a complete head. `template` is the environ of the connection, which
        is copied.
        """
        # RFC 9112 section 2.2: an empty line may come before a request. The parser would not count the one after it.
        skipped = 2 if data[:2] == b"\r\n" else 0
        if skipped:
            data = memoryview(data)[2:]
            if len(data) and data[0] == _CR:
                raise Refusal(400, "malformed request: more than one empty line before the request line")
        try:
            request = parse_request_fast(data, max(seen - skipped, 0), *self._arguments)
        except INCOMPLETE:
            return None
        except ValueError as error:
            raise self._refuse(error, data) from error
        # RFC 9112 section 3: single spaces, of which the parser takes any number.
        place = len(request.method) + 1
        if data[place] == _SPACE or data[place + len(request.path) + 1] == _SPACE:
            raise Refusal(400, "malformed request: more than one space in a row in the request line")
        environ = template.copy()
        target = str(request.path, "latin-1")
        environ["REQUEST_METHOD"] = str(request.method, "latin-1")
        environ["RAW_URI"] = target
        environ["QUERY_STRING"] = target.partition("?")[2]
        environ["PATH_INFO"] = read_path(target, self._script_name)
        minor = request.minor_version
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if minor else "HTTP/1.0"
        keys = self._keys
        for name, value in request.headers:
            key = keys[name] if name in keys else self._find_key(name)
            if key is None:
                continue
            environ[key] = f"{environ[key]},{value.decode('latin-1')}" if key in environ else value.decode("latin-1")
        self._check_host(environ.get("HTTP_HOST"), minor)
        environ["ovms_rest.header_length"] = header_length = read_header_length(environ.get(_HEADER_LENGTH))
        return Head(
            environ,
            request.consumed + skipped,
            self._body_length(request, environ),
            "HTTP_EXPECT" in environ and _expects_continue(environ["HTTP_EXPECT"], minor),
            _keeps_alive(environ["HTTP_CONNECTION"], minor) if "HTTP_CONNECTION" in environ else minor == 1,
            read_inference(environ["REQUEST_METHOD"], environ["PATH_INFO"]),
            header_length,
        )

    def _check_host(self, host: str | None, minor: int) -> None:
        """Refuse a missing or invalid Host header (RFC 9112 section 3.2)."""
        if host in self._hosts:
            return
        if host is None and minor:
            raise Refusal(400, "malformed request: the Host header is missing (RFC 9112 section 3.2)")
        if host is not None and not _HOST.fullmatch(host):
            raise Refusal(400, f"malformed request: invalid Host header {quote(host)}")
        if len(self._hosts) < _REMEMBERED:
            self._hosts.add(host or "")

    def _refuse(self, error: ValueError, data: bytes | bytearray | memoryview) -> Refusal:
        status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 400)
        reason = str(error)
        if reason == "Unsupported Transfer-Encoding":
            status = 501
        elif type(error) is gunicorn_h1c._parser_fast.ParseError:
            fields = bytes(data).partition(b"\r\n\r\n")[0].removesuffix(b"\r\n").count(b"\r\n")
            if fields > self.limits.fields:  # which the parser only counts up to a limit of its own
                status, reason = 431, f"Number of headers ({fields}) exceeds limit ({self.limits.fields})"
        return Refusal(status, f"malformed request: {reason}{_show_fault(reason, data)}")

    @staticmethod
    def _body_length(request: Any, environ: Environ) -> int | None:
        encoding = environ.get("HTTP_TRANSFER_ENCODING")
        if encoding is None:
            return max(int(request.content_length), 0)
        if encoding.lower() != "chunked":
            raise Refusal(501, f"Transfer-Encoding is {quote(encoding)}, only chunked is supported")
        return None

    def _find_key(self, name: bytes) -> str | None:
        """Return the environ key of a field, None to drop it."""
        text = name.decode("latin-1").upper()
        if "_" in text and self._header_map != "dangerous":
            # An underscore would pass for the dash of another field, which a proxy may have checked or removed.
            if self._header_map == "refuse":
                raise Refusal(400, f"malformed request: header name {quote(text)} has an underscore")
            key = None
        else:
            text = text.replace("-", "_")
            key = text if text in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{text}"
        if len(self._keys) < _REMEMBERED:
            self._keys[name] = key
        return key


# A head in the forms that the parser accepts, as far as its reasons tell them apart.
_REQUEST_LINE = re.compile(r"[^ ]+ +[^ \x00-\x1f\x7f]+ +HTTP/[0-9.]+")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# Headers whose values the parser judges, and what it allows.
_JUDGED = {
    "Host": "expected one",
    "Content-Length": f"expected one integer from 0 to {2**63 - 1}",
    "Content-Type": "expected one",
    "Transfer-Encoding": "only chunked is supported",
}


def _show_fault(reason: str, data: bytes | bytearray | memoryview) -> str:
    """Return what the parser's reason is about: the values of a header, or the line; "" if that is unclear."""
    first, *lines = bytes(data).partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    fields = [(name, colon, value.strip(" \t")) for name, colon, value in (line.partition(":") for line in lines)]
    is_unclear = reason == "Invalid HTTP request"
    if "HTTP method" in reason:
        return f"; the request line is {quote(first)}"
    if is_unclear and not _REQUEST_LINE.fullmatch(first):
        return f"; the request line is {quote(first)}, expected a method, a target and a version"
    if "header value" in reason:
        return next((f" of {quote(name)}" for name, _, value in fields if _CONTROL.search(value)), "")
    if is_unclear or "header name" in reason:
        for line, (name, colon, _) in zip(lines, fields, strict=True):
            if not colon or not _NAME.fullmatch(name):
                return f"; the line {quote(line)} does not begin with a header name and a colon"
        return ""
    for judged, expected in _JUDGED.items():
        values = [value for name, _, value in fields if name.lower() == judged.lower()]
        if values and reason.startswith(("Invalid", "Duplicate", "Unsupported")) and judged in reason:
            return f": {list_names(values, most=3)}; {expected}"
    return ""


def _expects_continue(expectation: str, minor: int) -> bool:
    if {item.strip() for item in expectation.lower().split(",")} != {"100-continue"}:
        raise Refusal(417, f"Expect is {quote(expectation)}, only 100-continue is supported")
    return minor > 0  # RFC 9110 section 10.1.1: ignored from HTTP/1.0


# The first matching class counts.
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (gunicorn_h1c.LimitRequestLine, 414),
    (gunicorn_h1c.LimitRequestHeaders, 431),
    (gunicorn_h1c.InvalidHTTPVersion, 505),
)


def _keeps_alive(connection: str, minor: int) -> bool:
    options = {option.strip() for option in connection.lower().split(",")}
    return "close" not in options and (minor == 1 or "keep-alive" in options)


# --- Responses


def encode_head(status: str, headers: list[tuple[str, str]], lines: str) -> bytes:
    """Return the head of a response without the empty line that ends it; `lines` are the first header lines.

    Raises ValueError for a line break in a header, which would allow response splitting.
    """
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
    head = f"HTTP/1.1 {status}\r\n{lines}{fields}".encode("latin-1")
    expected = len(headers) + 1 + lines.count("\n")
    if head.count(b"\n") != expected or head.count(b"\r") != expected:
        raise ValueError(f"a header of the response has a line break: {headers!r}")
    return head


def is_request_id(text: str) -> bool:
    """Return whether a client's X-Request-ID is accepted: 1 to 128 visible ASCII characters, which fit into any log."""
    return _REQUEST_ID.fullmatch(text) is not None


def encode_server_lines(now: float) -> str:
    """Return the header lines that all responses of a second share."""
    return f"Server: ovms_rest\r\nDate: {email.utils.formatdate(now, usegmt=True)}\r\n"


def encode_refusal(refusal: Refusal) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the status, headers and body of the response to a refused request."""
    body = encode_error(str(refusal))
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *refusal.headers.items()]
    return f"{refusal.status} {HTTPStatus(refusal.status).phrase}", headers, body
