"""The waiting time of a request begins when a proxy received it, if X-Request-Start is valid and plausible."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_rest.protocol.waiting_time import Clock, decode_request_start, waits_since


@pytest.mark.parametrize(
    ("value", "start"),
    [
        *((text, 1612345678_123_000_000) for text in ("t=1612345678.123", "1612345678.123")),
        *((text, 1612345678_123_000_000) for text in ("t=1612345678123", "1612345678123")),
        *((text, 1612345678_123_456_000) for text in ("t=1612345678.123456", "t=1612345678123456", "1612345678123456")),
        *(("t=1612345678.000", 1612345678_000_000_000), ("t=1612345678.5", 1612345678_500_000_000)),
        *(("t=1612345678.123456789", 1612345678_123_456_789), ("t=0.001", 1_000_000)),
    ],
)
def test_request_start_is_read_in_all_forms_of_proxies(value, start):
    assert decode_request_start(value) == start


@pytest.mark.parametrize(
    "value",
    [
        *("", "t=", "t", ".", "t=.", "1612345678", "161234567812", "16123456781234", "1612345678123456789", "9" * 5000),
        *("9" * 5000 + ".5", "1612345678." + "1" * 5000, "12345678901.5", "1612345678.1234567890", "1612345678."),
        *(".123", "1612345678,123", "1.612345678e9", "-1612345678.123", "t=-1612345678123", "+1612345678123"),
        *("nan", "t=nan", "inf", "0x17", "1_612_345_678.1", " 1612345678.123", "1612345678.123 ", "t= 1612345678.123"),
        *("t =1612345678.123", "1612345678 .123", "1612345678.123\n", "1612345678.123\0", "T=1612345678.123"),
        *("ts=1612345678.123", "t=t=1612345678.123", "t=1612345678.123, t=1612345679.123"),
        *("\u0661\u0666\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668.\u0661", "161234567812\u0663"),
        "161234567812\u00b3",
    ],
)
def test_invalid_request_start_is_none(value):
    assert decode_request_start(value) is None


@settings(max_examples=300)
@given(st.text(max_size=25) | st.text("0123456789.t=", max_size=25) | st.from_regex(r"(t=)?[0-9]+\.?[0-9]*"))
def test_any_request_start_is_a_time_or_none(value):
    start = decode_request_start(value)
    assert start is None or 0 <= start < 10**19


def test_request_waits_since_a_proxy_received_it():
    received = time.monotonic_ns()
    since = waits_since({"HTTP_X_REQUEST_START": f"t={time.time() - 5:.3f}"}, received)
    assert 4.9e9 < received - since < 6e9


@pytest.mark.parametrize("seconds", [-60, 3700])
def test_implausible_request_start_is_ignored(seconds):
    assert waits_since({"HTTP_X_REQUEST_START": f"{time.time() - seconds:.3f}"}, 12345) == 12345


def test_without_a_request_start_a_request_waits_since_it_was_received():
    assert waits_since({}, 12345) == 12345


SECOND = 10**9


def test_request_that_began_before_the_clock_was_put_forward_has_not_waited_for_the_jump():
    clock = Clock(wall=1000 * SECOND, monotonic=50 * SECOND)
    assert clock.find_wait(1009 * SECOND, wall=1010 * SECOND, monotonic=60 * SECOND) == SECOND
    for seconds in (1, 2, 30):  # after which requests from before the jump are found
        wall, monotonic = (1610 + seconds) * SECOND, (60 + seconds) * SECOND
        assert clock.find_wait(1010 * SECOND, wall, monotonic) == seconds * SECOND
        assert clock.find_wait(wall - SECOND // 2, wall, monotonic) == SECOND // 2


def test_request_that_has_waited_longer_than_the_clock_jumped_keeps_its_wait():
    clock = Clock(wall=1000 * SECOND, monotonic=50 * SECOND)
    assert clock.find_wait(1000 * SECOND, wall=1100 * SECOND, monotonic=150 * SECOND) == 100 * SECOND
    assert clock.find_wait(2000 * SECOND, wall=2090 * SECOND, monotonic=1100 * SECOND) == 90 * SECOND


def test_request_from_before_the_clock_was_put_back_has_no_time_of_its_own():
    clock = Clock(wall=1000 * SECOND, monotonic=50 * SECOND)
    assert clock.find_wait(1000 * SECOND, wall=401 * SECOND, monotonic=51 * SECOND) < 0
    assert clock.find_wait(402 * SECOND, wall=405 * SECOND, monotonic=55 * SECOND) == 3 * SECOND
