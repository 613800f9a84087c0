"""Libraries with operations that OpenVINO itself does not have, which some models need to be read.

Those of `openvino_tokenizers` turn strings into tokens and back; they are found where that package is installed. Others
are named in the config.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from ovms_rest.errors import LoadError

_TOKENIZERS = "openvino_tokenizers"
# What OpenVINO says of an IR with operations that no library has brought yet.
_UNKNOWN = ("unsupported opset: extension", "Cannot create")
ADVICE = (
    "it has operations that OpenVINO itself lacks: those of tokenizers come with `pip install 'ovms_rest[text]'`, a "
    "library with others is named by cpu_extension"
)


def lacks_operations(error: Exception) -> bool:
    """Return whether OpenVINO failed to read a model for want of operations."""
    return any(text in str(error) for text in _UNKNOWN)


@functools.cache
def find_tokenizers() -> str | None:
    """Return the path of the library that openvino_tokenizers brings, None where it is not installed.

    The package itself is not imported: it changes OpenVINO's classes.
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
