"""`Inference-Header-Content-Length`: which values are valid, and what each means for a body."""

import json

import pytest
from decoded_requests import HEADER, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.header_length import read_header_length


@pytest.mark.parametrize(
    ("text", "length"),
    [
        *(("0", 0), ("000", 0), ("0,00", 0), ("10", 10), ("0" * 1000 + "7", 7)),
        *((text, 5) for text in ("5", " 5\t", "005", "5,5", "5, 5 ,005")),
    ],
)
def test_valid_length_is_read(text, length):
    header = read_header_length(text)
    assert (header.length, header.check(10)) == (length, length)


def test_without_the_header_the_whole_body_is_json():
    header = read_header_length(None)
    assert (header.length, header.check(10)) == (0, None)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-1", "-0", "+5", "5.0", "5e0", "0x5", "5_0", "5 5", "five", "5a", "5,6", "5,", ",", ",5", "5,5,6"),
        *("5;5", "\u0665", "\u00b2", "5\0", "5\n"),
    ],
)
def test_invalid_length_is_rejected_when_the_body_is_there(text):
    header = read_header_length(text)
    assert header.length == 0
    assert refused(header.check, 100) == (
        f"{HEADER} is {json.dumps(text, ensure_ascii=False)}, expected one integer from 0 to the body's length"
    )


@pytest.mark.parametrize("text", ["11", "011", "11,11", str(2**63), "9" * 18, "9" * 19, "1" + "0" * 18])
def test_length_beyond_the_body_is_rejected(text):
    assert refused(read_header_length(text).check, 10) == f'{HEADER} is "{text}", but the body has only 10 bytes'


def test_length_of_very_many_digits_is_rejected():
    assert refused(read_header_length("9" * 10_000).check, 10).endswith("but the body has only 10 bytes")


@settings(max_examples=300)
@given(st.text(max_size=12) | st.text("0123456789, \t+-._x", max_size=30), st.integers(0, 2**40))
def test_any_text_is_read_or_rejected(text, size):
    header = read_header_length(text)
    try:
        length = header.check(size)
    except InvalidRequestError:
        return
    assert 0 <= length == header.length <= size
    assert {int(item) for item in text.split(",")} == {length}
