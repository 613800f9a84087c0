"""Compression of answers to inferences, by what the client accepts (RFC 9110, section 12.5.3)."""

import re
import zlib
from collections.abc import Iterable

from ovms_rest.protocol.encoding import Buffer
from ovms_rest.resources.body import _CONTAINERS

# A first step already saves most of what text can; more costs many times an inference.
_LEVEL = 1
_ITEM = re.compile(r"(?P<coding>[^;\s]+)(?:[ \t]*;[ \t]*q=(?P<weight>0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")


def choose_encoding(accept_encoding: str) -> str | None:
    """Choose gzip, deflate or None (identity) by weight; of equal ones the first in that order.

    What is malformed in the header counts as not being there. `*` is not taken for a wish to have something compressed.
    """
    weights = {}
    for item in accept_encoding.lower().split(","):
        if found := _ITEM.fullmatch(item.strip(" \t")):
            weights[found["coding"]] = float(found["weight"] or 1)
    identity = weights.get("identity", 0.0)
    best = max(_CONTAINERS, key=lambda coding: weights.get(coding, 0.0))
    weight = weights.get(best, 0.0)
    return best if weight > 0.0 and weight >= identity else None


def compress(parts: Iterable[Buffer], encoding: str) -> bytes:
    """Compress the parts of a body as one stream."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _CONTAINERS[encoding])
    return b"".join([*map(compressor.compress, parts), compressor.flush()])
