"""Chunked bodies, cut at arbitrary places; the limit of the body is 300 bytes.

The input: a byte for the number of cuts, the length of each piece, and the body.
"""

import re

from fuzz_oracles import check_refusal
from fuzz_streams import split_input
from raw_http import RELU, chunk
from request_cases import BARE_CR_OR_LF, END, REFUSED_CHUNKS, SIZE, VALID_CHUNKS

from ovms_rest.worker.chunks import ChunkDecoder
from ovms_rest.worker.http1 import Limits, Refusal

_MAX_BODY = 300
_LIMITS = Limits(100, 3, 60)
TOKENS = [
    b"\r\n0\r\n\r\n",
    b"0\r\n",
    b"\r\n",
    b";a=b",
    b"A: b\r\n",
    b"12c\r\n",
    b"Host: x\r\n",
    b"ffffffffffffffff",
    b"000",
]

# RFC 9112 section 7.1, for the whole of a body; white space may come before the semicolon of an extension only.
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?)\r\n")
_TRAILER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t\x20-\x7e\x80-\xff]*\r\n")
_FORBIDDEN = (b"content-length", b"transfer-encoding", b"host", b"trailer", b"authorization", b"te")


def seeds() -> list[bytes]:
    """Return the tables of valid and refused chunks, whole and cut, and runs of small chunks."""
    bodies = [*VALID_CHUNKS, *(item for item in REFUSED_CHUNKS if len(item) < 1000), *BARE_CR_OR_LF]
    bodies += [b"".join(chunk(bytes([number])) for number in range(40)) + chunk(b""), SIZE + b"\r\n" + RELU + END]
    return [b"\0" + body for body in bodies] + [b"\3\1\2\7" + body for body in bodies]


def check(data: bytes) -> None:
    """Decode whole, in pieces and byte by byte, and compare with the grammar of the whole body."""
    pieces, body = split_input(data)
    whole = _decode([body])
    assert _decode(pieces) == whole, "differs by where the bytes are cut"
    assert _decode([body[index : index + 1] for index in range(len(body))]) == whole, "differs byte by byte"
    assert whole[:2] == _expect(body), f"expected {_expect(body)}, got {whole}"


def _decode(pieces: list[bytes]) -> tuple[str, bytes, bytes]:
    """Return the outcome, the body, and what follows the body."""
    decoder = ChunkDecoder(_LIMITS, _MAX_BODY)
    try:
        for index, piece in enumerate(pieces):
            decoder.feed(piece)
            while decoder.has_more:
                decoder.feed(b"")
            if decoder.is_complete:
                return "complete", bytes(decoder.data), decoder.rest + b"".join(pieces[index + 1 :])
    except Refusal as refusal:
        check_refusal(refusal, 400, 413, 431)
        return "refused", b"", b""
    return "open", b"", b""


def _expect(body: bytes) -> tuple[str, bytes]:
    """Return the outcome by the grammar. A body that ends in an element is open if the element may become valid."""
    position, content = 0, b""
    while True:
        line = _CHUNK.match(body, position)
        if line is None:
            return _expect_line(body[position:], rb"[0-9A-Fa-f]{0,15}|[0-9A-Fa-f]{1,15}[ \t]*(;.*)?", 1024, b"")
        if len(line[0]) > 1024 + 2:
            return "refused", b""
        size = int(line[1], 16)
        if len(content) + size > _MAX_BODY:
            return "refused", b""
        position = line.end()
        if not size:
            return _expect_trailers(body[position:], content)
        content += body[position : position + size]
        position += size
        end = body[position : position + 2]
        if not b"\r\n".startswith(end):
            return "refused", b""
        if len(end) < 2:
            return "open", b""
        position += 2


def _expect_trailers(body: bytes, content: bytes) -> tuple[str, bytes]:
    fields = 0
    while not body.startswith(b"\r\n"):
        found = _TRAILER.match(body)
        if found is None:
            return _expect_line(body, rb".*", _LIMITS.field_size, b"")
        fields += 1
        if found[1].lower() in _FORBIDDEN or fields > _LIMITS.fields or len(found[0]) > _LIMITS.field_size + 2:
            return "refused", b""
        body = body[found.end() :]
    return "complete", content


def _expect_line(rest: bytes, form: bytes, limit: int, content: bytes) -> tuple[str, bytes]:
    """Return the outcome of a line without its end: refused once no byte can make it valid, or it is too long."""
    line = rest.removesuffix(b"\r")
    if b"\n" in rest or b"\r" in line or len(line) > limit:
        return "refused", content
    # The service looks at the rest of a line only when it is whole, which costs no more than its limit.
    return "open", content
