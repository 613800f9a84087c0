"""Extension libraries with operations that OpenVINO lacks and some models need.

`openvino_tokenizers`, which turns strings into tokens and back, is found where that package is installed. Other
libraries are named in the config.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from ovms_rest.errors import LoadError

_TOKENIZERS = "openvino_tokenizers"
# OpenVINO's messages about operations that are missing.
_UNKNOWN = ("unsupported opset: extension", "Cannot create")
ADVICE = (
    "OpenVINO lacks operations of this model: `pip install 'ovms_rest[text]'` adds those of tokenizers, and "
    "cpu_extension names a library with others"
)


def lacks_operations(error: Exception) -> bool:
    """Return whether OpenVINO failed to read a model because it lacks operations."""
    return any(text in str(error) for text in _UNKNOWN)


@functools.cache
def find_tokenizers() -> str | None:
    """Return the path of the library in openvino_tokenizers, None where that is not installed.

    The package itself is not imported, because it changes OpenVINO's classes.
    """
    spec = importlib.util.find_spec(_TOKENIZERS)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0], "lib", f"lib{_TOKENIZERS}.so")
    return str(file) if file.is_file() else None


@functools.cache
def extend(core: Any, library: str) -> None:
    """Add the operations of a library to OpenVINO's, once in a process. Raises LoadError."""
    try:
        core.add_extension(library)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-300:]
        raise LoadError(f"cpu_extension: {library} cannot be loaded as an extension of OpenVINO: {reason}") from error
