"""The JSON config file, in the form of the OpenVINO Model Server: what is to be served.

Every mistake of a file is found in one reading and told with its place (`model_config_list[1].config.name`). The keys
that OVMS documents are all known. Those that this version does not carry out are accepted while they change nothing
and refused where they would.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ovms_rest.errors import ConfigError
from ovms_rest.models.compilation import PluginValue

Problem = str
Check = Callable[[Any], Problem | None]

MAX_NIREQ = 100_000


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model to serve; `base_path` holds a directory per version."""

    name: str
    base_path: Path
    target_device: str
    plugin_config: Mapping[str, PluginValue]


def load_config(path: Path) -> tuple[ModelConfig, ...]:
    """Read a config file. Raises ConfigError with a line for every mistake."""
    try:
        root = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except orjson.JSONDecodeError as error:
        raise ConfigError([f"{path}: is not valid JSON: {error}"]) from error
    problems = [f"{path}: {problem}" for problem in _check_root(root)]
    if problems:
        raise ConfigError(problems)
    return tuple(_model_config(item["config"], path.parent) for item in root["model_config_list"])


def _model_config(config: dict[str, Any], directory: Path) -> ModelConfig:
    return ModelConfig(
        name=config["name"],
        base_path=directory / config.get("base_path", ""),
        target_device=config.get("target_device") or "CPU",
        plugin_config=config.get("plugin_config", {}),
    )


# --- Checks of values: each returns what is wrong, or None


def _is(type_name: str, *types: type) -> Check:
    return lambda value: None if type(value) in types else f"expected {type_name}, got {_describe(value)}"


def _check_name(value: Any) -> Problem | None:
    if type(value) is not str or not value or "/" in value:
        return f"expected a string that is not empty and has no '/', got {_describe(value)}"
    return None


def _check_base_path(value: Any) -> Problem | None:
    if type(value) is not str or not value:
        return f"expected the path of a directory, got {_describe(value)}"
    if "\0" in value:
        return f"a path has no NUL character, got {_describe(value)}"
    if "://" in value:
        return f"only local directories can be served, got {_describe(value)}"
    return None


def _check_plugin_config(value: Any) -> Problem | None:
    if type(value) is not dict:
        return f"expected an object, got {_describe(value)}"
    for key, item in value.items():
        if type(item) not in (str, int, float, bool):
            return f"the value of {key} has to be a string, a number or a boolean, got {_describe(item)}"
    return None


def _check_nireq(value: Any) -> Problem | None:
    if type(value) is not int or not 0 <= value <= MAX_NIREQ:
        return f"expected an integer from 0 to {MAX_NIREQ}, got {_describe(value)}"
    return None


def _check_version_policy(value: Any) -> Problem | None:
    if not _is_same(value, {"latest": {"num_versions": 1}}):
        return f'only {{"latest": {{"num_versions": 1}}}}, the default, is supported yet, got {_describe(value)}'
    return None


def _check_monitoring(value: Any) -> Problem | None:
    if not _is_same(value, {"metrics": {"enable": False}}):
        return f'metrics are not served yet, only {{"metrics": {{"enable": false}}}} is allowed, got {_describe(value)}'
    return None


def _not_yet(value: Any) -> Problem | None:
    return f"is not supported yet, got {_describe(value)}; leave it out"


def _never(reason: str) -> Check:
    return lambda value: f"is not supported: {reason}"


def _empty_until(what: str) -> Check:
    return lambda value: None if value == [] else f"{what} are not supported yet, only [] is allowed"


_MEDIAPIPE = "MediaPipe graphs are not served here"
_CUSTOM_LOADER = "custom loaders, deprecated by OVMS too, would have to be compiled C++"
_STATEFUL = "OVMS removed stateful models"

_MODEL_KEYS: Mapping[str, Check] = {
    "name": _check_name,
    "base_path": _check_base_path,
    "target_device": _is("a string", str),
    "plugin_config": _check_plugin_config,
    "nireq": _check_nireq,  # changes nothing: as many inferences run at once as there are workers
    "allow_cache": _is("true or false", bool),  # changes nothing: there is no cache that it could allow
    "model_version_policy": _check_version_policy,
    "batch_size": _not_yet,
    "shape": _not_yet,
    "layout": _not_yet,
    "mean": _not_yet,
    "scale": _not_yet,
    "color_format": _not_yet,
    "precision": _not_yet,
    "custom_loader_options": _never(_CUSTOM_LOADER),
    "graph_path": _never(_MEDIAPIPE),
    "subconfig": _never(_MEDIAPIPE),
    "stateful": _never(_STATEFUL),
    "idle_sequence_cleanup": _never(_STATEFUL),
    "low_latency_transformation": _never(_STATEFUL),
    "max_sequence_number": _never(_STATEFUL),
}

_ROOT_KEYS: Mapping[str, Check] = {
    "model_config_list": _is("an array", list),
    "pipeline_config_list": _empty_until("pipelines"),
    "custom_node_library_config_list": _empty_until("custom nodes"),
    "monitoring": _check_monitoring,
    "custom_loader_config_list": _never(_CUSTOM_LOADER),
    "mediapipe_config_list": _never(_MEDIAPIPE),
}


# --- The walk through the file


def _check_root(root: Any) -> Iterator[Problem]:
    if type(root) is not dict:
        yield f"expected an object with the key 'model_config_list', got {_describe(root)}"
        return
    yield from _check_keys(root, "", _ROOT_KEYS, required=("model_config_list",))
    items = root.get("model_config_list")
    first_places: dict[str, str] = {}
    for index, item in enumerate(items if type(items) is list else ()):
        place = f"model_config_list[{index}]"
        config = item.get("config") if type(item) is dict else None
        if type(config) is not dict or len(item) != 1:
            yield f"{place}: expected an object with the only key 'config', an object, got {_describe(item)}"
            continue
        yield from _check_keys(config, f"{place}.config.", _MODEL_KEYS, required=("name",))
        name = config.get("name")
        if type(name) is str and (first := first_places.setdefault(name, place)) != place:
            yield f"{place}.config.name: {name!r} is the name of {first} already"


def _check_keys(
    owner: dict[str, Any], place: str, checks: Mapping[str, Check], required: tuple[str, ...]
) -> Iterator[Problem]:
    for key in required:
        if key not in owner:
            yield f"{place}{key}: is missing"
    for key, value in owner.items():
        if key not in checks:
            (near,) = difflib.get_close_matches(key, checks, n=1, cutoff=0)
            yield f"{place}{key}: unknown key; the nearest known one is {near!r}"
        elif problem := checks[key](value):
            yield f"{place}{key}: {problem}"


def _is_same(value: Any, allowed: Any) -> bool:
    """Compare as JSON, in which neither true nor 1.0 is 1."""
    return _describe(value) == _describe(allowed)


def _describe(value: Any) -> str:
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # nested deeper than orjson writes, though it reads it
        return "a value nested too deep to be shown"
    return text if len(text) <= 80 else f"{text[:80]}..."
