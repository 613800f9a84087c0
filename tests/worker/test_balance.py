"""The balance of connections: when a worker accepts one, leaves it to another worker, or gives a client away."""

import math
import time

import pytest

from ovms_rest.shared_memory.table import WorkerTable
from ovms_rest.worker.balance import (
    ACCEPT_PAUSE_SECONDS,
    HANDOVER_SECONDS,
    IDLE_NANOSECONDS,
    SPARE_HANDOVER_SECONDS,
    Balance,
    Leave,
)

LIMIT = 4


class Others:
    """Other workers: idle ones with their connections, by process id, and whether any has room."""

    def __init__(self, idle=None, has_room=True):
        self.idle = idle or {}
        self.has_room = has_room

    def find_freer(self, connections):
        freer = [(held, pid) for pid, held in self.idle.items() if held < connections]
        return min(freer)[1] if freer else None

    def is_room_elsewhere(self, limit):
        return self.has_room

    def is_another_idle(self, until, connections=math.inf):
        return any(held <= connections for held in self.idle.values())


# --- New connections


@pytest.mark.parametrize(
    ("idle", "held", "decision"),
    [
        ({}, 0, None),
        ({}, 3, None),
        ({7: 0}, 0, None),
        ({7: 1}, 1, None),
        ({7: 2}, 1, None),
        ({7: 0}, 1, Leave(HANDOVER_SECONDS, 7)),
        ({7: 2, 8: 1}, 3, Leave(HANDOVER_SECONDS, 8)),
    ],
)
def test_connection_is_left_to_the_idle_worker_with_fewer_connections(idle, held, decision):
    assert Balance(Others(idle), LIMIT).choose(held, has_just_accepted=False) == decision


def test_worker_that_has_just_accepted_leaves_the_next_connection_to_any_idle_worker():
    assert Balance(Others({7: 9}), LIMIT).choose(1, has_just_accepted=True) == Leave(HANDOVER_SECONDS, 7)
    assert Balance(Others(), LIMIT).choose(1, has_just_accepted=True) is None


def test_full_worker_leaves_a_connection_to_any_with_room():
    assert Balance(Others(), LIMIT).choose(LIMIT, has_just_accepted=False) == Leave(ACCEPT_PAUSE_SECONDS)


def test_full_worker_accepts_when_no_worker_has_room():
    balance = Balance(Others(has_room=False), LIMIT)
    assert balance.choose(LIMIT, has_just_accepted=False) is None
    assert balance.is_full(LIMIT)
    assert not balance.is_full(LIMIT - 1)


def test_spare_worker_leaves_a_connection_for_longer():
    """There are more workers than cores: the one without connections leaves them to those that have some."""
    table = WorkerTable(2, cores=1)
    spare, used = table.take(), table.take()
    for pid, row in enumerate((spare, used), 101):
        row.set_pid(pid)
        row.set_idle(5)
    used.set_connections(3)
    assert Balance(spare, LIMIT).choose(0, has_just_accepted=False) == Leave(SPARE_HANDOVER_SECONDS, 102)
    assert Balance(used, LIMIT).choose(3, has_just_accepted=False) is None


# --- Clients


@pytest.mark.parametrize(
    ("idle", "queued", "held", "busy_seconds", "is_better_off"),
    [
        ({}, 3, 4, 1.0, False),
        ({7: 9}, 1, 1, 0.0, True),
        ({7: 2}, 0, 4, 0.0, False),
        ({7: 2}, 0, 4, 1.0, True),
        ({7: 3}, 0, 4, 1.0, False),
        ({7: 0}, 0, 1, 1.0, False),
    ],
)
def test_client_is_given_away_when_another_worker_is_idle_and_this_one_has_too_much(
    idle, queued, held, busy_seconds, is_better_off
):
    assert Balance(Others(idle), LIMIT).is_another_better_off(queued, held, busy_seconds) is is_better_off


@pytest.mark.parametrize(("idle_for", "is_better_off"), [(IDLE_NANOSECONDS * 2, True), (0, False)])
def test_worker_counts_as_idle_after_some_time(idle_for, is_better_off):
    table = WorkerTable(2, cores=2)
    own, other = table.take(), table.take()
    own.set_pid(101)
    other.set_pid(102)
    other.set_idle(time.monotonic_ns() - idle_for)
    assert Balance(own, LIMIT).is_another_better_off(1, 1, 0.0) is is_better_off
