"""The worker table, in shared memory: a row for each worker, which the others read, and a way to wake a worker.

A worker writes only its own row, without a lock; readers get numbers that may be a moment old. The arbiter creates the
table before it forks, assigns the rows, and frees that of a worker that is gone.
"""

import contextlib
import itertools
import mmap
import operator
import os
import signal
from collections.abc import Iterable
from typing import NamedTuple

# Many more slots than a machine has cores: a reload doubles the workers for a while, SIGTTIN adds some. Only used rows
# take memory.
SLOTS = 4096

# Sent to idle workers only, which have a handler for it, to make them accept a connection.
WAKE = signal.SIGRTMIN

# In place of a number of connections.
CLAIMED = -1

# The columns, eight bytes each; a row fills a cache line of its own.
_TAKEN, _PID, _CONNECTIONS, _IDLE_SINCE, _READY, _CLOSED, _CONTROL, _WAS_READY = range(8)
_COLUMNS = 8
_READ = _PID, _CONNECTIONS, _IDLE_SINCE, _READY, _CONTROL
# The cache line before the rows: the number of rows ever taken, beyond which none need be read; dead workers; reloads;
# whether the service is shutting down; workers replaced for their memory.
_USED, _DEATHS, _GENERATION, _ENDING, _OUTGROWN = range(5)


class WorkerRow(NamedTuple):
    """The row of a worker; `idle_since` is in monotonic nanoseconds, 0 while the worker is not idle.

    `connections` is CLAIMED while a worker without any decides whether to accept one.
    """

    row: int
    pid: int
    connections: int
    idle_since: int
    ready: int
    control: int

    def infers(self) -> bool:
        """Return whether this worker infers: it is not starting or draining, nor the control worker."""
        return bool(self.ready and not self.control)


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
        return _read_rows(self.numbers)

    def streams(self) -> int:
        """Return the number of workers that infer."""
        # Those of gunicorn's own classes, which have no process id here, count too.
        ready, control = (_read_column(self.numbers, column) for column in (_READY, _CONTROL))
        return sum(map(operator.gt, ready, control))

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
    """A worker's own row, by which it sees the others too; `cores` is how many cores the workers share."""

    def __init__(self, numbers: memoryview, index: int, cores: int) -> None:
        self._numbers = numbers
        self.cores = cores
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
        """Set the number of connections of this worker, or CLAIMED."""
        self._numbers[self.start + _CONNECTIONS] = count

    def set_idle(self, since: int) -> None:
        """Set since when (monotonic nanoseconds) this worker has been idle; 0 while it is busy."""
        self._numbers[self.start + _IDLE_SINCE] = since

    def is_busy(self) -> bool:
        """Return whether this worker is busy."""
        return not self._numbers[self.start + _IDLE_SINCE]

    def pid(self) -> int:
        """Return the process id of this worker, 0 before it is set."""
        return self._numbers[self.start + _PID]

    def all_workers(self) -> list[WorkerRow]:
        """Return the rows of all workers that may be woken, this one included."""
        return _read_rows(self._numbers)


def _read_rows(numbers: memoryview) -> list[WorkerRow]:
    """Return the rows with a process id.

    The columns are read one after another. So a row that is taken or freed meanwhile may have values of both times,
    and no process id beside the numbers of a worker.
    """
    pids, *others = (_read_column(numbers, column) for column in _READ)
    rows = zip(itertools.count(), pids, *others, strict=False)
    return list(map(WorkerRow._make, itertools.compress(rows, pids)))


def _read_column(numbers: memoryview, column: int) -> list[int]:
    """Return the numbers in a column of all rows that were ever taken."""
    return numbers[_COLUMNS + column : (1 + numbers[_USED]) * _COLUMNS : _COLUMNS].tolist()


def wake(pid: int) -> None:
    """Wake a worker to accept a connection; do nothing if it is gone.

    A worker of another user, from before a reload that changed gunicorn's `user`, cannot be woken either. The caller
    accepts the connection itself if no other worker has.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, WAKE)
