"""The interfaces of one version that serves, a compiled model or a pipeline, and of the registry that finds it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ovms_rest.protocol.tensors import Array, ModelMetadata, Tensor
from ovms_rest.shared_memory.statistics import FailureKind, InferenceRecord, Question


class InferenceCounters(Protocol):
    """The counters of one version; all times are nanoseconds."""

    def begin(self) -> None:
        """Note another inference in progress, until `record` or `fail` is called for it."""

    def record(self, record: InferenceRecord) -> None:
        """Count an inference that succeeded."""

    def fail(self, kind: FailureKind, total_ns: int) -> None:
        """Count an inference in progress that was refused or failed."""

    def refuse(self, kind: FailureKind, total_ns: int) -> None:
        """Count an inference that was refused before it began."""

    def answer(self, question: Question) -> None:
        """Count a request for the metadata or the readiness."""


class Servable(Protocol):
    """A version of a model or a pipeline; `counters` is NOT_COUNTED until the arbiter gives it counters."""

    counters: InferenceCounters

    @property
    def metadata(self) -> ModelMetadata:
        """Its name, version, inputs and outputs."""

    @property
    def dependencies(self) -> "Sequence[Servable]":
        """The models that must serve for it to serve: those of a pipeline's nodes."""

    def open(self, retire: Callable[[], None]) -> None:
        """Make it ready in this process; `retire` is called once it becomes unusable here. Raises LoadError."""

    @property
    def example(self) -> Mapping[str, Array] | None:
        """Inputs by name that it has computed before it serves, None if there are none."""

    @property
    def batch_limit(self) -> int:
        """The most rows that it, or one of its models, infers together; 0 if every request is inferred alone."""

    def infer(self, arrays: Mapping[str, Array], record: InferenceRecord | None = None) -> Mapping[str, Tensor]:
        """Infer with an array for every input; return a tensor for every output, by name.

        If the inference is shared with other requests, the record gets how.

        The next inference may overwrite the memory of the tensors. Raises InferenceError.
        """


class Registry(Protocol):
    """The served models and pipelines."""

    def find(self, name: str, version: str | None = None, explain: bool = False) -> Servable:
        """Return a version, the highest for None. Raises NotFoundError, with the reason if `explain` is true."""

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that serve, lowest first."""

    def check_ready(self) -> None:
        """Raise NotReadyError unless everything configured serves."""


class _NotCounted:
    """Counters that count nothing."""

    def _ignore(self, *args: object) -> None:
        pass

    begin = record = fail = refuse = answer = _ignore


NOT_COUNTED: InferenceCounters = _NotCounted()
