"""The TLS context, which the arbiter loads for all workers.

Loaded once, before the arbiter forks, so that workers need no permission to read the key, and a worker that starts
later does not depend on the files at that time.
"""

import ssl
from pathlib import Path
from typing import Any

from gunicorn.sock import ssl_context


class TlsError(Exception):
    """An unusable certificate or key; the message names the files and the reason."""


def load_tls(cfg: Any) -> ssl.SSLContext | None:
    """Return the context that gunicorn's settings describe, None without TLS. Raises TlsError."""
    if not cfg.is_ssl:
        return None
    for name, path in _files(cfg).items():
        if Path(path).is_fifo():  # opening it would wait for a writer for good
            raise _error(cfg, f"{name}: it is not a regular file")
    try:
        context: ssl.SSLContext = ssl_context(cfg)
    except Exception as error:  # of OpenSSL, the system, or a user hook
        raise _error(cfg, _explain(cfg, error)) from error
    return context


def _error(cfg: Any, reason: str) -> TlsError:
    files = ", ".join(f"{name} {path!r}" for name, path in _files(cfg).items())
    return TlsError(f"cannot use {files}: {reason}")


def _files(cfg: Any) -> dict[str, str]:
    names = ("certfile", "keyfile", "ca_certs")
    return {name: path for name in names if (path := getattr(cfg, name))}


def _explain(cfg: Any, error: Exception) -> str:
    """Return the reason; OpenSSL names neither an unreadable file nor a missing certificate."""
    for name, path in _files(cfg).items():
        try:
            Path(path).open("rb").close()
        except OSError as unreadable:
            return f"{name}: {unreadable.strerror}"
    if not cfg.certfile:
        return "a keyfile needs a certfile"
    return str(error) or repr(error)
