"""The configuration of one model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ovms_rest.checking import Problem, as_json
from ovms_rest.errors import LoadError
from ovms_rest.models.compilation import PluginValue, plan_compilation
from ovms_rest.models.options import ModelOptions, parse_options
from ovms_rest.models.repository import LATEST, VersionPolicy

MAX_NIREQ = 100_000


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


def check_values_of(config: ModelConfig) -> list[Problem]:
    """Check values of the right types; return the problems, which affect this model alone."""
    problems = []
    if config.remote:
        problems.append(f"base_path: only local directories and files can be served, got {as_json(config.remote)}")
    if config.nireq > MAX_NIREQ:
        problems.append(f"nireq: expected at most {MAX_NIREQ}, got {config.nireq}")
    for check in (
        lambda: parse_options(config.options),
        lambda: plan_compilation(config.target_device, config.plugin_config, cores=1),
    ):
        try:
            check()
        except LoadError as error:
            problems.append(str(error))
    return problems
