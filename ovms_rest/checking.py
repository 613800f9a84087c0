"""Reading JSON files that people write, and checks of their values, which return what is wrong in words, or None."""

import codecs
import difflib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from ovms_rest.protocol.words import cut, escape, explain_json_error, explain_utf8_error, list_names

Problem = str
Check = Callable[[Any], Problem | None]

# Limit for the unknown keys, or invalid values, of an object that are listed. To find a similar key takes 0.3 ms, and
# longer for a long key.
_MOST_LISTED = 10

# The similarity of a known key to name it alone, from 0 to 1; measured with the keys of the tests.
_NEAR = 0.5


def fits(form: str, test: Callable[[Any], bool]) -> Check:
    """Return a check for a value that passes a test."""
    return lambda value: None if test(value) else f"expected {form}, got {as_json(value)}"


def is_a(type_name: str, *types: type) -> Check:
    """Return a check for a value of these types."""
    return fits(type_name, lambda value: type(value) in types)


def _is_name(value: Any) -> bool:
    """Return whether a value can be the name of a model or pipeline, which appears in URLs and log lines."""
    return is_text(value) and "/" not in value and not any(unicodedata.category(char) == "Cc" for char in value)


def is_text(value: Any) -> bool:
    """Return whether a value is a string that is not empty."""
    return type(value) is str and value != ""


check_name = fits("a non-empty string without '/' and control characters", _is_name)


def check_values(owner: dict[str, Any], test: Callable[[Any], bool], form: str) -> Problem | None:
    """Check the values of an object with any keys."""
    wrong = [
        f"the value of {cut(key)} must be {form}, got {as_json(item)}" for key, item in owner.items() if not test(item)
    ]
    more = [f"{len(wrong) - _MOST_LISTED} more are invalid"] if len(wrong) > _MOST_LISTED else []
    return "; ".join(wrong[:_MOST_LISTED] + more) or None


@dataclass(frozen=True, slots=True)
class Never:
    """A check for a key that is not supported: it refuses every value but those without effect."""

    reason: str
    harmless: tuple[bool, ...] = ()

    def __call__(self, value: Any) -> Problem | None:
        return None if any(value is item for item in self.harmless) else self.refusal

    @property
    def refusal(self) -> Problem:
        """The problem of the key, whatever its value."""
        return f"is not supported: {self.reason}"


def check_keys(
    owner: dict[str, Any], place: str, checks: Mapping[str, Check], required: tuple[str, ...]
) -> Iterator[Problem]:
    """Check that an object has its required keys, valid values for known keys, and no unknown keys.

    `place` is the prefix of a key in messages.
    """
    for key in required:
        if key not in owner:
            yield f"{place}{key}: is missing"
    unknown = 0
    for key, value in owner.items():
        if key not in checks:
            unknown += 1
            if unknown <= _MOST_LISTED:
                yield f"{place}{cut(key)}: {_explain_unknown(cut(key), checks)}"
        elif problem := checks[key](value):
            yield f"{place}{key}: {problem}"
    if unknown > _MOST_LISTED:
        yield f"{place.removesuffix('.') or 'the root'}: {unknown - _MOST_LISTED} more unknown keys"


def _explain_unknown(key: str, checks: Mapping[str, Check]) -> Problem:
    """Return a message for an unknown key that names the nearest known key, and all of them if none is near.

    Keys that are not supported count only if the unknown one differs from them by case or a plural.
    """
    allowed = []
    for known, check in checks.items():
        if not isinstance(check, Never):
            allowed.append(known)
        elif key.lower().removesuffix("s") == known.removesuffix("s"):
            return check.refusal
    (nearest,) = difflib.get_close_matches(key.lower(), allowed, n=1, cutoff=0)
    is_near = difflib.SequenceMatcher(None, nearest, key.lower()).ratio() >= _NEAR
    if len(allowed) == 1 and not is_near:
        return f"unknown key; the only known one is {nearest!r}"
    among = "" if is_near else f"; known: {list_names(allowed, most=20)}"
    return f"unknown key; the nearest known one is {nearest!r}{among}"


def as_json(value: Any) -> str:
    """Return a value as JSON in one line for a message, cut if it is long."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # nested too deeply for orjson to write, though not to read
        return "a value nested too deeply to be shown"
    return escape(text if len(text) <= 80 else f"{text[:80]}...")  # orjson escapes C0 alone


# --- Reading


def read_json(content: bytes) -> tuple[Any, list[Problem]]:
    """Return the value of a JSON file, and a line for each duplicate key, of which orjson takes the last.

    A byte order mark of UTF-8 is skipped. Raises ValueError with the reason in one line.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is not valid JSON: it is UTF-16 by its first two bytes, expected UTF-8")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid JSON: {explain_utf8_error(error)}") from error
    try:
        root = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {explain_json_error(text, error)}") from error
    return root, list(_find_duplicate_keys(text))


class _Object(dict[str, Any]):
    """A JSON object with the keys that it had more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]


def _find_duplicate_keys(text: str) -> Iterator[Problem]:
    """Find the duplicate keys in JSON that orjson accepts; of their values only the last is searched."""
    try:
        root = json.loads(text, object_pairs_hook=_Object)
    except RecursionError:  # about orjson's limit, and deeper than any allowed value
        return
    found = [("", root)]
    while found:
        place, value = found.pop()
        if isinstance(value, _Object):
            inside = f"{place}." if place else ""
            yield from (f"{inside}{cut(key)}: duplicate key" for key in value.repeated)
            found += reversed([(f"{inside}{cut(key)}", item) for key, item in value.items()])
        elif isinstance(value, list):
            found += reversed([(f"{place}[{index}]", item) for index, item in enumerate(value)])
