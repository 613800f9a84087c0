"""Strings: the binary form of BYTES, its padded matrix, and base64.

The input: a byte for the number of strings, and the bytes.
"""

import base64
import binascii
import struct

from fuzz_oracles import Failure, attempt
from wire_cases import CASES

from ovms_rest.protocol.decoding import view_strings
from ovms_rest.protocol.strings import BytesArray, decode_base64, from_matrix, pack, to_matrix, unpack

TOKENS = [b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"====", b"aGk=", b"-_"]


def seeds() -> list[bytes]:
    """Return the strings of the table of wire cases, and base64."""
    cases = [case for case in CASES if case.datatype == "BYTES" and len(case.binary) < 400]
    packed = [bytes([len(case.data)]) + case.binary for case in cases]
    return [
        *packed,
        *(b"\1" + base64.b64encode(case.binary) for case in cases),
        b"\2aGk\n",
        b"\2YQ==",
        b"\2YWJj=",
        b"\2YWJj====",
    ]


def check(data: bytes) -> None:
    """Unpack and pack again, and compare base64 with a decoder written for this."""
    if not data:
        return
    count, section = data[0], data[1:]
    found = attempt(unpack, memoryview(section), count, "x")
    expected = _split(section, count)
    if isinstance(found, Failure):
        assert expected is None, "valid strings were refused"
    else:
        array = view_strings(*found, memoryview(section), (count,))
        assert array.elements() == expected
        assert pack(array) == section
        _check_matrix(array)
    _check_base64(section)


def _split(section: bytes, count: int) -> list[bytes] | None:
    """Return the strings of a section, None unless exactly that many fill it."""
    strings = []
    while section:
        if len(section) < 4:
            return None
        (size,) = struct.unpack("<I", section[:4])
        if size > len(section) - 4:
            return None
        strings.append(section[4 : 4 + size])
        section = section[4 + size :]
    return strings if len(strings) == count else None


def _check_matrix(array: BytesArray) -> None:
    """Check that a matrix gives the strings back, up to their first NUL."""
    matrix = to_matrix(array, "x")
    cut = [element.partition(b"\0")[0] for element in array.elements()]
    assert from_matrix(matrix).elements() == cut
    assert matrix.shape[1:] == (max(map(len, array.elements()), default=0) + 1,)


def _check_base64(section: bytes) -> None:
    text = section.decode("latin-1")
    decoded = attempt(decode_base64, text, "x")
    try:
        expected = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        assert isinstance(decoded, Failure), "Python's decoder refuses this base64"
        return
    # RFC 4648 section 4 asks for the padding; Python's decoder takes more of it and data after it.
    if len(text) % 4 == 0 and "=" not in text.rstrip("=") and len(text) - len(text.rstrip("=")) <= 2:
        assert decoded == expected
    else:
        assert isinstance(decoded, Failure)
