"""The reason why a worker cannot become ready, which it leaves for the arbiter.

The arbiter logs it once for all workers that fail alike; each of them would log it again.
"""

import mmap
import traceback

# gunicorn's exit status of a worker that fails before it is ready.
BOOT_ERROR = 3

_BYTES = 65536


class FailureNote:
    """A page that a worker and the arbiter share; made before the fork."""

    def __init__(self) -> None:
        """Make it. Raises OSError when there is no memory."""
        self._page = mmap.mmap(-1, _BYTES)

    def write(self, error: Exception) -> None:
        """Leave the reason, in the worker."""
        text = f"a worker cannot become ready: {describe(error)}"
        if not (isinstance(error, OSError) and error.filename):  # that text alone may not show what failed
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        self._page.seek(0)
        self._page.write(text.encode(errors="backslashreplace")[: _BYTES - 1])

    def take(self) -> str:
        """Return the reason, "" when there is none, and free the page, in the arbiter."""
        text = self._page[: self._page.find(b"\0")].decode(errors="replace")
        self._page.close()
        return text


def describe(error: Exception) -> str:
    """Return a line for an error: what the system says of an OSError, the type and the text of any other."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    return f"{type(error).__name__}: {error}"
