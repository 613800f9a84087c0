"""The registry of configured models and pipelines: the versions that serve, and the reasons why others do not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote as quote_path

from ovms_rest.errors import LoadError, NotFoundError, NotReadyError
from ovms_rest.log import log
from ovms_rest.models.repository import LATEST, VersionPolicy, parse_version
from ovms_rest.models.servable import Servable
from ovms_rest.models.trials import TrialResult
from ovms_rest.protocol.words import list_names, quote


@dataclass(slots=True)
class Entry:
    """The state of a configured model or pipeline.

    `versions` serve; `failures` has the reasons of those that should and do not, by number; `reason` says why there are
    no versions at all. An unloaded model has `ended`, the versions that served before, and no `versions`; if it could
    not be loaded again, `failures` or `reason` say why.
    """

    versions: dict[int, Servable] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    trials: dict[int, TrialResult] = field(default_factory=dict)
    # The configuration and stamp that each version was made of; unchanged ones are not made again.
    sources: dict[int, Any] = field(default_factory=dict)
    policy: VersionPolicy = LATEST
    ended: tuple[int, ...] = ()
    details: tuple[str, ...] = ()  # the single problems that `reason` joins
    # Whether files were being written during the load, so that it has to be repeated.
    is_changing: bool = False
    # Whether a pipeline fails only because its models were unloaded on purpose.
    lacks_unloaded: bool = False
    kind: Literal["model", "pipeline"] = "model"
    notes: tuple[str, ...] = ()  # about settings without effect
    example: dict[str, Any] | None = None  # the request in the file that the configuration names

    def status(self) -> list[dict[str, Any]]:
        """Return the status of each version in OVMS's format."""
        numbers = sorted({*self.versions, *self.failures, *self.ended})
        if self.reason and not numbers:
            numbers = [1]
        return [self._status_of(number) for number in numbers]

    def _status_of(self, number: int) -> dict[str, Any]:
        reason = self.failures.get(number, self.reason)
        if number in self.versions:
            state, code = "AVAILABLE", "OK"
        elif number in self.ended and not reason:
            state, code = "END", "OK"
        else:
            state, code = "LOADING", "UNKNOWN" if self.kind == "model" else "FAILED_PRECONDITION"
        return {"version": str(number), "state": state, "status": {"error_code": code, "error_message": reason or "OK"}}

    def readiness(self) -> dict[str, bool]:
        """Return whether each version that should serve does.

        Unloaded models, and pipelines that lack only such models, are not expected to serve. If no version is known,
        version 1 stands for them, as in `status`.
        """
        if self.ended or self.lacks_unloaded:
            return {}
        return {str(number): number in self.versions for number in sorted({*self.versions, *self.failures} or {1})}

    def explain(self) -> str:
        """Return the reason why the model does not serve."""
        return self.reason or "; ".join(f"version {version} {why}" for version, why in sorted(self.failures.items()))

    def end(self) -> "Entry":
        """Return the entry of the same model once it is unloaded."""
        return Entry(ended=tuple(self.versions) or self.ended or (1,), policy=self.policy, kind=self.kind)

    def fail(self, failed: "Entry") -> "Entry":
        """Return the entry of the same unloaded model, with the reasons in that of a load that failed."""
        return replace(self, failures=failed.failures, reason=failed.reason, details=failed.details)

    def problems(self, name: str) -> list[str]:
        """Return a line for each problem of the model of that name."""
        whole = [f"{self.kind} {name!r}: {reason}" for reason in self.details or (self.reason,) if reason]
        return whole + [f"{self.kind} {name!r} version {number} {why}" for number, why in sorted(self.failures.items())]

    def differs(self, other: "Entry") -> bool:
        """Return whether this entry serves other versions than another, or reports other reasons."""
        return self._outcome() != other._outcome()

    def _outcome(self) -> tuple[object, ...]:
        versions = {number: id(model) for number, model in self.versions.items()}
        return versions, self.failures, self.reason, self.ended, self.policy, self.example


class ModelRegistry:
    """The configured models and pipelines by name.

    The arbiter fills it before it forks; a worker opens the inherited versions, and gives up those that fail to open.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def replace(self, other: "ModelRegistry") -> None:
        """Take over the entries of another registry; in the arbiter, for the workers forked from then on."""
        self.entries = other.entries

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's format, with the reasons of those that do not serve."""
        return {
            name: {"model_version_status": entry.status()}
            for name, entry in sorted(self.entries.items(), key=lambda item: item[0])
        }

    def problems(self) -> list[str]:
        """Return a line for each problem of any model or pipeline that is expected to serve."""
        return [problem for name, entry in self.entries.items() if not entry.ended for problem in entry.problems(name)]

    def version_policy(self, name: str) -> dict[str, Any]:
        """Return the version policy of a model in the format of the config."""
        return self.entries[name].policy.to_json()

    def find(self, name: str, version: str | None = None, explain: bool = False) -> Servable:
        """Return the version with the number in the URL, or the highest if the URL has none.

        Raises NotFoundError. The reason why a configured version does not serve is included only with `explain`, since
        it may be OpenVINO's own text (protocol/README.md section 1, "Routes").
        """
        entry = self.entries.get(name)
        if entry is None:
            known = list_names(self.entries) or "none"
            raise NotFoundError(f"unknown model {quote(name)}; configured: {known}")
        if entry.ended:
            load = f"/v2/repository/models/{quote_path(name)}/load"
            why = "it was unloaded"
            if reason := entry.explain():
                ready = f"GET /v2/models/{quote_path(name)}/ready says why"
                why += f", and could not be loaded again{f': {reason}' if explain else f' ({ready})'}"
            raise NotFoundError(f"{entry.kind} {name!r} does not serve: {why}; POST {load} serves it again")
        if not entry.versions:
            why = f": {entry.explain()}" if explain else f"; GET /v2/models/{quote_path(name)}/ready says why"
            raise NotFoundError(f"{entry.kind} {name!r} does not serve{why}")
        number = max(entry.versions) if version is None else parse_version(version)
        if number not in entry.versions:
            why = f"is not served; served: {', '.join(self.versions(name))}"
            if number in entry.failures:
                ready = f"/v2/models/{quote_path(name)}/versions/{number}/ready"
                why = "does not serve" + (f": {entry.failures[number]}" if explain else f"; GET {ready} says why")
            raise NotFoundError(f"version {quote(version or '')} of {entry.kind} {name!r} {why}")
        return entry.versions[number]

    def versions(self, name: str) -> list[str]:
        """Return the served versions of a model, lowest first."""
        return [str(version) for version in sorted(self.entries[name].versions)]

    def check_ready(self) -> None:
        """Raise NotReadyError with names and reasons, unless a version of every configured model and pipeline serves.

        Unloaded models, and pipelines that lack only such models, are not expected to serve.
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

        `opening` is called with the label of each version before it is opened (`give_up` takes such a label), and with
        "" at the end; `retire` is called later, if a model becomes unusable in this process.
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
        """Stop serving a version for good, in this process and in those forked from it later."""
        name, _, number = label.rpartition("/")
        entry = self.entries.get(name)
        log.error("version %s of %s %r is given up: %s", number, entry.kind if entry else "model", name, reason)
        if entry:  # a reload may have removed it meanwhile
            entry.versions.pop(int(number), None)
            entry.failures[int(number)] = reason
