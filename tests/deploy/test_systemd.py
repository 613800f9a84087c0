"""The units of deploy/systemd, checked by systemd's tools and run by a real systemd, and the notifications to it."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import textwrap
import time
import types
from dataclasses import fields
from pathlib import Path

import pytest
import systemd_host
from activation import listening, start_activated
from gunicorn.config import Config
from service import PATIENCE, ROOT, environment, receive, repeating, run_to_end, serve, wait_for, write_config

from ovms_rest.arbiter.notifying import is_responsive
from ovms_rest.settings import PREFIX, Settings
from ovms_rest.shared_memory.table import WorkerTable
from ovms_rest.worker.heartbeat import Heartbeat

DEPLOY = ROOT / "deploy" / "systemd"
UNITS = ["ovms_rest.service", "ovms_rest.socket", "ovms_rest@.service", "ovms_rest@.socket"]
README = (DEPLOY / "README.md").read_text()
DIGIT = (ROOT / "ovms_rest" / "demo" / "samples" / "digit-7.json").read_bytes()

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def directives(name, section="Service"):
    """Return the directives of a section in order."""
    text = re.search(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", (DEPLOY / name).read_text(), re.MULTILINE | re.DOTALL)[1]
    return [tuple(line.split("=", 1)) for line in text.splitlines() if line and not line.startswith("#")]


def seconds(value):
    return sum(
        float(number) * {"": 1, "s": 1, "min": 60, "h": 3600}[unit]
        for number, unit in re.findall(r"(\d+)([a-z]*)", value)
    )


def request(path, method="GET", target="/v2/health/live", body=b""):
    """Send a request to a unix socket or a port of this host; return the response."""
    with socket.socket(socket.AF_INET if isinstance(path, int) else socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", path) if isinstance(path, int) else str(path))
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return receive(connection, method)


def infer(path):
    return request(path, "POST", "/v2/models/digits/infer", DIGIT)


def infers(path):
    answer = infer(path)
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == [7]


@contextlib.contextmanager
def clients(path, control):
    """Infer and probe again and again, each time on a new connection; yield both counts. No request may fail."""
    counts = [0, 0]

    def count(index, ask):
        assert ask().status == 200
        counts[index] += 1
        time.sleep(0.01)

    with (
        repeating(lambda: count(0, lambda: infer(path)), threads=1),
        repeating(lambda: count(1, lambda: request(control)), threads=1),
    ):
        yield counts


# --- The files


def analyze(*arguments, **variables):
    return subprocess.run(
        ["systemd-analyze", *arguments], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


@needs_analyze
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_no_fault_in_a_unit(tmp_path, unit):
    for name in UNITS:
        text = (DEPLOY / name).read_text()
        for program in ("/opt/ovms_rest/bin/gunicorn", "/usr/bin/curl"):  # which may be missing here
            text = text.replace(program, "/bin/true")
        (tmp_path / name).write_text(text)
    for drop_in in DEPLOY.glob("*.d"):
        shutil.copytree(drop_in, tmp_path / drop_in.name)
    unit = tmp_path / unit.replace("@.", "@0.")
    done = analyze("verify", "--man=no", str(unit), SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    faults = [line for line in done.stderr.splitlines() if "ovms_rest" in line]
    assert (done.returncode, faults) == (0, [])


@needs_analyze
@pytest.mark.parametrize("unit", ["ovms_rest.service", "ovms_rest@.service"])
def test_exposure_of_a_service_is_at_most_two(unit):
    done = analyze("security", "--offline=true", "--threshold=20", "--no-pager", str(DEPLOY / unit))
    exposure = float(re.search(r"Overall exposure level .*: ([\d.]+) ", done.stdout)[1])
    assert (done.returncode, exposure <= 2.0) == (0, True), done.stdout
    assert f"gives an exposure of {exposure} " in README


def test_environment_file_has_every_setting_with_its_default():
    entries = re.findall(r"((?:^# .*\n)+)^#(\w+)=(.*)$", (DEPLOY / "environment").read_text(), re.MULTILINE)
    meanings = {name: " ".join(re.sub("^# ", "", comment, flags=re.MULTILINE).split()) for comment, name, _ in entries}
    defaults = {name: default for _, name, default in entries if name.startswith(PREFIX)}
    expected = {PREFIX + field.name.upper(): field for field in fields(Settings)}
    assert list(defaults) == list(expected)
    for name, field in expected.items():
        default = field.default
        if isinstance(default, Path):
            default = ""  # the demo's
        assert defaults[name] == (str(default).lower() if isinstance(default, bool) else str(default)), name
        meaning = field.metadata["meaning"]
        assert meanings[name].startswith(meaning[0].upper() + meaning[1:] + "."), textwrap.fill(meaning, 118)
    text = (DEPLOY / "environment").read_text()
    assert not re.search("^[^#\n]", text, re.MULTILINE)


def test_backlog_of_the_sockets_is_gunicorns():
    assert dict(directives("ovms_rest.socket", "Socket"))["Backlog"] == str(Config().backlog)


def test_timeouts_of_the_unit_fit_those_of_the_service():
    service, defaults = dict(directives("ovms_rest.service")), Settings()
    assert seconds(service["TimeoutStopSec"]) >= Config().graceful_timeout + 10
    assert seconds(service["WatchdogSec"]) >= 2 * defaults.load_timeout_seconds
    assert seconds(service["TimeoutStartSec"]) >= 4 * defaults.load_timeout_seconds


@pytest.mark.parametrize(("kind", "section"), [("service", "Service"), ("socket", "Socket")])
def test_units_of_a_numa_node_differ_only_in_their_addresses(kind, section):
    template = [(name, value.replace("%i/", "")) for name, value in directives(f"ovms_rest@.{kind}", section)]
    assert template == directives(f"ovms_rest.{kind}", section)


# --- Notifications


@pytest.fixture
def manager(tmp_path):
    """The socket of a service manager for notifications."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE)
        yield sock


def messages(manager):
    """Return the notifications received so far."""
    found = []
    while select.select([manager], [], [], 0)[0]:
        found.append(manager.recv(4096).decode().splitlines())
    return found


def next_message(manager):
    """Return the next notification that is not the watchdog's."""
    while (message := manager.recv(4096).decode()) == "WATCHDOG=1":
        pass
    return message


@pytest.fixture
def gate(tmp_path):
    """A gunicorn config file whose workers start only while the file `open` exists."""
    (tmp_path / "conf.py").write_text(
        textwrap.dedent(
            f"""
            import os, time
            from ovms_rest.arbiter import hooks
            from ovms_rest.arbiter.gunicorn_settings import *

            def post_worker_init(worker):
                while not os.path.exists({str(tmp_path / "open")!r}):
                    time.sleep(0.02)
                hooks.post_worker_init(worker)
            """
        )
    )
    return tmp_path / "open"


def test_start_and_reload_report_ready_when_the_workers_serve(tmp_path, manager, gate):
    variables = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
    variables["OVMS_REST_LOAD_TIMEOUT_SECONDS"] = "30"
    with serve(tmp_path, "-c", str(tmp_path / "conf.py"), "-w", "2", **variables) as service:
        service.wait_for(lambda: service.log.count("Booting worker") == 2)
        assert messages(manager) == []
        gate.touch()
        assert next_message(manager) == "READY=1\nWATCHDOG_USEC=60000000"
        assert next_message(manager) == "STATUS=2 of 2 models and pipelines serve"
        assert infers(service.port)
        service.wait_for_workers(2)
        before = service.workers()
        assert manager.recv(4096) == b"WATCHDOG=1"

        gate.unlink()
        service.signal(signal.SIGHUP)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", next_message(manager))
        service.wait_for(lambda: service.log.count("Booting worker") == 4)
        assert ["READY=1"] not in messages(manager)
        gate.touch()
        assert next_message(manager) == "READY=1"
        service.wait_for(lambda: not set(before) & set(service.workers()))
        assert infers(service.port)

        # A reload that fails ends with READY=1 too: the previous models still serve.
        (tmp_path / "conf.py").write_text("workers = ")
        service.signal(signal.SIGHUP)
        assert next_message(manager).startswith("RELOADING=1\n")
        assert next_message(manager).startswith("READY=1")
        assert "keeps its previous settings" in service.log
        assert infers(service.port)

        service.signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0
        assert next_message(manager) == "STOPPING=1"
        assert messages(manager) == []


def test_service_without_ready_workers_is_never_ready(tmp_path, manager):
    variables = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "OVMS_REST_CONFIG": str(write_config(tmp_path))}
    conf = tmp_path / "conf.py"
    conf.write_text("from ovms_rest.arbiter.gunicorn_settings import *\ndef post_worker_init(worker): raise OSError\n")
    done = run_to_end(tmp_path, "-c", str(conf), "-w", "1", **variables)
    assert (done.returncode, messages(manager)) == (3, [["STOPPING=1"]])


def test_service_with_fewer_workers_than_wanted_is_ready(tmp_path, manager):
    """Otherwise systemd would end it after TimeoutStartSec."""
    conf = tmp_path / "conf.py"
    conf.write_text(
        textwrap.dedent(
            """
            import time

            from ovms_rest.arbiter import hooks
            from ovms_rest.arbiter.gunicorn_settings import *

            def post_worker_init(worker):
                if worker.row.index == 1:
                    while not worker.wsgi.managed.table.streams():  # one that fails while none is ready ends the start
                        time.sleep(0.01)
                    raise OSError
                hooks.post_worker_init(worker)
            """
        )
    )
    with serve(tmp_path, "-c", str(conf), "-w", "2", NOTIFY_SOCKET=str(tmp_path / "notify")) as service:
        assert next_message(manager) == "READY=1"
        assert next_message(manager) == "STATUS=2 of 2 models and pipelines serve"
        assert infers(service.port)


def test_only_a_live_worker_that_infers_keeps_the_watchdog_quiet():
    row = WorkerTable(1, 1).take()
    heartbeat = Heartbeat(types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid()))
    worker = types.SimpleNamespace(row=row, tmp=heartbeat, is_control=False)
    assert not is_responsive(worker, 30)
    row.set_ready()
    assert is_responsive(worker, 30)
    worker.is_control = True
    assert not is_responsive(worker, 30)
    worker.is_control = False
    stale = time.monotonic() - 31
    os.utime(heartbeat.fileno(), (stale, stale))
    assert not is_responsive(worker, 30)
    assert is_responsive(worker, 0)  # gunicorn's timeout is off
    heartbeat.close()


# --- Sockets that systemd opens


@contextlib.contextmanager
def activated(directory, sockets, **variables):
    """Run the service with sockets as descriptors from 3 on, as systemd does; end it by SIGTERM."""
    with (directory / "log").open("ab") as log:
        process = start_activated(
            ["gunicorn", "-w", "2"],
            sockets,
            cwd=ROOT,
            env=environment(directory, **variables),
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0, (directory / "log").read_text()


def test_restart_refuses_no_connection_and_keeps_the_control_address_apart(tmp_path):
    """Here the control address comes first, in the socket unit last."""
    data, control = tmp_path / "data.sock", tmp_path / "control.sock"
    with listening(control, data) as (first, second):
        variables = {"OVMS_REST_CONTROL_BIND": f"unix:{tmp_path}//control.sock"}
        with contextlib.ExitStack() as stack:
            with activated(tmp_path, (first, second), **variables):
                assert infers(data)
                assert infer(control).json() == {"error": "inferences are not served on the control address"}
                counts = stack.enter_context(clients(data, control))
            before = list(counts)
            with activated(tmp_path, (first, second), **variables):
                wait_for(
                    lambda: all(count > old + 20 for count, old in zip(counts, before, strict=True)),
                    (tmp_path / "log").read_text,
                )
                stack.close()
        assert data.is_socket()
        assert control.is_socket()


# --- A real systemd


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host on which the commands of the README were run, except those that install the package."""
    if reason := systemd_host.missing():
        pytest.skip(reason)
    commands = re.search(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    commands = commands.splitlines()
    assert len(commands) <= 10
    with systemd_host.booted(tmp_path_factory.mktemp("host")) as host:
        for command in commands:
            if not re.match("apt-get |python3 -m venv |/opt/ovms_rest/bin/pip ", command):
                host.output = host.run(command)
        yield host


def children_of(host, pid):
    """Return the process ids, on the host, of a process's children."""
    return host.run(f"cat /proc/{pid}/task/{pid}/children").split()


def pids(host, unit="ovms_rest"):
    """Return the process ids of the workers."""
    return children_of(host, host.show(unit, "MainPID"))


def test_commands_of_the_readme_end_with_an_inference(host):
    assert json.loads(host.output)["outputs"][0]["data"] == [7]
    assert host.show("ovms_rest", "StatusText") == "2 of 2 models and pipelines serve"


def test_service_runs_as_its_own_user_without_capabilities_network_or_writable_root(host):
    workers = pids(host)
    assert len(workers) >= 2
    for pid in [host.show("ovms_rest", "MainPID"), *workers]:
        status = dict(re.findall(r"^(\w+):\t(.*)$", host.run(f"cat /proc/{pid}/status"), re.MULTILINE))
        assert int(status["Uid"].split()[0]) >= 61184  # the range of dynamic users
        assert (status["CapEff"], status["CapBnd"]) == ("0" * 16, "0" * 16)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert len(host.run(f"cat /proc/{pid}/net/dev").splitlines()) == 3  # two for the table's head, and `lo`
        roots = [line.split() for line in host.run(f"cat /proc/{pid}/mountinfo").splitlines()]
        assert [mount[5].split(",")[0] for mount in roots if mount[4] == "/"] == ["ro"]
        assert host.run(f"ls /proc/{pid}/root/root /proc/{pid}/root/home 2>&1 | grep -v :") in ("", "\n")


def test_compiled_models_are_kept_for_the_next_start(host):
    assert ".blob" in host.run("ls /var/cache/ovms_rest")


def test_killed_worker_is_replaced(host):
    before = pids(host)
    host.run(f"kill -KILL {before[0]}")
    wait_for(lambda: len(now := pids(host)) == len(before) and before[0] not in now, host.journal)
    assert host.show("ovms_rest", "NRestarts") == "0"
    assert infers(host.path("/run/ovms_rest/data.sock"))


def test_restarts_and_reloads_refuse_no_connection_and_a_failed_reload_says_why(host):
    data, control = host.path("/run/ovms_rest/data.sock"), host.path("/run/ovms_rest/control.sock")
    config, models = host.path("/etc/ovms_rest/config.json"), "/srv/ovms_rest/ovms_rest/demo"
    good = {"model_config_list": [{"config": {"name": "digits", "base_path": f"{models}/digits"}}]}
    config.write_text(json.dumps(good))
    host.run("sed -i 's|^#OVMS_REST_CONFIG=.*|OVMS_REST_CONFIG=/etc/ovms_rest/config.json|' /etc/ovms_rest/environment")
    with clients(data, control) as counts:
        host.run("systemctl restart ovms_rest")
        assert host.show("ovms_rest", "StatusText") == "1 of 1 models and pipelines serve"
        before = pids(host)
        host.run("systemctl reload ovms_rest")  # returns when the new workers serve; the others may still end
        wait_for(lambda: not set(before) & set(pids(host)), host.journal)
        assert host.show("ovms_rest", "ActiveState") == "active"
        config.write_text("{")
        host.run("systemctl reload ovms_rest", status=1)
        assert "config.json" in (journal := host.journal())
        assert '{"error":"' in journal
        assert host.show("ovms_rest", "ActiveState") == "active"
        assert infers(data)
        good["model_config_list"].append({"config": {"name": "again", "base_path": f"{models}/digits"}})
        config.write_text(json.dumps(good))
        host.run("systemctl reload ovms_rest")
        assert request(data, target="/v2/models/again/ready").status == 200
        wait_for(lambda: host.show("ovms_rest", "StatusText") == "2 of 2 models and pipelines serve", host.journal)
        assert min(counts) > 20


def test_upgrade_by_sigusr2_makes_the_second_arbiter_the_main_process(host):
    data, control = host.path("/run/ovms_rest/data.sock"), host.path("/run/ovms_rest/control.sock")
    first = host.show("ovms_rest", "MainPID")
    with clients(data, control):
        workers = pids(host)
        host.run(f"kill -USR2 {first}")
        wait_for(lambda: len(pids(host)) > len(workers), host.journal)
        (second,) = set(pids(host)) - set(workers)
        wait_for(lambda: len(children_of(host, second)) == len(workers), host.journal)
        wait_for(lambda: "[eventpoll]" in host.run(f"ls -l /proc/{children_of(host, second)[-1]}/fd"), host.journal)
        host.run(f"kill -TERM {first}")
        wait_for(lambda: host.show("ovms_rest", "MainPID") == second, host.journal)
        wait_for(lambda: not Path(f"/proc/{host.pid}/root/proc/{first}").exists(), host.journal)
        host.run("systemctl reload ovms_rest")
        assert infers(data)
        assert infer(control).json() == {"error": "inferences are not served on the control address"}
    assert (host.show("ovms_rest", "ActiveState"), host.show("ovms_rest", "NRestarts")) == ("active", "0")


def test_service_of_a_numa_node_has_its_cores_and_memory(host):
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    *commands, enable = blocks[1].splitlines()
    for command in commands:
        host.run(command)
    host.run(enable.replace(" ovms_rest@1.socket ovms_rest@1.service", ""))  # hosts may have only one node
    assert infers(host.path("/run/ovms_rest/0/data.sock"))
    assert request(host.path("/run/ovms_rest/0/control.sock")).status == 200
    cores = host.run("cat /sys/devices/system/node/node0/cpulist")
    for pid in pids(host, "ovms_rest@0"):
        assert re.search(r"^Cpus_allowed_list:\t(.*\n)", host.run(f"cat /proc/{pid}/status"), re.MULTILINE)[1] == cores
        assert " bind:0 " in host.run(f"cat /proc/{pid}/numa_maps")
    host.run("systemctl start ovms_rest@7", status=1)
    host.run("systemctl stop ovms_rest@0 ovms_rest@0.socket")
    assert host.show("ovms_rest@0", "Result") == "success"
