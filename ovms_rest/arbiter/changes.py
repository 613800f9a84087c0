"""Changes as functions: each takes the description of what is wanted and returns the next, with the registry's entries.

An error leaves both as they were. If an unloaded model cannot be loaded, it stays unloaded, and its entry has the
reasons. Models given or unloaded by call are known here alone, until the service ends.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ovms_rest.config import Config, parse_model
from ovms_rest.errors import ForbiddenError, InvalidConfigError, LoadFailedError, NotFoundError
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.registry import Entry
from ovms_rest.models.roots import Roots, check_paths
from ovms_rest.models.watching import CHANGING, Stamp, stamp
from ovms_rest.pipelines.definition import Library, PipelineDefinition
from ovms_rest.protocol.words import list_names, quote

Entries = dict[str, Entry]
Housekeeping = Callable[[], bool]  # runs the arbiter's, and returns whether shutdown was requested
LoadModels = Callable[[Sequence[ModelConfig], Mapping[str, Entry], Housekeeping], Entries]
Assemble = Callable[
    [Sequence[PipelineDefinition], Mapping[str, Library], Mapping[str, Entry], Mapping[str, Entry], Housekeeping],
    Entries,
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The models and pipelines to serve: those in the config file at `path`, and what calls changed.

    `given` models come with a configuration by call; `unloaded` models and pipelines are known and not served. `stamps`
    are those of the files when they were loaded.
    """

    path: Path
    configured: Mapping[str, ModelConfig] = field(default_factory=dict)
    given: Mapping[str, ModelConfig] = field(default_factory=dict)
    unloaded: frozenset[str] = frozenset()
    pipelines: Mapping[str, PipelineDefinition] = field(default_factory=dict)
    libraries: Mapping[str, Library] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """All models by name, the unloaded ones included."""
        return {**self.configured, **self.given}

    def with_stamps(self, stamps: Mapping[Path, Stamp], entries: Mapping[str, Entry]) -> "Wanted":
        """Return it with these stamps, but CHANGING for files being written while these entries were loaded."""
        changing = {name for name, entry in entries.items() if entry.is_changing}
        models = self.models
        nodes = [node for name in changing & self.pipelines.keys() for node in self.pipelines[name].nodes]
        paths = {models[name].base_path for name in changing & models.keys()} | {
            self.libraries[node.library].path for node in nodes if node.library in self.libraries
        }
        return replace(self, stamps={**self.stamps, **stamps, **dict.fromkeys(paths, CHANGING)})


@dataclass(frozen=True, slots=True)
class Loader:
    """Makes entries, and keeps those of the registry, `entries`, whose files and configuration did not change.

    `load` and `assemble` make models and pipelines. They call `housekeep` often, and end early when it returns True.
    """

    load: LoadModels
    assemble: Assemble
    entries: Mapping[str, Entry]
    housekeep: Housekeeping

    def load_models(self, configs: Sequence[ModelConfig]) -> Entries:
        """Return the entries of these models."""
        return self.load(configs, self.entries, self.housekeep)

    def assemble_pipelines(
        self, pipelines: Iterable[PipelineDefinition], libraries: Mapping[str, Library], models: Mapping[str, Entry]
    ) -> Entries:
        """Return the entries of these pipelines."""
        return self.assemble(list(pipelines), libraries, models, self.entries, self.housekeep)

    def select(self, names: Iterable[str]) -> Entries:
        """Return the registry's entries of these names, where there are any."""
        return {name: self.entries[name] for name in names if name in self.entries}

    def join(self, models: Entries, wanted: Wanted) -> Entries:
        """Return models with the wanted pipelines, assembled of them; unloaded pipelines stay as they are."""
        selected = [pipeline for name, pipeline in wanted.pipelines.items() if name not in wanted.unloaded]
        assembled = self.assemble_pipelines(selected, wanted.libraries, models)
        return models | {name: assembled.get(name) or self.entries[name] for name in wanted.pipelines}


def load(wanted: Wanted, file: Config, now: Stamp, loader: Loader) -> tuple[Wanted, Entries]:
    """Load all files that changed; `now` is the stamp of the config file, taken before it was read."""
    configured = {model.name: model for model in file.models}
    pipelines = {pipeline.name: pipeline for pipeline in file.pipelines}
    gone = (wanted.configured.keys() - configured.keys()) | pipelines.keys()
    given = {name: model for name, model in wanted.given.items() if name not in gone}
    models = configured | given
    unloaded = wanted.unloaded & (models.keys() | pipelines.keys())
    selected = [model for name, model in models.items() if name not in unloaded]
    paths = [*(model.base_path for model in selected), *(library.path for library in file.libraries.values())]
    stamps = {wanted.path: now} | {path: stamp(path) for path in paths}
    after = Wanted(wanted.path, configured, given, unloaded, pipelines, file.libraries)
    loaded = loader.load_models(selected)
    entries = loader.join({name: loaded.get(name) or loader.entries[name] for name in models}, after)
    return after.with_stamps(stamps, entries), entries


def load_model(
    wanted: Wanted,
    file: Config,
    name: str,
    given: dict[str, Any] | None,
    find_roots: Callable[[Iterable[ModelConfig]], Roots],
    loader: Loader,
) -> tuple[Wanted, Entries]:
    """Load one model or pipeline as the config file says, or a model with the `given` configuration.

    `find_roots` returns the paths that a call may name. Raises ConfigError, NotFoundError, ForbiddenError,
    InvalidConfigError, and LoadFailedError for a `given` configuration of a model that is not unloaded. An unloaded one
    stays so if it cannot be loaded.
    """
    if pipeline := next((pipeline for pipeline in file.pipelines if pipeline.name == name), None):
        return _load_pipeline(wanted, file, pipeline, given, loader)
    if name in wanted.pipelines:
        raise NotFoundError(f"pipeline {name!r} is not in {wanted.path} any more")
    configured = {model.name: model for model in file.models}
    config = configured.get(name) or wanted.given.get(name)
    if given is not None:
        config = parse_model(name, given, wanted.path.parent, config)
        if outside := list(check_paths(given, config, find_roots(file.models))):
            raise ForbiddenError("; ".join(outside))
    elif config is None:
        known = list_names(configured) or "none"
        raise NotFoundError(f"model {quote(name)} is not in {wanted.path}; it has {known}")
    now = stamp(config.base_path)
    entry = loader.load_models([config])[name]
    problems = entry.problems(name)
    if problems and name in wanted.unloaded:
        return wanted, _keep_unloaded(name, entry, loader)
    if problems and given is not None:
        raise LoadFailedError("; ".join(problems))
    is_given = given is not None or name not in configured
    others = {other: model for other, model in wanted.given.items() if other != name}
    after = replace(
        wanted,
        configured={**wanted.configured, name: configured[name]} if name in configured else wanted.configured,
        given={**others, name: config} if is_given else others,
        unloaded=wanted.unloaded - {name},
    )
    entries = loader.join({**loader.select(wanted.models), name: entry}, after)
    return after.with_stamps({config.base_path: now}, {name: entry}), entries


def _load_pipeline(
    wanted: Wanted, file: Config, pipeline: PipelineDefinition, given: dict[str, Any] | None, loader: Loader
) -> tuple[Wanted, Entries]:
    """Load a pipeline as the config file says, with its libraries."""
    name = pipeline.name
    if given is not None:
        raise InvalidConfigError(f"{name!r} is a pipeline; parameters.config is for models only")
    own = {node.library: file.libraries[node.library] for node in pipeline.nodes if node.library in file.libraries}
    stamps = {library.path: stamp(library.path) for library in own.values()}
    entry = loader.assemble_pipelines([pipeline], own, loader.select(wanted.models))[name]
    if name in wanted.unloaded and entry.problems(name):
        return wanted, _keep_unloaded(name, entry, loader)
    after = replace(
        wanted,
        unloaded=wanted.unloaded - {name},
        pipelines={**wanted.pipelines, name: pipeline},
        libraries={**wanted.libraries, **own},
    )
    return after.with_stamps(stamps, {name: entry}), {**loader.entries, name: entry}


def _keep_unloaded(name: str, failed: Entry, loader: Loader) -> Entries:
    """Return the registry's entries, that of an unloaded model or pipeline with the reasons why its load failed."""
    return {**loader.entries, name: loader.entries[name].fail(failed)}


def unload_model(wanted: Wanted, name: str, dependents: bool, loader: Loader) -> tuple[Wanted, Entries]:
    """Unload a model or a pipeline, with `dependents` also the pipelines that use it. Raises NotFoundError."""
    models = wanted.models
    if name not in models and name not in wanted.pipelines:
        raise NotFoundError(f"unknown model {quote(name)}")
    names = {name}
    if dependents:
        for pipeline in wanted.pipelines.values():
            if any(node.model == name for node in pipeline.nodes):
                names.add(pipeline.name)
    entries = {**loader.entries, **{other: loader.entries[other].end() for other in names}}
    unloaded = wanted.unloaded | names
    kept = {wanted.path, *(library.path for library in wanted.libraries.values())}
    kept |= {model.base_path for other, model in models.items() if other not in unloaded}
    stamps = {path: known for path, known in wanted.stamps.items() if path in kept}
    after = replace(wanted, unloaded=unloaded, stamps=stamps)
    joined = loader.join({other: entries[other] for other in models}, after)
    return after, {other: entries[other] if other in unloaded else entry for other, entry in joined.items()}


def differ(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> bool:
    """Return whether other versions serve, or other statuses are reported, or in another order."""
    return list(before) != list(after) or any(after[name].differs(entry) for name, entry in before.items())
