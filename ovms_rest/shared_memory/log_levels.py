"""The log's settings in memory shared by all processes: a change in one takes effect in all immediately.

The loggers check the shared numbers before a record is made. The check belongs to the loggers, not to their handlers:
gunicorn replaces the handlers at a reload, a user's `--logconfig` has others, and forked processes inherit the loggers.
"""

import logging
import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from ovms_rest.log import log

# How times are written: as gunicorn does, or as 2026-11-24T12:00:00Z.
LogFormat = Literal["default", "ISO8601"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

Changes = Mapping[str, bool | int | str]

# gunicorn's logger and ours, its child.
_LOGGER = logging.getLogger("gunicorn.error")
_LOGGERS = (_LOGGER, log)

_INFO, _WARNING, _ERROR, _VERBOSE, _FORMAT = range(5)
_COLUMNS = {
    "log_info": _INFO,
    "log_warning": _WARNING,
    "log_error": _ERROR,
    "log_verbose_level": _VERBOSE,
    "log_format": _FORMAT,
}
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The log's settings, by the names of Triton's logging extension; critical lines are always logged."""

    log_file: str  # always empty: the path of the log is not exposed
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int  # from 1 on there are debugging lines
    log_format: LogFormat


class LogLevels:
    """The settings of the log; created in the arbiter before it forks. They take effect with `install`."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._level = -1
        self._follow(_LOGGER.getEffectiveLevel())

    def install(self) -> None:
        """Apply the shared settings from now on; in the arbiter, each time gunicorn has set up its logger.

        gunicorn's level replaces the settings at the start and when it has changed; else they stay as calls set them.
        """
        level = _LOGGER.getEffectiveLevel()
        if level != self._level:
            self._follow(level)
        for logger in _LOGGERS:
            logger.isEnabledFor = self._is_enabled_for  # type: ignore[method-assign]
        for handler in _LOGGER.handlers:
            formatter = handler.formatter
            if formatter is not None and "formatTime" not in vars(formatter):
                formatter.formatTime = partial(self._format_time, formatter.formatTime)  # type: ignore[method-assign]

    def read(self) -> LogSettings:
        """Return the current settings."""
        info, warning, error, verbose, log_format = self._numbers[: len(_COLUMNS)]
        return LogSettings("", bool(info), bool(warning), bool(error), verbose, LOG_FORMATS[log_format])

    def change(self, changes: Changes) -> None:
        """Change some settings, by name, in all processes."""
        for name, value in changes.items():
            self._numbers[_COLUMNS[name]] = LOG_FORMATS.index(value) if name == "log_format" else int(value)

    def _follow(self, level: int) -> None:
        """Enable a level of Python's and all above it."""
        self._level = level
        self._numbers[_INFO] = level <= logging.INFO
        self._numbers[_WARNING] = level <= logging.WARNING
        self._numbers[_ERROR] = level <= logging.ERROR
        self._numbers[_VERBOSE] = level <= logging.DEBUG

    def _is_enabled_for(self, level: int) -> bool:
        """Return whether records of a level are logged."""
        return level >= logging.CRITICAL or self._numbers[_column(level)] > 0

    def _format_time(
        self, usual: Callable[[logging.LogRecord, str | None], str], record: logging.LogRecord, form: str | None = None
    ) -> str:
        if LOG_FORMATS[self._numbers[_FORMAT]] == "ISO8601":
            return time.strftime(_TIME, time.gmtime(record.created))
        return usual(record, form)


def _column(level: int) -> int:
    if level >= logging.ERROR:
        return _ERROR
    if level >= logging.WARNING:
        return _WARNING
    return _INFO if level >= logging.INFO else _VERBOSE
