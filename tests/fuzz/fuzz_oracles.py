"""What the targets assert of errors, and exact references for numbers that share no code with the service."""

import json
import math
import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ovms_rest.errors import ConfigError, ServingError
from ovms_rest.protocol.words import escape
from ovms_rest.worker.http1 import Refusal

# No message is longer, whatever the input is; the inputs are up to twice as long.
LONGEST_MESSAGE = 2000


class Failure(NamedTuple):
    """The error of a call: its class and its message."""

    kind: type[Exception]
    message: str


def attempt(function: Callable[..., Any], *arguments: Any, **keys: Any) -> Any:
    """Return the result of a call, or the Failure of a ServingError, whose message is checked; others are findings."""
    try:
        return function(*arguments, **keys)
    except ServingError as error:
        check_message(str(error))
        return Failure(type(error), str(error))


def attempt_config(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, or the Failure of a ConfigError, each problem of which is one line."""
    try:
        return function(*arguments)
    except ConfigError as error:
        _check_problems(error, check_message)
        return Failure(type(error), str(error))


def attempt_command(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, or the Failure of a ConfigError, whose problems the command escapes as it prints."""
    try:
        return function(*arguments)
    except ConfigError as error:
        _check_problems(error, lambda problem: escape(problem).encode())
        return Failure(type(error), str(error))


def _check_problems(error: ConfigError, check: Callable[[str], object]) -> None:
    assert error.problems
    for problem in error.problems:
        check(problem)


def check_message(message: str) -> None:
    """Check that a message is one line of valid Unicode, and bounded."""
    assert message
    assert escape(message) == message, f"control characters or half of a surrogate pair in {message!r}"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message!r}"


def check_refusal(refusal: Refusal, *statuses: int) -> None:
    """Check the message of a refusal before the application, and its status."""
    check_message(str(refusal))
    assert refusal.status in statuses, f"{refusal.status}: {refusal}"


# --- Numbers

# The codes of `struct`, which rounds a float to 16 and 32 bits by code of its own.
_CODES = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
    "BOOL": "?",
}


def pack_numbers(elements: Iterable[Any], datatype: str) -> bytes:
    """Return JSON elements, as Python's parser reads them, in binary."""
    if datatype == "BF16":
        return b"".join(map(_round_to_bfloat16, elements))
    if datatype in ("FP16", "FP32", "FP64"):
        elements = map(float, elements)
    return b"".join(struct.pack(f"<{_CODES[datatype]}", element) for element in elements)


def _round_to_bfloat16(element: float) -> bytes:
    """Round to the nearest number with 8 bits of precision, ties to even, by exact arithmetic."""
    number = float(element)
    if number == 0:
        return struct.pack("<f", number)[2:]
    exact = Fraction(number)
    exponent = max(math.frexp(number)[1] - 8, -133)  # of the last bit; -133 is that of subnormal numbers
    rounded = round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return struct.pack("<f", float(rounded))[2:]


def flatten(value: Any) -> list[Any]:
    """Return the elements of nested arrays in row-major order."""
    return [element for item in value for element in flatten(item)] if type(value) is list else [value]


def read_python(text: bytes) -> Any:
    """Parse JSON with Python's own parser."""
    return json.loads(text.decode())


def same_bits(array: np.ndarray, expected: bytes) -> bool:
    """Return whether an array has these bytes; every zero byte beyond is a difference."""
    return np.ascontiguousarray(array).tobytes() == expected
