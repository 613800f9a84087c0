"""Decoding of chunked bodies (RFC 9112 section 7.1) piece by piece; no I/O."""

import re
from enum import Enum, auto

from ovms_rest.protocol.buffers import allocate
from ovms_rest.protocol.words import count_of, quote
from ovms_rest.worker.http1 import Limits, Refusal

# A size in hexadecimal, and extensions, which are ignored.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t\x20-\x7e\x80-\xff]*")
# RFC 9110 section 6.5.1: fields that frame, route or authenticate a message must not be trailers.
_FORBIDDEN = frozenset({b"content-length", b"transfer-encoding", b"host", b"trailer", b"authorization", b"te"})
# Not allowed in an incomplete line. RFC 9112 section 2.2 lets a bare LF end the lines of a head, but not of chunks.
_BARE = re.compile(rb"\n|\r(?s:.)")
_MAX_SIZE_LINE = 1024
# The sizes of chunks below 256 bytes, as nearly all clients write them.
_SMALL_SIZES = {text % size: size for text in (b"%x", b"%X") for size in range(1, 256)}

# One call of `feed` decodes at most this many small chunks, which takes a few tenths of a millisecond.
CHUNKS_PER_CALL = 256
# A chunk that is read line by line, such as one with extensions, takes the time of this many small ones.
_SLOW_CHUNK = 8
# The buffer of a body grows by this factor, so that copying adds little time and memory. Its pages take memory only
# once something is written to them.
_FIRST_CAPACITY = 64 * 1024
_GROWTH = 16


class _Expected(Enum):
    """The next element of the body."""

    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILERS = auto()
    NOTHING = auto()


class ChunkDecoder:
    """Decodes one body from the pieces fed to `data`, until `is_complete`; then `rest` is what follows the body.

    Before that `rest` is not decoded yet: a part of a line or, when `has_more`, whole chunks for the next call.
    The limits of trailers are those of a head. The offset `aligned` of the body lies on a 64-byte boundary.
    """

    def __init__(self, limits: Limits, max_body: int, aligned: int = 0) -> None:
        self.rest = b""
        self.has_more = False
        self.size = 0  # bytes of the body so far
        self._limits = limits
        self._max_body = max_body
        self._aligned = aligned
        self._buffer = allocate(min(_FIRST_CAPACITY, max_body), aligned)
        # The maximum length of a line, and its name in errors.
        self._lines = {
            _Expected.SIZE: (_MAX_SIZE_LINE, "the size of a chunk"),
            _Expected.DATA_END: (0, "the end of a chunk"),
            _Expected.TRAILERS: (limits.field_size, "a trailer field"),
        }
        self._expected = _Expected.SIZE
        self._missing = 0  # bytes of the chunk
        self._trailers = 0

    @property
    def data(self) -> memoryview:
        """The body so far."""
        return self._buffer[: self.size]

    @property
    def is_complete(self) -> bool:
        """Return whether the whole body was fed."""
        return self._expected is _Expected.NOTHING

    def feed(self, piece: bytes) -> None:
        """Decode a piece, but no more than `CHUNKS_PER_CALL` chunks; when `has_more`, the next piece is b"".

        Raises Refusal for a malformed or too large body.
        """
        buffer, at = self.rest + piece if self.rest else piece, 0
        left = CHUNKS_PER_CALL
        while self._expected is not _Expected.NOTHING and left > 0:
            if self._expected is _Expected.DATA:
                end = min(at + self._missing, len(buffer))
                self._append(memoryview(buffer)[at:end])
                self._missing -= end - at
                at = end
                if self._missing:
                    break
                self._expected = _Expected.DATA_END
                continue
            if self._expected is _Expected.SIZE:
                at, count = self._decode_small(buffer, at, left)
                left -= count + _SLOW_CHUNK
                if left <= 0:
                    break
            end = buffer.find(b"\r\n", at)
            self._check_line(buffer, at, end)
            if end < 0:
                break
            self._read(buffer[at:end])
            at = end + 2
        self.rest = buffer[at:]
        self.has_more = left <= 0 and bool(self.rest) and self._expected is not _Expected.NOTHING

    def _decode_small(self, buffer: bytes, at: int, limit: int) -> tuple[int, int]:
        """Decode at most `limit` small, complete chunks; return where they end, and their number.

        Stops at the first chunk of any other kind.
        """
        chunks: list[bytes] = []
        room = self._max_body - self.size
        while len(chunks) < limit:
            begin = buffer.find(b"\r\n", at, at + 4) + 2
            size = _SMALL_SIZES.get(buffer[at : begin - 2]) if begin > 1 else None
            if size is None or size > room:
                break
            end = begin + size
            if buffer[end : end + 2] != b"\r\n":
                break
            chunks.append(buffer[begin:end])
            room -= size
            at = end + 2
        if chunks:
            self._append(memoryview(b"".join(chunks)))
        return at, len(chunks)

    def _append(self, data: memoryview) -> None:
        end = self.size + len(data)
        if end > len(self._buffer):
            capacity = min(max(end, len(self._buffer) * _GROWTH), self._max_body)
            larger = allocate(capacity, self._aligned)
            larger[: self.size] = self.data
            self._buffer = larger
        self._buffer[self.size : end] = data
        self.size = end

    def _check_line(self, buffer: bytes, at: int, end: int) -> None:
        """Refuse a line that is too long, or that is incomplete and already invalid."""
        limit, what = self._lines[self._expected]
        if end < 0 and _BARE.search(buffer, at):
            raise Refusal(400, f"malformed body: expected {what} ended by CR LF, got a bare CR or LF")
        # Without its end the last byte may be the CR of it.
        length = end - at if end >= 0 else len(buffer) - at - buffer.endswith(b"\r", at)
        if length > limit:
            raise Refusal(400, f"malformed body: expected {what}, got a line of more than {limit} bytes")

    def _read(self, line: bytes) -> None:
        if self._expected is _Expected.DATA_END:  # empty, or it would be too long
            self._expected = _Expected.SIZE
        elif self._expected is _Expected.SIZE:
            found = _SIZE.fullmatch(line)
            if not found:
                raise Refusal(400, f"malformed body: {_quote(line)} is not a chunk size in hexadecimal")
            self._missing = int(found[1], 16)
            if self.size + self._missing > self._max_body:
                what = f"a chunk of {self._missing} after {count_of(self.size, 'byte')}"
                raise Refusal(413, f"the body is too large: {what}, at most {self._max_body} are allowed")
            self._expected = _Expected.DATA if self._missing else _Expected.TRAILERS
        elif line:
            self._check_trailer(line)
        else:
            self._expected = _Expected.NOTHING

    def _check_trailer(self, line: bytes) -> None:
        found = _FIELD.fullmatch(line)
        if not found or found[1].lower() in _FORBIDDEN:
            raise Refusal(400, f"malformed body: {_quote(line)} is not allowed as a trailer field")
        self._trailers += 1
        if self._trailers > self._limits.fields:
            raise Refusal(431, f"more than {self._limits.fields} trailer fields")


def _quote(line: bytes) -> str:
    return quote(line.decode("latin-1"))
