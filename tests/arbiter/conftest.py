"""Fixtures: configs of small models, and services that serve them."""

import contextlib

import model_zoo
import pytest
from generations import times
from service import serve, write_config


@pytest.fixture
def relu(tmp_path):
    """The path of a config with the model relu."""
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    return write_config(tmp_path, {"name": "relu", "base_path": "relu"})


@pytest.fixture
def start(tmp_path, relu):
    """A function that serves relu with this number of workers, with a control address one more, and waits for them."""

    @contextlib.contextmanager
    def start(workers, *arguments, **options):
        with serve(tmp_path, "-w", str(workers), *arguments, **{"config": relu, **options}) as service:
            count = workers + bool(options.get("OVMS_REST_CONTROL_BIND"))
            service.wait_for(lambda: len(service.workers()) == count)
            yield service

    return start


@pytest.fixture
def config(tmp_path):
    """The path of a config with the model m, which multiplies by 1."""
    model_zoo.save(times(1), tmp_path / "m")
    return write_config(tmp_path, {"name": "m", "base_path": "m"})


@pytest.fixture
def served(tmp_path):
    """A service of two workers that does not watch its files; m multiplies by 1 and other by 7."""
    model_zoo.save(times(1), tmp_path / "m")
    model_zoo.save(times(7), tmp_path / "other")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "other", "base_path": "other"})
    variables = {"OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0", "OVMS_REST_MODEL_CONTROL": "local"}
    with serve(tmp_path, "-w", "2", config=config, **variables, OVMS_REST_MODEL_ROOTS=str(tmp_path)) as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        yield service
