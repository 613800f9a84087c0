"""Streams of bytes that a connection receives in pieces."""

import itertools

import h11

# RFC 9110 section 8.6 has any number of zeros before a length, of which h11 takes 20 digits.
h11._headers.CONTENT_LENGTH_MAX_DIGITS = 10**4
# h11 refuses targets with bytes beyond ASCII, which the service takes.
TO_ASCII = bytes([*range(128), *b"x" * 128])


def to_h11(stream: bytes) -> bytes:
    """Return requests as h11 takes them: in ASCII, and without an empty line before them (RFC 9112 section 2.2)."""
    return stream.removeprefix(b"\r\n").translate(TO_ASCII)


def split_input(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the pieces of a stream, and the stream; the input begins with the number of cuts and the lengths."""
    cuts = data[0] & 15 if data else 0
    lengths, stream = data[1 : 1 + cuts], data[1 + cuts :]
    places = [place for place in itertools.accumulate(lengths) if place < len(stream)]
    borders = [0, *places, len(stream)]
    return [stream[begin:end] for begin, end in itertools.pairwise(borders) if begin < end], stream
