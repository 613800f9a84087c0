"""Outcomes of changes as they pass through the mailbox."""

import pytest

from ovms_rest.errors import ServingError
from ovms_rest.resources.error_handlers import STATUSES
from ovms_rest.shared_memory.messages import _ERRORS, Outcome


@pytest.mark.parametrize("error", _ERRORS.values())
def test_error_of_an_outcome_keeps_its_class_which_has_a_status(error):
    with pytest.raises(ServingError, match=r"^the reason$") as caught:
        Outcome(False, error.__name__, "the reason").check()
    assert type(caught.value) is error
    assert error in STATUSES


def test_outcome_without_an_error_raises_nothing():
    assert Outcome(True).check() is None
