"""Numeric requests: simdjson reads the same values as orjson, and leaves all other requests to orjson."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
import pytest
from calls import called
from decoded_requests import INTEGERS, VALID, nested, refused, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_datatypes import OVERFLOWS
from test_decoding import NO_JSON, PLACES
from test_protocol_properties import anything, complete_requests, keys, mutated, names, outcome, parameters, requests
from wire_cases import CASES, DTYPES, fingerprint

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.decoding import LARGE_SIZE, decode_numeric, decode_request
from ovms_rest.protocol.numbers import (
    MAX_KEPT_SIZE,
    MAX_MEMBERS,
    NumberArray,
    UnsuitedError,
    is_shallow,
    looks_numeric,
    parse_nested,
    parse_numeric,
    to_array,
)

NUMERIC = [datatype for datatype in DTYPES if datatype != "BOOL"]
FLOATS = ["FP16", "BF16", "FP32", "FP64"]
NEVER = sys.maxsize


def view(head):
    """Return a request, given as a value or JSON text, as a received body."""
    return memoryview(bytearray(head if isinstance(head, bytes) else json.dumps(head).encode()))


def exactly(value):
    """Return values in a form in which 1, 1.0 and True differ, and 0.0 and -0.0 too."""
    return {name: repr(item) for name, item in value.items()}


def facts(found):
    """Return all observable facts of a decoded request, or the message of a rejected one."""
    if isinstance(found, InvalidRequestError):
        return str(found)
    arrays = [(tensor.name, tensor.datatype, fingerprint(tensor.array)) for tensor in found.inputs]
    return arrays, found.id, found.outputs, found.binary_output, exactly(found.parameters)


def is_numeric(head, binary=b""):
    """Return whether simdjson reads a request, after checking that this makes no difference."""
    head = view(head)
    body, length = memoryview(bytes(head) + binary), len(head) if binary else None
    expected = facts(outcome(decode_request, body, length, NEVER))
    assert facts(outcome(decode_request, body, length, 0)) == expected
    request = decode_numeric(head, memoryview(binary))
    if request is None:
        return False
    assert facts(request) == expected
    return True


# --- The choice of the parser


def many(datatype, shape):
    """Return numbers of a datatype, nested by their shape."""
    if datatype in INTEGERS:
        low, high = INTEGERS[datatype]
        return np.random.default_rng(0).integers(low, high, shape, DTYPES[datatype], endpoint=True)
    return np.random.default_rng(0).standard_normal(shape).astype(DTYPES[datatype]).astype(np.float64)


@pytest.mark.parametrize("form", ["flat", "nested", "ragged"])
@pytest.mark.parametrize("datatype", NUMERIC)
def test_large_numeric_request_is_read_by_simdjson(datatype, form):
    numbers = many(datatype, (2, 20, 30, 4))
    data = {
        "flat": numbers.ravel().tolist(),
        "nested": numbers.tolist(),
        "ragged": [numbers[0].tolist(), [], *numbers[1].ravel().tolist()],
    }[form]
    body = view({"inputs": [{"name": "x", "shape": numbers.shape, "datatype": datatype, "data": data}]})
    assert len(body) >= LARGE_SIZE
    assert orjson.loads not in called(decode_request, body)
    (tensor,) = decode_request(body).inputs
    assert fingerprint(tensor.array) == fingerprint(numbers.astype(DTYPES[datatype]))


def test_large_inputs_of_several_datatypes_are_read_by_simdjson():
    items = [
        {"name": datatype, "shape": [50, 20], "datatype": datatype, "data": many(datatype, (50, 20)).tolist()}
        for datatype in NUMERIC
    ]
    binary = {"name": "b", "shape": [2], "datatype": "BYTES"}
    head = json.dumps({"id": "7", "outputs": [{"name": "y"}], "inputs": [*items, binary]}).encode()
    body = view(head + b"\1\0\0\0a\1\0\0\0b")
    assert orjson.loads not in called(decode_request, body, len(head))
    assert decode_request(body, len(head)).inputs[-1].array.elements() == [b"a", b"b"]


def test_small_request_goes_directly_to_orjson():
    functions = called(decode_request, view({"inputs": [VALID]}))
    assert orjson.loads in functions
    assert not {looks_numeric.__code__, parse_numeric.__code__} & set(functions)


@pytest.mark.parametrize(
    ("datatype", "data"), [("BOOL", [True, False] * 2000), ("BYTES", ["text"] * 4000), ("BYTES", ["text" * 4000])]
)
def test_large_request_of_other_values_goes_directly_to_orjson(datatype, data):
    body = view({"inputs": [{"name": "x", "shape": [len(data)], "datatype": datatype, "data": data}]})
    assert len(body) >= LARGE_SIZE
    functions = called(decode_request, body)
    assert orjson.loads in functions
    assert parse_numeric.__code__ not in functions


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_inputs_of_equal_length_look_numeric(inputs):
    item = {"name": "x", "shape": [2000], "datatype": "INT64", "data": [101, 2023, 2003, 102] * 500}
    assert looks_numeric(view({"inputs": [item] * inputs}))
    assert looks_numeric(view({"inputs": [item] * inputs, "id": "i" * 2000}))


def test_invalid_large_request_gets_the_message_of_a_small_one():
    data = [1] * 10_000 + [None]
    body = view({"inputs": [{"name": "x", "shape": [10_001], "datatype": "INT8", "data": data}]})
    assert refused(decode_request, body) == "inputs[0] 'x': data[10000] is null, INT8 takes integers"


# --- The tables of test_decoding with both parsers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wire_case_becomes_the_same_array(case):
    assert is_numeric({"inputs": [case.input(data=case.data)]}) == (case.datatype in NUMERIC)


def test_numeric_wire_cases_become_the_same_arrays_in_one_request():
    items = [case.input(name=case.name, data=case.data) for case in CASES if case.datatype in NUMERIC]
    assert is_numeric({"inputs": items})


@pytest.mark.parametrize("body", [b"", *NO_JSON.values()], ids=["empty", *NO_JSON])
def test_invalid_json_is_left_to_orjson(body):
    assert not is_numeric(body)


def preceded(member):
    """Return a numeric request with another member before its inputs."""
    return b"{" + member + b"," + written("FP32", [1], "[1]")[1:]


WHOLE = {
    "a byte order mark before a request": b"\xef\xbb\xbf" + written("FP32", [1], "[1]"),
    "a NUL after a request": written("FP32", [1], "[1]") + b"\0",
    "a second request": written("FP32", [1], "[1]") * 2,
    "a bracket after a request": written("FP32", [1], "[1]") + b"]",
    "invalid UTF-8 in a key": preceded(b'"\xff":1'),
    "invalid UTF-8 in a value": preceded(b'"id":"\xc3"'),
    "a surrogate in UTF-8": preceded(b'"k":"\xed\xa0\x80"'),
    "a control character": preceded(b'"id":"\t"'),
    "an unknown escape": preceded(b'"id":"\\x"'),
    "an array": b"[1]",
    "a number": b"1",
    "no inputs": b"{}",
    "inputs of null": b'{"inputs":null}',
    "inputs of an object": b'{"inputs":{}}',
    "inputs of nothing": b'{"inputs":[]}',
    "an input of null": b'{"inputs":[null]}',
    "an input of an array": b'{"inputs":[[1]]}',
    "a wrong id": preceded(b'"id":1'),
    "wrong parameters": preceded(b'"parameters":{"p":[1]}'),
    "wrong outputs": preceded(b'"outputs":[1]'),
    "data and a size": written("FP32", [1], '[1],"parameters":{"binary_data_size":4}'),
    "data that are no array": written("FP32", [1], "1"),
    "a wrong datatype": written("FP8", [1], "[1]"),
    "a wrong dim": b'{"inputs":[{"name":"x","shape":[1.0],"datatype":"FP32","data":[1]}]}',
}


@pytest.mark.parametrize("body", WHOLE.values(), ids=WHOLE)
def test_invalid_request_is_left_to_orjson(body):
    assert not is_numeric(body)


def test_request_followed_by_bytes_is_left_to_orjson():
    assert not is_numeric(written("FP32", [1], "[1]"), b"\0")
    assert is_numeric({"inputs": [{"name": "b", "shape": [4], "datatype": "UINT8"}]}, b"1234")


NO_ELEMENTS = {
    "null": "null",
    "a boolean": "true",
    "a string": '"1"',
    "an empty string": '""',
    "an object": '{"a":1}',
    "an empty object": "{}",
    "an array with an object": "[{}]",
    "a token NaN": "NaN",
    "a token Infinity": "-Infinity",
    "beyond FP64": "1e400",
    "beyond FP64 by digits": "9" * 310,
    "a leading zero": "01",
    "a leading point": ".5",
    "a point at the end": "1.",
    "an exponent of nothing": "1e",
    "a minus alone": "-",
    "a leading plus": "+1",
    "hexadecimal": "0x1",
    "nothing": "",
}


@pytest.mark.parametrize("element", NO_ELEMENTS.values(), ids=NO_ELEMENTS)
@pytest.mark.parametrize("datatype", [*DTYPES, "BYTES"])
def test_invalid_element_is_left_to_orjson(datatype, element):
    for data in (f"[{element},1]", f"[1,{element}]", f"[[1],[{element}]]"):
        assert not is_numeric(written(datatype, [2], data))


@pytest.mark.parametrize(
    ("shape", "data"),
    [([2], "[1]"), ([1], "[1,2]"), ([1], "[]"), ([0], "[1]"), ([], "[]"), ([2**62, 4], "[1]"), ([2], "[[1],[]]")],
)
@pytest.mark.parametrize("datatype", ["INT8", "UINT64", "BF16", "FP64"])
def test_wrong_number_of_elements_is_left_to_orjson(datatype, shape, data):
    assert not is_numeric(written(datatype, shape, data))


# --- Numbers


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_datatype_takes_its_whole_range(datatype):
    low, high = INTEGERS[datatype]
    assert is_numeric(written(datatype, [4], f"[{low},{high},-0,0]"))


@pytest.mark.parametrize("beyond", [1, 1000, 2**64])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_out_of_range_is_left_to_orjson(datatype, beyond):
    low, high = INTEGERS[datatype]
    for number in (low - beyond, high + beyond):
        assert not is_numeric(written(datatype, [2], f"[1,{number}]"))


@pytest.mark.parametrize("number", ["1.0", "1e2", "1E2", "1.5", "-0.0", "0e0"])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_number_with_fraction_or_exponent_is_not_an_integer(datatype, number):
    assert not is_numeric(written(datatype, [2], f"[1,{number}]"))


ODD_NUMBERS = {
    "zeros": "-0,0,-0.0,0.0,0e0,-0e-0,0e99999999999999999999",
    "large integers": f"{2**53 + 1},{2**63 - 1},{2**63},{2**64 - 1},{-(2**63)},{2**60 + 2**36 + 1}",
    "too small": "1e-400,-1e-400,5e-324,2e-324,-3e-324,1e-99999999999999999999",
    "extremes": "1.7976931348623157e308,-2.2250738585072014e-308,2.2250738585072011e-308",
    "many digits": f"0.1{'0' * 800}1,1.{'3' * 800},9007199254740992.99999999999999999999,9007199254740993.0",
    "exponents": "1e2,1E2,1e+2,1E-2,12345678901234567890e-19,1e0,1e00002",
}


@pytest.mark.parametrize("numbers", ODD_NUMBERS.values(), ids=ODD_NUMBERS)
def test_odd_numbers_become_the_same_fp64(numbers):
    assert is_numeric(written("FP64", [numbers.count(",") + 1], f"[{numbers}]"))


@pytest.mark.parametrize("numbers", ODD_NUMBERS.values(), ids=ODD_NUMBERS)
@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32"])
def test_odd_numbers_become_the_same_floats_where_they_fit(datatype, numbers):
    values = [float(number) for number in numbers.split(",")]
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(np.array(values, DTYPES[datatype])).all())
    assert is_numeric(written(datatype, [len(values)], f"[{numbers}]")) == fits


@pytest.mark.parametrize("number", [-(2**63) - 1, 2**64, 10**30])
def test_valid_integer_of_more_than_64_bits_is_left_to_orjson(number):
    body = written("FP64", [1], f"[{number}]")
    assert not is_numeric(body)
    assert decode_request(view(body), None, 0).inputs[0].array.tolist() == [float(number)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("datatype", "first", "largest"), OVERFLOWS)
def test_overflow_to_infinity_is_left_to_orjson(datatype, first, largest):
    for sign in (1, -1):
        assert is_numeric(written(datatype, [2], f"[{sign * largest},{sign * np.nextafter(first, 0)}]"))
        assert not is_numeric(written(datatype, [2], f"[1,{sign * first}]"))
        assert not is_numeric(written(datatype, [2], f"[1,{int(sign * first)}]"))


@pytest.mark.parametrize("datatype", FLOATS)
@settings(max_examples=200)
@given(data=st.data())
def test_any_bits_of_a_datatype_survive_json(datatype, data):
    dtype = np.dtype(DTYPES[datatype])
    bits = data.draw(st.lists(st.integers(0, 2 ** (8 * dtype.itemsize) - 1), min_size=1, max_size=20))
    array = np.array(bits, f"u{dtype.itemsize}").view(dtype)
    array = array[np.isfinite(array)]
    text = json.dumps(array.astype(np.float64).tolist())
    numbers = parse_numeric(view(written(datatype, [len(array)], text)), 100)["inputs"][0]["data"]
    assert fingerprint(to_array(numbers, datatype, array.shape)) == fingerprint(array)


@pytest.mark.parametrize("datatype", NUMERIC)
def test_array_is_writable(datatype):
    """OpenVINO needs writable memory for a tensor."""
    request = decode_numeric(view(written(datatype, [2], "[1,2]")), memoryview(b""))
    assert request.inputs[0].array.flags.writeable


# --- Keys


def test_equal_keys_are_left_to_orjson_which_takes_the_last():
    for body in (
        b'{"inputs":[],"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"id":"a","id":"b","inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"data":[2],"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"d\\u0061ta":[2],"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"parameters":{"a":1,"a":2},"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"k":[{"a":1,"a":2}],"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}',
    ):
        assert not is_numeric(body)
        assert decode_request(view(body), None, 0).inputs[0].array.tolist() == [1]


@pytest.mark.parametrize("key", ["data\\u0000", "data\\u0000a", "\\u0000data", "name\\u0000"])
def test_key_with_a_nul_is_left_to_orjson(key):
    for other in ('"b"', "[2]", "1"):
        assert not is_numeric(written("FP32", [1], f'[1],"{key}":{other}'))
        assert not is_numeric(b'{"inputs":[{"%s":%s,"name":"x"}]}' % (key.encode(), other.encode()))


def test_escaped_keys_are_found():
    body = b'{"inp\\u0075ts":[{"\\u006eame":"\\ud83d\\ude00","shape":[1],"d\\u0061tatype":"FP32","dat\\u0061":[1]}]}'
    assert is_numeric(body)


def test_strings_may_hold_anything():
    item = VALID | {"name": '\u00e9\0"\\[{]}\U0001f600', "parameters": {'"[\u65e5': "\0]"}}
    assert is_numeric({"id": "\\", "inputs": [item], "outputs": [{"name": "]\n"}]})


def test_half_a_surrogate_pair_is_left_to_orjson_everywhere():
    for code in range(0xD800, 0xE000):
        escape = b"\\u%04x" % code
        for text in (b'{"k":"%s",' % escape, b'{"%s":0,' % escape):
            assert decode_numeric(view(text + written("FP32", [1], "[1]")[1:]), memoryview(b"")) is None
    assert not is_numeric(preceded(b'"k":"\\ud800\\u0041"'))


@pytest.mark.parametrize("value", [None, [], {"a": [None, {}]}, "text", 1, 1.5, 2**64 - 1, False, [[1.5, "a"], {}]])
def test_unknown_keys_are_ignored_at_every_level(value):
    item = VALID | {"unknown": value, "inputs": value}
    assert is_numeric({"unknown": value, "inputs": [item], "outputs": [{"name": "y", "data": value}]})


def test_parameters_keep_their_types():
    values = {"a": 1, "b": 1.0, "c": True, "d": "e", "f": -0.0, "g": 2**64 - 1, "h": -(2**63), "i": 1e-7}
    assert is_numeric({"inputs": [VALID], "parameters": values})


def test_too_many_members_are_left_to_orjson():
    most = {f"p{index}": index for index in range(MAX_MEMBERS)}
    assert is_numeric({"inputs": [VALID] * MAX_MEMBERS, "parameters": most, "unknown": [0] * MAX_MEMBERS})
    assert not is_numeric({"inputs": [VALID], "parameters": most | {"one": "more"}})
    assert not is_numeric({"inputs": [VALID] * (MAX_MEMBERS + 1)})
    assert not is_numeric({"inputs": [VALID], "unknown": [0] * (MAX_MEMBERS + 1)})
    assert not is_numeric({"inputs": [VALID | most]})


# --- Depth


@pytest.mark.parametrize("columns", [1, 200], ids=["few brackets", "many brackets"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), ("[1.5,", "]"), ("[[],", "]"), ("[[],1.5,", "]"), ("[[[1.5],", "]]"), ("[[[[]]],", "]")],
)
def test_data_may_nest_97_arrays(before, after, columns):
    levels = 97 - len(after)
    count = before.count("1.5") + columns
    inner = ",".join(["[1.5]"] * columns)
    text = before + "[" * (levels - 1) + inner + "]" * (levels - 1) + after
    assert is_numeric(written("FP32", [count], text))
    text = before + "[" * levels + inner + "]" * levels + after
    assert not is_numeric(written("FP32", [count], text))


@pytest.mark.parametrize("brackets", [b"[]", b"{}"])
@pytest.mark.parametrize("place", PLACES)
def test_unknown_keys_may_nest_up_to_100_levels_in_total(place, brackets):
    level, text = PLACES[place]
    assert is_numeric(text % nested(101 - level, brackets))
    assert not is_numeric(text % nested(102 - level, brackets))
    assert not is_numeric(text % nested(1000, brackets))


@pytest.mark.parametrize("string", ['"]"', '"]]]]]"', '"[{"', '"}\\\\"', '"\\"]"', '"\\\\\\"]]"', '"\\u005d]"'])
def test_brackets_in_strings_do_not_hide_depth(string):
    data = "[" * 97 + ",".join(["[1]"] * 200) + "]" * 97
    for text in (f'[],"k":[{string},{data}],"j":[{string}]', f'{data},"k":{string}'):
        assert not is_numeric(written("FP32", [200], text))
        assert not is_numeric(b'{"k":%s,' % string.encode() + written("FP32", [200], text)[1:])


def test_brackets_in_strings_do_not_count_as_depth():
    data = ",".join(["[1]"] * 200)
    assert is_numeric(written("FP32", [200], f'[{data}],"k":"{"[{" * 200}"'))
    assert is_numeric(written("FP32", [200], f'[{data}],"\\\\u00e9":"\\n["'))


def depth_of(value):
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


texts = st.text('[]{}"\\Yy_\x7f a', max_size=6)
trees = st.recursive(
    st.integers(0, 9) | texts,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(texts, children, max_size=4),
    max_leaves=60,
)


@settings(max_examples=200)
@given(trees, st.integers(0, 8))
@example([[], [[]], [], [], [], []], 2)
@example(["]]]", [[[]]], [], []], 2)
def test_shallow_json_is_never_nested_deeper(tree, max_depth):
    for text in (json.dumps(tree), orjson.dumps(tree).decode()):
        deep = depth_of(tree) > max_depth
        shallow = is_shallow(np.frombuffer(text.encode(), np.uint8), max_depth)
        assert not (shallow and deep)
        if '\\"' not in text:
            assert shallow == (not deep)


@pytest.mark.parametrize("blanks", [*range(98_290, 98_315), 3 * 2**16, 400_001])
def test_depth_counts_across_blocks(blanks):
    for text in ("[" * 6 + " " * blanks + "]" * 6, " " * blanks + "[" * 6 + "]" * 6, f'[[[["{"]" * blanks}",[[]]]]]]'):
        array = np.frombuffer(text.encode(), np.uint8)
        assert not is_shallow(array, 5)
        assert is_shallow(array, 6)


# --- Arrays of one level


@pytest.mark.parametrize("form", ["%b", "[%b]"])
def test_array_whose_items_simdjson_may_not_have_counted_is_left_to_orjson(form, monkeypatch):
    """It is found to be unsuited before its values are copied and its commas are compared."""
    monkeypatch.setattr("ovms_rest.protocol.numbers._MANY_ITEMS", 4)
    body = b'{"x":%b}' % (form.encode() % b"[1,2,3]")
    assert parse_nested(view(body), frozenset("x"), 9)["x"].shape[-1] == 3
    with pytest.raises(UnsuitedError):
        parse_nested(view(body.replace(b"3", b"3,4")), frozenset("x"), 9)


# --- Parsers


def test_refused_request_leaves_the_parser_free():
    """Even while the exception, which refers to frames, is still alive."""
    kept = []
    for body in (*NO_JSON.values(), *WHOLE.values(), written("INT8", [2], "[1,1000]"), written("FP32", [3], "[1,2]")):
        with pytest.raises(InvalidRequestError) as caught:
            decode_request(view(body), None, 0)
        kept.append(caught.value)
        assert decode_numeric(view({"inputs": [VALID]}), memoryview(b"")) is not None


def test_array_that_outlives_its_request_affects_only_the_next_one():
    body = view({"inputs": [VALID]})
    held = parse_numeric(body, 100)["inputs"][0]["data"]
    assert type(held) is NumberArray
    with pytest.raises(UnsuitedError):
        parse_numeric(body, 100)
    assert decode_numeric(body, memoryview(b"")) is not None
    assert to_array(held, "FP32", (1,)).tolist() == [1.5]


def test_request_is_decoded_after_an_array_outlived_the_previous_one():
    body = view({"inputs": [VALID]})
    held = parse_numeric(body, 100)
    assert facts(decode_request(body, None, 0)) == facts(decode_request(body, None, NEVER))
    assert held["inputs"][0]["shape"] == [1]


def test_previous_request_does_not_complete_a_truncated_one():
    body = view(written("FP64", [3], "[1.25,-2,30000]"))
    for end in range(len(body)):
        assert decode_numeric(body, body[:0]) is not None
        assert decode_numeric(body[:end], body[:0]) is None


def test_array_stays_when_the_next_request_is_parsed():
    requests = [decode_numeric(view(written("FP64", [3], f"[{n},{n},{n}]")), memoryview(b"")) for n in range(100)]
    assert [request.inputs[0].array.tolist() for request in requests] == [[n] * 3 for n in range(100)]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_beyond_the_kept_size_is_released():
    small, count = view({"inputs": [VALID]}), MAX_KEPT_SIZE
    body = view(written("UINT8", [count], f"[{'1,' * (count - 1)}2]"))
    assert decode_numeric(small, body[:0]) is not None
    before = resident_bytes()
    array = decode_numeric(body, body[:0]).inputs[0].array
    assert (array[:-1] == 1).all()
    assert array[-1] == 2
    # A kept parser would hold 13 bytes for each byte of the body.
    assert resident_bytes() - before < 6 * len(body)
    assert decode_numeric(small, body[:0]) is not None


def test_threads_decode_at_the_same_time():
    bodies = [view(written("INT64", [2000], json.dumps([index] * 2000))) for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        requests = list(pool.map(lambda body: decode_numeric(body, body[:0]), bodies * 5))
    assert [request.inputs[0].array.tolist() for request in requests] == [[n] * 2000 for n in range(40)] * 5


# --- Mutated requests

digits = st.integers(0, 10**25).map(str)
integers = st.integers(-130, 300) | st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, -(2**31), 2**31, 2**32 - 1])
number_texts = (
    integers.map(str)
    | st.floats(-1e5, 1e5).map(repr)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.builds("{}{}.{}{}".format, st.sampled_from(["", "-"]), digits, digits, st.sampled_from(["", "e5", "E-30"]))
    | st.sampled_from(["-0", "-0.0", "0e0", "1e2", "1.0", "1E+2", "1e-400"])
)
fitting = {
    datatype: st.integers(*INTEGERS[datatype]).map(str)
    if datatype in INTEGERS
    else (st.floats(-6e4, 6e4).map(repr) | st.integers(-65504, 65504).map(str))
    for datatype in NUMERIC
}


@st.composite
def arranged(draw, elements):
    """Draw an array that nests the elements, texts, in any form."""
    for _ in range(draw(st.integers(0, 5))):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(elements))] * 2)))
        elements = [*elements[:begin], f"[{','.join(elements[begin:end])}]", *elements[end:]]
    return f"[{draw(st.sampled_from([',', ', ', ' ,']).map(lambda comma: comma.join(elements)))}]"


@st.composite
def numeric_inputs(draw, odd):
    """Draw an input of numbers; an odd one has elements or a key that may not fit."""
    datatype = draw(st.sampled_from(NUMERIC))
    elements = draw(st.lists(fitting[datatype], max_size=12))
    members = {"name": json.dumps(draw(names)), "shape": f"[{len(elements)}]", "datatype": f'"{datatype}"'}
    if odd and elements:
        elements[draw(st.integers(0, len(elements) - 1))] = draw(number_texts | st.sampled_from(["null", '"1"', "{}"]))
    if odd and draw(st.sampled_from([False, False, True])):
        members[draw(keys | names)] = json.dumps(draw(parameters))
    members["data"] = draw(arranged(elements))
    order = draw(st.permutations(sorted(members)))
    return f"{{{','.join(f'{json.dumps(name)}:{members[name]}' for name in order)}}}"


def numeric_requests(odd):
    return st.builds(
        lambda before, items, after: f'{{{before}"inputs":[{",".join(items)}]{after}}}'.encode(),
        st.sampled_from(["", '"id":"a",', '"parameters":{"a":1,"b":"]"},', '"k":[[]],']),
        st.lists(numeric_inputs(odd), min_size=1, max_size=3),
        st.sampled_from(["", ',"outputs":[{"name":"y"}]', ',"j":"\\\\"', ',"j":{"a":{}}']),
    )


signs = st.sampled_from([bytes([byte]) for byte in b'[]{}",:\\0-.e\xff'])


@settings(max_examples=150)
@given(numeric_requests(odd=False))
def test_any_numeric_request_is_read_by_simdjson(body):
    assert is_numeric(body)


@settings(max_examples=200)
@given(numeric_requests(odd=True))
def test_request_of_odd_numbers_has_the_same_outcome(body):
    is_numeric(body)


@settings(max_examples=200)
@given(numeric_requests(odd=False), st.integers(0, 2000), st.integers(0, 4), st.binary(max_size=3) | signs)
def test_numeric_request_with_replaced_bytes_has_the_same_outcome(body, place, length, other):
    place %= len(body)
    is_numeric(body[:place] + other + body[place + length :])


@settings(max_examples=300)
@given(anything | requests | mutated(requests), st.binary(max_size=40))
def test_any_json_or_mutated_request_has_the_same_outcome(root, binary):
    is_numeric(root)
    is_numeric(root, binary)


@settings(max_examples=150)
@given(complete_requests())
def test_complete_request_has_the_same_outcome(complete):
    is_numeric(*complete)


@settings(max_examples=200)
@given(keys, anything, st.sampled_from(["request", "input", "output"]))
def test_any_json_as_a_key_of_a_valid_request_has_the_same_outcome(key, value, level):
    item, output = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}, {"name": "y"}
    root = {"inputs": [item], "outputs": [output]}
    {"request": root, "input": item, "output": output}[level][key] = value
    is_numeric(root)


@settings(max_examples=200)
@given(st.sampled_from([*DTYPES, "BYTES"]), anything)
def test_any_json_as_an_element_has_the_same_outcome(datatype, element):
    is_numeric({"inputs": [{"name": "x", "shape": [1], "datatype": datatype, "data": [element]}]})
