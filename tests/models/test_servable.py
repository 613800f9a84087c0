"""The counters of a version that has none yet."""

from records import timed

from ovms_rest.models.servable import NOT_COUNTED


def test_counters_that_count_nothing_accept_every_event():
    NOT_COUNTED.begin()
    NOT_COUNTED.record(timed(1, 2, 3, 4, 5, 6, 7))
    NOT_COUNTED.fail("failed", 1)
    NOT_COUNTED.answer("ModelReady")
