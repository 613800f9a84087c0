"""A Debian host with a real systemd, in namespaces of its own, on top of this host's files, which it does not change.

Its root is an overlay of this one whose upper layer is in memory; it has its own processes, mounts, network and control
groups. Only systemd's journal and the units that a test starts run there.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from service import PATIENCE, ROOT, wait_for

SYSTEMD = Path("/usr/lib/systemd/systemd")
PYTHON = Path(f"/usr/bin/python3.{sys.version_info.minor}")
CHECKOUT = "/srv/ovms_rest"

# $1: a directory for mounts, $2: that of the package alone, $3: the installed packages, $4: Python, $5: systemd,
# $6: the checkout.
_BOOT = r"""
set -eu
scratch=$1
mount -t tmpfs -o mode=755 tmpfs $scratch
root=$scratch/root
mkdir $scratch/upper $scratch/work $root
mount -t overlay overlay -o lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work $root
mount -t proc proc $root/proc
mount --bind -o ro $root/proc/sys $root/proc/sys
mount -t sysfs -o ro sysfs $root/sys
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/run
mount -t tmpfs -o mode=1777 tmpfs $root/tmp
mount -t tmpfs -o mode=755 tmpfs $root/dev
for device in null zero full random urandom tty; do
    touch $root/dev/$device
    mount --bind /dev/$device $root/dev/$device
done
mkdir $root/dev/pts $root/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts $root/dev/pts
ln -s pts/ptmx $root/dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs $root/dev/shm
ln -s /proc/self/fd $root/dev/fd
touch $root/dev/console
system=$root/usr/lib/systemd/system
rm -rf $root/etc/systemd/system $system/*.wants $root/etc/ovms_rest $root/opt/ovms_rest $root/var/cache/private
mkdir -p $root/etc/systemd/system $system/sockets.target.wants $root/old
ln -s ../systemd-journald.socket $system/sockets.target.wants
packages=$root/opt/ovms_rest/lib/$(basename "$(dirname "$3")")/site-packages
mkdir -p $root/opt/ovms_rest/bin $packages
mount -t overlay overlay -o lowerdir=$2:$3 $packages
ln -s $4 $root/opt/ovms_rest/bin/python
echo "home = $(dirname $4)" >$root/opt/ovms_rest/pyvenv.cfg
printf '#!/opt/ovms_rest/bin/python\nfrom gunicorn.app.wsgiapp import run\nrun()\n' >$root/opt/ovms_rest/bin/gunicorn
chmod 755 $root/opt/ovms_rest/bin/gunicorn
mkdir -p $root/srv/ovms_rest
mount --bind -o ro $6 $root/srv/ovms_rest
cd $root
pivot_root . old
umount -l /old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=other $5 --system --unit=multi-user.target </dev/null
"""

# The minimum that such a host needs.
_PROBE = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mount -t proc proc /mnt/root/proc
mount -t sysfs -o ro sysfs /mnt/root/sys
mount -t cgroup2 cgroup2 /mnt/root/sys/fs/cgroup
mount -t devpts -o newinstance,ptmxmode=0666 devpts /mnt/root/dev/pts
"""


class Host:
    """A booted host; `pid` is the process id of its systemd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def start(self, command: str) -> subprocess.Popen:
        """Start a shell command in the checkout as root of the host."""
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--root"]
        return subprocess.Popen(
            ["nsenter", "-t", str(self.pid), *namespaces, "sh", "-c", f"cd {CHECKOUT} && {command}"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, status: int = 0) -> str:
        """Run a shell command, check its exit status, and return its output."""
        process = self.start(command)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, (
            f"{command}: {output}\n{self.journal() if 'journalctl' not in command else ''}"
        )
        return output

    def show(self, unit: str, name: str) -> str:
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    def journal(self) -> str:
        return self.run("journalctl --no-pager -o cat")

    def path(self, path: str) -> Path:
        """Return this host's path of a file there."""
        return Path(f"/proc/{self.pid}/root{path}")


def missing() -> str:
    """Return the reason for which there can be no such host here, or "" if there can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("unshare", "nsenter", "pivot_root", "curl", "systemctl", "journalctl", str(SYSTEMD), str(PYTHON)):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if _cgroups() is None:
        return "there is no control group hierarchy of version 2"
    unshare = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup"]
    probe = subprocess.run([*unshare, "sh", "-c", _PROBE], capture_output=True, text=True, check=False)
    return f"namespaces, or mounts in them, are not available: {probe.stderr.strip()}" if probe.returncode else ""


def _cgroups() -> Path | None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(path) for _, path, kind, *_ in mounts if kind == "cgroup2" and os.access(path, os.W_OK)), None)


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[Host]:
    """Boot a host with the package in /opt/ovms_rest; kill all its processes at the end."""
    import gunicorn

    package, scratch = directory / "package", directory / "mounts"
    scratch.mkdir()
    shutil.copytree(ROOT / "ovms_rest", package / "ovms_rest", ignore=shutil.ignore_patterns("__pycache__"))
    installed = Path(gunicorn.__file__).parent.parent
    group = _cgroups() / f"ovms_rest-test-{os.getpid()}"
    group.mkdir()
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--net", "--cgroup"]
    arguments = [str(path) for path in (scratch, package, installed, PYTHON, SYSTEMD, ROOT)]
    with (directory / "boot.log").open("wb") as log:
        enter = ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"]
        process = subprocess.Popen([*enter, *unshare, "sh", "-c", _BOOT, "boot", *arguments], stdout=log, stderr=log)
    try:
        yield _wait_until_booted(process, directory / "boot.log")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        _remove_group(group)


def _wait_until_booted(process: subprocess.Popen, log: Path) -> Host:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def find() -> Host | None:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    host = Host(int(pid))
                    state = host.start("systemctl is-system-running").communicate(timeout=PATIENCE)[0]
                    if state.strip() in ("running", "degraded"):
                        return host
        return None

    return wait_for(find, log.read_text)


def _remove_group(group: Path) -> None:
    """Remove a control group and those below it as soon as their processes are gone."""

    def is_removed(path: Path) -> bool:
        with contextlib.suppress(OSError):  # it still has processes that are being killed
            path.rmdir()
        return not path.exists()

    for path in [*sorted(group.rglob("*/"), reverse=True), group]:
        wait_for(lambda path=path: is_removed(path), lambda path=path: f"processes are left in {path}")
