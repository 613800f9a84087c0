"""The rows of workers, the choice of a freer one, and waking."""

import signal
import subprocess
import sys

import pytest
from forking import fork, join

from ovms_rest.shared_memory.table import WAKE, WorkerTable, wake


def make(*workers, cores=9):
    """Make a table with a row for every (connections, idle since); the process ids count from 100."""
    table = WorkerTable(8, cores)
    rows = []
    for number, (connections, idle) in enumerate(workers):
        row = table.take()
        row.set_pid(100 + number)
        row.set_connections(connections)
        row.set_idle(idle)
        rows.append(row)
    return table, rows


# --- Rows


def test_rows_are_taken_until_none_is_free():
    table = WorkerTable(3, 2)
    rows = [table.take() for _ in range(3)]
    assert len({row.start for row in rows}) == 3
    with pytest.raises(RuntimeError, match="already 3 workers, the limit"):
        table.take()


def test_freed_row_is_empty_when_taken_again():
    table, rows = make((1, 5), (2, 5), (3, 5))
    table.free(rows[1])
    again = table.take()
    assert again.start == rows[1].start
    assert rows[0].find_freer(9) == 102, "the new row is empty, though the old one was idle"


def test_each_row_has_its_own_cache_line():
    _, rows = make((0, 0), (0, 0))
    assert rows[1].start - rows[0].start == 8
    assert rows[0].start == 8, "and apart from what is in front"


def test_other_processes_read_the_row_of_a_worker():
    table, rows = make((0, 0), (0, 0))
    later = table.take()
    join(fork(lambda: (later.set_pid(77), later.set_connections(1), later.set_idle(5))))
    assert rows[0].find_freer(2) == 77


# --- Who is freer


@pytest.mark.parametrize(
    ("connections", "others", "freer"),
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
def test_freer_worker_is_idle_and_has_the_fewest_connections_below_ones_own(connections, others, freer):
    _, rows = make((connections, 1), *others)
    assert rows[0].find_freer(connections) == freer


@pytest.mark.parametrize(
    ("connections", "others", "freer"),
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
def test_not_more_workers_get_connections_than_there_are_cores(connections, others, freer):
    """A worker without connections leaves them to those with some, though these may be busy."""
    _, rows = make((connections, 1), *others, cores=2)
    assert rows[0].find_freer(connections) == freer


@pytest.mark.parametrize(
    ("others", "idle"), [([(1, 5)], True), ([(0, 5)], True), ([(1, 0), (0, 5)], False), ([(0, 0), (0, 5)], True)]
)
def test_idle_worker_without_a_core_to_run_on_does_not_count(others, idle):
    _, rows = make((3, 0), *others, cores=2)
    assert rows[0].is_another_idle(10) is idle


def test_idle_worker_with_more_connections_does_not_count():
    _, rows = make((3, 0), (2, 5), (9, 5))
    assert rows[0].is_another_idle(10, 2)
    assert not rows[0].is_another_idle(10, 1)


def test_streams_exclude_starting_and_draining_workers_and_the_control_worker():
    table, rows = make(*[(0, 1)] * 4)
    assert table.streams() == 0
    for row in rows:
        row.set_ready()
    assert table.streams() == 4
    rows[1].set_ready(False)
    rows[2].set_control()
    assert table.streams() == 2


def test_draining_worker_was_ready_and_its_freed_row_is_not():
    table, rows = make((0, 1), (0, 1))
    assert not rows[0].was_ready()
    rows[0].set_ready()
    rows[0].set_ready(False)
    assert (rows[0].is_ready(), rows[0].was_ready()) == (False, True)
    table.free(rows[0])
    assert not table.take().was_ready()


def test_rows_of_workers_that_could_not_be_forked_are_freed():
    table = WorkerTable(3, 1)
    rows = [table.take() for _ in range(3)]
    table.keep(rows[1:2])
    assert [table.take().index for _ in range(2)] == [0, 2]


def test_worker_is_not_freer_than_itself():
    _, rows = make((0, 1))
    assert rows[0].find_freer(5) is None
    assert not rows[0].is_another_idle(10)


@pytest.mark.parametrize(
    ("others", "until", "idle"),
    [([], 10, False), ([0], 10, False), ([10], 10, True), ([11], 10, False), ([0, 11, 3], 10, True)],
)
def test_another_worker_counts_as_idle_after_a_while(others, until, idle):
    _, rows = make((0, 1), *((0, since) for since in others))
    assert rows[0].is_another_idle(until) is idle


def test_dead_worker_is_not_found():
    table, rows = make((3, 0), (0, 1), (0, 1))
    table.free(rows[1])
    assert rows[0].find_freer(3) == 102
    table.free(rows[2])
    assert rows[0].find_freer(3) is None
    assert not rows[0].is_another_idle(10)


def test_worker_in_a_slot_after_a_freed_one_is_found():
    """Rows are read up to the last one ever taken, not up to the number of those taken now."""
    table, rows = make((3, 0), (0, 0), (1, 1))
    table.free(rows[1])
    assert rows[0].find_freer(3) == 102


# --- Waking


def test_waking_sends_the_signal_and_ignores_dead_workers():
    script = (
        "import signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(WAKE)}])\n"
        "print(flush=True)\n"
        f"sys.exit(signal.sigwait([{int(WAKE)}]) != {int(WAKE)})"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        wake(process.pid)
        assert process.wait(60) == 0
    wake(2**31 - 1)  # no process has such an id


def test_wake_signal_is_not_used_by_gunicorn():
    assert WAKE not in {
        *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGABRT, signal.SIGCHLD),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH),
    }
