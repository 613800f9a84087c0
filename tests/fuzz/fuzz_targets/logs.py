"""What a client sends, in a line of the log and of the access log.

The input: the client's X-Request-ID, path, id and model, separated by line feeds, as bytes of any value.
"""

import json
import re
import select

from ovms_rest.protocol.words import cut, escape, escape_lines, list_names, quote, show
from ovms_rest.worker.access_log import Access, encode_json, encode_text

MAX_LENGTH = 400
TOKENS = [
    b"\x1b[31m",
    b"\r",
    b'"',
    b"\\",
    b"=",
    b"\x7f",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b"\0",
    b"\xf0\x9f\x98\x80",
]
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*+"|[^ "]*+)(?: |$)')


def seeds() -> list[bytes]:
    """Return plain values, and values that would forge a line or command a terminal."""
    return [
        b"a\n/v2\nid\nm",
        b'a b\n/v2/models/"x"\n\\\n\xc3\xa9',
        b"\x1b[2J\n/\xff?a=b\n\xe2\x80\xa8\n" + b"m" * 300,
        b"x=y\n" + b"\xf0\x9f\x98\x80" * 300 + b"\n\n",
        b"-\n/\nnull\n\xed\xa0\x80",
    ]


def check(data: bytes) -> None:
    """Write the values; a line is ASCII, no longer than a pipe takes at once, and reads back."""
    request_id, path, name, model = values = [_decode(value) for value in (data.split(b"\n") + [b""] * 4)[:4]]
    access = Access("127.0.0.1", request_id, "GET", path, 200, 1, 2, 3, model, "1", name, 4, 5, None)
    line = encode_json(access, 1.5)
    assert line.endswith(b"\n")
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert len(line) <= select.PIPE_BUF
    read = json.loads(line)
    assert (read["request_id"], read["path"], read["id"]) == (request_id[:128], path[:256], name[:128])
    text = encode_text(access, 1.5)
    assert text.isascii()
    assert text.count(b"\n") == 1
    assert len(text) <= select.PIPE_BUF
    pairs = _PAIR.findall(text.decode().rstrip("\n"))
    assert [key for key, _ in pairs] == [key for key in read if read[key] is not None]
    for key, value in pairs:
        assert (json.loads(value) if value.startswith('"') else value) == str(read[key])
    for value in values:
        for written in (escape(value), cut(value), quote(value), show(value), list_names([value, value])):
            assert not _NOT_IN_A_LINE.search(written)
        assert escape(escape(value)) == escape(value)
        lines = escape_lines(value).split("\n")
        assert all(line.startswith("  ") for line in lines[1:])
        assert not any(_NOT_IN_A_LINE.search(line) for line in lines)


def _decode(value: bytes) -> str:
    """Return text, which may have halves of surrogate pairs; two that make a character are one, as in JSON."""
    try:
        text = value.decode("utf-8", "surrogatepass")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    except UnicodeDecodeError:
        return value.decode("latin-1")
