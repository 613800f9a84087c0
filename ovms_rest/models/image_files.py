"""Headers of encoded images: format, size and decoding costs, read before OpenCV sees the files.

A file of a few KB can contain a picture of gigabytes, or take minutes. Other formats of OpenCV 5.0 are refused, as in
OVMS, whose OpenCV is built without them: a TIFF of 260 KB with one pixel in a tile of 16368x16368 took 1 GB
(`OPENCV_IO_MAX_IMAGE_PIXELS` does not limit tiles).
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A scan costs 60 ms at 64 million pixels and may have only 20 bytes; progressive pictures have about ten scans.
_MAX_JPEG_SCANS = 64
# The limits before the scan: metadata is in segments of 64 KB, and between segments there are at most a few fill bytes,
# each of which costs 14 ns here.
_MAX_JPEG_MARKERS, _MAX_JPEG_FILL_BYTES = 10_000, 2**20
# A text of any size may be unpacked to 8 MB, which stay in memory.
_MAX_PNG_TEXTS = 16
# Clearing the table costs 14 us in OpenCV and here, and takes only 3 bits. Writers clear it when it is full, after
# 4 KB, and the simplest ones every 254 pixels.
_MAX_GIF_CLEARS, _LEAST_PIXELS_FOR_CLEAR = 256, 200
# Chunks of a PNG and blocks of a GIF are visited one by one; writers fill them with at least 255 bytes.
_MAX_PARTS, _LEAST_BYTES_OF_PART = 1000, 64

# Measured costs of decoding in addition to the pixels, in units of 10 ns, which is about a pixel of a JPEG.
IMAGE_WORK = 5000
_GIF_CLEAR_WORK, _PART_WORK, _PROFILE_WORK = 1900, 50, 25_000
# libpng unpacks a text to at most 8 MB, in 23 ms.
_TEXT_WORK, _MAX_TEXT_BYTES = 0.3, 8_000_000
_SCAN_WORK = 0.15  # per pixel
# Per byte of a pixel: 5 ns in photographs of any depth, 7 ns at most. A pixel of 16 bits with alpha has eight.
_PNG_BYTE_WORK = 0.5
# The highest ratio of deflate.
_MOST_RATIO = 1032
# Bytes that the data of a PNG may have beyond its rows; libpng unpacks any amount.
_PNG_ROOM = 2**16
_PNG_PIECE = 2**17


class Picture(NamedTuple):
    """The header of a file: width and height in pixels, and the work of decoding, in units of 10 ns.

    `packed` is the number of bytes that may unpack to more than the pixels need, 0 if they cannot.
    """

    width: int
    height: int
    work: int
    packed: int = 0

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.width * self.height


def measure(file: NDArray[np.uint8]) -> Picture | None:
    """Return the picture that OpenCV will find; None for a file that must not be decoded."""
    signature = file[:8].tobytes()
    for begin, read in FORMATS.values():
        if signature.startswith(begin):
            try:
                picture = read(file.data)
            except (struct.error, IndexError):  # the file ends too soon
                return None
            return picture if picture is not None and picture.width > 0 and picture.height > 0 else None
    return None


def _picture(file: memoryview, width: int, height: int, per_pixel: float = 1, extra: float = 0) -> Picture:
    """Make a picture from its costs per pixel and extra costs; a byte of the file costs a quarter of a unit."""
    return Picture(width, height, int(IMAGE_WORK + width * height * per_pixel + len(file) / 4 + extra))


def _measure_bmp(file: memoryview) -> Picture | None:
    (header,) = struct.unpack_from("<I", file, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", file, 18)
    return _picture(file, width, abs(height))  # a negative height means that the first row is at the top


_GIF_IMAGE, _GIF_EXTENSION = 0x2C, 0x21
_GIF_CODES = 4096  # in a full table
_GIF_CODE_BYTES = 1.5  # of the longest code, which stands for a pixel or more
# Bytes that the blocks of a GIF may have beyond its codes; examining these costs 15 ns each.
_GIF_ROOM = 2**20


def _measure_gif(file: memoryview) -> Picture | None:
    width, height, flags = struct.unpack_from("<HHB", file, 6)
    allowed = parts = _allow_parts(file)
    position = 13 + _count_gif_colors(flags)
    while (kind := file[position]) == _GIF_EXTENSION:
        blocks, position = _skip_gif_blocks(file, position + 2, parts)
        parts -= 1 + blocks
        if parts < 0:
            return None
    if kind != _GIF_IMAGE:
        return None
    position += 10 + _count_gif_colors(file[position + 9])
    bits = file[position]
    blocks, end = _skip_gif_blocks(file, position + 1, parts)
    # OpenCV's limits. With 1 bit there is no room for the codes that clear and end.
    if not 2 <= bits <= 11 or blocks > parts:
        return None
    most = _MAX_GIF_CLEARS + width * height // _LEAST_PIXELS_FOR_CLEAR
    if end - position > (width * height + most) * _GIF_CODE_BYTES + _GIF_ROOM:
        return None
    clears = _count_gif_clears(_join_gif_blocks(file[position + 1 : end]), bits, most)
    if clears > most:
        return None
    extra = len(file) + clears * _GIF_CLEAR_WORK + (allowed - parts + blocks) * _PART_WORK
    return _picture(file, width, height, 4, extra)


def _count_gif_colors(flags: int) -> int:
    """Return the size in bytes of the color table that the flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_gif_blocks(file: memoryview, position: int, most: int) -> tuple[int, int]:
    """Return the number of blocks up to an empty one, few more than `most`, and the position after them."""
    blocks = 0
    while (size := file[position]) and blocks <= most:
        position += 1 + size
        blocks += 1
    return blocks, position + 1


def _join_gif_blocks(section: memoryview) -> bytes:
    """Return the data of blocks that end with an empty one."""
    data, position = bytearray(), 0
    while size := section[position]:
        data += section[position + 1 : position + 1 + size]
        position += 1 + size
    return bytes(data)


def _count_gif_clears(data: bytes, bits: int, most: int) -> int:
    """Count the codes that clear the LZW table, and end codes before the end of the data; stop beyond `most`.

    The size of a code in bits depends only on the number of codes since the table was cleared.
    """
    begins, sizes = _lay_out_gif_codes(bits)
    padded = np.frombuffer(data + bytes(3), np.uint8)
    words = np.ndarray((len(data),), "<u4", padded, strides=(1,))  # each byte with the next three
    full, end = _GIF_CODES - 1 - 2**bits, 2**bits + 1
    place, codes, clears, window = 0, 0, 0, 256
    while place < 8 * len(data):
        places = begins[codes : codes + window] + (place - begins[codes])
        places = places[: np.searchsorted(places, 8 * len(data))]
        length = sizes[codes : codes + places.size]
        values = words[places >> 3] >> (places & 7) & (1 << length) - 1
        found = np.flatnonzero(values | 1 == end)
        last = found[0] if found.size else -1
        place = int(places[last] + length[last])
        if found.size:
            clears, codes, window = clears + 1, 0, 256
            if clears > most:
                break
        else:
            codes, window = min(codes + places.size, full), _GIF_CODES
    return clears


@cache
def _lay_out_gif_codes(bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first bit and the number of bits of all codes, from an empty table to beyond a full one."""
    entries = np.minimum(2**bits + 1 + np.arange(2 * _GIF_CODES), _GIF_CODES)
    sizes = np.minimum(np.searchsorted(2 ** np.arange(13), entries, side="right"), 12)
    return np.cumsum(sizes) - sizes, sizes


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
_JPEG_SCAN_OR_END = re.compile(rb"\xff[\xd9\xda]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


def _measure_jpeg(file: memoryview) -> Picture | None:
    size, components, progressive, position, fill_bytes = None, 0, False, 2, _MAX_JPEG_FILL_BYTES
    for markers in range(_MAX_JPEG_MARKERS):
        found = _JPEG_MARKER.search(file, position, position + fill_bytes)
        if found is None:
            return None
        fill_bytes -= found.start() - position
        position = found.end()
        marker = file[position - 1]
        if marker in _JPEG_FRAMES:
            height, width, components = struct.unpack_from(">HHB", file, position + 3)
            size, progressive = (width, height), marker not in (0xC0, 0xC1)
        elif marker == _JPEG_SCAN:
            (scanned,) = struct.unpack_from(">B", file, position + 2)
            scans = _count_scans(file, position) if progressive or scanned != components else 0
            if size is None or scans > _MAX_JPEG_SCANS:
                return None
            return _picture(file, *size, 1 + scans * _SCAN_WORK, markers * _PART_WORK)
        elif marker == _JPEG_END:
            return None
        if marker not in _JPEG_WITHOUT_LENGTH:
            position += struct.unpack_from(">H", file, position)[0]
    return None


def _count_scans(file: memoryview, position: int) -> int:
    """Count the scans; each covers the whole picture, however few bytes it has."""
    scans = 1
    for found in _JPEG_SCAN_OR_END.finditer(file, position):
        if file[found.end() - 1] == _JPEG_END or scans > _MAX_JPEG_SCANS:
            break
        scans += 1
    return scans


def _measure_png(file: memoryview) -> Picture | None:
    width, height = struct.unpack_from(">II", file, 16)
    texts, packed, parts, extra = 0, 0, 0, 0.0
    has_data, most = False, _allow_parts(file)
    for kind, begin, end in _split_png(file):
        if (kind == b"IHDR") != (begin == _PNG_FIRST):
            return None
        # OpenCV allocates a chunk's size before it reads the bytes: a file of 91 bytes took 4 GB.
        parts += 1
        if end + 4 > len(file) or parts > most:
            return None
        if kind == b"IDAT":
            has_data, packed = True, packed + end - begin
        elif kind == b"IEND" and not has_data:  # OpenCV reads on, and allocates what follows as above
            return None
        elif kind == b"iCCP":
            extra += _PROFILE_WORK
        elif kind in (b"zTXt", b"iTXt"):
            texts += 1
            if texts > _MAX_PNG_TEXTS:
                return None
            extra += min((end - begin) * _MOST_RATIO, _MAX_TEXT_BYTES) * _TEXT_WORK
    per_pixel = max(1, _read_png_depth(file) / 8 * _PNG_BYTE_WORK)
    picture = _picture(file, width, height, per_pixel, extra + parts * _PART_WORK)
    return picture._replace(packed=packed) if packed * _MOST_RATIO > _allow_png_bytes(file) else picture


_PNG_FIRST = 16  # position of the first chunk, after its size and kind
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _split_png(file: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the beginning and the end of each chunk of a PNG."""
    position, kind = 8, b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", file, position)
        yield kind, position + 8, position + 8 + size
        position += 12 + size


def _read_png_depth(file: memoryview) -> int:
    """Return the number of bits of a pixel."""
    bits, color = struct.unpack_from("BB", file, 24)
    return int(bits) * _PNG_CHANNELS.get(color, 4)


def _allow_png_bytes(file: memoryview) -> int:
    """Return how many bytes the data of a PNG may unpack to: twice its rows, for interlaced ones."""
    width, height = (int(number) for number in struct.unpack_from(">II", file, 16))
    row = 1 + (width * _read_png_depth(file) + 7) // 8
    return 2 * height * row + _PNG_ROOM


def is_honest(file: NDArray[np.uint8]) -> bool:
    """Return whether the data of a measured PNG unpack to little more than its rows.

    Unpacking takes nearly as long as decoding.
    """
    allowed, decompressor = _allow_png_bytes(file.data), zlib.decompressobj()
    try:
        for kind, begin, end in _split_png(file.data):
            for start in range(begin, end, _PNG_PIECE) if kind == b"IDAT" else ():
                data: bytes | memoryview = file.data[start : min(start + _PNG_PIECE, end)]
                while data and not decompressor.eof:
                    allowed -= len(decompressor.decompress(data, _PNG_PIECE))
                    if allowed < 0:
                        return False
                    data = decompressor.unconsumed_tail
    except zlib.error:  # OpenCV will report it
        pass
    return True


def _allow_parts(file: memoryview) -> int:
    """Return how many chunks or blocks a file may have."""
    return _MAX_PARTS + len(file) // _LEAST_BYTES_OF_PART


# Comments cost 11 ns a byte here.
_MAX_PNM_HEADER = 2**16

# The header as OpenCV reads it: space or comments, a number, one byte that ends it, and the same again.
_PNM_HEADER = re.compile(
    rb"P[1-6](?=\s)(?:\s|#[^\r\n]*+[\r\n])*+0*+(\d{1,10})\D(?:\s|#[^\r\n]*+[\r\n])*+0*+(\d{1,10})(?!\d)"
)


def _measure_pnm(file: memoryview) -> Picture | None:
    found = _PNM_HEADER.match(file[:_MAX_PNM_HEADER])
    return None if found is None else _picture(file, int(found[1]), int(found[2]))


# Lossy pictures take 45 ns per byte of the file besides their pixels; an extended file may have one.
_WEBP_BYTE_WORK = 4


def _measure_webp(file: memoryview) -> Picture | None:
    form, chunk = bytes(file[8:12]), bytes(file[12:16])
    if form != b"WEBP":
        return None
    extra = len(file) * _WEBP_BYTE_WORK
    if chunk == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", file, 24)
        return _picture(file, (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1, extra=extra)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", file, 21)
        return _picture(file, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    width, height = struct.unpack_from("<HH", file, 26)
    return _picture(file, width & 0x3FFF, height & 0x3FFF, extra=extra)


# The first bytes of a file, and the reader of its header, which returns the picture, or None for a file that must not
# be decoded, and raises struct.error for one that ends too soon.
FORMATS: Mapping[str, tuple[bytes, Callable[[memoryview], Picture | None]]] = {
    "BMP": (b"BM", _measure_bmp),
    "GIF": (b"GIF", _measure_gif),
    "JPEG": (b"\xff\xd8\xff", _measure_jpeg),
    "PNG": (b"\x89PNG\r\n\x1a\n", _measure_png),
    "PNM": (b"P", _measure_pnm),
    "WebP": (b"RIFF", _measure_webp),
}
