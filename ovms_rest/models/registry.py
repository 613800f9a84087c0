"""The models that are configured: which of them serve, and why the others do not."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ovms_rest.config import ModelConfig
from ovms_rest.errors import LoadError, NotFoundError, NotReadyError
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.proving import Task, prove
from ovms_rest.models.repository import find_model_file, find_versions, parse_version
from ovms_rest.models.runtime import Model
from ovms_rest.protocol.tensors import TensorMetadata
from ovms_rest.protocol.words import quote

log = logging.getLogger("gunicorn.error.ovms_rest")

# How many names a message lists.
_LISTED = 10


@dataclass(slots=True)
class _Entry:
    """What became of a configured model: the versions that serve, and the reason when there is none."""

    versions: dict[int, Model] = field(default_factory=dict)
    reason: str = ""


class ModelRegistry:
    """The configured models by name.

    The arbiter fills it before it forks; a worker only opens what it inherited, and gives up what does not come up.
    """

    def __init__(self, models: Mapping[str, Mapping[int, Model]], reasons: Mapping[str, str]) -> None:
        """Take the versions of every model that serves, and why the others do not."""
        self._entries = {name: _Entry(dict(versions)) for name, versions in models.items()}
        self._entries |= {name: _Entry(reason=reason) for name, reason in reasons.items()}

    def find(self, name: str, version: str | None = None) -> Model:
        """Return the version asked for as the URL has it, None being the highest. Raises NotFoundError."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(map(repr, list(self._entries)[:_LISTED])) + (", ..." * (len(self._entries) > _LISTED))
            raise NotFoundError(f"model {quote(name)} is unknown; configured are {known or 'none'}")
        if not entry.versions:
            raise NotFoundError(f"model {name!r} does not serve: {entry.reason}")
        number = max(entry.versions) if version is None else parse_version(version)
        if number not in entry.versions:
            served = ", ".join(self.versions(name))
            raise NotFoundError(f"version {quote(version or '')} of model {name!r} is not served; served: {served}")
        return entry.versions[number]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that serve, lowest first."""
        return [str(version) for version in sorted(self._entries[name].versions)]

    def check_ready(self) -> None:
        """Raise NotReadyError with the names and reasons, unless every configured model serves."""
        missing = {name: entry.reason for name, entry in self._entries.items() if not entry.versions}
        if missing:
            raise NotReadyError("; ".join(f"model {name!r} does not serve: {why}" for name, why in missing.items()))

    def open(self, opening: Callable[[str], None], retire: Callable[[], None]) -> None:
        """Make every model ready in this process.

        `opening` is called with the name of each before it is begun with, and with "" at the end; `retire` later, when
        a model has become unusable in this process.
        """
        for name, entry in list(self._entries.items()):
            opening(name)
            for version, model in entry.versions.items():
                try:
                    model.open(retire)
                except LoadError as error:
                    self.give_up(name, f"version {version} {error}")
        opening("")

    def give_up(self, name: str, reason: str) -> None:
        """Stop serving a model, for good: in this process and in those forked from it later."""
        log.error("model %r is given up: %s", name, reason)
        self._entries[name] = _Entry(reason=reason)


def load_models(configs: Iterable[ModelConfig], cores: int, load_timeout: float) -> ModelRegistry:
    """Find, prove and compile the highest version of every model, each having `load_timeout` seconds to be proven.

    A model that cannot be served is told in the log and remembered with its reason.
    """
    reasons: dict[str, str] = {}
    found: list[tuple[str, int, Task]] = []
    for config in configs:
        try:
            version, directory = find_versions(config.base_path).popitem()
            file = find_model_file(directory)
        except LoadError as error:
            reasons[config.name] = str(error)
        else:
            plan = plan_compilation(config.target_device, config.plugin_config, cores)
            found.append((config.name, version, Task(file, plan)))
    models: dict[str, dict[int, Model]] = {}
    proofs = prove([task for _, _, task in found], load_timeout)
    for (name, version, task), reason in zip(found, proofs, strict=True):
        try:
            if reason is not None:
                raise LoadError(reason)
            models[name] = {version: _load(name, version, task)}
        except LoadError as error:
            reasons[name] = f"version {version} {error}"
    for name, reason in reasons.items():
        log.error("model %r does not serve: %s", name, reason)
    return ModelRegistry(models, reasons)


def _load(name: str, version: int, task: Task) -> Model:
    started = time.monotonic()
    model = Model(name, version, task.file, task.compilation)
    if task.compilation.shared:
        model.compile()
    log.info(
        "model %r version %d serves from %s: %s -> %s; %s (%s), ready after %.2f s",
        name,
        version,
        task.file,
        _describe(model.metadata.inputs),
        _describe(model.metadata.outputs),
        "compiled once for all workers" if task.compilation.shared else "compiled by each worker",
        task.compilation.reason,
        time.monotonic() - started,
    )
    return model


def _describe(tensors: Mapping[str, TensorMetadata]) -> str:
    return ", ".join(f"{tensor.name} {tensor.datatype}{tensor.describe_shape()}" for tensor in tensors.values())
