"""Encoding of responses to JSON and binary tensors."""

import json

import numpy as np
import pytest
from decoded_requests import refused
from wire_cases import BF16, CASES, DTYPES

from ovms_rest.protocol.encoding import encode_response
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import InferenceResponse, Tensor

# For these, several JSON numbers round to the same value.
HALVES = {"FP16": np.float16, "BF16": BF16}


def encode(*tensors, binary=False, request_id=""):
    """Return an encoded response with these outputs; `binary` is for all, or a sequence for each."""
    flags = (binary,) * len(tensors) if isinstance(binary, bool) else binary
    return encode_response(InferenceResponse("m", "3", list(zip(tensors, flags, strict=True)), request_id))


def encode_json(array, datatype="FP32"):
    """Return the data of an output as JSON text."""
    head, sections = encode(Tensor("y", datatype, array))
    assert sections == []
    return head.split(b'"data":', 1)[1].removesuffix(b"}]}").decode()


def encode_binary(array, datatype="FP32"):
    _, sections = encode(Tensor("y", datatype, array), binary=True)
    return b"".join(map(bytes, sections))


# --- The table of wire cases


@pytest.mark.parametrize("case", [case for case in CASES if case.datatype not in HALVES], ids=lambda case: case.name)
def test_array_becomes_json_data(case):
    """Compared as text, where 1, 1.0 and true differ, and 0.0 and -0.0 too."""
    head, sections = encode(Tensor("y", case.datatype, case.array))
    (output,) = json.loads(head)["outputs"]
    assert (output["datatype"], tuple(output["shape"]), sections) == (case.datatype, case.shape, [])
    assert repr(output["data"]) == repr(case.data)


@pytest.mark.parametrize("case", [case for case in CASES if case.datatype in HALVES], ids=lambda case: case.name)
def test_16_bit_floats_become_numbers_that_round_back(case):
    head, _ = encode(Tensor("y", case.datatype, case.array))
    (output,) = json.loads(head)["outputs"]
    assert (output["datatype"], tuple(output["shape"])) == (case.datatype, case.shape)
    assert np.array(output["data"], np.float64).astype(HALVES[case.datatype]).tobytes() == case.binary


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_array_becomes_binary_data(case):
    head, sections = encode(Tensor("y", case.datatype, case.array), binary=True)
    (output,) = json.loads(head)["outputs"]
    parameters = {"binary_data_size": len(case.binary)}
    assert output == {"name": "y", "datatype": case.datatype, "shape": list(case.shape), "parameters": parameters}
    assert b"".join(map(bytes, sections)) == case.binary


# --- Numbers in JSON


@pytest.mark.parametrize("datatype", HALVES)
def test_every_16_bit_float_has_a_json_number_that_rounds_back_or_null(datatype):
    array = np.arange(2**16, dtype=np.uint16).view(HALVES[datatype])
    data = json.loads(encode_json(array, datatype))
    finite = np.isfinite(array.astype(np.float32))
    assert [number is not None for number in data] == finite.tolist()
    numbers = np.array([number for number in data if number is not None], np.float64)
    assert numbers.astype(HALVES[datatype]).tobytes() == array[finite].tobytes()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.1, 0.2, 0.3], "[0.1,0.2,0.3]"),
        ([1 / 3, 2 / 3], "[0.33333334,0.6666667]"),
        ([1.0, -1.0, 0.0, -0.0], "[1.0,-1.0,0.0,-0.0]"),
        ([16777216.0, 123456.79], "[16777216.0,123456.79]"),
    ],
)
def test_fp32_is_written_in_its_shortest_form(values, text):
    assert encode_json(np.array(values, np.float32)) == text


def test_fp64_is_written_in_its_shortest_form():
    assert encode_json(np.array([0.1, 1 / 3, 0.1 + 0.2]), "FP64") == "[0.1,0.3333333333333333,0.30000000000000004]"


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_nans_and_infinities_are_null(datatype):
    array = np.array([np.nan, 1.0, np.inf, -np.inf, -np.nan], DTYPES[datatype])
    assert encode_json(array, datatype) == "[null,1.0,null,null,null]"


@pytest.mark.parametrize(
    ("datatype", "digits"),
    [
        ("FP16", "007e 017e 00fe 007c 00fc"),
        ("BF16", "c07f c17f c0ff 807f 80ff"),
        ("FP32", "0000c07f 0100c07f 0100a07f 0000807f 000080ff"),
        ("FP64", "000000000000f87f 010000000000f8ff 010000000000f47f 000000000000f07f 000000000000f0ff"),
    ],
)
def test_nans_and_infinities_are_intact_in_binary(datatype, digits):
    binary = bytes.fromhex(digits)
    assert encode_binary(np.frombuffer(binary, DTYPES[datatype]), datatype) == binary


# --- Keys


@pytest.mark.parametrize(("request_id", "member"), [("7", '"id":"7",'), ("", "")], ids=["with id", "without id"])
@pytest.mark.parametrize(
    ("binary", "values"),
    [(False, '"data":[0,0]'), (True, '"parameters":{"binary_data_size":2}')],
    ids=["JSON", "binary"],
)
def test_response_has_its_keys_in_order_without_whitespace(binary, values, request_id, member):
    head, _ = encode(Tensor("y", "INT8", np.zeros((1, 2), np.int8)), binary=binary, request_id=request_id)
    assert head.decode() == (
        f'{{"model_name":"m","model_version":"3",{member}'
        f'"outputs":[{{"name":"y","datatype":"INT8","shape":[1,2],{values}}}]}}'
    )


def test_names_and_ids_may_be_any_text():
    text = '\u00e9\u65e5\U0001f600"\\\0\n'
    response = InferenceResponse(text, "1", [(Tensor(text, "INT8", np.zeros(0, np.int8)), False)], text)
    root = json.loads(encode_response(response)[0])
    assert (root["model_name"], root["id"], root["outputs"][0]["name"]) == (text, text, text)


# --- Several outputs


def test_outputs_keep_their_order():
    tensors = [Tensor(name, "INT8", np.zeros(1, np.int8)) for name in ("z", "a", "m")]
    assert [output["name"] for output in json.loads(encode(*tensors)[0])["outputs"]] == ["z", "a", "m"]


def test_binary_data_follows_in_the_order_of_the_outputs():
    tensors = [
        Tensor("z", "INT8", np.array([1, 2], np.int8)),
        Tensor("j", "INT8", np.array([3], np.int8)),
        Tensor("e", "FP32", np.zeros((0, 2), np.float32)),
        Tensor("a", "BYTES", BytesArray.of([b"x"], (1,))),
        Tensor("n", "BYTES", BytesArray.of([], (0,))),
        Tensor("m", "INT16", np.array([4], np.int16)),
    ]
    head, sections = encode(*tensors, binary=(True, False, True, True, True, True))
    assert list(map(bytes, sections)) == [b"\1\2", b"\1\0\0\0x", b"\4\0"]
    outputs = json.loads(head)["outputs"]
    sizes = [output.get("parameters") for output in outputs]
    assert sizes == [None if size is None else {"binary_data_size": size} for size in (2, None, 0, 5, 0, 2)]
    assert ["data" in output for output in outputs] == [False, True, False, False, False, False]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2**40, 0)])
@pytest.mark.parametrize("datatype", [*DTYPES, "BYTES"])
def test_empty_binary_output_has_size_0_and_no_section(datatype, shape):
    if datatype == "BYTES":
        array = BytesArray(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(0, np.uint8))
    else:
        array = np.zeros(shape, DTYPES[datatype])
    head, sections = encode(Tensor("y", datatype, array), binary=True)
    assert sections == []
    assert json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": 0}


# --- Memory


@pytest.mark.parametrize("datatype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_binary_section_is_a_view_on_the_tensor(datatype, shape):
    array = np.zeros(shape, DTYPES[datatype])
    _, (section,) = encode(Tensor("y", datatype, array), binary=True)
    assert np.shares_memory(np.frombuffer(section, np.uint8), array)
    assert len(section) == array.nbytes


def test_tensor_in_read_only_memory_is_encoded():
    array = np.frombuffer(b"\1\0\2\0", np.int16)
    assert encode_json(array, "INT16") == "[1,2]"
    assert encode_binary(array, "INT16") == b"\1\0\2\0"


LAYOUTS = {
    "transposed": lambda dtype: np.arange(6).astype(dtype).reshape(2, 3).T,
    "Fortran": lambda dtype: np.asfortranarray(np.arange(6).astype(dtype).reshape(2, 3)),
    "columns": lambda dtype: np.arange(12).astype(dtype).reshape(3, 4)[:, ::2],
    "rows": lambda dtype: np.arange(12).astype(dtype).reshape(4, 3)[::2],
    "every second": lambda dtype: np.arange(6).astype(dtype)[::2],
    "every second as a column": lambda dtype: np.arange(6).astype(dtype).reshape(6, 1)[::2],
    "reversed": lambda dtype: np.arange(6).astype(dtype)[::-1],
    "repeated": lambda dtype: np.broadcast_to(np.arange(3).astype(dtype), (2, 3)),
    "one repeated": lambda dtype: np.broadcast_to(np.ones((), dtype), (3,)),
}


@pytest.mark.parametrize("datatype", ["UINT8", "BF16", "FP32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_array_becomes_row_major_json(layout, datatype):
    array = LAYOUTS[layout](DTYPES[datatype])
    assert json.loads(encode_json(array, datatype)) == array.astype(np.float64).ravel().tolist()


@pytest.mark.parametrize("datatype", ["UINT8", "BF16", "FP32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_array_becomes_row_major_binary(layout, datatype):
    """The section is one contiguous buffer, as sending by a socket needs it."""
    array = LAYOUTS[layout](DTYPES[datatype])
    head, (section,) = encode(Tensor("y", datatype, array), binary=True)
    assert memoryview(section).contiguous
    assert bytes(section) == array.tobytes()
    assert json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": array.nbytes}


# --- Strings


@pytest.mark.parametrize("element", [b"\xff", b"abc\x80", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_string_that_is_not_utf8_is_rejected_in_json(element):
    assert refused(encode, Tensor("y", "BYTES", BytesArray.of([b"ok", element], (2,)))) == (
        "output 'y': string 1 is not valid UTF-8 and cannot be returned in JSON; ask for binary by "
        "parameters.binary_data of the output or parameters.binary_data_output of the request; if the body is only the "
        "data of an input, ask by 'Inference-Header-Content-Length: 0'"
    )


def test_string_that_is_not_utf8_is_kept_in_binary():
    assert encode_binary(BytesArray.of([b"\xff\0"], (1,)), "BYTES") == b"\2\0\0\0\xff\0"


def test_strings_inside_a_body_are_encoded_without_its_other_bytes():
    array = BytesArray(np.array([1], np.int32), np.array([2], np.int32), np.frombuffer(b"\xffa\xff", np.uint8))
    assert encode_json(array, "BYTES") == '["a"]'
    assert encode_binary(array, "BYTES") == b"\1\0\0\0a"
