"""Counters of every model version, in memory shared by all processes.

Every version has a table with a row for each worker slot, which the arbiter creates before it forks. A worker writes
only its own row, without a lock; readers sum the rows. The counts of a worker that died stay, and its successor in the
slot adds to them, so that totals never fall.

A number takes eight bytes at a multiple of eight, which memoryview and numpy copy as a whole; `struct` with a byte
order would copy single bytes, and readers would see halves.
"""

import mmap
import time
from bisect import bisect_left
from collections.abc import Set
from typing import Final

import numpy as np

from ovms_rest.errors import NotFoundError
from ovms_rest.protocol.words import quote
from ovms_rest.shared_memory.statistics import (
    APIS,
    BATCH_BOUNDS,
    BOUNDS,
    FAILURE_KINDS,
    QUESTIONS,
    Api,
    BatchStatistics,
    Duration,
    FailureKind,
    Histogram,
    InferenceRecord,
    ModelStatistics,
    Outcomes,
    Question,
)

_BOUNDS_NS = tuple(bound * 1000 for bound in BOUNDS)
_BUCKETS: Final = len(BOUNDS) + 1
# The number of batch sizes counted separately in a row; later ones are counted together.
BATCH_SIZES: Final = 16

# The columns of a row. At _BATCHES begins an entry for each batch size and one for all others, whose size is 0.
_ACTIVE, _LAST_NS, _INFERENCES, _QUEUE_NS, _REQUEST_BYTES, _RESPONSE_BYTES, _CRASHES, _FAILURES = range(8)
_QUESTIONS: Final = _FAILURES + 2 * len(FAILURE_KINDS)
_API_FAILURES: Final = _QUESTIONS + len(QUESTIONS)
# A histogram for each API, which also counts the successes.
_REQUEST_TIME: Final = _API_FAILURES + len(APIS)
_INFERENCE_TIME: Final = _REQUEST_TIME + len(APIS) * _BUCKETS
_QUEUE_TIME: Final = _INFERENCE_TIME + _BUCKETS
# Requests that were inferred in a batch for which another one accounts: their number, and ns as in an entry.
_FOLLOWERS: Final = _QUEUE_TIME + _BUCKETS
# The sizes of batches, of models that infer such: a column for up to 1, 2, 4 and so on rows, and all rows.
_BATCH_SIZE: Final = _FOLLOWERS + 4
_BATCH_ROWS: Final = _BATCH_SIZE + len(BATCH_BOUNDS)
_BATCHES: Final = _BATCH_ROWS + 1
_ENTRY: Final = 5  # size, count, and nanoseconds of input, infer and output
_OTHERS: Final = _BATCHES + BATCH_SIZES * _ENTRY
# Rows begin on a cache line, so that workers do not compete for one.
_COLUMNS: Final = -(-(_OTHERS + _ENTRY) // 8) * 8

# The same columns as an entry, without its size.
_FOLLOWER_ENTRY: Final = _FOLLOWERS - 1

_FAILURE_COLUMNS = {kind: _FAILURES + 2 * index for index, kind in enumerate(FAILURE_KINDS)}
_API_FAILURE_COLUMNS = {api: _API_FAILURES + index for index, api in enumerate(APIS)}
_REQUEST_TIME_COLUMNS = {api: _REQUEST_TIME + index * _BUCKETS for index, api in enumerate(APIS)}
_QUESTION_COLUMNS = {question: _QUESTIONS + index for index, question in enumerate(QUESTIONS)}


class ModelCounters:
    """The counters of a version: the row that this process writes, and the sums of all rows."""

    def __init__(self, name: str, version: str, slots: int, claimed: mmap.mmap) -> None:
        """Allocate the table; pages that no worker writes take no memory. `claimed` has a byte for each slot."""
        self.name = name
        self.version = version
        self._claimed = claimed
        self._numbers = memoryview(mmap.mmap(-1, slots * _COLUMNS * 8)).cast("Q")
        self._rows = np.frombuffer(self._numbers, np.uint64).reshape(slots, _COLUMNS)
        self._row = self._numbers[:_COLUMNS]
        self._entries: dict[int, int] = {}

    def claim(self, slot: int) -> None:
        """Write the row of this slot from now on, adding to its counts."""
        self._row = row = self._numbers[slot * _COLUMNS : (slot + 1) * _COLUMNS]
        self._entries = {row[entry]: entry for entry in range(_BATCHES, _OTHERS, _ENTRY) if row[entry]}
        self.release(slot)

    def release(self, slot: int) -> None:
        """Clear the inferences in progress of this slot."""
        self._numbers[slot * _COLUMNS + _ACTIVE] = 0

    def count_crash(self, slot: int) -> None:
        """Count the worker of this slot, which died while it inferred; in the arbiter."""
        self._numbers[slot * _COLUMNS + _CRASHES] += 1

    def begin(self) -> None:
        """Note another inference in progress in this process, until `record` or `fail` is called for it."""
        self._row[_ACTIVE] += 1

    def record(self, record: InferenceRecord) -> None:
        """Count a successful inference."""
        row, infer_ns, queue_ns = self._row, record.infer_ns, record.queue_ns
        size = record.batch
        if record.executed_rows is not None:
            size = record.executed_rows
            self._count_batch(size)
        entry = _FOLLOWER_ENTRY if record.is_follower else self._entries.get(size) or self._add_entry(size)
        row[entry + 1] += 1
        row[entry + 2] += record.input_ns
        row[entry + 3] += infer_ns
        row[entry + 4] += record.output_ns
        total_ns = queue_ns + record.input_ns + infer_ns + record.output_ns
        row[_REQUEST_TIME_COLUMNS[record.api] + bisect_left(_BOUNDS_NS, total_ns)] += 1
        row[_INFERENCE_TIME + bisect_left(_BOUNDS_NS, infer_ns)] += 1
        row[_QUEUE_TIME + bisect_left(_BOUNDS_NS, queue_ns)] += 1
        row[_QUEUE_NS] += queue_ns
        row[_INFERENCES] += record.batch
        row[_REQUEST_BYTES] += record.request_bytes
        row[_RESPONSE_BYTES] += record.response_bytes
        row[_LAST_NS] = time.time_ns()
        if row[_ACTIVE]:
            row[_ACTIVE] -= 1

    def _count_batch(self, rows: int) -> None:
        if rows:
            self._row[_BATCH_SIZE + (rows - 1).bit_length()] += 1
            self._row[_BATCH_ROWS] += rows

    def _add_entry(self, batch: int) -> int:
        """Return the column of the entry for a new batch size."""
        if not batch or len(self._entries) == BATCH_SIZES:
            return _OTHERS
        entry = self._entries[batch] = _BATCHES + len(self._entries) * _ENTRY
        self._row[entry] = batch
        return entry

    def fail(self, kind: FailureKind, total_ns: int, api: Api = "KServe") -> None:
        """Count an inference in progress that was refused or failed."""
        if self._row[_ACTIVE]:
            self._row[_ACTIVE] -= 1
        self.refuse(kind, total_ns, api)

    def refuse(self, kind: FailureKind, total_ns: int, api: Api = "KServe") -> None:
        """Count an inference that was refused before it began."""
        column = _FAILURE_COLUMNS[kind]
        self._row[column] += 1
        self._row[column + 1] += total_ns
        self._row[_API_FAILURE_COLUMNS[api]] += 1

    def answer(self, question: Question) -> None:
        """Count a request for the metadata, the readiness or the status."""
        self._row[_QUESTION_COLUMNS[question]] += 1

    def read(self) -> ModelStatistics:
        """Return the sums over all processes."""
        rows = self._rows[: self._claimed.rfind(b"\1") + 1].copy()
        sums: list[int] = rows.sum(0, np.uint64).tolist()
        batches = _sum_batches(rows[:, _BATCHES : _OTHERS + _ENTRY].reshape(-1, _ENTRY).tolist())
        followers = sums[_FOLLOWERS : _FOLLOWERS + 4]
        count, input_ns, infer_ns, output_ns = map(sum, zip(followers, *batches.values(), strict=True))
        times = {api: sums[column : column + _BUCKETS] for api, column in _REQUEST_TIME_COLUMNS.items()}
        queue_ns = sums[_QUEUE_NS]
        total_ns = queue_ns + input_ns + infer_ns + output_ns
        return ModelStatistics(
            self.name,
            self.version,
            last_inference_ms=int(rows[:, _LAST_NS].max()) // 1_000_000,
            inference_count=sums[_INFERENCES],
            execution_count=count - followers[0],
            success=Duration(count, total_ns),
            queue=Duration(count, queue_ns),
            compute_input=Duration(count, input_ns),
            compute_infer=Duration(count, infer_ns),
            compute_output=Duration(count, output_ns),
            failures={kind: Duration(*sums[column : column + 2]) for kind, column in _FAILURE_COLUMNS.items()},
            batches=[BatchStatistics(size, *batches[size]) for size in sorted(batches) if size],
            apis={api: Outcomes(sum(times[api]), sums[column]) for api, column in _API_FAILURE_COLUMNS.items()},
            questions={question: sums[column] for question, column in _QUESTION_COLUMNS.items()},
            request_time=Histogram(tuple(map(sum, zip(*times.values(), strict=True))), total_ns),
            inference_time=Histogram(tuple(sums[_INFERENCE_TIME:_QUEUE_TIME]), infer_ns),
            queue_time=Histogram(tuple(sums[_QUEUE_TIME:_FOLLOWERS]), queue_ns),
            batch_size=Histogram(tuple(sums[_BATCH_SIZE:_BATCH_ROWS]), sums[_BATCH_ROWS]),
            request_bytes=sums[_REQUEST_BYTES],
            response_bytes=sums[_RESPONSE_BYTES],
            active=sums[_ACTIVE],
            crashes=sums[_CRASHES],
        )


def _sum_batches(entries: list[list[int]]) -> dict[int, list[int]]:
    """Sum entries by batch size; 0 stands for all sizes that are not counted separately."""
    batches: dict[int, list[int]] = {0: [0, 0, 0, 0]}
    for size, *numbers in entries:
        if numbers[0]:
            batches[size] = [a + b for a, b in zip(batches.get(size, [0, 0, 0, 0]), numbers, strict=True)]
    return batches


class Counters:
    """The counters of all models. A process that claims no slot, as without gunicorn, writes the first row."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._slot = 0
        self._claimed = mmap.mmap(-1, slots)
        self._claimed[0] = 1
        self._models: dict[tuple[str, str], ModelCounters] = {}

    def of(self, name: str, version: str) -> ModelCounters:
        """Return the counters of a version, always the same object; the arbiter calls this first, at load."""
        key = name, version
        if key not in self._models:
            self._models[key] = ModelCounters(name, version, self._slots, self._claimed)
            self._models[key].claim(self._slot)
        return self._models[key]

    def keep(self, versions: Set[tuple[str, str]]) -> None:
        """Drop all counters but those of these names and versions; in the arbiter before it forks a new generation."""
        self._models = {key: model for key, model in self._models.items() if key in versions}

    def claim(self, slot: int) -> None:
        """Write the rows of this slot from now on; in a worker after the fork."""
        self._slot = slot
        self._claimed[slot] = 1
        for model in self._models.values():
            model.claim(slot)

    def release(self, slot: int) -> None:
        """Clear the inferences in progress of this slot; its counts stay. In the arbiter when the worker is gone."""
        for model in self._models.values():
            model.release(slot)

    def count_crash(self, name: str, version: str, slot: int) -> None:
        """Count the worker of this slot, which died while it inferred with a version; in the arbiter."""
        model = self._models.get((name, version))
        if model is not None:  # else it has been unloaded
            model.count_crash(slot)

    def statistics(self, name: str | None = None, version: str | None = None) -> list[ModelStatistics]:
        """Return the sums of a version, of all versions of a model, or of all models, in the order of loading.

        Raises NotFoundError for a model or version that was never loaded.
        """
        found = [
            counters for key, counters in self._models.items() if name in (None, key[0]) and version in (None, key[1])
        ]
        if name is not None and not found:
            which = f"model {quote(name)}" if version is None else f"version {quote(version)} of model {quote(name)}"
            raise NotFoundError(f"{which} has no statistics; it was never loaded")
        return [counters.read() for counters in found]
