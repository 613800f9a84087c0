"""The balance of connections: when a worker accepts one, leaves it to another worker, or gives a client away."""

import time

import pytest
from worker_rows import make_rows

from ovms_rest.shared_memory.table import CLAIMED
from ovms_rest.worker.balance import (
    ACCEPT_PAUSE_SECONDS,
    HANDOVER_SECONDS,
    IDLE_NANOSECONDS,
    SPARE_HANDOVER_SECONDS,
    Balance,
    Leave,
)

LIMIT = 4
NEVER = 2**62  # idle since then: not yet for a while


def balance_of(*workers, cores=9):
    """Return the balance of the first worker in a table of (connections, idle since), and the rows."""
    _, rows = make_rows(*workers, cores=cores)
    return Balance(rows[0], LIMIT), rows


# --- New connections


@pytest.mark.parametrize(
    ("connections", "others", "pid"),
    [
        (3, [], None),
        (3, [(0, 0)], None),
        (3, [(0, 1)], 101),
        (3, [(2, 1)], 101),
        (3, [(3, 1)], None),
        (3, [(4, 1)], None),
        (0, [(0, 1), (0, 1)], None),
        (3, [(0, 0), (2, 1)], 102),
        (3, [(2, 1), (1, 1), (2, 1)], 102),
        (3, [(2, 1), (0, 0), (1, 7)], 103),
        (3, [(4, 1), (5, 0), (3, 1)], None),
    ],
)
def test_connection_is_left_to_the_idle_worker_with_the_fewest_connections_below_ones_own(connections, others, pid):
    balance, _ = balance_of((connections, 1), *others)
    assert balance.choose(connections, has_just_accepted=False) == (pid and Leave(HANDOVER_SECONDS, pid))


@pytest.mark.parametrize(
    ("connections", "others", "pid"),
    [
        (0, [(1, 0), (0, 1), (0, 1)], None),
        (0, [(1, 1), (1, 1), (0, 1)], 101),
        (0, [(1, 0), (3, 1), (0, 1)], 102),
        (0, [(4, 0), (3, 0), (0, 1)], 102),
        (2, [(0, 1), (0, 0)], 101),
        (2, [(1, 0), (0, 1)], None),
        (2, [(1, 1), (0, 1)], 101),
        (2, [(3, 1), (0, 1)], None),
    ],
)
def test_not_more_workers_get_connections_than_there_are_cores(connections, others, pid):
    """A worker without connections leaves them, for longer, to those with some, though these may be busy."""
    balance, _ = balance_of((connections, 1), *others, cores=2)
    seconds = HANDOVER_SECONDS if connections else SPARE_HANDOVER_SECONDS
    assert balance.choose(connections, has_just_accepted=False) == (pid and Leave(seconds, pid))


@pytest.mark.parametrize(
    ("row", "connections", "pid"),
    [
        (0, [CLAIMED, CLAIMED, CLAIMED, 0], None),
        (1, [CLAIMED, CLAIMED, CLAIMED, 0], None),
        (2, [CLAIMED, CLAIMED, CLAIMED, 0], 100),
        (3, [CLAIMED, 1, 0, CLAIMED], 101),
        (0, [CLAIMED, CLAIMED, 1, 0], None),
        (1, [CLAIMED, CLAIMED, 1, 0], 102),
    ],
)
def test_first_rows_get_the_connections_of_a_burst(row, connections, pid):
    """Workers without connections that decide at the same time see each other's claims."""
    _, rows = make_rows(*((count, 1) for count in connections), cores=2)
    left = pid and Leave(SPARE_HANDOVER_SECONDS, pid)
    assert Balance(rows[row], LIMIT).choose(0, has_just_accepted=False) == left


def test_connection_is_left_to_an_idle_worker_that_claims_one():
    balance, _ = balance_of((1, 0), (CLAIMED, 1))
    assert balance.choose(1, has_just_accepted=True) == Leave(HANDOVER_SECONDS, 101)


def test_spare_worker_accepts_what_it_left_unless_others_come():
    balance, rows = balance_of((CLAIMED, 1), (1, 0), (2, 0), (CLAIMED, 1), cores=2)
    assert balance.choose(0, has_just_accepted=False) == Leave(SPARE_HANDOVER_SECONDS, 101)
    rows[3].set_connections(0)
    assert balance.count_after_waiting(0) == 1
    rows[2].set_connections(3)
    assert balance.count_after_waiting(0) == 0
    assert balance.count_after_waiting(4) == 2, "it is not a spare worker"


def test_worker_that_has_just_accepted_leaves_the_next_connection_to_any_idle_worker():
    balance, _ = balance_of((1, 0), (9, 1))
    assert balance.choose(1, has_just_accepted=True) == Leave(HANDOVER_SECONDS, 101)
    balance, _ = balance_of((1, 0), (9, 0))
    assert balance.choose(1, has_just_accepted=True) is None


@pytest.mark.parametrize(
    ("held", "others", "pid"),
    [
        (2, [(1, 0)], None),
        (3, [(1, 0)], 101),
        (3, [(0, 0)], None),
        (9, [(6, 0)], None),
        (9, [(5, 0)], 101),
        (33, [(24, 0), (32, 0)], None),
        (33, [(23, 0), (22, 0)], 102),
    ],
)
def test_busy_worker_leaves_a_connection_to_one_with_considerably_fewer(held, others, pid):
    """One without any may be spare."""
    busy, _ = balance_of((held, 0), *others)
    assert busy.choose(held, has_just_accepted=False) == (pid and Leave(HANDOVER_SECONDS, pid))
    idle, _ = balance_of((held, 1), *others)
    assert idle.choose(held, has_just_accepted=True) == (pid and Leave(HANDOVER_SECONDS, pid)), "it is about to be busy"
    assert idle.choose(held, has_just_accepted=False) is None


@pytest.mark.parametrize(("held", "count"), [(0, 1), (3, 1), (4, 2), (400, 101)])
def test_worker_that_waited_for_another_accepts_the_more_the_more_it_holds(held, count):
    """Thousands of connections are accepted soon although the other workers are busy for long."""
    balance, _ = balance_of((held, 0))
    assert balance.count_after_waiting(held) == count


def test_full_worker_leaves_a_connection_to_any_with_room():
    balance, rows = balance_of((LIMIT, 0), (LIMIT - 1, 0))
    assert balance.choose(LIMIT, has_just_accepted=False) is None, "the other worker is not ready"
    rows[1].set_ready()
    assert balance.choose(LIMIT, has_just_accepted=False) == Leave(ACCEPT_PAUSE_SECONDS)
    rows[1].set_control()
    assert balance.choose(LIMIT, has_just_accepted=False) is None


def test_full_worker_accepts_when_no_worker_has_room():
    balance, rows = balance_of((LIMIT, 0), (LIMIT, 0))
    for row in rows:
        row.set_ready()
    assert balance.choose(LIMIT, has_just_accepted=False) is None
    assert balance.is_full(LIMIT)
    assert not balance.is_full(LIMIT - 1)


def test_dead_worker_gets_no_connection():
    table, rows = make_rows((3, 0), (0, 1), (0, 1))
    balance = Balance(rows[0], LIMIT)
    table.free(rows[1])
    assert balance.choose(3, has_just_accepted=False) == Leave(HANDOVER_SECONDS, 102)
    table.free(rows[2])
    assert balance.choose(3, has_just_accepted=False) is None
    assert not balance.is_another_better_off(1, 3, 0.0)


# --- Clients


@pytest.mark.parametrize(
    ("idle", "queued", "held", "busy_seconds", "is_better_off"),
    [
        ([], 3, 4, 1.0, False),
        ([9], 1, 1, 0.0, True),
        ([2], 0, 4, 0.0, False),
        ([2], 0, 4, 1.0, True),
        ([3], 0, 4, 1.0, False),
        ([0], 0, 1, 1.0, False),
    ],
)
def test_client_is_given_away_when_another_worker_is_idle_and_this_one_has_too_much(
    idle, queued, held, busy_seconds, is_better_off
):
    balance, _ = balance_of((held, 1), *((connections, 1) for connections in idle))
    assert balance.is_another_better_off(queued, held, busy_seconds) is is_better_off


@pytest.mark.parametrize(
    ("others", "queued", "held", "busy_seconds", "is_better_off"),
    [
        ([1], 1, 4, 0.0, True),
        ([1], 0, 4, 0.0, False),
        ([1], 0, 4, 1.0, True),
        ([1], 1, 3, 0.0, False),
        ([0], 1, 9, 0.0, False),
        ([15, 16], 1, 31, 0.0, False),
        ([15, 14], 1, 31, 0.0, True),
    ],
)
def test_client_is_given_away_when_a_busy_worker_has_far_fewer(others, queued, held, busy_seconds, is_better_off):
    balance, _ = balance_of((held, 0), *((connections, 0) for connections in others))
    assert balance.is_another_better_off(queued, held, busy_seconds) is is_better_off


@pytest.mark.parametrize(
    ("others", "is_better_off"),
    [
        ([(1, 5)], True),
        ([(0, 5)], True),
        ([(1, 0), (0, 5)], False),
        ([(1, NEVER), (0, 5)], False),
        ([(0, 0), (0, 5)], True),
        ([(CLAIMED, 0), (0, 5)], True),
    ],
)
def test_idle_worker_without_a_core_to_run_on_does_not_count(others, is_better_off):
    balance, _ = balance_of((3, 0), *others, cores=2)
    assert balance.is_another_better_off(1, 3, 0.0) is is_better_off


@pytest.mark.parametrize(
    ("idle_for", "is_better_off"),
    [([IDLE_NANOSECONDS * 2], True), ([0], False), ([0, None, IDLE_NANOSECONDS * 2], True), ([None], False)],
)
def test_worker_counts_as_idle_after_some_time(idle_for, is_better_off):
    now = time.monotonic_ns()
    balance, _ = balance_of((0, 1), *((0, 0 if spent is None else now - spent) for spent in idle_for))
    assert balance.is_another_better_off(1, 1, 0.0) is is_better_off
