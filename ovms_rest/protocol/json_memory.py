"""How much memory a JSON text takes once it is parsed, estimated before it is.

An object of two bytes, `{}`, becomes a dict of 80, so that a text within the limit of a body could take thirty times
that. What values take besides the text itself follows from the characters that separate them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import BodyTooLargeError

# How many times the limit of a body its values may take, and what they may take where that limit is low.
_TIMES = 5
_LEAST_BUDGET = 64 * 2**20

# Looked at in one go, so that what is made of it stays in the cache.
_BLOCK: Final = 2**17
_QUOTE, _BACKSLASH = b'"\\'

Weights = Mapping[int, int]


def _weights(text: str, *weights: int) -> Weights:
    return MappingProxyType(dict(zip(text.encode(), weights, strict=True)))


# The bytes that values take in orjson and in what is made of them, for each character that comes with one: a comma, or
# the beginning of an array, stands for a value and its place in a list. Measured, with some room: 84 bytes for each of
# 1.5,1.5; 88 for {},{}; 114 for [],[]; 237 for {"":1},{"":1}; 155 for a member with a key of its own; 206 for each of
# "abcd","abcd" as BYTES; 290 for each of ["ab"],["ab"]. Objects count more than they take, for a request needs few.
OBJECTS = _weights(',[{:"', 90, 160, 1024, 80, 64)
# The same in simdjson, which takes 24 bytes for a number, and 16 are made of it.
NUMBERS = _weights(",[{", 40, 80, 60)


def choose_budget(max_body_bytes: int) -> int:
    """Return how many bytes the values of a JSON text may take when a body may have so many."""
    return max(_TIMES * max_body_bytes, _LEAST_BUDGET)


def check_memory(part: memoryview, weights: Weights, budget: int) -> None:
    """Raise BodyTooLargeError for JSON whose values may take more memory than `budget`, in bytes.

    What is short cannot, and is not looked at.
    """
    if len(part) * most_per_byte(weights) <= budget:
        return
    text = np.frombuffer(part, np.uint8)
    # What stands in strings counts at first, for most texts have enough room for it.
    if _weigh(text, weights, budget) <= budget:
        return
    needed = _weigh_outside_strings(text, weights, budget)
    if needed > budget:
        raise BodyTooLargeError(
            f"the values of the JSON would take {needed} bytes of memory or more, at most {budget} are allowed; "
            "send large tensors as binary data"
        )


def most_per_byte(weights: Weights) -> int:
    """Return what a byte of text takes at most: each of `{},` or `[],`."""
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
    total, inside, backslashes = 0, False, 0  # how many stand before the block
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
    """Mark the quotes that begin and end strings; return them, and how many backslashes the block ends with.

    `before` is how many stand in front of the block.
    """
    quotes = block == _QUOTE
    others = np.flatnonzero(block != _BACKSLASH)
    if not before and len(others) == len(block):
        return quotes, 0
    if not len(others):
        return quotes, before + len(block)
    # How many backslashes stand before each byte that is none.
    runs = np.diff(others, prepend=-1) - 1
    runs[0] += before
    quotes[others[runs % 2 == 1]] = False
    return quotes, int(len(block) - 1 - others[-1])
