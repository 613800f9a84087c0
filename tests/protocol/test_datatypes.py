"""The datatypes: JSON numbers are rounded once, to the nearest value, and rejected beyond the range."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from decoded_requests import decode_numbers, refusal, written
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ovms_rest.protocol.datatypes import round_to_bfloat16

# For each datatype: bits of the significand, exponent of the smallest normal number, exponent above the largest.
FORMATS = {"FP16": (11, -14, 16), "BF16": (8, -126, 128), "FP32": (24, -126, 128)}


def round_exactly(value, datatype):
    """Return a value rounded by rational arithmetic, ties to even; one that is too large becomes an infinity."""
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


@settings(max_examples=500)
@given(st.lists(numbers_for("BF16"), max_size=20))
@example([1 + 2**-8 + 2**-40])
@example([2.0**128 - 2.0**119, -(2.0**128 - 2.0**119), 3.4e38, 1e300, 5e-324, -5e-324, 0.0, -0.0])
def test_rounding_to_bfloat16_is_exact(values):
    rounded = round_to_bfloat16(np.array(values, np.float64))
    assert rounded.dtype == ml_dtypes.bfloat16
    expected = np.array([round_exactly(value, "BF16") for value in values], np.float64)
    assert rounded.astype(np.float64).tobytes() == expected.tobytes()


@pytest.mark.parametrize("datatype", FORMATS)
@settings(max_examples=300)
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
