"""Fixtures: the browser."""

import pytest
from browser import run_browser


@pytest.fixture(scope="module")
def browser():
    with run_browser() as running:
        yield running
