"""A model on disk: its versions, the version policy, the model's file, and the names of its tensors.

Files that are wrong or unreadable raise LoadError.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ovms_rest.checking import read_json
from ovms_rest.errors import LoadError
from ovms_rest.log import log
from ovms_rest.protocol.words import list_names, quote, show

# Digits without leading zeros, as in a URL; 1 to 2**63-1.
VERSION = re.compile(r"[1-9][0-9]{0,18}")
MAX_VERSION = 2**63 - 1

# The number of problems that a message lists.
_LISTED = 10

# The model formats by the suffix of their main file, in OVMS's order, each with the suffix of the second file that
# OpenVINO reads, of the same stem. OpenVINO 2026.4 does not read the .json of PaddlePaddle 3.
_KINDS = ((".xml", ".bin"), (".onnx", None), (".pdmodel", ".pdiparams"), (".pb", None), (".tflite", None))
_EXPECTED = "a .xml with its .bin, a .onnx, a .pdmodel with its .pdiparams, a .pb, or a .tflite"
_SUFFIXES = (".xml", ".onnx", ".pdmodel", ".pdiparams", ".pb", ".tflite")
MODEL_SUFFIXES = tuple(suffix for suffix, _ in _KINDS)
# The suffix of a model file by that of its weights.
WEIGHTS = {second: suffix for suffix, second in _KINDS if second is not None}

# The beginning of the file that stands for a large file which Git LFS has not fetched.
_LFS_POINTER = b"version https://git-lfs"

# A directory with the first of these files is a TensorFlow SavedModel; it may have the others too.
SAVED_MODEL = "saved_model.pb"
_BESIDE_SAVED_MODEL = frozenset({"fingerprint.pb", "keras_metadata.pb"})

_DIRECTORIES_OF_SAVED_MODEL = ("assets", "assets.extra", "variables")

# Directories that are never meant as versions: those of a file system, of a NAS, of a SavedModel.
_USUAL_DIRECTORIES = frozenset({"lost+found", "@eaDir", *_DIRECTORIES_OF_SAVED_MODEL})

_MAPPING_FILE = "mapping_config.json"
_MAX_MAPPING_BYTES = 2**24

# Models have a few files; a walk stops after this many files and directories.
_MAX_FILES = 10_000

_LOCATION = b"\x0a\x08location\x12"
_LONGEST_LOCATION = 5000
_SCANNED_BYTES = 2**22


class VersionPolicy(NamedTuple):
    """The version policy of a model: the number of `latest` versions, the `specific` ones, or all if both are None."""

    latest: int | None = None
    specific: frozenset[int] | None = None

    def choose(self, versions: Iterable[int]) -> list[int]:
        """Return the versions that the policy selects, highest first."""
        allowed = [version for version in versions if self.specific is None or version in self.specific]
        return sorted(allowed, reverse=True)[: self.latest]

    def to_json(self) -> dict[str, Any]:
        """Return the policy in the format of the config, which is also Triton's."""
        if self.specific is not None:
            return {"specific": {"versions": sorted(self.specific)}}
        return {"all": {}} if self.latest is None else {"latest": {"num_versions": self.latest}}


LATEST = VersionPolicy(latest=1)


class NameMapping(NamedTuple):
    """The names of inputs and outputs that clients see, by the model's own names, where they differ."""

    inputs: Mapping[str, str] = {}
    outputs: Mapping[str, str] = {}


# --- Versions


def parse_version(text: str) -> int | None:
    """Return the version that a URL or a directory's name stands for, None for any other text."""
    return version if VERSION.fullmatch(text) and (version := int(text)) <= MAX_VERSION else None


def find_versions(base_path: Path) -> dict[int, Path]:
    """Return the directories of a model's versions, which are named by numbers, lowest first.

    Without any, a directory with a model in it is version 1, and so is a `base_path` that is a model file. The log
    names directories and files that may be misnamed versions. Raises LoadError when there is no version.
    """
    if os.path.isfile(base_path):
        if not base_path.name.endswith(_SUFFIXES):
            raise LoadError(
                f"{base_path} is not a model: expected a directory with a directory per version, such as "
                f"{base_path.parent}/1, or a file that ends in {', '.join(_SUFFIXES)}"
            )
        return {1: base_path}
    names = _list_names(base_path, "model directory")
    directories = {name for name in names if os.path.isdir(base_path / name)}
    versions = {version: base_path / name for name in directories if (version := parse_version(name)) is not None}
    if not versions and any(name.endswith(_SUFFIXES) for name in _keep_files(base_path, names)):
        versions = {1: base_path}
    if not versions:
        meant = [name for name in names if parse_version(name) is not None or name.endswith(_SUFFIXES)]
        _check_readable(f"no version in {base_path}", base_path, meant)
        raise LoadError(
            f"no version in {base_path}: expected a directory per version, named by a number from 1 without "
            f"leading zeros, such as {base_path}/1 with {_EXPECTED}; {_describe(names)}"
        )
    ignored = [name for name in names if (parse_version(name) is None) == (name in directories)]
    if ignored := [name for name in ignored if name not in _USUAL_DIRECTORIES]:
        log.warning(
            "ignored in %s: %s; a version is a directory named by a number from 1 without leading zeros",
            base_path,
            list_names(ignored),
        )
    return dict(sorted(versions.items()))


def has_versions(directory: Path) -> bool:
    """Return whether a directory has a subdirectory named like a version. Raises LoadError."""
    names = _list_names(directory, "directory")
    return any(parse_version(name) is not None and os.path.isdir(directory / name) for name in names)


def find_model_names(directory: Path) -> list[str]:
    """Return the names of the model files in a directory, one for each stem. Raises LoadError."""
    files = _keep_files(directory, _list_names(directory, "directory"))
    if SAVED_MODEL in files:
        return [SAVED_MODEL]
    found: dict[str, str] = {}
    for suffix in MODEL_SUFFIXES:
        for name in files:
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), name)
    return sorted(found.values())


def find_subdirectories(directory: Path) -> list[str]:
    """Return the names of the subdirectories that may be models. Raises LoadError."""
    names = _list_names(directory, "directory")
    return [name for name in names if os.path.isdir(directory / name) and name not in _USUAL_DIRECTORIES]


# --- The model of a version


def find_model_file(path: Path) -> Path:
    """Return the file or directory that OpenVINO reads for a version, a directory or a single file.

    Formats are looked for in OVMS's order, IR first; of several models of one format the first by name is used, and the
    log names the others. Raises LoadError when there is no model, or one that lacks its second file or is not valid.
    """
    if os.path.isfile(path):
        directory = path.parent
        suffixes = {suffix for kind in _KINDS if path.suffix in kind for suffix in kind if suffix is not None}
        weights = find_weights(path)
        foreign = [weights.name] if weights else []
        files = _keep_files(directory, [*sorted(path.stem + suffix for suffix in suffixes), *foreign])
        names = [path.name]
    else:
        directory = path
        names = _list_names(path, "version directory")
        files = _keep_files(path, names)
    model = directory / _choose_model(directory, files, names)
    try:
        str(model).encode()
    except UnicodeEncodeError as error:
        raise LoadError(f"cannot read {str(model)!r}: the path is not UTF-8") from error
    check_model_file(model)
    return directory if model.name == SAVED_MODEL else model


def find_weights(file: Path) -> Path | None:
    """Return the weights of a .xml without a .bin of its name: as in OVMS, the first .bin without a .xml of its name.

    None if OpenVINO finds the weights by itself, or if there are none.
    """
    if file.suffix != ".xml" or os.path.lexists(file.with_suffix(".bin")):
        return None
    weights = _find_foreign_weights(_keep_files(file.parent, _list_names(file.parent, "version directory")))
    return file.parent / weights if weights else None


def list_model_files(file: Path) -> list[Path]:
    """List all files that OpenVINO reads for a path that `find_model_file` returned; the main file comes first.

    A SavedModel has the files below its directory; an ONNX model names its external data. Missing files are left out.
    Raises LoadError.
    """
    if file.is_dir():
        below = itertools.chain.from_iterable(walk_files(file / name) for name in _DIRECTORIES_OF_SAVED_MODEL)
        return [file / SAVED_MODEL, *below]
    if file.suffix == ".onnx":
        return [file, *find_external_data(file)]
    second = _second_file(file)
    return [file, second] if second != file and os.path.isfile(second) else [file]


def _second_file(file: Path) -> Path:
    """Return the path of the file that OpenVINO reads with a model file, or the model file itself if it needs none."""
    return find_weights(file) or file.with_suffix(dict(_KINDS).get(file.suffix) or file.suffix)


def find_external_data(file: Path) -> list[Path]:
    """Return the files of external weights of an ONNX model. Raises LoadError when the model cannot be read."""
    try:
        status = file.stat()
        locations = _find_locations(str(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise _unreadable("file", file, error) from error
    paths = (file.parent / location for location in locations)  # absolute ones stay as they are
    return [path for path in paths if os.path.isfile(path)]


@functools.lru_cache(maxsize=1000)
def _find_locations(path: str, *state: int) -> tuple[str, ...]:
    """Return the locations of external data in an ONNX file; its `state` makes the cache find new ones.

    The search is for bytes: a StringStringEntryProto (onnx.proto) with the key "location", whose fields all writers of
    protobuf put in order. Raises OSError.
    """
    found: dict[str, None] = {}
    tail = b""
    with open(path, "rb", buffering=0) as stream:
        while data := stream.read(_SCANNED_BYTES):
            data = tail + data
            start = data.find(_LOCATION)
            while start >= 0:
                start += len(_LOCATION)
                if location := _read_string(data[start : start + _LONGEST_LOCATION]):
                    found[os.fsdecode(location)] = None
                start = data.find(_LOCATION, start)
            tail = data[-_LONGEST_LOCATION:]
    return tuple(found)


def _read_string(data: bytes) -> bytes:
    """Return a protobuf string, which follows its length of one or two bytes; b"" if it is cut off."""
    if data[:1] < b"\x80":
        size, begin = int.from_bytes(data[:1]), 1
    else:
        size, begin = int.from_bytes(data[:1]) & 0x7F | int.from_bytes(data[1:2]) << 7, 2
    text = data[begin : begin + size]
    return text if len(text) == size else b""


def walk_files(top: Path) -> Iterator[Path]:
    """Yield the files below a directory in a fixed order, at most 10,000; follow symbolic links.

    Unreadable directories, and those that were visited before, are left out.
    """
    count, walked = 0, set()
    for directory, names, files in os.walk(top, followlinks=True):
        try:
            status = os.stat(directory)
        except OSError:
            names.clear()
            continue
        count += 1 + len(files)
        if count > _MAX_FILES:
            return
        if (status.st_dev, status.st_ino) in walked:
            names.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        names.sort()
        yield from (Path(directory, name) for name in sorted(files))


def _find_foreign_weights(files: Sequence[str]) -> str | None:
    """Return the first .bin without a .xml of its name, None if there is none."""
    weights = [name for name in files if name.endswith(".bin")]
    return next((name for name in weights if f"{name.removesuffix('.bin')}.xml" not in files), None)


def check_model_file(file: Path) -> None:
    """Check the beginning of a model's file, and of the second file that OpenVINO reads with it.

    Raises LoadError for a file that cannot be opened, is empty, or is a Git LFS pointer to a file that was not fetched.
    """
    if not _read_beginning(file):
        raise LoadError(f"{file} is empty")
    for each in (file, _second_file(file)):  # the second may be empty, for a model without weights
        if os.path.isfile(each) and _read_beginning(each) == _LFS_POINTER:
            raise LoadError(f"{each} is only a Git LFS pointer; `git lfs pull` fetches the file")


def _read_beginning(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise _unreadable("file", file, error) from error


def _choose_model(directory: Path, files: Sequence[str], names: Sequence[str]) -> str:
    xml = [name for name in files if name.endswith(".xml")]
    for suffix, second in _KINDS:
        stems = [name.removesuffix(suffix) for name in files if name.endswith(suffix)]
        complete = [stem + suffix for stem in stems if second is None or stem + second in files]
        if complete:
            return _choose_first(directory, complete)
        if suffix == ".xml" and xml and (weights := _find_foreign_weights(files)):
            return _choose_xml(directory, xml, f" of its name: using {quote(weights)}")
    # A model without weights needs no .bin; one with weights will be refused by OpenVINO.
    if xml:
        return _choose_xml(directory, xml, ": reading it without weights")
    for name in files:
        for suffix, missing in ((".pdmodel", ".pdiparams"), (".pdiparams", ".pdmodel")):
            if name.endswith(suffix):
                raise LoadError(
                    f"no model in {directory}: {quote(name)} needs {quote(name.removesuffix(suffix) + missing)}"
                )
    _check_readable(f"no model in {directory}", directory, [name for name in names if name.endswith(_SUFFIXES)])
    raise LoadError(f"no model in {directory}: expected {_EXPECTED}; {_describe(names)}")


def _choose_xml(directory: Path, models: list[str], instead: str) -> str:
    """Return the first .xml, of which none is complete. Raises LoadError if its own weights cannot be accessed."""
    first = _choose_first(directory, models)
    own = first.removesuffix(".xml") + ".bin"
    if os.path.lexists(directory / own):
        _check_readable(f"{directory / first} has no weights", directory, [own])
    log.warning("%s has no .bin%s", directory / first, instead)
    return first


def _choose_first(directory: Path, models: list[str]) -> str:
    first, *others = sorted(models, key=lambda name: (name != SAVED_MODEL, name))
    if others:
        log.warning("several models in %s: using %s, ignoring %s", directory, quote(first), list_names(others))
    return first


# --- The names of the tensors


def read_mapping(path: Path) -> NameMapping:
    """Read OVMS's mapping_config.json of a version, in its directory or beside its single file.

    Without the file no name is mapped. Raises LoadError for problems with it.
    """
    file = directory_of(path) / _MAPPING_FILE
    try:
        os.lstat(file)
    except FileNotFoundError:
        return NameMapping()
    except (OSError, ValueError) as error:
        raise _unreadable("file", file, error) from error
    try:
        root, repeated = read_json(read_file(file, _MAX_MAPPING_BYTES))
    except ValueError as error:
        raise LoadError(f"{file}: {error}") from error
    if problems := list(itertools.islice(itertools.chain(repeated, _check_mapping(root)), _LISTED)):
        raise LoadError(f"{file}: {'; '.join(problems)}")
    return NameMapping(**root)


def _check_mapping(root: Any) -> Iterator[str]:
    if type(root) is not dict:
        yield f"expected an object with 'inputs' or 'outputs', got {show(root)}"
        return
    for key, names in root.items():
        if key not in NameMapping._fields:
            yield f"{quote(key)}: unknown key; allowed are 'inputs' and 'outputs'"
        elif type(names) is not dict:
            yield f"{key}: expected an object with a name for clients by the model's name, got {show(names)}"
        else:
            yield from _check_names(key, names)


def _check_names(key: str, names: dict[str, Any]) -> Iterator[str]:
    reals: dict[str, str] = {}
    for real, exposed in names.items():
        if type(exposed) is not str or not exposed:
            yield f"{key}[{show(real)}]: expected a non-empty string, got {show(exposed)}"
        elif (first := reals.setdefault(exposed, real)) != real:
            yield f"{key}[{show(real)}]: {quote(exposed)} is already the name for {quote(first)}"


# --- Directories and files


def directory_of(path: Path) -> Path:
    """Return the directory of a version, which is a directory or a single file."""
    return path if os.path.isdir(path) else path.parent


def read_file(file: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises LoadError."""
    if not os.path.isfile(file):  # opening a pipe would block
        raise LoadError(f"{file} is missing or not a file")
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise _unreadable("file", file, error) from error
    if len(content) > most:
        raise LoadError(f"{file} has more than {most} bytes")
    return content


def _list_names(directory: Path, what: str) -> list[str]:
    """List the names in a directory that are not hidden, sorted."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except (OSError, ValueError) as error:
        raise _unreadable(what, directory, error) from error


def explain_unreadable(error: OSError | ValueError) -> str:
    """Return why a path cannot be read; Python words a ValueError differently in each version."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "the path is not UTF-8" if isinstance(error, UnicodeError) else "the path has a null character"


def _unreadable(what: str, path: Path, error: OSError | ValueError) -> LoadError:
    name = str(path) if isinstance(error, OSError) else repr(str(path))
    return LoadError(f"cannot read the {what} {name}: {explain_unreadable(error)}")


def _keep_files(directory: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in _BESIDE_SAVED_MODEL and os.path.isfile(directory / name)]


def _check_readable(what: str, directory: Path, names: Iterable[str]) -> None:
    """Raise LoadError for the first of these that cannot be accessed: it may be the one that is missing."""
    for name in names:
        try:
            os.stat(directory / name)
        except OSError as error:
            raise LoadError(f"{what}: {quote(name)} cannot be read: {error.strerror}") from error


def _describe(names: Sequence[str]) -> str:
    return f"it has {list_names(names)}" if names else "it is empty"
