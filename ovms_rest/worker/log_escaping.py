"""Escapes control characters in the log, so that no client begins a line of it or commands a terminal.

That hangs on the loggers, whose handlers gunicorn makes anew at a reload. A filter of a logger sees only what is logged
to that logger itself, so each has it.
"""

import logging

from ovms_rest.protocol.words import escape, escape_lines

_LOGGERS = ("gunicorn.error", "gunicorn.error.ovms_rest", "gunicorn.access")

# How messages of gunicorn's arbiter begin that have several lines, none of them a client's.
_IN_LINES = ("Current configuration:\n", "Exception during worker exit:\n")


class _Escaping(logging.Filter):
    """Lets every record pass, with its message in one line and its traceback indented."""

    def __init__(self) -> None:
        super().__init__()
        self._formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # a bug of the caller, which the handlers report
            return True
        escaped = escape_lines(message) if message.startswith(_IN_LINES) else escape(message)
        if escaped != message:
            record.msg, record.args = escaped, ()
        if record.exc_info and not record.exc_text:
            # The message of an exception may be a client's, line breaks included: no line of it looks like another's.
            record.exc_text = f"  {escape_lines(self._formatter.formatException(record.exc_info))}"
        return True


_ESCAPING = _Escaping()


def install() -> None:
    """Have the loggers of gunicorn and the service escape from now on, in this process and those forked from it."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_ESCAPING)
