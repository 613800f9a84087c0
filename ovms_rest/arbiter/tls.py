"""The TLS context, which the arbiter loads for all workers.

Loaded once, before the arbiter forks, it needs no right of the workers to read the key, and a worker that is replaced
later does not depend on what lies in the files by then.
"""

import ssl
from pathlib import Path
from typing import Any

from gunicorn.sock import ssl_context


class TlsError(Exception):
    """A certificate or key that cannot be used; its text names the files and the reason."""


def load_tls(cfg: Any) -> ssl.SSLContext | None:
    """Return the context that gunicorn's settings describe, None without TLS. Raises TlsError."""
    if not cfg.is_ssl:
        return None
    try:
        context: ssl.SSLContext = ssl_context(cfg)
    except Exception as error:  # whatever OpenSSL, the system, or a hook of the user's comes up with
        raise TlsError(f"cannot use {_list_files(cfg)}: {_explain(cfg, error)}") from error
    return context


def _list_files(cfg: Any) -> str:
    return ", ".join(f"{name} {path!r}" for name, path in _files(cfg).items())


def _files(cfg: Any) -> dict[str, str]:
    names = ("certfile", "keyfile", "ca_certs")
    return {name: path for name in names if (path := getattr(cfg, name))}


def _explain(cfg: Any, error: Exception) -> str:
    """Return the reason; OpenSSL does not say which file cannot be read, nor that a key lacks its certificate."""
    for name, path in _files(cfg).items():
        try:
            Path(path).open("rb").close()
        except OSError as unreadable:
            return f"{name}: {unreadable.strerror}"
    if not cfg.certfile:
        return "a keyfile needs a certfile"
    return str(error) or repr(error)
