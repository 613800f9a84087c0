"""`Inference-Header-Content-Length`: where in a body the JSON ends and the tensors begin."""

from typing import NamedTuple

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.words import count_of, show

# A number with this many digits is larger than any body.
_TOO_MANY_DIGITS = 19


class HeaderLength(NamedTuple):
    """The value of the header; `text` None when it is missing.

    `length` is the offset at which the tensors begin, to align a buffer for them before the body is there; it is 0
    when the header is missing or invalid, and may be beyond the body.
    """

    text: str | None = None
    length: int = 0
    is_valid: bool = True

    def check(self, body_size: int) -> int | None:
        """Return the length of the JSON in a body of that size, None for all of it. Raises InvalidRequestError."""
        if self.text is None:
            return None
        if not self.is_valid:
            raise self._error("expected one integer from 0 to the body's length")
        if self.length > body_size:
            raise self._error(f"but the body has only {count_of(body_size, 'byte')}")
        return self.length

    def _error(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(f"Inference-Header-Content-Length is {show(self.text)}, {reason}")


_MISSING = HeaderLength()


def read_header_length(text: str | None) -> HeaderLength:
    """Return the value of the header, whose repeats are joined by commas as in WSGI; equal ones are valid."""
    if text is None:
        return _MISSING
    if text.isdecimal() and text.isascii() and len(text) < _TOO_MANY_DIGITS:
        return HeaderLength(text, int(text))
    lengths = [item.strip(" \t") for item in text.split(",")]
    significant = {item.lstrip("0") for item in lengths}
    if len(significant) > 1 or not all(item.isascii() and item.isdigit() for item in lengths):
        return HeaderLength(text, is_valid=False)
    return HeaderLength(text, int(significant.pop()[:_TOO_MANY_DIGITS] or "0"))
