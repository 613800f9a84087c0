"""GIF files written by hand, valid ones and bombs."""

import struct

import numpy as np


def gif(width, height, codes, bits=8, flags=0, extensions=b"", block=255):
    """Return a GIF with the given codes of its compression; without a color table, OpenCV takes greys."""
    written, table = [], 2**bits + 1
    for code in codes:
        written.append(f"{code:0{min(table.bit_length(), 12)}b}"[::-1])  # the lowest bit comes first
        table = 2**bits + 1 if code in (2**bits, 2**bits + 1) else min(table + 1, 4096)
    packed = np.packbits(np.frombuffer("".join(written).encode(), np.uint8) & 1, bitorder="little").tobytes()
    blocks = [packed[begin : begin + block] for begin in range(0, len(packed), block)]
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + extensions
        + struct.pack("<BHHHHBB", 0x2C, 0, 0, width, height, flags, bits)
        + b"".join(bytes([len(part)]) + part for part in blocks)
        + b"\0\x3b"
    )
