"""Models that a reload replaces, and the memory that the arbiter shares with its workers."""

import os

import model_zoo
import slow_models
from service import open_files, serve, write_config

from ovms_rest.host.process_memory import own_bytes


def test_arbiter_keeps_no_model_that_was_replaced(tmp_path):
    model_zoo.save(slow_models.growing(), tmp_path / "m")
    counts = []
    with serve(tmp_path, "-w", "1", config=write_config(tmp_path, {"name": "m", "base_path": "m"})) as service:
        service.wait_for_workers(1)
        for _ in range(4):
            os.utime(tmp_path / "m/1/model.xml")
            assert service.request("POST", "/v1/config/reload").status in (200, 201)
            counts.append(sum("memfd:model" in file for file in open_files(service.process.pid)))
    assert counts[0] > 0
    assert counts[-1] <= counts[0] + 1


def test_workers_share_the_memory_of_the_arbiter_at_the_start_and_after_a_reload(tmp_path):
    """All have about as little of their own as the last one that was forked."""
    model_zoo.save(slow_models.growing(), tmp_path / "m")
    with serve(tmp_path, "-w", "3", config=write_config(tmp_path, {"name": "m", "base_path": "m"})) as service:
        service.wait_for_workers(3)
        started = [own_bytes(pid) for pid in service.workers()]
        os.utime(tmp_path / "m/1/model.xml")
        assert service.request("POST", "/v1/config/reload").status == 201
        service.wait_for_workers(3)
        reloaded = [own_bytes(pid) for pid in service.workers()]
    for sizes in (started, reloaded):
        assert max(sizes) < 1.5 * min(sizes), (started, reloaded)
