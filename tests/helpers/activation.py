"""Listening sockets that outlive a service, as those of a socket unit of systemd do."""

import contextlib
import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SD_LISTEN_FDS_START = 3  # sd_listen_fds(3)
_RAISED = 100  # above the first descriptors and all that the shell uses itself


@contextlib.contextmanager
def listening(*addresses: Path | int) -> Iterator[list[socket.socket]]:
    """Listen on unix sockets at paths, and at ports of 127.0.0.1."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for address in addresses:
            is_port = isinstance(address, int)
            sock = stack.enter_context(socket.socket(socket.AF_INET if is_port else socket.AF_UNIX))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", address) if is_port else str(address))
            sock.listen(4096)
            sockets.append(sock)
        yield sockets


def start_activated(command: Sequence[str], sockets: Sequence[socket.socket], **options: Any) -> subprocess.Popen:
    """Start a command with sockets as its descriptors from 3 on; `options` are those of Popen."""
    raised = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, _RAISED) for sock in sockets]
    script = "".join(f"exec {at}<&{descriptor}; " for at, descriptor in enumerate(raised, _SD_LISTEN_FDS_START))
    try:
        return subprocess.Popen(
            ["bash", "-c", f'{script} LISTEN_FDS={len(sockets)} LISTEN_PID=$$ exec "$@"', "bash", *command],
            pass_fds=raised,
            **options,
        )
    finally:
        for descriptor in raised:
            os.close(descriptor)
