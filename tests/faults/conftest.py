"""Hosts that the faults of a file share."""

import contextlib

import pytest
from faulty_host import missing, running


@pytest.fixture(scope="module")
def host_with(tmp_path_factory):
    """A function that returns a host with a setup; it ends the host with another setup that it returned before."""
    with contextlib.ExitStack() as stack:
        current = []

        def get(setup):
            if current[:1] != [setup]:
                if reason := missing() or setup.missing():
                    pytest.skip(reason)
                stack.close()
                current[:] = []
                current[:] = setup, stack.enter_context(running(tmp_path_factory.mktemp("host"), setup))
            return current[1]

        yield get
