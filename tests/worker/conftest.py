"""Services of models whose inference times and response sizes are set by the request."""

import subprocess

import pytest
import slow_models
from workers import starting


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A config with relu, counting, filling and wide."""
    return slow_models.save(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(tmp_path_factory, models):
    """Start services that end with the test."""
    with starting(tmp_path_factory.mktemp, models) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory, models):
    """Start services that end with the module."""
    with starting(tmp_path_factory.mktemp, models) as start:
        yield start


@pytest.fixture(scope="module")
def patient(start_shared):
    """A worker with the default limits."""
    return start_shared(1)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, and its key."""
    directory = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    return str(directory / "cert.pem"), str(directory / "key.pem")
