"""The configuration of one model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ovms_rest.checking import Problem, as_json
from ovms_rest.errors import LoadError
from ovms_rest.models.compilation import Compilation, PluginValue, plan_compilation
from ovms_rest.models.options import ModelOptions, Preparation, parse_options
from ovms_rest.models.repository import LATEST, VersionPolicy

MAX_NIREQ = 100_000

# The plan of a model that cannot be compiled.
_NO_PLAN = Compilation("", {}, shared=False, reason="")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model to serve; `base_path` is the directory of its versions or its file, `remote` the URL given instead."""

    name: str
    base_path: Path
    target_device: str = "CPU"
    plugin_config: Mapping[str, PluginValue] = field(default_factory=dict)
    version_policy: VersionPolicy = LATEST
    options: ModelOptions = ModelOptions()
    nireq: int = 0
    allow_cache: bool = False
    remote: str = ""
    example: Path | None = None  # a file with a request, for the description of the API


class CheckedValues(NamedTuple):
    """The problems of a model's values, which affect this model alone, and how to change and compile it without any."""

    problems: list[Problem]
    preparation: Preparation
    plan: Compilation


def check_values_of(config: ModelConfig, cores: int = 1, cache_dir: str = "") -> CheckedValues:
    """Check values of the right types, for this number of usable cores and OpenVINO's cache."""
    problems, preparation, plan = [], Preparation(), _NO_PLAN
    if config.remote:
        problems.append(f"base_path: only local directories and files can be served, got {as_json(config.remote)}")
    if config.nireq > MAX_NIREQ:
        problems.append(f"nireq: expected at most {MAX_NIREQ}, got {config.nireq}")
    try:
        preparation = parse_options(config.options)
    except LoadError as error:
        problems.append(str(error))
    try:
        plan = plan_compilation(config.target_device, config.plugin_config, cores, cache_dir)
    except LoadError as error:
        problems.append(str(error))
    return CheckedValues(problems, preparation, plan)
