"""A container of a manifest, run as a process of this host, with the probes that a kubelet would send.

Command line, environment, probes and preStop are those of the manifest. Texts that cannot be used here (addresses,
ports, paths) are replaced, each of which has to occur. Images, limits and security contexts are left out.
"""

import contextlib
import http.client
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service import PATIENCE, Service, serve


def replace(value: Any, texts: Mapping[str, str]) -> Any:
    """Return a value of YAML with texts replaced in all of its strings; each has to occur."""
    found: set[str] = set()

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, str):
            for text in texts:
                if text in value:
                    found.add(text)
                    value = value.replace(text, texts[text])
        return value

    replaced = walk(value)
    assert found == texts.keys(), f"not in the manifest: {texts.keys() - found}"
    return replaced


def mount_config(config: str, volume: Path) -> None:
    """Write a ConfigMap with a config.json as a kubelet does: links to a directory that a link switches."""
    (volume / "..2026_01_01").mkdir(parents=True)
    (volume / "..2026_01_01" / "config.json").write_text(config)
    (volume / "..data").symlink_to("..2026_01_01")
    (volume / "config.json").symlink_to("..data/config.json")


class Pod:
    """A running container; `ports` are this host's by those of the manifest."""

    def __init__(self, container: Mapping[str, Any], service: Service, ports: Mapping[int, int]) -> None:
        self.container = container
        self.service = service
        self._ports = ports

    def probe(self, name: str) -> bool:
        """Send a probe; return whether it succeeds, by a kubelet's rules."""
        probe = self.container[name]
        get = probe["httpGet"]
        connection = http.client.HTTPConnection("127.0.0.1", self.port(get["port"]), timeout=probe["timeoutSeconds"])
        with contextlib.closing(connection):
            try:
                connection.request("GET", get["path"], headers={"User-Agent": "kube-probe/1.37", "Accept": "*/*"})
                return 200 <= connection.getresponse().status < 400
            except (OSError, http.client.HTTPException):
                return False

    def port(self, port: int | str) -> int:
        """Return this host's port for a port of the container, given by its name or number."""
        named = {item["name"]: item["containerPort"] for item in self.container["ports"] if "name" in item}
        return self._ports[named[port] if isinstance(port, str) else port]

    def pre_stop(self) -> None:
        """Run the preStop hook."""
        subprocess.run(self.container["lifecycle"]["preStop"]["exec"]["command"], check=True, timeout=PATIENCE)


@contextlib.contextmanager
def run(container: Mapping[str, Any], directory: Path, ports: Mapping[int, int]) -> Iterator[Pod]:
    """Start `ovms-rest`, the image's entry point, and wait until it listens."""
    variables = {item["name"]: item["value"] for item in container.get("env", [])}
    with serve(directory, *container["args"], program="ovms-rest", bind=(), cwd=directory, **variables) as service:
        yield Pod(container, service, ports)
