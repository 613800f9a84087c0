"""Pauses between failed attempts."""

import pytest

from ovms_rest.arbiter.pauses import Pauses


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 0), (1, 0.1), (2, 0.2), (5, 1.6), (9, 25.6), (10, 30), (5000, 30)]
)
def test_pause_doubles_with_each_failure_up_to_30_seconds(failures, seconds):
    pauses = Pauses()
    for _ in range(failures):
        pauses.fail()
    assert pauses.seconds() == pytest.approx(seconds)


def test_next_attempt_may_be_made_after_the_pause(monkeypatch):
    pauses, now = Pauses(), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert pauses.is_over()
    pauses.fail()
    assert not pauses.is_over()
    now += 0.11
    assert pauses.is_over()


def test_success_ends_the_pauses():
    pauses = Pauses()
    pauses.fail()
    pauses.reset()
    assert (pauses.failures, pauses.seconds(), pauses.is_over()) == (0, 0, True)
