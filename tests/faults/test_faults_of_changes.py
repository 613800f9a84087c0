"""Faults of models and their config, of clients and of nginx."""

import pytest
from fault_table import CHANGES, check


@pytest.mark.parametrize("fault", CHANGES, ids=str)
def test_no_client_notices(host_with, fault):
    """No request fails but the fault's own, and no answer is wrong."""
    check(host_with(fault.setup), fault)
