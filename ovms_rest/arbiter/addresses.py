"""Listen addresses: those of gunicorn's `bind` are checked before any model is loaded.

gunicorn itself binds them after that, and retries for five seconds with three lines each.
"""

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gunicorn import systemd
from gunicorn.util import is_ipv6

# Workers of a killed arbiter notice that after a second, and keep the address in use until then.
PATIENCE_SECONDS = 3.0
_RETRY_SECONDS = 0.1
_MAX_PATH_BYTES = 107  # of `sun_path` in unix(7), without the null byte

Bound = TypeVar("Bound")


class AddressError(Exception):
    """A listen address that cannot be used; the message names it and the reason."""


def retry_in_use(bind: Callable[[], Bound]) -> Bound:
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

    gunicorn would take a path from the process that listens there. Inherited sockets are not checked (SIGUSR2, systemd,
    `fd://`), nor is `reuse_port`, which shares an address.
    """
    addresses = cfg.address
    if cfg.reuse_port or "GUNICORN_PID" in environ or systemd.listen_fds(unset_environment=False):
        return
    if any(isinstance(address, int) for address in addresses):  # then gunicorn ignores the others
        return
    for address in addresses:
        with _naming(address):
            if isinstance(address, tuple):
                os.close(retry_in_use(partial(bind_port, address)))
            else:
                retry_in_use(partial(_check_path, Path(os.fsdecode(address))))


def check_paths(addresses: Iterable[Any], own: Collection[Any]) -> None:
    """Check the paths among new addresses, apart from its own, on which this process listens. Raises AddressError."""
    for address in addresses:
        if isinstance(address, str) and address not in own:
            with _naming(address):
                retry_in_use(partial(_check_path, Path(address)))


@contextlib.contextmanager
def _naming(address: tuple[str, int] | str | bytes) -> Iterator[None]:
    """Raise an OSError as an AddressError, which names the address."""
    try:
        yield
    except OSError as error:
        raise AddressError(f"cannot listen on {_describe(address)}: {error.strerror or error}") from error


def _check_path(path: Path) -> None:
    """Raise OSError if gunicorn could not bind a path, or a process listens there. gunicorn replaces other sockets."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError(errno.EEXIST, "it exists and is not a socket")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"the path is longer than {_MAX_PATH_BYTES} bytes")
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    check_unused(path)


def check_unused(path: Path) -> None:
    """Raise OSError if a process listens on the socket at a path."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:  # its backlog is full
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


class SocketFiles:
    """The files of listening sockets at paths, which other processes may remove or replace."""

    def __init__(self) -> None:
        """Begin with none."""
        self._files: dict[Any, tuple[str, tuple[int, int]]] = {}

    def note(self, listeners: Iterable[Any]) -> None:
        """Note the files of these sockets instead of others, of new ones as soon as they are bound."""
        known, self._files = self._files, {}
        for listener in listeners:
            if listener in known:
                self._files[listener] = known[listener]
            elif isinstance(path := listener.getsockname(), str) and (identity := _identify(path)) is not None:
                self._files[listener] = path, identity

    def remove(self) -> None:
        """Remove the files that are still those of the sockets.

        Called before the sockets are closed: until then no other file gets the inode.
        """
        for path, identity in self._files.values():
            if _identify(path) == identity:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._files = {}


def _identify(path: str) -> tuple[int, int] | None:
    """Return the device and the inode of a path, None if there is no file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _describe(address: tuple[str, int] | str | bytes) -> str:
    if isinstance(address, tuple):
        host, port = address
        return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"
    return f"unix:{os.fsdecode(address)}"
