"""Buffers for bodies, aligned for the tensors in them."""

import numpy as np

# A cache line, and what OpenVINO aligns its own tensors to.
ALIGNMENT = 64


def allocate(size: int, aligned: int = 0) -> memoryview:
    """Return an uninitialised, writable buffer in which the offset `aligned` lies on a 64-byte boundary."""
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -(room.__array_interface__["data"][0] + aligned) % ALIGNMENT
    return room[start : start + size].data


def tensors_begin(header_length: str | None) -> int:
    """Tell where in the body the tensors begin, as far as Inference-Header-Content-Length can be trusted.

    It is only a hint for `allocate`: what is wrong with the header the decoder tells.
    """
    return int(header_length) if header_length and header_length.isdecimal() and len(header_length) < 12 else 0
