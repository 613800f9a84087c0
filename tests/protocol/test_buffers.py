"""Buffers for bodies."""

import numpy as np
import pytest

from ovms_rest.protocol.buffers import ALIGNMENT, allocate


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 10_000])
@pytest.mark.parametrize("aligned", [0, 1, 63, 64, 65, 100, 137, 10_000])
def test_buffer_has_its_size_and_is_aligned_at_the_offset(size, aligned):
    buffers = [allocate(size, aligned) for _ in range(8)]  # a single one may be aligned by chance
    for buffer in buffers:
        assert (len(buffer), buffer.readonly, buffer.format) == (size, False, "B")
        address = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
        assert (address + aligned) % ALIGNMENT == 0
        buffer[:] = b"x" * size
        assert buffer.tobytes() == b"x" * size


def test_empty_buffer_has_no_bytes():
    assert bytes(allocate(0)) == b""
