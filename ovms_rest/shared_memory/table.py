"""What workers know of each other: a table in shared memory with a row for each, and a way to wake one.

A worker writes only its own row, so that there is nothing to lock; whoever reads gets a number that was true a moment
ago. The arbiter makes the table before it forks, hands out the rows, and takes back that of a worker that is gone.
"""

import contextlib
import itertools
import math
import mmap
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Many more workers than a machine has cores: a reload has twice as many for a while, SIGTTIN adds some. Only the rows
# that are used take memory.
SLOTS = 4096

# Sent to a worker to have it accept a connection. Nothing but a worker that is idle gets it, and that has a handler.
WAKE = signal.SIGRTMIN

# The columns, eight bytes each; a row fills a cache line of its own.
_TAKEN, _PID, _CONNECTIONS, _IDLE_SINCE, _READY, _CLOSED, _CONTROL, _WAS_READY = range(8)
_COLUMNS = 8
# In front of the rows, a cache line too: how many rows were ever taken, so that none behind them need be read; how many
# workers died; how often there was a reload; whether the service ends; how many workers were replaced for their memory.
_USED, _DEATHS, _GENERATION, _ENDING, _OUTGROWN = range(5)


class Seen(NamedTuple):
    """What a worker tells of itself; `idle_since` is 0 while it is not idle."""

    row: int
    pid: int
    connections: int
    idle_since: int


class WorkerTable:
    """The rows of all workers."""

    def __init__(self, size: int, cores: int) -> None:
        """Make a table for so many workers, of which so many can run at once."""
        self.numbers = memoryview(mmap.mmap(-1, (size + 1) * _COLUMNS * 8)).cast("q")
        self._size = size
        self._cores = cores

    def take(self) -> "Row":
        """Hand out a free row. Raises RuntimeError when every one is taken."""
        for index in range(self._size):
            row = Row(self.numbers, index, self._cores)
            if not self.numbers[row.start + _TAKEN]:
                self.numbers[row.start + _TAKEN] = 1
                self.numbers[_USED] = max(self.numbers[_USED], index + 1)
                return row
        raise RuntimeError(f"there are {self._size} workers already, which is the limit")

    def is_used(self) -> bool:
        """Return whether a row was ever taken."""
        return bool(self.numbers[_USED])

    def workers(self) -> list[Seen]:
        """Return what all workers tell."""
        return [worker for worker in read_rows(self.numbers) if worker.pid]

    def is_control(self, row: int) -> bool:
        """Return whether the worker of this row is the control worker."""
        return bool(self.numbers[(1 + row) * _COLUMNS + _CONTROL])

    def streams(self) -> int:
        """Return how many workers infer: not those that come up or end, nor the control worker."""
        end = (1 + self.numbers[_USED]) * _COLUMNS
        ready, control = (self.numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_READY, _CONTROL))
        return sum(is_ready and not is_control for is_ready, is_control in zip(ready, control, strict=True))

    def deaths(self) -> int:
        """Return how many workers died, so that others took their place."""
        return self.numbers[_DEATHS]

    def generation(self) -> int:
        """Return how often there was a reload."""
        return self.numbers[_GENERATION]

    def count_death(self) -> None:
        """Count a worker that died; in the arbiter."""
        self.numbers[_DEATHS] += 1

    def count_generation(self) -> None:
        """Count a reload; in the arbiter."""
        self.numbers[_GENERATION] += 1

    def outgrown(self) -> int:
        """Return how many workers had outgrown the limit of their memory, so that others took their place."""
        return self.numbers[_OUTGROWN]

    def count_outgrown(self) -> None:
        """Count a worker that was replaced for its memory; in the arbiter."""
        self.numbers[_OUTGROWN] += 1

    def set_ending(self) -> None:
        """Tell that the service ends; in the arbiter."""
        self.numbers[_ENDING] = 1

    def is_ending(self) -> bool:
        """Tell whether the service ends."""
        return bool(self.numbers[_ENDING])

    def free(self, row: "Row") -> None:
        """Take back the row of a worker that is gone."""
        for column in range(_COLUMNS):
            self.numbers[row.start + column] = 0

    def keep(self, rows: "Iterable[Row]") -> None:
        """Take back all rows but these: those of workers that could not be forked."""
        kept = {row.index for row in rows}
        for index in set(range(self.numbers[_USED])) - kept:
            self.free(Row(self.numbers, index, self._cores))


class Row:
    """A worker's own row, and its view of the others."""

    def __init__(self, numbers: memoryview, index: int, cores: int) -> None:
        """Find the row."""
        self._numbers = numbers
        self._cores = cores
        self.index = index
        self.start = (1 + index) * _COLUMNS

    def set_pid(self, pid: int) -> None:
        """Tell the process id of this worker, by which it is woken."""
        self._numbers[self.start + _PID] = pid

    def set_control(self) -> None:
        """Tell that this is the control worker, which does not infer; in the arbiter."""
        self._numbers[self.start + _CONTROL] = 1

    def set_ready(self, ready: bool = True) -> None:
        """Tell that this worker has opened all models and accepts connections, or does not any more."""
        self._numbers[self.start + _READY] = ready
        if ready:
            self._numbers[self.start + _WAS_READY] = 1

    def is_ready(self) -> bool:
        """Tell whether the worker of this row is ready, to the arbiter."""
        return bool(self._numbers[self.start + _READY])

    def was_ready(self) -> bool:
        """Return whether the worker of this row has ever been ready, in the arbiter."""
        return bool(self._numbers[self.start + _WAS_READY])

    def set_closed(self) -> None:
        """Tell that this worker takes no request any more: all that it has yet to answer has come."""
        self._numbers[self.start + _CLOSED] = 1

    def is_closed(self) -> bool:
        """Tell whether the worker of this row takes no request any more, to the arbiter."""
        return bool(self._numbers[self.start + _CLOSED])

    def is_first(self) -> bool:
        """Tell whether no other worker that is ready has a row before this one."""
        return not any(self._numbers[_COLUMNS + _READY : self.start + _READY : _COLUMNS])

    def set_connections(self, count: int) -> None:
        """Tell how many connections this worker holds."""
        self._numbers[self.start + _CONNECTIONS] = count

    def set_idle(self, since: int) -> None:
        """Tell since when (monotonic nanoseconds) this worker has nothing to do; 0 when it has."""
        self._numbers[self.start + _IDLE_SINCE] = since

    def find_freer(self, connections: float) -> int | None:
        """Return the process id of the worker that a connection is better left to; None when that is this one.

        It is the idle one with the fewest connections below that number. But more workers than there are cores only
        take the cores and their caches from each other: when so many have connections, those that have none are left
        alone, and leave connections to those that have some.
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
        """Return whether another worker that is ready has fewer connections than that limit."""
        end = (1 + self._numbers[_USED]) * _COLUMNS
        columns = (
            self._numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_READY, _CONTROL, _CONNECTIONS)
        )
        return any(
            is_ready and not is_control and connections < limit and index != self.index
            for index, (is_ready, is_control, connections) in enumerate(zip(*columns, strict=True))
        )

    def is_another_idle(self, until: int, connections: float = math.inf) -> bool:
        """Tell whether another worker has had nothing to do since that time or longer, and has a core to run on.

        Those with more connections than that do not count.
        """
        own = self._numbers[self.start + _PID]
        workers = list(read_rows(self._numbers))
        busy = sum(1 for worker in workers if worker.connections and not worker.idle_since)
        return busy < self._cores and any(
            0 < worker.idle_since <= until and worker.connections <= connections
            for worker in workers
            if worker.pid != own
        )


def read_rows(numbers: memoryview) -> Iterator[Seen]:
    """Yield what every worker tells."""
    end = (1 + numbers[_USED]) * _COLUMNS
    columns = (numbers[_COLUMNS + column : end : _COLUMNS].tolist() for column in (_PID, _CONNECTIONS, _IDLE_SINCE))
    return itertools.starmap(Seen, zip(itertools.count(), *columns, strict=False))


def wake(pid: int) -> None:
    """Wake a worker, to accept a connection; one that is gone meanwhile is not missed.

    Nor is one of another user, from before a reload that changed gunicorn's `user`: whoever wakes takes the connection
    itself when nobody has come for it.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, WAKE)
