"""Checks of values that come from JSON: each returns what is wrong in words, or None."""

import difflib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

Problem = str
Check = Callable[[Any], Problem | None]


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
    wrong = {key: item for key, item in owner.items() if not fits(item)}
    return "; ".join(f"the value of {key} has to be {form}, got {as_json(wrong[key])}" for key in wrong) or None


def never(reason: str) -> Check:
    """Make the check for what must not be there."""
    return lambda value: f"is not supported: {reason}"


def check_keys(
    owner: dict[str, Any], place: str, checks: Mapping[str, Check], required: tuple[str, ...]
) -> Iterator[Problem]:
    """Check an object: its required keys, the values of those that are known, and that there are no others.

    `place` stands before the name of a key in a message.
    """
    for key in required:
        if key not in owner:
            yield f"{place}{key}: is missing"
    for key, value in owner.items():
        if key not in checks:
            (near,) = difflib.get_close_matches(key, checks, n=1, cutoff=0)
            yield f"{place}{key}: unknown key; the nearest known one is {near!r}"
        elif problem := checks[key](value):
            yield f"{place}{key}: {problem}"


def as_json(value: Any) -> str:
    """Show a value in a message, cut where it is long."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # nested deeper than orjson writes, though it reads it
        return "a value nested too deep to be shown"
    return text if len(text) <= 80 else f"{text[:80]}..."
