"""Faults of disks, processes and clocks."""

import pytest
from fault_table import RESOURCES, check


@pytest.mark.parametrize("fault", RESOURCES, ids=str)
def test_no_client_notices(host_with, fault):
    """No request fails but the fault's own, and no answer is wrong."""
    check(host_with(fault.setup), fault)
