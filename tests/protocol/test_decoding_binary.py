"""Decoding of binary tensors, and the messages for invalid ones."""

import json

import numpy as np
import pytest
from decoded_requests import (
    BINARY,
    STRINGS,
    VALID,
    decode,
    decode_inputs,
    refusal,
    refusal_of_input,
    refused,
)
from test_decoding import WRONG_PARAMETER
from wire_cases import CASES, DTYPES

from ovms_rest.protocol.decoding import decode_request

# --- Binary tensors


def test_binary_inputs_follow_each_other_in_the_order_of_the_inputs():
    arrays = decode_inputs(
        BINARY,
        BINARY | {"name": "a", "shape": [1], "datatype": "FP32"},
        BINARY | {"name": "m", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": 1}},
        binary=bytes.fromhex("0100 0200  0000803f  ff"),
    )
    assert [array.tolist() for array in arrays] == [[1, 2], [1.0], [255]]


def test_binary_and_json_inputs_mix():
    arrays = decode_inputs(
        VALID, BINARY, VALID | {"data": [2.5]}, BINARY | {"shape": [1]}, binary=bytes.fromhex("0100 0200  0300")
    )
    assert [array.tolist() for array in arrays] == [[1.5], [1, 2], [2.5], [3]]


@pytest.mark.parametrize(
    "items",
    [
        [STRINGS],
        [BINARY, STRINGS],
        [STRINGS, VALID],
        [BINARY, VALID, STRINGS, VALID],
        [STRINGS | {"parameters": {"binary_data_size": 6}}, STRINGS],
    ],
    ids=["only", "last", "before JSON", "between JSON", "second of BYTES"],
)
def test_last_binary_input_of_bytes_may_omit_its_size(items):
    before = {"INT16": b"\1\0\2\0", "BYTES": bytes.fromhex("02000000 6869")}
    sent = [item for item in items if "data" not in item]
    binary = b"".join(before[item["datatype"]] for item in sent[:-1]) + bytes.fromhex("03000000 616263")
    request = decode({"inputs": items}, binary)
    last = [tensor for tensor in request.inputs if tensor.name == "s"][-1]
    assert last.array.elements() == [b"abc"]


@pytest.mark.parametrize("after", [BINARY, STRINGS, BINARY | {"shape": [0]}])
def test_earlier_binary_input_of_bytes_must_have_its_size(after):
    message = refusal({"inputs": [STRINGS, after]}, bytes.fromhex("03000000 616263 00000000"))
    assert message == (
        "inputs[0] 's': parameters.binary_data_size is missing; a BYTES input may leave it out only when it is the "
        "last binary one"
    )


@pytest.mark.parametrize("keys", [{}, {"parameters": {"binary_data_size": 0}}], ids=["no size", "size 0"])
@pytest.mark.parametrize("shape", [[0], [3, 0]])
@pytest.mark.parametrize("datatype", DTYPES)
def test_binary_input_without_elements_takes_no_bytes(datatype, shape, keys):
    empty, numbers = decode_inputs(
        {"name": "e", "shape": shape, "datatype": datatype} | keys, BINARY, binary=b"\1\0\2\0"
    )
    assert (empty.shape, numbers.tolist()) == (tuple(shape), [1, 2])


def test_binary_input_without_strings_takes_no_bytes():
    item = STRINGS | {"shape": [3, 0], "parameters": {"binary_data_size": 0}}
    empty, numbers = decode_inputs(item, BINARY, binary=b"\1\0\2\0")
    assert (empty.shape, numbers.tolist()) == ((3, 0), [1, 2])


@pytest.mark.parametrize("binary", [None, b""])
def test_binary_inputs_without_elements_need_no_binary_part(binary):
    first, second = decode_inputs(BINARY | {"shape": [0]}, STRINGS | {"shape": [0]}, binary=binary)
    assert (first.shape, second.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("item", "binary", "needed"),
    [
        (BINARY, b"\1\0\2", "inputs[0] 'x' needs 4 bytes"),
        (BINARY | {"shape": [2**63 - 1]}, b"\0", "inputs[0] 'x' needs 18446744073709551614 bytes"),
        (BINARY | {"parameters": {"binary_data_size": 4}}, None, "inputs[0] 'x' needs 4 bytes"),
        (STRINGS | {"parameters": {"binary_data_size": 5}}, b"\0\0\0\0", "inputs[0] 's' needs 5 bytes"),
    ],
)
def test_too_few_binary_bytes_are_rejected(item, binary, needed):
    assert refusal_of_input(item, binary) == (
        f"{needed} of binary data, but the body has {len(binary or b'')} left after the JSON "
        "(Inference-Header-Content-Length says where the JSON ends)"
    )


@pytest.mark.parametrize("binary", [None, b""])
@pytest.mark.parametrize("item", [BINARY, STRINGS, STRINGS | {"shape": []}, BINARY | {"shape": [2**63 - 1]}])
def test_input_without_data_and_binary_data_is_rejected(item, binary):
    message = refusal_of_input(item, binary)
    assert message == (
        f"inputs[0] {item['name']!r}: data is missing, and the body has no binary data for it after the JSON "
        "(Inference-Header-Content-Length says where the JSON ends)"
    )


@pytest.mark.parametrize(
    ("item", "binary", "more", "taken"),
    [
        (BINARY, b"123456", "2 bytes", 4),
        (BINARY | {"shape": [0]}, b"1", "1 byte", 0),
        (VALID, b"123", "3 bytes", 0),
        (STRINGS | {"parameters": {"binary_data_size": 4}}, b"\0\0\0\0\0", "1 byte", 4),
    ],
)
def test_extra_binary_bytes_are_rejected(item, binary, more, taken):
    assert refusal_of_input(item, binary) == (
        f"the data after the JSON has {more} more than the inputs take: {len(binary)} instead of {taken}"
    )


@pytest.mark.parametrize("size", [0, 2, 3, 5, 8, 2**64 - 1])
def test_binary_size_other_than_the_shapes_is_rejected(size):
    message = refusal_of_input(BINARY | {"parameters": {"binary_data_size": size}}, b"12345678")
    assert message == f"inputs[0] 'x': parameters.binary_data_size is {size}, but INT16 of shape [2] takes 4 bytes"


@pytest.mark.parametrize(
    ("size", "found"),
    [("-1", "-1"), ("4.0", "4.0"), ("0.4e1", "4.0"), ("4e0", "4.0"), ("true", "true"), ('"4"', '"4"')],
)
@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
def test_binary_size_other_than_an_integer_from_0_is_rejected(datatype, size, found):
    text = b'{"inputs":[{"name":"x","shape":[4],"datatype":"%s","parameters":{"binary_data_size":%s}}]}'
    message = refusal(text % (datatype.encode(), size.encode()), b"1234")
    assert message == f"inputs[0] 'x': parameters.binary_data_size is {found}, expected an integer of at least 0"


@pytest.mark.parametrize(("size", "found"), [(None, "null"), ([4], "an array"), ({}, "an object")])
def test_binary_size_of_a_type_invalid_for_parameters_is_rejected(size, found):
    message = refusal_of_input(BINARY | {"parameters": {"binary_data_size": size}}, b"1234")
    assert message == f"inputs[0] 'x': parameters.binary_data_size is {found}, {WRONG_PARAMETER}"


@pytest.mark.parametrize("size", [0, 4, -1, "4", True, 4.0])
@pytest.mark.parametrize("data", [[], [1.5], None])
def test_data_together_with_a_binary_size_is_rejected(data, size):
    message = refusal_of_input(VALID | {"data": data, "parameters": {"binary_data_size": size}}, b"1234")
    assert message == "inputs[0] 'x' has both data and parameters.binary_data_size, expected only one of them"


@pytest.mark.parametrize("byte", [2, 127, 128, 255])
def test_bool_byte_other_than_0_and_1_is_rejected(byte):
    message = refusal_of_input({"name": "x", "shape": [2, 2], "datatype": "BOOL"}, bytes([0, 1, byte, 3]))
    assert message == f"inputs[0] 'x': BOOL element 2 is the byte {byte}, expected 0 or 1"


@pytest.mark.parametrize(
    ("shape", "binary", "message"),
    [
        ([1], "0000", "the data ends after 2 of the 4 bytes that give the length of string 0"),
        ([2], "01000000 61 000000", "the data ends after 3 of the 4 bytes that give the length of string 1"),
        ([1], "05000000 616263", "the length of string 0 is 5 bytes, but the data has only 3 left"),
        ([1], "ffffffff 616263", "the length of string 0 is 4294967295 bytes, but the data has only 3 left"),
        ([2], "01000000 61", "its shape needs 2 strings, but the data has 1"),
        ([1], "01000000 61 01000000 62", "its shape needs 1 string, which leaves 5 bytes of the data unused"),
        ([1], "01000000 61 62", "its shape needs 1 string, which leaves 1 byte of the data unused"),
        ([0], "00000000", "its shape needs 0 strings, which leaves 4 bytes of the data unused"),
        ([8388609], "", "the request has 8388609 strings up to here, at most 8388608 are allowed"),
    ],
)
def test_binary_strings_that_do_not_fill_their_section_are_rejected(shape, binary, message):
    section = bytes.fromhex(binary)
    sized = STRINGS | {"shape": shape, "parameters": {"binary_data_size": len(section)}}
    for item in (STRINGS | {"shape": shape}, sized):
        assert refusal_of_input(item, section) == f"inputs[0] 's': {message}"


def test_binary_strings_need_not_be_utf8():
    (array,) = decode_inputs(STRINGS, binary=b"\3\0\0\0\xff\0\0")
    assert array.elements() == [b"\xff\0\0"]


def test_nans_and_infinities_are_kept_in_binary():
    (array,) = decode_inputs(
        {"name": "x", "shape": [3], "datatype": "FP32"}, binary=bytes.fromhex("0100c07f 0000807f 000080ff")
    )
    assert array.tobytes() == bytes.fromhex("0100c07f 0000807f 000080ff")
    assert np.isnan(array).tolist() == [True, False, False]


def test_header_length_that_cuts_the_json_is_rejected():
    body = json.dumps({"inputs": [VALID]}).encode()
    message = refused(decode_request, memoryview(body), len(body) - 1)
    assert message.startswith("the request is not valid JSON: ")


def test_header_length_that_reaches_into_the_tensors_is_rejected():
    body = json.dumps({"inputs": [BINARY]}).encode() + b"\1\0\2\0"
    message = refused(decode_request, memoryview(body), len(body) - 3)
    assert message.startswith("the request is not valid JSON: ")


# --- Views


def aligned(head, binary, offset=0):
    """Return a body whose binary part begins `offset` bytes after a multiple of 64."""
    body = np.zeros(len(head) + len(binary) + 128, np.uint8)
    start = (offset - body.ctypes.data - len(head)) % 64
    body = body[start : start + len(head) + len(binary)]
    body[:] = np.frombuffer(head + binary, np.uint8)
    return body


@pytest.mark.parametrize("case", [case for case in CASES if case.binary], ids=lambda case: case.name)
def test_binary_tensor_is_a_view_on_the_body(case):
    head = json.dumps({"inputs": [case.input()]}).encode()
    body = aligned(head, case.binary)
    array = decode_request(body.data, len(head)).inputs[0].array
    assert np.shares_memory(array.symbols if case.datatype == "BYTES" else array, body)


@pytest.mark.parametrize("datatype", DTYPES)
def test_only_unaligned_binary_tensors_are_copied(datatype):
    dtype = np.dtype(DTYPES[datatype])
    head = json.dumps({"inputs": [{"name": "x", "shape": [3], "datatype": datatype}]}).encode()
    for offset in range(1, 9):
        body = aligned(head, bytes(3 * dtype.itemsize), offset)
        array = decode_request(body.data, len(head)).inputs[0].array
        assert np.shares_memory(array, body) == (offset % dtype.alignment == 0)
        assert array.flags.aligned
        assert array.tolist() == [0, 0, 0]
