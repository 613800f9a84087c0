"""Encoded images: the headers that the service reads before OpenCV does, and the whole decoding of small ones.

The input: a byte that chooses the input of the model, and the file.
"""

import struct
import zlib

import cv2
import numpy as np
from fuzz_oracles import Failure, attempt
from gif_writer import gif

from ovms_rest.models.image_files import is_honest, measure
from ovms_rest.models.images import ImageLimits, ImageReader
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, TensorMetadata

MAX_LENGTH = 4096
ANY = Dim(0, None)
# The service decodes no more pixels than this here.
_MOST_PIXELS = 2**14
TOKENS = [
    *(
        b"BM",
        b"GIF87a",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"zTXt",
        b"iTXt",
        b"iCCP",
    ),
    *(
        b"P1\n",
        b"P4 ",
        b"P5\n",
        b"P6\n",
        b"P3 ",
        b"#c\n",
        b"RIFF",
        b"WEBP",
        b"VP8 ",
        b"VP8L",
        b"VP8X",
        b"ANIM",
        b"ANMF",
    ),
    *(b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xd9", b"\xff\xd0", b"\xff\x01", b"\x2c", b"\x21\xf9", b"\0\0\0\r"),
    *(
        b"\x28\0\0\0",
        b"\x0c\0\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\x80",
        b"255\n",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"tRNS",
        b"PLTE",
    ),
]

_LIMITS = ImageLimits(_MOST_PIXELS, 2 * _MOST_PIXELS)
_READERS = (
    ImageReader(TensorMetadata("x", "UINT8", (ANY, Dim(4, 4), Dim(4, 4), Dim(3, 3))), "NHWC", _LIMITS),
    ImageReader(TensorMetadata("x", "FP32", (ANY, Dim(1, 64), Dim(1, 64), ANY)), "NHWC", _LIMITS),
    ImageReader(TensorMetadata("x", "FP16", (ANY, ANY, ANY, Dim(3, 3))), "NHWC", _LIMITS),
)


def seeds() -> list[bytes]:
    """Return a small file of every format and kind."""
    picture = (np.arange(5 * 7 * 3) * 37 % 256).astype(np.uint8).reshape(5, 7, 3)
    alpha = np.concatenate([picture, picture[:, :, :1]], axis=2)
    flat = np.zeros((8, 8, 3), np.uint8)
    files = [_encode(extension, picture) for extension in (".bmp", ".gif", ".jpg", ".png", ".ppm", ".webp")]
    files += [_encode(extension, picture[:, :, 0]) for extension in (".bmp", ".jpg", ".png", ".pgm", ".pbm")]
    files += [_encode(".png", alpha), _encode(".png", picture.astype(np.uint16) * 257), _encode(".webp", alpha)]
    files += [
        _encode(".jpg", flat, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        _encode(".webp", flat, cv2.IMWRITE_WEBP_QUALITY, 101),
    ]
    files += [_encode(".jpg", flat, cv2.IMWRITE_JPEG_RST_INTERVAL, 1), _encode(".ppm", flat, cv2.IMWRITE_PXM_BINARY, 0)]
    files += [gif(2, 2, [256, 1, 2, 3, 4, 257]), gif(4, 1, [4, 1, 2, 4, 3, 0, 5], bits=2, extensions=b"\x21\xfe\1a\0")]
    files += [
        b"P5 # c\n2 # d\n2\n255\nabcd",
        b"P2\n2 1\n255\n1 2\n",
        b"BM" + struct.pack("<IIIIHHHH", 30, 0, 26, 12, 1, 1, 1, 24) + bytes(4),
    ]
    files.append(
        _png(
            2,
            2,
            (b"tEXt", b"a\0b"),
            (b"zTXt", b"a\0\0" + zlib.compress(b"b" * 99)),
            (b"iCCP", b"a\0\0" + zlib.compress(b"c")),
        )
    )
    files.append(_encode(".apng", picture) if cv2.haveImageWriter(".apng") else _png(1, 1))
    return [bytes([index % 3]) + file for index, file in enumerate(files)]


def _encode(extension: str, picture: np.ndarray, *parameters: int) -> bytes:
    return cv2.imencode(extension, picture, parameters)[1].tobytes()


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    rows = (b"\0" + bytes(width)) * height
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def check(data: bytes) -> None:
    """Measure a file; what OpenCV decodes must have the size that was measured, or its limits would mean nothing."""
    if len(data) < 2:
        return
    file = np.frombuffer(data[1:], np.uint8)
    picture = measure(file)
    if picture is not None:
        assert 0 < picture.width < 10**10
        assert 0 < picture.height < 10**10
        assert picture.work >= picture.pixels
        if picture.packed:
            is_honest(file)
        if picture.pixels <= _MOST_PIXELS:
            _check_size(file, picture.width, picture.height)
    strings = BytesArray.of([data[1:]] * (1 + data[0] // 128), (1 + data[0] // 128,))
    array = attempt(_READERS[data[0] % len(_READERS)].read, strings, "x")
    if not isinstance(array, Failure):
        assert picture is not None
        assert array.shape[0] == strings.shape[0]
        assert array.size <= _LIMITS.request


def _check_size(file: np.ndarray, width: int, height: int) -> None:
    try:
        image = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return
    if image is not None:
        assert image.shape[:2] == (height, width), f"OpenCV decodes {image.shape}, measured {height}x{width}"
