"""Values in messages: named, counted, quoted and shortened, so that no message grows with the request."""

import json
import math
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import orjson

# The value of a missing key; null is a value like any other.
ABSENT: Any = object()

# Characters of a client's value that a message repeats, and of a path, whose end may be what is wrong.
_SHOWN = 60
SHOWN_OF_PATH = 300

# C0, DEL, C1, line and paragraph separators, and surrogates, which cannot be encoded.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def describe(value: Any) -> str:
    """Return the JSON type of a value in words, with the value of a number."""
    if value is ABSENT:
        return "missing"
    if _is_token(value):
        return json.dumps(value)
    return _NAMES.get(type(value)) or f"the number {value}"


def show(value: Any) -> str:
    """Return a value as JSON in one line, cut if it is long; NaN and Infinity as the tokens of Python's parser."""
    if type(value) is str:
        value = value[: _SHOWN + 1]  # the rest would be cut off
    if _is_token(value):
        return json.dumps(value)
    try:
        text = cut(orjson.dumps(value).decode())  # orjson escapes C0 alone
        # In an array or object, orjson writes null for NaN too.
        return cut(_write(value)) if "null" in text else text
    except TypeError:  # half of a surrogate pair, or nested too deeply for orjson to write, though not to read
        return cut(_write(value)) if type(value) is str else describe(value)


def _is_token(value: Any) -> bool:
    return type(value) is float and not math.isfinite(value)


def _write(value: Any) -> str:
    """Return the beginning of a value as JSON, a little more than is shown: it may have millions of elements."""
    text = ""
    for piece in _ENCODER.iterencode(value):
        text += piece
        if len(text) > _SHOWN:
            break
    return text


def quote(name: str, most: int = _SHOWN) -> str:
    """Return a name in quotes, cut after `most` characters."""
    return repr(_shorten(name, most))  # which escapes control characters


def list_names(names: Iterable[str], most: int = 10) -> str:
    """Return up to `most` names in quotes, and "..." if there are more."""
    listed = list(map(quote, islice(names, most + 1)))
    return ", ".join(listed[:most] + ["..."] * (len(listed) > most))


def join(values: Iterable[object]) -> str:
    """Return a shape, or other short values, as text: [1,3,224,224]."""
    return f"[{','.join(map(str, values))}]"


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun for a message: "1 byte", "2 bytes"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def cut(text: str) -> str:
    """Return a text in one line, its control characters escaped, cut if it is long."""
    return escape(_shorten(text))


def _shorten(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def escape(text: str) -> str:
    """Return a text with control characters escaped as in Python, so that it stays on its line wherever it is shown."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_lines(text: str) -> str:
    """Return a text with control characters other than line feeds escaped, and all lines but the first indented."""
    return "\n  ".join(map(escape, text.split("\n")))


# A comment at or after the place where the parser stopped.
_COMMENT = re.compile(r"\s*(//|/\*|#)")
# The beginning of a number, and orjson's reason for one beyond the range of FP64.
_NUMBER = re.compile(rf"[-+.0-9eE]{{1,{_SHOWN + 1}}}")
_INFINITE = "number is infinity when parsed as double"


def explain_json_error(text: str, error: ValueError) -> str:
    """Return what is wrong with a text that orjson refused with this error, with a hint if it is a comment."""
    place = len(text)
    try:
        json.loads(text)
    except json.JSONDecodeError as found:
        place = found.pos  # of the value or comma that Python's parser expected
    except RecursionError:
        pass
    comment = _COMMENT.match(text, place)
    return f"{comment[1]} begins a comment, which JSON does not have: {error}" if comment else _explain_number(error)


def explain_invalid_json(content: bytes | memoryview, error: json.JSONDecodeError) -> str:
    """Return what is wrong with the bytes of a text that orjson refused with this error."""
    if not error.doc:  # as for bytes that are not UTF-8, whose place orjson does not give
        try:
            str(content, "utf-8")
        except UnicodeDecodeError as fault:
            return explain_utf8_error(fault)
    return _explain_number(error)


def explain_utf8_error(error: UnicodeDecodeError) -> str:
    """Return where the first byte is that is not UTF-8."""
    begin = error.object.rfind(b"\n", 0, error.start) + 1
    line, column = error.object.count(b"\n", 0, begin) + 1, len(error.object[begin : error.start].decode()) + 1
    return f"line {line} column {column}: byte 0x{error.object[error.start]:02x} is not UTF-8"


def _explain_number(error: ValueError) -> str:
    """Return the parser's reason; for a number beyond FP64, which is valid JSON, that it is one."""
    if not isinstance(error, json.JSONDecodeError) or error.msg != _INFINITE:
        return str(error)
    number = _NUMBER.match(error.doc, error.pos)
    shown = f" {_shorten(number[0])}" if number else ""
    return f"the number{shown} is beyond the range of FP64: line {error.lineno} column {error.colno} (char {error.pos})"
