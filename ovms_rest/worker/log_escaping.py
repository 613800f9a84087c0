"""Escaping of control characters in the log, so that no client can forge a line of it or control a terminal.

The filter is attached to the loggers, because gunicorn replaces their handlers at a reload. A filter of a logger sees
only records logged to that logger itself, so each has it.
"""

import logging

from ovms_rest.protocol.words import escape, escape_lines

_LOGGERS = ("gunicorn.error", "gunicorn.error.ovms_rest", "gunicorn.access")

# The beginnings of gunicorn's own messages of several lines, which contain no input of clients.
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
            # An exception's message may repeat a client's line breaks; indented, no line of it looks like a record.
            record.exc_text = f"  {escape_lines(self._formatter.formatException(record.exc_info))}"
        return True


_ESCAPING = _Escaping()


def install() -> None:
    """Make the loggers of gunicorn and the service escape, in this process and those forked from it."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_ESCAPING)
