"""The body of a request: received into one buffer and decompressed, within the limit."""

from typing import Any

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError, ServingError, UnsupportedEncodingError
from ovms_rest.protocol.buffers import allocate
from ovms_rest.protocol.words import quote
from ovms_rest.resources.compression import ENCODINGS, decompress

_CHUNK = 2**20

Environ = dict[str, Any]


def _receive(environ: Environ, buffer: memoryview) -> int:
    """Fill a buffer from the input stream of any WSGI server; return how many bytes arrived."""
    received = 0
    while received < len(buffer):
        chunk = environ["wsgi.input"].read(min(_CHUNK, len(buffer) - received))
        if not chunk:
            break
        buffer[received : received + len(chunk)] = chunk
        received += len(chunk)
    return received


def read_body(environ: Environ, limit: int, aligned: int = 0) -> memoryview:
    """Return the body of a request, decompressed.

    The offset `aligned`, where its tensors begin, lies on a 64-byte boundary. Raises BodyTooLargeError,
    UnsupportedEncodingError, and InvalidRequestError for a body that ends early or cannot be decompressed.
    """
    body: memoryview | None = getattr(environ["wsgi.input"], "buffer", None)  # of our own worker: complete and aligned
    if body is not None and len(body) > limit:  # the route's limit; the worker has applied that of the settings
        raise BodyTooLargeError(f"the body has {len(body)} bytes, at most {limit} are allowed")
    coding = environ.get("HTTP_CONTENT_ENCODING")
    if body is not None and coding is None:
        return body
    encoding = (coding or "identity").strip().lower()
    if encoding not in ENCODINGS and encoding not in ("identity", ""):
        raise UnsupportedEncodingError(
            f"unsupported Content-Encoding {quote(encoding)}; supported: gzip, deflate, identity"
        )
    if body is None:
        body = _receive_body(environ, limit, aligned)
    return decompress(body, encoding, limit, aligned) if encoding in ENCODINGS else body


def _receive_body(environ: Environ, limit: int, aligned: int) -> memoryview:
    length = environ.get("CONTENT_LENGTH")
    try:
        if length:
            return _receive_known(environ, int(length), limit, aligned)
        return _receive_unknown(environ, limit, aligned)
    except ServingError:
        raise
    except Exception as error:  # each server has its own errors for a malformed body or a closed connection
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
    """Receive a body without Content-Length: chunked or empty."""
    if environ.get("HTTP_TRANSFER_ENCODING") is None:
        return allocate(0)
    chunks, size = [], 0
    while chunk := environ["wsgi.input"].read(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise BodyTooLargeError(f"the body has more than the {limit} bytes allowed")
        chunks.append(chunk)
    return _copy(b"".join(chunks), aligned)


def _copy(data: bytes, aligned: int) -> memoryview:
    buffer = allocate(len(data), aligned)
    buffer[:] = data
    return buffer
