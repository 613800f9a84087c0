"""Compressed bodies, of which at most 5000 bytes may come out.

The input: a byte (even: gzip, odd: deflate), and the body.
"""

import gzip
import zlib

import numpy as np
from fuzz_oracles import Failure, attempt

from ovms_rest.errors import BodyTooLargeError
from ovms_rest.resources.compression import ENCODINGS, compress, decompress

_LIMIT = 5000
TOKENS = [b"\x1f\x8b\x08\0", b"\x78\x9c", b"\x78\x01", b"\0\0\xff\xff", b"\x03\0"]


def seeds() -> list[bytes]:
    """Return streams below, at and beyond the limit, truncated ones, and ones with more behind."""
    made = []
    for content in (b"", b"abc" * 9, bytes(_LIMIT), bytes(_LIMIT + 1), bytes(10**6)):
        for index, data in enumerate((gzip.compress(content, mtime=0), zlib.compress(content))):
            head = bytes([index])
            made += [head + data, head + data[:-3], head + data + b"x", head + data * 2]
    return made


def check(data: bytes) -> None:
    """Decompress within the limit, and compare with zlib in one call."""
    if not data:
        return
    encoding = ("gzip", "deflate")[data[0] & 1]
    body = memoryview(data[1:])
    found = attempt(decompress, body, encoding, _LIMIT, data[0] >> 1)
    decompressor = zlib.decompressobj(ENCODINGS[encoding])
    try:
        expected = decompressor.decompress(body, _LIMIT + 1)
    except zlib.error:
        assert isinstance(found, Failure)
        return
    if len(expected) > _LIMIT:
        assert isinstance(found, Failure)
        return
    if isinstance(found, Failure):
        assert found.kind is not BodyTooLargeError
        assert not decompressor.eof or decompressor.unused_data
        return
    assert decompressor.eof
    assert not decompressor.unused_data
    assert bytes(found) == expected
    if len(found):
        address = np.frombuffer(found, np.uint8).ctypes.data
        assert (address + (data[0] >> 1)) % 64 == 0, "not aligned"
    assert bytes(decompress(memoryview(compress([found], encoding)), encoding, _LIMIT, 0)) == expected
