"""Builds and runs a Containerfile with bubblewrap, for hosts where no image can be pulled or built.

The steps of the file run as written, with these replacements:

- A base image is this host's `/usr`, and the prefix of this Python at `/usr/local`, both read-only. Its other
  directories are empty.
- pip, in its RUN step, has no network. It installs the project alone (`PIP_NO_DEPS`), with the setuptools of this
  environment (`PIP_NO_BUILD_ISOLATION`). The project's dependencies are this environment's, at /deps (`PYTHONPATH`),
  without the project itself.
- A container has its own namespaces for mounts, processes and network, the last with only a loopback interface; limits
  of memory, CPU and processes, the system-call filter and host names are left out.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from service import PATIENCE, Found, wait_for

_BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
_SETPRIV = ("--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")


class Instruction(NamedTuple):
    """An instruction of a Containerfile; `value` is its text after name and flags."""

    name: str
    flags: Mapping[str, str]
    value: str

    def words(self) -> list[str]:
        """Return the words of the exec form or of the shell form."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


def parse(text: str) -> list[Instruction]:
    """Parse a Containerfile; variables are not expanded."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    instructions = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, _, rest = line.partition(" ")
        flags = {}
        while flag := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            flags[flag[1]] = flag[2]
            rest = rest[flag.end() :]
        instructions.append(Instruction(name.upper(), flags, rest.strip()))
    return instructions


def copy_context(source: Path, ignore: str, target: Path) -> None:
    """Copy the files of a build context that its ignore file does not exclude: the last matching pattern decides."""
    patterns = [line for line in ignore.splitlines() if line and not line.startswith("#")]

    def is_ignored(path: Path) -> bool:
        ignored = False
        for pattern in patterns:
            prefixes = [str(part) for part in (path, *path.parents) if part != Path()]
            names = [part.rpartition("/")[2] for part in prefixes] if pattern.startswith("**/") else prefixes
            if any(fnmatch(name, pattern.lstrip("!").removeprefix("**/")) for name in names):
                ignored = not pattern.startswith("!")
        return ignored

    files = subprocess.check_output(["find", ".", "-type", "f", "-printf", "%P\\n"], cwd=source, text=True)
    for file in files.splitlines():
        if not is_ignored(Path(file)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / file, target / file)


class Stage:
    """The root of a stage or an image, with the settings of its instructions."""

    def __init__(self, root: Path, base: str) -> None:
        self.root = root
        self.base = base
        self.environment = {"PATH": _BASE_PATH, "LANG": "C.UTF-8"}
        self.directory = "/"
        self.settings: dict[str, Instruction] = {}
        for name in ("usr", "proc", "sys", "dev", "tmp", "etc", "deps", "opt", "root"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            (root / name).symlink_to(f"usr/{name}")

    def path(self, name: str) -> Path:
        """Return this host's path of a file in the image."""
        return self.root / os.path.join(self.directory, name).lstrip("/")

    def expand(self, text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda found: self.environment[found[1]], text)

    def mounts(self, is_read_only: bool) -> list[str]:
        """Return bwrap's options for the root, /usr and the dependencies."""
        options = ["--ro-bind" if is_read_only else "--bind", str(self.root), "/", "--ro-bind", "/usr", "/usr"]
        if sys.base_prefix != "/usr":
            options += ["--ro-bind", sys.base_prefix, "/usr/local"]
        options += ["--ro-bind", sysconfig.get_path("platlib"), "/deps"]
        for path in Path(sysconfig.get_path("platlib")).glob("ovms_rest*"):
            options += ["--tmpfs", f"/deps/{path.name}"] if path.is_dir() else []
        options += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys"]
        return [*options, "--unshare-net", "--unshare-pid", "--unshare-ipc"]


def _replace(environment: Mapping[str, str]) -> dict[str, str]:
    """Add the dependencies' path, and that of this Python's libpython, which an image finds by its cache."""
    return {**environment, "PYTHONPATH": "/deps", "LD_LIBRARY_PATH": "/usr/local/lib"}


def _variables(environment: Mapping[str, str]) -> list[str]:
    settings = [("--setenv", name, value) for name, value in _replace(environment).items()]
    return ["--clearenv", *itertools.chain.from_iterable(settings)]


def build(containerfile: str, context: Path, directory: Path) -> Stage:
    """Run the steps of a Containerfile; return its last stage, the image."""
    stages: dict[str, Stage] = {}
    stage = None
    for instruction in parse(containerfile):
        name, flags, value = instruction
        if name == "FROM":
            base, _, alias = value.partition(" AS ")
            stage = Stage(directory / f"stage{len(stages)}", base)
            stages[alias or str(len(stages))] = stage
        elif name == "ARG":
            variable, _, default = value.partition("=")
            stage.environment[variable] = default
        elif name == "ENV":
            pairs = [pair.partition("=") for pair in shlex.split(value)]
            stage.environment |= {variable: stage.expand(text) for variable, _, text in pairs}
        elif name == "WORKDIR":
            stage.directory = value
            stage.path(".").mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            source = stages[flags["from"]].root if "from" in flags else context
            assert not flags.keys() - {"from"}, flags
            _copy([source / item.lstrip("/") for item in value.split()[:-1]], stage, value.split()[-1])
        elif name == "RUN":
            assert not flags, flags
            _run(stage, value)
        elif name in ("USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"):
            stage.settings[name] = instruction
        else:
            raise NotImplementedError(name)
    return stage


def _copy(sources: Sequence[Path], stage: Stage, name: str) -> None:
    """Copy files into a directory and the contents of directories to a path, as COPY does."""
    target = stage.path(name)
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        else:
            assert name.endswith("/"), name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _finish(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def _run(stage: Stage, command: str) -> None:
    replaced = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}  # 0: no isolation
    done = _finish(
        *("bwrap", *stage.mounts(is_read_only=False), "--tmpfs", "/tmp", "--chdir", stage.directory),  # noqa: S108
        *(*_variables(stage.environment | replaced), "--die-with-parent", "/bin/sh", "-c", command),
    )
    assert done.returncode == 0, f"RUN {command}\n{done.stdout}{done.stderr}"


class Container:
    """A running container; `process` is bwrap, `pid` the outer id of the container's first process."""

    def __init__(self, image: Stage, process: subprocess.Popen, pid: int, log: Path) -> None:
        self.process = process
        self.pid = pid
        self._image = image
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], Found]) -> Found:
        """Wait until a condition holds while the container runs, and return its result."""

        def check() -> Found:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            return condition()

        return wait_for(check, lambda: self.log)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container like `docker exec`."""
        user, _, group = self._image.settings["USER"].value.partition(":")
        variables = [f"{name}={value}" for name, value in _replace(self._image.environment).items()]
        return _finish(
            *("nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--"),
            *("setpriv", f"--reuid={user}", f"--regid={group}", *_SETPRIV),
            *("env", "-i", *variables, *command),
        )

    def check_health(self) -> subprocess.CompletedProcess[str]:
        """Run the HEALTHCHECK; exit code 0 means healthy."""
        kind, _, command = self._image.settings["HEALTHCHECK"].value.partition(" ")
        assert kind == "CMD"
        return self.execute(*json.loads(command))

    def stop(self) -> int:
        """Send SIGTERM to the first process like `docker stop`; return the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def run(image: Stage, log: Path, *arguments: str, models: Path | None = None, **variables: str) -> Iterator[Container]:
    """Start a container like `docker run --read-only --tmpfs /tmp -v MODELS:/models:ro IMAGE ARGUMENTS`."""
    user, _, group = image.settings["USER"].value.partition(":")
    command = image.settings["ENTRYPOINT"].words() + (list(arguments) or image.settings["CMD"].words())
    mounted = [] if models is None else ["--ro-bind", str(models), "/models"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                *("bwrap", *image.mounts(is_read_only=True), "--tmpfs", "/tmp", "--chmod", "1777", "/tmp", *mounted),  # noqa: S108
                *("--as-pid-1", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"),
                *(*_variables(image.environment | variables), "--chdir", image.directory),
                *("setpriv", f"--reuid={user}", f"--regid={group}", *_SETPRIV, "--", *command),
            ],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    container = Container(image, process, 0, log)
    try:
        # bwrap is the parent of the container's first process.
        container.pid = int(container.wait_for(lambda: children.read_text().split())[0])
        yield container
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(container.pid or process.pid, signal.SIGKILL)  # which ends all processes in its namespace
            process.wait(PATIENCE)
