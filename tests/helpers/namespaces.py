"""Hosts as network namespaces of this machine, joined by a bridge.

A namespace is held by a descriptor, so it vanishes with this process, whatever ends it. A thread enters a namespace;
the sockets and processes that it makes there stay in it.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from service import PATIENCE

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
DELAY_LINE = Path(__file__).with_name("delay_line.py")


class Namespace:
    """A network namespace, with an address once it is part of a network."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self._file = -1
        self._problem: OSError | None = None
        # The thread leaves its namespace to the descriptor and ends; no other thread is affected.
        maker = threading.Thread(target=self._make)
        maker.start()
        maker.join()
        if self._problem:
            raise self._problem
        with self.inside():
            ip("link set lo up")

    def _make(self) -> None:
        try:
            _check(_libc.unshare(_CLONE_NEWNET))
            self._file = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        except OSError as error:
            self._problem = error

    @property
    def path(self) -> str:
        """Return a path that `ip` takes for the namespace."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let the thread be in this namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _check(_libc.setns(self._file, _CLONE_NEWNET))
            try:
                yield
            finally:
                _check(_libc.setns(before, _CLONE_NEWNET))
        finally:
            os.close(before)

    def connect(self, port: int) -> socket.socket:
        """Connect from this namespace to a port of it."""
        with self.inside():
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)

    def close(self) -> None:
        os.close(self._file)


class Network:
    """Hosts that a bridge in the namespace `hub` joins; the hub has an address too."""

    def __init__(self, count: int) -> None:
        self.hub = Namespace()
        self.hosts = [Namespace() for _ in range(count)]
        self._lines: dict[Namespace, subprocess.Popen] = {}
        self.hub.address = "10.0.0.10"
        with self.hub.inside():
            ip("link add hosts type bridge", "link set hosts up", f"addr add {self.hub.address}/24 dev hosts")
        for number, host in enumerate(self.hosts):
            host.address = f"10.0.0.{11 + number}"
            with self.hub.inside():
                ip(f"link add {self._port(host)} type veth peer name eth0 netns {host.path}")
                ip(f"link set {self._port(host)} master hosts up")
            with host.inside():
                ip(f"addr add {host.address}/24 dev eth0", "link set eth0 up")

    def _port(self, host: Namespace) -> str:
        return f"port{self.hosts.index(host)}"

    def cut(self, host: Namespace) -> None:
        """Drop all that a host sends and is sent, from now on; nobody is told."""
        with self.hub.inside():
            ip(f"link set {self._port(host)} nomaster")

    def delay(self, host: Namespace, seconds: float) -> None:
        """Let every packet from and to a host take this time longer.

        In user space, because not every kernel has netem.
        """
        near, far, aside = (f"{kind}{self.hosts.index(host)}" for kind in ("near", "far", "aside"))
        with self.hub.inside():
            line = subprocess.Popen(
                [sys.executable, str(DELAY_LINE), near, far, str(seconds)], stdout=subprocess.PIPE, text=True
            )
            self._lines[host] = line
            assert line.stdout.readline() == "ready\n"
            ip(f"link add {aside} type bridge", f"link set {aside} up")
            ip(f"link set {near} master hosts up", f"link set {far} master {aside} up")
            ip(f"link set {self._port(host)} master {aside}")

    def heal(self, host: Namespace) -> None:
        """Undo `cut` and `delay`."""
        with self.hub.inside():
            ip(f"link set {self._port(host)} master hosts")
            if line := self._lines.pop(host, None):
                _end(line)
                ip(f"link del aside{self.hosts.index(host)}")

    def close(self) -> None:
        for line in self._lines.values():
            _end(line)
        for namespace in (self.hub, *self.hosts):
            namespace.close()


def _end(line: subprocess.Popen) -> None:
    line.terminate()
    line.wait(PATIENCE)
    line.stdout.close()


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make a network of hosts."""
    made = Network(count)
    try:
        yield made
    finally:
        made.close()


def ip(*commands: str) -> None:
    """Run commands of iproute2 in the namespace of the thread."""
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"


def missing() -> str:
    """Return the reason for which there can be no such network here, or "" if there can."""
    try:
        with network(1) as probe:
            probe.delay(probe.hosts[0], 0)
    except (OSError, AssertionError) as error:
        return f"network namespaces are not available: {error}"
    return ""


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
