"""Decoding: what the bytes of a request become, and in which words they are refused."""

import json
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from costs import measure_cost
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_cases import CASES, DTYPES, fingerprint

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.datatypes import round_to_bfloat16
from ovms_rest.protocol.decoding import (
    decode_raw_request,
    decode_request,
    decode_request_start,
)
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs

VALID = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}
BINARY = {"name": "x", "shape": [2], "datatype": "INT16"}
STRINGS = {"name": "s", "shape": [1], "datatype": "BYTES"}
HEADER = "Inference-Header-Content-Length"
ANY = Dim(0, None)

INTEGERS = {
    "INT8": (-(2**7), 2**7 - 1),
    "INT16": (-(2**15), 2**15 - 1),
    "INT32": (-(2**31), 2**31 - 1),
    "INT64": (-(2**63), 2**63 - 1),
    "UINT8": (0, 2**8 - 1),
    "UINT16": (0, 2**16 - 1),
    "UINT32": (0, 2**32 - 1),
    "UINT64": (0, 2**64 - 1),
}


def decode(root, binary=None):
    """Decode a request, a value or JSON text; with `binary` behind the JSON if that is given."""
    head = root if isinstance(root, bytes) else json.dumps(root).encode()
    if binary is None:
        return decode_request(memoryview(head))
    return decode_request(memoryview(head + binary), len(head))


def decode_inputs(*items, binary=None):
    return [tensor.array for tensor in decode({"inputs": items}, binary).inputs]


def refusal(root, binary=None):
    with pytest.raises(InvalidRequestError) as caught:
        decode(root, binary)
    return str(caught.value)


def refusal_of_input(item, binary=None):
    return refusal({"inputs": [item]}, binary)


def written(datatype, shape, data):
    """Write a request whose `data` is the given text."""
    return b'{"inputs":[{"name":"x","shape":%s,"datatype":"%s","data":%s}]}' % (
        json.dumps(shape).encode(),
        datatype.encode(),
        data.encode(),
    )


def decode_numbers(datatype, text):
    """Decode the numbers of a text, `1, 2`, as elements of a datatype."""
    return decode(written(datatype, [text.count(",") + 1], f"[{text}]")).inputs[0].array


def without(item, key):
    return {name: value for name, value in item.items() if name != key}


def nested(levels, brackets=b"[]"):
    """Write arrays, or objects with the key "k", nested in each other."""
    if brackets == b"[]":
        return b"[" * levels + b"]" * levels
    return b'{"k":' * (levels - 1) + b"{}" + b"}" * (levels - 1)


# --- The table of wire cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_json_data_becomes_the_array(case):
    (array,) = decode_inputs({"name": "x", "shape": case.shape, "datatype": case.datatype, "data": case.data})
    assert fingerprint(array) == fingerprint(case.array)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_binary_data_becomes_the_array(case):
    item = {"name": "x", "shape": case.shape, "datatype": case.datatype}
    (array,) = decode_inputs(item | {"parameters": {"binary_data_size": len(case.binary)}}, binary=case.binary)
    assert fingerprint(array) == fingerprint(case.array)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_binary_input_may_omit_its_size(case):
    item = {"name": "x", "shape": case.shape, "datatype": case.datatype}
    (array,) = decode_inputs(item, binary=case.binary)
    assert fingerprint(array) == fingerprint(case.array)


def test_all_wire_cases_fit_into_one_binary_request():
    items = [
        {
            "name": case.name,
            "shape": case.shape,
            "datatype": case.datatype,
            "parameters": {"binary_data_size": len(case.binary)},
        }
        for case in CASES
    ]
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
        (
            {"outputs": [{"name": "y", "parameters": []}]},
            f"outputs[0] 'y': parameters is an array, {WRONG_PARAMETERS}",
        ),
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

PLACES = {
    "root": (2, b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}],"unknown":%s}'),
    "input": (4, b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[],"unknown":%s}]}'),
    "output": (
        4,
        b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}],"outputs":[{"name":"y","unknown":%s}]}',
    ),
    "second input": (
        4,
        b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]},'
        b'{"unknown":%s,"name":"z","shape":[0],"datatype":"INT8","data":[]}]}',
    ),
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
        b'{"parameters":{"p":%s},"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[],"parameters":{"p":%s}}]}',
        b'{"id":%s,"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"outputs":%s,"inputs":[{"name":"x","shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":%s,"shape":[0],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[%s],"datatype":"INT8","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[0],"datatype":%s,"data":[]}]}',
    ],
    ids=["parameters", "parameters of an input", "id", "outputs", "name", "shape", "datatype"],
)
@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
def test_container_in_a_known_key_is_rejected_for_its_type(text, brackets):
    """None of them takes an array or object, but for `data`, whose depth is told."""
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
    """An object is no element, however deep it is, and is too deep for orjson to be repeated in a message."""
    message = refusal(written(datatype, [1], "[" + nested(300, b"{}").decode() + "]"))
    assert message.startswith("inputs[0] 'x': data[0] is an object, ")


# --- Shapes


@pytest.mark.parametrize("shape", [[0], [0, 10], [2**20, 0], [0, 2**19, 2], [0] * 64, [1, 0, 1]])
@pytest.mark.parametrize("datatype", ["BOOL", "BF16", "FP64", "BYTES"])
def test_shape_without_elements_is_kept(datatype, shape):
    (array,) = decode_inputs({"name": "x", "shape": shape, "datatype": datatype, "data": []})
    assert array.shape == tuple(shape)


@pytest.mark.parametrize(
    "shape", [[0, 2**20 + 1], [2**63 - 1, 0], [2**31, 2**31, 0], [0] + [2**63 - 1] * 63], ids=lambda shape: len(shape)
)
@pytest.mark.parametrize("datatype", ["BOOL", "FP64", "BYTES"])
def test_shape_without_elements_but_huge_dims_is_rejected(datatype, shape):
    for item in ({"data": []}, {}):
        message = refusal_of_input({"name": "x", "shape": shape, "datatype": datatype} | item)
        dims = ",".join(map(str, shape))
        assert message == (
            f"inputs[0] 'x': the dims of shape [{dims}] other than 0 multiply to more than {2**20}, the limit"
        )


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
    assert "bytes of binary data, but the body has 0 left" in refusal_of_input(
        without(VALID | {"shape": shape}, "data"), b""
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


# --- Values that are no elements


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
        ("BYTES", '"a"', ["1", "1.5", "true", "null"], "BYTES takes strings"),
    ],
)
def test_element_of_another_json_type_is_rejected(datatype, good, bad, values):
    for element in bad:
        message = refusal(written(datatype, [2], f"[{good},{element}]"))
        kind = "the string " if element[0] == '"' else "the boolean " if element in ("true", "false") else ""
        assert message == f"inputs[0] 'x': data[1] is {kind}{element}, {values}"


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", "BOOL takes true or false"),
        ("INT8", "INT8 takes integers"),
        ("FP32", "FP32 takes numbers"),
        ("BYTES", "BYTES takes strings"),
    ],
)
def test_object_among_the_elements_is_rejected(datatype, values):
    message = refusal(written(datatype, [1], '[{"a":1}]'))
    assert message.startswith("inputs[0] 'x': data[0] is ")
    assert message.endswith(values)


def test_strings_become_utf8_with_their_nuls():
    (array,) = decode_inputs(STRINGS | {"shape": [3], "data": ["\u00e9\0", "", "\U0001f600"]})
    assert array.elements() == [b"\xc3\xa9\0", b"", b"\xf0\x9f\x98\x80"]


def test_limit_of_strings_counts_all_inputs_of_a_request():
    most = 2**23
    items = [{"name": name, "shape": [count], "datatype": "BYTES", "data": []} for name, count in (("a", 0), ("b", 1))]
    message = refusal({"inputs": [{**items[0], "shape": [most + 1]}]})
    assert message == f"inputs[0] 'a': the request has {most + 1} strings up to here, at most {most} are allowed"
    sizes = [{**STRINGS, "shape": [most], "parameters": {"binary_data_size": 4 * most}}, {**items[1], "data": ["a"]}]
    message = refusal({"inputs": sizes}, bytes(4 * most))
    assert message == f"inputs[1] 'b': the request has {most + 1} strings up to here, at most {most} are allowed"


def test_largest_allowed_number_of_strings_is_decoded():
    (array,) = decode_inputs({**STRINGS, "shape": [2**23]}, binary=bytes(2**25))
    assert array.begins[-1] == array.ends[-1] == 2**25


# --- What a model has


def takes(*names):
    return {name: TensorMetadata(name, "FP32", (ANY,)) for name in names}


ONE_AND_TWO = ModelMetadata("m", "1", takes("x"), takes("y", "z"))


@pytest.mark.parametrize("large_size", [0, 10**6], ids=["simdjson", "orjson"])
def test_more_inputs_than_the_model_has_are_rejected_before_decoding(large_size):
    body = memoryview(json.dumps({"inputs": [VALID, {"name": 0}, None]}).encode())
    with pytest.raises(InvalidRequestError) as caught:
        decode_request(body, None, large_size, ONE_AND_TWO)
    assert str(caught.value) == "inputs has 3 entries, but model 'm' has only 1: 'x'"


@pytest.mark.parametrize(
    ("names", "fault"), [(["x", "q"], "inputs[1] 'q' is unknown"), (["x", "x"], "inputs[1] 'x' is repeated")]
)
def test_first_invalid_one_of_too_many_inputs_is_named(names, fault):
    body = memoryview(json.dumps({"inputs": [{**VALID, "name": name} for name in names]}).encode())
    with pytest.raises(InvalidRequestError) as caught:
        decode_request(body, model=ONE_AND_TWO)
    assert str(caught.value) == f"inputs has 2 entries, but model 'm' has only 1: 'x'; {fault}"


def test_more_outputs_than_the_model_has_are_rejected_before_decoding():
    body = memoryview(json.dumps({"inputs": [VALID], "outputs": [None] * 3}).encode())
    with pytest.raises(InvalidRequestError) as caught:
        decode_request(body, model=ONE_AND_TWO)
    assert str(caught.value) == "outputs has 3 entries, but model 'm' has only 2: 'y', 'z'"


def test_all_inputs_and_outputs_of_the_model_are_decoded():
    body = memoryview(json.dumps({"inputs": [VALID], "outputs": [{"name": "z"}, {"name": "y"}]}).encode())
    request = decode_request(body, model=ONE_AND_TWO)
    assert ([tensor.name for tensor in request.inputs], len(request.outputs)) == (["x"], 2)


def test_million_inputs_cost_no_more_than_their_json():
    """They ended a worker by its timeout."""
    make = 'from test_decoding import *; item = b\'{"name":"x","shape":[0],"datatype":"FP32"},\'; '
    make += "body = memoryview(b'{\"inputs\":[' + (item * 1_000_000)[:-1] + b']}')"
    cost = measure_cost(make, "decode_request(body, model=ONE_AND_TWO)")
    assert cost.error.startswith("BodyTooLargeError: the values of the JSON would take ")
    assert (cost.seconds, cost.mebibytes) < (0.5, 8)


# --- Rounding

# Of each datatype: bits of the significand, exponent of the smallest normal number, exponent beyond the largest.
FORMATS = {"FP16": (11, -14, 16), "BF16": (8, -126, 128), "FP32": (24, -126, 128)}


def round_exactly(value, datatype):
    """Round by rational arithmetic: to the nearest number of the datatype, ties to even; too large is an infinity."""
    bits, smallest, beyond = FORMATS[datatype]
    magnitude = abs(Fraction(value))
    if magnitude == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = Fraction(2) ** (exponent - bits + 1)
    rounded = round(magnitude / step) * step
    return math.copysign(math.inf if rounded >= Fraction(2) ** beyond else float(rounded), value)


def near_ties(datatype):
    """Draw FP64 values at, just above and just below the middle between two numbers of a datatype."""
    bits, smallest, beyond = FORMATS[datatype]
    offsets = st.integers(bits + 1, 52).flatmap(lambda bit: st.sampled_from([0.0, 2.0**-bit, -(2.0**-bit)]))
    return st.builds(
        lambda sign, step, offset, exponent: sign * math.ldexp((step + 0.5) / 2 ** (bits - 1) + offset, exponent),
        st.sampled_from([1.0, -1.0]),
        st.integers(2 ** (bits - 1), 2**bits - 1) | st.integers(0, 2 ** (bits - 1)),
        offsets,
        st.integers(smallest, beyond) | st.sampled_from([smallest, 0, beyond - 1]),
    )


def numbers_for(datatype):
    return st.floats(allow_nan=False, allow_infinity=False) | near_ties(datatype)


@settings(deadline=None, max_examples=500)
@given(st.lists(numbers_for("BF16"), max_size=20))
@example([1 + 2**-8 + 2**-40])
@example([2.0**128 - 2.0**119, -(2.0**128 - 2.0**119), 3.4e38, 1e300, 5e-324, -5e-324, 0.0, -0.0])
def test_rounding_to_bfloat16_is_exact(values):
    rounded = round_to_bfloat16(np.array(values, np.float64))
    assert rounded.dtype == ml_dtypes.bfloat16
    expected = np.array([round_exactly(value, "BF16") for value in values], np.float64)
    assert rounded.astype(np.float64).tobytes() == expected.tobytes()


@pytest.mark.parametrize("datatype", FORMATS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_json_numbers_are_rounded_once_from_64_bits(datatype, data):
    value = data.draw(numbers_for(datatype))
    expected = round_exactly(value, datatype)
    if math.isinf(expected):
        assert refusal(written(datatype, [1], f"[{value}]")).startswith("inputs[0] 'x': data[0] is ")
    else:
        array = decode_numbers(datatype, repr(value))
        assert array.astype(np.float64).tobytes() == np.float64(expected).tobytes()


@pytest.mark.parametrize(
    ("datatype", "value", "rounded"),
    [
        ("BF16", 1 + 2**-8, 1.0),
        ("BF16", 1 + 3 * 2**-8, 1.015625),
        ("BF16", 1 + 2**-8 + 2**-40, 1.0078125),
        ("BF16", 1 + 2**-8 - 2**-40, 1.0),
        ("BF16", 2.0**-134, 0.0),
        ("BF16", 2.0**-134 + 2.0**-180, 2.0**-133),
        ("FP16", 1 + 2**-11, 1.0),
        ("FP16", 1 + 3 * 2**-11, 1 + 2**-9),
        ("FP16", 1 + 2**-11 + 2**-40, 1 + 2**-10),
        ("FP16", 2.0**-25, 0.0),
        ("FP16", 2.0**-25 + 2.0**-70, 2.0**-24),
        ("FP32", 1 + 2**-24, 1.0),
        ("FP32", 1 + 3 * 2**-24, 1 + 2**-22),
        ("FP32", 1 + 2**-24 + 2**-50, 1 + 2**-23),
        ("FP32", 2.0**-150, 0.0),
        ("FP32", 2.0**-150 + 2.0**-200, 2.0**-149),
        ("FP64", 1 + 2**-52, 1 + 2**-52),
    ],
)
def test_ties_round_to_even_and_other_values_to_the_nearest(datatype, value, rounded):
    for sign in (1, -1):
        array = decode_numbers(datatype, repr(sign * value))
        assert array.astype(np.float64).tobytes() == np.float64(sign * rounded).tobytes()


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_integers_are_numbers_for_a_float_datatype(datatype):
    assert decode_numbers(datatype, "1,2.5,-3,1e2").tolist() == [1.0, 2.5, -3.0, 100.0]


def test_large_integers_are_rounded_to_64_bit_floats():
    array = decode_numbers("FP64", f"{2**53 + 1},{2**64 - 1},{2**70 + 1},{-(2**63)}")
    assert array.tolist() == [2.0**53, 2.0**64, 2.0**70, -(2.0**63)]


# For each datatype the first FP64 value that would become an infinity, and the largest number of the datatype.
OVERFLOWS = [
    ("FP16", 65520.0, 65504.0),
    ("BF16", 2.0**128 - 2.0**119, 2.0**128 - 2.0**120),
    ("FP32", 2.0**128 - 2.0**103, 2.0**128 - 2.0**104),
]


@pytest.mark.parametrize(("datatype", "first", "largest"), OVERFLOWS)
def test_number_just_below_the_overflow_becomes_the_largest(datatype, first, largest):
    below = math.nextafter(first, 0)
    assert decode_numbers(datatype, f"{below},{-below}").tolist() == [largest, -largest]


@pytest.mark.parametrize("factor", [1.0, 2.0, 1e200])
@pytest.mark.parametrize(("datatype", "first", "largest"), OVERFLOWS)
def test_overflow_to_infinity_is_rejected(datatype, first, largest, factor):
    for value in (first * factor, -first * factor):
        message = refusal(written(datatype, [2], f"[1,{value}]"))
        shown = message.removeprefix("inputs[0] 'x': data[1] is ").split(",", 1)[0]
        assert float(shown) == value
        assert message.endswith(f", {datatype} takes numbers up to {largest:.6g}")


def test_integer_overflows_a_float_datatype_like_any_number():
    message = refusal(written("FP16", [2], "[1,100000]"))
    assert message == "inputs[0] 'x': data[1] is 100000, FP16 takes numbers up to 65504"


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


TELLS = "(Inference-Header-Content-Length says where the JSON ends)"


@pytest.mark.parametrize(
    ("item", "binary", "message"),
    [
        (BINARY, None, f"inputs[0] 'x' needs 4 bytes of binary data, but the body has 0 left after the JSON {TELLS}"),
        (
            BINARY,
            b"\1\0\2",
            f"inputs[0] 'x' needs 4 bytes of binary data, but the body has 3 left after the JSON {TELLS}",
        ),
        (
            BINARY | {"shape": [2**63 - 1]},
            b"",
            "inputs[0] 'x' needs 18446744073709551614 bytes of binary data, "
            f"but the body has 0 left after the JSON {TELLS}",
        ),
        (
            STRINGS | {"parameters": {"binary_data_size": 5}},
            b"\0\0\0\0",
            f"inputs[0] 's' needs 5 bytes of binary data, but the body has 4 left after the JSON {TELLS}",
        ),
    ],
)
def test_too_few_binary_bytes_are_rejected(item, binary, message):
    assert refusal_of_input(item, binary) == message


@pytest.mark.parametrize(
    ("item", "binary", "message"),
    [
        (BINARY, b"123456", "the data after the JSON has 2 bytes more than the inputs take: 6 instead of 4"),
        (
            BINARY | {"shape": [0]},
            b"1",
            "the data after the JSON has 1 byte more than the inputs take: 1 instead of 0",
        ),
        (VALID, b"123", "the data after the JSON has 3 bytes more than the inputs take: 3 instead of 0"),
        (
            STRINGS | {"parameters": {"binary_data_size": 4}},
            b"\0\0\0\0\0",
            "the data after the JSON has 1 byte more than the inputs take: 5 instead of 4",
        ),
    ],
)
def test_extra_binary_bytes_are_rejected(item, binary, message):
    assert refusal_of_input(item, binary) == message


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
        ([1], "0000", "inputs[0] 's': the data ends after 2 of the 4 bytes that give the length of string 0"),
        (
            [2],
            "01000000 61 000000",
            "inputs[0] 's': the data ends after 3 of the 4 bytes that give the length of string 1",
        ),
        ([1], "05000000 616263", "inputs[0] 's': the length of string 0 is 5 bytes, but the data has only 3 left"),
        (
            [1],
            "ffffffff 616263",
            "inputs[0] 's': the length of string 0 is 4294967295 bytes, but the data has only 3 left",
        ),
        ([2], "01000000 61", "inputs[0] 's': its shape needs 2 strings, but the data has 1"),
        ([1], "", "inputs[0] 's': its shape needs 1 string, but the data has 0"),
        ([], "", "inputs[0] 's': its shape needs 1 string, but the data has 0"),
        (
            [1],
            "01000000 61 01000000 62",
            "inputs[0] 's': its shape needs 1 string, which leaves 5 bytes of the data unused",
        ),
        ([1], "01000000 61 62", "inputs[0] 's': its shape needs 1 string, which leaves 1 byte of the data unused"),
        ([0], "00000000", "inputs[0] 's': its shape needs 0 strings, which leaves 4 bytes of the data unused"),
        ([8388609], "", "inputs[0] 's': the request has 8388609 strings up to here, at most 8388608 are allowed"),
    ],
)
def test_binary_strings_that_do_not_fill_their_section_are_rejected(shape, binary, message):
    section = bytes.fromhex(binary)
    assert refusal_of_input(STRINGS | {"shape": shape}, section) == message
    sized = STRINGS | {"shape": shape, "parameters": {"binary_data_size": len(section)}}
    assert refusal_of_input(sized, section) == message


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
    with pytest.raises(InvalidRequestError, match=r"^the request is not valid JSON: "):
        decode_request(memoryview(body), len(body) - 1)


def test_header_length_that_reaches_into_the_tensors_is_rejected():
    body = json.dumps({"inputs": [BINARY]}).encode() + b"\1\0\2\0"
    with pytest.raises(InvalidRequestError, match=r"^the request is not valid JSON: "):
        decode_request(memoryview(body), len(body) - 3)


# --- Views


def aligned(head, binary, offset=0):
    """Lay out a body whose binary part begins at an address that is `offset` beyond a multiple of 64."""
    body = np.zeros(len(head) + len(binary) + 128, np.uint8)
    start = (offset - body.ctypes.data - len(head)) % 64
    body = body[start : start + len(head) + len(binary)]
    body[:] = np.frombuffer(head + binary, np.uint8)
    return body


@pytest.mark.parametrize("case", [case for case in CASES if case.binary], ids=lambda case: case.name)
def test_binary_tensor_is_a_view_on_the_body(case):
    head = json.dumps({"inputs": [{"name": "x", "shape": case.shape, "datatype": case.datatype}]}).encode()
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


def test_raw_tensor_is_a_view_on_the_body():
    body = aligned(b"", bytes(8))
    array = raw(body.data, "FP32", Dim(2, 2)).inputs[0].array
    assert np.shares_memory(array, body)


# --- Raw bodies


def raw(body, datatype, *dims):
    return decode_raw_request(memoryview(body), {"x": TensorMetadata("x", datatype, dims)})


def refusal_of_raw(body, datatype, *dims):
    """Take the message of the first step, decoding or validation, that refuses a raw body."""
    metadata = TensorMetadata("x", datatype, dims)
    with pytest.raises(InvalidRequestError) as caught:
        validate_inputs(
            decode_raw_request(memoryview(body), {"x": metadata}), ModelMetadata("m", "1", {"x": metadata}, {})
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("dims", "size", "shape"),
    [
        ((), 4, ()),
        ((Dim(2, 2), Dim(3, 3)), 24, (2, 3)),
        ((Dim(0, 0), Dim(3, 3)), 0, (0, 3)),
        ((ANY,), 12, (3,)),
        ((ANY,), 0, (0,)),
        ((ANY, Dim(3, 3)), 24, (2, 3)),
        ((Dim(2, 2), ANY), 24, (2, 3)),
        ((Dim(1, 1), ANY, Dim(3, 3)), 24, (1, 2, 3)),
        ((Dim(1, 8), Dim(3, 3)), 24, (2, 3)),
        ((Dim(2, 2), Dim(2, None)), 24, (2, 3)),
        ((ANY, ANY), 12, (1, 3)),
        ((ANY, Dim(2, 2), ANY), 24, (1, 2, 3)),
        ((Dim(1, 4), Dim(1, 4)), 12, (1, 3)),
        ((ANY, ANY), 0, (1, 0)),
    ],
)
def test_raw_body_has_the_shape_of_the_model(dims, size, shape):
    (tensor,) = raw(bytes(size), "FP32", *dims).inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", "FP32", shape)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.datatype != "BYTES" and case.binary], ids=lambda case: case.name
)
def test_raw_body_becomes_the_array(case):
    (tensor,) = raw(case.binary, case.datatype, *(Dim(dim, dim) for dim in case.shape)).inputs
    assert fingerprint(tensor.array) == fingerprint(case.array)


@pytest.mark.parametrize(
    "dims", [(), (Dim(1, 1),), (ANY,), (ANY, ANY), (Dim(0, 4), Dim(1, 1)), (Dim(1, None),)], ids=range(6)
)
@pytest.mark.parametrize("body", [b"", b"abc", b"\xff\0\0", b"\3\0\0\0abc"])
def test_raw_body_of_bytes_is_one_string(dims, body):
    (tensor,) = raw(body, "BYTES", *dims).inputs
    assert (tensor.shape, tensor.array.elements()) == ((1,) * len(dims), [body])


def test_raw_request_gets_all_outputs_in_binary():
    request = raw(bytes(4), "FP32")
    assert (request.outputs, request.binary_output, request.id) == ((), True, "")


@pytest.mark.parametrize(
    ("datatype", "dims", "size", "message"),
    [
        ("FP32", (), 3, "input 'x': shape [] takes 4 bytes of FP32, the body has 3"),
        ("FP32", (), 0, "input 'x': shape [] takes 4 bytes of FP32, the body has 0"),
        ("FP32", (Dim(2, 2),), 12, "input 'x': shape [2] takes 8 bytes of FP32, the body has 12"),
        ("INT8", (Dim(0, 0),), 1, "input 'x': shape [0] takes 0 bytes of INT8, the body has 1"),
        ("FP32", (ANY, Dim(2, 2)), 12, "input 'x': shape [-1,2] takes a multiple of 8 bytes of FP32, the body has 12"),
        ("FP32", (ANY, ANY), 6, "input 'x': shape [-1,-1] takes a multiple of 4 bytes of FP32, the body has 6"),
        ("FP32", (Dim(1, 2),), 12, "input 'x': shape is [3], the model takes [1:2]"),
        ("FP32", (Dim(4, None),), 12, "input 'x': shape is [3], the model takes [4:]"),
        ("FP32", (ANY, Dim(1, 2)), 12, "input 'x': shape is [1,3], the model takes [-1,1:2]"),
        ("FP32", (Dim(2, 4), ANY), 24, "input 'x': shape is [1,6], the model takes [2:4,-1]"),
        (
            "FP32",
            (ANY, ANY, ANY),
            24,
            "input 'x': shape [-1,-1,-1] has 2 open dims besides dim 0, which the size of a raw body does not "
            "determine; send JSON that gives the shape",
        ),
        (
            "FP32",
            (Dim(2, 2), ANY, Dim(1, 8)),
            24,
            "input 'x': shape [2,-1,1:8] has 2 open dims besides dim 0, which the size of a raw body does not "
            "determine; send JSON that gives the shape",
        ),
        ("BYTES", (Dim(2, 2),), 3, "input 'x': a raw body is one string, but the model's shape is [2]"),
        ("BYTES", (Dim(0, 0),), 3, "input 'x': a raw body is one string, but the model's shape is [0]"),
        ("BYTES", (ANY, Dim(2, 3)), 3, "input 'x': a raw body is one string, but the model's shape is [-1,2:3]"),
    ],
)
def test_raw_body_that_does_not_fit_the_model_is_rejected(datatype, dims, size, message):
    assert refusal_of_raw(bytes(size), datatype, *dims) == message


@pytest.mark.parametrize("size", [0, 4])
def test_raw_body_cannot_determine_a_dim_beside_one_of_size_0(size):
    message = refusal_of_raw(bytes(size), "FP32", ANY, Dim(0, 0))
    assert message.startswith("input 'x': shape [-1,0] takes ")
    assert message.endswith(f" bytes of FP32, the body has {size}")


def test_raw_bool_body_takes_only_0_and_1():
    assert refusal_of_raw(b"\0\2", "BOOL", ANY) == "input 'x': BOOL element 1 is the byte 2, expected 0 or 1"


def test_raw_body_for_a_model_with_two_inputs_is_rejected():
    inputs = {name: TensorMetadata(name, "FP32", (Dim(1, 1),)) for name in ("a", "b")}
    with pytest.raises(InvalidRequestError) as caught:
        decode_raw_request(memoryview(bytes(4)), inputs)
    assert str(caught.value) == (
        f"{HEADER} is 0, which makes the body the data of a model's only input, but this model has 2 inputs: [a,b]"
    )


# --- Outputs


def test_requested_outputs_keep_their_order_and_repetitions():
    request = decode({"inputs": [VALID], "outputs": [{"name": "z"}, {"name": "a"}, {"name": "z"}]})
    assert [output.name for output in request.outputs] == ["z", "a", "z"]


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
    request = decode({"inputs": [VALID], "parameters": of_request, "outputs": [{"name": "y", "parameters": of_output}]})
    assert request.outputs == (("y", binary, 0),)


@pytest.mark.parametrize(("parameters", "binary"), [({}, False), ({"binary_data_output": True}, True)])
def test_flag_of_the_request_applies_to_outputs_not_listed(parameters, binary):
    assert decode({"inputs": [VALID], "parameters": parameters}).binary_output == binary


@pytest.mark.parametrize(
    ("flag", "found"), [(1, "the number 1"), (0, "the number 0"), (1.0, "the number 1.0"), ("true", "a string")]
)
def test_flag_other_than_a_boolean_is_rejected(flag, found):
    request = {"inputs": [VALID], "outputs": [{"name": "y", "parameters": {"binary_data": flag}}]}
    assert refusal(request) == f"outputs[0] 'y': parameters.binary_data is {found}, expected a boolean"
    request = {"inputs": [VALID], "parameters": {"binary_data_output": flag}}
    assert refusal(request) == f"parameters.binary_data_output is {found}, expected a boolean"


@pytest.mark.parametrize("k", [1, 5, 2**64 - 1])
def test_output_may_be_requested_as_classes(k):
    request = decode({"inputs": [VALID], "outputs": [{"name": "y", "parameters": {"classification": k}}]})
    assert request.outputs == (("y", False, k),)


def test_classes_may_be_requested_in_binary():
    parameters = {"classification": 2, "binary_data": True}
    request = decode({"inputs": [VALID], "outputs": [{"name": "y", "parameters": parameters}]})
    assert request.outputs == (("y", True, 2),)


def test_classes_follow_the_flag_of_the_request():
    output = {"name": "y", "parameters": {"classification": 2}}
    request = decode({"inputs": [VALID], "parameters": {"binary_data_output": True}, "outputs": [output]})
    assert request.outputs == (("y", True, 2),)


def test_classification_in_the_parameters_of_the_request_is_ignored():
    assert decode({"inputs": [VALID], "parameters": {"classification": "x"}}).outputs == ()


NO_INTEGERS = [
    (-1, "-1"),
    (-(2**63), "-9223372036854775808"),
    (1.0, "1.0"),
    (2.5, "2.5"),
    (2**64, "1.8446744073709552e+19"),
    ("2", '"2"'),
    (True, "true"),
    (False, "false"),
]


@pytest.mark.parametrize(("k", "found"), [(0, "0"), *NO_INTEGERS])
def test_classification_other_than_an_integer_from_1_is_rejected(k, found):
    message = refusal({"inputs": [VALID], "outputs": [{"name": "y", "parameters": {"classification": k}}]})
    assert message == f"outputs[0] 'y': parameters.classification is {found}, expected an integer of at least 1"


def test_classification_null_is_rejected():
    message = refusal({"inputs": [VALID], "outputs": [{"name": "y", "parameters": {"classification": None}}]})
    assert message == f"outputs[0] 'y': parameters.classification is null, {WRONG_PARAMETER}"


# --- When it has to be answered


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


def test_invalid_timeout_of_a_large_request_gets_the_same_message():
    values = [0.123456789] * 2000
    request = {"inputs": [VALID | {"shape": [2000], "data": values}], "parameters": {"timeout": -1}}
    assert refusal(request) == "parameters.timeout is -1, expected an integer of at least 0"


def test_large_request_keeps_its_timeout():
    values = [0.123456789] * 2000
    request = {"inputs": [VALID | {"shape": [2000], "data": values}], "parameters": {"timeout": 7, "priority": 2}}
    assert decode(request).timeout_us == 7


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


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ("t=1612345678.123", 1612345678_123_000_000),
        ("1612345678.123", 1612345678_123_000_000),
        ("t=1612345678.000", 1612345678_000_000_000),
        ("t=1612345678.5", 1612345678_500_000_000),
        ("t=1612345678.123456", 1612345678_123_456_000),
        ("t=1612345678.123456789", 1612345678_123_456_789),
        ("t=0.001", 1_000_000),
        ("t=1612345678123", 1612345678_123_000_000),
        ("1612345678123", 1612345678_123_000_000),
        ("t=1612345678123456", 1612345678_123_456_000),
        ("1612345678123456", 1612345678_123_456_000),
    ],
)
def test_request_start_is_read_in_all_forms_of_proxies(value, start):
    assert decode_request_start(value) == start


@pytest.mark.parametrize(
    "value",
    [
        "",
        "t=",
        "t",
        ".",
        "t=.",
        "1612345678",
        "161234567812",
        "16123456781234",
        "1612345678123456789",
        "9" * 5000,
        "9" * 5000 + ".5",
        "1612345678." + "1" * 5000,
        "12345678901.5",
        "1612345678.1234567890",
        "1612345678.",
        ".123",
        "1612345678,123",
        "1.612345678e9",
        "-1612345678.123",
        "t=-1612345678123",
        "+1612345678123",
        "nan",
        "t=nan",
        "inf",
        "0x17",
        "1_612_345_678.1",
        " 1612345678.123",
        "1612345678.123 ",
        "t= 1612345678.123",
        "t =1612345678.123",
        "1612345678 .123",
        "1612345678.123\n",
        "1612345678.123\0",
        "T=1612345678.123",
        "ts=1612345678.123",
        "t=t=1612345678.123",
        "t=1612345678.123, t=1612345679.123",
        "\u0661\u0666\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668.\u0661",
        "161234567812\u0663",
        "161234567812\u00b3",
    ],
)
def test_invalid_request_start_is_none(value):
    assert decode_request_start(value) is None


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
    output = {"name": "y", "parameters": {"shared_memory_region": "region", "shared_memory_byte_size": 4}}
    assert refusal({"inputs": [VALID], "outputs": [output]}) == f"outputs[0] 'y': {NO_SHARED_MEMORY}"


def test_unknown_input_is_rejected_before_its_elements_are_counted():
    model = ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", (ANY,))}, {})
    body = json.dumps({"inputs": [{"name": "y", "shape": [784], "datatype": "FP32", "data": [0]}]}).encode()
    with pytest.raises(InvalidRequestError, match="input 'y' is unknown to model 'm', whose inputs are 'x'"):
        decode_request(memoryview(body), model=model)
