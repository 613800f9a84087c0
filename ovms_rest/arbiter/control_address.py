"""The control address: bound before any model is loaded, by one service only, and handed over at an upgrade.

gunicorn's SIGUSR2 starts a second arbiter, which inherits its listeners by the numbers in GUNICORN_FD. The listener of
the control address is inherited likewise, by a variable of its own. SO_REUSEPORT, which would do without that, would
give a part of the calls to any other service on the same address.

A socket unit of systemd may contain the control address. gunicorn would serve it like the others.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from gunicorn.config import Config
from gunicorn.sock import close_sockets, create_sockets
from gunicorn.systemd import SD_LISTEN_FDS_START
from gunicorn.util import chown

from ovms_rest.arbiter.addresses import SocketFiles, bind_port, check_unused, retry_in_use

# For the process that SIGUSR2 starts: the descriptor, whether systemd opened it (0 or 1), and the setting's address.
INHERITED = "_OVMS_REST_CONTROL_FD"


class ControlAddress:
    """The control address of this service; without the setting there are no sockets."""

    def __init__(self, address: str, cfg: Any, environ: MutableMapping[str, str], activated: int | None = None) -> None:
        """Use the socket that this process inherited, or bind a new one.

        `activated` is the descriptor that `take_activated` returned. `cfg` has the umask, user and group of a path.
        Raises OSError, and ValueError for an invalid address.
        """
        self.sockets: list[Any] = []
        self._address = address
        self._parsed = Config()
        self._parsed.set("bind", [address] if address else [])
        self._descriptor: int | None = None
        self._path: Path | None = None
        self._files = SocketFiles()
        inherited, owner, previous = [*environ.pop(INHERITED, "").split(" ", 2), "", ""][:3]
        self._is_systemds = activated is not None
        if activated is not None:
            self._descriptor = activated
        elif inherited and address == previous:
            self._descriptor = int(inherited)
            self._is_systemds = owner == "1"
        else:
            if inherited:  # the setting has changed
                os.close(int(inherited))
            if address:
                parsed = _parse(self._parsed)
                # Binding would succeed, as gunicorn does not listen yet. Each socket of port 0 gets a port of its own.
                if parsed in cfg.address and parsed[1] != 0:
                    raise ValueError("it is also an address of --bind; the control address must be another")
                self._bind(parsed, cfg)

    def _bind(self, address: tuple[str, int] | str, cfg: Any) -> None:
        """Bind a socket. Raises OSError if the address stays in use."""
        self._descriptor = retry_in_use(
            lambda: _bind_path(address, cfg) if isinstance(address, str) else bind_port(address)
        )
        if isinstance(address, str):
            self._path = Path(address)
            self._inode = self._path.stat().st_ino

    def listen(self, log: Any) -> None:
        """Accept connections from now on, when workers are about to start; until then they are refused.

        Raises OSError if another service that started at the same time was faster.
        """
        if self._path is not None and self._inode != self._path.stat().st_ino:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        if self._descriptor is not None:
            self.sockets = create_sockets(self._parsed, log, [self._descriptor])
            self._files.note(self.sockets)

    def hand_over(self, environ: MutableMapping[str, str], least: int = 3) -> None:
        """Name the socket, at a descriptor not below `least`, in the environment of a process that will inherit it."""
        environ.pop(INHERITED, None)
        for sock in self.sockets:
            environ[INHERITED] = f"{move(sock, least)} {self._is_systemds:d} {self._address}"

    def close(self, unlink: bool) -> None:
        """Close the socket, and remove its path unless another arbiter, another service or systemd uses it."""
        if unlink and not self._is_systemds:
            self._files.remove()
        close_sockets(self.sockets, unlink=False)
        self.sockets = []


def move(sock: Any, least: int) -> int:
    """Return a copy of a socket's descriptor, not below `least`, that is inherited in its place."""
    sock.set_inheritable(False)
    return fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, least)


def take_activated(address: str, environ: MutableMapping[str, str]) -> int | None:
    """Return the control address's socket, removed from those that systemd has opened (sd_listen_fds(3)), or None.

    The others are moved to the first descriptors without a gap, where gunicorn expects them. Raises ValueError for an
    invalid address.
    """
    if not address or environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    parsed = Config()
    parsed.set("bind", [address])
    wanted = _normalize(_parse(parsed))
    end = SD_LISTEN_FDS_START + int(environ.get("LISTEN_FDS", 0))
    for descriptor in range(SD_LISTEN_FDS_START, end):
        if _normalize(_name(descriptor)) == wanted:
            taken = os.dup(descriptor)
            for other in range(descriptor + 1, end):
                os.dup2(other, other - 1)
            os.close(end - 1)
            environ["LISTEN_FDS"] = str(end - 1 - SD_LISTEN_FDS_START)
            return taken
    return None


def _name(descriptor: int) -> Any:
    """Return the address of a socket: a path, or host and port without the other fields of IPv6."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        name = sock.getsockname()
    return name[:2] if isinstance(name, tuple) else name


def _normalize(address: Any) -> Any:
    return os.path.normpath(address) if isinstance(address, str) else address


def _parse(parsed: Config) -> tuple[str, int] | str:
    """Return host and port, or a path. Raises ValueError."""
    try:
        (address,) = parsed.address
    except RuntimeError as error:  # raised by gunicorn for a port
        raise ValueError(str(error)) from error
    if isinstance(address, tuple | str):
        return address
    raise ValueError("expected HOST:PORT or unix:PATH")


def _bind_path(path: str, cfg: Any) -> int:
    """Bind a path as gunicorn does, but not if another process listens on it."""
    _remove_unused(Path(path))
    with socket.socket(socket.AF_UNIX) as sock:
        umask = os.umask(cfg.umask)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        chown(path, cfg.uid, cfg.gid)
        return sock.detach()


def _remove_unused(path: Path) -> None:
    """Remove the socket of a process that is gone. Raises OSError if a process listens on it."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is not a socket", str(path))
    except FileNotFoundError:
        return
    check_unused(path)
    path.unlink(missing_ok=True)
