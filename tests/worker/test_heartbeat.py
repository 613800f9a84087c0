"""Heartbeats of workers in memory."""

import os
import time
import types

from gunicorn.workers import base

from ovms_rest.worker import heartbeat
from ovms_rest.worker.heartbeat import Heartbeat

CFG = types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid())


def test_last_update_is_the_time_of_the_last_report():
    beat = Heartbeat(CFG)
    os.utime(beat.fileno(), (1, 1))
    assert beat.last_update() == 1
    before = time.monotonic()
    beat.notify()
    assert before - 0.001 <= beat.last_update() <= time.monotonic()
    beat.close()


def test_heartbeat_may_be_closed_twice():
    beat = Heartbeat(CFG)
    beat.close()
    beat.close()


def test_gunicorns_workers_use_it_once_installed(monkeypatch):
    monkeypatch.setattr(base, "WorkerTmp", None)
    heartbeat.install()
    assert base.WorkerTmp is Heartbeat
