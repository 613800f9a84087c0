"""gunicorn's hooks, called without gunicorn."""

import os
import sys
import time
import types
from queue import SimpleQueue
from signal import SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTIN, SIGUSR2

import pytest
from forking import fork, join

from ovms_rest.arbiter import hooks
from ovms_rest.arbiter.reloading import MAX_DEATHS, Managed, Reloading
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.mailbox import CONTROL
from ovms_rest.shared_memory.table import WorkerTable
from ovms_rest.worker.heartbeat import Heartbeat


def make_arbiter(tmp_path, models):
    """Make what the hooks need of an arbiter and its application."""
    managed = Managed(Settings(), WorkerTable(8, 1), Reloading(tmp_path, models, None), None, "")
    app = types.SimpleNamespace(wsgi=lambda: types.SimpleNamespace(release=lambda slot, death: ""))
    return types.SimpleNamespace(
        app=app,
        managed=managed,
        settings=managed.settings,
        control_sockets=[],
        tls=None,
        WORKERS={},
        SIG_QUEUE=SimpleQueue(),
        span_sender=None,
    )


def make_worker(arbiter, pid):
    """Make a worker as the hooks use it, before its fork."""
    owner = types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid())
    worker = types.SimpleNamespace(pid=pid, death=None, tmp=Heartbeat(owner))
    hooks.pre_fork(arbiter, worker)
    return worker


def test_model_is_given_up_after_several_workers_died_opening_it(tmp_path, caplog):
    models = ModelRegistry({"m": Entry({1: None}), "n": Entry({1: None})})
    arbiter = make_arbiter(tmp_path, models)
    for deaths in range(1, MAX_DEATHS + 1):
        worker = make_worker(arbiter, deaths)
        join(fork(lambda worker=worker: hooks.note_opening(worker, "m/1")))
        assert models.versions("m") == ["1"]
        hooks.child_exit(arbiter, worker)
        assert f"worker {deaths} died or hung while it opened 'm/1' (model and version)" in caplog.text
    assert models.versions("m") == []
    assert models.versions("n") == ["1"]


def test_signals_to_reload_that_came_during_a_reload_become_one(tmp_path):
    arbiter = make_arbiter(tmp_path, ModelRegistry({}))
    came = [SIGCHLD, SIGHUP, SIGTTIN, SIGHUP, SIGTTIN, SIGHUP]
    assert hooks._wait_for_signals(arbiter, lambda timeout: came) == [SIGCHLD, SIGHUP, SIGTTIN, SIGTTIN]
    assert hooks._wait_for_signals(arbiter, lambda timeout: [SIGHUP]) == [SIGHUP]


@pytest.mark.parametrize(
    ("came", "handled"),
    [
        ([SIGTERM], [SIGTERM]),
        ([SIGHUP, SIGTTIN, SIGTERM, SIGHUP], [SIGTERM]),
        ([SIGTERM, SIGCHLD, SIGQUIT], [SIGQUIT]),
        ([SIGINT, SIGTERM], [SIGINT]),
        ([SIGHUP, CONTROL, CONTROL, SIGTERM], [CONTROL, SIGTERM]),
        ([SIGTERM, CONTROL], [CONTROL, SIGTERM]),
        ([SIGUSR2, SIGHUP, SIGTERM], [SIGUSR2, SIGTERM]),
        ([SIGTERM, SIGUSR2], [SIGTERM]),
    ],
)
def test_signal_to_end_is_handled_before_reloads_that_came_with_it(tmp_path, came, handled):
    """Changes with callers come first, but see that the service is to end."""
    arbiter = make_arbiter(tmp_path, ModelRegistry({}))
    assert hooks._wait_for_signals(arbiter, lambda timeout: came) == handled
    assert hooks.is_shutdown_requested(arbiter)
    assert hooks._renew(arbiter) == "the service is shutting down"


def test_worker_that_ends_while_serving_blames_no_model(tmp_path, caplog):
    worker = make_worker(arbiter := make_arbiter(tmp_path, None), 1)
    join(fork(lambda: (hooks.note_opening(worker, "m"), hooks.note_opening(worker, ""))))
    hooks.child_exit(arbiter, worker)
    assert "died" not in caplog.text


@pytest.mark.parametrize("stream", ["closed before the start", "closed since"])
def test_worker_exits_without_unwinding_if_its_standard_output_is_closed(stream):
    def end():
        if stream == "closed since":
            sys.stdout.close()
        else:
            sys.stdout = None  # as Python has it
        try:
            sys.exit(7)
        except SystemExit:
            hooks.worker_exit(None, types.SimpleNamespace(pid=os.getpid()))

    assert os.waitstatus_to_exitcode(os.waitpid(fork(end), 0)[1]) == 7


def test_every_model_that_a_worker_opens_has_the_load_timeout_of_its_own(tmp_path):
    worker = make_worker(make_arbiter(tmp_path, None), 1)
    for name in ("m/1", "n/1"):
        worker.tmp.notify()
        latest = time.monotonic() + worker.settings.load_timeout_seconds
        hooks.note_opening(worker, name)
        assert worker.tmp.last_update() == pytest.approx(latest, abs=10)
