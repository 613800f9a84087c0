"""The body of a request: received into one buffer, its Content-Encoding undone, never more than the limit."""

import zlib
from typing import Any

import numpy as np

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError, ServingError, UnsupportedEncodingError

# A cache line, and what OpenVINO aligns its own tensors to.
ALIGNMENT = 64
_CHUNK = 2**20

# zlib's number for the container of an encoding: gzip (RFC 1952), and deflate, which is zlib's own (RFC 1950).
_CONTAINERS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

Environ = dict[str, Any]


def allocate(size: int, aligned: int = 0) -> memoryview:
    """Return an uninitialised, writable buffer in which the offset `aligned` lies on a 64-byte boundary."""
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -(room.__array_interface__["data"][0] + aligned) % ALIGNMENT
    return room[start : start + size].data


def tensors_begin(header_length: str | None) -> int:
    """Tell where in the body the tensors begin, as far as Inference-Header-Content-Length can be trusted.

    It is only a hint for `allocate`: what is wrong with the header the decoder tells.
    """
    return int(header_length) if header_length and header_length.isdecimal() and len(header_length) < 12 else 0


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


def read_body(environ: Environ, limit: int, header_length: str | None) -> memoryview:
    """Read the body of a request and undo its Content-Encoding.

    `header_length`, the text of Inference-Header-Content-Length, tells where in the body the tensors begin, which are
    what is aligned. Raises BodyTooLargeError, UnsupportedEncodingError, and InvalidRequestError for a body that ends
    early or a broken encoding.
    """
    body: memoryview | None = getattr(environ["wsgi.input"], "buffer", None)  # our own worker's, whole and aligned
    coding = environ.get("HTTP_CONTENT_ENCODING")
    if body is not None and coding is None:
        return body
    encoding = (coding or "identity").strip().lower()
    if encoding not in _CONTAINERS and encoding not in ("identity", ""):
        raise UnsupportedEncodingError(f"Content-Encoding is {encoding!r}, allowed are gzip, deflate and identity")
    aligned = tensors_begin(header_length)
    if body is None:
        body = _receive_body(environ, limit, aligned)
    if encoding in _CONTAINERS:
        return _copy(_decompress(body, encoding, limit), aligned)
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


def _decompress(body: memoryview, encoding: str, limit: int) -> bytes:
    decompressor = zlib.decompressobj(_CONTAINERS[encoding])
    try:
        data = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body is no valid {encoding} stream: {error}") from error
    if len(data) > limit:
        raise BodyTooLargeError(f"the body decompresses to more than {limit} bytes, which are allowed")
    if not decompressor.eof:
        raise InvalidRequestError(f"the {encoding} stream of the body ends early, after {len(body)} bytes")
    if decompressor.unused_data:
        raise InvalidRequestError(
            f"{len(decompressor.unused_data)} bytes are left over behind the {encoding} stream of the body"
        )
    return data
