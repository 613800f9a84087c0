"""The access log of the service: one line per request, JSON or `key=value`, to the standard output or a file.

A line is one write of at most PIPE_BUF bytes, so that lines of several workers never mix. Lines are lost when the file
cannot be written or its reader has fallen behind; requests are not affected.
"""

import json
import os
import re
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from ovms_rest.log import log
from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.context import read_context_of
from ovms_rest.worker import streams

STDOUT = "-"
_MODE = 0o640

# How many characters of a client's value a line repeats, so that no line of escaped values is longer than PIPE_BUF.
_SHOWN = {"path": 256}
_SHOWN_OTHERWISE = 128

# What needs no quotes in a line of text.
_PLAIN = re.compile(r"[!#-<>-~]+")

# All but printable ASCII is escaped, so that no client can begin a line or command a terminal.
_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Access:
    """The content of a line; None stands for an unknown value.

    `bytes_in` and `bytes_out` are the sizes of the bodies. `total_us` is the time from when the request was received
    whole until its response was sent; it was queued for `queue_us`, and the model took `inference_us`.
    """

    client: str
    request_id: str  # of X-Request-ID
    method: str
    path: str
    status: int
    bytes_in: int | None
    bytes_out: int
    total_us: int
    model: str | None = None
    version: str | None = None
    id: str | None = None  # of the request's JSON
    queue_us: int | None = None
    inference_us: int | None = None
    trace_id: str | None = None


def access_of(environ: dict[str, Any], status: str, size: int, received_ns: int) -> Access:
    """Describe a request, received at `received_ns` by the monotonic clock, and its response of `size` bytes."""
    inference: InferenceRecord | None = environ.get("ovms_rest.inference")
    known: dict[str, Any] = {}
    if inference is not None and inference.model_name:  # else it was not started
        known = {
            "model": inference.model_name,
            "version": inference.model_version,
            "id": inference.id or None,
            "queue_us": inference.queue_ns // 1000,
            "inference_us": inference.infer_ns // 1000,
        }
    return Access(
        client=environ["REMOTE_ADDR"],
        request_id=environ["HTTP_X_REQUEST_ID"],
        method=environ["REQUEST_METHOD"],
        path=environ["RAW_URI"].partition("?")[0],
        status=int(status.split()[0]),
        bytes_in=len(environ["wsgi.input"].buffer) if "wsgi.input" in environ else None,
        bytes_out=size,
        total_us=(time.monotonic_ns() - received_ns) // 1000,
        trace_id=None if (context := read_context_of(environ)) is None else context.trace_id,
        **known,
    )


_KEYS = tuple(field.name for field in fields(Access))


def encode_json(access: Access, seconds: float) -> bytes:
    """Return a line of JSON with all keys; `seconds` since 1970."""
    values = {key: _cut(key, getattr(access, key)) for key in _KEYS}
    return f"{_to_json({'time': _format_time(seconds), **values})}\n".encode("ascii")


def encode_text(access: Access, seconds: float) -> bytes:
    """Return a line of `key=value`, quoted as in JSON where necessary, without the unknown values."""
    pairs = [("time", _format_time(seconds))]
    pairs += [(key, _quote(_cut(key, value))) for key in _KEYS if (value := getattr(access, key)) is not None]
    return " ".join([f"{key}={value}" for key, value in pairs]).encode("ascii") + b"\n"


ENCODERS: dict[str, Callable[[Access, float], bytes]] = {"json": encode_json, "text": encode_text}


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cut(key: str, value: str | int | None) -> str | int | None:
    return value[: _SHOWN.get(key, _SHOWN_OTHERWISE)] if isinstance(value, str) else value


def _quote(value: str | int | None) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else _to_json(text)


def provide_file(path: str, uid: int, gid: int) -> None:
    """Create the file of the log for workers of another user (--user), if there is none; in the arbiter.

    Errors are left to the workers, which open the file anyway and log them.
    """
    if path != STDOUT:
        streams.provide_file(path, uid, gid, _MODE)


class AccessLog:
    """The log of a worker; `kind` is a key of ENCODERS, `path` that of a file, or STDOUT.

    A path that cannot be opened is logged, and tried again by `reopen`.
    """

    def __init__(self, kind: str, path: str) -> None:
        self._encode = ENCODERS[kind]
        self._path = path
        self._poll = select.poll()
        self._file: int | None = None
        self._start = b""
        self._has_warned = False
        self.reopen()

    def reopen(self) -> None:
        """Open the path again after the file has been moved away; keep the old file if that fails."""
        self._has_warned = False
        if self._path == STDOUT:
            self._take(streams.unblocked_stdout())
            return
        try:
            # A pipe without a reader, or with a slow one, is not waited for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(self._path, flags, _MODE)
        except OSError as error:
            log.error("cannot open the access log %s: %s", self._path, error.strerror)
            return
        if self._file is None:
            self._take(file)
        else:
            os.dup2(file, self._file, inheritable=False)
            os.close(file)

    def _take(self, file: int) -> None:
        self._file = file
        self._poll.register(file, select.POLLOUT)

    def write(self, access: Access) -> None:
        """Write a line, or drop it."""
        if self._file is None:
            return
        line = self._start + self._encode(access, time.time())
        try:
            # A standard output that cannot be opened again blocks once it is full.
            written = os.write(self._file, line) if self._poll.poll(0) else 0
        except BlockingIOError:  # another worker was faster
            written = 0
        except OSError as error:
            self._warn(os.strerror(error.errno or 0))
            return
        if not written:
            self._warn("its reader has fallen behind")
            return
        self._start = b"" if written == len(line) else b"\n"  # after a part of a line, on a full disk

    def _warn(self, reason: str) -> None:
        """Log once, not for every line, that lines are lost."""
        if not self._has_warned:
            self._has_warned = True
            log.error("lines of the access log %s are lost: %s", self._path, reason)
