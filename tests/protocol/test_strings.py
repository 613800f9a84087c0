"""BYTES: arrays of byte strings, their layout on the wire and as rows of a matrix."""

import base64
import tracemalloc

import numpy as np
import pytest
from decoded_requests import refused

from ovms_rest.protocol.strings import BytesArray, decode_base64, from_matrix, pack, to_matrix, unpack

LISTS = {
    "none": [],
    "one": [b"abc"],
    "one empty": [b""],
    "empty ones": [b"", b"a", b"", b""],
    "NULs": [b"a\0", b"\0", b"\0\0b\0"],
    "no UTF-8": [b"\xff\xfe", b"\x80"],
    "long": [b"x" * 70_000, b"y"],
}


# --- BytesArray


@pytest.mark.parametrize("elements", LISTS.values(), ids=LISTS)
def test_array_returns_its_elements(elements):
    assert BytesArray.of(elements, (len(elements),)).elements() == elements


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2), (1, 6)])
def test_array_has_the_shape_it_was_made_with(shape):
    array = BytesArray.of([b"a", b"", b"ccc", b"d", b"e", b"f"], shape)
    assert array.shape == array.begins.shape == array.ends.shape == shape
    assert array.elements() == [b"a", b"", b"ccc", b"d", b"e", b"f"]


@pytest.mark.parametrize(("elements", "shape"), [([b"a"], ()), ([], (0,)), ([], (2, 0, 3))])
def test_scalars_and_empty_arrays_keep_their_shape(elements, shape):
    array = BytesArray.of(elements, shape)
    assert (array.shape, array.elements()) == (shape, elements)


def test_array_can_be_made_of_an_iterator():
    assert BytesArray.of(iter([b"a", b"b"]), (2,)).elements() == [b"a", b"b"]


def test_elements_are_contiguous():
    array = BytesArray.of([b"ab", b"", b"cde"], (3,))
    assert array.begins.tolist() == [0, 2, 2]
    assert array.ends.tolist() == [2, 2, 5]
    assert array.symbols.tobytes() == b"abcde"


def test_parts_have_the_types_of_a_string_tensor_pack():
    array = BytesArray.of([b"ab"], (1,))
    assert (array.begins.dtype, array.ends.dtype, array.symbols.dtype) == (np.int32, np.int32, np.uint8)
    assert array.symbols.flags.writeable


def test_symbols_may_hold_bytes_outside_all_elements():
    array = BytesArray(np.array([4, 1], np.int32), np.array([6, 1], np.int32), np.frombuffer(b"....ab..", np.uint8))
    assert array.elements() == [b"ab", b""]


def test_elements_come_in_row_major_order_whatever_the_memory_order():
    begins, ends = np.array([[0, 1, 2], [3, 4, 5]], np.int32), np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    array = BytesArray(begins.T, ends.T, np.frombuffer(b"abcdef", np.uint8))
    assert array.shape == (3, 2)
    assert array.elements() == [b"a", b"d", b"b", b"e", b"c", b"f"]


# --- pack and unpack


def test_packed_elements_follow_their_4_byte_little_endian_length():
    packed = pack(BytesArray.of([b"a", b"", b"x" * 258], (3,)))
    assert packed == b"\x01\0\0\0a" + b"\0\0\0\0" + b"\x02\x01\0\0" + b"x" * 258


def test_empty_array_packs_to_no_bytes():
    assert pack(BytesArray.of([], (0,))) == b""


@pytest.mark.parametrize("elements", LISTS.values(), ids=LISTS)
def test_unpacking_reverses_packing(elements):
    packed = pack(BytesArray.of(elements, (len(elements),)))
    begins, ends = unpack(memoryview(packed), len(elements), "x")
    assert [packed[begin:end] for begin, end in zip(begins, ends, strict=True)] == elements


def test_packing_skips_bytes_outside_all_elements():
    array = BytesArray(np.array([2], np.int32), np.array([3], np.int32), np.frombuffer(b"..a..", np.uint8))
    assert pack(array) == b"\x01\0\0\0a"


def test_many_strings_are_packed_and_returned_in_their_order():
    elements = [b"%d" % index * (index % 3) for index in range(10_000)]
    array = BytesArray.of(elements, (100, 100))
    assert array.elements() == elements
    assert pack(array) == b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def peak_of(function, *arguments):
    """Return the most bytes that were allocated during a call."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_packing_takes_no_memory_for_each_string():
    """A response is only allowed the memory of its bytes; it took 271 more for each string."""
    count = 100_000
    array = BytesArray.of([b"abcd"] * count, (count,))
    assert peak_of(pack, array) < 12 * count


def test_array_is_made_without_memory_for_each_element():
    count = 100_000
    elements = [b"abcd"] * count
    assert peak_of(BytesArray.of, elements, (count,)) < 40 * count


def test_array_of_few_long_elements_is_made_without_a_second_copy():
    elements = [b"x" * 1_000_000] * 4
    assert peak_of(BytesArray.of, elements, (4,)) < 5_000_000


@pytest.mark.parametrize(
    ("section", "count", "message"),
    [
        (b"\0", 1, "the data ends after 1 of the 4 bytes that give the length of string 0"),
        (b"\0\0\0", 1, "the data ends after 3 of the 4 bytes that give the length of string 0"),
        (b"\1\0\0\0a\0\0", 2, "the data ends after 2 of the 4 bytes that give the length of string 1"),
        (b"\1\0\0\0", 1, "the length of string 0 is 1 byte, but the data has only 0 left"),
        (b"\0\0\0\0\3\0\0\0ab", 2, "the length of string 1 is 3 bytes, but the data has only 2 left"),
        (b"\xff\xff\xff\xffab", 1, "the length of string 0 is 4294967295 bytes, but the data has only 2 left"),
        (b"\0\0\0\x80ab", 1, "the length of string 0 is 2147483648 bytes, but the data has only 2 left"),
        (b"", 1, "its shape needs 1 string, but the data has 0"),
        (b"\1\0\0\0a", 3, "its shape needs 3 strings, but the data has 1"),
        (b"\1\0\0\0a\0", 1, "its shape needs 1 string, which leaves 1 byte of the data unused"),
        (b"\0\0\0\0\0\0\0\0", 1, "its shape needs 1 string, which leaves 4 bytes of the data unused"),
        (b"\0", 0, "its shape needs 0 strings, which leaves 1 byte of the data unused"),
        (b"", 2**200, f"its shape needs {2**200} strings, but the data has 0"),
    ],
)
def test_section_not_filled_by_its_elements_is_rejected(section, count, message):
    assert refused(unpack, memoryview(section), count, "x") == f"x: {message}"


# --- Matrices


@pytest.mark.parametrize(
    ("elements", "rows"),
    [
        ([b"abcd", b"ab"], [b"abcd\0", b"ab\0\0\0"]),
        ([b""], [b"\0"]),
        ([b"", b""], [b"\0", b"\0"]),
        ([b"", b"a", b"\xff\xfe"], [b"\0\0\0", b"a\0\0", b"\xff\xfe\0"]),
        ([b"a\0b"], [b"a\0b\0"]),
        ([b"a\0", b"b"], [b"a\0\0", b"b\0\0"]),
    ],
)
def test_matrix_is_one_wider_than_the_longest_string(elements, rows):
    matrix = to_matrix(BytesArray.of(elements, (len(elements),)), "x")
    assert (matrix.dtype, matrix.shape) == (np.uint8, (len(rows), len(rows[0])))
    assert [row.tobytes() for row in matrix] == rows


def test_matrix_without_strings_has_no_rows():
    assert to_matrix(BytesArray.of([], (0,)), "x").shape == (0, 1)


def test_matrix_of_more_than_1_gib_is_rejected():
    """A single long string widens all rows."""
    message = refused(to_matrix, BytesArray.of([b"x" * 32_768, *[b""] * 32_767], (32_768,)), "x")
    assert message == (
        "x: 32768 strings, the longest of 32768 bytes, make a matrix of 1073774592 bytes, "
        "at most 1073741824 are allowed"
    )


@pytest.mark.parametrize(
    ("rows", "elements"),
    [
        ([b"abcd\0", b"ab\0\0\0"], [b"abcd", b"ab"]),
        ([b"\0\0", b"a\0"], [b"", b"a"]),
        ([b"abc", b"ab\0"], [b"abc", b"ab"]),
        ([b"a\0b", b"\0bc"], [b"a", b""]),
        ([b"\xff\xfe\0"], [b"\xff\xfe"]),
    ],
)
def test_row_is_read_up_to_its_first_nul(rows, elements):
    array = from_matrix(np.array([list(row) for row in rows], np.uint8))
    assert (array.shape, array.elements()) == ((len(rows),), elements)


@pytest.mark.parametrize(("shape", "elements"), [((0, 4), []), ((0, 0), []), ((2, 0), [b"", b""])])
def test_matrix_of_width_0_is_read(shape, elements):
    assert from_matrix(np.zeros(shape, np.uint8)).elements() == elements


@pytest.mark.parametrize("width", [1, 7, 300_000])
def test_many_rows_are_read(width):
    matrix = np.random.default_rng(0).integers(0, 3, (900_000 // width, width), np.uint8)
    assert from_matrix(matrix).elements() == [row.tobytes().partition(b"\0")[0] for row in matrix]


def test_rows_become_strings_without_memory_for_each():
    """Only their offsets; it took 98 bytes for each."""
    assert peak_of(from_matrix, np.ones((1_000_000, 1), np.uint8)) < 20_000_000


def test_strings_of_a_matrix_are_views_on_it():
    matrix = np.array([[97, 0], [98, 99]], np.uint8)
    assert np.shares_memory(from_matrix(matrix).symbols, matrix)


def test_non_contiguous_rows_are_read():
    matrix = np.array([[97, 0, 98], [99, 0, 100]], np.uint8)
    assert from_matrix(matrix.T).elements() == [b"ac", b"", b"bd"]


def test_strings_without_nul_survive_a_matrix():
    elements = [b"abc", b"", b"\xff"]
    assert from_matrix(to_matrix(BytesArray.of(elements, (3,)), "x")).elements() == elements


# --- Base64


@pytest.mark.parametrize("data", [b"", b"a", b"ab", b"abc", bytes(range(256)), b"\xfb\xff" * 1000])
def test_base64_of_any_bytes_is_decoded(data):
    assert decode_base64(base64.b64encode(data).decode(), "x") == data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("YQ", "it has 2 characters, expected a multiple of 4, padded with '='"),
        ("Y", "it has 1 character, expected a multiple of 4, padded with '='"),
        ("YQ=", "it has 3 characters, expected a multiple of 4, padded with '='"),
        ("YQ==YQ==", "'=' is only allowed as padding, at most twice and at the end"),
        ("Y===", "'=' is only allowed as padding, at most twice and at the end"),
        ("YWJj====", "'=' is only allowed as padding, at most twice and at the end"),
        ("YWJj=", "it has 5 characters, expected a multiple of 4, padded with '='"),
        ("====", "'=' is only allowed as padding, at most twice and at the end"),
        ("=YWJ", "'=' is only allowed as padding, at most twice and at the end"),
        (" YQ==", 'character 0 is " "'),
        ("YWJj\nYWJj", 'character 4 is "\\n"; `base64 -w 0` writes no line breaks'),
        ("-_-_", 'character 0 is "-"; the URL-safe alphabet is not supported'),
        ("YW\x95=", 'character 2 is "\\x95"'),
        ("\u00e9\u00e9\u00e9\u00e9", 'character 0 is "\u00e9"'),
        ("data:image/png;base64,YQ==", 'character 4 is ":"; leave out the beginning of a data URL, such as '),
        ("YQ==" + "\0", 'character 4 is "\\u0000"'),
    ],
)
def test_other_text_is_not_base64(text, reason):
    message = refused(decode_base64, text, "x")
    assert message.startswith(f"x is not valid base64: {reason}")
    if not reason.endswith(" "):
        assert message.endswith(reason)
