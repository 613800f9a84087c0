"""The worker table, in shared memory: a row for each worker, which the others read, and a way to wake a worker.

A worker writes only its own row, without a lock; readers get numbers that may be a moment old. The arbiter creates the
table before it forks, assigns the rows, and frees that of a worker that is gone.
"""

import contextlib
import itertools
import math
import mmap
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Many more slots than a machine has cores: a reload doubles the workers for a while, SIGTTIN adds some. Only used rows
# take memory.
SLOTS = 4096

# Sent to idle workers only, which have a handler for it, to make them accept a connection.
WAKE = signal.SIGRTMIN

# The columns, eight bytes each; a row fills a cache line of its own.
_TAKEN, _PID, _CONNECTIONS, _IDLE_SINCE, _READY, _CLOSED, _CONTROL, _WAS_READY = range(8)
_COLUMNS = 8
# The cache line before the rows: the number of rows ever taken, beyond which none need be read; dead workers; reloads;
# whether the service is shutting down; workers replaced for their memory.
_USED, _DEATHS, _GENERATION, _ENDING, _OUTGROWN = range(5)


class WorkerRow(NamedTuple):
    """The row of a worker; `idle_since` is in monotonic nanoseconds, 0 while the worker is not idle."""

    row: int
    pid: int
    connections: int
    idle_since: int


class WorkerTable:
    """The rows of all workers."""

    def __init__(self, size: int, cores: int) -> None:
        """Allocate a table for `size` workers on this number of cores."""
        self.numbers = memoryview(mmap.mmap(-1, (size + 1) * _COLUMNS * 8)).cast("q")
        self._size = size
        self._cores = cores

    def take(self) -> "Row":
        """Take a free row. Raises RuntimeError if there is none."""
        for index in range(self._size):
            row = Row(self.numbers, index, self._cores)
            if not self.numbers[row.start + _TAKEN]:
                self.numbers[row.start + _TAKEN] = 1
                self.numbers[_USED] = max(self.numbers[_USED], index + 1)
                return row
        raise RuntimeError(f"there are already {self._size} workers, the limit")

    def is_used(self) -> bool:
        """Return whether a row was ever taken."""
        return bool(self.numbers[_USED])

    def workers(self) -> list[WorkerRow]:
        """Return the rows of all workers."""
        return [worker for worker in read_rows(self.numbers) if worker.pid]

    def is_control(self, row: int) -> bool:
        """Return whether the worker of this row is the control worker."""
        return bool(self.numbers[(1 + row) * _COLUMNS + _CONTROL])

    def streams(self) -> int:
        """Return the number of workers that infer: without those starting or draining, and the control worker."""
        end = (1 + self.numbers[_USED]) * _COLUMNS
        ready, control = (self.numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_READY, _CONTROL))
        return sum(is_ready and not is_control for is_ready, is_control in zip(ready, control, strict=True))

    def deaths(self) -> int:
        """Return the number of workers that died and were replaced."""
        return self.numbers[_DEATHS]

    def generation(self) -> int:
        """Return the number of reloads."""
        return self.numbers[_GENERATION]

    def count_death(self) -> None:
        """Count a worker that died; in the arbiter."""
        self.numbers[_DEATHS] += 1

    def count_generation(self) -> None:
        """Count a reload; in the arbiter."""
        self.numbers[_GENERATION] += 1

    def outgrown(self) -> int:
        """Return the number of workers that were replaced for exceeding the memory limit."""
        return self.numbers[_OUTGROWN]

    def count_outgrown(self) -> None:
        """Count a worker replaced for its memory; in the arbiter."""
        self.numbers[_OUTGROWN] += 1

    def set_ending(self) -> None:
        """Note that the service is shutting down; in the arbiter."""
        self.numbers[_ENDING] = 1

    def is_ending(self) -> bool:
        """Return whether the service is shutting down."""
        return bool(self.numbers[_ENDING])

    def free(self, row: "Row") -> None:
        """Free the row of a worker that is gone."""
        for column in range(_COLUMNS):
            self.numbers[row.start + column] = 0

    def keep(self, rows: "Iterable[Row]") -> None:
        """Free all rows but these: those of workers that could not be forked."""
        kept = {row.index for row in rows}
        for index in set(range(self.numbers[_USED])) - kept:
            self.free(Row(self.numbers, index, self._cores))


class Row:
    """A worker's own row, and its view of the others."""

    def __init__(self, numbers: memoryview, index: int, cores: int) -> None:
        self._numbers = numbers
        self._cores = cores
        self.index = index
        self.start = (1 + index) * _COLUMNS

    def set_pid(self, pid: int) -> None:
        """Set the process id, by which this worker is woken."""
        self._numbers[self.start + _PID] = pid

    def set_control(self) -> None:
        """Mark this as the control worker, which does not infer; in the arbiter."""
        self._numbers[self.start + _CONTROL] = 1

    def set_ready(self, ready: bool = True) -> None:
        """Set whether this worker has opened all models and accepts connections."""
        self._numbers[self.start + _READY] = ready
        if ready:
            self._numbers[self.start + _WAS_READY] = 1

    def is_ready(self) -> bool:
        """Return whether the worker of this row is ready; in the arbiter."""
        return bool(self._numbers[self.start + _READY])

    def was_ready(self) -> bool:
        """Return whether the worker of this row has ever been ready; in the arbiter."""
        return bool(self._numbers[self.start + _WAS_READY])

    def set_closed(self) -> None:
        """Note that this worker accepts no more requests: it has received all that it still has to answer."""
        self._numbers[self.start + _CLOSED] = 1

    def is_closed(self) -> bool:
        """Return whether the worker of this row accepts no more requests; in the arbiter."""
        return bool(self._numbers[self.start + _CLOSED])

    def is_first(self) -> bool:
        """Return whether no other ready worker has a row before this one."""
        return not any(self._numbers[_COLUMNS + _READY : self.start + _READY : _COLUMNS])

    def set_connections(self, count: int) -> None:
        """Set the number of connections of this worker."""
        self._numbers[self.start + _CONNECTIONS] = count

    def set_idle(self, since: int) -> None:
        """Set since when (monotonic nanoseconds) this worker has been idle; 0 while it is busy."""
        self._numbers[self.start + _IDLE_SINCE] = since

    def find_freer(self, connections: float) -> int | None:
        """Return the process id of the worker that a connection is better left to; None if that is this worker.

        It is the idle worker with the fewest connections below that number. But more workers than cores only compete
        for cores and caches: once as many as there are cores have connections, workers without any get none, and leave
        connections to the others.
        """
        own = self._numbers[self.start + _PID]
        workers = list(read_rows(self._numbers))
        used = [worker for worker in workers if worker.connections]
        if len(used) < self._cores:
            candidates = workers
        else:
            candidates = used
            if not self._numbers[self.start + _CONNECTIONS]:
                return min(used, key=lambda worker: (not worker.idle_since, worker.connections)).pid
        freer = [
            (worker.connections, worker.pid)
            for worker in candidates
            if worker.idle_since and worker.connections < connections and worker.pid != own
        ]
        return min(freer)[1] if freer else None

    def is_room_elsewhere(self, limit: int) -> bool:
        """Return whether another ready worker has fewer connections than this limit."""
        end = (1 + self._numbers[_USED]) * _COLUMNS
        columns = (
            self._numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_READY, _CONTROL, _CONNECTIONS)
        )
        return any(
            is_ready and not is_control and connections < limit and index != self.index
            for index, (is_ready, is_control, connections) in enumerate(zip(*columns, strict=True))
        )

    def is_another_idle(self, until: int, connections: float = math.inf) -> bool:
        """Return whether another worker with a free core has been idle since this time or longer.

        Workers with more than this number of connections do not count.
        """
        own = self._numbers[self.start + _PID]
        workers = list(read_rows(self._numbers))
        busy = sum(1 for worker in workers if worker.connections and not worker.idle_since)
        return busy < self._cores and any(
            0 < worker.idle_since <= until and worker.connections <= connections
            for worker in workers
            if worker.pid != own
        )


def read_rows(numbers: memoryview) -> Iterator[WorkerRow]:
    """Return the rows of all slots that were ever taken."""
    end = (1 + numbers[_USED]) * _COLUMNS
    columns = (numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_PID, _CONNECTIONS, _IDLE_SINCE))
    return itertools.starmap(WorkerRow, zip(itertools.count(), *columns, strict=False))


def wake(pid: int) -> None:
    """Wake a worker to accept a connection; do nothing if it is gone.

    A worker of another user, from before a reload that changed gunicorn's `user`, cannot be woken either. The caller
    accepts the connection itself if no other worker has.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, WAKE)
