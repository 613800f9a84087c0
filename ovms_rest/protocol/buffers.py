"""Buffers for bodies, aligned for the tensors in them."""

import numpy as np

from ovms_rest.protocol.header_length import read_header_length

# A cache line; OpenVINO aligns its own tensors to it too.
ALIGNMENT = 64


def allocate(size: int, aligned: int = 0) -> memoryview:
    """Return an uninitialised, writable buffer in which the offset `aligned` lies on a 64-byte boundary."""
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -(room.__array_interface__["data"][0] + aligned) % ALIGNMENT
    return room[start : start + size].data


def tensors_begin(header_length: str | None) -> int:
    """Return where in the body the tensors begin, 0 when the header is missing or invalid."""
    return read_header_length(header_length).length
