"""An estimate of the memory that a JSON text will take once it is parsed.

An object of two bytes, `{}`, becomes a dict of 80, so a body within its limit could take thirty times that limit. The
memory of the values, without the text itself, follows from the characters that separate them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import BodyTooLargeError

# The values may take this many times the limit of a body, and at least this many bytes where that limit is low.
_TIMES = 5
_LEAST_BUDGET = 64 * 2**20

# Bytes that are examined at a time, so that the arrays made of them stay in the cache.
_BLOCK: Final = 2**17
_QUOTE, _BACKSLASH = b'"\\'

Weights = Mapping[int, int]


def _weights(text: str, *weights: int) -> Weights:
    return MappingProxyType(dict(zip(text.encode(), weights, strict=True)))


# The bytes that values take in orjson and in the arrays made of them, for each character that comes with a value: a
# comma, or the beginning of an array, stands for a value and its place in a list. Measured, with some margin: 84 bytes
# for each of 1.5,1.5; 88 for {},{}; 114 for [],[]; 237 for {"":1},{"":1}; 155 for a member with a key of its own; 206
# for each of "abcd","abcd" as BYTES; 290 for each of ["ab"],["ab"]. Objects weigh more, for a request needs few.
OBJECTS = _weights(',[{:"', 90, 160, 1024, 80, 64)
# The same in simdjson: 24 bytes for a number, and 16 in the arrays made of it.
NUMBERS = _weights(",[{", 40, 80, 60)


class BodyLimits(NamedTuple):
    """The bytes that a body may have, and that the values of a JSON text in it may take."""

    body: int
    json_values: int


def choose_limits(max_body_bytes: int) -> BodyLimits:
    """Return the limits that follow from that of a body."""
    return BodyLimits(max_body_bytes, max(_TIMES * max_body_bytes, _LEAST_BUDGET))


def check_memory(part: memoryview, weights: Weights, budget: int) -> None:
    """Raise BodyTooLargeError for JSON whose values may take more memory than `budget`, in bytes."""
    if len(part) * most_per_byte(weights) <= budget:
        return
    text = np.frombuffer(part, np.uint8)
    # First with the characters in strings, which is quicker and enough for most texts.
    if _weigh(text, weights, budget) <= budget:
        return
    needed = _weigh_outside_strings(text, weights, budget)
    if needed > budget:
        raise BodyTooLargeError(
            f"the values of the JSON would take {needed} bytes of memory or more, at most {budget} are allowed; "
            "send large tensors as binary data"
        )


def most_per_byte(weights: Weights) -> int:
    """Return the most memory that a byte of text may take: each of `{},` or `[],`."""
    return -(-(max(weights.values()) + weights[ord(",")]) // 3)


def _weigh(text: NDArray[np.uint8], weights: Weights, budget: int) -> int:
    total = 0
    for begin in range(0, len(text), _BLOCK):
        total += _weigh_block(text[begin : begin + _BLOCK], weights)
        if total > budget:
            break
    return total


def _weigh_block(block: NDArray[np.uint8], weights: Weights) -> int:
    return sum(int(np.count_nonzero(block == character)) * weight for character, weight in weights.items())


def _weigh_outside_strings(text: NDArray[np.uint8], weights: Weights, budget: int) -> int:
    total, inside, backslashes = 0, False, 0  # backslashes directly before the block
    for begin in range(0, len(text), _BLOCK):
        block = text[begin : begin + _BLOCK]
        quotes, backslashes = _find_quotes(block, backslashes)
        insides = np.logical_xor.accumulate(quotes)
        if inside:
            insides = ~insides
        inside = bool(insides[-1])
        total += _weigh_block(block[~insides | quotes], weights)
        if total > budget:
            break
    return total


def _find_quotes(block: NDArray[np.uint8], before: int) -> tuple[NDArray[np.bool_], int]:
    """Return a mask of the quotes that begin and end strings, and the number of backslashes at the end of the block.

    `before` is the number of backslashes directly before the block.
    """
    quotes = block == _QUOTE
    others = np.flatnonzero(block != _BACKSLASH)
    if not before and len(others) == len(block):
        return quotes, 0
    if not len(others):
        return quotes, before + len(block)
    # The number of backslashes directly before each other byte.
    runs = np.diff(others, prepend=-1) - 1
    runs[0] += before
    quotes[others[runs % 2 == 1]] = False
    return quotes, int(len(block) - 1 - others[-1])
