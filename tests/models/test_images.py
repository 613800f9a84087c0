"""Encoded images: decoded, converted and resized as by OpenCV, or refused before they cost anything."""

import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import cv2
import ml_dtypes
import numpy as np
import pytest
from gif_writer import gif
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_rest.errors import InvalidRequestError
from ovms_rest.models.image_files import _count_gif_clears, is_honest
from ovms_rest.models.images import ImageLimits, ImageReader, ShardedImageReader
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, TensorMetadata

ANY = Dim(0, None)
LABEL = "input 'x'"
FORMATS = "BMP, GIF, JPEG, PNG, PNM, WebP"
NO_LAYOUT = 'the configuration of the model has no "layout"; set "NHWC", or "NHWC:NCHW" for a model that takes NCHW'
SET_SHAPE = 'set a "shape" without unbounded dims in the configuration of the model, such as'
DTYPES = {
    "FP64": np.float64,
    "FP32": np.float32,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT32": np.int32,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "UINT8": np.uint8,
    "INT8": np.int8,
}


def reader(*dims, datatype="UINT8", layout="NHWC", limits=None):
    """Make the reader of an input, whose dims are sizes, pairs of bounds or Dims."""
    bounds = [Dim(dim, dim) if isinstance(dim, int) else Dim(*dim) for dim in dims]
    return ImageReader(TensorMetadata("x", datatype, tuple(bounds)), layout, limits or ImageLimits())


def files(*elements, shape=None):
    return BytesArray.of(elements, (len(elements),) if shape is None else shape)


def read(images, *dims, **options):
    return reader(*dims, **options).read(files(*images), LABEL)


def refusal_of(reading, strings):
    """Return the message without the label of the input."""
    with pytest.raises(InvalidRequestError) as caught:
        reading.read(strings, LABEL)
    label, _, message = str(caught.value).partition(": ")
    assert label == LABEL
    return message


def refusal(images, *dims, **options):
    return refusal_of(reader(*dims, **options), files(*images))


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def encode(picture, extension=".png", *parameters):
    return cv2.imencode(extension, picture, parameters)[1].tobytes()


def decode(file):
    """Decode a file by OpenCV alone."""
    return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)


def png(width, height, bits, color, rows, *chunks):
    """Write a PNG by hand; in the bytes `rows` a 0 for the filter comes before each row."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_data(file, *chunks):
    """Replace the chunk of packed data in a PNG."""
    return file[: file.index(b"IDAT") - 4] + b"".join(chunks) + file[file.index(b"IEND") - 4 :]


def png_bomb(side):
    """Write a PNG of side x side black pixels."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join([*(compressor.compress(row) for _ in range(side)), compressor.flush()])
    return with_data(png(side, side, 1, 0, b""), chunk(b"IDAT", rows))


def plain_codes(picture, run=254):
    """Write values uncompressed, and clear the table before the codes get longer."""
    values = picture.ravel().tolist()
    runs = (values[begin : begin + run] for begin in range(0, len(values), run))
    return [code for values in runs for code in (256, *values)] + [257]


def with_orientation(jpeg, orientation):
    """Put an EXIF segment with an orientation into a JPEG."""
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", 1, 0x0112, 3, 1, orientation, 0) + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + jpeg[2:]


COLOR, GREY = noise(6, 5, 3), noise(6, 5, seed=1)
PNG, JPEG, BMP = (encode(COLOR, extension) for extension in (".png", ".jpg", ".bmp"))
ONE = np.array([[[0x24, 0x1B, 0xED]]], np.uint8)  # the test picture of OVMS, as it is decoded
PIXEL = encode(ONE)


# --- Decoding

PALETTE = (b"PLTE", bytes.fromhex("102030 405060"))
CODES = plain_codes(noise(6, 5))
OWN_COLORS = gif(3, 1, [4, 0, 1, 2], bits=2, flags=0x81)[:-6] + bytes(range(12)) + b"\2\2\x84\x22\0\x3b"
DECODED = {
    "JPEG": (JPEG, 3),
    "JPEG, grey": (encode(GREY, ".jpg"), 1),
    "JPEG, progressive": (encode(COLOR, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1), 3),
    "JPEG with bytes between its segments": (JPEG[:20] + b"\x01\x00\xff\xff" + JPEG[21:], 3),
    "PNG": (PNG, 3),
    "PNG, grey": (encode(GREY), 1),
    "PNG, RGBA": (encode(noise(6, 5, 4)), 4),
    "PNG, grey with alpha": (png(2, 1, 8, 4, b"\0\x10\x20\x30\x40"), 4),
    "PNG, palette": (png(2, 1, 8, 3, b"\0\0\1", PALETTE), 3),
    "PNG, palette with alpha": (png(2, 1, 8, 3, b"\0\0\1", PALETTE, (b"tRNS", b"\x80")), 4),
    "PNG, 1 bit": (png(3, 1, 1, 0, b"\0\xa0"), 1),
    "PNG, 16 bits": (encode(noise(6, 5, 3, dtype=np.uint16)), 3),
    "PNG, 16 bits, grey": (encode(noise(6, 5, dtype=np.uint16)), 1),
    "BMP": (BMP, 3),
    "BMP, top row first": (BMP[:22] + struct.pack("<i", -6) + BMP[26:], 3),
    "BMP, OS/2": (b"BM" + struct.pack("<IIIIHHHH8B", 34, 0, 26, 12, 2, 1, 1, 24, 1, 2, 3, 4, 5, 6, 0, 0), 1),
    "GIF": (encode(COLOR, ".gif", cv2.IMWRITE_GIF_TRANSPARENCY, 0), 3),
    "GIF with alpha": (gif(5, 6, CODES, extensions=b"\x21\xf9\4\1\0\0\7\0"), 4),
    "GIF, its rows in four passes": (gif(5, 6, CODES, flags=0x40), 3),
    "GIF with colors of its own": (OWN_COLORS, 3),
    "GIF with a comment": (gif(5, 6, CODES, extensions=b"\x21\xfe\3abc\1d\0"), 3),
    "PPM": (encode(COLOR, ".ppm"), 3),
    "PPM, 16 bits": (encode(noise(6, 5, 3, dtype=np.uint16), ".ppm"), 3),
    "PGM": (encode(GREY, ".pgm"), 1),
    "PBM": (encode(GREY, ".pbm"), 1),
    "PGM in digits, with comments": (b"P2 # 9 9\n#8 8\n 002 #\n 1\n 255\n 7 9\n", 1),
    "WebP, lossless": (encode(COLOR, ".webp"), 3),
    "WebP, lossy": (encode(COLOR, ".webp", cv2.IMWRITE_WEBP_QUALITY, 80), 3),
    "WebP with alpha": (encode(noise(6, 5, 4), ".webp"), 4),
}


def animation(extension):
    frames = cv2.Animation()
    frames.frames = [noise(6, 5, 4, seed=seed) for seed in range(3)]
    frames.durations = np.array([100, 100, 100])
    return cv2.imencodeanimation(extension, frames)[1].tobytes()


DECODED |= {f"animated {name}": (animation(f".{name}"), None) for name in ("gif", "png", "webp")}


@pytest.mark.parametrize("name", DECODED)
def test_file_is_decoded_as_by_opencv(name):
    file, channels = DECODED[name]
    expected = decode(file)
    array = read([file], 1, ANY, ANY, ANY, datatype="UINT16")
    assert channels in (None, array.shape[3])
    assert array.shape[:3] == (1, *expected.shape[:2])
    assert array.tobytes() == expected.astype(np.uint16).tobytes()


@pytest.mark.parametrize(
    ("images", "dims", "datatype", "values"),
    [
        ([PIXEL], (1, 1, 1, 3), "UINT8", "24 1b ed"),
        ([DECODED["PNG, 1 bit"][0]], (1, 1, 3, 1), "UINT8", "ff 00 ff"),
        ([DECODED["PNG, palette"][0]], (1, 1, 2, 3), "UINT8", "302010 605040"),
        ([DECODED["PNG, grey with alpha"][0]], (1, 1, 2, 4), "UINT8", "10101020 30303040"),
        ([PIXEL, PIXEL], (2, 1, 1, 3), "UINT8", "241bed 241bed"),
        ([PIXEL], (1, 1, 1, 3), "INT32", "24000000 1b000000 ed000000"),
        ([PIXEL], (1, 1, 1, 3), "FP32", np.float32([36, 27, 237]).tobytes().hex()),
    ],
    ids=[
        "colors in the order blue, green, red",
        "one bit is 0 or 255",
        "palette is resolved",
        "alpha is the last channel",
        "batch",
        "INT32 is little-endian",
        "FP32 from 0 to 255",
    ],
)
def test_bytes_of_the_array(images, dims, datatype, values):
    assert read(images, *dims, datatype=datatype).tobytes() == bytes.fromhex(values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_exif_is_ignored(orientation):
    plain = encode(noise(4, 6, 3), ".jpg")
    array = read([with_orientation(plain, orientation)], 1, 4, 6, 3)
    assert array.tobytes() == read([plain], 1, 4, 6, 3).tobytes()


def test_symbols_with_other_bytes_between_files_are_read():
    symbols = np.frombuffer(b"head" + PIXEL + b"between" + PNG, np.uint8)
    begins = np.array([4, 11 + len(PIXEL)], np.int32)
    strings = BytesArray(begins, begins + np.array([len(PIXEL), len(PNG)], np.int32), symbols)
    assert np.array_equal(reader(2, 1, 1, 3).read(strings, LABEL)[1], cv2.resize(COLOR, (1, 1)).reshape(1, 1, 3))


@pytest.mark.parametrize(
    ("images", "dims"),
    [([PNG], (1, 6, 5, 3)), ([PNG], (1, 3, 3, 3)), ([PNG, PIXEL], (2, 3, 3, 3)), ([encode(GREY)], (1, 6, 5, 1))],
    ids=["as it came", "resized", "a batch", "grey"],
)
@pytest.mark.parametrize("datatype", DTYPES)
def test_array_is_contiguous_and_writable(images, dims, datatype):
    flags = read(images, *dims, datatype=datatype).flags
    assert flags.c_contiguous
    assert flags.writeable


def test_single_image_that_fits_is_not_copied():
    file = encode(np.zeros((500, 500, 3), np.uint8))
    tracemalloc.start()
    try:
        array = read([file], 1, 500, 500, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert array.nbytes < peak < 1.5 * array.nbytes


# --- Precision


def convert(picture, datatype):
    """Convert by the table of precisions, in exact integers."""
    largest = {"UINT8": 255, "INT8": 127, "INT16": 32767, "FP16": 65504}.get(datatype, 65535)
    return np.minimum(picture.astype(np.int64), largest).astype(DTYPES[datatype])


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("datatype", DTYPES)
def test_values_are_converted_to_the_precision_of_the_input(datatype, depth):
    picture = noise(40, 30, 3, dtype=depth)
    array = read([encode(picture)], 1, 40, 30, 3, datatype=datatype)
    assert array.dtype == DTYPES[datatype]
    assert array.tobytes() == convert(picture, datatype).tobytes()


@pytest.mark.parametrize(
    ("datatype", "depth", "value", "expected"),
    [
        *(("INT8", np.uint8, 200, 127), ("INT8", np.uint8, 127, 127), ("INT8", np.uint16, 40000, 127)),
        *(("UINT8", np.uint16, 40000, 255), ("UINT8", np.uint16, 254, 254)),
        *(("INT16", np.uint16, 40000, 32767), ("INT16", np.uint8, 255, 255)),
        *((datatype, np.uint16, 65535, 65535) for datatype in ("UINT16", "INT32", "FP32")),
        ("FP16", np.uint16, 65535, 65504),
    ],
)
def test_values_beyond_a_precision_become_its_largest(datatype, depth, value, expected):
    assert read([encode(np.full((1, 1), value, depth))], 1, 1, 1, 1, datatype=datatype).item() == expected


@pytest.mark.parametrize("datatype", ["BOOL", "INT64", "UINT32", "UINT64"])
def test_unsupported_precision_is_refused(datatype):
    message = (
        f"image 0 cannot be converted to {datatype}, the precision of this input; supported are {', '.join(DTYPES)}"
    )
    assert refusal([PIXEL], 1, 1, 1, 3, datatype=datatype) == message


# --- Resizing

RESIZES = [((6, 5), size) for size in ((3, 4), (12, 11), (1, 1))]
RESIZES += [((64, 48), (31, 57)), ((1, 1), (2, 2)), ((97, 61), (13, 7))]


@pytest.mark.parametrize(("size", "target"), RESIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "INT16", "FP32", "FP64"])
def test_resize_is_opencvs_of_the_converted_values(datatype, depth, channels, size, target):
    picture = noise(*size, channels, dtype=depth)
    array = read([encode(picture)], 1, *target, channels, datatype=datatype)
    assert array.shape == (1, *target, channels)
    assert array.tobytes() == cv2.resize(convert(picture, datatype), target[::-1]).tobytes()


@pytest.mark.parametrize(("size", "target"), RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("datatype", ["INT8", "INT32", "FP16", "BF16"])
def test_other_precisions_are_within_half_a_step_of_the_exact_resize(datatype, depth, channels, size, target):
    picture = noise(*size, channels, dtype=depth)
    array = read([encode(picture)], 1, *target, channels, datatype=datatype)
    assert array.dtype == DTYPES[datatype]
    exact = cv2.resize(convert(picture, datatype).astype(np.float64), target[::-1]).reshape(array.shape)
    step = 1 if datatype.startswith("INT") else exact * 2.0 ** {"FP16": -10, "BF16": -7}[datatype]
    assert (abs(array.astype(np.float64) - exact) <= step / 2 + exact * 1e-6 + 1e-3).all()


@pytest.mark.parametrize(("pair", "expected"), [((0, 1), 0), ((1, 2), 2), ((3, 4), 4), ((100, 127), 114)])
@pytest.mark.parametrize("datatype", ["INT8", "INT32"])
def test_halves_are_rounded_to_even(datatype, pair, expected):
    assert read([encode(np.uint8([pair]))], 1, 1, 1, 1, datatype=datatype).item() == expected


def test_values_are_cut_off_before_they_are_interpolated():
    assert read([encode(np.uint8([[254, 0]]))], 1, 1, 1, 1, datatype="INT8").item() == 64


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "INT8", "INT32"])
def test_largest_values_stay_finite_and_in_range(datatype):
    picture = np.full((7, 9, 3), 65535, np.uint16)
    array = read([encode(picture)], 1, 5, 4, 3, datatype=datatype)
    assert (array == convert(picture[:1, :1], datatype)).all()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 2), (2, 1)])
def test_single_pixel_is_repeated(height, width):
    assert read([PIXEL], 1, height, width, 3).tobytes() == bytes.fromhex("241bed") * (height * width)


@pytest.mark.parametrize("layout", ["NHWC", "N?HWC", "..."])
def test_layouts_that_resize(layout):
    assert read([PNG], 1, 3, 3, 3, layout=layout).tobytes() == cv2.resize(COLOR, (3, 3)).tobytes()


@pytest.mark.parametrize("layout", [None, "N...", "NH...", "NHW?", "N??C", "????", "...C", "N...C"])
def test_layouts_that_take_images_of_the_right_size(layout):
    assert read([PNG], 1, 6, 5, 3, layout=layout).tobytes() == COLOR.tobytes()


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (None, NO_LAYOUT),
        ("N...", NO_LAYOUT),
        ("N??C", 'its layout is N??C, not NHWC; set "layout": "NHWC" in the configuration of the model'),
        ("...C", 'its layout is ...C, not NHWC; set "layout": "NHWC" in the configuration of the model'),
    ],
)
def test_layouts_that_do_not_resize(layout, reason):
    sizes = "image 0 is 6x5 (height x width), the model takes 3x5 (height x width)"
    assert refusal([PNG], 1, 3, 5, 3, layout=layout) == f"{sizes}, and images are not resized: {reason}"


@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        *(("NCHW", "NHWC:NCHW"), ("NCWH", "NHWC:NCWH"), ("CHWN", "NHWC:CHWN"), ("NC...", "NHWC:NCHW")),
        *(("N", "NHWC:NCHW"), ("NHWCD", "NHWC:NCHW"), ("NC??", "NHWC:NCHW")),
    ],
)
def test_other_layout_is_refused_with_the_setting_to_use(layout, setting):
    assert refusal([PIXEL], 1, 3, 1, 1, layout=layout) == (
        f"encoded images need the layout NHWC, this input has {layout}; "
        f'set "layout": "{setting}" in the configuration of the model'
    )


# The image is 6x5.
@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (ANY, ANY, (6, 5)),
        (ANY, 5, (6, 5)),
        (6, ANY, (6, 5)),
        (Dim(1, None), 5, (6, 5)),
        ((1, 3), (1, 3), (3, 3)),
        ((1, 6), (5, 9), (6, 5)),
        ((1, 9), (1, 9), (6, 5)),
        ((7, 9), (8, 9), (7, 8)),
        (2, (1, 3), (2, 3)),
        ((100, 200), 5, (100, 5)),
    ],
)
def test_unbounded_size_is_the_images_within_its_bounds(height, width, expected):
    array = read([PNG], 1, height, width, 3)
    assert array.shape == (1, *expected, 3)
    assert array.tobytes() == cv2.resize(COLOR, expected[::-1]).tobytes()


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((1, ANY, 4, 3), "[1,-1,4,3]"),
        ((1, 7, ANY, 3), "[1,7,-1,3]"),
        ((ANY, 6, 4, 3), "[-1,6,4,3]"),
        ((1, 6, 4, ANY), "[1,6,4,-1]"),
        ((1, Dim(7, None), 5, 3), "[1,7:,5,3]"),
        ((1, (1, 3), ANY, 3), "[1,1:3,-1,3]"),
        ((1, 0, 0, 3), "[1,0,0,3]"),
    ],
)
def test_nothing_is_resized_with_an_unbounded_dim(dims, shape):
    assert f", and images are not resized: the model's shape is {shape}" in refusal([PNG], *dims)


def test_range_without_resizing_takes_sizes_within_it():
    assert read([PNG], 1, (1, 9), (1, 9), 3, layout=None).shape == (1, 6, 5, 3)


def test_all_images_get_the_size_of_the_first():
    array = read([PNG, PIXEL], 2, (1, 9), (1, 9), 3)
    assert np.array_equal(array, [COLOR, np.broadcast_to(ONE, (6, 5, 3))])


def test_images_of_different_sizes_are_each_resized():
    pictures = (ONE, COLOR, noise(9, 9, 3))
    array = read(map(encode, pictures), 3, 3, 4, 3)
    assert np.array_equal(array, [cv2.resize(picture, (4, 3)) for picture in pictures])


@pytest.mark.parametrize(
    ("dims", "layout", "reason"),
    [
        ((2, ANY, ANY, 3), "NHWC", f'the model\'s shape is [2,-1,-1,3]; {SET_SHAPE} "(2,224,224,3)"'),
        ((ANY, 6, 5, 3), "NHWC", f'the model\'s shape is [-1,6,5,3]; {SET_SHAPE} "(1,6,5,3)"'),
        ((2, 6, 5, 3), None, NO_LAYOUT),
    ],
)
def test_images_of_different_sizes_are_refused_without_resizing(dims, layout, reason):
    sizes = "image 1 is 1x1 (height x width), image 0 is 6x5 (height x width)"
    assert refusal([PNG, PIXEL], *dims, layout=layout) == f"{sizes}, and images are not resized: {reason}"


@pytest.mark.parametrize("target", [(1, 40000), (40000, 1)])
def test_target_may_be_longer_than_16_bits_count(target):
    assert read([PIXEL], 1, *target, 3).shape == (1, *target, 3)


# --- Channels


@pytest.mark.parametrize(
    ("picture", "channels", "came"),
    [
        (GREY, 2, "1 channel"),
        (GREY, 4, "1 channel"),
        (COLOR, 1, "3 channels"),
        (COLOR, 4, "3 channels"),
        (noise(6, 5, 4), 1, "4 channels"),
    ],
)
def test_other_numbers_of_channels_are_not_converted(picture, channels, came):
    hint = "; convert it to grey" if channels == 1 else ""
    assert refusal([encode(picture)], 1, 6, 5, channels) == f"image 0 has {came}, the model takes {channels}{hint}"


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32", "FP16"])
@pytest.mark.parametrize("size", [(6, 5), (3, 4)])
def test_grey_image_becomes_three_equal_channels_for_a_three_channel_input(depth, datatype, size):
    grey = noise(6, 5, 1, dtype=depth)
    array = read([encode(grey)], 1, *size, 3, datatype=datatype)
    assert array.tobytes() == read([encode(np.repeat(grey, 3, axis=2))], 1, *size, 3, datatype=datatype).tobytes()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(6, 5), (3, 4)])
def test_alpha_is_dropped_for_a_three_channel_input_before_the_resize(depth, size):
    picture = noise(6, 5, 4, dtype=depth)
    color = np.ascontiguousarray(picture[:, :, :3])
    assert read([encode(picture)], 1, *size, 3).tobytes() == read([encode(color)], 1, *size, 3).tobytes()


def test_grey_color_and_alpha_mix_in_a_batch_for_a_three_channel_input():
    pictures = [GREY, COLOR, np.dstack((COLOR, COLOR[:, :, 0]))]
    array = read([encode(picture) for picture in pictures], 3, 6, 5, 3)
    assert array[0].tobytes() == np.repeat(GREY.reshape(6, 5, 1), 3, axis=2).tobytes()
    assert array[1].tobytes() == array[2].tobytes() == COLOR.tobytes()


@pytest.mark.parametrize(("picture", "channels"), [(GREY, 1), (COLOR, 3), (noise(6, 5, 4), 4)])
def test_unbounded_number_of_channels_is_the_first_images(picture, channels):
    assert read([encode(picture)], 1, 6, 5, ANY).shape == (1, 6, 5, channels)


def test_range_of_channels_takes_numbers_within_it():
    assert read([PNG], 1, 6, 5, (1, 3)).shape == (1, 6, 5, 3)
    assert refusal([encode(noise(6, 5, 4))], 1, 6, 5, (1, 3)) == "image 0 has 4 channels, the model takes 3"


def test_further_images_need_the_channels_of_the_first():
    assert refusal([PNG, encode(GREY)], 2, 6, 5, ANY) == "image 1 has 1 channel, the model takes 3"


def test_message_for_an_nchw_model_without_a_layout_names_the_setting():
    assert refusal([PNG], 1, 3, 6, 5, layout=None) == f"image 0 has 3 channels, the model takes 5; {NO_LAYOUT}"


@pytest.mark.parametrize(("channels", "hint"), [(1, "; convert it to grey"), (4, "")])
def test_message_about_channels_names_no_layout_where_the_model_has_them_last(channels, hint):
    message = refusal([PNG], 1, 6, 5, channels, layout=None)
    assert message == f"image 0 has 3 channels, the model takes {channels}{hint}"


# --- Batches


@pytest.mark.parametrize(
    ("batch", "count", "message"),
    [
        (1, 2, "got 2 images, the model takes 1"),
        (2, 1, "got 1 image, the model takes 2"),
        (1, 0, "got 0 images, the model takes 1"),
        ((2, 4), 1, "got 1 image, the model takes 2:4"),
        ((2, 4), 5, "got 5 images, the model takes 2:4"),
        (ANY, 0, "got no image, at least one is needed"),
        (0, 0, "got no image, at least one is needed"),
        ((0, 2), 0, "got no image, at least one is needed"),
    ],
)
def test_wrong_number_of_images_is_refused(batch, count, message):
    assert refusal([PIXEL] * count, batch, 1, 1, 3) == message


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 3), ((2, 4), 2), ((2, 4), 4), (ANY, 5)])
def test_allowed_number_of_images_is_read(batch, count):
    assert read([PIXEL] * count, batch, 1, 1, 3).shape == (count, 1, 1, 3)


@pytest.mark.parametrize(("shape", "written"), [((1, 1), "[1,1]"), ((), "[]"), ((1, 0), "[1,0]")])
def test_images_with_another_shape_are_refused(shape, written):
    strings = files(*([PIXEL] if 0 not in shape else []), shape=shape)
    assert refusal_of(reader(1, 1, 1, 3), strings) == f"encoded images need the shape [n], got {written}"


# --- Files that are not images

NINE_BLOCKS = gif(5, 6, [256] * 8, block=1)
BROKEN = {
    "text": b"these are no bytes of an image",
    "one byte": b"B",
    "the signature of a GIF": b"GIF89a",
    "a GIF without a picture": gif(5, 6, [])[:13] + b"\x3b",
    "a GIF of no pixels": gif(0, 5, [256, 257]),
    "a GIF of codes of two bits": gif(5, 6, [2, 0, 1, 3], bits=1),
    "a GIF of too few pixels": gif(5, 6, [256, 1, 2, 257]),
    "a GIF whose picture is larger than its screen": gif(4, 5, CODES)[:18] + gif(5, 6, CODES)[18:],
    "a GIF of a million empty comments": gif(5, 6, [256, 257], extensions=b"\x21\xfe\0" * 1_000_000),
    "a GIF of a million blocks of one byte": NINE_BLOCKS[:-20] + NINE_BLOCKS[-20:-2] * 112_500 + NINE_BLOCKS[-2:],
    "a TIFF": encode(COLOR, ".tiff"),
    "a JPEG 2000": encode(noise(64, 64, 3), ".jp2"),
    "the signature of a BMP": b"BM",
    "the signature of a PNG": PNG[:8],
    "a BMP of no pixels": b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 0, 5, 1, 24, 0) + bytes(20),
    "a PNG whose first chunk is another": PNG[:12] + b"tEXt" + PNG[16:],
    "a PNG with a wrong checksum": PNG[:30] + b"\0\0" + PNG[32:],
    "a PNG with a second header": PNG[:33] + PNG[8:],
    "a PNG without an end": PNG[:-12],
    "a JPEG without a frame": b"\xff\xd8\xff\xd9",
    "a JPEG that begins with a scan": b"\xff\xd8\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9",
    "a JPEG of zeros": b"\xff\xd8\xff" + bytes(100),
    "a JPEG of segments and nothing else": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000,
    "a RIFF that is not WebP": b"RIFF" + bytes(4) + b"WAVE" + bytes(40),
    "a PNM without numbers": b"P6 # 5 6",
    "a PNM with a number of too many digits": b"P5 1 00000000012345678901 255 " + bytes(9),
    "a PGM without values": b"P5 10 10 255 3",
}


@pytest.mark.parametrize("file", BROKEN.values(), ids=BROKEN)
def test_undecodable_file_is_refused_with_its_index(file):
    message = f"image 1 cannot be decoded, expected a complete file in one of {FORMATS}"
    assert refusal([PIXEL, file], ANY, 1, 1, 3) == message


def test_opencv_logs_nothing_about_a_file(capfd):
    """Only libpng logs a line, which cannot be switched off."""
    for file in BROKEN.values():
        assert "cannot be decoded" in refusal([file], 1, 1, 1, 3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) < len(BROKEN)
    assert all(line.startswith("libpng error: ") for line in lines)


@pytest.mark.parametrize("count", [0, 1])
def test_empty_image_is_refused_with_its_index(count):
    message = f"image {count} is empty, expected a complete file in one of {FORMATS}"
    assert refusal([PIXEL] * count + [b""], ANY, 1, 1, 3) == message


@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".bmp", ".ppm", ".webp", ".gif"])
def test_truncated_file_is_refused(extension, part):
    file = encode(noise(60, 50, 3), extension)
    assert "image 0 cannot be decoded" in refusal([file[: int(len(file) * part)]], 1, 60, 50, 3)


# --- Limits


@pytest.mark.parametrize("name", DECODED)
def test_pixels_are_counted_from_the_header_of_every_format(name):
    file, _ = DECODED[name]
    height, width = decode(file).shape[:2]
    pixels = height * width
    message = refusal([file], 1, ANY, ANY, ANY, datatype="FP32", limits=ImageLimits(pixels - 1, 2**20))
    assert message == f"image 0 has {pixels} pixels, at most {pixels - 1} are allowed"


def test_image_at_the_limit_is_read():
    assert read([PNG], 1, 6, 5, 3, limits=ImageLimits(30, 90)).shape == (1, 6, 5, 3)


def test_pixels_of_all_images_are_limited():
    message = "the images have 60 pixels together, at most 59 are allowed"
    assert refusal([PNG, PNG], 2, 1, 1, 3, limits=ImageLimits(30, 59)) == message
    assert read([PNG, PNG], 2, 1, 1, 3, limits=ImageLimits(30, 60)).shape == (2, 1, 1, 3)


@pytest.mark.parametrize("dims", [(1, 6, 5, 3), (1, 5, 6, 3)])
def test_values_of_the_array_are_limited(dims):
    message = f"the decoded images have the shape [{','.join(map(str, dims))}] with 90 values, at most 89"
    assert refusal([PNG], *dims, limits=ImageLimits(30, 89)) == f"{message} are allowed"


FRAME = JPEG.index(b"\xff\xc0")
LARGE = {
    "GIF": gif(30_000, 30_000, [256, 257]),
    "PNG": png_bomb(30_000),
    "BMP": b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 30_000, 30_000, 1, 24, 0) + bytes(20),
    "JPEG": JPEG[: FRAME + 5] + struct.pack(">HH", 30_000, 30_000) + JPEG[FRAME + 9 :],
    "PNM": b"P5\n30000 30000\n255\n" + bytes(50),
    "WebP": struct.pack("<4sI8sIIHBHB9x", b"RIFF", 42, b"WEBPVP8X", 10, 0, 29_999, 0, 29_999, 0),
}


@pytest.mark.parametrize("file", LARGE.values(), ids=LARGE)
def test_picture_of_900_million_pixels_is_refused(file):
    assert refusal([file], 1, 224, 224, 3) == "image 0 has 900000000 pixels, at most 67108864 are allowed"


def text(size):
    """Make the zTXt chunk of a PNG that unpacks to `size` bytes."""
    return b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * size)


BOMBS = LARGE | {
    "PNG with a chunk of 4 GB": PNG[:33] + b"\xff\xff\xff\xf0tEXt" + PNG[33:],
    "PNG with a chunk of 4 GB after an end without data": PNG[:33] + PNG[-12:] + b"\xff\xff\xff\xf0tEXt" + PNG[33:],
    "GIF of 3 KB that only clears": gif(1, 1, [4] * 8000, bits=2),
    "PNG with 60 texts of 8 MB": png(1, 1, 8, 0, b"\0\0", *[text(7_900_000)] * 60),
}

# A process of its own, for the peak of this one is that of all tests.
BOMB_PROGRAM = """
import resource, time
from test_images import ANY, BOMBS, PIXEL, read, refusal
read([PIXEL], 1, 1, 1, 3)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for bomb in BOMBS.values():
    refusal([bomb], 1, ANY, ANY, ANY)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_cost_neither_time_nor_memory():
    """All together take less than 20 ms and 1 MB."""
    program = [sys.executable, "-c", BOMB_PROGRAM]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(program, env=environ, capture_output=True, check=True, text=True).stdout
    seconds, kilobytes = map(float, output.split())
    assert seconds < 0.02
    assert kilobytes < 1024


def test_png_may_have_16_packed_texts():
    assert read([png(1, 1, 8, 0, b"\0\0", *[text(10)] * 16)], 1, 1, 1, 1).shape == (1, 1, 1, 1)
    assert "cannot be decoded" in refusal([png(1, 1, 8, 0, b"\0\0", *[text(10)] * 17)], 1, 1, 1, 1)


def test_png_may_have_1000_empty_chunks():
    chunks = [(b"teSt", b"")] * 1000
    assert read([png(1, 1, 8, 0, b"\0\0", *chunks)], 1, 1, 1, 1).shape == (1, 1, 1, 1)
    assert "cannot be decoded" in refusal([png(1, 1, 8, 0, b"\0\0", *chunks * 2)], 1, 1, 1, 1)


# A GIF of 40x50 may clear its table 256 + 2000 / 200 times.
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("code", [0, 1], ids=["clears", "ends"])
def test_gif_may_clear_its_table_up_to_the_limit(bits, code):
    picture = noise(50, 40) >> 8 - bits
    head, rest = picture.ravel().tolist()[:1500], picture.ravel().tolist()[1500:]
    file = gif(40, 50, [*head, *[2**bits + code] * 266, *rest], bits=bits)
    array = read([file], 1, 50, 40, 3)
    assert (array[0, :, :, 0] == np.where(picture == 1, 255, picture)).all()
    file = gif(40, 50, [*head, *[2**bits + code] * 267, *rest], bits=bits)
    assert decode(file) is not None
    assert "cannot be decoded" in refusal([file], 1, 50, 40, 3)


def test_uncompressed_gif_is_read():
    picture = noise(480, 640)
    array = read([gif(640, 480, plain_codes(picture))], 1, 480, 640, 3)
    assert (array[0, :, :, 1] == np.where(picture == 1, 255, picture)).all()


def count_clears(data, bits):
    """Read the codes of a GIF one by one."""
    place, clears, table = 0, 0, 2**bits + 1
    while place < 8 * len(data):
        size = min(table.bit_length(), 12)
        code = int.from_bytes(data[place // 8 : place // 8 + 3], "little") >> place % 8 & (1 << size) - 1
        empties = code in (2**bits, 2**bits + 1)
        clears, table = (clears + 1, 2**bits + 1) if empties else (clears, min(table + 1, 4096))
        place += size
    return clears


@pytest.mark.parametrize("bits", range(2, 12))
@pytest.mark.parametrize("size", [0, 1, 2, 50, 9000])
def test_clears_of_a_gif_are_counted_as_by_a_decoder(bits, size):
    data = noise(size, seed=bits).tobytes()
    clears = count_clears(data, bits)
    assert _count_gif_clears(data, bits, clears) == clears
    assert clears == 0 or _count_gif_clears(data, bits, clears - 1) > clears - 1


PROGRESSIVE = encode(noise(64, 64), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)


def repeat_last_scan(jpeg, times):
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * times + jpeg[-2:]


def test_jpeg_may_have_64_scans():
    file = repeat_last_scan(PROGRESSIVE, 64 - PROGRESSIVE.count(b"\xff\xda"))
    assert read([file], 1, 64, 64, 1).shape == (1, 64, 64, 1)


def test_jpeg_with_more_scans_is_refused_though_opencv_decodes_it():
    """A scan of a few bytes costs as much as the picture has pixels."""
    file = repeat_last_scan(PROGRESSIVE, 65 - PROGRESSIVE.count(b"\xff\xda"))
    assert decode(file) is not None
    assert "cannot be decoded" in refusal([file], 1, 64, 64, 1)


def test_scans_of_a_sequential_jpeg_are_counted_if_the_first_lacks_components():
    scans = bytes.fromhex("ffda 0008 01 01 00 003f00 ffd0") * 100_000
    assert "cannot be decoded" in refusal([JPEG[: JPEG.index(b"\xff\xda")] + scans + b"\xff\xd9"], 1, 6, 5, 3)


@pytest.mark.parametrize("file", [PROGRESSIVE, encode(noise(64, 64), ".jpg")], ids=["progressive", "baseline"])
def test_scans_after_the_end_of_a_jpeg_or_in_its_metadata_are_ignored(file):
    comment = b"\xff\xfe" + struct.pack(">H", 202) + b"\xff\xda" * 100
    array = read([file[:2] + comment + file[2:] + b"\xff\xda" * 100], 1, 64, 64, 1)
    assert array.tobytes() == read([file], 1, 64, 64, 1).tobytes()


# --- Any bytes


def outcome(file, **options):
    """Return the image as OpenCV alone would decode it; None if the file is refused."""
    try:
        return read([file], 1, ANY, ANY, ANY, datatype="FP32", **options)
    except InvalidRequestError:
        return None


SMALL = ImageLimits(2**16, 2**18)
SEEDS = [file for file, _ in DECODED.values()]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(file):
    outcome(file, limits=SMALL)


@given(st.sampled_from([file[:32] for file in SEEDS]), st.binary(max_size=200))
def test_any_bytes_after_a_real_header_are_read_or_refused(head, rest):
    outcome(head + rest, limits=SMALL)


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 60),
)
@settings(max_examples=300)
def test_picture_with_changed_bytes_is_refused_or_has_the_size_of_its_header(file, changes, cut):
    """An image that OpenCV decodes has the pixels of its header, whatever the file."""
    changed = bytearray(file)
    for position, value in changes:
        changed[position % len(changed)] = value
    changed = bytes(changed[: len(changed) - cut])
    array = outcome(changed, limits=SMALL)
    if array is not None:
        pixels = array.shape[1] * array.shape[2]
        assert outcome(changed, limits=ImageLimits(pixels, 2**18)) is not None
        assert outcome(changed, limits=ImageLimits(pixels - 1, 2**18)) is None


# --- The work of a request

WORK = r"up to image (\d+), decoding \d+ pixels takes as much work as \d+ usual ones, at most \d+ are"


SLOW = {
    "3000 GIFs that clear their table": lambda: [gif(1, 1, [4] * 255 + [0, 5], bits=2)] * 3000,
    "80,000 pixels": lambda: [PIXEL] * 80_000,
    "100 texts of 8 MB": lambda: [png(1, 1, 8, 0, b"\0\0", text(7_900_000))] * 100,
    "10,000 profiles": lambda: [png(1, 1, 8, 0, b"\0\0", (b"iCCP", b"x\0\0" + zlib.compress(bytes(10**6))))] * 10_000,
    "10,000 times 900 chunks": lambda: [png(1, 1, 8, 0, b"\0\0", *[(b"tEXt", b"a\0")] * 900)] * 10_000,
    "1000 JPEGs of 9000 comments": lambda: [JPEG[:2] + b"\xff\xfe\0\2" * 9000 + JPEG[2:]] * 1000,
    "100 GIFs with 1 MB after them": lambda: [gif(1, 1, [4, 0, 5], bits=2) + bytes(10**6)] * 100,
    "60 PNGs that unpack to 100 MB": lambda: [png(8, 8, 8, 0, bytes(10**8))] * 60,
}


def test_slow_files_are_refused_before_they_are_decoded():
    """1.8 KB of gzip that unpacked to the first of these blocked a worker for 7 s."""
    seconds = {}
    for name, make in SLOW.items():
        strings, reading = files(*make()), reader(ANY, ANY, ANY, ANY)
        started = time.process_time()
        message = refusal_of(reading, strings)
        seconds[name] = time.process_time() - started
        assert re.match(f"{WORK}|image \\d+ has more data than its pixels need", message), name
    assert max(seconds.values()) < 0.5, seconds


def test_work_is_limited_by_the_allowed_pixels():
    """Scans cost more than pixels."""
    file = repeat_last_scan(PROGRESSIVE, 64 - PROGRESSIVE.count(b"\xff\xda"))
    assert re.search(WORK, refusal([file] * 400, ANY, ANY, ANY, ANY, limits=ImageLimits(request=2**21)))


def test_too_many_images_are_refused_before_they_are_measured():
    many = BytesArray(np.zeros(200_000, np.int32), np.zeros(200_000, np.int32), np.zeros(0, np.uint8))
    for reading in (reader(ANY, ANY, ANY, ANY), ShardedImageReader(reader(1, ANY, ANY, ANY))):
        assert refusal_of(reading, many) == "got 200000 images, at most 83886 are allowed"


USEFUL = {
    "a GIF that is not compressed": lambda: [gif(1000, 1000, plain_codes(noise(1000, 1000)))],
    "a JPEG of ten scans": lambda: [encode(noise(1000, 1000, 3), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)],
    "a large PNG": lambda: [encode(noise(1000, 1000, 3))],
    "500 PNGs": lambda: [encode(noise(28, 28))] * 500,
    "10,000 digits": lambda: [encode(noise(28, 28))] * 10_000,
    "100 photos": lambda: [encode(cv2.GaussianBlur(noise(224, 224, 3), (0, 0), 2), ".jpg")] * 100,
    "five texts of 8 MB": lambda: [png(1, 1, 8, 0, b"\0\0", *[text(7_900_000)] * 5)],
}


@pytest.mark.parametrize("make", USEFUL.values(), ids=USEFUL)
def test_useful_batches_are_decoded(make):
    images = make()
    assert len(read(images, ANY, ANY, ANY, ANY)) == len(images)


@pytest.mark.parametrize(("width", "height", "bits", "color"), [(300, 300, 8, 2), (1, 5000, 1, 0), (999, 10, 16, 6)])
def test_png_may_have_twice_the_data_of_its_rows_and_64_kib(width, height, bits, color):
    room = 2 * height * (1 + (width * bits * {2: 3, 0: 1, 6: 4}[color] + 7) // 8) + 2**16
    assert [
        is_honest(np.frombuffer(png(width, height, bits, color, os.urandom(size)), np.uint8))
        for size in (room // 3, room, room + 1, 10 * room)
    ] == [True, True, False, False]


@pytest.mark.parametrize(
    "data", [b"", b"garbage", zlib.compress(bytes(2**20))[:-100]], ids=["none", "broken", "cut off"]
)
def test_invalid_data_of_a_png_are_left_to_opencv(data):
    assert is_honest(np.frombuffer(with_data(png(1000, 2000, 8, 0, b""), chunk(b"IDAT", data)), np.uint8))


def test_data_of_a_png_are_unpacked_across_its_chunks():
    data = zlib.compress(os.urandom(10**6))
    chunks = [chunk(b"IDAT", data[start : start + 1000]) for start in range(0, len(data), 1000)]
    assert not is_honest(np.frombuffer(with_data(png(10, 10, 8, 0, b""), *chunks), np.uint8))


def test_shards_share_one_limit_of_work():
    message = shards_refusal([gif(1, 1, [4] * 255 + [0, 5], bits=2)] * 100, 1, 1, 1, 3)
    assert re.search(WORK, message)[1] == "34"


# --- Images that become the shards of a request to a pipeline


def shards(images, *dims, **options):
    return ShardedImageReader(reader(*dims, **options)).read(files(*images), LABEL)


def test_every_image_is_a_shard():
    pictures = [noise(6, 8, 3, seed=seed) for seed in range(3)]
    array = shards([encode(picture) for picture in pictures], 1, 6, 8, 3)
    assert array.shape == (3, 1, 6, 8, 3)
    assert (array[:, 0] == pictures).all()


def test_shards_are_resized_like_the_images_of_a_model():
    pictures = [noise(6, 8, 3), noise(9, 5, 3)]
    array = shards([encode(picture) for picture in pictures], 1, 4, 4, 3)
    for part, picture in zip(array, pictures, strict=True):
        assert (part == read([encode(picture)], 1, 4, 4, 3)).all()


def shards_refusal(images, *dims, **options):
    return refusal_of(ShardedImageReader(reader(*dims, **options)), files(*images))


def test_problem_of_a_shard_is_reported_with_its_index():
    grey, color, alpha, high = (encode(noise(*shape)) for shape in ((4, 4, 1), (4, 4, 3), (4, 4, 4), (5, 4, 3)))
    assert shards_refusal([color, b"garbage"], 1, 4, 4, 3).startswith("image 1 cannot be decoded")
    assert shards_refusal([color, grey], 1, 4, 4, 4) == "shard 0: image 0 has 3 channels, the model takes 4"
    assert shards_refusal([alpha, grey], 1, 4, 4, 4) == "shard 1: image 0 has 1 channel, the model takes 4"
    assert shards_refusal([color, high], 1, ANY, 4, 3) == "shard 1 has the shape [1,5,4,3], shard 0 [1,4,4,3]"
    assert shards_refusal([], 1, 4, 4, 3) == "encoded images need the shape [n], got [0]"


def test_shards_are_limited_together():
    images = [encode(noise(4, 4, 3))] * 3
    limits = ImageLimits(image=100, request=40)
    assert shards_refusal(images, 1, 4, 4, 3, limits=limits).startswith("the images have 48 pixels together")
    limits = ImageLimits(image=100, request=400)
    assert shards_refusal(images, 1, 9, 9, 3, limits=limits).endswith(
        "the decoded images have the shape [3,1,9,9,3] with 729 values, at most 400 are allowed"
    )


# --- Examples


@pytest.mark.parametrize(
    ("dims", "options", "size"),
    [
        ((1, 8, 9, 3), {}, (8, 9, 3)),
        ((1, (0, None), (4, 8), 1), {}, (None, None, 1)),
        ((1, 8, 8, (0, None)), {}, (8, 8, None)),
        ((1, 8, 8, 3), {"layout": None}, (8, 8, 3)),
        ((1, 3, 8, 8), {"layout": "NCHW"}, None),
        ((1, 3, 8, 8), {"layout": None}, None),
        ((1, 8, 8, 3), {"datatype": "INT64"}, None),
    ],
)
def test_the_size_of_the_images_that_an_input_expects_is_known(dims, options, size):
    assert reader(*dims, **options).expected == size


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.broadcast_to(np.float32(0), (1, 224, 224, 3)), {}),
        (np.broadcast_to(np.uint8(7), (3, 100, 50, 1)), {}),
        (np.broadcast_to(np.uint8(7), (1, 100, 50, 4)), {"layout": None}),
        (np.arange(48, dtype=np.float32).reshape(2, 4, 2, 3), {"layout": None}),
    ],
)
def test_files_that_are_drawn_decode_to_the_array(array, options):
    datatype = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    decoder = reader(*array.shape, datatype=datatype, **options)
    drawn = decoder.draw(array)
    assert sum(map(len, drawn)) < 1000
    assert np.array_equal(decoder.read(files(*drawn), LABEL), array)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.full((1, 2, 2, 3), 0.5, np.float32), {"datatype": "FP32"}),
        (np.full((1, 2, 2, 3), 256, np.float32), {"datatype": "FP32"}),
        (np.broadcast_to(np.uint8(0), (1, 2, 2, 2)), {}),
        (np.broadcast_to(np.uint8(0), (1, 3, 2, 2)), {"layout": "NCHW"}),
        (np.broadcast_to(np.uint8(0), (17, 2, 2, 3)), {}),
        (np.broadcast_to(np.uint8(0), (1, 4096, 4096, 3)), {}),
        (np.zeros((1, 512, 512, 3), np.uint8), {}),
        (np.zeros((1, 0, 2, 3), np.uint8), {}),
    ],
)
def test_nothing_is_drawn_for_an_array_that_no_small_image_decodes_to(array, options):
    assert reader(*(((0, None),) * 4), **options).draw(array) is None


def test_files_that_are_drawn_for_shards_decode_to_the_array():
    decoder = ShardedImageReader(reader(1, 64, 64, 3))
    array = np.broadcast_to(np.uint8(3), (2, 1, 64, 64, 3))
    assert np.array_equal(decoder.read(files(*decoder.draw(array)), LABEL), array)
    assert decoder.expected == (64, 64, 3)
    assert ShardedImageReader(reader(1, 64, 64, 2)).draw(np.zeros((2, 1, 64, 64, 2), np.uint8)) is None
