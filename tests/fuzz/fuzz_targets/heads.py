"""Heads of HTTP requests: read whole and byte by byte, compared with h11, and what the service derives from them.

The input: the head, and what follows it.
"""

from typing import Any
from urllib.parse import unquote

import h11
from fuzz_oracles import Failure, attempt, check_refusal
from fuzz_streams import TO_ASCII, to_h11
from gunicorn.config import Config
from request_cases import CONVERSATION, REFUSED, get, post

from ovms_rest.protocol.routes import read_authority, read_path
from ovms_rest.protocol.waiting_time import decode_request_start, waits_since
from ovms_rest.resources.compression import choose_encoding
from ovms_rest.worker.http1 import Head, HeadReader, Refusal, encode_refusal, is_request_id

MAX_LENGTH = 1024
TOKENS = [
    *(
        b"\r\n\r\n",
        b"\r\n",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked\r\n",
        b"Host: x\r\n",
        b"HTTP/1.1",
        b"HTTP/1.0",
    ),
    *(
        b"Connection: close\r\n",
        b"Connection: keep-alive\r\n",
        b"Expect: 100-continue\r\n",
        b"GET ",
        b"POST ",
        b"/v2",
        b"*",
    ),
    *(b"Inference-Header-Content-Length: ", b"X-Request-Start: t=", b"Accept-Encoding: gzip;q=0.5", b"X-Request-ID: "),
    *(
        b"http://x:80/v2",
        b"%2F",
        b"%00",
        b"/v2/models/m/versions/1/infer",
        b"/v1/models/m:predict",
        b"_",
        b"\t",
        b"\x80",
    ),
]
_TEMPLATE = {"wsgi.url_scheme": "http", "SCRIPT_NAME": ""}


def _reader(**settings: Any) -> HeadReader:
    cfg = Config()
    for name, value in settings.items():
        cfg.set(name, value)
    return HeadReader(cfg)


_READER = _reader(limit_request_fields=20, limit_request_field_size=300, limit_request_line=400)


def seeds() -> list[bytes]:
    """Return the heads of the tables of requests, refused and valid, and the headers of the service's own."""
    own = [
        post("Content-Length: 2", "Inference-Header-Content-Length: 1", "Content-Type: a") + b"{}",
        post("Inference-Header-Content-Length: 01", "inference-header-content-length: 1", "Transfer-Encoding: chunked"),
        get("X-Request-Start: t=1700000000.123", "Accept-Encoding: gzip;q=0.5, deflate, *", "X-Request-ID: a-1"),
        get("X-Request-Start: 1700000000123", "Connection: close, x", "Host_x: y", "Expect: 100-continue"),
        get(target="http://u@x:80/v2/models/a%2Fb%00?c#d"),
        get("Connection: keep-alive", version="1.0"),
        b"\r\n" + get("X-Request-Start: 1700000000123456"),
    ]
    return [*own, *(data for data, _, _ in CONVERSATION), *(data for data, _, _ in REFUSED if len(data) < 1000)]


def check(data: bytes) -> None:
    """Read a head whole and byte by byte; what the service accepts, h11 must accept and understand the same way."""
    whole = _read(data, 0)
    seen, found = 0, None
    for size in range(1, len(data) + 1):
        found = _read(data[:size], seen)
        if found is not None:
            break
        seen = size
    for refusal in (whole, found):
        if isinstance(refusal, Refusal):  # which may come before the head is whole, depending on its pieces
            _check_refusal(refusal)
    if isinstance(whole, Head) or isinstance(found, Head):
        assert whole == found, f"whole {whole}, byte by byte {found}"
        _check_head(whole, data)


def _read(data: bytes, seen: int) -> Head | Refusal | None:
    try:
        return _READER.read(data, seen, _TEMPLATE)
    except Refusal as refusal:
        return refusal


def _check_refusal(refusal: Refusal) -> None:
    check_refusal(refusal, 400, 414, 417, 431, 501, 505)
    status, headers, body = encode_refusal(refusal)
    assert status.startswith(str(refusal.status))
    assert dict(headers)["Content-Length"] == str(len(body))


def _check_head(head: Head, data: bytes) -> None:
    environ = head.environ
    assert 0 < head.size <= len(data)
    assert data[: head.size].endswith(b"\r\n\r\n")
    for key, value in environ.items():
        assert not isinstance(value, str) or not set(value) & set("\r\n\0") or key == "PATH_INFO", f"{key}: {value!r}"
    _check_framing(head, data)
    target = environ["RAW_URI"]
    path = environ["PATH_INFO"]
    path.encode("latin-1")
    # One slash at the end is removed; another one before it stays.
    assert path == "/" or not path.endswith("/") or "//" in unquote(target, "latin-1"), path
    assert read_path(target) == path
    authority = read_authority(target)
    assert authority is None or "/" not in authority
    for length in (0, 1, 10**6):
        found = attempt(head.header_length.check, length)
        assert found is None or isinstance(found, Failure) or 0 <= found <= length
    assert waits_since(environ, 10**18) <= 10**18
    started = decode_request_start(environ.get("HTTP_X_REQUEST_START", ""))
    assert started is None or 0 <= started < 10**20
    assert choose_encoding(environ.get("HTTP_ACCEPT_ENCODING", "")) in ("gzip", "deflate", None)
    if is_request_id(environ.get("HTTP_X_REQUEST_ID", "")):
        assert environ["HTTP_X_REQUEST_ID"].isprintable()


def _check_framing(head: Head, data: bytes) -> None:
    """Compare with h11: a difference about where a request ends would let one be smuggled past a proxy."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=10**6)
    connection.receive_data(to_h11(data[: head.size]))
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise AssertionError(f"h11 refuses it: {error}") from error
    assert isinstance(request, h11.Request), request
    environ = head.environ
    assert request.method.decode() == environ["REQUEST_METHOD"]
    assert request.target == environ["RAW_URI"].encode("latin-1").translate(TO_ASCII)
    assert request.http_version == environ["SERVER_PROTOCOL"].removeprefix("HTTP/").encode()
    fields: dict[str, str] = {}
    for name, value in request.headers:
        if b"_" in name:
            continue
        key = name.decode().upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        text = value.decode("latin-1")
        fields[key] = f"{fields[key]},{text}" if key in fields else text
    kept = {key: value for key, value in environ.items() if key.startswith(("HTTP_", "CONTENT_"))}
    ours = {key: value.encode("latin-1").translate(TO_ASCII).decode() for key, value in kept.items()}
    if "HTTP_TRANSFER_ENCODING" in ours:  # h11 writes it in lower case
        ours["HTTP_TRANSFER_ENCODING"] = ours["HTTP_TRANSFER_ENCODING"].lower()
    assert ours == fields, f"{ours} is not {fields}"
    if "HTTP_TRANSFER_ENCODING" in fields:
        assert head.length is None
    else:
        assert head.length == int(fields.get("CONTENT_LENGTH", "0"))
