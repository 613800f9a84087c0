"""Loading models: finding versions on disk, trying them, and compiling those that pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.host.priority import run_lowered
from ovms_rest.host.throwaway import STOPPED
from ovms_rest.log import log
from ovms_rest.models.configuration import ModelConfig, check_values_of
from ovms_rest.models.copies import ChangingError, Source, open_places, seal
from ovms_rest.models.example_requests import find_example
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.models.repository import find_model_file, find_versions
from ovms_rest.models.runtime import DEFAULT_LIMITS, Model
from ovms_rest.models.trials import Task, run_trials
from ovms_rest.models.watching import stamp
from ovms_rest.protocol.tensors import TensorMetadata

# How many versions are tried in one process; their copies are kept until all are done, with two open files each.
_BATCH = 64


class LoadSettings(NamedTuple):
    """Limits and defaults of all models: usable cores, seconds per trial, OpenVINO's cache, limits of images.

    `cpu_extension` is the library of operations for models whose configuration has none.
    """

    cores: int
    load_timeout: float = 300.0
    cache_dir: str = ""
    limits: ImageLimits = DEFAULT_LIMITS
    cpu_extension: str = ""


class _Candidate:
    """A configured model while it is being loaded."""

    def __init__(self, config: ModelConfig, settings: LoadSettings, previous: Entry) -> None:
        if settings.cpu_extension and not config.options.cpu_extension:
            config = replace(config, options=replace(config.options, cpu_extension=settings.cpu_extension))
        self.config = config
        self.limits = settings.limits
        self.previous = previous
        self.entry = Entry(policy=config.version_policy, notes=_find_ignored(config))
        self.paths: dict[int, Path] = {}
        problems, self.preparation, self.plan = check_values_of(config, settings.cores, settings.cache_dir)
        if not config.remote:
            try:
                self.paths = find_versions(config.base_path)
            except LoadError as error:
                problems.append(str(error))
        if problems:
            self.paths = {}
            self.fail(problems)

    def fail(self, problems: Sequence[str]) -> None:
        """Set the reasons why the model has no versions at all."""
        self.entry.reason, self.entry.details = "; ".join(problems), tuple(problems)

    def wanted(self) -> list[int]:
        """Return the versions that the policy selects among those that have not failed, highest first."""
        failed = self.entry.failures.keys() - self.entry.versions.keys()
        return self.config.version_policy.choose(self.paths.keys() - failed)

    def task(self, version: int) -> Task:
        """Describe the trial of a version."""
        return Task(self.paths[version], self.plan, self.config.options, self.limits)

    def postpone(self, version: int, reason: str) -> None:
        """Fail a version whose files are being written; if it serves already, keep serving it as it was."""
        self.entry.failures[version] = reason
        self.entry.is_changing = True
        if version in self.previous.versions:
            log.warning("model %r keeps serving version %d as it was", self.config.name, version)
            self.keep(version)
            self.entry.sources[version] = self.previous.sources.get(version)

    def keep(self, version: int) -> None:
        """Take over a version from the previous registry."""
        self.entry.versions[version] = self.previous.versions[version]
        self.entry.trials[version] = self.previous.trials[version]

    def reuse(self, version: int) -> bool:
        """Keep a version that serves already and has not changed since; return whether it was kept."""
        source = (self.task(version), stamp(self.paths[version]))
        self.entry.sources[version] = source
        is_unchanged = version in self.previous.versions and self.previous.sources.get(version) == source
        if is_unchanged:
            self.keep(version)
        return is_unchanged

    def load(self, version: int, source: Source | None) -> None:
        """Load a version from the source that passed its trial."""
        path = self.paths[version]
        with suppress(LoadError):  # called only for its log lines about further models; the file may be gone by now
            find_model_file(path)
        try:
            model = Model(self.config.name, version, path, self.plan, self.preparation, self.limits, source)
            if self.plan.shared:
                # The first inference rearranges the weights of some models; done here, workers share the result:
                # ResNet-50 with a dynamic batch takes 7 MB in each worker, and 60 MB without.
                model.open(lambda: None)
            model.invented = model.invented or self.entry.trials[version].invented
        except ChangingError as error:
            self.postpone(version, str(error))
        except LoadError as error:
            self.entry.failures[version] = str(error)
        else:
            self.entry.versions[version] = model
            if source and source.note:
                log.warning("version %d of model %r was %s", version, self.config.name, source.note)

    def finish(self) -> Entry:
        """Log the outcome and return the entry; keep serving the previous versions if none of the new ones loaded."""
        name, entry = self.config.name, self.entry
        entry.example = find_example(f"model {name!r}", self.config.example)
        if self.paths and not entry.versions and not entry.failures:
            found = ", ".join(map(str, self.paths))
            self.fail([f"model_version_policy selects none of the available versions: {found}"])
        for reason in entry.details:
            log.error("model %r does not serve: %s", name, reason)
        for version, reason in sorted(entry.failures.items()):
            log.error("version %d of model %r does not serve: %s", version, name, reason)
        for note in (*self.plan.notes, *entry.notes):
            log.info("model %r: %s", name, note)
        if self.config.options.shape is not None and self.config.options.batch_size is not None:
            both = "Both shape and batch size have been defined. Batch size parameter will be ignored."
            log.warning("model %r: %s", name, both)
        if _asks_for_auto(self.config):
            log.warning('model %r: "auto" is deprecated and accepts any size, as "-1" does', name)
        if not entry.versions and self.previous.versions:
            log.warning("model %r keeps serving version %s", name, ", ".join(map(str, self.previous.versions)))
            entry.versions, entry.trials = self.previous.versions, self.previous.trials
            entry.sources = self.previous.sources
            return entry
        for version, model in sorted(entry.versions.items()):
            if model is self.previous.versions.get(version):
                continue
            assert isinstance(model, Model)
            trial = entry.trials[version]
            line = "model %r version %d serves from %s: %s, ready after %.2f s"
            log.info(line, name, version, model.file, describe(model), trial.seconds)
            if trial.warning:
                log.warning("model %r version %d: %s", name, version, trial.warning)
        return entry


def load_models(
    configs: Iterable[ModelConfig],
    settings: LoadSettings,
    begin: Callable[[str, int], None] = lambda name, version: None,
    previous: ModelRegistry | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelRegistry:
    """Find, try and compile the versions that every model's policy selects; return them as a registry.

    A version that fails is listed with its reason, and the next one that the policy allows takes its place. Versions of
    the `previous` registry that have not changed are kept, and so are those of a model that cannot be loaded now.
    `begin` is called with name and version before each trial. Once `stop` returns True, nothing more is tried.
    """
    served = previous.entries if previous else {}
    candidates = [_Candidate(config, settings, served.get(config.name, Entry())) for config in configs]
    while tasks := [
        (candidate, version)
        for candidate in candidates
        for version in candidate.wanted()
        if version not in candidate.entry.versions and not candidate.reuse(version)
    ]:
        for start in range(0, len(tasks), _BATCH):
            _load_batch(tasks[start : start + _BATCH], settings.load_timeout, begin, stop)
    return ModelRegistry({candidate.config.name: candidate.finish() for candidate in candidates})


def _load_batch(
    versions: Sequence[tuple[_Candidate, int]],
    timeout: float,
    begin: Callable[[str, int], None],
    stop: Callable[[], bool],
) -> None:
    """Try versions and load those that pass."""
    with open_places(len(versions)) as places:
        tasks = [
            replace(candidate.task(version), place=place)
            for (candidate, version), place in zip(versions, places, strict=True)
        ]
        labels = [(candidate.config.name, version) for candidate, version in versions]
        results = run_trials(tasks, timeout, lambda index: begin(*labels[index]), stop)
        for (candidate, version), place, trial in zip(versions, places, results, strict=True):
            candidate.entry.trials[version] = trial
            if trial.is_changing:
                candidate.postpone(version, trial.reason)
            elif trial.reason:
                candidate.entry.failures[version] = trial.reason
            elif stop():  # called before each compilation, because it also looks after the workers
                candidate.entry.failures[version] = STOPPED
            else:
                seal(place)
                run_lowered(partial(candidate.load, version, trial.source))


def describe(model: Model) -> str:
    """Return a line with a model's inputs and outputs and how it is compiled."""
    inputs, outputs = model.metadata.inputs, model.metadata.outputs
    how = "compiled once for all workers" if model.compilation.shared else "compiled by each worker"
    state = "; its state is reset before each inference" if model.has_state else ""
    return f"{_describe(inputs)} -> {_describe(outputs)}; {how} ({model.compilation.reason}){state}"


def _describe(tensors: Mapping[str, TensorMetadata]) -> str:
    return ", ".join(f"{tensor.name} {tensor.datatype}{tensor.describe_shape()}" for tensor in tensors.values())


def _find_ignored(config: ModelConfig) -> tuple[str, ...]:
    notes = []
    if config.nireq:
        notes.append(
            f"nireq={config.nireq} is ignored: each worker runs one inference at a time; "
            "as many run in parallel as there are workers"
        )
    if config.allow_cache:
        notes.append("allow_cache=true is ignored: every compiled model may be cached")
    return tuple(notes)


def _asks_for_auto(config: ModelConfig) -> bool:
    shape = config.options.shape
    values = [config.options.batch_size, *(shape.values() if isinstance(shape, Mapping) else [shape])]
    return any(isinstance(value, str) and value.strip().lower() == "auto" for value in values)
