"""The state of the service's processes and models, as metrics show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker: its label, whether it is busy, and its resources; None if unknown."""

    worker: str
    busy: bool | None = None
    connections: int | None = None
    resident_bytes: int | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The processes of the service; None if unknown.

    The memory is that of the host or of the tightest control group.
    """

    workers: Sequence[WorkerState] = ()
    restarts: int | None = None
    generation: int | None = None
    outgrown: int | None = None
    memory_limit_bytes: int | None = None
    memory_available_bytes: int | None = None


class Readiness(NamedTuple):
    """Whether a version of a model or pipeline serves that should."""

    name: str
    version: str
    is_ready: bool
