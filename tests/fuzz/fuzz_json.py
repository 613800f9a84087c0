"""Mutations of JSON that keep it valid, so that inputs get past the parser; the bytes after the JSON stay its data."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import atheris

# Values at the borders of the datatypes, of the limits and of the parsers.
_NUMBERS = [
    *(0, 1, -1, 2, 3, 4, 8, 127, 128, 255, 256, -128, -129, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, 2**20, 2**20 + 1, 65504, 65519, 65520),
    *(0.5, -0.0, 1.5, 1e-7, 5e-324, 1e300, 3.4028235e38, 3.4028236e38, 1 + 2**-8 + 2**-40, 0.1, 1 / 3, 16777217.0),
]
_SCALARS = [None, True, False, "", "x", "\u00e9", "a\nb", "\u2028", "a\0", "x" * 100, "aGk=", *_NUMBERS]


def make_mutator(prefix: int, keys: Sequence[str], values: Sequence[Any]) -> Callable[[bytes, int, int], bytes]:
    """Return a mutator for inputs of `prefix` bytes and JSON, in which these keys and values are known."""
    known = [*values, *_SCALARS]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.4:
            return atheris.Mutate(data, min(len(data) + 1, max_size) if chance.random() < 0.5 else max_size)
        text = data[prefix:].decode("latin-1")
        try:
            root, end = json.JSONDecoder().raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            return atheris.Mutate(data, max_size)
        rest = text.lstrip()[end:].encode("latin-1")
        try:
            root = json.loads(text.lstrip()[:end].encode("latin-1"))
            for _ in range(chance.choice((1, 1, 2, 3))):
                root = _change(root, chance, keys, known)
            changed = json.dumps(root, ensure_ascii=chance.random() < 0.5, separators=(",", ":")).encode()
        except (ValueError, RecursionError):
            return atheris.Mutate(data, max_size)
        if len(changed) > max_size:
            return data[:max_size]
        if chance.random() < 0.2:
            rest = atheris.Mutate(rest, len(rest) + 16)
        mutated = _follow(data[:prefix], end, len(changed)) + changed + rest
        return mutated if len(mutated) <= max_size else data[:max_size]

    return mutate


def _follow(head: bytes, before: int, after: int) -> bytes:
    """Let a length of the JSON, two bytes at the end of the prefix, follow the JSON."""
    if len(head) >= 2 and int.from_bytes(head[-2:], "little") == before:
        return head[:-2] + after.to_bytes(2, "little")
    return head


def _change(root: Any, chance: random.Random, keys: Sequence[str], known: Sequence[Any]) -> Any:
    """Return JSON with one value changed, added, removed, copied or nested."""
    holder = [root]
    owner, key = chance.choice(list(_places(holder)))
    value = owner[key]
    match chance.randrange(9):
        case 0 if type(value) is dict:
            value[chance.choice(keys)] = copy.deepcopy(chance.choice(known))
        case 0 | 1 if type(value) is list:
            value.insert(chance.randint(0, len(value)), copy.deepcopy(chance.choice(known)))
        case 2 if value and type(value) is list:
            value.pop(chance.randrange(len(value)))
        case 2 if value and type(value) is dict:
            value.pop(chance.choice(list(value)))
        case 3 if value and type(value) is list:
            value += [copy.deepcopy(chance.choice(value)) for _ in range(chance.choice((1, 2, 8, 70)))]
        case 4:
            owner[key] = [value] if chance.random() < 0.7 else {chance.choice(keys): value}
        case 5 if value and type(value) is list:
            owner[key] = value[0]
        case 6 if value and type(value) is dict:
            old = chance.choice(list(value))
            value[chance.choice(keys)] = value.pop(old)
        case 7:
            _, _ = owner, key
            other, place = chance.choice(list(_places(holder)))
            owner[key] = copy.deepcopy(other[place])
        case _:
            owner[key] = copy.deepcopy(chance.choice(known))
    return holder[0]


def _places(owner: Any) -> Any:
    """Yield the place of every value below an object or array."""
    for key in list(owner) if type(owner) is dict else range(len(owner)):
        yield owner, key
        if type(owner[key]) in (dict, list):
            yield from _places(owner[key])
