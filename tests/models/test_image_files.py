"""Headers of encoded images; test_images.py has the limits that follow from them."""

import cv2
import numpy as np
import pytest
from calls import called
from gif_writer import gif

from ovms_rest.models.image_files import FORMATS, IMAGE_WORK, is_honest, measure

EXTENSIONS = {"BMP": ".bmp", "GIF": ".gif", "JPEG": ".jpg", "PNG": ".png", "PNM": ".ppm", "WebP": ".webp"}


def encode(extension, width=7, height=5):
    _, file = cv2.imencode(extension, np.zeros((height, width, 3), np.uint8))
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_header_of_every_format_has_the_size(name):
    picture = measure(encode(EXTENSIONS[name]))
    assert (picture.width, picture.height, picture.pixels) == (7, 5, 35)
    assert picture.work > IMAGE_WORK


@pytest.mark.parametrize("name", FORMATS)
def test_larger_picture_is_more_work(name):
    small, large = (measure(encode(EXTENSIONS[name], side, side)) for side in (8, 256))
    assert small.work < large.work


@pytest.mark.parametrize(
    "content", [b"", b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF1234WAVE", b"II*\0"]
)
def test_other_files_and_truncated_headers_have_no_picture(content):
    assert measure(np.frombuffer(content, np.uint8)) is None


@pytest.mark.parametrize(
    ("channels", "dtype", "per_pixel"),
    [((), np.uint8, 1), ((3,), np.uint8, 1.5), ((4,), np.uint8, 2), ((), np.uint16, 1), ((4,), np.uint16, 4)],
)
def test_pixel_of_a_png_is_work_by_its_bytes(channels, dtype, per_pixel):
    """Each of 16 bits with alpha takes 42 ns."""
    small, large = (cv2.imencode(".png", np.zeros((side, side, *channels), dtype))[1] for side in (100, 300))
    work = measure(large).work - measure(small).work - (len(large) - len(small)) / 4
    assert work / (300**2 - 100**2) == pytest.approx(per_pixel, rel=0.01)


@pytest.mark.parametrize(
    ("channels", "quality", "per_byte"),
    [(3, 100, 4.25), (4, 100, 4.25), (3, 101, 0.25)],
    ids=["lossy", "alpha", "lossless"],
)
def test_lossy_webp_is_work_by_the_bytes_of_its_file(channels, quality, per_byte):
    """Noise takes 59 ns per pixel, and a smooth picture 7."""
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, channels), np.uint8)
    _, file = cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, quality])
    assert measure(file).work == int(IMAGE_WORK + 100 * 100 + per_byte * len(file))


COMMENT = b"\x21\xfe" + b"\1a" * 1000 + b"\0"


@pytest.mark.parametrize(
    "file",
    [
        gif(1, 1, [4, 0, 5], bits=2, extensions=COMMENT),
        gif(1, 1, [4, 0, 5], bits=2, extensions=COMMENT * 1000),
        gif(100, 100, [4, *[0, 4] * 5000, 5], bits=2, block=1),
    ],
    ids=["a comment", "1000 comments", "an image"],
)
def test_blocks_of_a_gif_are_visited_without_a_call_for_each(file):
    """Those of 64 MiB took 1.5 s before they were refused."""
    assert len(called(measure, np.frombuffer(file, np.uint8))) < 900


def test_gif_with_far_more_data_than_its_pixels_need_is_refused():
    data = b"".join(b"\xff" + bytes(255) for _ in range(4200))
    room, over = (gif(1, 1, [4, 0, 5], bits=2)[:-2] + data[: 256 * count] + b"\0;" for count in (4000, 4200))
    assert measure(np.frombuffer(room, np.uint8)) is not None
    assert measure(np.frombuffer(over, np.uint8)) is None


def test_jpeg_with_more_than_1_mib_between_its_segments_is_refused():
    """Searching 64 MiB of 0xFF for a marker took 0.9 s."""
    file = encode(".jpg", 30, 20).tobytes()
    room, over = (np.frombuffer(file[:2] + b"\xff" * size + file[2:], np.uint8) for size in (2**20 - 2, 2**20))
    assert measure(room)[:2] == (30, 20)
    assert cv2.imdecode(room, cv2.IMREAD_COLOR) is not None
    assert measure(over) is None


def test_ordinary_png_is_honest():
    assert is_honest(encode(".png", 300, 300))
