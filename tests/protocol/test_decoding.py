"""Decoding of requests, and the messages for invalid ones; binary data is in test_decoding_binary."""

import base64
import json
import math

import pytest
from costs import measure_cost
from decoded_requests import (
    ANY,
    INTEGERS,
    STRINGS,
    VALID,
    decode,
    decode_inputs,
    decode_numbers,
    nested,
    refusal,
    refusal_of_input,
    refused,
    without,
    written,
)
from wire_cases import CASES, fingerprint

from ovms_rest.errors import BodyTooLargeError
from ovms_rest.protocol.decoding import LARGE_SIZE, decode_request
from ovms_rest.protocol.json_memory import BodyLimits, choose_limits
from ovms_rest.protocol.tensors import ModelMetadata, TensorMetadata

# --- The table of wire cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_json_data_becomes_the_array(case):
    (array,) = decode_inputs(case.input(data=case.data))
    assert fingerprint(array) == fingerprint(case.array)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_binary_data_becomes_the_array(case):
    (array,) = decode_inputs(case.input(parameters={"binary_data_size": len(case.binary)}), binary=case.binary)
    assert fingerprint(array) == fingerprint(case.array)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_binary_input_may_omit_its_size(case):
    (array,) = decode_inputs(case.input(), binary=case.binary)
    assert fingerprint(array) == fingerprint(case.array)


def test_all_wire_cases_fit_into_one_binary_request():
    items = [case.input(name=case.name, parameters={"binary_data_size": len(case.binary)}) for case in CASES]
    arrays = decode_inputs(*items, binary=b"".join(case.binary for case in CASES))
    assert list(map(fingerprint, arrays)) == [fingerprint(case.array) for case in CASES]


# --- The root


def test_request_has_the_keys_of_its_json():
    request = decode({"id": "7", "parameters": {"a": 1, "b": 2.5, "c": "d", "e": True}, "inputs": [VALID]})
    assert (request.id, request.parameters) == ("7", {"a": 1, "b": 2.5, "c": "d", "e": True})
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in request.inputs] == [("x", "FP32", (1,))]


def test_missing_keys_have_defaults():
    request = decode({"inputs": [VALID]})
    assert (request.id, request.outputs, request.binary_output, dict(request.parameters)) == ("", (), False, {})


def test_empty_id_outputs_and_parameters_equal_missing_ones():
    request = decode({"id": "", "outputs": [], "parameters": {}, "inputs": [VALID]})
    assert (request.id, request.outputs, dict(request.parameters)) == ("", (), {})


def test_strings_may_be_written_as_utf8():
    request = decode('{"id":"\u00e9","inputs":[{"name":"\u65e5","shape":[0],"datatype":"INT8","data":[]}]}'.encode())
    assert (request.id, request.inputs[0].name) == ("\u00e9", "\u65e5")


NO_JSON = {
    "blank": b" ",
    "no end of the object": b"{",
    "no end of the root": b'{"inputs":[]',
    "one bracket too many": b'{"inputs":[]}}',
    "a comma at the end": b'{"inputs":[],}',
    "single quotes": b"{'inputs':[]}",
    "a comment": b'{"inputs":[]} // comment',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a control character": b'{"id":"a\0b"}',
    "half a surrogate pair": b'{"id":"\\ud800"}',
    "NaN": written("FP32", [1], "[NaN]"),
    "Infinity": written("FP32", [1], "[Infinity]"),
    "-Infinity": written("FP32", [1], "[-Infinity]"),
    "beyond FP64": written("FP64", [1], "[1e400]"),
    "a leading zero": written("FP32", [1], "[01]"),
    "a leading point": written("FP32", [1], "[.5]"),
    "a leading plus": written("FP32", [1], "[+1]"),
    "True": written("BOOL", [1], "[True]"),
    "only brackets": b"[" * 100_000,
    "very deep": nested(100_000),
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_invalid_json_is_rejected(body):
    assert refusal(body).startswith("the request is not valid JSON: ")


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"\xff","inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"\xff":1,"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"ignored":"\xc3","inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"\xc0\x80","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xed\xa0\x80"]}]}',
    ],
    ids=["id", "key", "value of an unknown key", "overlong NUL", "surrogate"],
)
def test_invalid_utf8_is_rejected_everywhere(body):
    assert refusal(body).startswith("the request is not valid JSON: ")


def test_message_gives_the_place_of_a_byte_that_is_not_utf8():
    body = '{"id": "\u00e4",\n "x\u00e4\u00f6": 1}'.encode().replace(b"\xc3\xb6", b"\xf6")
    assert refusal(body) == "the request is not valid JSON: line 2 column 5: byte 0xf6 is not UTF-8"


@pytest.mark.parametrize(("number", "shown"), [("1e999", "1e999"), ("-" + "9" * 400, f"-{'9' * 59}...")])
def test_message_names_a_number_beyond_fp64(number, shown):
    """It is valid JSON, which limits no number."""
    assert refusal(b'{"foo":%b,"inputs":[]}' % number.encode()) == (
        f"the request is not valid JSON: the number {shown} is beyond the range of FP64: line 1 column 8 (char 7)"
    )


def test_empty_body_is_rejected():
    assert refusal(b"") == "the request has no JSON, expected an object with the key 'inputs'"


def test_empty_json_part_is_rejected():
    assert refusal(b"", b"abc") == "the request has no JSON, expected an object with the key 'inputs'"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"[]", "an array"),
        (b"null", "null"),
        (b"true", "a boolean"),
        (b'"inputs"', "a string"),
        (b"1.5", "the number 1.5"),
    ],
)
def test_root_other_than_an_object_is_rejected(body, found):
    assert refusal(body) == f"the request is {found}, expected an object with the key 'inputs'"


WRONG_ID = "expected a string"
WRONG_PARAMETERS = "expected an object"
WRONG_PARAMETER = "expected a string, a number or a boolean"
WRONG_OUTPUTS = "expected an array of objects"
WRONG_OUTPUT = "expected an object with the key 'name'"
WRONG_INPUTS = "expected an array of one or more objects"
WRONG_INPUT = "expected an object with name, shape and datatype"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id": None}, f"id is null, {WRONG_ID}"),
        ({"id": 1}, f"id is the number 1, {WRONG_ID}"),
        ({"id": True}, f"id is a boolean, {WRONG_ID}"),
        ({"id": []}, f"id is an array, {WRONG_ID}"),
        ({"id": {}}, f"id is an object, {WRONG_ID}"),
        ({"parameters": None}, f"parameters is null, {WRONG_PARAMETERS}"),
        ({"parameters": []}, f"parameters is an array, {WRONG_PARAMETERS}"),
        ({"parameters": "a"}, f"parameters is a string, {WRONG_PARAMETERS}"),
        ({"parameters": 1}, f"parameters is the number 1, {WRONG_PARAMETERS}"),
        ({"parameters": True}, f"parameters is a boolean, {WRONG_PARAMETERS}"),
        ({"parameters": {"p": None}}, f"parameters.p is null, {WRONG_PARAMETER}"),
        ({"parameters": {"p": []}}, f"parameters.p is an array, {WRONG_PARAMETER}"),
        ({"parameters": {"p": {}}}, f"parameters.p is an object, {WRONG_PARAMETER}"),
        ({"outputs": None}, f"outputs is null, {WRONG_OUTPUTS}"),
        ({"outputs": {}}, f"outputs is an object, {WRONG_OUTPUTS}"),
        ({"outputs": "y"}, f"outputs is a string, {WRONG_OUTPUTS}"),
        ({"outputs": 0}, f"outputs is the number 0, {WRONG_OUTPUTS}"),
        ({"outputs": False}, f"outputs is a boolean, {WRONG_OUTPUTS}"),
        ({"outputs": [None]}, f"outputs[0] is null, {WRONG_OUTPUT}"),
        ({"outputs": [{"name": "y"}, "z"]}, f"outputs[1] is a string, {WRONG_OUTPUT}"),
        ({"outputs": [[]]}, f"outputs[0] is an array, {WRONG_OUTPUT}"),
        ({"outputs": [{}]}, "outputs[0]: name is missing, expected a string"),
        ({"outputs": [{"name": None}]}, "outputs[0]: name is null, expected a string"),
        ({"outputs": [{"name": 1}]}, "outputs[0]: name is the number 1, expected a string"),
        ({"outputs": [{"name": "y", "parameters": None}]}, f"outputs[0] 'y': parameters is null, {WRONG_PARAMETERS}"),
        ({"outputs": [{"name": "y", "parameters": []}]}, f"outputs[0] 'y': parameters is an array, {WRONG_PARAMETERS}"),
        (
            {"outputs": [{"name": "y", "parameters": {"p": None}}]},
            f"outputs[0] 'y': parameters.p is null, {WRONG_PARAMETER}",
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"p": [1]}}]},
            f"outputs[0] 'y': parameters.p is an array, {WRONG_PARAMETER}",
        ),
        ({"inputs": None}, f"inputs is null, {WRONG_INPUTS}"),
        ({"inputs": {}}, f"inputs is an object, {WRONG_INPUTS}"),
        ({"inputs": "x"}, f"inputs is a string, {WRONG_INPUTS}"),
        ({"inputs": 0}, f"inputs is the number 0, {WRONG_INPUTS}"),
        ({"inputs": True}, f"inputs is a boolean, {WRONG_INPUTS}"),
        ({"inputs": []}, f"inputs is empty, {WRONG_INPUTS}"),
        ({"inputs": [None]}, f"inputs[0] is null, {WRONG_INPUT}"),
        ({"inputs": [VALID, []]}, f"inputs[1] is an array, {WRONG_INPUT}"),
        ({"inputs": ["x"]}, f"inputs[0] is a string, {WRONG_INPUT}"),
        ({"inputs": [1]}, f"inputs[0] is the number 1, {WRONG_INPUT}"),
    ],
)
def test_wrong_type_is_rejected_with_its_place(keys, message):
    assert refusal({"inputs": [VALID]} | keys) == message


def test_missing_inputs_are_rejected():
    assert refusal({}) == f"inputs is missing, {WRONG_INPUTS}"


WRONG_NAME = "expected a string"
WRONG_SHAPE = "expected an array of integers"
WRONG_DIM = "expected integers from 0 to 9223372036854775807"
WRONG_DATATYPE = (
    "expected one of BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, FP16, BF16, FP32, FP64, BYTES"
)
WRONG_DATA = "expected an array"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": None}, f"inputs[0]: name is null, {WRONG_NAME}"),
        ({"name": 1}, f"inputs[0]: name is the number 1, {WRONG_NAME}"),
        ({"name": ["x"]}, f"inputs[0]: name is an array, {WRONG_NAME}"),
        ({"shape": None}, f"inputs[0] 'x': shape is null, {WRONG_SHAPE}"),
        ({"shape": "1"}, f"inputs[0] 'x': shape is a string, {WRONG_SHAPE}"),
        ({"shape": 1}, f"inputs[0] 'x': shape is the number 1, {WRONG_SHAPE}"),
        ({"shape": {}}, f"inputs[0] 'x': shape is an object, {WRONG_SHAPE}"),
        ({"shape": [-1]}, f"inputs[0] 'x': shape has the dim -1, {WRONG_DIM}"),
        ({"shape": [1, -(2**63)]}, f"inputs[0] 'x': shape has the dim -9223372036854775808, {WRONG_DIM}"),
        ({"shape": [1.0]}, f"inputs[0] 'x': shape has the dim 1.0, {WRONG_DIM}"),
        ({"shape": [2.5]}, f"inputs[0] 'x': shape has the dim 2.5, {WRONG_DIM}"),
        ({"shape": [True]}, f"inputs[0] 'x': shape has the dim true, {WRONG_DIM}"),
        ({"shape": ["1"]}, f"inputs[0] 'x': shape has the dim \"1\", {WRONG_DIM}"),
        ({"shape": [None]}, f"inputs[0] 'x': shape has the dim null, {WRONG_DIM}"),
        ({"shape": [2**63]}, f"inputs[0] 'x': shape has the dim 9223372036854775808, {WRONG_DIM}"),
        ({"shape": [1] * 65}, "inputs[0] 'x': shape has 65 dims, at most 64 are allowed"),
        ({"datatype": None}, f"inputs[0] 'x': datatype is null, {WRONG_DATATYPE}"),
        ({"datatype": 32}, f"inputs[0] 'x': datatype is the number 32, {WRONG_DATATYPE}"),
        ({"datatype": "FP8"}, f"inputs[0] 'x': datatype is \"FP8\", {WRONG_DATATYPE}"),
        ({"datatype": "fp32"}, f"inputs[0] 'x': datatype is \"fp32\", {WRONG_DATATYPE}"),
        ({"datatype": ""}, f"inputs[0] 'x': datatype is \"\", {WRONG_DATATYPE}"),
        ({"parameters": None}, f"inputs[0] 'x': parameters is null, {WRONG_PARAMETERS}"),
        ({"parameters": []}, f"inputs[0] 'x': parameters is an array, {WRONG_PARAMETERS}"),
        ({"parameters": "p"}, f"inputs[0] 'x': parameters is a string, {WRONG_PARAMETERS}"),
        ({"parameters": {"p": None}}, f"inputs[0] 'x': parameters.p is null, {WRONG_PARAMETER}"),
        ({"parameters": {"p": [1]}}, f"inputs[0] 'x': parameters.p is an array, {WRONG_PARAMETER}"),
        ({"parameters": {"p": {}}}, f"inputs[0] 'x': parameters.p is an object, {WRONG_PARAMETER}"),
        ({"data": None}, f"inputs[0] 'x': data is null, {WRONG_DATA}"),
        ({"data": 1.5}, f"inputs[0] 'x': data is the number 1.5, {WRONG_DATA}"),
        ({"data": "1.5"}, f"inputs[0] 'x': data is a string, {WRONG_DATA}"),
        ({"data": {}}, f"inputs[0] 'x': data is an object, {WRONG_DATA}"),
        ({"data": True}, f"inputs[0] 'x': data is a boolean, {WRONG_DATA}"),
    ],
)
def test_invalid_key_of_an_input_is_rejected_with_its_place(keys, message):
    assert refusal_of_input(VALID | keys) == message


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("name", f"inputs[0]: name is missing, {WRONG_NAME}"),
        ("shape", f"inputs[0] 'x': shape is missing, {WRONG_SHAPE}"),
        ("datatype", f"inputs[0] 'x': datatype is missing, {WRONG_DATATYPE}"),
    ],
)
def test_missing_key_of_an_input_is_rejected_with_its_place(key, message):
    assert refusal_of_input(without(VALID, key)) == message


def test_message_names_the_index_of_a_later_input():
    message = refusal({"inputs": [VALID, VALID | {"name": "z", "data": "1"}]})
    assert message == f"inputs[1] 'z': data is a string, {WRONG_DATA}"


def test_long_name_is_cut_in_the_message():
    message = refusal_of_input(VALID | {"name": "n" * 1000, "shape": None})
    assert message == f"inputs[0] '{'n' * 60}...': shape is null, {WRONG_SHAPE}"


def test_long_value_is_cut_in_the_message():
    message = refusal_of_input(VALID | {"datatype": "F" * 1000})
    assert message == f"inputs[0] 'x': datatype is \"{'F' * 59}..., {WRONG_DATATYPE}"


@pytest.mark.parametrize("value", [None, [], {"a": [None]}, "text", 1, 1.5, False])
def test_unknown_keys_are_ignored_at_every_level(value):
    request = decode(
        {
            "unknown": value,
            "model_name": value,
            "inputs": [VALID | {"unknown": value, "binary_data_size": value}],
            "outputs": [{"name": "y", "unknown": value, "data": value, "binary_data": value}],
        }
    )
    assert request.inputs[0].array.tolist() == [1.5]
    assert request.outputs == (("y", False, 0),)


@pytest.mark.parametrize("value", ["text", "", 1, -1, 2**64 - 1, 1.5, True, False])
def test_unknown_parameters_are_accepted_at_every_level(value):
    parameters = {"unknown": value}
    request = decode(
        {
            "parameters": parameters,
            "inputs": [VALID | {"parameters": parameters}],
            "outputs": [{"name": "y", "parameters": parameters}],
        }
    )
    assert request.parameters == parameters
    assert request.inputs[0].array.tolist() == [1.5]


# --- Depth

EMPTY = b'"name":"x","shape":[0],"datatype":"INT8","data":[]'
PLACES = {
    "root": (2, b'{"inputs":[{' + EMPTY + b'}],"unknown":%s}'),
    "input": (4, b'{"inputs":[{' + EMPTY + b',"unknown":%s}]}'),
    "output": (4, b'{"inputs":[{' + EMPTY + b'}],"outputs":[{"name":"y","unknown":%s}]}'),
    "second input": (4, b'{"inputs":[{' + EMPTY + b'},{"unknown":%s,' + EMPTY + b"}]}"),
}
TOO_DEEP = "the JSON is nested deeper than 100 levels"


def test_data_may_nest_97_arrays():
    (array,) = decode(written("FP32", [1], "[" * 97 + "1.5" + "]" * 97)).inputs
    assert array.array.tolist() == [1.5]


@pytest.mark.parametrize("data", ["[" * 98 + "1.5" + "]" * 98, "[" * 98 + "]" * 98, "[" * 1000 + "]" * 1000])
def test_data_nested_in_more_than_97_arrays_is_rejected(data):
    assert refusal(written("FP32", [1], data)) == TOO_DEEP


@pytest.mark.parametrize(
    ("before", "after"), [("[1.5,", "]"), ("[[],", "]"), ("[[],1.5,", "]"), ("[[[1.5],", "]]"), ("[[[[]]],", "]")]
)
def test_ragged_data_may_nest_97_arrays_too(before, after):
    levels = 97 - len(after)
    count = before.count("1.5")
    (tensor,) = decode(written("FP32", [count], before + "[" * levels + "]" * levels + after)).inputs
    assert tensor.array.tolist() == [1.5] * count
    assert refusal(written("FP32", [count], before + "[" * (levels + 1) + "]" * (levels + 1) + after)) == TOO_DEEP


@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
@pytest.mark.parametrize("place", PLACES)
def test_unknown_keys_may_nest_up_to_100_levels_in_total(place, brackets):
    level, text = PLACES[place]
    assert decode(text % nested(101 - level, brackets)).inputs[0].name == "x"


@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
@pytest.mark.parametrize("place", PLACES)
def test_unknown_keys_deeper_than_100_levels_are_rejected(place, brackets):
    level, text = PLACES[place]
    assert refusal(text % nested(102 - level, brackets)) == TOO_DEEP


def test_arrays_and_objects_both_count_as_levels():
    _, text = PLACES["root"]
    assert decode(text % (b'{"k":[' * 49 + b"[]" + b"]}" * 49)).inputs
    assert refusal(text % (b'{"k":[' * 49 + b"[[]]" + b"]}" * 49)) == TOO_DEEP


def test_deepest_of_several_values_counts():
    _, text = PLACES["root"]
    assert refusal(text % (b'[1,[],{"a":2},' + nested(99) + b",[]]")) == TOO_DEEP


@pytest.mark.parametrize(
    "text",
    [
        b'{"parameters":{"p":%s},"inputs":[{' + EMPTY + b"}]}",
        b'{"inputs":[{' + EMPTY + b',"parameters":{"p":%s}}]}',
        b'{"id":%s,"inputs":[{' + EMPTY + b"}]}",
        b'{"outputs":%s,"inputs":[{' + EMPTY + b"}]}",
        b'{"inputs":[{"name":%s,"shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[%s],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[0],"datatype":%s,"data":[]}]}',
    ],
    ids=["parameters", "parameters of an input", "id", "outputs", "name", "shape", "datatype"],
)
@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
def test_container_in_a_known_key_is_rejected_for_its_type(text, brackets):
    """No known key takes an array or object except `data`, whose depth the message names."""
    assert "expected" in refusal(text % nested(300, brackets))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"inputs":%s}', f"inputs is an object, {WRONG_INPUTS}"),
        (b'{"inputs":[[%s]]}', f"inputs[0] is an array, {WRONG_INPUT}"),
        (
            b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":%s}]}',
            f"inputs[0] 'x': data is an object, {WRONG_DATA}",
        ),
    ],
)
def test_too_deep_value_of_the_wrong_type_is_rejected(text, message):
    assert refusal(text % nested(300, b"{}")) == message


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "FP32", "BYTES"])
def test_deep_object_among_the_elements_is_rejected(datatype):
    """An object is not an element at any depth; this one is too deep for orjson to repeat it in the message."""
    message = refusal(written(datatype, [1], "[" + nested(300, b"{}").decode() + "]"))
    assert message.startswith("inputs[0] 'x': data[0] is an object, ")


# --- Shapes


@pytest.mark.parametrize("shape", [[0], [0, 10], [2**20, 0], [0, 2**19, 2], [0] * 64, [1, 0, 1]])
@pytest.mark.parametrize("datatype", ["BOOL", "BF16", "FP64", "BYTES"])
def test_shape_without_elements_is_kept(datatype, shape):
    (array,) = decode_inputs({"name": "x", "shape": shape, "datatype": datatype, "data": []})
    assert array.shape == tuple(shape)


@pytest.mark.parametrize(
    "shape", [[0, 2**28 + 1], [2**63 - 1, 0], [2**31, 2**31, 0], [0] + [2**63 - 1] * 63], ids=lambda shape: len(shape)
)
@pytest.mark.parametrize(("datatype", "most"), [("BOOL", 2**28), ("FP64", 2**25), ("BYTES", 2**23)])
def test_shape_without_elements_but_huge_dims_is_rejected(datatype, most, shape):
    for item in ({"data": []}, {}):
        message = refusal_of_input({"name": "x", "shape": shape, "datatype": datatype} | item)
        dims = ",".join(map(str, shape))
        assert message == (
            f"inputs[0] 'x': the dims of shape [{dims}] other than 0 multiply to more than {most}, "
            f"the limit for {datatype}"
        )


@pytest.mark.parametrize(
    ("datatype", "max_body", "most"),
    [("UINT8", 2**22, 2**22), ("FP32", 2**28, 2**26), ("BYTES", 2**24, 2**22), ("FP64", 2**10, 2**20)],
)
@pytest.mark.parametrize("large_size", [0, 10**6], ids=["simdjson", "orjson"])
def test_dims_beside_0_may_be_those_of_a_tensor_that_fits_into_a_body(datatype, max_body, most, large_size):
    for size in (most, most + 1):
        body = memoryview(written(datatype, [0, size], "[]"))
        if size == most:
            (array,) = decode_request(body, None, large_size, limits=choose_limits(max_body)).inputs
            assert array.shape == (0, size)
        else:
            message = refused(decode_request, body, None, large_size, limits=choose_limits(max_body))
            assert message.endswith(f"multiply to more than {most}, the limit for {datatype}")


def test_shape_may_have_64_dims():
    (array,) = decode_inputs(VALID | {"shape": [1] * 64})
    assert array.shape == (1,) * 64


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([2, 2], [1, 2, 3], "inputs[0] 'x': data has 3 elements, but shape [2,2] needs 4"),
        ([2], [], "inputs[0] 'x': data has 0 elements, but shape [2] needs 2"),
        ([2], [[], []], "inputs[0] 'x': data has 0 elements, but shape [2] needs 2"),
        ([0], [1], "inputs[0] 'x': data has 1 element, but shape [0] needs 0"),
        ([], [], "inputs[0] 'x': data has 0 elements, but shape [] needs 1"),
        ([], [1, 2], "inputs[0] 'x': data has 2 elements, but shape [] needs 1"),
        (
            [2**63 - 1, 2],
            [1],
            "inputs[0] 'x': data has 1 element, but shape [9223372036854775807,2] needs 18446744073709551614",
        ),
    ],
)
def test_number_of_elements_other_than_the_shapes_is_rejected(shape, data, message):
    assert refusal_of_input(VALID | {"shape": shape, "data": data}) == message


def test_shape_of_64_huge_dims_is_rejected():
    shape = [2**63 - 1] * 64
    assert refusal_of_input(VALID | {"shape": shape}).endswith(f" needs {math.prod(shape)}")
    message = refusal_of_input(without(VALID | {"shape": shape}, "data"), b"1")
    assert message.endswith(
        "bytes of binary data, but the body has 1 left after the JSON "
        "(Inference-Header-Content-Length says where the JSON ends)"
    )


# --- Nesting of data


@pytest.mark.parametrize(
    "data",
    [
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3], [4, 5, 6]],
        [[1, 2], [3, 4], [5, 6]],
        [[[1, 2, 3, 4, 5, 6]]],
        [[1], [2, 3], [4, 5, 6]],
        [1, [2, [3]], [], [[4, 5]], 6],
        [[], [[], [1, 2, 3]], 4, [5, 6], [[[]]]],
        [[[[1]]], 2, [[[[[3]]]], 4], [5], 6],
    ],
    ids=["flat", "natural", "other", "deeper", "ragged", "mixed", "mixed with empty", "mixed and deep"],
)
def test_data_nested_in_any_form_is_flattened(data):
    (numbers,) = decode_inputs(VALID | {"shape": [2, 3], "data": data})
    assert numbers.tolist() == [[1, 2, 3], [4, 5, 6]]
    text = json.loads(json.dumps(data), parse_int=lambda digits: f"s{digits}")
    (strings,) = decode_inputs(STRINGS | {"shape": [2, 3], "data": text})
    assert strings.elements() == [b"s1", b"s2", b"s3", b"s4", b"s5", b"s6"]


@pytest.mark.parametrize("data", [[], [[]], [[], []], [[], [[]]]])
def test_data_without_elements_may_be_nested(data):
    (array,) = decode_inputs(VALID | {"shape": [2, 0], "data": data})
    assert array.shape == (2, 0)


def test_invalid_element_is_named_by_its_index_in_the_flattened_data():
    message = refusal_of_input(VALID | {"shape": [2, 2], "data": [[1, 2], [3, None]]})
    assert message == "inputs[0] 'x': data[3] is null, FP32 takes numbers"


# --- Integers


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_datatype_takes_its_whole_range(datatype):
    low, high = INTEGERS[datatype]
    assert decode_numbers(datatype, f"{low},{high}").tolist() == [low, high]


@pytest.mark.parametrize("beyond", [1, 1000, 2**64])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_out_of_range_is_rejected(datatype, beyond):
    low, high = INTEGERS[datatype]
    for number in (low - beyond, high + beyond):
        message = refusal(written(datatype, [2], f"[1,{number}]"))
        assert message.startswith("inputs[0] 'x': data[1] is ")
        assert message.endswith(f", {datatype} takes integers from {low} to {high}")


@pytest.mark.parametrize(
    ("datatype", "number", "about"),
    [
        ("INT64", "-9223372036854775809", "-9.223372036854776e+18"),
        ("UINT64", "18446744073709551616", "1.8446744073709552e+19"),
        ("INT8", "1e300", "1e+300"),
    ],
)
def test_message_about_an_integer_beyond_64_bits_does_not_show_it_as_one_within(datatype, number, about):
    """The parser rounds it to FP64, here to the nearest limit of the datatype."""
    low, high = INTEGERS[datatype]
    assert refusal(written(datatype, [1], f"[{number}]")) == (
        f"inputs[0] 'x': data[0] is beyond 64 bits, about {about}, {datatype} takes integers from {low} to {high}"
    )


def test_message_repeats_an_integer_out_of_range():
    message = refusal_of_input(VALID | {"datatype": "INT8", "shape": [3], "data": [127, 128, 300]})
    assert message == "inputs[0] 'x': data[1] is 128, INT8 takes integers from -128 to 127"


@pytest.mark.parametrize("number", ["1.0", "1e2", "1E2", "1.5", "-0.0", "0e0"])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_number_with_fraction_or_exponent_is_not_an_integer(datatype, number):
    low, high = INTEGERS[datatype]
    message = refusal(written(datatype, [1], f"[{number}]"))
    assert message == f"inputs[0] 'x': data[0] is {float(number)}, {datatype} takes integers from {low} to {high}"


@pytest.mark.parametrize("dim", [[], [1], {}, {"a": 1}])
def test_array_or_object_is_not_a_dim(dim):
    message = refusal_of_input(VALID | {"shape": [dim]})
    assert message.startswith("inputs[0] 'x': shape has the dim ")
    assert message.endswith(WRONG_DIM)


@pytest.mark.parametrize("dims", ["[1.0]", "[1e2]", "[1E0]", "[0.0]"])
def test_number_with_fraction_or_exponent_is_not_a_dim(dims):
    message = refusal(b'{"inputs":[{"name":"x","shape":%s,"datatype":"FP32","data":[1]}]}' % dims.encode())
    assert message.endswith(WRONG_DIM)


@pytest.mark.parametrize("datatype", INTEGERS)
def test_minus_zero_is_the_integer_zero(datatype):
    assert decode_numbers(datatype, "-0").tolist() == [0]


# --- Invalid elements


@pytest.mark.parametrize(
    ("datatype", "good", "bad", "values"),
    [
        ("BOOL", "true", ["0", "1", "1.0", '"true"', "null"], "BOOL takes true or false"),
        ("INT8", "1", ["true", '"1"', "null"], "INT8 takes integers"),
        ("UINT64", "1", ["false", '"1"', "null"], "UINT64 takes integers"),
        ("FP16", "1", ["true", '"1"', '"NaN"', "null"], "FP16 takes numbers"),
        ("BF16", "1", ["true", '"1"', "null"], "BF16 takes numbers"),
        ("FP32", "1", ["true", '"1"', '"Infinity"', "null"], "FP32 takes numbers"),
        ("FP64", "1", ["false", '"1"', "null"], "FP64 takes numbers"),
        ("BYTES", '"a"', ["1", "1.5", "true", "null"], 'BYTES takes strings and {"b64": "..."}'),
    ],
)
def test_element_of_another_json_type_is_rejected(datatype, good, bad, values):
    for element in bad:
        message = refusal(written(datatype, [2], f"[{good},{element}]"))
        kind = "the string " if element[0] == '"' else "the boolean " if element in ("true", "false") else ""
        assert message == f"inputs[0] 'x': data[1] is {kind}{element}, {values}"


@pytest.mark.parametrize(
    ("datatype", "kind"),
    [
        ("BOOL", "true or false"),
        ("INT8", "integers"),
        ("FP32", "numbers"),
        ("BYTES", 'strings and {"b64": "..."}'),
    ],
)
def test_object_among_the_elements_is_rejected(datatype, kind):
    element = '{"a":1}'
    message = refusal(written(datatype, [1], f"[{element}]"))
    assert message == f"inputs[0] 'x': data[0] is {element}, {datatype} takes {kind}"


def test_strings_become_utf8_with_their_nuls():
    (array,) = decode_inputs(STRINGS | {"shape": [3], "data": ["\u00e9\0", "", "\U0001f600"]})
    assert array.elements() == [b"\xc3\xa9\0", b"", b"\xf0\x9f\x98\x80"]


def b64(data):
    return {"b64": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("data", "elements"),
    [
        ([b64(b"\xff\0")], [b"\xff\0"]),
        ([b64(b""), b64(bytes(range(256)))], [b"", bytes(range(256))]),
        (["\u00e9", b64(b"\xe9"), "b64"], [b"\xc3\xa9", b"\xe9", b"b64"]),
        ([[b64(b"a"), "b"], [["c"], b64(b"d")]], [b"a", b"b", b"c", b"d"]),
        ([[[b64(b"a")]], [[b64(b"b")]]], [b"a", b"b"]),
    ],
    ids=["one", "empty and all bytes", "with strings", "ragged", "nested"],
)
def test_elements_of_bytes_may_be_base64(data, elements):
    (array,) = decode_inputs(STRINGS | {"shape": [len(elements)], "data": data})
    assert array.elements() == elements


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({}, ' is {}, BYTES takes strings and {"b64": "..."}'),
        ({"b64": "YQ==", "x": 1}, ' is {"b64":"YQ==","x":1}, BYTES takes strings and {"b64": "..."}'),
        ({"B64": "YQ=="}, ' is {"B64":"YQ=="}, BYTES takes strings and {"b64": "..."}'),
        ({"b64": None}, '["b64"] is null, expected a string in base64'),
        ({"b64": ["YQ=="]}, '["b64"] is an array, expected a string in base64'),
        (
            {"b64": "YQ"},
            "[\"b64\"] is not valid base64: it has 2 characters, expected a multiple of 4, padded with '='",
        ),
        (
            {"b64": "YWJj\n"},
            '["b64"] is not valid base64: character 4 is "\\n"; `base64 -w 0` writes no line breaks',
        ),
    ],
)
def test_invalid_base64_is_rejected_with_its_place(element, message):
    found = refusal_of_input(STRINGS | {"shape": [2], "data": ["a", element]})
    assert found == f"inputs[0] 's': data[1]{message}"


def test_base64_is_for_bytes_only():
    message = refusal(written("UINT8", [1], '[{"b64":"AA=="}]'))
    assert message == 'inputs[0] \'x\': data[0] is {"b64":"AA=="}, UINT8 takes integers'


def test_base64_that_takes_too_much_memory_is_rejected():
    elements = ",".join(['{"b64":""}'] * 60_000)
    with pytest.raises(BodyTooLargeError, match="the values of the JSON would take"):
        decode_request(memoryview(written("BYTES", [60_000], f"[{elements}]")), limits=BodyLimits(2**28, 2**24))


def test_limit_of_strings_counts_all_inputs_of_a_request(monkeypatch):
    most = 1000
    monkeypatch.setattr("ovms_rest.protocol.decoding.MAX_ELEMENTS", most)
    items = [{"name": name, "shape": [count], "datatype": "BYTES", "data": []} for name, count in (("a", 0), ("b", 1))]
    message = refusal({"inputs": [{**items[0], "shape": [most + 1]}]})
    assert message == f"inputs[0] 'a': the request has {most + 1} strings up to here, at most {most} are allowed"
    sizes = [{**STRINGS, "shape": [most], "parameters": {"binary_data_size": 4 * most}}, {**items[1], "data": ["a"]}]
    message = refusal({"inputs": sizes}, bytes(4 * most))
    assert message == f"inputs[1] 'b': the request has {most + 1} strings up to here, at most {most} are allowed"


def test_largest_allowed_number_of_strings_is_decoded():
    (array,) = decode_inputs({**STRINGS, "shape": [2**23]}, binary=bytes(2**25))
    assert array.begins[-1] == array.ends[-1] == 2**25


# --- Limits by the model


def takes(*names):
    return {name: TensorMetadata(name, "FP32", (ANY,)) for name in names}


ONE_AND_TWO = ModelMetadata("m", "1", takes("x"), takes("y", "z"))


def refusal_by_model(root, large_size=LARGE_SIZE):
    return refused(decode_request, memoryview(json.dumps(root).encode()), None, large_size, ONE_AND_TWO)


@pytest.mark.parametrize("large_size", [0, 10**6], ids=["simdjson", "orjson"])
def test_more_inputs_than_the_model_has_are_rejected_before_decoding(large_size):
    message = refusal_by_model({"inputs": [VALID, {"name": 0}, None]}, large_size)
    assert message == "inputs has 3 entries, but model 'm' has only 1: 'x'"


@pytest.mark.parametrize(
    ("names", "fault"), [(["x", "q"], "inputs[1] 'q' is unknown"), (["x", "x"], "inputs[1] 'x' is repeated")]
)
def test_first_invalid_one_of_too_many_inputs_is_named(names, fault):
    message = refusal_by_model({"inputs": [{**VALID, "name": name} for name in names]})
    assert message == f"inputs has 2 entries, but model 'm' has only 1: 'x'; {fault}"


def test_more_outputs_than_the_model_has_are_rejected_before_decoding():
    message = refusal_by_model({"inputs": [VALID], "outputs": [None] * 3})
    assert message == "outputs has 3 entries, but model 'm' has only 2: 'y', 'z'"


def test_unknown_input_is_rejected_before_its_elements_are_counted():
    message = refusal_by_model({"inputs": [{"name": "y", "shape": [784], "datatype": "FP32", "data": [0]}]})
    assert message == "model 'm' has no input 'y'; it has 'x'"


def test_all_inputs_and_outputs_of_the_model_are_decoded():
    body = memoryview(json.dumps({"inputs": [VALID], "outputs": [{"name": "z"}, {"name": "y"}]}).encode())
    request = decode_request(body, model=ONE_AND_TWO)
    assert ([tensor.name for tensor in request.inputs], len(request.outputs)) == (["x"], 2)


def test_million_inputs_cost_no_more_than_their_json():
    """Such a request once took longer than gunicorn's timeout for a worker."""
    make = 'from test_decoding import *; item = b\'{"name":"x","shape":[0],"datatype":"FP32"},\'; '
    make += "body = memoryview(b'{\"inputs\":[' + (item * 1_000_000)[:-1] + b']}')"
    cost = measure_cost(make, "decode_request(body, model=ONE_AND_TWO)")
    assert cost.error.startswith("BodyTooLargeError: the values of the JSON would take ")
    assert (cost.seconds, cost.mebibytes) < (0.5, 8)


# --- Outputs


def test_requested_outputs_keep_their_order_and_repetitions():
    request = decode({"inputs": [VALID], "outputs": [{"name": "z"}, {"name": "a"}, {"name": "z"}]})
    assert [output.name for output in request.outputs] == ["z", "a", "z"]


def output_of(parameters):
    """Return a request for y with these parameters."""
    return {"inputs": [VALID], "outputs": [{"name": "y", "parameters": parameters}]}


@pytest.mark.parametrize(
    ("of_request", "of_output", "binary"),
    [
        ({}, {}, False),
        ({"binary_data_output": True}, {}, True),
        ({"binary_data_output": False}, {}, False),
        ({}, {"binary_data": True}, True),
        ({}, {"binary_data": False}, False),
        ({"binary_data_output": False}, {"binary_data": True}, True),
        ({"binary_data_output": True}, {"binary_data": False}, False),
        ({"binary_data_output": True}, {"binary_data": True}, True),
        ({"binary_data": True}, {"binary_data_output": True}, False),
    ],
)
def test_flag_of_an_output_overrides_that_of_the_request(of_request, of_output, binary):
    assert decode(output_of(of_output) | {"parameters": of_request}).outputs == (("y", binary, 0),)


@pytest.mark.parametrize(("parameters", "binary"), [({}, False), ({"binary_data_output": True}, True)])
def test_flag_of_the_request_applies_to_outputs_not_listed(parameters, binary):
    assert decode({"inputs": [VALID], "parameters": parameters}).binary_output == binary


@pytest.mark.parametrize(
    ("flag", "found"), [(1, "the number 1"), (0, "the number 0"), (1.0, "the number 1.0"), ("true", "a string")]
)
def test_flag_other_than_a_boolean_is_rejected(flag, found):
    message = refusal(output_of({"binary_data": flag}))
    assert message == f"outputs[0] 'y': parameters.binary_data is {found}, expected a boolean"
    message = refusal({"inputs": [VALID], "parameters": {"binary_data_output": flag}})
    assert message == f"parameters.binary_data_output is {found}, expected a boolean"


@pytest.mark.parametrize("k", [1, 5, 2**64 - 1])
def test_output_may_be_requested_as_classes(k):
    assert decode(output_of({"classification": k})).outputs == (("y", False, k),)


def test_classes_may_be_requested_in_binary():
    assert decode(output_of({"classification": 2, "binary_data": True})).outputs == (("y", True, 2),)


def test_classes_follow_the_flag_of_the_request():
    request = decode(output_of({"classification": 2}) | {"parameters": {"binary_data_output": True}})
    assert request.outputs == (("y", True, 2),)


def test_classification_in_the_parameters_of_the_request_is_ignored():
    assert decode({"inputs": [VALID], "parameters": {"classification": "x"}}).outputs == ()


NO_INTEGERS = [(-1, "-1"), (-(2**63), "-9223372036854775808"), (1.0, "1.0"), (2.5, "2.5")]
NO_INTEGERS += [(2**64, "1.8446744073709552e+19"), ("2", '"2"'), (True, "true"), (False, "false")]


@pytest.mark.parametrize(("k", "found"), [(0, "0"), *NO_INTEGERS])
def test_classification_other_than_an_integer_from_1_is_rejected(k, found):
    message = refusal(output_of({"classification": k}))
    assert message == f"outputs[0] 'y': parameters.classification is {found}, expected an integer of at least 1"


def test_classification_null_is_rejected():
    message = refusal(output_of({"classification": None}))
    assert message == f"outputs[0] 'y': parameters.classification is null, {WRONG_PARAMETER}"


# --- Timeout, priority and sequence parameters


@pytest.mark.parametrize("timeout", [0, 1, 1000, 2**64 - 1])
def test_timeout_of_a_request_is_kept(timeout):
    assert decode({"inputs": [VALID], "parameters": {"timeout": timeout}}).timeout_us == timeout


def test_request_without_timeout_has_no_limit():
    assert decode({"inputs": [VALID], "parameters": {"priority": 1}}).timeout_us == 0


@pytest.mark.parametrize("priority", [0, 1, 2**64 - 1])
def test_any_priority_is_accepted(priority):
    assert decode({"inputs": [VALID], "parameters": {"priority": priority}}).parameters == {"priority": priority}


@pytest.mark.parametrize("name", ["priority", "timeout"])
@pytest.mark.parametrize(("value", "found"), NO_INTEGERS)
def test_priority_or_timeout_other_than_an_integer_from_0_is_rejected(name, value, found):
    message = refusal({"inputs": [VALID], "parameters": {name: value}})
    assert message == f"parameters.{name} is {found}, expected an integer of at least 0"


LARGE = {"inputs": [VALID | {"shape": [2000], "data": [0.123456789] * 2000}]}


def test_invalid_timeout_of_a_large_request_gets_the_same_message():
    message = refusal(LARGE | {"parameters": {"timeout": -1}})
    assert message == "parameters.timeout is -1, expected an integer of at least 0"


def test_large_request_keeps_its_timeout():
    assert decode(LARGE | {"parameters": {"timeout": 7, "priority": 2}}).timeout_us == 7


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_id": 7},
        {"sequence_id": "seven"},
        {"sequence_id": 0, "sequence_start": False, "sequence_end": False},
        {"sequence_id": 2**64 - 1, "sequence_start": True, "sequence_end": True},
    ],
)
def test_sequence_parameters_are_accepted_and_ignored(parameters):
    request = decode({"inputs": [VALID], "parameters": parameters})
    assert (request.parameters, request.timeout_us, request.inputs[0].array.tolist()) == (parameters, 0, [1.5])


# --- Shared memory

NO_SHARED_MEMORY = (
    "parameters.shared_memory_region asks for shared memory, which is not supported; "
    "send and receive the data in JSON or as binary"
)


@pytest.mark.parametrize("item", [VALID, without(VALID, "data")], ids=["with data", "without data"])
def test_input_in_shared_memory_is_rejected(item):
    parameters = {"shared_memory_region": "region", "shared_memory_byte_size": 4}
    assert refusal_of_input(item | {"parameters": parameters}) == f"inputs[0] 'x': {NO_SHARED_MEMORY}"


def test_output_in_shared_memory_is_rejected():
    message = refusal(output_of({"shared_memory_region": "region", "shared_memory_byte_size": 4}))
    assert message == f"outputs[0] 'y': {NO_SHARED_MEMORY}"
