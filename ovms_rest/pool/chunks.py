"""The chunked transfer coding of bodies (RFC 9112 section 7.1), undone as it comes; no I/O."""

import re
from enum import Enum, auto

from ovms_rest.pool.http1 import Limits, Refusal

# A size in hexadecimal, and extensions, which are passed over.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t\x20-\x7e\x80-\xff]*")
# RFC 9110 section 6.5.1: what frames, routes or authenticates a message must not come behind it.
_FORBIDDEN = frozenset({b"content-length", b"transfer-encoding", b"host", b"trailer", b"authorization", b"te"})
# What a line that is not whole cannot have. RFC 9112 section 2.2 lets a bare LF end the lines of a head, not of chunks.
_BARE = re.compile(rb"\n|\r(?s:.)")
_MAX_SIZE_LINE = 1024


class _Part(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILERS = auto()
    NOTHING = auto()


class ChunkDecoder:
    """Decodes one body: what is fed comes out as `data`, until `is_complete`; then `rest` is what came behind it."""

    def __init__(self, limits: Limits) -> None:
        """Take the limits of trailers, which are those of a head."""
        self.data = bytearray()
        self.rest = b""
        self._limits = limits
        # How long a line may be, and what it is.
        self._lines = {
            _Part.SIZE: (_MAX_SIZE_LINE, "the size of a chunk"),
            _Part.DATA_END: (0, "the end of a chunk"),
            _Part.TRAILERS: (limits.field_size, "a field behind the body"),
        }
        self._part = _Part.SIZE
        self._missing = 0  # bytes of the chunk
        self._trailers = 0

    @property
    def is_complete(self) -> bool:
        """Tell whether the whole body was fed."""
        return self._part is _Part.NOTHING

    def feed(self, piece: bytes) -> None:
        """Decode a piece. Raises Refusal for what is malformed."""
        buffer, at = self.rest + piece, 0
        while self._part is not _Part.NOTHING:
            if self._part is _Part.DATA:
                end = min(at + self._missing, len(buffer))
                self.data += memoryview(buffer)[at:end]
                self._missing -= end - at
                at = end
                if self._missing:
                    break
                self._part = _Part.DATA_END
            else:
                end = buffer.find(b"\r\n", at)
                self._check_line(buffer, at, end)
                if end < 0:
                    break
                self._read(buffer[at:end])
                at = end + 2
        self.rest = buffer[at:]

    def _check_line(self, buffer: bytes, at: int, end: int) -> None:
        """Refuse a line that is too long for what it is, or has come in part and can be none any more."""
        limit, what = self._lines[self._part]
        if end < 0 and _BARE.search(buffer, at):
            raise Refusal(400, f"malformed body: a CR or LF alone where {what} is due, lines end with CR LF")
        # Without its end the last byte may be the CR of it.
        length = end - at if end >= 0 else len(buffer) - at - buffer.endswith(b"\r", at)
        if length > limit:
            raise Refusal(400, f"malformed body: a line of more than {limit} bytes where {what} is due")

    def _read(self, line: bytes) -> None:
        if self._part is _Part.DATA_END:  # empty, or it would have been too long
            self._part = _Part.SIZE
        elif self._part is _Part.SIZE:
            found = _SIZE.fullmatch(line)
            if not found:
                raise Refusal(400, f"malformed body: {line[:40]!r} is not the size of a chunk in hexadecimal")
            self._missing = int(found[1], 16)
            self._part = _Part.DATA if self._missing else _Part.TRAILERS
        elif line:
            self._check_trailer(line)
        else:
            self._part = _Part.NOTHING

    def _check_trailer(self, line: bytes) -> None:
        found = _FIELD.fullmatch(line)
        if not found or found[1].lower() in _FORBIDDEN:
            raise Refusal(400, f"malformed body: {line[:40]!r} is no field that may come behind a body")
        self._trailers += 1
        if self._trailers > self._limits.fields:
            raise Refusal(431, f"more than {self._limits.fields} fields behind the body")
