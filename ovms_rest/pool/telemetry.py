"""What is counted over all workers, as statistics and metrics ask for it."""

from collections.abc import Mapping
from dataclasses import replace

from ovms_rest.errors import NotFoundError
from ovms_rest.memory import resident_bytes
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.pool.counters import Counters
from ovms_rest.pool.table import SLOTS, WorkerTable
from ovms_rest.serving.metrics import ProcessState, WorkerState
from ovms_rest.serving.statistics import ModelStatistics


class Telemetry:
    """The counters of all models, and the state of the workers; made in the arbiter before it forks."""

    def __init__(self, models: ModelRegistry, max_waiting: int) -> None:
        """Take what serves, and how many requests may wait in a worker."""
        self.counters = Counters(SLOTS)
        self.table: WorkerTable | None = None  # set by a hook; without it nothing is known of the workers
        self._models = models
        self._max_waiting = max_waiting

    def count(self, entries: Mapping[str, Entry]) -> None:
        """Give every model and pipeline its counters; in the arbiter."""
        for name, entry in entries.items():
            for version, model in entry.versions.items():
                model.counters = self.counters.of(name, str(version))

    def forget_gone(self) -> None:
        """Forget what was counted of versions that are not configured any more; in the arbiter."""
        self.counters.keep(
            {
                (name, str(version))
                for name, entry in self._models.entries.items()
                for version in (*entry.versions, *entry.failures, *entry.ended)
            }
        )

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the sums over all workers, of all models or of what is asked for. Raises NotFoundError."""
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
        """Return how many inferences run at once."""
        return 1 if self.table is None else self.table.streams()

    def is_ending(self) -> bool:
        """Tell whether the service ends."""
        return self.table is not None and self.table.is_ending()

    def process_state(self) -> ProcessState:
        """Return the state of the workers."""
        if self.table is None:
            return ProcessState()
        workers = [
            WorkerState(str(worker.row), not worker.idle_since, worker.connections, _resident(worker.pid))
            for worker in self.table.workers()
        ]
        return ProcessState(workers, self.table.deaths(), self.table.generation(), self.table.outgrown())


class ServedStatistics:
    """The statistics of the versions that serve."""

    def __init__(self, telemetry: Telemetry, models: ModelRegistry) -> None:
        """Take all that is counted, and what serves."""
        self._telemetry = telemetry
        self._models = models

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the sums over all workers. Raises NotFoundError for what does not serve."""
        if name is not None:
            self._models.find(name, version, explain=True)
        return [item for item in self._telemetry.statistics(name, version) if self._serves(item)]

    def _serves(self, item: ModelStatistics) -> bool:
        try:
            self._models.find(item.name, item.version)
        except NotFoundError:
            return False
        return True


def _resident(pid: int) -> int | None:
    """Return the bytes that a process has resident, None when it is gone."""
    try:
        return resident_bytes(pid)
    except OSError:
        return None
