"""`multipart/form-data` (RFC 7578): the parts of a body, found without copying them.

Every function raises only InvalidRequestError, for a mistake of the client.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.words import cut, quote, show

MAX_PARTS = 1024
# Bytes of the header of a part.
MAX_HEADER = 8192

# RFC 2046 section 5.1.1. Lines end with CRLF, and white space may follow a boundary. The last one ends with "--"; an
# epilogue after it is ignored.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_FIRST_LINE_END = re.compile(rb"[ \t]{0,80}+(?=\r\n)")
# Searched for together with the boundary: a loop over data that only begins like it took 16 s for 255 MiB.
_LINE_END = rb"(--)?[ \t]{0,80}+(?=(\r\n)|\Z)"
_HEADER_END = re.compile(rb"\r\n\r\n")
_FOLD = re.compile(r"\r\n[ \t]+")
_WORD = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*(?:({_WORD})[ \t]*=[ \t]*(?:({_WORD})|"((?:[^"\\]|\\.)*)")[ \t]*)?')
# Browsers and curl write these characters of a name as %22, %0D and %0A, older versions of curl as \" and \\.
_PERCENT_ENCODED = re.compile("%(22|0[AaDd])")
_BACKSLASHED = re.compile(r'\\(["\\])')
# What needs no decoding; other values of Content-Transfer-Encoding are deprecated by RFC 7578 section 4.7.
_PLAIN_ENCODINGS = frozenset({"7bit", "8bit", "binary"})


class Part(NamedTuple):
    """A part of a form; its data, from the offset `begin` on, is a view on the body.

    `media_type`, "" for none, is in lower case and without parameters. `is_file` is whether the part has a file name.
    """

    name: str
    data: memoryview
    begin: int
    media_type: str = ""
    is_file: bool = False
    tensor_shape: str | None = None


def read_media_type(content_type: str) -> str:
    """Return the media type of a Content-Type, in lower case and without its parameters."""
    return content_type.partition(";")[0].strip(" \t").lower()


def split_parts(body: memoryview, content_type: str) -> list[Part]:
    """Return the parts of a body, given its Content-Type with the boundary."""
    boundary = _read_boundary(content_type)
    if not len(body):
        raise InvalidRequestError(f"the body is empty, expected the parts of {read_media_type(content_type)}")
    first = f"--{boundary}".encode()
    found = _FIRST_LINE_END.match(body, len(first)) if bytes(body[: len(first)]) == first else None
    if found is None:
        raise InvalidRequestError(
            f"the body does not begin with the line {show(first.decode())}, the boundary that Content-Type names"
        )
    # A part begins with the line break before its header.
    begin, parts = found.end(), list[Part]()
    for found in re.compile(re.escape(b"\r\n" + first) + _LINE_END).finditer(body, begin):
        is_last, has_line_break = map(bool, found.groups())
        if not is_last and not has_line_break:  # the end of the body
            break
        if len(parts) == MAX_PARTS:
            raise InvalidRequestError(f"the body has more than {MAX_PARTS} parts, the limit")
        parts.append(_read_part(body[begin : found.start()], begin, f"part {len(parts)}"))
        if is_last:
            return parts
        begin = found.end()
    raise InvalidRequestError(
        f"the body ends in part {len(parts)}, before the last boundary, the line {show(first.decode() + '--')}"
    )


def _read_boundary(content_type: str) -> str:
    place = content_type.find(";")
    parameters = None if place < 0 else _read_parameters(content_type[place:])
    boundary = (parameters or {}).get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise InvalidRequestError(
            f"Content-Type is {show(content_type)}, without a valid boundary of multipart/form-data; let the client "
            "set the header, as `curl -F` does"
        )
    return boundary


def _read_part(section: memoryview, begin: int, label: str) -> Part:
    """Read a part, from the line break before its header, which is at the offset `begin`."""
    end = _HEADER_END.search(section, 0, MAX_HEADER + 6)
    if end is None:
        if len(section) > MAX_HEADER:
            raise InvalidRequestError(f"{label} has a header of more than {MAX_HEADER} bytes, the limit")
        raise InvalidRequestError(f"{label} has no empty line between its header and its data")
    fields = _read_fields(str(section[2 : end.start()], "utf-8", "replace") if end.start() else "", label)
    disposition = fields.get("content-disposition", "")
    kind = read_media_type(disposition)
    parameters = _read_parameters(disposition[len(disposition.partition(";")[0]) :]) if kind == "form-data" else None
    name = None if parameters is None else _read_name(parameters)
    if parameters is None or name is None:
        found = show(disposition) if disposition else "missing"
        raise InvalidRequestError(
            f"{label}: Content-Disposition is {found}, expected 'form-data; name=\"INPUT\"' with the name of an input"
        )
    encoding = fields.get("content-transfer-encoding", "binary").lower()
    if encoding not in _PLAIN_ENCODINGS:
        raise InvalidRequestError(
            f"{label} {quote(name)}: Content-Transfer-Encoding is {show(encoding)}, expected the data as it is (binary)"
        )
    return Part(
        name,
        section[end.end() :],
        begin + end.end(),
        read_media_type(fields.get("content-type", "")),
        "filename" in parameters or "filename*" in parameters,
        fields.get("x-tensor-shape"),
    )


def _read_fields(header: str, label: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _FOLD.sub(" ", header).split("\r\n") if header else ():
        name, colon, value = line.partition(":")
        key = name.lower()
        if not colon or not re.fullmatch(_WORD, name):
            raise InvalidRequestError(f"{label} has the header line {show(line)}, expected 'NAME: VALUE'")
        if key in fields:
            raise InvalidRequestError(f"{label} has the header {cut(name)} more than once")
        fields[key] = value.strip(" \t")
    return fields


def _read_parameters(text: str) -> dict[str, str] | None:
    """Return the parameters of a header field, from the first semicolon; None if they are malformed."""
    parameters, position = {}, 0
    while position < len(text):
        found = _PARAMETER.match(text, position)
        if found is None:
            return None
        position = found.end()
        name, token, quoted = found.groups()
        if name:
            parameters[name.lower()] = _BACKSLASHED.sub(r"\1", quoted) if token is None else token
    return parameters


def _read_name(parameters: dict[str, str]) -> str | None:
    """Return the name of a part; `name*` is RFC 5987's form, which some libraries use beyond ASCII."""
    extended = parameters.get("name*")
    if extended is not None:
        charset, _, rest = extended.partition("'")
        if charset.lower() != "utf-8":
            return None
        return unquote(rest.partition("'")[2])
    name = parameters.get("name")
    return None if name is None else _PERCENT_ENCODED.sub(lambda found: chr(int(found[1], 16)), name)
