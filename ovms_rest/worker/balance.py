"""The balance of connections between workers: who accepts one, and when a client is better off with another worker.

A kept-alive connection belongs to the worker that accepted it, so a worker leaves new ones to idle workers with fewer
connections, and closes those of its clients after a response when it has too much to do while another is idle. Busy
workers hold about as many connections as the others: their clients wait equally long, and batches are equally large.
The workers know of each other by the worker table.
"""

import math
import time
from typing import NamedTuple

from ovms_rest.shared_memory.table import CLAIMED, Row, WorkerRow

# A connection that was left to another worker is accepted after all when that one has not come for it.
HANDOVER_SECONDS = 0.005
# The same for a spare worker, one without connections because there are more workers than cores.
SPARE_HANDOVER_SECONDS = 0.05
# The same when this worker has no room, and when the system refuses a connection.
ACCEPT_PAUSE_SECONDS = 0.1
# A worker that has been idle for so long gets clients of one that has requests queued.
IDLE_NANOSECONDS = 5_000_000


# A busy worker leaves connections to one with less than this part of its own; a worker with requests queued gives
# clients away to one with less than the second.
LEAVING_PART = 3 / 4
GIVING_PART = 1 / 2


class Leave(NamedTuple):
    """Leave a connection to other workers, waking one by its process id; accept it if it is still there later."""

    seconds: float
    pid: int | None = None


class Balance:
    """The decisions of one worker, which holds at most `limit` connections."""

    def __init__(self, row: Row, limit: int) -> None:
        self._row = row
        self._usual_limit = self._limit = limit
        self._seen = 0  # connections of all workers when this one left some to others

    def choose(self, held: int, has_just_accepted: bool) -> Leave | None:
        """Decide on a new connection while `held` are held; return None to accept it.

        It is left to an idle worker with fewer connections, and by a busy one to a busy one with considerably fewer. A
        worker that has just accepted one is about to be busy, and leaves the next to any idle worker. A full worker
        leaves it to any that has room.
        """
        workers = self._row.all_workers()
        freer = _find_freer(self._row, workers, held, math.inf if has_just_accepted else held)
        if freer is None and (has_just_accepted or self._row.is_busy()):
            freer = _find_smaller(self._row.pid(), workers, (held - 1) * LEAVING_PART)
        if freer is not None:
            self._seen = _count_connections(workers)
            return Leave(HANDOVER_SECONDS if held else SPARE_HANDOVER_SECONDS, freer)
        if self.is_full(held) and _is_room_elsewhere(self._row.index, workers, self._limit):
            return Leave(ACCEPT_PAUSE_SECONDS)
        return None

    def is_full(self, held: int) -> bool:
        """Return whether a connection has to be closed for a new one."""
        return held >= self._limit

    def lower_limit(self, held: int) -> None:
        """Hold no more connections than `held`, because there is no file descriptor for another one."""
        self._limit = held

    def restore_limit(self) -> None:
        """Hold as many connections as usual, if there are file descriptors for them again."""
        self._limit = self._usual_limit

    def count_after_waiting(self, held: int) -> int:
        """Return how many connections to accept that the workers they were left to have not come for.

        0 if this is a spare worker and the others have accepted or closed some meanwhile, so that they will come.
        """
        return 0 if not held and _count_connections(self._row.all_workers()) != self._seen else 1 + held // 4

    def is_another_better_off(self, queued: int, held: int, busy_seconds: float) -> bool:
        """Return whether another worker has been idle, or has far fewer clients, while this one has too much to do.

        Either requests are queued, or this one has been busy for `busy_seconds` with more connections than the other:
        bodies larger than the system's buffers cannot be seen waiting during an inference.
        """
        if not queued and busy_seconds < IDLE_NANOSECONDS / 1e9:
            return False
        own, workers = self._row.pid(), self._row.all_workers()
        if len(workers) == 1:
            return False
        if _is_another_idle(own, workers, self._row.cores, math.inf if queued else held - 2):
            return True
        return _find_smaller(own, workers, (held - 1) * GIVING_PART) is not None


def _count_connections(workers: list[WorkerRow]) -> int:
    return sum(max(0, worker.connections) for worker in workers)


def _find_freer(row: Row, workers: list[WorkerRow], held: int, connections: float) -> int | None:
    """Return the process id of the worker that a connection is better left to; None if that is this worker.

    It is the idle worker with the fewest connections below that number. But more workers than cores only compete for
    cores and caches: once as many as there are cores have connections, workers without any get none, and leave
    connections to the others. Of those without any that decide at the same time, the first rows come first.
    """
    used = [worker for worker in workers if worker.connections > 0]
    candidates = workers
    if not held:
        ahead = used + [worker for worker in workers if worker.row < row.index and worker.connections == CLAIMED]
        if len(ahead) >= row.cores:
            return min(used or ahead, key=lambda worker: (not worker.idle_since, worker.connections)).pid
    elif len(used) >= row.cores:
        candidates = used
    freer = [
        (worker.connections, worker.pid)
        for worker in candidates
        if worker.idle_since and max(0, worker.connections) < connections and worker.row != row.index
    ]
    return min(freer)[1] if freer else None


def _find_smaller(own: int, workers: list[WorkerRow], connections: float) -> int | None:
    """Return the process id of the worker with the fewest connections, below that number; None if there is none.

    Those without any are left out, they may be spare; so is the worker with the process id `own`.
    """
    smaller = [
        (worker.connections, worker.pid)
        for worker in workers
        if 0 < worker.connections < connections and worker.pid != own
    ]
    return min(smaller)[1] if smaller else None


def _is_room_elsewhere(own: int, workers: list[WorkerRow], limit: int) -> bool:
    """Return whether a worker that infers, but for that with the row `own`, has fewer connections than the limit."""
    return any(worker.infers() and worker.connections < limit and worker.row != own for worker in workers)


def _is_another_idle(own: int, workers: list[WorkerRow], cores: int, connections: float) -> bool:
    """Return whether a worker but `own`, with a core and no more connections than that, has been idle for a while.

    Once as many workers as there are cores have connections, those without any have no core.
    """
    until = time.monotonic_ns() - IDLE_NANOSECONDS
    used = [worker for worker in workers if worker.connections > 0]
    busy = sum(1 for worker in used if not worker.idle_since)
    return busy < cores and any(
        0 < worker.idle_since <= until and worker.connections <= connections
        for worker in (used if len(used) >= cores else workers)
        if worker.pid != own
    )
