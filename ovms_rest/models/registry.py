"""The models that are configured: which versions of them serve, and why the others do not."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote as quote_path

from ovms_rest.errors import LoadError, NotFoundError, NotReadyError
from ovms_rest.models.compilation import Compilation
from ovms_rest.models.proving import Proof
from ovms_rest.models.repository import LATEST, VersionPolicy, parse_version
from ovms_rest.protocol.tensors import Array, ModelMetadata, Tensor
from ovms_rest.protocol.words import list_names, quote

log = logging.getLogger("gunicorn.error.ovms_rest")


class Servable(Protocol):
    """A version of a model or a pipeline. A pipeline is made of other servables, and is not compiled itself."""

    counters: Any

    @property
    def compilation(self) -> Compilation | None:
        """How it is compiled."""

    @property
    def file(self) -> Path | None:
        """What it was read from."""

    @property
    def input_layouts(self) -> Mapping[str, str | None]:
        """The layouts of its inputs by name, None where none is known."""

    @property
    def output_layouts(self) -> Mapping[str, str | None]:
        """The layouts of its outputs by name, None where none is known."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how it computes."""

    @property
    def parts(self) -> "Sequence[Servable]":
        """The models that it is made of."""

    @property
    def metadata(self) -> ModelMetadata:
        """What it takes and gives."""

    def open(self, retire: Callable[[], None]) -> None:
        """Make it ready in this process. Raises LoadError."""

    def infer(self, arrays: Mapping[str, Array]) -> Mapping[str, Tensor]:
        """Infer. Raises InferenceError."""


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
            raise NotFoundError(f"unknown model {quote(name)}; configured: {known}")
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
                if missing := [part for part in model.parts if not self._serves(part)]:
                    self.give_up(label, f"needs model {missing[0].metadata.name!r}, which does not serve")
                    continue
                try:
                    model.open(retire)
                except LoadError as error:
                    self.give_up(label, str(error))
        opening("")

    def _serves(self, part: Servable) -> bool:
        entry = self.entries.get(part.metadata.name)
        return entry is not None and part in entry.versions.values()

    def give_up(self, label: str, reason: str) -> None:
        """Stop serving a version, for good: in this process and in those forked from it later."""
        name, _, number = label.rpartition("/")
        entry = self.entries.get(name)
        log.error("version %s of %s %r is given up: %s", number, entry.kind if entry else "model", name, reason)
        if entry:  # which a reload may have replaced meanwhile
            entry.versions.pop(int(number), None)
            entry.failures[int(number)] = reason
