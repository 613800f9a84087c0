"""The body of a request: received into one buffer, its Content-Encoding undone, never more than the limit."""

import zlib
from collections.abc import Iterator
from typing import Any

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError, ServingError, UnsupportedEncodingError
from ovms_rest.protocol.buffers import allocate

_CHUNK = 2**20
# What is decompressed in one go: it stays in the cache until it is copied to its place.
_PIECE = 2**17
# How many times what has come a buffer becomes when it has no more room.
_GROWTH = 4

# zlib's number for the container of an encoding: gzip (RFC 1952), and deflate, which is zlib's own (RFC 1950).
_CONTAINERS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

Environ = dict[str, Any]


def _receive(environ: Environ, buffer: memoryview) -> int:
    """Receive a body by the means of any WSGI server; return how many bytes came."""
    received = 0
    while received < len(buffer):
        chunk = environ["wsgi.input"].read(min(_CHUNK, len(buffer) - received))
        if not chunk:
            break
        buffer[received : received + len(chunk)] = chunk
        received += len(chunk)
    return received


def read_body(environ: Environ, limit: int, aligned: int = 0) -> memoryview:
    """Read the body of a request and undo its Content-Encoding.

    The offset `aligned`, at which the tensors begin, lies on a 64-byte boundary. Raises BodyTooLargeError,
    UnsupportedEncodingError, and InvalidRequestError for a body that ends early or a broken encoding.
    """
    body: memoryview | None = getattr(environ["wsgi.input"], "buffer", None)  # our own worker's, whole and aligned
    if body is not None and len(body) > limit:  # that of the route, for the worker knows one for all
        raise BodyTooLargeError(f"the body has {len(body)} bytes, at most {limit} are allowed")
    coding = environ.get("HTTP_CONTENT_ENCODING")
    if body is not None and coding is None:
        return body
    encoding = (coding or "identity").strip().lower()
    if encoding not in _CONTAINERS and encoding not in ("identity", ""):
        raise UnsupportedEncodingError(f"Content-Encoding is {encoding!r}, allowed are gzip, deflate and identity")
    if body is None:
        body = _receive_body(environ, limit, aligned)
    if encoding in _CONTAINERS:
        return _decompress(body, encoding, limit, aligned)
    return body


def _receive_body(environ: Environ, limit: int, aligned: int) -> memoryview:
    length = environ.get("CONTENT_LENGTH")
    try:
        if length:
            return _receive_known(environ, int(length), limit, aligned)
        return _receive_unknown(environ, limit, aligned)
    except ServingError:
        raise
    except Exception as error:  # whatever a server's reader raises for a malformed body, or a client that is gone
        raise InvalidRequestError(f"the body could not be received: {error}") from error


def _receive_known(environ: Environ, length: int, limit: int, aligned: int) -> memoryview:
    if length > limit:
        raise BodyTooLargeError(f"the body has {length} bytes, at most {limit} are allowed")
    buffer = allocate(length, aligned)
    received = _receive(environ, buffer)
    if received != length:
        raise InvalidRequestError(f"the body ended after {received} of {length} bytes")
    return buffer


def _receive_unknown(environ: Environ, limit: int, aligned: int) -> memoryview:
    """Receive a body without Content-Length: a chunked one, or none at all."""
    if environ.get("HTTP_TRANSFER_ENCODING") is None:
        return allocate(0)
    chunks, size = [], 0
    while chunk := environ["wsgi.input"].read(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes, which are allowed")
        chunks.append(chunk)
    return _copy(b"".join(chunks), aligned)


def _copy(data: bytes, aligned: int) -> memoryview:
    buffer = allocate(len(data), aligned)
    buffer[:] = data
    return buffer


def _decompress(body: memoryview, encoding: str, limit: int, aligned: int) -> memoryview:
    """Decompress a body into one buffer, so that it is in memory once."""
    buffer, size = memoryview(bytearray()), 0
    for data in _inflate(body, encoding):
        begin, size = size, size + len(data)
        if size > limit:
            raise BodyTooLargeError(f"the body decompresses to more than {limit} bytes, which are allowed")
        if size > len(buffer):
            larger = allocate(_choose_room(size, body, encoding, limit), aligned)
            if begin:
                larger[:begin] = buffer[:begin]
            buffer = larger
        buffer[begin:size] = data
    return buffer[:size] if size < len(buffer) else buffer


def _choose_room(size: int, body: memoryview, encoding: str, limit: int) -> int:
    """Return how large a buffer to take for what has come to `size` bytes. What is not written takes no memory."""
    said = int.from_bytes(body[-4:], "little") if encoding == "gzip" else 0  # which ends with it
    return said if size <= said <= limit else size if size < _PIECE else min(_GROWTH * size, limit)


def _inflate(body: memoryview, encoding: str) -> Iterator[bytes]:
    """Decompress a body piece by piece. Raises InvalidRequestError for one that is not exactly one stream."""
    decompressor = zlib.decompressobj(_CONTAINERS[encoding])
    # zlib copies what it leaves of its input, so it gets a little at a time. At the end it may have output without any.
    for begin in (*range(0, len(body), _PIECE), len(body)):
        rest: bytes | memoryview = body[begin : begin + _PIECE]
        is_full = True
        while rest or is_full:
            try:
                data = decompressor.decompress(rest, _PIECE)
            except zlib.error as error:
                raise InvalidRequestError(f"the body is no valid {encoding} stream: {error}") from error
            if decompressor.eof:
                _check_end(len(decompressor.unused_data) + max(0, len(body) - begin - _PIECE), encoding)
                yield data
                return
            yield data
            rest, is_full = decompressor.unconsumed_tail, len(data) == _PIECE
    raise InvalidRequestError(f"the {encoding} stream of the body ends early, after {len(body)} bytes")


def _check_end(left_over: int, encoding: str) -> None:
    if left_over:
        raise InvalidRequestError(f"{left_over} bytes are left over behind the {encoding} stream of the body")
