"""Errors with content of their own; their HTTP statuses are in resources/test_error_handlers.py."""

from ovms_rest.errors import ConfigError, DeadlineError, TryLaterError


def test_text_of_a_config_error_is_a_line_for_each_problem():
    error = ConfigError(["a: is missing", "b: is missing"])
    assert (str(error), error.problems) == ("a: is missing\nb: is missing", ("a: is missing", "b: is missing"))


def test_deadline_error_names_timeout_and_wait_in_microseconds():
    error = DeadlineError(500, 1_234_567)
    assert str(error) == "the request could not start within its timeout of 500 us; it waited 1234 us"
    assert error.waited_ns == 1_234_567


def test_request_can_be_run_again_once_it_is_due():
    due = []
    error = TryLaterError(lambda: bool(due))
    assert not error.is_due()
    due.append(True)
    assert error.is_due()
