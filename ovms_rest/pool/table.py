"""What workers know of each other: a table in shared memory with a row for each, and a way to wake one.

A worker writes only its own row, so that there is nothing to lock; whoever reads gets a number that was true a moment
ago. The arbiter makes the table before it forks, hands out the rows, and takes back that of a worker that is gone.
"""

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator

# Sent to a worker to have it accept a connection. Nothing but a worker that is idle gets it, and that has a handler.
WAKE = signal.SIGRTMIN

# The columns, eight bytes each; a row fills a cache line of its own.
_TAKEN, _PID, _CONNECTIONS, _IDLE_SINCE = range(4)
_COLUMNS = 8
# In front of the rows, a cache line too: how many rows were ever taken, so that none behind them need be read.
_USED = 0


class WorkerTable:
    """The rows of all workers."""

    def __init__(self, size: int) -> None:
        """Make a table for so many workers."""
        self.numbers = memoryview(mmap.mmap(-1, (size + 1) * _COLUMNS * 8)).cast("q")
        self._size = size

    def take(self) -> "Row":
        """Hand out a free row. Raises RuntimeError when every one is taken."""
        for index in range(self._size):
            row = Row(self.numbers, index)
            if not self.numbers[row.start + _TAKEN]:
                self.numbers[row.start + _TAKEN] = 1
                self.numbers[_USED] = max(self.numbers[_USED], index + 1)
                return row
        raise RuntimeError(f"there are {self._size} workers already, which is the limit")

    def free(self, row: "Row") -> None:
        """Take back the row of a worker that is gone."""
        for column in range(_COLUMNS):
            self.numbers[row.start + column] = 0


class Row:
    """A worker's own row, and its view of the others."""

    def __init__(self, numbers: memoryview, index: int) -> None:
        """Find the row."""
        self._numbers = numbers
        self._index = index
        self.start = (1 + index) * _COLUMNS

    def set_pid(self, pid: int) -> None:
        """Tell the process id of this worker, by which it is woken."""
        self._numbers[self.start + _PID] = pid

    def set_connections(self, count: int) -> None:
        """Tell how many connections this worker holds."""
        self._numbers[self.start + _CONNECTIONS] = count

    def set_idle(self, since: int) -> None:
        """Tell since when (monotonic nanoseconds) this worker has nothing to do; 0 when it has."""
        self._numbers[self.start + _IDLE_SINCE] = since

    def _idle_others(self) -> Iterator[tuple[int, int]]:
        """Yield the place of the row, and the idle time, of every other worker that has nothing to do."""
        numbers = self._numbers
        end = (1 + numbers[_USED]) * _COLUMNS
        for index, since in enumerate(numbers[_COLUMNS + _IDLE_SINCE : end : _COLUMNS].tolist()):
            if since and index != self._index:
                yield (1 + index) * _COLUMNS, since

    def find_freer(self, connections: float) -> int | None:
        """Return the process id of the idle worker with the fewest connections below that number; None without one."""
        freer = [
            (count, start)
            for start, _ in self._idle_others()
            if (count := self._numbers[start + _CONNECTIONS]) < connections
        ]
        return int(self._numbers[min(freer)[1] + _PID]) if freer else None

    def is_another_idle(self, until: int) -> bool:
        """Tell whether another worker has had nothing to do since that time or longer."""
        return any(since <= until for _, since in self._idle_others())


def wake(pid: int) -> None:
    """Wake a worker, to accept a connection; one that is gone meanwhile is not missed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, WAKE)
