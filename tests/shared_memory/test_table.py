"""The rows of workers, and waking."""

import signal
import subprocess
import sys

import pytest
from forking import fork, join
from worker_rows import make_rows

from ovms_rest.shared_memory.table import WAKE, WorkerTable, wake
from ovms_rest.worker.balance import Balance

# --- Rows


def test_rows_are_taken_until_none_is_free():
    table = WorkerTable(3, 2)
    rows = [table.take() for _ in range(3)]
    assert len({row.start for row in rows}) == 3
    with pytest.raises(RuntimeError, match="already 3 workers, the limit"):
        table.take()


def test_freed_row_is_empty_when_taken_again():
    table, rows = make_rows((1, 5), (2, 5), (3, 5))
    table.free(rows[1])
    again = table.take()
    assert again.start == rows[1].start
    assert [worker.pid for worker in table.workers()] == [100, 102], "the new row is empty"


def test_each_row_has_its_own_cache_line():
    _, rows = make_rows((0, 0), (0, 0))
    assert rows[1].start - rows[0].start == 8
    assert rows[0].start == 8, "and apart from what is in front"


def test_other_processes_read_the_row_of_a_worker():
    table, rows = make_rows((0, 0), (0, 0))
    later = table.take()
    join(fork(lambda: (later.set_pid(77), later.set_connections(1), later.set_idle(5))))
    assert rows[0].all_workers()[2] == (2, 77, 1, 5, 0, 0)


def test_row_that_is_taken_or_freed_while_it_is_read_is_no_worker():
    """A signal to the process id 0 would go to the whole service."""
    table, rows = make_rows((1, 5), (0, 5), (2, 5))
    rows[1].set_pid(0)
    assert [worker.pid for worker in rows[0].all_workers()] == [worker.pid for worker in table.workers()] == [100, 102]
    assert Balance(rows[0], 10).choose(2, has_just_accepted=False) is None


def test_streams_exclude_starting_and_draining_workers_and_the_control_worker():
    table, rows = make_rows(*[(0, 1)] * 4)
    assert table.streams() == 0
    for row in rows:
        row.set_ready()
    assert table.streams() == 4
    rows[1].set_ready(False)
    rows[2].set_control()
    assert table.streams() == 2


def test_draining_worker_was_ready_and_its_freed_row_is_not():
    table, rows = make_rows((0, 1), (0, 1))
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
