"""Which lines the log has, in memory that all processes share: what a call sets in one holds in all at once.

The loggers ask the shared numbers whether they are enabled for a level, before a record is made. That hangs on the
loggers, not on their handlers: gunicorn makes those anew at a reload, a user's `--logconfig` has others, and a process
that is forked inherits it.
"""

import logging
import mmap
import time
from collections.abc import Callable
from functools import partial

from ovms_rest.shared_memory.log_settings import LOG_FORMATS, Changes, LogSettings

# gunicorn's, and ours below it.
_LOGGER = logging.getLogger("gunicorn.error")
_LOGGERS = (_LOGGER, logging.getLogger("gunicorn.error.ovms_rest"))

_INFO, _WARNING, _ERROR, _VERBOSE, _FORMAT = range(5)
_COLUMNS = {
    "log_info": _INFO,
    "log_warning": _WARNING,
    "log_error": _ERROR,
    "log_verbose_level": _VERBOSE,
    "log_format": _FORMAT,
}
_TIME = "%Y-%m-%dT%H:%M:%SZ"


class LogLevels:
    """The settings of the log; made in the arbiter before it forks. Until `install` they have no effect."""

    def __init__(self) -> None:
        """Begin with what gunicorn's level says."""
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._level = -1
        self._follow(_LOGGER.getEffectiveLevel())

    def install(self) -> None:
        """Have the shared settings decide from now on; in the arbiter, each time gunicorn has set up its logger.

        gunicorn has set its level then. It counts at the start and when it is another than last time; else what calls
        have set goes on.
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
        """Return the settings as they are."""
        info, warning, error, verbose, log_format = self._numbers[: len(_COLUMNS)]
        return LogSettings("", bool(info), bool(warning), bool(error), verbose, LOG_FORMATS[log_format])

    def change(self, changes: Changes) -> None:
        """Change some settings, by name, in all processes."""
        for name, value in changes.items():
            self._numbers[_COLUMNS[name]] = LOG_FORMATS.index(value) if name == "log_format" else int(value)

    def _follow(self, level: int) -> None:
        """Set what a level of Python's says: it and all above."""
        self._level = level
        self._numbers[_INFO] = level <= logging.INFO
        self._numbers[_WARNING] = level <= logging.WARNING
        self._numbers[_ERROR] = level <= logging.ERROR
        self._numbers[_VERBOSE] = level <= logging.DEBUG

    def _is_enabled_for(self, level: int) -> bool:
        """Tell whether the log has records of a level."""
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
