"""A real nginx with the files of deploy/nginx, installed as its README says, below a directory of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from activation import start_activated
from service import PATIENCE, ROOT, Service, free_port

DEPLOY = ROOT / "deploy" / "nginx"
PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
# Debian's own files, which include ours from conf.d.
DEBIAN = Path("/etc/nginx")
# Shell functions: `sleep` of a README waits until the workers from before the last call of nginx, a reload, are gone.
WAITING = """
old=
nginx() {
    [ ! -e /run/nginx.pid ] || old=$(cat /proc/$(cat /run/nginx.pid)/task/*/children)
    command nginx "$@"
}
sleep() {
    for pid in $old; do
        while [ -e /proc/$pid ]; do command sleep 0.05; done
    done
}
"""
# Debian's `worker_processes auto`.
WORKERS = os.sysconf("SC_NPROCESSORS_ONLN")


class Nginx(Service):
    """A running nginx; `port` is for clients, `operators` is the same nginx at the operators' address."""

    operators: Service
    directory: Path

    def reload(self) -> None:
        """Reload the files, and wait until the previous workers are gone."""
        before = set(self.workers())
        self.signal(signal.SIGHUP)
        self.wait_for(lambda: len(after := set(self.workers())) == WORKERS and not before & after)


def install(directory: Path, sockets: Path, *variants: str, **replaced: str) -> tuple[int, int]:
    """Copy Debian's and our files and link variants as the README does; return the ports of clients and operators.

    Only paths, ports and the texts in `replaced` differ from the originals.
    """
    for name in ("conf.d", "log", "temp", "ovms_rest/enabled"):
        (directory / name).mkdir(parents=True)
    shutil.copytree(DEPLOY / "ovms_rest", directory / "ovms_rest", dirs_exist_ok=True)
    shutil.copy(DEPLOY / "ovms_rest.conf", directory / "conf.d")
    for name in ("mime.types", "nginx.conf"):
        shutil.copy(DEBIAN / name, directory)
    for variant in variants:
        files = [file for kind in ("http", "server") for file in directory.glob(f"ovms_rest/{variant}.{kind}.conf")]
        assert files, f"{variant} is not a variant"
        for file in files:
            (directory / "ovms_rest" / "enabled" / file.name).symlink_to(f"../{file.name}")
    ports = free_port(), free_port()
    paths = {
        "/run/ovms_rest/": f"{sockets}/",
        "listen [::]": "#listen [::]",  # not every test system has IPv6
        "listen 80 ": f"listen 127.0.0.1:{ports[0]} ",
        "listen 443 ": f"listen 127.0.0.1:{ports[0]} ",
        "listen 127.0.0.1:9000;": f"listen 127.0.0.1:{ports[1]};",
        **replaced,
    }
    found = set()
    for file in (directory / "conf.d" / "ovms_rest.conf", *directory.glob("ovms_rest/*.conf")):
        found |= {text for text in paths if text in file.read_text()}
        _replace(file, paths)
    assert found == set(paths)
    _replace(
        directory / "nginx.conf",
        {
            "user www-data;": "user root;" if os.geteuid() == 0 else "",  # with access to the directory
            "include /etc/nginx/modules-enabled/*.conf;": "",
            "/etc/nginx/": f"{directory}/",
            "/run/nginx.pid": f"{directory}/nginx.pid",
            "/var/log/nginx/": f"{directory}/log/",
        },
    )
    temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (directory / "conf.d" / "temporary.conf").write_text(
        "".join(f"{name}_temp_path {directory}/temp/{name};\n" for name in temporary)
    )
    return ports


def _replace(file: Path, texts: dict[str, str]) -> None:
    content = file.read_text()
    for old, new in texts.items():
        content = content.replace(old, new)
    file.write_text(content)


@contextlib.contextmanager
def run(directory: Path, sockets: Path, *variants: str, **replaced: str) -> Iterator[Nginx]:
    """Install the files and run nginx."""
    with start(directory, *install(directory, sockets, *variants, **replaced)) as nginx:
        yield nginx


def inheriting(count: int) -> dict[str, str]:
    """Return the environment in which nginx takes the descriptors from 3 on for its listening sockets."""
    numbers = "".join(f"{3 + at};" for at in range(count))
    return {**os.environ, "NGINX": numbers} if count else dict(os.environ)


@contextlib.contextmanager
def start(
    directory: Path,
    port: int,
    operator_port: int,
    sockets: Sequence[socket.socket] = (),
    prefix: Sequence[str] = (),
    workers: int = WORKERS,
) -> Iterator[Nginx]:
    """Check the installed files and run nginx.

    With `sockets` nginx uses these listening sockets, as those of the socket unit of deploy/nginx; `prefix` is a
    command that runs another in its own process; nginx.conf asks for so many `workers`.
    """
    command = [*prefix, str(PROGRAM), "-p", f"{directory}/", "-c", f"{directory}/nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr, checked.stderr
    for sock in sockets:
        sock.setblocking(False)  # NonBlocking=true of the unit
    process = start_activated(
        [*command, "-g", "daemon off;"],
        sockets,
        env=inheriting(len(sockets)),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    nginx = Nginx(process, directory / "log" / "error.log")
    nginx.directory, nginx.port = directory, port
    nginx.operators = Service(process, directory / "log" / "error.log")
    nginx.operators.port = operator_port
    try:

        def is_open():
            assert process.poll() is None, nginx.log
            with contextlib.suppress(ConnectionRefusedError):
                nginx.operators.connect().close()
                return len(nginx.workers()) == workers

        nginx.wait_for(is_open)
        yield nginx
    finally:
        process.terminate()
        process.wait(PATIENCE)
