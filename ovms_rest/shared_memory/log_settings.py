"""The settings of the log, in the words of Triton's logging extension."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

# How times are written: as gunicorn does, or as 2026-11-24T12:00:00Z.
LogFormat = Literal["default", "ISO8601"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

Changes = Mapping[str, bool | int | str]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The log's settings, by the names of Triton's logging extension; critical lines are always logged."""

    log_file: str  # always empty: the path of the log is not exposed
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int  # from 1 on there are debugging lines
    log_format: LogFormat
