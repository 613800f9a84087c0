"""The estimate of the memory of parsed JSON: high enough to hold, and low enough for useful requests."""

import json
from bisect import bisect_left

import pytest
from costs import measure_cost
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ovms_rest.errors import BodyTooLargeError
from ovms_rest.protocol.json_memory import NUMBERS, OBJECTS, check_memory, choose_limits, most_per_byte

MIB = 2**20
COMMA, ARRAY, OBJECT, COLON, QUOTE = map(OBJECTS.get, b',[{:"')

# Values of unknown keys are ignored.
BOMB = """body = b'{{"inputs":[{{"name":"x","shape":[1],"datatype":"FP32","data":[1]}}],"junk":['
body += b"{repeated}," * {count} + b"1]}}"
"""
DECODE = "decode_request(memoryview(body))"
IMPORT = """
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.json_memory import BodyLimits
"""


def weigh(text, budget, weights=OBJECTS):
    """Return the message for a rejected text, "" for an allowed one."""
    try:
        check_memory(memoryview(text), weights, budget)
    except BodyTooLargeError as error:
        return str(error)
    return ""


def bomb(repeated, count):
    return measure_cost(IMPORT + BOMB.format(repeated=repeated, count=count), DECODE)


def data(datatype, repeated, count, budget):
    """Return the cost of a request with data of equal elements, in a budget."""
    head = f'{{"inputs":[{{"name":"x","shape":[{count}],"datatype":"{datatype}","data":['
    body = f"body = {head.encode()!r} + b','.join([{repeated.encode()!r}] * {count}) + b']}}]}}'"
    return measure_cost(IMPORT + body, f"decode_request(memoryview(body), limits=BodyLimits(2**28, {budget}))")


# --- Bombs: each within the limit of a body, 256 MiB


@pytest.mark.parametrize("repeated", ["{}", "[]", '{\\"\\":1}', "[1]", "[[]]", '\\"\\"', '\\"ab\\"'])
def test_useless_values_are_rejected_before_they_take_memory(repeated):
    cost = bomb(repeated, 16_000_000)
    assert cost.error.startswith("BodyTooLargeError: the values of the JSON would take 13")
    assert cost.mebibytes < 8
    assert cost.seconds < 2


@pytest.mark.parametrize(
    "repeated", ["{}", "[]", '{\\"\\":1}', "[1]", "[[]]", '\\"\\"', '\\"ab\\"', "1", "1.5", "true"]
)
def test_allowed_values_take_no_more_memory_than_estimated(repeated):
    count = 400_000
    cost = bomb(repeated, count)
    assert cost.error == ""
    text = f"{repeated},".replace("\\", "").encode() * count
    estimate = bisect_left(range(1000), True, key=lambda mebibytes: not weigh(text, mebibytes * MIB))
    assert cost.mebibytes < estimate + 2


def test_object_members_take_no_more_memory_than_estimated():
    count = 400_000
    make = "body = b'{' + b','.join(b'\"%07d\":1' % i for i in range(400_000)) + b',\"inputs\":[{\"name\":\"x\",'"
    make += ' b\'"shape":[1],"datatype":"FP32","data":[1]}]}\''
    cost = measure_cost(IMPORT + make, DECODE)
    assert cost.error == ""
    assert cost.mebibytes < count * (COMMA + COLON + 2 * QUOTE) / MIB


# --- Useful requests


@pytest.mark.parametrize(
    ("datatype", "repeated", "count"),
    [("FP32", "0.123456", 3_000_000), ("INT64", "12345", 3_000_000), ("BYTES", '"some text"', 100_000)],
)
def test_large_requests_are_decoded_within_the_budget(datatype, repeated, count):
    """The numbers come close to the limit of a body."""
    budget = choose_limits(2**28 // 10).json_values
    cost = data(datatype, repeated, count, budget)
    assert cost.error == ""
    assert cost.mebibytes < (budget + 2 * (len(repeated) + 1) * count) / MIB


@pytest.mark.parametrize(("repeated", "values"), [("1", 1), ("[1]", 1), ("[1,2]", 2)])
def test_numbers_of_a_prediction_take_no_more_memory_than_estimated(repeated, values):
    """The pattern that their commas and brackets must match took 80 bytes more for each."""
    count = 2_000_000
    prepare = f"""
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.protocol.tfs import decode_prediction
from ovms_rest.protocol.json_memory import BodyLimits
dims = (Dim(0, None), Dim(0, None))
model = ModelMetadata("m", "1", {{"x": TensorMetadata("x", "FP32", dims)}}, {{}})
body = b'{{"instances":[' + b",".join([b{repeated!r}] * {count}) + b"]}}"
"""
    text = f"{repeated},".encode() * count
    estimate = sum(text.count(character) * weight for character, weight in NUMBERS.items())
    cost = measure_cost(prepare, f"decode_prediction(memoryview(body), model, BodyLimits(2**28, {estimate + 1000}))")
    assert cost.error == ""
    assert cost.mebibytes < (estimate + len(text)) / MIB + 2


def test_budget_is_five_times_the_limit_of_a_body_and_at_least_64_mib():
    assert [choose_limits(limit).json_values for limit in (1, 2**23, 2**24, 2**28)] == [
        2**26,
        2**26,
        5 * 2**24,
        5 * 2**28,
    ]


# --- Counted characters


def test_characters_in_strings_do_not_count():
    text = b'["' + b"{},[]:" * 100_000 + b'"]'
    assert weigh(text, 100_000) == ""
    outside = b"[" + b"{},[]:" * 100_000 + b"]"
    assert weigh(outside, 100_000).startswith("the values of the JSON would take ")


def test_message_gives_the_limit_and_a_remedy():
    message = "the values of the JSON would take 9000 bytes of memory or more, at most 8999 are allowed"
    assert weigh(b"," * 100, 8999) == f"{message}; send large tensors as binary data"
    assert weigh(b"," * 100, 9000) == ""


def reference(value):
    """Return the weight of a parsed value."""
    commas = COMMA * max(0, len(value) - 1) if isinstance(value, list | dict) else 0
    if isinstance(value, dict):
        members = sum(COLON + reference(key) + reference(item) for key, item in value.items())
        return OBJECT + commas + members
    if isinstance(value, list):
        return ARRAY + commas + sum(map(reference, value))
    return 2 * QUOTE if isinstance(value, str) else 0


texts = st.text(st.sampled_from('\\\\\\"{}[]:,a'), max_size=12)
values = st.recursive(
    st.none() | st.integers() | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=30
)


@pytest.mark.parametrize("block", [1, 7, 2**17])
@settings(max_examples=60)
@given(value=values)
@example(value=['\\"', "\\", '\\\\"'])
def test_separators_are_counted_as_in_parsed_json(block, value):
    """JSON is allowed with its estimate as the budget, and rejected with one byte less, wherever blocks begin."""
    text = json.dumps(value).encode()
    exact = reference(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ovms_rest.protocol.json_memory._BLOCK", block)
        assert weigh(text, exact) == ""
        if len(text) * most_per_byte(OBJECTS) > exact - 1:
            assert weigh(text, exact - 1) != ""


@pytest.mark.parametrize("weights", [OBJECTS, NUMBERS])
@pytest.mark.parametrize("repeated", [b"{},", b"[],", b"1,", b'"",', b'{"":1},', b"[[]],", b'"":1,', b"[1],"])
def test_no_text_exceeds_the_assumed_weight_per_byte(weights, repeated):
    """That is why short texts need not be examined."""
    assert sum(repeated.count(character) * weight for character, weight in weights.items()) <= len(repeated) * (
        most_per_byte(weights)
    )
