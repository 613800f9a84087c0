"""Content-Encoding (RFC 9110, section 8.4.1): request bodies are decompressed, responses to inferences compressed."""

import re
import zlib
from collections.abc import Iterable, Iterator

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError
from ovms_rest.protocol.buffers import allocate
from ovms_rest.protocol.encoding import Buffer
from ovms_rest.protocol.words import count_of

# The supported encodings with zlib's `wbits` for each: gzip (RFC 1952), and deflate, which is zlib's format (RFC 1950).
ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

# Bytes to decompress per step: they stay in the cache until they are copied to their place.
_PIECE = 2**17
# The factor by which a full buffer grows.
_GROWTH = 4

# The lowest level saves most of what can be saved; higher ones take many times as long as an inference.
_LEVEL = 1
_ITEM = re.compile(r"(?P<coding>[^;\s]+)(?:[ \t]*;[ \t]*q=(?P<weight>0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")


# --- Responses


def choose_encoding(accept_encoding: str) -> str | None:
    """Return the encoding with the highest weight: gzip, deflate or None (identity); gzip wins a tie with deflate.

    Malformed items of the header are ignored, and so is `*`, which does not ask for compression.
    """
    weights = {}
    for item in accept_encoding.lower().split(","):
        if found := _ITEM.fullmatch(item.strip(" \t")):
            weights[found["coding"]] = float(found["weight"] or 1)
    identity = weights.get("identity", 0.0)
    best = max(ENCODINGS, key=lambda coding: weights.get(coding, 0.0))
    weight = weights.get(best, 0.0)
    return best if weight > 0.0 and weight >= identity else None


def compress(buffers: Iterable[Buffer], encoding: str) -> bytes:
    """Return the buffers of a body compressed as one stream."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, ENCODINGS[encoding])
    return b"".join([*map(compressor.compress, buffers), compressor.flush()])


# --- Request bodies


def decompress(body: memoryview, encoding: str, limit: int, aligned: int) -> memoryview:
    """Decompress a body into one buffer whose offset `aligned` lies on 64 bytes, so that it is in memory once.

    Raises BodyTooLargeError, and InvalidRequestError for a body that is not exactly one stream.
    """
    buffer, size = memoryview(bytearray()), 0
    for data in _inflate(body, encoding):
        begin, size = size, size + len(data)
        if size > limit:
            raise BodyTooLargeError(f"the body decompresses to more than the {limit} bytes allowed")
        if size > len(buffer):
            larger = allocate(_choose_room(size, body, encoding, limit), aligned)
            if begin:
                larger[:begin] = buffer[:begin]
            buffer = larger
        buffer[begin:size] = data
    return buffer[:size] if size < len(buffer) else buffer


def _choose_room(size: int, body: memoryview, encoding: str, limit: int) -> int:
    """Return the size of a buffer for a body of which `size` bytes are decompressed. Unwritten pages take no memory."""
    final = int.from_bytes(body[-4:], "little") if encoding == "gzip" else 0  # gzip ends with the size of the data
    return final if size <= final <= limit else size if size < _PIECE else min(_GROWTH * size, limit)


def _inflate(body: memoryview, encoding: str) -> Iterator[bytes]:
    """Yield a decompressed body piece by piece."""
    decompressor = zlib.decompressobj(ENCODINGS[encoding])
    # zlib copies the input that it leaves over, so it gets a little at a time; the last step only collects output.
    for begin in (*range(0, len(body), _PIECE), len(body)):
        rest: bytes | memoryview = body[begin : begin + _PIECE]
        is_full = True
        while rest or is_full:
            try:
                data = decompressor.decompress(rest, _PIECE)
            except zlib.error as error:
                raise InvalidRequestError(f"the body is not a valid {encoding} stream: {error}") from error
            if decompressor.eof:
                _check_end(len(decompressor.unused_data) + max(0, len(body) - begin - _PIECE), encoding)
                yield data
                return
            yield data
            rest, is_full = decompressor.unconsumed_tail, len(data) == _PIECE
    raise InvalidRequestError(f"the {encoding} stream of the body ends early, after {count_of(len(body), 'byte')}")


def _check_end(left_over: int, encoding: str) -> None:
    if left_over:
        raise InvalidRequestError(f"the body has {count_of(left_over, 'byte')} after the end of its {encoding} stream")
