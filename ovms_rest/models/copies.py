"""Private copies of a model's files: whatever happens to the files later, the model stays the one that was tried.

OpenVINO maps weights into memory rather than reading them. When such a file is truncated, every process that touches
the map dies of SIGBUS; when it is overwritten, the served weights change with it. So the throwaway process copies the
files first, and both it and the arbiter load the copies: memory files that are sealed, which all workers share, or
files in a private directory that is removed after the load.

A copy is made of one state of the files: none of them is open for writing, and none changes in the meantime.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ovms_rest.errors import LoadError
from ovms_rest.models.repository import find_model_file, find_weights, list_model_files

log = logging.getLogger("gunicorn.error.ovms_rest")

# A writer gets so many seconds to finish; then the load fails, and is repeated later.
_PATIENCE_SECONDS = 2.0
_PAUSE_SECONDS = 0.02
# Kernels before 6.13 count the time of a change in ticks, of 10 ms at most: a file that changed within the last tick
# may change again and keep its stamp.
_TICK_SECONDS = 0.02
_CHUNK = 2**24
_STATFS_BYTES = 256  # more than a struct statfs has

_PREFIX = "ovms_rest_copies-"
_MEMORY_DIRECTORY = "/dev/shm"  # noqa: S108  what is made in it is made by mkdtemp
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

# File systems (statfs(2)) on which a refused lease means that the file is open for writing; on NFS and SMB it may mean
# that the server granted no delegation.
_FILE_SYSTEMS_WITH_LEASES = frozenset(
    {
        0x0000EF53,  # ext2, ext3, ext4
        0x01021994,  # tmpfs
        0x58465342,  # XFS
        0x794C7630,  # overlayfs
        0x9123683E,  # btrfs
        0xF2F52010,  # F2FS
    }
)

# Path, inode, size and the times of the last changes of content and status, in ns.
State = tuple[tuple[str, int, int, int, int], ...]


Result = TypeVar("Result")


class ChangingError(LoadError):
    """The files of a model changed while they were being loaded, or are being written; a later try may succeed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one version can be copied to.

    `descriptors` are two empty memory files, which have the same numbers in the throwaway process; `directory` is for
    formats that OpenVINO reads by the names of their files, None if there is none.
    """

    descriptors: tuple[int, int]
    directory: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """What OpenVINO reads for a model.

    `file` is the model's own file or directory; `model` and `weights` are the paths to read, which may be copies. Only
    a source that `may_map` is mapped into memory. `state` is that of the files if they are read in place, without map,
    and `note` why.
    """

    file: str
    model: str
    weights: str | None
    may_map: bool
    state: State = ()
    note: str = ""

    def check(self) -> None:
        """Raise ChangingError if files that are read in place have changed since they were tried."""
        if self.state and _look([Path(path) for path, *_ in self.state]) != self.state:
            raise ChangingError(f"{self.file} changed while it was being loaded")

    def clean(self, text: str) -> str:
        """Return a text of OpenVINO's with the names of the user's files instead of those of their copies."""
        if self.model == self.file:
            return text
        text = text.replace(self.model, self.file)
        if self.weights:
            text = text.replace(self.weights, f"the weights of {self.file}")
        return text.replace(str(Path(self.model).parent), str(Path(self.file).parent))


# --- In the arbiter


@contextlib.contextmanager
def open_places(count: int) -> Iterator[list[Place | None]]:
    """Make places for the files of so many versions; what was copied there lasts as long as a model maps it.

    A place is None where the system refuses memory files, which the log tells.
    """
    owner = os.getpid()
    places: list[Place | None] = []
    with contextlib.ExitStack() as stack:
        root = _make_root(stack)
        try:
            for index in range(count):
                first, second = (_make_memory_file("model", stack) for _ in range(2))
                places.append(Place((first, second), f"{root}/{index}" if root else None))
        except OSError as error:
            log.warning("no private copies of models can be made, which are read in place: %s", error.strerror)
            places += [None] * (count - len(places))
        try:
            yield places
        finally:
            if os.getpid() != owner:  # a worker that was forked meanwhile closed its own, and the rest is the arbiter's
                stack.pop_all()


def _make_memory_file(name: str, stack: contextlib.ExitStack) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    _inherited.add(descriptor)
    stack.callback(_close, descriptor)
    return descriptor


def _make_root(stack: contextlib.ExitStack) -> str | None:
    """Make a directory that nobody else can enter; return None where no temporary directory can be written."""
    for parent in _find_temporary_directories():
        with contextlib.suppress(OSError):
            _remove_abandoned(parent)
            root = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            # As long as the lock is held, no other service takes the directory for abandoned.
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _inherited.add(descriptor)
            stack.callback(_close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return root
    return None


def _find_temporary_directories() -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield tempfile.gettempdir()
    yield _MEMORY_DIRECTORY


def _remove_abandoned(parent: str) -> None:
    """Remove what a service left behind that was killed while it loaded models."""
    for path in Path(parent).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


# A worker that is forked while models are loaded would keep the memory files, and what is in them, for all its life.
_inherited: set[int] = set()


def _close(descriptor: int) -> None:
    _inherited.discard(descriptor)
    os.close(descriptor)


def _close_inherited() -> None:
    for descriptor in list(_inherited):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_inherited)


def seal(place: Place) -> None:
    """Keep the copies from being changed by any process, this one included, from then on."""
    for descriptor in place.descriptors:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


# --- In the throwaway process


def copy_model(path: Path, place: Place | None, may_map: bool = False) -> Source:
    """Copy the model of a version, its directory or single file, to a place; return what to read.

    Without a place, or where there is no room, that is the files themselves, which are then not mapped; with `may_map`
    they are, as the user wants it. Raises LoadError, and ChangingError when the files do not come to rest.
    """
    file = find_model_file(path)
    return _read_in_place(file, may_map=True) if may_map else _wait_for_rest(lambda: _copy_model(file, place))


def read_in_place(path: Path) -> Source:
    """Return a source for the files of a version themselves, which are not mapped. Raises LoadError."""
    return _read_in_place(find_model_file(path), may_map=False)


def _read_in_place(file: Path, may_map: bool, state: State = (), note: str = "") -> Source:
    weights = find_weights(file)
    return Source(str(file), str(file), str(weights) if weights else None, may_map, state, note)


def _copy_model(file: Path, place: Place | None) -> Source:
    files = list_model_files(file)
    state = _look(files)
    try:
        source = _fill(place, file, files, state) if place else None
    except OSError as error:
        source = _read_in_place(file, False, state, f"read in place, without a private copy: {error}")
    if list_model_files(file) != files or _look(files) != state:
        raise ChangingError(f"{file} changed while it was being copied")
    return source or _read_in_place(file, False, state)


def _fill(place: Place, file: Path, files: Sequence[Path], state: State) -> Source:
    """Copy files to a place; return what to read. Raises OSError when they cannot be copied there."""
    sizes = [size for _, _, size, *_ in state]
    if file.suffix == ".xml" and len(files) <= len(place.descriptors):
        paths = [_copy_to_memory(*each) for each in zip(files, place.descriptors, sizes, strict=False)]
        weights = paths[1] if len(paths) > 1 and sizes[1] else None  # OpenVINO takes no empty file for weights
        return Source(str(file), paths[0], weights, may_map=True)
    if place.directory is None:
        raise _NoRoomError("no temporary directory can be written")
    base = file if file.is_dir() else file.parent
    outside = [each for each in files if ".." in each.parts or not each.is_relative_to(base)]
    if outside:
        raise _NoRoomError(f"{outside[0]} lies outside of {base}")
    directory = Path(place.directory)
    shutil.rmtree(directory, ignore_errors=True)  # a try that failed may have left it
    directory.mkdir()
    if len(files) == 1:
        os.symlink(_copy_to_memory(files[0], place.descriptors[0], sizes[0]), directory / files[0].name)
    else:
        # OpenVINO 2026.4.1 refuses symbolic links to an ONNX model's external data.
        for each, size in zip(files, sizes, strict=True):
            target = directory / each.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb", buffering=0) as stream:
                _copy(each, stream.fileno(), size)
    return Source(str(file), str(directory if file.is_dir() else directory / file.name), None, may_map=True)


def _copy_to_memory(file: Path, descriptor: int, size: int) -> str:
    """Copy a file to a memory file; return the path that stands for it."""
    os.ftruncate(descriptor, 0)  # a try that failed may have left something
    os.lseek(descriptor, 0, os.SEEK_SET)
    _copy(file, descriptor, size)
    return f"/proc/self/fd/{descriptor}"


def _copy(file: Path, target: int, size: int) -> None:
    """Copy as many bytes as the file had, and no more: it may be growing. Raises OSError for the target only."""
    with _reading(file), file.open("rb", buffering=0) as source:
        done = 0
        with contextlib.suppress(OSError):  # which is not clear about the side that failed
            while count := os.sendfile(target, source.fileno(), done, min(size - done, _CHUNK)):
                done += count
        source.seek(done)
        while data := source.read(min(size - done, _CHUNK)):
            done += _write(target, data)
            source.seek(done)


class _NoRoomError(OSError):
    """A copy cannot be written."""


def _write(target: int, data: bytes) -> int:
    try:
        return os.write(target, data)
    except OSError as error:
        raise _NoRoomError(error.strerror) from error


# --- Single files


class FileCopy:
    """A sealed copy of a file in memory, which can be opened under its `path` as long as this object lives."""

    def __init__(self, file: Path, size: int) -> None:
        """Copy the file. Raises OSError if the system has no memory files."""
        self.descriptor = os.memfd_create(file.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        self.path = _copy_to_memory(file, self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)


_copies: weakref.WeakValueDictionary[State, FileCopy] = weakref.WeakValueDictionary()


def copy_file(file: Path) -> FileCopy:
    """Return a copy of a file; the same one for the same state of the file.

    Raises LoadError, ChangingError if the file does not come to rest, and OSError if the system has no memory files.
    """

    def copy() -> FileCopy:
        state = _look([file])
        copied = _copies.get(state)
        if copied is None:
            copied = FileCopy(file, state[0][2])
            if _look([file]) != state:
                raise ChangingError(f"{file} changed while it was being copied")
            _copies[state] = copied
        return copied

    return _wait_for_rest(copy)


# --- The state of files


def _wait_for_rest(work: Callable[[], Result]) -> Result:
    """Do some work, again while it raises ChangingError, for a bounded time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return work()
        except ChangingError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def _look(files: Sequence[Path]) -> State:
    """Return the state of files that are at rest. Raises ChangingError for those that are not, and LoadError."""
    state = []
    for file in files:
        with _reading(file), file.open("rb", buffering=0) as stream:
            if _is_being_written(stream.fileno()):
                raise ChangingError(f"{file} is open for writing in another process")
            status = os.fstat(stream.fileno())
            if 0 <= time.time() - status.st_ctime < _TICK_SECONDS:
                raise ChangingError(f"{file} is being changed")
            state.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(state)


def _is_being_written(descriptor: int) -> bool:
    """Return whether another process has a file open for writing, False where the system does not let us know.

    A read lease is granted only on a file that nobody has open for writing, and only to its owner and to root
    (fcntl(2), "Leases").
    """
    try:
        # A process that opens the file before the lease is given back waits those microseconds. We get the signal
        # then, of which the default is to be ignored; that of SIGIO would end the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return _file_system(descriptor) in _FILE_SYSTEMS_WITH_LEASES
    except OSError:
        return False
    return False


def _file_system(descriptor: int) -> int:
    """Return the type of the file system that a file is on (statfs(2)), 0 if it is unknown."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).fstatfs(descriptor, status):
        return 0
    return int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ChangingError(f"{file} vanished while it was being loaded") from error
    except _NoRoomError:
        raise
    except OSError as error:
        raise LoadError(f"cannot read the file {file}: {error.strerror}") from error
