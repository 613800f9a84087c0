"""The state of the processes and models of the service, as metrics show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker: the label it is told by, whether it is at work, what it holds; None is not told."""

    worker: str
    busy: bool | None = None
    connections: int | None = None
    resident_bytes: int | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The processes of the service; None is not told.

    The memory is that of the host or of the tightest control group.
    """

    workers: Sequence[WorkerState] = ()
    restarts: int | None = None
    generation: int | None = None
    outgrown: int | None = None
    memory_limit_bytes: int | None = None
    memory_available_bytes: int | None = None


class Readiness(NamedTuple):
    """Whether a version of a model or pipeline that should serve does."""

    name: str
    version: str
    is_ready: bool
