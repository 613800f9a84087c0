"""Models given by paths on the command line, as `PATH` or `NAME=PATH`, with names taken from the paths.

A path is a model file, a directory with the versions or the files of a model, or a repository as in Triton: a directory
with one directory per model. Nothing is loaded here; only file names are read.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ovms_rest.checking import check_name
from ovms_rest.errors import ConfigError, LoadError
from ovms_rest.models.repository import (
    MODEL_SUFFIXES,
    WEIGHTS,
    explain_unreadable,
    find_model_names,
    find_subdirectories,
    has_versions,
)
from ovms_rest.protocol.words import list_names


class PathError(ConfigError):
    """Paths on the command line without a model to serve."""


class NamedPath(NamedTuple):
    """A model to serve: its name, and the absolute path of its directory or file, symbolic links kept."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class NamedPaths:
    """The models at the paths of a command line, a line for each mistake, and one for each ignored directory."""

    models: tuple[NamedPath, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# File names that frameworks give to every model, which is named after its directory then.
_GENERIC_STEMS = frozenset({"", "model", "saved_model", "openvino_model", "inference", "frozen_inference_graph"})
# Directories inside a version or a model that do not name it, and directories of models of any kind.
_WRAPPERS = frozenset({"saved_model", "model.savedmodel"})
_COLLECTIONS = frozenset({"", "model", "models"})

_FILES = f"model files end in {', '.join(MODEL_SUFFIXES)}"


def find_models(arguments: Sequence[str]) -> NamedPaths:
    """Find the models at the paths of a command line, and a name for each."""
    found: list[NamedPath] = []
    problems: list[str] = []
    notes: list[str] = []
    paths = {argument: Path(_split(argument)[1]).absolute() for argument in arguments}
    for argument in arguments:
        (given, text), path = _split(argument), paths[argument]
        if path.suffix in WEIGHTS and path.with_suffix(WEIGHTS[path.suffix]) in paths.values():
            continue  # `models/*` in a shell includes the weights
        try:
            if "://" in text:
                raise LoadError("only local files and directories can be served")
            models = _find(path, notes)
            if given is not None:
                models = [_rename(given, models)]
            found += map(_check, models)
        except LoadError as error:
            problems.append(f"{argument}: {error}")
    return NamedPaths(tuple(found), (*problems, *_find_clashes(found)), tuple(notes))


def _split(argument: str) -> tuple[str | None, str]:
    """Split NAME=PATH; an argument that exists, or has a '/' before the '=', is a path as a whole."""
    name, equals, path = argument.partition("=")
    if not equals or "/" in name or os.path.lexists(argument):
        return None, argument
    return name, path


def _find(path: Path, notes: list[str]) -> list[NamedPath]:
    """Find the models at a path. Raises LoadError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise LoadError("the path is not UTF-8") from None
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise LoadError(explain_unreadable(error)) from error
    if path.is_file():
        if not path.name.endswith(MODEL_SUFFIXES):
            raise LoadError(_explain_foreign(path))
        return [NamedPath(_name_file(path), path)]
    if not path.is_dir():
        raise LoadError("not a file and not a directory")
    if _is_model(path):
        return [NamedPath(_name_directory(path), path)]
    return _find_in_repository(path, notes)


def _explain_foreign(path: Path) -> str:
    if path.suffix == ".json":
        return "a JSON file, not a model; for a config use --config_path"
    if path.suffix in WEIGHTS and path.with_suffix(WEIGHTS[path.suffix]).is_file():
        return f"the weights of {path.with_suffix(WEIGHTS[path.suffix]).name}; give that file instead"
    return f"not a model file; {_FILES}"


def _is_model(directory: Path) -> bool:
    """Return whether a directory is a model. Raises LoadError if it holds several."""
    if has_versions(directory):
        return True
    files = find_model_names(directory)
    if len(files) > 1:
        raise LoadError(f"several models in {directory}: {list_names(files)}; give the files instead of the directory")
    return bool(files)


def _find_in_repository(directory: Path, notes: list[str]) -> list[NamedPath]:
    subdirectories = find_subdirectories(directory)
    models = {name for name in subdirectories if _is_model(directory / name)}
    if not models:
        content = list_names(sorted(entry.name for entry in directory.iterdir()))
        raise LoadError(
            f"no model in this directory, which {f'has {content}' if content else 'is empty'}; expected a model "
            f"file, or a directory per version named by a number from 1 on; {_FILES}"
        )
    if ignored := [name for name in subdirectories if name not in models]:
        notes.append(f"ignored in {directory}: {list_names(ignored)}, without a model")
    return [NamedPath(_name_directory(directory / name), directory / name) for name in subdirectories if name in models]


def _rename(name: str, models: Sequence[NamedPath]) -> NamedPath:
    if len(models) > 1:
        names = list_names(model.name for model in models)
        raise LoadError(f"one name for several models: {names}; give their directories instead")
    return models[0]._replace(name=name)


def _check(model: NamedPath) -> NamedPath:
    """Return the model if its name is valid. Raises LoadError."""
    if problem := check_name(model.name):
        raise LoadError(f"invalid name: {problem}; give another one as NAME=PATH")
    return model


def _find_clashes(models: Sequence[NamedPath]) -> Iterator[str]:
    paths: dict[str, list[Path]] = {}
    for model in models:
        paths.setdefault(model.name, []).append(model.path)
    for name, others in paths.items():
        if len(others) > 1:
            where = " and ".join(map(str, others))
            yield f"{name!r} would be the name of {where}; give each its own name, as in {name}-2={others[1]}"


# --- Names


def _name_file(path: Path) -> str:
    """Return the name of a model file: that of the file, or of its directory if the file has a generic name."""
    stem = path.name.removesuffix(path.suffix)
    if stem not in _GENERIC_STEMS and not stem.isdecimal():
        return stem
    directory = _name_directory(path.parent)
    return stem if directory in _COLLECTIONS and stem and not stem.isdecimal() else directory


def _name_directory(path: Path) -> str:
    """Return the name of a model's directory; for a version, or a directory inside one, that of the directory above."""
    resolved = Path(os.path.realpath(path)) if ".." in path.parts else path
    for directory in (resolved, *resolved.parents):
        if not directory.name.isdecimal() and directory.name not in _WRAPPERS:
            return directory.name
    return ""
