"""Roots: the directories below which the configuration in a call, rather than in the config file, may name paths.

A client that may load models need not have access to the whole file system.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ovms_rest.checking import Problem, as_json
from ovms_rest.models.configuration import ModelConfig

_CACHE = "CACHE_DIR"
_OF_DEVICES = "DEVICE_PROPERTIES"
# Names of OpenVINO's properties that are paths, such as CACHE_DIR, WEIGHTS_PATH, CONFIG_FILE, NPUW_DUMP_SUBS_DIR.
_NAMES_A_PATH = re.compile(r"(?:^|_)(?:DIR|PATH|FILE|DUMP|BLOB|PLAN)(?:_|$)", re.IGNORECASE)
_SEPARATOR = re.compile(r"[/\\]")
# DEVICE_PROPERTIES, the properties of several devices in one text, must not contain these.
_HAS_A_PATH = re.compile(r"[/\\]|DIR|PATH|FILE|DUMP|BLOB|PLAN", re.IGNORECASE)


class Roots(NamedTuple):
    """Directories and model files below which a call may name models, and directories for caches of compiled models."""

    models: frozenset[Path]
    caches: frozenset[Path]


def find_roots(configured: Iterable[ModelConfig], model_roots: str = "", cache_dir: str = "") -> Roots:
    """Collect the roots from the models in the config file and the settings OVMS_REST_MODEL_ROOTS and _CACHE_DIR."""
    models, caches = [root for root in model_roots.split(":") if root], [cache_dir]
    for config in configured:
        if not config.remote:
            models.append(str(config.base_path))
        caches.append(str(config.plugin_config.get(_CACHE, "")))
    return Roots(frozenset(map(_resolve, models)), frozenset(_resolve(cache) for cache in caches if cache))


def check_paths(given: Mapping[str, Any], config: ModelConfig, roots: Roots) -> Iterator[Problem]:
    """Yield the problems of the paths in a call: `given` has its keys, `config` the parsed values.

    Symbolic links and `..` are resolved first. Messages do not depend on files outside the roots.
    """
    root = "a root in OVMS_REST_MODEL_ROOTS"
    if "base_path" in given and not config.remote and not _is_below(config.base_path, roots.models):
        yield f"config.base_path: {as_json(given['base_path'])} is not below a model in the config file or {root}"
    for key, value in config.plugin_config.items():
        place, text = f"config.plugin_config.{key}", str(value)
        if key.upper() == _OF_DEVICES:
            if _HAS_A_PATH.search(text):
                yield f"{place}: paths in it are not allowed in a call, got {as_json(value)}"
        elif key.upper() == _CACHE:
            if text and not _is_below(text, roots.models | roots.caches):
                where = f"a model in the config file, a configured cache directory or {root}"
                yield f"{place}: {as_json(value)} is not below {where}"
        elif text and (_NAMES_A_PATH.search(key) or _SEPARATOR.search(text)) and not _is_below(text, roots.models):
            yield f"{place}: {as_json(value)} is not below a model in the config file or {root}"


def _is_below(path: str | Path, roots: frozenset[Path]) -> bool:
    resolved = _resolve(path)
    return any(resolved.is_relative_to(root) for root in roots)


def _resolve(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # the path contains a NUL
        return Path(os.path.abspath(path))
