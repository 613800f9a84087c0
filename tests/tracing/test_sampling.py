"""OpenTelemetry's samplers."""

import pytest

from ovms_rest.tracing.context import TraceContext
from ovms_rest.tracing.sampling import NAMES, choose_sampler

LOW, HIGH = "f" * 16 + "0" * 16, "0" * 16 + "f" * 16
SAMPLED, UNSAMPLED = (TraceContext(HIGH, "1" * 16, flags) for flags in (1, 2))

# By name: whether a request is recorded without a parent, with a sampled one, and with one that is not sampled.
DECISIONS = {
    "always_on": (True, True, True),
    "always_off": (False, False, False),
    "parentbased_always_on": (True, True, False),
    "parentbased_always_off": (False, True, False),
}


@pytest.mark.parametrize(("name", "decisions"), DECISIONS.items())
def test_sampler_decides_by_parent_or_alone(name, decisions):
    sample = choose_sampler(name, "")
    assert tuple(sample(parent, HIGH) for parent in (None, SAMPLED, UNSAMPLED)) == decisions


@pytest.mark.parametrize(
    ("ratio", "of_low", "of_high"),
    [("", True, True), ("1", True, True), ("0", False, False), ("0.5", True, False), ("0.0001", True, False)],
)
def test_ratio_selects_by_the_trace_id(ratio, of_low, of_high):
    for name in ("traceidratio", "parentbased_traceidratio"):
        sample = choose_sampler(name, ratio)
        assert (sample(None, LOW), sample(None, HIGH)) == (of_low, of_high)


def test_parent_decides_before_a_ratio_where_it_is_asked():
    assert choose_sampler("parentbased_traceidratio", "0")(SAMPLED, HIGH)
    assert not choose_sampler("traceidratio", "0")(SAMPLED, HIGH)
    assert not choose_sampler("parentbased_traceidratio", "1")(UNSAMPLED, HIGH)
    assert choose_sampler("traceidratio", "1")(UNSAMPLED, HIGH)


def test_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"OTEL_TRACES_SAMPLER is 'some', expected one of {', '.join(NAMES)}"):
        choose_sampler("some", "")


@pytest.mark.parametrize("ratio", ["half", "-0.1", "1.1", "nan"])
def test_ratio_must_be_a_number_from_0_to_1(ratio):
    with pytest.raises(ValueError, match=f"OTEL_TRACES_SAMPLER_ARG is '{ratio}', expected a number from 0 to 1"):
        choose_sampler("traceidratio", ratio)
