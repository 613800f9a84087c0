"""URLs of the addresses that a service listens on, for the log and for the console."""

import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

# A wildcard address accepts connections to every address of the host; a URL needs one of them.
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # not to bind it

# As gunicorn has them: host and port (and more for IPv6), or a path.
Address = tuple[Any, ...] | str | bytes


def name_sockets(sockets: Iterable[Any]) -> list[Address]:
    """Return the addresses that sockets are bound to."""
    return [sock.getsockname() for sock in sockets]


def find_port(addresses: Iterable[Address | int]) -> int | None:
    """Return the port of the first TCP address, None if there is none."""
    return next((address[1] for address in addresses if isinstance(address, tuple)), None)


def find_url(addresses: Iterable[Address | int], is_tls: bool, path: str) -> str:
    """Return the URL of a path at the first TCP address, or the path and a socket's if there are Unix sockets only."""
    addresses = list(addresses)
    scheme, quoted = "https" if is_tls else "http", quote(path, encoding="latin-1")
    for address in addresses:
        if isinstance(address, tuple):
            host = str(_REACHABLE.get(address[0], address[0]))
            return f"{scheme}://{f'[{host}]' if ':' in host else host}:{address[1]}{quoted}"
    names = [f"unix:{os.fsdecode(address)}" for address in addresses if isinstance(address, str | bytes)]
    return " on ".join([quoted, *names[:1]])
