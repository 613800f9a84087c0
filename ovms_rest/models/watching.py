"""What of the disk a registry was made of, to tell when it has changed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ovms_rest.errors import LoadError
from ovms_rest.models.repository import SAVED_MODEL, list_model_files, walk_files

# A file with more names no external data of its own, in practice, and is not searched for it by a worker.
_MAX_SEARCHED_BYTES = 2**24
_MAX_NODES = 10_000

Stamp = tuple[tuple[str, int, int, int, int], ...]


def stamp(path: Path) -> Stamp:
    """Describe a file, or all that is below a directory, behind symbolic links too.

    That is each path with the times of the last changes of content and status (of which only the second cannot be set
    back, as `cp -p` does with the first) in nanoseconds, the size and the inode. What cannot be read, or is missing, is
    left out.
    """
    if "\0" in str(path):
        return ()
    return tuple(filter(None, map(_describe, _list_files(path))))


def _list_files(path: Path) -> Iterator[Path]:
    if not os.path.isfile(path):  # which does not raise for what it may not look at
        yield from walk_files(path)
        return
    yield path
    if path.suffix == ".py":  # a node, which may import what lies beside it
        with contextlib.suppress(OSError):
            yield from sorted(path.parent.glob("*.py"))[:_MAX_NODES]
        return
    yield path.parent / "mapping_config.json"
    yield path.parent / "labels.txt"
    with contextlib.suppress(LoadError, OSError):
        if path.name == SAVED_MODEL:
            yield from list_model_files(path.parent)
        elif path.suffix != ".onnx" or path.stat().st_size <= _MAX_SEARCHED_BYTES:
            yield from list_model_files(path)


def _describe(path: Path) -> tuple[str, int, int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
