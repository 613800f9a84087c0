"""gunicorn's own error responses in the form of all others: JSON, with the status of RFC 9110 and 9112.

gunicorn writes them as HTML pages from one method of its base worker, which has no setting; `install` replaces it.
"""

import socket
import ssl
from http import HTTPStatus
from typing import Any

from gunicorn.http import errors
from gunicorn.workers.base import Worker

from ovms_rest.log import log
from ovms_rest.protocol.encoding import encode_error


class OutsideError(errors.ParseException):  # type: ignore[misc]
    """The path is outside of SCRIPT_NAME, for which gunicorn raises ConfigurationProblem."""


# The first matching class counts.
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.LimitRequestLine, 414),
    (errors.LimitRequestHeaders, 431),
    (errors.InvalidHTTPVersion, 505),
    (errors.UnsupportedTransferCoding, 501),
    (errors.ExpectationFailed, 417),
    (errors.ForbiddenProxyRequest, 403),
    (errors.ConfigurationProblem, 500),
    (OutsideError, 404),
    (errors.ParseException, 400),
    # These are not ParseExceptions: a truncated or wrongly framed body, and a failed handshake.
    (errors.NoMoreData, 400),
    (errors.InvalidChunkSize, 400),
    (errors.InvalidChunkExtension, 400),
    (errors.ChunkMissingTerminator, 400),
    (ssl.SSLError, 400),
)


def encode_refusal(error: BaseException) -> tuple[int, bytes]:
    """Return the status and the whole response to a request that gunicorn could not read, or that failed."""
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    text = "internal error; the reason is in the server's log" if status == 500 else f"malformed request: {error}"
    body = encode_error(text)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return status, head.encode() + body


def _handle_error(self: Worker, req: Any, client: socket.socket, addr: Any, error: BaseException) -> None:
    if isinstance(error, errors.ConfigurationProblem):
        error = OutsideError(str(error))
    status, response = encode_refusal(error)
    if status == 500:
        log.error("error while handling a request", exc_info=error)
    else:
        log.warning("refused a request from %s with %s: %s", addr[0] if addr else "a local client", status, error)
    try:
        client.sendall(response)
    except OSError:
        log.debug("the client of a refused request has disconnected")


def install() -> None:
    """Replace the method in all of gunicorn's workers."""
    Worker.handle_error = _handle_error
