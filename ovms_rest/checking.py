"""Reading JSON that people write, and checks of its values: each returns what is wrong in words, or None."""

import codecs
import difflib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from ovms_rest.protocol.words import cut, explain_json_error, list_names

Problem = str
Check = Callable[[Any], Problem | None]

# How many unknown keys, or wrong values, of an object are listed. To find what a key may have been meant to be takes
# 0.3 ms, and longer for a long one.
_MOST_LISTED = 10

# How much two keys have in common when one may be meant by the other, from 0 to 1; measured by the keys of the tests.
_NEAR = 0.5


def is_a(type_name: str, *types: type) -> Check:
    """Make the check for a value of these types."""
    return lambda value: None if type(value) in types else f"expected {type_name}, got {as_json(value)}"


def check_name(value: Any) -> Problem | None:
    """Check the name of a model or pipeline, which stands in URLs and lines of a log."""
    if type(value) is not str or not value or "/" in value or any(unicodedata.category(char) == "Cc" for char in value):
        return f"expected a string that is not empty and has no '/' and no control characters, got {as_json(value)}"
    return None


def check_values(owner: dict[str, Any], fits: Callable[[Any], bool], form: str) -> Problem | None:
    """Check the values of an object, whatever their keys are."""
    wrong = [
        f"the value of {cut(key)} has to be {form}, got {as_json(item)}"
        for key, item in owner.items()
        if not fits(item)
    ]
    more = [f"{len(wrong) - _MOST_LISTED} more are wrong"] if len(wrong) > _MOST_LISTED else []
    return "; ".join(wrong[:_MOST_LISTED] + more) or None


def never(reason: str) -> Check:
    """Make the check for what must not be there."""
    return _Never(reason)


@dataclass(frozen=True, slots=True)
class _Never:
    """Refuses every value, for this reason."""

    reason: str

    def __call__(self, value: Any) -> Problem:
        return f"is not supported: {self.reason}"


def check_keys(
    owner: dict[str, Any], place: str, checks: Mapping[str, Check], required: tuple[str, ...]
) -> Iterator[Problem]:
    """Check an object: its required keys, the values of those that are known, and that there are no others.

    `place` stands before the name of a key in a message.
    """
    for key in required:
        if key not in owner:
            yield f"{place}{key}: is missing"
    unknown = 0
    for key, value in owner.items():
        if key not in checks:
            unknown += 1
            if unknown <= _MOST_LISTED:
                yield f"{place}{cut(key)}: {_tell_unknown(cut(key), checks)}"
        elif problem := checks[key](value):
            yield f"{place}{key}: {problem}"
    if unknown > _MOST_LISTED:
        yield f"{place.removesuffix('.') or 'the root'}: {unknown - _MOST_LISTED} more unknown keys"


def _tell_unknown(key: str, checks: Mapping[str, Check]) -> Problem:
    """Tell what an unknown key may have been meant to be; no key that is refused, unless it is that one in other words.

    Where none is near, the nearest says little, and all are told.
    """
    allowed = []
    for known, check in checks.items():
        if not isinstance(check, _Never):
            allowed.append(known)
        elif key.lower().removesuffix("s") == known.removesuffix("s"):
            return check(None)
    (nearest,) = difflib.get_close_matches(key.lower(), allowed, n=1, cutoff=0)
    is_near = difflib.SequenceMatcher(None, nearest, key.lower()).ratio() >= _NEAR
    if len(allowed) == 1 and not is_near:
        return f"unknown key; the only known one is {nearest!r}"
    among = "" if is_near else f"; known are {list_names(allowed, most=20)}"
    return f"unknown key; the nearest known one is {nearest!r}{among}"


def as_json(value: Any) -> str:
    """Show a value in a message, cut where it is long."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # nested deeper than orjson writes, though it reads it
        return "a value nested too deep to be shown"
    return text if len(text) <= 80 else f"{text[:80]}..."


# --- Reading


def read_json(content: bytes) -> tuple[Any, list[Problem]]:
    """Read a JSON file, of which orjson would take the last of repeated keys; return it with a line for each of these.

    A byte order mark of UTF-8 is passed over. Raises ValueError with what is wrong in a line.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is not valid JSON: it is UTF-16 by its first two bytes, expected UTF-8")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        *lines, line = error.object[: error.start].split(b"\n")
        place = f"line {len(lines) + 1} column {len(line.decode()) + 1}"
        raise ValueError(f"is not valid JSON: {place}: byte 0x{error.object[error.start]:02x} is not UTF-8") from error
    try:
        root = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {explain_json_error(text, error)}") from error
    return root, list(_find_repeated_keys(text))


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys were there more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]


def _find_repeated_keys(text: str) -> Iterator[Problem]:
    """Find the keys that an object has more than once in JSON that orjson takes, by the values that come last."""
    try:
        root = json.loads(text, object_pairs_hook=_Object)
    except RecursionError:  # about as deep as orjson takes, and deeper than any value that is allowed
        return
    found = [("", root)]
    while found:
        place, value = found.pop()
        if isinstance(value, _Object):
            inside = f"{place}." if place else ""
            yield from (f"{inside}{key}: the key is there more than once" for key in value.repeated)
            found += reversed([(f"{inside}{key}", item) for key, item in value.items()])
        elif isinstance(value, list):
            found += reversed([(f"{place}[{index}]", item) for index, item in enumerate(value)])
