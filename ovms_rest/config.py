"""The JSON config file in the format of the OpenVINO Model Server: models, pipelines, libraries and metrics.

One reading finds every mistake in a file and names its place (`model_config_list[1].config.name`). All keys documented
by OVMS are known. A key without effect here is accepted if ignoring it changes nothing, and refused otherwise.

A wrong type or key refuses the whole file. A wrong value of the right type, such as an invalid shape, concerns its
model alone: `check_values_of` reports it when the model is loaded, and the other models are served.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ovms_rest.checking import (
    Check,
    Never,
    Problem,
    as_json,
    check_keys,
    check_name,
    check_values,
    fits,
    is_a,
    is_text,
    read_json,
)
from ovms_rest.errors import ConfigError
from ovms_rest.models.configuration import MAX_NIREQ, ModelConfig, check_values_of
from ovms_rest.models.options import MAX_BATCH_SIZE, ModelOptions
from ovms_rest.models.repository import LATEST, VersionPolicy
from ovms_rest.ovms_releases import describe_dropped
from ovms_rest.pipelines.definition import Library, PipelineDefinition, check_libraries, check_pipelines, read_pipeline
from ovms_rest.protocol.words import quote
from ovms_rest.resources.metrics import check_metrics_list
from ovms_rest.settings import Settings


class Config(NamedTuple):
    """Models, pipelines, libraries of custom nodes by name, and the metrics to serve: [] for all, None for none.

    `dropped` has a line for each feature that OVMS dropped and that is kept here.
    """

    models: tuple[ModelConfig, ...]
    pipelines: tuple[PipelineDefinition, ...] = ()
    libraries: Mapping[str, Library] = {}
    metrics: list[str] | None = None
    dropped: tuple[str, ...] = ()


def read_config(path: Path, settings: Settings) -> Config:
    """Read a config file for the start of the service; the settings may choose the metrics in its place.

    Raises ConfigError with a line for every mistake in the file and in the settings of metrics.
    """
    names = [name.strip() for name in settings.metrics_list.split(",") if name.strip()]
    problems = [f"OVMS_REST_METRICS_LIST: {problem}" for problem in check_metrics_list(names).values()]
    if names and not settings.metrics_enable:
        problems.append("OVMS_REST_METRICS_LIST: requires OVMS_REST_METRICS_ENABLE=true")
    try:
        config = load_config(path)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if config.metrics is not None and settings.metrics_enable:
        problems.append(f"{path}: monitoring: OVMS_REST_METRICS_ENABLE enables metrics already; remove one of the two")
    if problems:
        raise ConfigError(problems)
    return config._replace(metrics=names) if settings.metrics_enable else config


def load_config(path: Path) -> Config:
    """Read a config file. Raises ConfigError with a line for every mistake."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # no JSON could name it or a file beside it
        raise ConfigError([f"{str(path)!a}: the path of a config must be valid UTF-8"]) from error
    try:
        root, problems = read_json(_read(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    problems += _check_root(root)
    if problems:
        # The values of models, which alone would not refuse the file, are reported with the rest.
        problems += _check_values_of_models(root, path.parent)
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    libraries = root.get("custom_node_library_config_list", [])
    return Config(
        tuple(_model_config(item["config"], path.parent) for item in root["model_config_list"]),
        tuple(read_pipeline(item, path.parent) for item in root.get("pipeline_config_list", [])),
        {item["name"]: Library(item["name"], item["base_path"], path.parent) for item in libraries},
        _read_metrics(root),
        tuple(describe_dropped(root)),
    )


def _read(path: Path) -> bytes:
    """Return the content of a regular file. Raises OSError; opening or reading a named pipe might wait for good."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return stream.read()


def parse_model(name: str, config: dict[str, Any], directory: Path, base: ModelConfig | None) -> ModelConfig:
    """Read the configuration in a load request: keys of the config file, or Triton's keys of the same meaning.

    Paths are relative to `directory`. `base` is the known configuration of the model, whose path is used if the request
    has none. Raises ConfigError with a line for every mistake, including one in the name.
    """
    config = {_TRITON_KEYS.get(key, key): value for key, value in config.items()}
    problems = [] if (problem := check_name(name)) is None else [f"name in the path: {problem}"]
    problems += check_keys(config, "config.", {**_MODEL_KEYS, **_OTHER_KEYS, **_FILE_KEYS}, required=())
    if config.get("name", name) != name:
        problems.append(f"config.name: expected {as_json(name)} as in the path, got {as_json(config['name'])}")
    if base is None and "base_path" not in config:
        problems.append(f"config.base_path: is missing, and model {name!r} is new")
    if problems:
        raise ConfigError(problems)
    known = {} if base is None else {"base_path": base.remote or str(base.base_path)}
    return _model_config({**known, **config, "name": name}, directory)


def _read_metrics(root: dict[str, Any]) -> list[str] | None:
    metrics = root.get("monitoring", {}).get("metrics", {})
    return metrics.get("metrics_list", []) if metrics.get("enable") else None


def _model_config(config: dict[str, Any], directory: Path) -> ModelConfig:
    base_path = config.get("base_path", "")
    return ModelConfig(
        name=config["name"],
        # OVMS forbids ".." because of remote storage; here paths are local, and absolute ones may lead anywhere.
        base_path=directory / base_path,
        target_device=config.get("target_device") or "CPU",
        plugin_config=config.get("plugin_config", {}),
        version_policy=_version_policy(config.get("model_version_policy")) or LATEST,
        options=_model_options(config, directory),
        nireq=config.get("nireq", 0),
        allow_cache=config.get("allow_cache", False),
        remote=base_path if "://" in base_path else "",
        example=directory / config["example"] if "example" in config else None,
    )


def _version_policy(value: Any) -> VersionPolicy | None:
    """Return a version policy, None if it is invalid."""
    if type(value) is not dict or [type(content) for content in value.values()] != [dict]:
        return None
    ((form, content),) = value.items()
    match [form, *content.items()]:
        case ["all"]:
            return VersionPolicy()
        case ["latest", ("num_versions", number)] if _counts(number):
            return VersionPolicy(latest=number)
        case ["specific", ("versions", list(versions))] if all(map(_counts, versions)):
            return VersionPolicy(specific=frozenset(versions))
    return None


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _model_options(config: dict[str, Any], directory: Path) -> ModelOptions:
    extension = config.get("cpu_extension")
    return ModelOptions(
        batch_size=config.get("batch_size"),
        shape=_shape(config.get("shape")),
        layout=config.get("layout"),
        mean=config.get("mean"),
        scale=config.get("scale"),
        color_format=config.get("color_format"),
        precision=config.get("precision"),
        trial=config.get("trial"),
        cpu_extension=str(directory.absolute() / extension) if extension else None,
        max_batch_size=config.get("max_batch_size", 0),
    )


def _shape(value: Any) -> Any:
    """Return a shape, or each shape of an object by input, as text: an array [1,3] becomes "(1,3)"."""
    if type(value) is dict:
        return {name: _shape(item) for name, item in value.items()}
    return f"({','.join(map(str, value))})" if type(value) is list else value


# --- Checks of values


def _check_plugin_config(value: Any) -> Problem | None:
    if type(value) is not dict:
        return f"expected an object, got {as_json(value)}"
    return check_values(value, lambda item: type(item) in (str, int, float, bool), "a string, a number or a boolean")


def _one_or_each(test: Callable[[Any], bool], form: str, key: str) -> Check:
    """Return a check for a value that passes a test, or an object of such values."""
    check_one = fits(f"{form}, or an object of these by {key}", test)
    return lambda value: check_values(value, test, form) if type(value) is dict else check_one(value)


def _is_shape(value: Any) -> bool:
    return type(value) is str or (type(value) is list and all(type(dim) in (int, str) for dim in value))


def _is_metrics_list(value: Any) -> bool:
    return type(value) is list and all(type(name) is str for name in value)


def _only_empty(reason: str) -> Check:
    return lambda value: None if value == [] else f"is not supported: {reason}; expected [], got {as_json(value)}"


_check_shape = _one_or_each(_is_shape, 'a string such as "(1,3,224,224)" or an array such as [1,3,224,224]', "input")
_check_layout = _one_or_each(lambda value: type(value) is str, 'a string such as "NHWC:NCHW"', "tensor")
_check_version_policy = fits(
    '{"latest": {"num_versions": 2}}, {"all": {}} or {"specific": {"versions": [1, 3]}} with numbers from 1 on',
    lambda value: _version_policy(value) is not None,
)
_check_trial = fits(
    "the path of a file with a request, true or false", lambda value: type(value) is bool or is_text(value)
)
# A number that is too high concerns its model alone, as in OVMS.
_check_max_batch_size = fits(
    f"an integer from 0 to {MAX_BATCH_SIZE}", lambda value: type(value) is int and 0 <= value <= MAX_BATCH_SIZE
)
_check_nireq = fits(f"an integer from 0 to {MAX_NIREQ}", lambda value: type(value) is int and value >= 0)
_check_framework = fits("openvino", lambda value: type(value) is str and value.lower() in ("", "openvino"))
_PER_CHANNEL = is_a('a number or a string such as "(123.7,116.3,103.5)"', int, float, str)
_MEDIAPIPE = "MediaPipe graphs are not served here"
_CUSTOM_LOADER = "custom loaders are compiled C++, and OVMS has deprecated them"
_STATEFUL = "OVMS removed stateful models in 2026.3, and no state is kept between requests here"

_ITEM_KEYS: Mapping[str, Check] = {"config": is_a("an object", dict)}

_MODEL_KEYS: Mapping[str, Check] = {
    "name": check_name,
    "base_path": fits("the path of a directory or a model file", is_text),
    "target_device": is_a("a string", str),
    "plugin_config": _check_plugin_config,
    "nireq": _check_nireq,  # without effect: each worker runs one inference at a time
    "allow_cache": is_a("true or false", bool),  # without effect: models with "auto" are cached anyway
    "model_version_policy": _check_version_policy,
    "batch_size": is_a('an integer or a string such as "1:16"', int, str),
    "max_batch_size": _check_max_batch_size,
    "shape": _check_shape,
    "layout": _check_layout,
    "mean": _PER_CHANNEL,
    "scale": _PER_CHANNEL,
    "color_format": is_a('a string such as "RGB:BGR"', str),
    "precision": is_a('a string such as "uint8:fp32"', str),
    "trial": _check_trial,
    "cpu_extension": fits("the path of a library", is_text),
    "example": fits("the path of a file with a request", is_text),
    "version": Never("model_version_policy selects the versions to serve"),
    "custom_loader_options": Never(_CUSTOM_LOADER),
    "graph_path": Never(_MEDIAPIPE),
    "subconfig": Never(_MEDIAPIPE),
    "stateful": Never(_STATEFUL, harmless=(False,)),
    "idle_sequence_cleanup": Never(_STATEFUL),
    "low_latency_transformation": Never(_STATEFUL),
    "max_sequence_number": Never(_STATEFUL),
}

# Keys that a load request may not have: they would run code in the service, or show a file.
_FILE_KEYS: Mapping[str, Check] = {
    "cpu_extension": Never("only the config file may name a library"),
    "example": Never("only the config file may name an example"),
}

# Keys of Triton's model configuration: other names of the same, and keys without effect.
_TRITON_KEYS = {"version_policy": "model_version_policy"}
_OTHER_KEYS: Mapping[str, Check] = {
    "platform": _check_framework,
    "backend": _check_framework,
    **dict.fromkeys(
        ("input", "output", "parameters", "default_model_filename", "model_transaction_policy"),
        Never("it follows from the model; leave it out"),
    ),
    "instance_group": Never("each worker is one instance; leave it out"),
}

_ROOT_KEYS: Mapping[str, Check] = {
    "model_config_list": is_a("an array", list),
    "pipeline_config_list": is_a("an array", list),
    "custom_node_library_config_list": is_a("an array", list),
    "monitoring": is_a("an object", dict),
    "custom_loader_config_list": _only_empty(_CUSTOM_LOADER),
    "mediapipe_config_list": _only_empty(_MEDIAPIPE),
}

_MONITORING_KEYS: Mapping[str, Check] = {"metrics": is_a("an object", dict)}

_METRICS_KEYS: Mapping[str, Check] = {
    "enable": is_a("true or false", bool),
    "metrics_list": fits("an array of strings", _is_metrics_list),
    "endpoint_path": Never("OVMS removed it, the path is always /metrics"),
}


# --- The walk through the file


def _check_root(root: Any) -> Iterator[Problem]:
    if type(root) is not dict:
        yield f"expected an object with the key 'model_config_list', got {as_json(root)}"
        return
    yield from check_keys(root, "", _ROOT_KEYS, required=("model_config_list",))
    yield from _check_models(root.get("model_config_list"))
    yield from check_pipelines(root.get("pipeline_config_list"))
    yield from check_libraries(root.get("custom_node_library_config_list"))
    yield from _check_names_of_pipelines(root)
    yield from _check_monitoring(root.get("monitoring"))


# The functions below skip values of a wrong type, which `check_keys` reports.


def _check_models(items: Any) -> Iterator[Problem]:
    first_places: dict[str, str] = {}
    for index, item in enumerate(items if type(items) is list else ()):
        place = f"model_config_list[{index}]"
        if type(item) is not dict:
            yield f"{place}: expected an object with the only key 'config', an object, got {as_json(item)}"
            continue
        yield from check_keys(item, f"{place}.", _ITEM_KEYS, required=("config",))
        config = item.get("config")
        if type(config) is not dict:
            continue
        yield from check_keys(config, f"{place}.config.", _MODEL_KEYS, required=("name",))
        name = config.get("name")
        if type(name) is str and (first := first_places.setdefault(name, place)) != place:
            yield f"{place}.config.name: {quote(name)} is already the name of {first}"


def _check_names_of_pipelines(root: dict[str, Any]) -> Iterator[Problem]:
    """Check that no pipeline has the name of a model: both are the same part of a URL."""
    places: dict[str, int] = {}
    for index, config in _configs(root):
        if type(name := config.get("name")) is str:
            places.setdefault(name, index)
    for index, item in _objects(root.get("pipeline_config_list")):
        if type(name := item.get("name")) is str and name in places:
            taken = f"model_config_list[{places[name]}]"
            yield f"pipeline_config_list[{index}].name: {quote(name)} is already the name of {taken}"


def _configs(root: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the configs of models, each with the index of its item."""
    for index, item in _objects(root.get("model_config_list")):
        if type(config := item.get("config")) is dict:
            yield index, config


def _objects(items: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, item in enumerate(items if type(items) is list else ()):
        if type(item) is dict:
            yield index, item


def _check_monitoring(monitoring: Any) -> Iterator[Problem]:
    if type(monitoring) is dict:
        yield from check_keys(monitoring, "monitoring.", _MONITORING_KEYS, required=("metrics",))
        metrics = monitoring.get("metrics")
        if type(metrics) is dict:
            yield from check_keys(metrics, "monitoring.metrics.", _METRICS_KEYS, required=("enable",))
            names = metrics.get("metrics_list", [])
            if _is_metrics_list(names):
                for index, problem in check_metrics_list(names).items():
                    yield f"monitoring.metrics.metrics_list[{index}]: {problem}"


def _check_values_of_models(root: Any, directory: Path) -> Iterator[Problem]:
    """Check the values of the right type in a file with other mistakes."""
    for index, given in _configs(root) if type(root) is dict else ():
        config = {key: value for key, value in given.items() if key in _MODEL_KEYS and _MODEL_KEYS[key](value) is None}
        if "layout" in given and "layout" not in config:  # these require a layout, and there is one
            config = {key: value for key, value in config.items() if key not in ("mean", "scale", "color_format")}
        for problem in check_values_of(_model_config({**config, "name": ""}, directory)).problems:
            yield f"model_config_list[{index}].config: {problem}"
