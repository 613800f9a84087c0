"""What differs between hosts: a small disk, another user, a clock of its own."""

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from node_cases import COMPILER


@dataclass(frozen=True)
class Setup:
    """The surroundings of a host, by its directory: commands in front of the service and nginx, and settings."""

    missing: Callable[[], str] = str  # the reason why it cannot be set up here, "" if it can
    prefix: Callable[[Path], Sequence[str]] = lambda directory: ()  # of both
    service_prefix: Callable[[Path], Sequence[str]] = lambda directory: ()
    variables: Callable[[Path], dict[str, str]] = lambda directory: {}


PLAIN = Setup()

# A disk of its own for the access log, the log and the cache; only the service sees it.
SMALL_DISK_MIB = 16


def small_disk(directory: Path) -> Path:
    """Return the directory where the service has its small disk."""
    return directory / "disk"


def _in_own_mounts(directory: Path) -> list[str]:
    small_disk(directory).mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={SMALL_DISK_MIB}m tmpfs {small_disk(directory)} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def _mounts_missing() -> str:
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True, check=False
    )
    return f"no mounts in a namespace of its own: {probe.stderr.strip()}" if probe.returncode else ""


SMALL_DISK = Setup(
    _mounts_missing,
    service_prefix=_in_own_mounts,
    variables=lambda directory: {
        "OVMS_REST_ACCESS_LOG": "json",
        "OVMS_REST_ACCESS_LOG_FILE": str(small_disk(directory) / "access.log"),
        "OVMS_REST_CACHE_DIR": str(small_disk(directory) / "cache"),
        "GUNICORN_CMD_ARGS": f"--error-logfile {small_disk(directory)}/error.log",
    },
)

# A user who exists nowhere else: the system counts the processes of a user.
USER = 54_322


def _as_user(directory: Path) -> list[str]:
    rights = "+dac_override"  # files of root, wherever they lie
    return ["setpriv", "--reuid", str(USER), "--clear-groups", "--inh-caps", rights, "--ambient-caps", rights]


UNPRIVILEGED = Setup(
    lambda: "needs root, to run the service as a user of its own" if os.geteuid() else "",
    service_prefix=_as_user,
)

_CLOCK = struct.Struct("=q")


class Clock:
    """The clock of the service and of nginx on a host with the setup MOVED_CLOCK: its offset in seconds."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"

    @property
    def offset(self) -> int:
        """The offset from this process's clock."""
        return int(_CLOCK.unpack(self._file.read_bytes())[0])

    def move(self, offset: int) -> None:
        """Let the clock jump."""
        with self._file.open("r+b" if self._file.exists() else "wb", buffering=0) as file:
            file.write(_CLOCK.pack(offset))


def _with_clock(directory: Path) -> list[str]:
    library = directory / "clock.so"
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        subprocess.run([str(COMPILER), "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        Clock(directory).move(0)
    return ["env", f"LD_PRELOAD={library}", f"CLOCK_FILE={directory}/clock"]


MOVED_CLOCK = Setup(lambda: "" if COMPILER else "needs a C compiler", _with_clock)
