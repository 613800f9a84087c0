"""Stamps of files on disk, which differ once a file has changed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ovms_rest.errors import LoadError
from ovms_rest.models.repository import SAVED_MODEL, list_model_files, walk_files

# Larger ONNX files have no external data in practice, and are not searched for it by a worker.
_MAX_SEARCHED_BYTES = 2**24
_MAX_NODES = 10_000
_MAX_PACKAGES = 100

# Path, size, inode, and the times of the last changes of content and status in ns; only the last cannot be set back, as
# `cp -p` does with the one before.
FileStamp = tuple[str, int, int, int, int]
Stamp = tuple[FileStamp, ...]
# The stamp of files that were being written while they were loaded: it equals no other, so that a reload follows.
CHANGING: Stamp = (("", 0, 0, 0, 0),)


def stamp(path: Path) -> Stamp:
    """Return the stamps of a file and those read with it, or of all files below a directory; follow symbolic links.

    Files that are missing or unreadable are left out.
    """
    if "\0" in str(path):
        return ()
    stamps = []
    for file in _list_files(path):
        with contextlib.suppress(OSError):
            stamps.append(stamp_file(file, os.stat(file)))
    return tuple(stamps)


def stamp_file(file: Path, status: os.stat_result) -> FileStamp:
    """Return the stamp of a file with this status."""
    return str(file), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _list_files(path: Path) -> Iterator[Path]:
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        yield from walk_files(path)
        return
    yield path
    if path.suffix == ".py":  # a custom node, which may import the modules and packages beside it
        with contextlib.suppress(OSError):
            yield from sorted(path.parent.glob("*.py"))[:_MAX_NODES]
            for package in sorted(path.parent.glob("*/__init__.py"))[:_MAX_PACKAGES]:
                yield from (file for file in walk_files(package.parent) if file.suffix == ".py")
        return
    yield path.parent / "mapping_config.json"
    yield path.parent / "labels.txt"
    with contextlib.suppress(LoadError, OSError):
        if path.name == SAVED_MODEL:
            yield from list_model_files(path.parent)
        elif path.suffix != ".onnx" or path.stat().st_size <= _MAX_SEARCHED_BYTES:
            yield from list_model_files(path)
