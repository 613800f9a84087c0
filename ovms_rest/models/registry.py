"""The models that are configured: which versions of them serve, and why the others do not."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote as quote_path

from ovms_rest.errors import LoadError, NotFoundError, NotReadyError
from ovms_rest.host.priority import run_lowered
from ovms_rest.host.throwaway import STOPPED
from ovms_rest.models.compilation import Compilation, plan_compilation
from ovms_rest.models.configuration import ModelConfig, check_values_of
from ovms_rest.models.copies import ChangingError, Source, open_places, seal
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.proving import Proof, Task, prove
from ovms_rest.models.repository import LATEST, VersionPolicy, find_model_file, find_versions, parse_version
from ovms_rest.models.runtime import DEFAULT_LIMITS, Model
from ovms_rest.models.servable import Servable
from ovms_rest.models.watching import stamp
from ovms_rest.protocol.tensors import TensorMetadata
from ovms_rest.protocol.words import list_names, quote

log = logging.getLogger("gunicorn.error.ovms_rest")

# So many versions are tried in one process, and their copies kept as long as that takes; each has two open files.
_BATCH = 64


@dataclass(slots=True)
class Entry:
    """What became of a configured model or pipeline.

    `versions` serve, `failures` should and do not, by number and reason; `reason` is why there are no versions at all.
    One that was unloaded has only `ended`, the versions that served.
    """

    versions: dict[int, Servable] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    proofs: dict[int, Proof] = field(default_factory=dict)
    # What the versions were made of: the same need not be made again.
    sources: dict[int, Any] = field(default_factory=dict)
    policy: VersionPolicy = LATEST
    ended: tuple[int, ...] = ()
    details: tuple[str, ...] = ()  # of which `reason` consists, when there are several
    # Whether files were being written when they were to be loaded, so that the load is to be repeated.
    is_changing: bool = False
    # A pipeline that only lacks models which were unloaded on purpose.
    lacks_unloaded: bool = False
    kind: Literal["model", "pipeline"] = "model"
    notes: tuple[str, ...] = ()  # what of its configuration has no effect

    def status(self) -> list[dict[str, Any]]:
        """Return the status of each version in OVMS's form."""
        if self.ended:
            return [
                {"version": str(number), "state": "END", "status": {"error_code": "OK", "error_message": "OK"}}
                for number in sorted(self.ended)
            ]
        numbers = sorted(self.versions.keys() | self.failures.keys())
        if self.reason and not numbers:
            numbers = [1]
        failed = "UNKNOWN" if self.kind == "model" else "FAILED_PRECONDITION"
        return [
            {
                "version": str(number),
                "state": "AVAILABLE" if number in self.versions else "LOADING",
                "status": {
                    "error_code": "OK" if number in self.versions else failed,
                    "error_message": self.failures.get(number, self.reason or "OK"),
                },
            }
            for number in numbers
        ]

    def readiness(self) -> dict[str, bool]:
        """Return every version that should serve, and whether it does.

        Nothing that was unloaded should, nor a pipeline that lacks nothing but such models. Where no version is known,
        it is version 1, as in `status`.
        """
        if self.ended or self.lacks_unloaded:
            return {}
        return {str(number): number in self.versions for number in sorted({*self.versions, *self.failures} or {1})}

    def explain(self) -> str:
        """Tell why the model does not serve."""
        return self.reason or "; ".join(f"version {version} {why}" for version, why in sorted(self.failures.items()))

    def end(self) -> "Entry":
        """Return what becomes of it when it is unloaded."""
        return Entry(ended=tuple(self.versions) or (1,), policy=self.policy, kind=self.kind)

    def problems(self, name: str) -> list[str]:
        """Tell what of the model of that name does not serve as it should."""
        whole = [f"{self.kind} {name!r}: {reason}" for reason in self.details or (self.reason,) if reason]
        return whole + [f"{self.kind} {name!r} version {number} {why}" for number, why in sorted(self.failures.items())]

    def differs(self, other: "Entry") -> bool:
        """Tell whether it serves something else than another, or something else is told of it."""
        return {number: id(model) for number, model in self.versions.items()} != {
            number: id(model) for number, model in other.versions.items()
        } or (self.failures, self.reason, self.ended, self.policy) != (
            other.failures,
            other.reason,
            other.ended,
            other.policy,
        )


class ModelRegistry:
    """The configured models and pipelines by name.

    The arbiter fills it before it forks; a worker only opens what it inherited, and gives up what does not come up.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Take what became of every model."""
        self.entries = dict(entries)

    def replace(self, other: "ModelRegistry") -> None:
        """Become another one; in the arbiter, for the workers that it forks from then on."""
        self.entries = other.entries

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's form, with the reason of what does not serve."""
        return {
            name: {"model_version_status": entry.status()}
            for name, entry in sorted(self.entries.items(), key=lambda item: item[0])
        }

    def problems(self) -> list[str]:
        """Tell what does not serve as it should."""
        return [problem for name, entry in self.entries.items() for problem in entry.problems(name)]

    def version_policy(self, name: str) -> dict[str, Any]:
        """Return the version policy of a model in the form of the config."""
        return self.entries[name].policy.to_json()

    def find(self, name: str, version: str | None = None, explain: bool = False) -> Servable:
        """Return the version asked for as the URL has it, None being the highest.

        Raises NotFoundError; why a model or version that is configured does not serve is told when asked to `explain`,
        for it may be OpenVINO's own text (protocol.md section 1).
        """
        entry = self.entries.get(name)
        if entry is None:
            known = list_names(self.entries) or "none"
            raise NotFoundError(f"model {quote(name)} is unknown; configured are {known}")
        if entry.ended:
            load = f"/v2/repository/models/{quote_path(name)}/load"
            raise NotFoundError(f"{entry.kind} {name!r} does not serve: it was unloaded; POST {load} serves it again")
        if not entry.versions:
            why = f": {entry.explain()}" if explain else f"; GET /v2/models/{quote_path(name)}/ready tells why"
            raise NotFoundError(f"{entry.kind} {name!r} does not serve{why}")
        number = max(entry.versions) if version is None else parse_version(version)
        if number not in entry.versions:
            why = f"is not served; served: {', '.join(self.versions(name))}"
            if number in entry.failures:
                ready = f"/v2/models/{quote_path(name)}/versions/{number}/ready"
                why = "does not serve" + (f": {entry.failures[number]}" if explain else f"; GET {ready} tells why")
            raise NotFoundError(f"version {quote(version or '')} of {entry.kind} {name!r} {why}")
        return entry.versions[number]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that serve, lowest first."""
        return [str(version) for version in sorted(self.entries[name].versions)]

    def check_ready(self) -> None:
        """Raise NotReadyError with names and reasons, unless a version of every configured model and pipeline serves.

        One that was unloaded is not expected to, nor is a pipeline that lacks nothing but such models.
        """
        missing = [
            f"{entry.kind} {name!r} does not serve: {entry.explain()}"
            for name, entry in self.entries.items()
            if not entry.versions and not entry.ended and not entry.lacks_unloaded
        ]
        if missing:
            raise NotReadyError("; ".join(missing))

    def open(self, opening: Callable[[str], None], retire: Callable[[], None]) -> None:
        """Make every model ready in this process, and then every pipeline whose models are.

        `opening` is called with a label of each version before it is begun with, which `give_up` understands, and with
        "" at the end; `retire` later, when a model has become unusable in this process.
        """
        for name, entry in self.entries.items():
            for version, model in list(entry.versions.items()):
                opening(label := f"{name}/{version}")
                if missing := [other for other in model.dependencies if not self._serves(other)]:
                    self.give_up(label, f"needs model {missing[0].metadata.name!r}, which does not serve")
                    continue
                try:
                    model.open(retire)
                except LoadError as error:
                    self.give_up(label, str(error))
        opening("")

    def _serves(self, model: Servable) -> bool:
        entry = self.entries.get(model.metadata.name)
        return entry is not None and model in entry.versions.values()

    def give_up(self, label: str, reason: str) -> None:
        """Stop serving a version, for good: in this process and in those forked from it later."""
        name, _, number = label.rpartition("/")
        entry = self.entries.get(name)
        log.error("version %s of %s %r is given up: %s", number, entry.kind if entry else "model", name, reason)
        if entry:  # which a reload may have replaced meanwhile
            entry.versions.pop(int(number), None)
            entry.failures[int(number)] = reason


class Host(NamedTuple):
    """What models are loaded for: usable cores, seconds to try one, OpenVINO's cache, limits of images.

    `cpu_extension` is the library with operations for models that name none of their own.
    """

    cores: int
    load_timeout: float = 300.0
    cache_dir: str = ""
    limits: ImageLimits = DEFAULT_LIMITS
    cpu_extension: str = ""


class _Candidate:
    """A configured model while it is being loaded."""

    def __init__(self, config: ModelConfig, host: Host, previous: Entry) -> None:
        self.config = config
        self.host = host
        self.previous = previous
        self.entry = Entry(policy=config.version_policy, notes=_find_ignored(config))
        self.paths: dict[int, Path] = {}
        self.plan: Compilation | None = None
        problems = check_values_of(config)
        if not config.remote:
            try:
                self.paths = find_versions(config.base_path)
            except LoadError as error:
                problems.append(str(error))
        if problems:
            self.fail(problems)
        else:
            self.plan = plan_compilation(config.target_device, config.plugin_config, host.cores, host.cache_dir)

    def fail(self, problems: Sequence[str]) -> None:
        """Keep why there are no versions at all."""
        self.entry.reason, self.entry.details = "; ".join(problems), tuple(problems)

    def wanted(self) -> list[int]:
        """Choose, of the versions that have not failed, those that the policy wants; highest first."""
        if self.plan is None:
            return []
        failed = self.entry.failures.keys() - self.entry.versions.keys()
        return self.config.version_policy.choose(self.paths.keys() - failed)

    def task(self, version: int) -> Task:
        """Describe a version."""
        assert self.plan is not None
        options = self.config.options
        options = replace(options, cpu_extension=options.cpu_extension or self.host.cpu_extension or None)
        return Task(self.paths[version], self.plan, options, self.host.limits)

    def postpone(self, version: int, reason: str) -> None:
        """Fail a version whose files are being written; one that serves goes on as it was, and no other replaces it."""
        self.entry.failures[version] = reason
        self.entry.is_changing = True
        if version in self.previous.versions:
            log.warning("version %d of model %r goes on as it was", version, self.config.name)
            self.entry.versions[version] = self.previous.versions[version]
            self.entry.proofs[version] = self.previous.proofs[version]
            self.entry.sources[version] = self.previous.sources.get(version)

    def reuse(self, version: int) -> bool:
        """Take over a version that serves already and has not changed since; tell whether there is such a one."""
        source = (self.task(version), stamp(self.paths[version]))
        self.entry.sources[version] = source
        if version not in self.previous.versions or self.previous.sources.get(version) != source:
            return False
        self.entry.versions[version] = self.previous.versions[version]
        self.entry.proofs[version] = self.previous.proofs[version]
        return True

    def load(self, version: int, source: Source | None) -> None:
        """Load a version that was proven, of the same source."""
        task = self.task(version)
        with suppress(LoadError):  # which may have gone meanwhile, and is looked for only to log what else lies there
            find_model_file(task.path)
        try:
            model = Model(self.config.name, version, task.path, task.compilation, task.options, task.limits, source)
            if task.compilation.shared:
                # The first inference lays out the weights of some models anew, which is then shared too: ResNet-50
                # with a dynamic batch takes 7 MB in each worker, and 60 without.
                model.open(lambda: None)
        except ChangingError as error:
            self.postpone(version, str(error))
        except LoadError as error:
            self.entry.failures[version] = str(error)
        else:
            self.entry.versions[version] = model
            if source and source.note:
                log.warning("version %d of model %r was %s", version, self.config.name, source.note)

    def finish(self) -> Entry:
        """Tell in the log what became of the model; it goes on as it was when nothing of it can be served now."""
        name, entry = self.config.name, self.entry
        if self.plan is not None and not entry.versions and not entry.failures:
            found = ", ".join(map(str, self.paths))
            self.fail([f"model_version_policy selects none of the available versions: {found}"])
        for reason in entry.details:
            log.error("model %r does not serve: %s", name, reason)
        for version, reason in sorted(entry.failures.items()):
            log.error("version %d of model %r does not serve: %s", version, name, reason)
        for note in (*(self.plan.notes if self.plan else ()), *entry.notes):
            log.info("model %r: %s", name, note)
        if self.config.options.shape is not None and self.config.options.batch_size is not None:
            both = "Both shape and batch size have been defined. Batch size parameter will be ignored."
            log.warning("model %r: %s", name, both)
        if _asks_for_auto(self.config):
            log.warning('model %r: "auto" is deprecated; any size is taken, as "-1" says', name)
        if not entry.versions and self.previous.versions:
            log.warning("model %r goes on as it was: version %s", name, ", ".join(map(str, self.previous.versions)))
            entry.versions, entry.proofs = self.previous.versions, self.previous.proofs
            entry.sources = self.previous.sources
            return entry
        for version, model in sorted(entry.versions.items()):
            if model is self.previous.versions.get(version):
                continue
            assert isinstance(model, Model)
            seconds = entry.proofs[version].seconds
            line = "model %r version %d serves from %s: %s, ready after %.2f s"
            log.info(line, name, version, model.file, describe(model), seconds)
            if warning := entry.proofs[version].warning:
                log.warning("model %r version %d: %s", name, version, warning)
        return entry


def load_models(
    configs: Iterable[ModelConfig],
    host: Host,
    begin: Callable[[str, int], None] = lambda name, version: None,
    previous: ModelRegistry | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelRegistry:
    """Find, prove and compile the versions that every model's policy wants.

    A version that fails is remembered with its reason, and another takes its place where the policy allows. What a
    `previous` registry serves already, unchanged, is taken over, and what it served goes on where nothing new can take
    its place. `begin` is called with name and version when the turn of one comes to be proven. When `stop` says
    so, no more are tried.
    """
    served = previous.entries if previous else {}
    candidates = [_Candidate(config, host, served.get(config.name, Entry())) for config in configs]
    while tasks := [
        (candidate, version)
        for candidate in candidates
        for version in candidate.wanted()
        if version not in candidate.entry.versions and not candidate.reuse(version)
    ]:
        for start in range(0, len(tasks), _BATCH):
            _load_batch(tasks[start : start + _BATCH], host, begin, stop)
    return ModelRegistry({candidate.config.name: candidate.finish() for candidate in candidates})


def _load_batch(
    versions: Sequence[tuple[_Candidate, int]],
    host: Host,
    begin: Callable[[str, int], None],
    stop: Callable[[], bool],
) -> None:
    """Prove versions and load those that pass."""
    with open_places(len(versions)) as places:
        tasks = [
            replace(candidate.task(version), place=place)
            for (candidate, version), place in zip(versions, places, strict=True)
        ]
        proofs = prove(
            tasks,
            host.load_timeout,
            lambda index: begin(versions[index][0].config.name, versions[index][1]),
            stop,
        )
        for (candidate, version), place, proof in zip(versions, places, proofs, strict=True):
            candidate.entry.proofs[version] = proof
            if proof.is_changing:
                candidate.postpone(version, proof.reason or "")
            elif proof.reason is not None:
                candidate.entry.failures[version] = proof.reason
            elif stop():  # asked for each, for it also looks after the workers, which a compilation keeps waiting
                candidate.entry.failures[version] = STOPPED
            else:
                if place:
                    seal(place)
                run_lowered(partial(candidate.load, version, proof.source))


def describe(model: Model) -> str:
    """Tell in a line what a model takes and gives and how it is compiled."""
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
            "as many run at once as there are workers"
        )
    if config.allow_cache:
        notes.append("allow_cache=true is ignored: whatever is compiled may be cached")
    return tuple(notes)


def _asks_for_auto(config: ModelConfig) -> bool:
    shape = config.options.shape
    values = [config.options.batch_size, *(shape.values() if isinstance(shape, Mapping) else [shape])]
    return any(isinstance(value, str) and value.strip().lower() == "auto" for value in values)
