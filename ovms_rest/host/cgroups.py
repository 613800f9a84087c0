"""The control groups of this process, v1 and v2 (cgroups(7))."""

from pathlib import Path

PROC = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def list_directories(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Path]:
    """List the directories that may have limits of a controller: those of the process's groups and their parents."""
    directories = [cgroups, cgroups / controller]  # in a container the group may be mounted as the root itself
    for line in read_file(proc).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
        elif controller in controllers.split(","):
            root = cgroups / controller
        else:
            continue
        group = root / path.lstrip("/")
        directories += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return directories


def read_file(file: Path) -> str:
    """Return the content of a file, "" if it is missing or unreadable."""
    try:
        return file.read_text()
    except OSError:
        return ""
