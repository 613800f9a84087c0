"""Private copies of a model's files, so that later changes of the files do not change the model that was tried.

OpenVINO maps weights into memory rather than reading them. When such a file is truncated, every process that touches
the map dies of SIGBUS; when it is overwritten, the served weights change with it. So the throwaway process copies the
files first, and both it and the arbiter load the copies: sealed memory files, which all workers share, or files in a
private directory that is removed after the load.

A copy is consistent: none of the files is open for writing, and none changes while they are copied.
"""

import contextlib
import ctypes
import fcntl
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
from ovms_rest.log import log
from ovms_rest.models.repository import find_model_file, find_weights, list_model_files
from ovms_rest.models.watching import Stamp, stamp_file

# How long to wait for a writer to finish; then the load fails, and is repeated later.
_PATIENCE_SECONDS = 2.0
_PAUSE_SECONDS = 0.02
# Kernels before 6.13 count the time of a change in ticks, of 10 ms at most: a file that changed within the last tick
# may change again and keep its stamp.
_TICK_SECONDS = 0.02
_CHUNK = 2**24
_STATFS_BYTES = 256  # larger than a struct statfs

_PREFIX = "ovms_rest_copies-"
_MEMORY_DIRECTORY = "/dev/shm"  # noqa: S108  used with mkdtemp
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

# File systems (statfs(2)) where a refused lease means that the file is open for writing; on NFS and SMB it may mean
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

Result = TypeVar("Result")


class ChangingError(LoadError):
    """The files of a model changed during the load, or are being written; a later load may succeed."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place for copies of the files of one version.

    `descriptors` are two empty memory files, with the same numbers in the throwaway process; `directory` is for formats
    that OpenVINO reads by the names of their files, "" where no temporary directory can be written.
    """

    descriptors: tuple[int, ...]
    directory: str


# For a system without memory files: models are read in place.
NO_PLACE = Place((), "")


@dataclass(frozen=True, slots=True)
class Source:
    """The files that OpenVINO reads for a model.

    `file` is the model's own file or directory; `model` and `weights` are the paths to read, which may be copies. Only
    a source that `may_map` is mapped into memory. Files that are read in place, unmapped, have their `stamp` here, and
    a `note` that says why they were not copied.
    """

    file: str
    model: str
    weights: str | None
    may_map: bool
    stamp: Stamp = ()
    note: str = ""

    def check(self) -> None:
        """Raise ChangingError if files that are read in place have changed since their trial."""
        if self.stamp and _stamp_at_rest([Path(path) for path, *_ in self.stamp]) != self.stamp:
            raise ChangingError(f"{self.file} changed while it was being loaded")

    def clean(self, text: str) -> str:
        """Replace the names of copies in OpenVINO's text by those of the user's files."""
        if self.model == self.file:
            return text
        text = text.replace(self.model, self.file)
        if self.weights:
            text = text.replace(self.weights, f"the weights of {self.file}")
        return text.replace(str(Path(self.model).parent), str(Path(self.file).parent))


# --- In the arbiter


@contextlib.contextmanager
def open_places(count: int) -> Iterator[list[Place]]:
    """Make places for the files of `count` versions; copies in them live on as long as a model maps them.

    Where the system refuses memory files, the log says so and the places are NO_PLACE.
    """
    owner = os.getpid()
    places: list[Place] = []
    with contextlib.ExitStack() as stack:
        root = _make_root(stack)
        try:
            for index in range(count):
                first, second = (_make_memory_file(stack) for _ in range(2))
                places.append(Place((first, second), root and f"{root}/{index}"))
        except OSError as error:
            log.warning("models are read in place, as no private copies can be made: %s", error.strerror)
            places += [NO_PLACE] * (count - len(places))
        try:
            yield places
        finally:
            if os.getpid() != owner:  # a worker forked meanwhile has closed its copies; the arbiter cleans up the rest
                stack.pop_all()


def _make_memory_file(stack: contextlib.ExitStack) -> int:
    descriptor = os.memfd_create("model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    _inherited.add(descriptor)
    stack.callback(_close, descriptor)
    return descriptor


def _make_root(stack: contextlib.ExitStack) -> str:
    """Make a private directory; return "" where no temporary directory can be written."""
    for parent in _find_temporary_directories():
        with contextlib.suppress(OSError):
            _remove_abandoned(parent)
            root = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            # The lock shows other services that the directory is in use.
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _inherited.add(descriptor)
            stack.callback(_close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return root
    return ""


def _find_temporary_directories() -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield tempfile.gettempdir()
    yield _MEMORY_DIRECTORY


def _remove_abandoned(parent: str) -> None:
    """Remove the directories of services that were killed while they loaded models."""
    for path in Path(parent).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


# A worker that is forked during a load closes these; otherwise it would keep the copies in memory for all its life.
_inherited: set[int] = set()


def _close(descriptor: int) -> None:
    _inherited.discard(descriptor)
    os.close(descriptor)


def _close_inherited() -> None:
    for descriptor in list(_inherited):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_inherited)


def seal(place: Place) -> None:
    """Make the copies immutable for all processes, this one included."""
    for descriptor in place.descriptors:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


# --- In the throwaway process


def copy_model(path: Path, place: Place, may_map: bool = False) -> Source:
    """Copy the model of a version, its directory or single file, to a place; return the source to read.

    Without a place or enough room the source is the files themselves, unmapped; with `may_map`, which the user has to
    set, the files themselves, mapped. Raises LoadError, and ChangingError when the files keep changing.
    """
    file = find_model_file(path)
    return _read_in_place(file, may_map=True) if may_map else _wait_for_rest(lambda: _copy_model(file, place))


def read_in_place(path: Path) -> Source:
    """Return a source that is the files of a version themselves, unmapped. Raises LoadError."""
    return _read_in_place(find_model_file(path), may_map=False)


def _read_in_place(file: Path, may_map: bool, stamp: Stamp = (), note: str = "") -> Source:
    weights = find_weights(file)
    return Source(str(file), str(file), str(weights) if weights else None, may_map, stamp, note)


def _copy_model(file: Path, place: Place) -> Source:
    files = list_model_files(file)
    stamp = _stamp_at_rest(files)
    try:
        source = _read_in_place(file, False, stamp) if place == NO_PLACE else _fill(place, file, files, stamp)
    except OSError as error:
        source = _read_in_place(file, False, stamp, f"read in place, without a private copy: {error}")
    if list_model_files(file) != files or _stamp_at_rest(files) != stamp:
        raise ChangingError(f"{file} changed while it was being copied")
    return source


def _fill(place: Place, file: Path, files: Sequence[Path], stamp: Stamp) -> Source:
    """Copy files to a place; return the source to read. Raises OSError when they cannot be copied there."""
    sizes = [size for _, size, *_ in stamp]
    if file.suffix == ".xml" and len(files) <= len(place.descriptors):
        paths = [_copy_to_memory(*each) for each in zip(files, place.descriptors, sizes, strict=False)]
        weights = paths[1] if len(paths) > 1 and sizes[1] else None  # OpenVINO refuses an empty file of weights
        return Source(str(file), paths[0], weights, may_map=True)
    if not place.directory:
        raise _NoRoomError("no temporary directory can be written")
    base = file if file.is_dir() else file.parent
    outside = [each for each in files if ".." in each.parts or not each.is_relative_to(base)]
    if outside:
        raise _NoRoomError(f"{outside[0]} is outside {base}")
    directory = Path(place.directory)
    shutil.rmtree(directory, ignore_errors=True)  # a failed attempt may have left it
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
    """Copy a file to a memory file; return the path of the copy."""
    os.ftruncate(descriptor, 0)  # a failed attempt may have left bytes
    os.lseek(descriptor, 0, os.SEEK_SET)
    _copy(file, descriptor, size)
    return f"/proc/self/fd/{descriptor}"


def _copy(file: Path, target: int, size: int) -> None:
    """Copy the first `size` bytes of a file, which may be growing. Raises OSError for the target only."""
    with _reading(file), file.open("rb", buffering=0) as source:
        done = 0
        with contextlib.suppress(OSError):  # sendfile does not say which side failed; the loop below does
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
    """A sealed copy of a file in memory, at `path` as long as this object lives."""

    def __init__(self, file: Path, size: int) -> None:
        """Copy the file. Raises OSError if the system has no memory files."""
        self.descriptor = os.memfd_create(file.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        self.path = _copy_to_memory(file, self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)


_copies: weakref.WeakValueDictionary[Stamp, FileCopy] = weakref.WeakValueDictionary()


def copy_file(file: Path) -> FileCopy:
    """Return a copy of a file; the same one as long as the file does not change.

    Raises LoadError, ChangingError if the file keeps changing, and OSError if the system has no memory files.
    """

    def copy() -> FileCopy:
        stamp = _stamp_at_rest([file])
        copied = _copies.get(stamp)
        if copied is None:
            ((_, size, *_),) = stamp
            copied = FileCopy(file, size)
            if _stamp_at_rest([file]) != stamp:
                raise ChangingError(f"{file} changed while it was being copied")
            _copies[stamp] = copied
        return copied

    return _wait_for_rest(copy)


# --- Stamps of files at rest


def _wait_for_rest(work: Callable[[], Result]) -> Result:
    """Do some work, and repeat it for a while as long as it raises ChangingError."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return work()
        except ChangingError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def _stamp_at_rest(files: Sequence[Path]) -> Stamp:
    """Return the stamp of files that are at rest. Raises LoadError, and ChangingError for files that are not."""
    stamps = []
    for file in files:
        with _reading(file), file.open("rb", buffering=0) as stream:
            if _is_being_written(stream.fileno()):
                raise ChangingError(f"{file} is open for writing in another process")
            status = os.fstat(stream.fileno())
            if 0 <= time.time() - status.st_ctime < _TICK_SECONDS:
                raise ChangingError(f"{file} is being changed")
            stamps.append(stamp_file(file, status))
    return tuple(stamps)


def _is_being_written(descriptor: int) -> bool:
    """Return whether another process has a file open for writing; False where the system does not say.

    A read lease is granted only on a file that no process has open for writing, and only to its owner and to root
    (fcntl(2), "Leases").
    """
    try:
        # A process that opens the file before the lease is returned waits those microseconds, and we get a signal:
        # SIGURG, which is ignored by default, where SIGIO would end the process.
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
