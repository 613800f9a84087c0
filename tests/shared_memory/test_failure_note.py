"""The reason why a worker cannot become ready, as the arbiter reads it."""

import errno

import pytest
from forking import fork, join

from ovms_rest.shared_memory.failure_note import FailureNote, describe


def note(error):
    """Write an error in a forked process, as a worker does, and return the reason."""
    failure = FailureNote()

    def work():
        try:
            raise error
        except Exception as caught:
            failure.write(caught)

    join(fork(work))
    return failure.take()


def test_reason_is_empty_if_the_worker_wrote_none():
    assert FailureNote().take() == ""


def test_error_with_a_file_name_takes_one_line():
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")
    assert note(error) == "a worker cannot become ready: No such file or directory: '/x'"


def test_other_error_comes_with_its_traceback():
    first, *rest = note(ValueError("mine")).splitlines()
    assert first == "a worker cannot become ready: ValueError: mine"
    assert (rest[0], rest[-1]) == ("Traceback (most recent call last):", "ValueError: mine")


def test_long_reason_is_cut():
    assert len(note(ValueError("x" * 100_000))) == 65_535


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EAGAIN, "Try again"), "Try again"),
        (OSError(errno.ENOENT, "No such file", "/x"), "No such file: '/x'"),
        (OSError("mine"), "OSError: mine"),
        (ValueError("mine"), "ValueError: mine"),
    ],
)
def test_error_is_described_in_one_line(error, line):
    assert describe(error) == line
