"""Requests and responses of TensorFlow Serving's REST API as values."""

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from calls import called
from hypothesis import example, given
from hypothesis import strategies as st
from wire_cases import DTYPES, fingerprint

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError
from ovms_rest.protocol.json_memory import BodyLimits
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.tfs import (
    _write_tokens,
    decode_prediction,
    describe_signature,
    describe_status,
    encode_prediction,
    measure_structure,
)

ANY = Dim(0, None)


def model_of(**datatypes):
    """Return a model whose inputs have these datatypes and any shape."""
    inputs = {name: TensorMetadata(name, datatype, (ANY,)) for name, datatype in datatypes.items()}
    return ModelMetadata("m", "1", inputs, {})


class Images:
    """Marks an input that takes encoded images."""

    def read(self, strings, label):
        raise NotImplementedError


X = model_of(x="FP32")
TWO = model_of(a="FP32", b="INT64")
IMAGES = ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", (ANY,) * 4, Images())}, {})
MATRIX = ModelMetadata("m", "1", {"x": TensorMetadata("x", "UINT8", (ANY, ANY))}, {})


def decode(root, model=X, **options):
    body = root if isinstance(root, bytes) else json.dumps(root).encode()
    return decode_prediction(memoryview(bytearray(body)), model, **options)


def arrays(root, model=X, **options):
    """Return what identifies each decoded array, by name."""
    return {tensor.name: fingerprint(tensor.array) for tensor in decode(root, model, **options).inputs}


def of(datatype, values):
    return fingerprint(np.array(values, DTYPES[datatype]))


def refusal(root, model=X, **options):
    with pytest.raises(InvalidRequestError) as error:
        decode(root, model, **options)
    return str(error.value)


# --- Rows and columns


@pytest.mark.parametrize(
    ("root", "values"),
    [
        ({"instances": [1.0, 2, 5.5]}, [1, 2, 5.5]),
        ({"instances": [[[1, 2]], [[3, 4]]]}, [[[1, 2]], [[3, 4]]]),
        ({"instances": [{"x": 1}, {"x": 2}]}, [1, 2]),
        ({"instances": [{"x": [1, 2]}, {"x": [3, 4]}]}, [[1, 2], [3, 4]]),
        ({"instances": [[], []]}, np.zeros((2, 0))),
        ({"inputs": 7}, 7),
        ({"inputs": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]]),
        ({"inputs": {"x": [[1], [3]]}}, [[1], [3]]),
        ({"inputs": []}, []),
        ({"inputs": [1], "signature_name": "serving_default"}, [1]),
        ({"inputs": [1], "signature_name": ""}, [1]),
        ({"inputs": [1], "unknown": {"a": [None]}}, [1]),
    ],
)
def test_values_of_the_only_input_may_have_a_name_or_none(root, values):
    assert arrays(root) == {"x": of("FP32", values)}


def test_instances_of_several_inputs_become_a_tensor_each():
    rows = {"instances": [{"a": [1, 2], "b": 3}, {"b": 4, "a": [5, 6]}]}
    columns = {"inputs": {"a": [[1, 2], [5, 6]], "b": [3, 4]}}
    expected = {"a": of("FP32", [[1, 2], [5, 6]]), "b": of("INT64", [3, 4])}
    assert arrays(rows, TWO) == arrays(columns, TWO) == expected


def test_columns_may_differ_in_their_first_dim():
    assert arrays({"inputs": {"a": [1, 2, 3], "b": 4}}, TWO) == {"a": of("FP32", [1, 2, 3]), "b": of("INT64", 4)}


def test_response_gets_the_form_of_its_request():
    assert decode({"instances": [1]}).is_rows
    assert not decode({"inputs": [1]}).is_rows


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name != "BOOL"])
def test_integers_fit_every_datatype_of_numbers(datatype):
    assert arrays({"inputs": [[1], [0]]}, model_of(x=datatype)) == {"x": of(datatype, [[1], [0]])}


def test_booleans_and_all_bits_of_integers_are_kept():
    assert arrays({"instances": [True, False]}, model_of(x="BOOL")) == {"x": of("BOOL", [True, False])}
    values = [2**63 + 1, 2**64 - 1]
    assert arrays({"instances": values}, model_of(x="UINT64")) == {"x": of("UINT64", values)}


# --- Strings and base64


@pytest.mark.parametrize(
    ("root", "elements", "shape"),
    [
        ({"instances": ["foo", "b\u00e4r"]}, [b"foo", "b\u00e4r".encode()], (2,)),
        ({"instances": [{"b64": "/wA="}, "foo"]}, [b"\xff\0", b"foo"], (2,)),
        ({"instances": [{"x": {"b64": "/wA="}}]}, [b"\xff\0"], (1,)),
        ({"inputs": {"b64": "/wA="}}, [b"\xff\0"], ()),
        ({"inputs": {"x": [["a"], [{"b64": "/wA="}]]}}, [b"a", b"\xff\0"], (2, 1)),
    ],
)
def test_strings_are_text_or_base64(root, elements, shape):
    assert arrays(root, model_of(x="BYTES")) == {"x": ("BYTES", shape, elements)}


def test_object_b64_is_an_element_even_of_an_input_of_that_name():
    assert arrays({"instances": [{"b64": "YQ=="}]}, model_of(b64="BYTES")) == {"b64": ("BYTES", (1,), [b"a"])}


@pytest.mark.parametrize(
    "root",
    [{"instances": [{"b64": "YQ=="}]}, {"instances": [{"x": {"b64": "YQ=="}}]}, {"inputs": {"x": {"b64": "YQ=="}}}],
)
def test_image_is_base64_and_one_alone_is_a_batch_of_one(root):
    assert arrays(root, IMAGES) == {"x": ("BYTES", (1,), [b"a"])}


def test_pixels_of_an_input_that_takes_images_are_numbers():
    assert arrays({"instances": [[[[1]]]]}, IMAGES) == {"x": of("FP32", [[[[1]]]])}


def test_base64_without_its_object_is_refused_for_images():
    expected = 'instances[0] is "YQ==", expected numbers, or encoded images, each as {"b64": "..."}'
    assert refusal({"instances": ["YQ=="]}, IMAGES) == expected


def test_matrix_of_characters_takes_strings():
    assert arrays({"instances": ["ab", "c"]}, MATRIX) == {"x": ("BYTES", (2,), [b"ab", b"c"])}


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({"instances": ["a", {"b64": "@"}]}, 'instances[1]["b64"] is not valid base64: character 0 is "@"'),
        ({"instances": [[["a"]], [[5]]]}, 'instances[1][0][0] is 5, BYTES takes strings and {"b64": "..."}'),
        (b'{"inputs": [NaN, "\\ud800"]}', "inputs[0] is NaN"),
        (
            b'{"inputs": ["\\ud800"], "y": NaN}',
            'inputs: the string "\\ud800" is not valid Unicode: surrogates not allowed',
        ),
        (b'{"inputs": [{"b64": "\\ud800"}, NaN]}', 'inputs[0]["b64"] is not valid base64: character 0 is "\\ud800"'),
        (b'{"inputs": [{"a": NaN}]}', 'inputs[0] is {"a":NaN}'),
        (b'{"instances": NaN}', "instances is NaN, expected a list of one or more instances"),
        (b'{"instances": ["\xe9", NaN]}', "the request is not valid JSON: line 1 column 17: byte 0xe9 is not UTF-8"),
        (b'{"instances": ["\xe9"]}', "the request is not valid JSON: line 1 column 17: byte 0xe9 is not UTF-8"),
    ],
)
def test_other_elements_of_strings_are_refused_with_their_place(root, message):
    assert message in refusal(root, model_of(x="BYTES"))


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    ("datatype", "expected"), [("INT32", "INT32 takes integers from"), ("BOOL", "BOOL takes true or")]
)
def test_token_for_another_datatype_than_floats_is_refused_as_it_came(datatype, expected, token):
    message = refusal(b'{"instances": [%b]}' % token.encode(), model_of(x=datatype))
    assert message.startswith(f"instances[0] is {token}, {expected}")


# --- NaN and Infinity


def test_nan_and_infinity_are_numbers_of_floats():
    """Python's json writes them, and TensorFlow Serving reads them."""
    values = [math.nan, math.inf, -math.inf, 0.1, 3]
    for datatype in ("FP16", "FP32", "FP64"):
        assert arrays({"instances": values}, model_of(x=datatype)) == {"x": of(datatype, values)}
    (tensor,) = decode({"instances": values}, model_of(x="BF16")).inputs
    assert tensor.array.dtype == ml_dtypes.bfloat16
    assert np.array_equal(tensor.array.astype(np.float32)[:4], np.float32([*values[:3], 0.10009765625]), equal_nan=True)


def test_requests_with_nan_are_read_as_other_requests():
    values = [*range(100), 2**64 - 1, 2**64, -(2**63), -(2**64), 10**30]
    (tensor,) = decode({"instances": [math.nan, *values]}, model_of(x="FP64")).inputs
    assert tensor.array[1:].tolist() == list(map(float, values))
    assert arrays({"inputs": {"a": math.nan, "b": 2**63 - 1}}, TWO)["b"] == of("INT64", 2**63 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"instances": [NaN, 1e999]}', "the request is not valid JSON: the number 1e999 is beyond the range of FP64"),
        (b'{"instances": [NaN, 1%b]}' % (b"0" * 5000), "the request is not valid JSON: the number 1000"),
        (b'{"instances": [NaN, 1e300]}', "instances[1] is 1e+300, FP32 takes numbers up to 3.40282e+38"),
        (b'{"instances": [NaN, "NaN"]}', 'instances[1] is the string "NaN", FP32 takes numbers'),
        (b'{"instances": [nan]}', "the request is not valid JSON: "),
        (b'{"instances": [NaN, \xff]}', "the request is not valid JSON: "),
        (b'{"instances": %bNaN' % (b"[" * 100_000), "the JSON is nested deeper than 100 levels"),
    ],
)
def test_requests_with_nan_are_refused_as_other_requests(text, message):
    assert refusal(text).startswith(message)


def test_nan_is_no_integer():
    assert refusal(b'{"inputs": [1, NaN]}', model_of(x="INT32")).startswith("inputs[1] is ")


# --- Refusals


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (b"", "the request is empty, expected a JSON object with the key 'instances' or 'inputs'"),
        (b"{", "the request is not valid JSON: unexpected end of data: line 1 column 2 (char 1)"),
        ([1], "the request is an array, expected an object with the key 'instances' or 'inputs'"),
        ({"signature_name": 5, "inputs": 1}, "signature_name is the number 5, expected a string"),
        (
            {"signature_name": "classify", "inputs": 1},
            "signature_name is \"classify\", but models have the one signature 'serving_default' here",
        ),
        ({}, "the request has neither 'instances' nor 'inputs', expected one of them"),
        ({"instances": [1], "inputs": [1]}, "the request has both 'instances' and 'inputs', expected one of them"),
        ({"instances": []}, "instances is empty, expected a list of one or more instances"),
        ({"instances": 5}, "instances is the number 5, expected a list of one or more instances"),
        ({"instances": {"x": [1]}}, "instances is an object, expected a list of one or more instances"),
        ({"instances": [{"x": 1}, 2]}, "instances[1] is the number 2, but instances[0] is an object; expected objects"),
        ({"instances": [{"y": 1}]}, "model 'm' has no input 'y'; it has 'x'"),
        ({"inputs": {"y": 1}}, "model 'm' has no input 'y'; it has 'x'"),
        ({"instances": [1, "x"]}, 'instances[1] is the string "x", FP32 takes numbers'),
        ({"instances": [[1], [True]]}, "instances[1][0] is the boolean true, FP32 takes numbers"),
        ({"instances": [None]}, "instances[0] is null, FP32 takes numbers"),
        ({"inputs": {"x": [[1, {}]]}}, "inputs['x'][0][1] is {}, FP32 takes numbers"),
        ({"inputs": "x"}, 'inputs is the string "x", FP32 takes numbers'),
        (b'{"inputs": [1e40]}', "inputs[0] is 1e+40, FP32 takes numbers up to 3.40282e+38"),
        ({"inputs": [{"name": "x", "datatype": "FP32"}]}, "inputs is a list of tensors as in KServe v2"),
        ({"inputs": [1], "y": [[[]]] * 2 + [eval("[" * 101 + "]" * 101)]}, "the JSON is nested deeper than 100 levels"),
    ],
)
def test_mistakes_are_refused_with_their_place(root, message):
    assert refusal(root).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [1]], "[1] has 1 element, but {0}[0] has 2; the arrays of a tensor must have the same length"),
        ([[1, 2], [1, 2, 3], [1]], "[1] has 3 elements, but {0}[0] has 2; "),
        ([[[1], [2]], [[3], [4, 5]]], "[1][1] has 2 elements, but {0}[0][0] has 1; "),
        ([[1], []], "[1] has 0 elements, but {0}[0] has 1; "),
        ([[1, 2], 3], "[1] is the number 3, but {0}[0] is an array; the arrays of a tensor must be nested equally"),
        ([3, [1, 2]], "[1] is an array, but {0}[0] is the number 3; "),
    ],
)
def test_ragged_arrays_are_refused_with_the_place_of_the_first_difference(values, message):
    assert refusal({"instances": values}).startswith("instances" + message.format("instances"))
    assert refusal({"inputs": {"x": values}}).startswith("inputs['x']" + message.format("inputs['x']"))


def test_place_in_an_instance_has_the_name_of_the_input():
    rows = [{"a": [1, 2], "b": 0}, {"a": [3, "x"], "b": 0}]
    assert refusal({"instances": rows}, TWO) == "instances[1]['a'][1] is the string \"x\", FP32 takes numbers"
    ragged = [{"a": [1, 2], "b": 0}, {"a": [3], "b": 0}]
    assert refusal({"instances": ragged}, TWO).startswith(
        "instances[1]['a'] has 1 element, but instances[0]['a'] has 2; "
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1, "b": 1}, {"a": 1}], "instances[1] has no key 'b', but instances[0] does"),
        ([{"a": 1}, {"a": 1, "b": 1}], "instances[1] has the key 'b', but instances[0] does not"),
        (
            [1, 2],
            "instances has no names, but model 'm' has 2 inputs: 'a', 'b'; expected a list of objects "
            '{"a": ..., "b": ...}',
        ),
    ],
)
def test_instances_must_have_the_same_keys(rows, message):
    assert refusal({"instances": rows}, TWO).startswith(message)


def test_columns_of_several_inputs_need_names():
    assert refusal({"inputs": [1]}, TWO).startswith("inputs has no names, but model 'm' has 2 inputs: 'a', 'b'; ")


@pytest.mark.parametrize("datatype", ["INT32", "UINT64"])
def test_floats_are_no_integers(datatype):
    assert refusal({"inputs": [1, 1.0]}, model_of(x=datatype)).startswith(
        f"inputs[1] is 1.0, {datatype} takes integers"
    )


def test_integers_out_of_range_are_refused():
    assert refusal({"inputs": [[1], [256]]}, model_of(x="UINT8")) == (
        "inputs[1][0] is 256, UINT8 takes integers from 0 to 255"
    )


@pytest.mark.parametrize("count", [1, 10_000])  # the second is large enough for simdjson
def test_deep_nesting_is_refused(count):
    numbers = ",".join("1" * count)

    def nested(depth):
        return f'{{"inputs": {"[" * depth}{numbers}{"]" * depth}}}'.encode()

    assert decode(nested(64)).inputs[0].shape == (1,) * 63 + (count,)
    for depth in (65, 83):
        assert refusal(nested(depth)) == "inputs is nested deeper than the 64 dims that a tensor may have"


def test_strings_are_limited(monkeypatch):
    monkeypatch.setattr("ovms_rest.protocol.tfs.MAX_ELEMENTS", 3)
    model = model_of(a="BYTES", b="BYTES")
    assert decode({"inputs": {"a": ["1", "2"], "b": ["3"]}}, model)
    assert refusal({"inputs": {"a": ["1", "2"], "b": ["3", "4"]}}, model) == (
        "inputs['b']: the request has 4 strings up to here, at most 3 are allowed"
    )


@pytest.mark.parametrize(
    "text", [b'{"inputs": [%b1]}' % (b"1," * 10_000), b'{"instances": [%b[1]]}' % (b"[1]," * 9999)]
)
def test_memory_of_the_values_is_limited(text):
    assert decode(text, limits=BodyLimits(2**28, 10**7))
    with pytest.raises(BodyTooLargeError):
        decode(text, limits=BodyLimits(2**28, 10**5))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just({"b64": "YQ=="}),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "a", "b", "b64", "\ud800"]), inner, max_size=2)
    ),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from(["instances", "inputs", "signature_name", "other"]), ANYTHING, max_size=2),
    st.sampled_from(
        [X, TWO, IMAGES, MATRIX, model_of(x="BYTES"), model_of(x="UINT64"), model_of(x="BOOL"), model_of()]
    ),
    st.sampled_from([0, 2**62]),
)
def test_any_json_is_decoded_or_refused(root, model, large_size):
    decoded = outcome(json.dumps(root).encode() + b" " * 100, model, large_size)
    if isinstance(decoded, str):
        assert decoded.encode()  # else no response could hold the message
    else:
        assert decoded.keys() <= model.inputs.keys()


@given(st.binary(max_size=20) | st.text('{}[]":,NaInfity-1e.\\u0d8 b64', max_size=20).map(str.encode))
def test_any_bytes_are_decoded_or_refused(rest):
    for body in (rest, b'{"inputs": ' + rest, b'{"inputs": [' + rest + b"]}", b'{"instances": [NaN, ' + rest + b"]}"):
        try:
            decode(body, model_of(x="FP64"))
        except InvalidRequestError:
            continue


# --- Large requests


def without_simdjson(root, model=X):
    return arrays(root, model, large_size=2**62)


@pytest.mark.parametrize("form", ["instances", "inputs"])
@pytest.mark.parametrize("shape", [(3000,), (50, 60), (10, 20, 3, 1, 5)])
def test_large_arrays_of_numbers_are_read_without_orjson(form, shape, monkeypatch):
    values = np.random.default_rng(1).normal(size=shape)
    root = {form: values.tolist(), "signature_name": "serving_default"}
    expected = without_simdjson(root)
    monkeypatch.setattr("ovms_rest.protocol.tfs._parse", None)
    assert arrays(root) == arrays({form: root[form]}) == expected == {"x": of("FP32", values)}


def test_large_columns_are_read_without_orjson(monkeypatch):
    root = {"inputs": {"a": np.ones((1000, 4)).tolist(), "b": list(range(2000))}}
    expected = without_simdjson(root, TWO)
    monkeypatch.setattr("ovms_rest.protocol.tfs._parse", None)
    assert arrays(root, TWO) == expected


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2]] * 3000 + [[1]],
        [[1, 2]] * 3000 + [[1, 2, 3], [1]],
        [[1, 2]] * 3000 + [3],
        [[[1, 2]]] * 3000 + [[1, 2]],
        [1] * 8000 + [[]],
        [[1, 2, 3]] * 3000 + [[1, 2, "]"]],
        [1.5] * 8000 + [None],
        [1.5] * 8000 + [10**50],
    ],
)
def test_large_requests_are_refused_as_small_ones_are(values):
    for root in ({"instances": values}, {"inputs": {"x": values}}, {"inputs": values, "[": "[[,],[,]]"}):
        assert refusal(root) == refusal(root, large_size=2**62)


ODD_TEXT = st.text('[],1e"\\ ', max_size=12)
NESTED = st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(NESTED, NESTED, ODD_TEXT, ODD_TEXT, st.sampled_from(["instances", "inputs"]), st.sampled_from([" ", "", "\n"]))
@example([[1, 2], [1, 2, 3], [1]], [1], "", "", "inputs", "")
@example([[1, 2], [1, 2, 3], [1]], [1], "[[,],[,],[,]]", "[[,],[,],[,]]", "inputs", "")
def test_both_parsers_read_the_same(value, other, key, text, form, space):
    """Whatever the strings in the request are, which may look like arrays."""
    pad = " " * 8192
    for root in ({form: value, key: text}, {key: text, form: value}, {form: {"a": value, key: text, "b": other}}):
        body = json.dumps(root, separators=("," + space, ":" + space)).encode() + pad.encode()
        model = TWO if isinstance(root[form], dict) else X
        assert outcome(body, model, 0) == outcome(body, model, 2**62)


def outcome(body, model, large_size):
    try:
        return arrays(body, model, large_size=large_size)
    except InvalidRequestError as error:
        return str(error)


# --- Responses


def encode(*outputs, rows=False):
    """Encode outputs given as (name, datatype, values)."""
    return encode_prediction([tensor(*output) for output in outputs], rows).decode()


def tensor(name, datatype, values):
    if datatype == "BYTES":
        array = np.array(values, object)
        return Tensor(name, datatype, BytesArray.of(array.ravel().tolist(), array.shape))
    return Tensor(name, datatype, np.array(values, DTYPES[datatype]))


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("FP32", [2.5, 3.0, 0.1], "[2.5,3.0,0.1]"),
        ("FP32", [[1, 2], [3, 4]], "[[1.0,2.0],[3.0,4.0]]"),
        ("FP16", [[0.1]], "[[0.099975586]]"),
        ("BF16", [0.5, 3], "[0.5,3.0]"),
        ("FP64", [0.1], "[0.1]"),
        ("INT64", [2**53 + 1], "[9007199254740993]"),
        ("UINT64", [2**64 - 1], "[18446744073709551615]"),
        ("BOOL", [True, False], "[true,false]"),
        ("BYTES", [["a", "\u00e4"]], '[["a","\u00e4"]]'),
        ("FP32", [math.nan, math.inf, -math.inf, 1], "[NaN,Infinity,-Infinity,1.0]"),
        ("BF16", [[math.nan], [2]], "[[NaN],[2.0]]"),
        ("FP32", np.zeros((2, 0)), "[[],[]]"),
    ],
)
def test_only_output_has_no_name(datatype, values, text):
    if datatype == "BYTES":
        values = [[element.encode() for element in row] for row in values]
    assert encode(("y", datatype, values)) == f'{{"outputs":{text}}}'
    assert encode(("y", datatype, values), rows=True) == f'{{"predictions":{text}}}'


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [("FP32", 0.1, "0.1"), ("INT8", -1, "-1"), ("BYTES", b"a", '"a"'), ("FP32", math.nan, "NaN"), ("BF16", 1, "1.0")],
)
def test_scalar_is_a_bare_value(datatype, value, text):
    assert encode(("y", datatype, value)) == f'{{"outputs":{text}}}'


def test_several_outputs_have_their_names():
    outputs = ("y", "FP32", [[1, 2], [3, math.nan]]), ("n", "INT64", [7, 8]), ("s", "BYTES", [b"null", b"b"])
    assert encode(*outputs) == '{"outputs":{"y":[[1.0,2.0],[3.0,NaN]],"n":[7,8],"s":["null","b"]}}'
    assert encode(*outputs, rows=True) == (
        '{"predictions":[{"y":[1.0,2.0],"n":7,"s":"null"},{"y":[3.0,NaN],"n":8,"s":"b"}]}'
    )


def test_rows_of_scalars_are_written_as_in_arrays():
    outputs = ("f", "FP32", [0.1, math.inf]), ("h", "FP16", [0.1, 2]), ("b", "BF16", [0.5, 1]), ("t", "BOOL", [True, 0])
    assert encode(*outputs, rows=True) == (
        '{"predictions":[{"f":0.1,"h":0.099975586,"b":0.5,"t":true},{"f":Infinity,"h":2.0,"b":1.0,"t":false}]}'
    )


def test_outputs_named_bytes_are_base64():
    expected = '[{"b64":"/wA="},{"b64":""}]'
    assert encode(("y_bytes", "BYTES", [b"\xff\0", b""])) == f'{{"outputs":{expected}}}'
    assert encode(("y_bytes", "BYTES", [b"\xff\0", b""]), rows=True) == f'{{"predictions":{expected}}}'
    assert encode(("y_bytes", "FP32", [1])) == '{"outputs":[1.0]}'


def test_strings_that_are_not_utf8_are_refused():
    with pytest.raises(InvalidRequestError, match=r"output 'y': string 1 is not valid UTF-8 .* ends in '_bytes'"):
        encode(("y", "BYTES", [b"a", b"\xff"]))


@pytest.mark.parametrize("outputs", [[("y", "FP32", 1)], [("y", "FP32", [1]), ("z", "FP32", [1, 2])]])
def test_rows_need_a_common_batch(outputs):
    with pytest.raises(InvalidRequestError, match=r"the outputs are not rows of one batch, .*'y' \[.*the column form"):
        encode(*outputs, rows=True)
    assert encode(*outputs)


def test_many_rows_are_written_in_parts():
    count = 10_000
    outputs = ("a", "INT32", range(count)), ("b", "BYTES", [b"%d" % number for number in range(count)])
    rows = json.loads(encode(*outputs, rows=True))["predictions"]
    assert rows == [{"a": number, "b": str(number)} for number in range(count)]


@pytest.mark.parametrize(
    "shape", [(10_000,), (10_000, 1), (5000, 3), (5000, 2, 3), (4100, 1, 2, 2), (2, 0), (2, 0, 3), (2, 3, 0)]
)
@pytest.mark.parametrize("values", [[1], [1, math.nan], [math.inf, -math.inf, math.nan, 0.5, -2]], ids=repr)
def test_rows_of_any_shape_are_written_as_whole_tensors_are(shape, values):
    array = np.resize(np.float32(values), shape)
    outputs = ("y", "FP32", array), ("n", "INT64", np.arange(array.size).reshape(shape))
    columns = json.loads(encode(*outputs))["outputs"]
    assert repr(columns["y"]) == repr(array.tolist())
    rows = json.loads(encode(*outputs, rows=True))["predictions"]
    assert repr(rows) == repr([{"y": y, "n": n} for y, n in zip(columns["y"], columns["n"], strict=True)])


@pytest.mark.parametrize("special", [slice(0, 1), slice(0, None)], ids=["one row", "all rows"])
def test_rows_that_are_not_finite_are_written_together(special):
    """A call for each row of 4096 with one NaN took three times as long."""
    array = np.zeros((4096, 2), np.float32)
    array[special, 0] = math.nan
    outputs = [Tensor("y", "FP32", array), Tensor("z", "FP32", array)]
    assert called(encode_prediction, outputs, True).count(_write_tokens.__code__) == 2


def test_values_that_are_not_finite_take_no_objects_of_their_own():
    """Each took 198 bytes until all were joined."""
    count = 200_000
    array = np.full(count, -math.inf, np.float32)
    tracemalloc.start()
    try:
        encode_prediction([Tensor("y", "FP32", array)], False)
        assert tracemalloc.get_traced_memory()[1] < 100 * count
    finally:
        tracemalloc.stop()


def test_array_that_is_not_contiguous_is_written_in_its_order():
    outputs = [Tensor("y", "FP32", np.float32([[1, 2], [3, 4]]).T)]
    assert encode_prediction(outputs, False) == b'{"outputs":[[1.0,3.0],[2.0,4.0]]}'
    assert encode_prediction(outputs, True) == b'{"predictions":[[1.0,3.0],[2.0,4.0]]}'


@given(
    st.lists(
        st.sampled_from([("a", "INT8", (4,)), ("b", "INT8", (4, 3)), ("c", "INT8", (4, 2, 1)), ("d", "INT8", (4, 0))]),
        min_size=1, unique=True,
    ),
    st.booleans(),
)  # fmt: skip
def test_structure_is_what_the_response_has_beyond_its_elements(outputs, rows):
    tensors = [Tensor(name, datatype, np.zeros(shape, np.int8)) for name, datatype, shape in outputs]
    elements = sum(2 * tensor.array.size for tensor in tensors)
    total = len(encode_prediction(tensors, rows))
    assert total - 60 <= elements + measure_structure(tensors, rows) <= total + 8


# --- Metadata and status

SIGNATURE = ModelMetadata(
    "m",
    "3",
    {"x": TensorMetadata("x", "FP32", (Dim(2, 2), Dim(1, 8), ANY)), "s": TensorMetadata("s", "BYTES", ())},
    {"y": TensorMetadata("y", "INT64", None)},
)


@pytest.mark.parametrize(
    ("spec", "signature_name", "signatures", "method", "shape", "rank"),
    [
        ("model_spec", "signature_name", "signature_def", "method_name", "tensor_shape", "unknown_rank"),
        ("modelSpec", "signatureName", "signatureDef", "methodName", "tensorShape", "unknownRank"),
    ],
    ids=["TensorFlow Serving", "OVMS"],
)
def test_metadata_has_the_keys_of_both_servers(spec, signature_name, signatures, method, shape, rank):
    described = describe_signature(SIGNATURE)
    assert described[spec] == {"name": "m", signature_name: "", "version": "3"}
    dims = [{"size": "2", "name": ""}, {"size": "-1", "name": ""}, {"size": "-1", "name": ""}]
    assert described["metadata"]["signature_def"][signatures] == {
        "serving_default": {
            "inputs": {
                "x": {"dtype": "DT_FLOAT", shape: {"dim": dims, rank: False}, "name": "x"},
                "s": {"dtype": "DT_STRING", shape: {"dim": [], rank: False}, "name": "s"},
            },
            "outputs": {"y": {"dtype": "DT_INT64", shape: {"dim": [], rank: True}, "name": "y"}},
            method: "tensorflow/serving/predict",
        }
    }


@pytest.mark.parametrize("datatype", [*DTYPES, "BYTES"])
def test_every_datatype_has_a_name_of_tensorflow(datatype):
    described = describe_signature(model_of(x=datatype))["metadata"]["signature_def"]["signature_def"]
    assert described["serving_default"]["inputs"]["x"]["dtype"].startswith("DT_")


def test_status_lists_the_newest_version_first_and_has_no_message_without_an_error():
    available = {"version": "2", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": "OK"}}
    failed = {"version": "10", "state": "LOADING", "status": {"error_code": "UNKNOWN", "error_message": "it is broken"}}
    assert describe_status([available, failed]) == {
        "model_version_status": [failed, {**available, "status": {"error_code": "OK", "error_message": ""}}]
    }
