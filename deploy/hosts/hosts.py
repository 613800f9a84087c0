#!/usr/bin/env python3
"""Hosts behind an nginx balancer: take one out, bring one back, and update a model host by host.

Needs only Python's standard library. The list of hosts is nginx's own, hosts.conf.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

DONE, FAILED, UNCHANGED, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
EPILOG = """exit status:
  0  done
  1  drain: the host gets no requests, but still has some in progress; push: rolled back, every host serves what it did
  2  nothing was changed: wrong arguments, or a host is not ready
  3  push: not rolled back everywhere; the last lines name the hosts
Ctrl-C, SIGTERM and SIGHUP: push rolls back, and ends with 1 or 3; restore marks the host as down again. Its status, and
that of the other commands, is 130."""

SERVER = re.compile(r"^(\s*server\s+)([\w.:\[\]-]+)((?:\s+[\w=.]+)*)(\s*;.*)$", re.MULTILINE)
# nginx waits 360 s for a load on the operators' address (deploy/nginx).
LOAD_SECONDS = 370
CALL_SECONDS = 10
# A host is idle when nothing has happened for this number of looks, one per second.
QUIET_LOOKS = 3


class HostsError(Exception):
    """A fault for which the command ends with a status."""

    def __init__(self, message: str, status: int = UNCHANGED) -> None:
        super().__init__(message)
        self.status = status


# --- The list of hosts


class Host(NamedTuple):
    """A line of hosts.conf: address, parameters."""

    address: str
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the address without the port."""
        return re.sub(r":\d+$", "", self.address)

    @property
    def is_down(self) -> bool:
        return "down" in self.parameters

    @property
    def weight(self) -> int:
        return next((int(item[7:]) for item in self.parameters if item.startswith("weight=")), 1)

    def at(self, weight: int) -> "Host":
        """Return the host, up, with a weight."""
        others = [item for item in self.parameters if item != "down" and not item.startswith("weight=")]
        return Host(self.address, (f"weight={weight}", *others))

    def down(self) -> "Host":
        """Return the host marked as down; its weight stays."""
        return Host(self.address, tuple(dict.fromkeys((*self.parameters, "down"))))


class Balancer:
    """The list of hosts of an nginx, and that nginx."""

    def __init__(self, file: Path, nginx: str) -> None:
        self._file = file
        self._nginx = shlex.split(nginx)

    def hosts(self) -> list[Host]:
        text = re.sub(r"#.*", "", self._read())
        found = [Host(line[2], tuple(line[3].split())) for line in SERVER.finditer(text)]
        if not found:
            raise HostsError(f"{self._file} has no line `server ADDRESS ...;`")
        return found

    def find(self, name: str) -> Host:
        """Return the host with this name or address."""
        found = [host for host in self.hosts() if name in (host.name, host.address)]
        if len(found) != 1:
            names = ", ".join(host.address for host in self.hosts())
            raise HostsError(f"{self._file} has {'no' if not found else 'more than one'} host {name}; it has {names}")
        return found[0]

    def change(self, host: Host) -> None:
        """Write a host's parameters and reload nginx; if nginx refuses the file, put the old one back."""
        before = self._read()
        parameters = " ".join(("", *host.parameters))
        self._write(
            SERVER.sub(
                lambda line: line[1] + line[2] + parameters + line[4] if line[2] == host.address else line[0], before
            )
        )
        try:
            self._run("-t", "-q")
            self._run("-s", "reload")
        except HostsError:
            self._write(before)
            raise

    def _read(self) -> str:
        try:
            return self._file.read_text()
        except OSError as error:
            raise HostsError(f"cannot read the list of hosts: {error}") from error

    def _write(self, text: str) -> None:
        """Replace the file in one step, with its permissions."""
        beside = self._file.with_name(f"{self._file.name}.new")
        try:
            beside.write_text(text)
            beside.chmod(self._file.stat().st_mode)
            os.replace(beside, self._file)
        except OSError as error:
            raise HostsError(f"cannot write the list of hosts: {error}") from error

    def _run(self, *arguments: str) -> None:
        try:
            done = subprocess.run([*self._nginx, *arguments], capture_output=True, text=True, check=False)
        except OSError as error:
            raise HostsError(f"cannot run {self._nginx[0]}: {error}") from error
        if done.returncode:
            raise HostsError(f"{shlex.join([*self._nginx, *arguments])} failed: {done.stderr.strip()}")


# --- The service of a host, at its operators' address


class UnreachableError(Exception):
    """A host does not respond, or its response is cut off or not that of the service."""


class Service:
    """The calls of the service that this program needs."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self._url = f"http://{name}:{port}"

    def readiness(self) -> str:
        """Return "" if every model serves, otherwise the reason."""
        status, text = self._call("GET", "/v2/health/ready")
        return "" if status == 200 else reason(status, text)

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model that serve."""
        status, text = self._call("POST", "/v2/repository/index", {"ready": True})
        if status != 200:
            raise UnreachableError(reason(status, text))
        try:
            return sorted(int(row["version"]) for row in json.loads(text) if row["name"] == model)
        except (ValueError, KeyError, TypeError) as error:
            raise UnreachableError(f"the response is not an index of models: {error!r}") from error

    def load(self, model: str, keys: dict[str, object], versions: Sequence[int]) -> str:
        """Load versions of a model; return "" when all workers serve them, otherwise the reason."""
        policy = {"model_version_policy": {"specific": {"versions": list(versions)}}}
        request = {"parameters": {"config": json.dumps({**keys, **policy})}}
        status, text = self._call("POST", f"/v2/repository/models/{quote(model, safe='')}/load", request, LOAD_SECONDS)
        return "" if status == 200 else reason(status, text)

    def unload(self, model: str) -> str:
        """Unload a model; return "" when no worker serves it, otherwise the reason."""
        status, text = self._call("POST", f"/v2/repository/models/{quote(model, safe='')}/unload", {}, LOAD_SECONDS)
        return "" if status in (200, 404) else reason(status, text)  # 404: the service has no such model

    def work(self) -> tuple[int, int]:
        """Return how many workers have inferences to run, and how many inferences have ended so far."""
        status, text = self._call("GET", "/metrics")
        if status == 404:
            raise HostsError(f"{self.name} serves no metrics; set OVMS_REST_METRICS_ENABLE=true there", FAILED)
        if status != 200:
            raise UnreachableError(reason(status, text))
        return add_up(text, "ovms_rest_worker_busy"), sum(
            add_up(text, f"ovms_requests_{outcome}", rf'method="{method}"')
            for outcome in ("success", "fail")
            for method in ("ModelInfer", "Predict")
        )

    def _call(self, method: str, path: str, body: object = None, seconds: float = CALL_SECONDS) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        try:
            try:
                response = urllib.request.urlopen(request, timeout=seconds)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:  # IncompleteRead is not an OSError
            raise UnreachableError(str(getattr(error, "reason", error))) from error


def add_up(metrics: str, name: str, label: str = "") -> int:
    """Return the sum of a metric over all labels that match."""
    rows = re.findall(rf"^{name}(?:_total)?(\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    return int(sum(float(value) for labels, value in rows if re.search(label, labels)))


def reason(status: int, text: str) -> str:
    """Return the error in a response of the service."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"])
    return f"{status}: {text.strip() or 'no reason given'}"


# --- The commands


def say(host: str, text: str) -> None:
    print(f"{host}: {text}", flush=True)


def status(balancer: Balancer, arguments: argparse.Namespace) -> int:
    """Print a line for each host."""
    for host in balancer.hosts():
        service = Service(host.name, arguments.operators_port)
        try:
            ready = service.readiness()
            busy, ended = service.work()
            text = f"{ready or 'ready'}, {busy} workers busy, {ended} inferences so far"
        except (UnreachableError, HostsError) as error:
            text = f"unknown: {error}"
        say(host.name, f"{'down' if host.is_down else f'weight {host.weight}'}, {text}")
    return DONE


def drain(balancer: Balancer, arguments: argparse.Namespace) -> int:
    """Take a host out of the balancer, and wait until its requests have ended."""
    host = balancer.find(arguments.host)
    if not any(other for other in balancer.hosts() if other != host and not other.is_down):
        raise HostsError(f"{host.name} is the last host that gets requests")
    balancer.change(host.down())
    say(host.name, "gets no new requests")
    service, looks, before = Service(host.name, arguments.operators_port), 0, (-1, -1)
    deadline = time.monotonic() + arguments.timeout
    while looks < QUIET_LOOKS:
        try:
            now = service.work()
        except UnreachableError as error:
            raise HostsError(f"{host.name} does not tell what it is doing: {error}", FAILED) from error
        looks = looks + 1 if now == (0, before[1]) else 0
        before = now
        if time.monotonic() > deadline:
            raise HostsError(
                f"{host.name} still works after {arguments.timeout:g} s: {now[0]} workers are busy", FAILED
            )
        time.sleep(1)
    say(host.name, f"idle after {before[1]} inferences")
    return DONE


def restore(balancer: Balancer, arguments: argparse.Namespace) -> int:
    """Bring a host back: wait until it is ready, then raise its weight in steps."""
    host = balancer.find(arguments.host)
    service = Service(host.name, arguments.operators_port)
    if problem := wait_until_ready(service, arguments.timeout):
        raise HostsError(f"{host.name} is not ready after {arguments.timeout:g} s: {problem}")
    try:
        raise_weight(balancer, host, service, arguments)
    except BaseException:  # also Ctrl-C
        balancer.change(host.down())
        say(host.name, "is marked as down again, with its full weight for the next time")
        raise
    return DONE


def raise_weight(balancer: Balancer, host: Host, service: Service, arguments: argparse.Namespace) -> None:
    """Give a host its weight in steps. Raises HostsError if it is not ready any more."""
    for number, percent in enumerate(arguments.steps):
        if number:
            time.sleep(arguments.pause)
            if problem := wait_until_ready(service, 0):
                raise HostsError(f"{host.name} is not ready any more: {problem}", FAILED)
        weight = max(1, host.weight * percent // 100)
        balancer.change(host.at(weight))
        say(host.name, f"has weight {weight}")


def wait_until_ready(service: Service, seconds: float, model: str = "", versions: Sequence[int] = ()) -> str:
    """Wait until a host is ready, with these versions of a model if one is named; return "", or why not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            problem = service.readiness()
            if not problem and model and (found := service.versions(model)) != [*versions]:
                problem = f"it serves versions of {model}: {listed(found)}; expected: {listed(versions)}"
        except UnreachableError as error:
            problem = str(error)
        if not problem or time.monotonic() >= deadline:
            return problem
        time.sleep(0.2)


def push(balancer: Balancer, arguments: argparse.Namespace) -> int:
    """Update a model host by host; at the first host that does not become ready, or Ctrl-C, roll back all of them."""
    model, version, keys = arguments.model, arguments.version, read_keys(arguments.config, arguments.model)
    left_out = {balancer.find(name).name for name in arguments.without}
    services = [Service(host.name, arguments.operators_port) for host in balancer.hosts() if host.name not in left_out]
    before = {service.name: versions_before(service, model) for service in services}
    changed: list[Service] = []
    try:
        for service in services:
            changed.append(service)
            if problem := update(service, model, keys, version, arguments.timeout):
                say(service.name, f"does not serve version {version}: {problem}")
                break
            say(service.name, f"serves version {version} (before: {listed(before[service.name])})")
        else:
            print(f"all {len(services)} hosts serve version {version} of {model}", end="; ")
            print("write it into the config file of each host", flush=True)
            return DONE
    except BaseException as error:  # also Ctrl-C
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"hosts.py: interrupted ({error!r}), rolling back", file=sys.stderr, flush=True)
    return roll_back(
        changed, lambda service: restore_versions(service, model, keys, before[service.name], arguments.timeout)
    )


def read_keys(config: Path, model: str) -> dict[str, object]:
    """Return the keys of a model in a config file."""
    try:
        models = [item["config"] for item in json.loads(config.read_text())["model_config_list"]]
        found = [keys for keys in models if keys["name"] == model]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostsError(f"cannot read the models in {config}: {error!r}") from error
    if len(found) != 1:
        raise HostsError(f"{config} has {len(found)} models {model}")
    return found[0]


def versions_before(service: Service, model: str) -> list[int]:
    """Return the versions of a model that a host serves, before anything is changed. Raises HostsError."""
    try:
        if problem := service.readiness():
            raise HostsError(f"{service.name} is not ready, nothing was changed: {problem}")
        return service.versions(model)
    except UnreachableError as error:
        raise HostsError(f"{service.name} does not respond, nothing was changed: {error}") from error


def update(service: Service, model: str, keys: dict[str, object], version: int, seconds: float) -> str:
    """Load a version on a host and wait until it is ready with it; return "", or why it is not."""
    try:
        return service.load(model, keys, [version]) or wait_until_ready(service, seconds, model, [version])
    except UnreachableError as error:
        return str(error)


def restore_versions(service: Service, model: str, keys: dict[str, object], versions: list[int], seconds: float) -> str:
    """Have a host serve these versions of a model and no others; return "", or why it does not.

    The call is sent even if the host serves these versions now: a load without a response may still be running, and the
    service makes this change after it.
    """
    try:
        problem = service.load(model, keys, versions) if versions else service.unload(model)
        return problem or wait_until_ready(service, seconds, model, versions)
    except UnreachableError as error:
        return str(error)


def roll_back(services: Sequence[Service], undo: Callable[[Service], str]) -> int:
    """Undo a change on hosts, the last one first; return the exit status. Ctrl-C gives up one host."""
    problems = {}
    for service in reversed(services):
        try:
            problems[service.name] = undo(service)
        except BaseException as error:  # the other hosts are rolled back all the same
            problems[service.name] = repr(error)
    for name, problem in problems.items():
        say(name, f"NOT ROLLED BACK: {problem}" if problem else "serves what it did before")
    return INCOMPLETE if any(problems.values()) else FAILED


def listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


# --- The command line


def percentages(text: str) -> list[int]:
    """Read `10,30,100`."""
    steps = [int(item) for item in text.split(",")]
    if not all(0 < step <= 100 for step in steps) or steps[-1] != 100:
        raise argparse.ArgumentTypeError("expected numbers from 1 to 100, the last one 100")
    return steps


def parser() -> argparse.ArgumentParser:
    parsing = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsing.add_argument(
        "--list", type=Path, default=Path("/etc/nginx/ovms_rest/hosts.conf"), help="the list of hosts (%(default)s)"
    )
    parsing.add_argument("--nginx", default="nginx", help="the command that runs the balancer's nginx (%(default)s)")
    parsing.add_argument(
        "--operators-port", type=int, default=9000, help="port of each host for operators (%(default)s)"
    )
    commands = parsing.add_subparsers(required=True, metavar="COMMAND")
    for command, arguments in COMMANDS.items():
        summary = (command.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(command.__name__, help=summary, description=summary)
        sub.set_defaults(command=command)
        for names, options in arguments:
            sub.add_argument(*names, **options)
    return parsing


_HOST = (("host",), {"help": "its address in the list, with or without the port"})


def _timeout(default: int, text: str) -> tuple[tuple[str], dict[str, object]]:
    return ("--timeout",), {"type": float, "default": default, "metavar": "SECONDS", "help": f"{text} (%(default)s)"}


COMMANDS: dict[Callable[[Balancer, argparse.Namespace], int], list[tuple[tuple[str, ...], dict[str, object]]]] = {
    status: [],
    drain: [_HOST, _timeout(130, "for requests in progress")],
    restore: [
        _HOST,
        _timeout(60, "until the host is ready"),
        (("--steps",), {"type": percentages, "default": "10,30,100", "help": "percent of its weight (%(default)s)"}),
        (("--pause",), {"type": float, "default": 10, "metavar": "SECONDS", "help": "between steps (%(default)s)"}),
    ],
    push: [
        (("model",), {"help": "name of the model"}),
        (("version",), {"type": int, "help": "version to serve; its directory is on every host already"}),
        (
            ("--config",),
            {
                "type": Path,
                "default": "/etc/ovms_rest/config.json",
                "help": "config file with the model's keys, as on the hosts (%(default)s)",
            },
        ),
        (("--without",), {"action": "append", "default": [], "metavar": "HOST", "help": "leave out a host"}),
        _timeout(60, "until a host is ready after the load"),
    ],
}


def main() -> int:
    arguments = parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    try:
        return arguments.command(Balancer(arguments.list, arguments.nginx), arguments)
    except HostsError as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("hosts.py: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
