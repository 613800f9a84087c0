"""Fixtures: a service with a model of every kind, shared by the tests that only ask it."""

import os
import sys
import time
from collections import Counter

import model_zoo
import pytest
from hypothesis import HealthCheck, settings
from service import serve, write_config

from ovms_rest.protocol import waiting_time

# Hundreds of processes import the service, and each worker of pytest-xdist all tests: with compiled modules, as users
# have them, in half the time. Set here, as images of containers and CI often forbid to write them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The same cases every time, so that a run that fails does so for what was changed. Others are tried by
# `pytest --hypothesis-profile random`. How long a case takes depends on what else runs.
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, **TIMELESS)
settings.register_profile("random", **TIMELESS)
settings.load_profile("repeatable")


def pytest_xdist_auto_num_workers(config):
    """One process more than cores: the tests of a service mostly wait for it."""
    return len(os.sched_getaffinity(0)) + 1


# Their files run services, browsers and fuzzers, and take up to a minute each.
SLOW_FOLDERS = {"arbiter", "clients", "conformance", "console", "deploy", "faults", "fuzz", "tracing", "worker"}


def pytest_configure(config):
    """Have pytest-xdist keep the order of the files; its own would run a file of few slow tests last and alone."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Put the slow folders first, and in either part the files with most tests."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name not in SLOW_FOLDERS, -counts[item.path], item.path))


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    """Two workers that serve relu, add, types (all datatypes), scalar, strings, text2d, matrix and an ONNX model."""
    directory = tmp_path_factory.mktemp("service")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    model_zoo.save(model_zoo.relu(), directory / "relu")
    model_zoo.save(model_zoo.add(), directory / "add")
    every = {name: (element_type, (-1, 2)) for name, element_type in model_zoo.ELEMENT_TYPES.items()}
    model_zoo.save(model_zoo.passthrough(**every), directory / "types")
    model_zoo.save(model_zoo.relu(()), directory / "scalar")
    model_zoo.save(model_zoo.strings(), directory / "strings")
    model_zoo.save(model_zoo.strings((-1, 2)), directory / "text2d")
    model_zoo.save(model_zoo.matrix(), directory / "matrix")
    model_zoo.save_onnx_add_one(directory / "onnx")
    names = ("relu", "add", "types", "scalar", "strings", "text2d", "matrix", "onnx")
    config = write_config(directory, *({"name": name, "base_path": name, "plugin_config": exact} for name in names))
    with serve(directory, "-w", "2", config=config, OVMS_REST_MODEL_CONTROL="local") as running:
        yield running


@pytest.fixture
def new_clock(monkeypatch):
    """Look at the clock as a process that has just begun: it may have been put forward while the tests run."""
    monkeypatch.setattr(waiting_time, "_clock", waiting_time.Clock(time.time_ns(), time.monotonic_ns()))
