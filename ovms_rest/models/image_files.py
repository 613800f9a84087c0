"""Files of encoded images: what they are and how large, read from their headers before OpenCV sees them.

A file of a few KB can hold a picture of gigabytes, or take minutes. What OpenCV 5.0 decodes besides these formats is
refused, as in OVMS, whose OpenCV is built without: a TIFF of 260 KB with one pixel in a tile of 16368x16368 took 1 GB
(`OPENCV_IO_MAX_IMAGE_PIXELS` does not look at tiles).
"""

import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

# A scan costs 60 ms at 64 million pixels and may have 20 bytes; progressive pictures have some ten.
_MAX_JPEG_SCANS = 64
# Before the frame: metadata is in segments of 64 KB.
_MAX_JPEG_MARKERS = 10_000
# A text is unpacked to as much as 8 MB, whatever its size, and kept.
_MAX_PNG_TEXTS = 16


def measure(file: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Return the width and height, in pixels, that OpenCV will find; None for what it is not to decode."""
    signature = file[:8].tobytes()
    for begin, read in FORMATS.values():
        if signature.startswith(begin):
            try:
                size = read(file.data)
            except struct.error:  # the file ends too soon
                return None
            return size if size is not None and min(size) > 0 else None
    return None


def _measure_bmp(file: memoryview) -> tuple[int, int] | None:
    (header,) = struct.unpack_from("<I", file, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", file, 18)
    return width, abs(height)  # a negative height is a picture whose first row is at the top


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
_JPEG_SCAN_OR_END = re.compile(rb"\xff[\xd9\xda]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


def _measure_jpeg(file: memoryview) -> tuple[int, int] | None:
    size, components, progressive, position = None, 0, False, 2
    for _ in range(_MAX_JPEG_MARKERS):
        found = _JPEG_MARKER.search(file, position)
        if found is None:
            return None
        position = found.end()
        marker = file[position - 1]
        if marker in _JPEG_FRAMES:
            height, width, components = struct.unpack_from(">HHB", file, position + 3)
            size, progressive = (width, height), marker not in (0xC0, 0xC1)
        elif marker == _JPEG_SCAN:
            (scanned,) = struct.unpack_from(">B", file, position + 2)
            several = progressive or scanned != components
            return None if several and _has_too_many_scans(file, position) else size
        elif marker == _JPEG_END:
            return None
        if marker not in _JPEG_WITHOUT_LENGTH:
            position += struct.unpack_from(">H", file, position)[0]
    return None


def _has_too_many_scans(file: memoryview, position: int) -> bool:
    """Count the scans from the first one on: each goes over the whole picture, however few bytes it has."""
    for scans, found in enumerate(_JPEG_SCAN_OR_END.finditer(file, position), start=2):
        if file[found.end() - 1] == _JPEG_END:
            return False
        if scans > _MAX_JPEG_SCANS:
            return True
    return False


def _measure_png(file: memoryview) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", file, 16)
    position, texts, kind = 8, 0, b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", file, position)
        if (kind == b"IHDR") != (position == 8):
            return None
        position += 12 + size
        texts += kind in (b"zTXt", b"iTXt")
        # OpenCV takes memory for a chunk's size before it looks for its bytes: 91 bytes took 4 GB.
        if position > len(file) or texts > _MAX_PNG_TEXTS:
            return None
    return width, height


# As OpenCV reads them: space or comments, a number, one byte that ends it, and again.
_PNM_HEADER = re.compile(
    rb"P[1-6](?=\s)(?:\s|#[^\r\n]*+[\r\n])*+0*+(\d{1,10})\D(?:\s|#[^\r\n]*+[\r\n])*+0*+(\d{1,10})(?!\d)"
)


def _measure_pnm(file: memoryview) -> tuple[int, int] | None:
    found = _PNM_HEADER.match(file)
    return None if found is None else (int(found[1]), int(found[2]))


def _measure_webp(file: memoryview) -> tuple[int, int] | None:
    form, chunk = bytes(file[8:12]), bytes(file[12:16])
    if form != b"WEBP":
        return None
    if chunk == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", file, 24)
        return (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", file, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", file, 26)
    return width & 0x3FFF, height & 0x3FFF


# The bytes with which a file begins, and what reads its header: it returns width and height, None for a file that is
# not to be decoded, and raises struct.error for one that ends too soon.
FORMATS: Mapping[str, tuple[bytes, Callable[[memoryview], tuple[int, int] | None]]] = MappingProxyType(
    {
        "BMP": (b"BM", _measure_bmp),
        "JPEG": (b"\xff\xd8\xff", _measure_jpeg),
        "PNG": (b"\x89PNG\r\n\x1a\n", _measure_png),
        "PNM": (b"P", _measure_pnm),
        "WebP": (b"RIFF", _measure_webp),
    }
)
