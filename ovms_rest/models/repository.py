"""A model's directory on disk: which versions there are, and which file of a version is the model."""

import re
from pathlib import Path

from ovms_rest.errors import LoadError

# Digits without leading zeros, as in a URL; 1 to 2**63-1.
VERSION = re.compile(r"[1-9][0-9]{0,18}")
MAX_VERSION = 2**63 - 1


def parse_version(text: str) -> int | None:
    """Read a version as a URL or a directory's name has it; None for whatever is none."""
    return version if VERSION.fullmatch(text) and (version := int(text)) <= MAX_VERSION else None


def find_versions(base_path: Path) -> dict[int, Path]:
    """Find the version directories of a model, lowest version first.

    Raises LoadError when there are none.
    """
    try:
        names = [entry.name for entry in base_path.iterdir() if entry.is_dir()]
    except OSError as error:
        raise LoadError(f"cannot read the model directory {base_path}: {error.strerror}") from error
    versions = {version: base_path / name for name in names if (version := parse_version(name)) is not None}
    if not versions:
        raise LoadError(
            f"no version in {base_path}: expected a directory per version with a name from 1 on, such as {base_path}/1"
        )
    return dict(sorted(versions.items()))


def find_model_file(version_directory: Path) -> Path:
    """Find the model of a version: OpenVINO IR (.xml with .bin) before ONNX, the first by name of each.

    Raises LoadError when there is none.
    """
    try:
        files = sorted(path for path in version_directory.iterdir() if path.is_file())
    except OSError as error:
        raise LoadError(f"cannot read the version directory {version_directory}: {error.strerror}") from error
    xml, onnx = ([path for path in files if path.suffix == suffix] for suffix in (".xml", ".onnx"))
    for path in (*(path for path in xml if path.with_suffix(".bin") in files), *onnx):
        return path
    missing = f"{xml[0].name} has no .bin beside it" if xml else "expected a .xml with its .bin, or a .onnx"
    raise LoadError(f"no model in {version_directory}: {missing}")
