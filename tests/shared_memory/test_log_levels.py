"""The log's settings in shared memory; tests/resources/test_log_settings.py covers what they do to gunicorn's log."""

import logging

import pytest
from forking import fork, join

from ovms_rest.log import log
from ovms_rest.shared_memory.log_levels import LogLevels, LogSettings


@pytest.fixture
def log_levels(monkeypatch):
    """Installed levels of a log at info."""
    parent = logging.getLogger("gunicorn.error")
    monkeypatch.setattr(parent, "level", logging.INFO)
    for logger in (parent, log):
        monkeypatch.setattr(logger, "isEnabledFor", logger.isEnabledFor)
    levels = LogLevels()
    levels.install()
    return levels


def test_settings_begin_with_gunicorns_level(log_levels):
    assert log_levels.read() == LogSettings("", True, True, True, 0, "default")


def test_change_in_one_process_takes_effect_in_all(log_levels):
    changes = {"log_info": False, "log_verbose_level": 2, "log_format": "ISO8601"}
    join(fork(lambda: log_levels.change(changes)))
    assert log_levels.read() == LogSettings("", False, True, True, 2, "ISO8601")
    assert (log.isEnabledFor(logging.INFO), log.isEnabledFor(logging.DEBUG)) == (False, True)


def test_critical_lines_are_always_logged(log_levels):
    log_levels.change(dict.fromkeys(("log_info", "log_warning", "log_error"), False))
    assert [level for level in range(0, 60, 10) if log.isEnabledFor(level)] == [logging.CRITICAL]
