"""Headers of encoded images; test_images.py has the limits that follow from them."""

import cv2
import numpy as np
import pytest

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


def test_ordinary_png_is_honest():
    assert is_honest(encode(".png", 300, 300))
