"""The socket unit of nginx: systemd finds no fault in it, and connections wait in its sockets while nginx restarts."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import nginx
import pytest
from activation import listening
from raw_http import LIVE
from service import PATIENCE, receive

SOCKET = nginx.DEPLOY / "nginx.socket"
DROP_IN = nginx.DEPLOY / "nginx.service.d" / "ovms_rest.conf"
DEBIANS = Path("/lib/systemd/system/nginx.service")

needs_nginx = pytest.mark.skipif(nginx.PROGRAM is None, reason="Debian's package nginx is missing")


def addresses(text, pattern):
    """Return addresses in the form of systemd."""
    found = re.findall(pattern, text, re.MULTILINE)
    return {f"0.0.0.0:{address}" if address.isdigit() else address for address in found}


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not DEBIANS.exists(), reason="needs systemd-analyze and Debian's nginx"
)
def test_systemd_finds_no_fault_in_the_units(tmp_path):
    (tmp_path / "nginx.service.d").mkdir()
    shutil.copy(DROP_IN, tmp_path / "nginx.service.d")
    shutil.copy(SOCKET, tmp_path)
    shutil.copy(DEBIANS, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "nginx.service"), str(tmp_path / "nginx.socket")],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "nginx" in line]) == (0, [])


def test_socket_unit_has_the_addresses_of_the_files_and_a_descriptor_for_each():
    listened = addresses(SOCKET.read_text(), r"^ListenStream=(\S+)$")
    files = [file for file in nginx.DEPLOY.rglob("*.conf") if not file.name.startswith(("https", "two_nodes"))]
    configured = set().union(*(addresses(file.read_text(), r"^\s*listen (\S+?)(?:;| )") for file in files))
    assert listened == configured
    numbers = re.search(r"NGINX=([\d;]+)", DROP_IN.read_text())[1]
    assert numbers == "".join(f"{number};" for number in range(3, 3 + len(listened)))


@needs_nginx
def test_connection_made_while_nginx_is_down_is_served_by_the_next_one(tmp_path):
    directory = tmp_path / "nginx"
    ports = nginx.install(directory, tmp_path, "http")
    with listening(*ports) as sockets:
        with nginx.start(directory, *ports, sockets) as first:
            with first.connect() as connection:
                connection.sendall(LIVE)
                assert receive(connection).status == 502  # there is no service
            first.signal(signal.SIGQUIT)
            first.process.wait(PATIENCE)
            waiting = first.connect()
        with waiting:
            waiting.sendall(LIVE)
            with nginx.start(directory, *ports, sockets):
                assert receive(waiting).status == 502
