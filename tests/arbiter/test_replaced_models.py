"""Models that a reload replaces."""

import os

import model_zoo
import slow_models
from service import open_files, serve, write_config


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
