"""The words of messages: values of clients, named and shortened, so that no message grows with the request."""

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import orjson

# Stands for a key that is not there; null is a value like any other.
ABSENT: Any = object()

# How much of a client's value a message repeats.
_SHOWN = 60

# C0, DEL, C1, the line and paragraph separators, and surrogates, which cannot be written.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def describe(value: Any) -> str:
    """Name the JSON type of a value, with the value of a number."""
    if value is ABSENT:
        return "missing"
    return _NAMES.get(type(value)) or f"the number {value}"


def show(value: Any) -> str:
    """Repeat a value as JSON, cut where it is long."""
    if type(value) is str:
        value = value[: _SHOWN + 1]  # what is cut off need not be written
    try:
        return cut(orjson.dumps(value).decode())
    except TypeError:  # nested deeper than orjson writes, though it reads it
        return describe(value)


def quote(name: str) -> str:
    """Repeat a name in quotes, cut where it is long."""
    return repr(cut(name))


def list_names(names: Iterable[str], most: int = 10) -> str:
    """List names in quotes; "..." tells that there are more than the `most` that are listed."""
    listed = list(map(quote, islice(names, most + 1)))
    return ", ".join(listed[:most] + ["..."] * (len(listed) > most))


def join(values: Iterable[object]) -> str:
    """Write a shape, or other short values: [1,3,224,224]."""
    return f"[{','.join(map(str, values))}]"


def cut(text: str) -> str:
    """Cut a text that is long."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def escape(text: str) -> str:
    """Escape control characters as Python does, so that a text stays in its line, whatever shows it."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_lines(text: str) -> str:
    """Escape control characters except line feeds, and indent all lines but the first."""
    return "\n  ".join(map(escape, text.split("\n")))


# A comment, where the reader may have stopped behind its first character.
_COMMENT = re.compile(r"\s*(//|/\*|#)")


def explain_json_error(text: str, error: ValueError) -> str:
    """Return what is wrong with a text that orjson has refused with this error; a comment is named as one."""
    comment = _COMMENT.match(text, _find_json_error(text))
    return f"{comment[1]} begins a comment, which JSON does not have: {error}" if comment else str(error)


def _find_json_error(text: str) -> int:
    """Return where Python's reader of JSON stops, which is at the value or comma that it expected."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos
    except RecursionError:
        pass
    return len(text)
