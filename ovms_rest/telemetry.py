"""Statistics over all workers and the state of the processes, for the statistics extension and the metrics."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ovms_rest.errors import NotFoundError
from ovms_rest.host.host_memory import read_host_memory
from ovms_rest.host.process_memory import resident_bytes
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.shared_memory.counters import Counters
from ovms_rest.shared_memory.statistics import ModelStatistics, ProcessState, Readiness, WorkerState
from ovms_rest.shared_memory.table import SLOTS, WorkerRow, WorkerTable
from ovms_rest.tracing.channel import SpanCounters

T = TypeVar("T")


class Telemetry:
    """The counters of all models, and the state of the workers; made in the arbiter before it forks.

    While no worker has a row in the table, as in an application that another WSGI server runs, their state is unknown.
    """

    def __init__(
        self, models: ModelRegistry, table: WorkerTable, max_waiting: int, spans: SpanCounters | None = None
    ) -> None:
        self.counters = Counters(SLOTS)
        self._models = models
        self._table = table
        self._max_waiting = max_waiting
        self._spans = spans

    def count(self, entries: Mapping[str, Entry]) -> None:
        """Give every version its counters; in the arbiter."""
        for name, entry in entries.items():
            for version, model in entry.versions.items():
                model.counters = self.counters.of(name, str(version))

    def forget_gone(self) -> None:
        """Drop the counters of versions that are not configured any more; in the arbiter."""
        self.counters.keep(
            {
                (name, str(version))
                for name, entry in self._models.entries.items()
                for version in (*entry.versions, *entry.failures, *entry.ended)
            }
        )

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the sums over all workers, of all models, one model or one version. Raises NotFoundError."""
        workers = self.streams()
        pipelines = {name for name, entry in self._models.entries.items() if entry.kind == "pipeline"}
        return [
            replace(
                model,
                is_pipeline=model.name in pipelines,
                streams=workers,
                queue_size=workers * self._max_waiting,
            )
            for model in self.counters.statistics(name, version)
        ]

    def streams(self) -> int:
        """Return the number of inferences that run in parallel."""
        return self._table.streams() if self._table.is_used() else 1

    def is_ending(self) -> bool:
        """Return whether the service is shutting down."""
        return self._table.is_ending()

    def process_state(self) -> ProcessState:
        """Return the state of the workers."""
        limit, available = read_host_memory()
        state = ProcessState(memory_limit_bytes=limit, memory_available_bytes=available)
        if not self._table.is_used():
            return state
        workers = [_describe(worker) for worker in self._table.workers()]
        return replace(
            state,
            workers=workers,
            restarts=self._table.deaths(),
            generation=self._table.generation(),
            outgrown=self._table.outgrown(),
            spans=None if self._spans is None else self._spans.read(),
        )

    def readiness(self) -> list[Readiness]:
        """Return the versions that should serve, and whether each does."""
        return [
            Readiness(name, version, is_ready)
            for name, entry in self._models.entries.items()
            for version, is_ready in entry.readiness().items()
        ]


class ServedStatistics:
    """The statistics of the versions that serve."""

    def __init__(self, telemetry: Telemetry, models: ModelRegistry) -> None:
        self._telemetry = telemetry
        self._models = models

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the sums over all workers. Raises NotFoundError for a model or version that does not serve."""
        if name is not None:
            self._models.find(name, version, explain=True)
        return [item for item in self._telemetry.statistics(name, version) if self._serves(item)]

    def _serves(self, item: ModelStatistics) -> bool:
        try:
            self._models.find(item.name, item.version)
        except NotFoundError:
            return False
        return True


def _describe(worker: WorkerRow) -> WorkerState:
    """Describe a worker. The control worker is never noted as idle, so that no connection is left to it: not busy."""
    return WorkerState(
        str(worker.row),
        None if worker.control else not worker.idle_since,
        max(0, worker.connections),
        _measure(resident_bytes, worker.pid),
        _measure(_cpu_seconds, worker.pid),
    )


def _cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process (proc(5)). Raises OSError if the process is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # without the id and the name
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _measure(measure: Callable[[int], T], pid: int) -> T | None:
    """Measure a process; return None if it is gone."""
    try:
        return measure(pid)
    except OSError:
        return None
