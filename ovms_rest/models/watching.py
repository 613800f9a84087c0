"""What of the disk a registry was made of, to tell when it has changed."""

import contextlib
import os
from pathlib import Path

# A model has a few files; a directory with more is none, and is not walked through every second.
_MAX_FILES = 10_000

Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(path: Path) -> Stamp:
    """Describe a file, or all that is below a directory: names, times of change in nanoseconds, sizes, inodes.

    What cannot be read, or is not there, is left out, and so is a path that cannot be one.
    """
    if "\0" in str(path):
        return ()
    found: list[tuple[str, int, int, int]] = []
    _add(str(path), found)
    if path.suffix == ".py":  # a node, which may import what lies beside it
        with contextlib.suppress(OSError):  # of which glob passes over a few only
            for beside in sorted(path.parent.glob("*.py"))[:_MAX_FILES]:
                _add(str(beside), found)
    elif os.path.isfile(path):  # which does not raise for what it may not look at
        for beside in (path.with_suffix(".bin"), path.parent / "mapping_config.json", path.parent / "labels.txt"):
            _add(str(beside), found)
    for directory, names, files in os.walk(path):
        names.sort()
        for name in sorted(files):
            _add(os.path.join(directory, name), found)
        if len(found) > _MAX_FILES:
            break
    return tuple(found)


def _add(path: str, found: list[tuple[str, int, int, int]]) -> None:
    try:
        status = os.stat(path)
    except OSError:
        return
    found.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
