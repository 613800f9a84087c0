"""Listen addresses: those of gunicorn's `bind` are checked before any model is loaded.

gunicorn itself binds them after that, and retries for five seconds with three lines each.
"""

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gunicorn import systemd
from gunicorn.util import is_ipv6

# Workers of a killed arbiter notice that after a second, and keep the address in use until then.
PATIENCE_SECONDS = 3.0
_RETRY_SECONDS = 0.1
_MAX_PATH_BYTES = 107  # of `sun_path` in unix(7), without the null byte


class AddressError(Exception):
    """A listen address that cannot be used; the message names it and the reason."""


def retry_in_use(bind: Callable[[], int]) -> int:
    """Return the result of `bind`. Raises its OSError; for an address in use only after 3 s of retries."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_SECONDS)


def bind_port(address: tuple[str, int]) -> int:
    """Return the descriptor of a socket bound as gunicorn binds it, not listening yet. Raises OSError."""
    with socket.socket(socket.AF_INET6 if is_ipv6(address[0]) else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)  # fails while another socket listens
        return sock.detach()


def check_addresses(cfg: Any, environ: Mapping[str, str]) -> None:
    """Check that gunicorn will be able to listen on the addresses of its `bind`. Raises AddressError.

    Inherited sockets are not checked (SIGUSR2, systemd, `fd://`), nor is `reuse_port`, which shares an address.
    """
    addresses = cfg.address
    if cfg.reuse_port or "GUNICORN_PID" in environ or systemd.listen_fds(unset_environment=False):
        return
    if any(isinstance(address, int) for address in addresses):  # then gunicorn ignores the others
        return
    for address in addresses:
        try:
            if isinstance(address, tuple):
                os.close(retry_in_use(partial(bind_port, address)))
            else:
                _check_path(Path(os.fsdecode(address)))
        except OSError as error:
            raise AddressError(f"cannot listen on {_describe(address)}: {error.strerror or error}") from error


def _check_path(path: Path) -> None:
    """Raise OSError if gunicorn could not bind a path. gunicorn replaces an existing socket."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError(errno.EEXIST, "it exists and is not a socket")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"the path is longer than {_MAX_PATH_BYTES} bytes")
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _describe(address: tuple[str, int] | str | bytes) -> str:
    if isinstance(address, tuple):
        host, port = address
        return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"
    return f"unix:{os.fsdecode(address)}"
