"""What the system knows of the processes and sockets of a service."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from service import Service, open_files, wait_for_end

_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Make this process adopt orphans, which it has to wait for: the init process of a container may not reap them."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def wait_for_exit(pid: int, seconds: float = 20) -> int:
    """Wait for a child, or an adopted orphan, and return its exit code; kill it after a timeout, and fail."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"process {pid} did not end in {seconds} s")
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def spent(pid: int) -> float:
    """Return the CPU time of a process in seconds, from the scheduler's nanoseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def memory(pid: int, kind: str) -> int:
    """Return a row of a process's status in bytes, such as VmRSS or its peak, VmHWM."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{kind}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024


def reset_peak(pid: int) -> None:
    """Let the peak of a process's memory begin at its present memory (proc(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def wait_until_inferring(service: Service) -> None:
    """Wait until the only worker has worked for longer than any request that does not infer."""
    (pid,) = service.workers()
    before = spent(pid)
    service.wait_for(lambda: spent(pid) > before + 0.05)


def replaced(service: Service, before: list[int]) -> bool:
    """Return whether all of these workers have been replaced."""
    now = service.workers()
    return bool(now) and not set(now) & set(before)


class TcpSocket(NamedTuple):
    """A TCP socket of this machine: its ports, state and queues as in /proc/net/tcp, and its name in /proc/PID/fd."""

    local: int
    remote: int
    state: str
    queues: str
    name: str


def tcp_sockets() -> list[TcpSocket]:
    """Return all TCP sockets of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [TcpSocket(int(row[1][-4:], 16), int(row[2][-4:], 16), *row[3:5], f"socket:[{row[9]}]") for row in rows]


def listens(port: int, pid: int) -> bool:
    """Return whether a process has a socket that listens at a port."""
    listening = {found.name for found in tcp_sockets() if found.local == port and found.state == "0A"}
    return not listening.isdisjoint(open_files(pid))


def wait_until_reopened(service: Service, path: Path) -> None:
    """Wait until every worker has a file of this path open."""
    service.wait_for(lambda: all(str(path) in open_files(pid) for pid in service.workers()))


@contextlib.contextmanager
def stopped(service: Service, pid: int) -> Iterator[None]:
    """Keep a process stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        service.wait_for(lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def limited(service: Service, name: str, value: int, prefix: Sequence[str] = ()) -> Iterator[None]:
    """Lower the limit `nofile` or `nproc` of the arbiter for a while; `prefix` runs a command as its user."""
    command = [*prefix, "prlimit", "--pid", str(service.process.pid)]
    title = {"nofile": "Max open files", "nproc": "Max processes"}[name]
    (limits,) = re.findall(rf"{title} +(\w+)", Path(f"/proc/{service.process.pid}/limits").read_text())
    subprocess.run([*command, f"--{name}={value}:"], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, f"--{name}={limits}:"], check=True)


@contextlib.contextmanager
def upgraded(service: Service, processes: int = 2) -> Iterator[int]:
    """Start a second arbiter by SIGUSR2 and wait until it has this number of processes; yield its pid, and end it.

    It may have been ended before.
    """
    before = service.log.count("Listening at: ")
    service.signal(signal.SIGUSR2)
    pid = 0
    try:
        listening = service.wait_for(lambda: re.findall(r"Listening at: \S+ \((\d+)\)", service.log)[before:])
        pid = int(listening[0])
        service.wait_for(lambda: len(children(pid)) == processes)
        yield pid
    finally:
        if pid:
            end(pid)
            wait_for_end(pid)


def end(pid: int) -> None:
    """Send SIGTERM to a process if it exists; wait for it if it is a child of this one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):  # it is another process's child, or that has waited for it
        os.waitpid(pid, 0)


def children(pid: int) -> list[str]:
    """Return the process ids of a process's children."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
