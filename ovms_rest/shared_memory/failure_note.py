"""The reason why a worker cannot become ready, passed to the arbiter.

The arbiter logs it once for all workers that fail for the same reason.
"""

import mmap
import traceback

# gunicorn's exit status of a worker that fails before it is ready.
BOOT_ERROR = 3

_BYTES = 65536


class FailureNote:
    """A page shared by a worker and the arbiter; created before the fork."""

    def __init__(self) -> None:
        """Allocate the page. Raises OSError if memory is short."""
        self._page = mmap.mmap(-1, _BYTES)

    def write(self, error: Exception) -> None:
        """Write the reason, in the worker."""
        text = f"a worker cannot become ready: {describe(error)}"
        if not (isinstance(error, OSError) and error.filename):  # other texts may not show the cause
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        self._page.seek(0)
        self._page.write(text.encode(errors="backslashreplace")[: _BYTES - 1])

    def take(self) -> str:
        """Return the reason, "" if there is none, and free the page; in the arbiter."""
        text = self._page[: self._page.find(b"\0")].decode(errors="replace")
        self._page.close()
        return text


def describe(error: Exception) -> str:
    """Return one line for an error: the system's message of an OSError, the type and message of any other."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename!r}"
    return f"{type(error).__name__}: {error}"
