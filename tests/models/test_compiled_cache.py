"""OpenVINO's cache of compiled models when it is read-only: its models are used, and others compiled."""

import json
import os
import subprocess
import sys

import model_zoo
import pytest

# Loads a model as the service does, and prints what it logs and whether the model came from the cache.
PROGRAM = """
import json, logging, os, sys
from pathlib import Path
from ovms_rest.config import ModelConfig
from ovms_rest.models.loading import LoadSettings, load_models
messages = []
class Handler(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger().addHandler(Handler())
logging.getLogger().setLevel(logging.INFO)
models = load_models([ModelConfig("m", Path(sys.argv[1]))], LoadSettings(cores=2, cache_dir=sys.argv[2]))
entry = models.entries["m"]
cached = [model._compiled.get_property("LOADED_FROM_CACHE") for model in entry.versions.values()]
print(json.dumps([cached, entry.failures, messages]), flush=True)
os._exit(0)
"""


@pytest.fixture
def directory(tmp_path):
    """A directory with a model."""
    model_zoo.save(model_zoo.relu((1, 4)), tmp_path / "relu")
    return tmp_path


def load(directory, cache, read_only=None):
    """Load the model with a cache, while a directory is mounted read-only, as root may write to any other."""
    command = [sys.executable, "-c", PROGRAM, directory / "relu", cache]
    if read_only is not None:
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        mount = ["unshare", "--mount", *root, "sh", "-c", 'mount --bind -o ro "$0" "$0" && exec "$@"', read_only]
        if subprocess.run([*mount, "true"], check=False).returncode:
            pytest.skip("no directory can be mounted read-only here")
        command = [*mount, *command]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def refusal(cache):
    return (
        f"the cache directory {cache} cannot be written: Read-only file system; "
        "models that are missing there are compiled at each start"
    )


def test_model_in_a_read_only_cache_is_imported(directory):
    cache = directory / "cache"
    assert load(directory, cache)[:2] == [[True], {}]  # after the trial, which filled it
    cached, failures, messages = load(directory, cache, read_only=cache)
    assert (cached, failures) == ([True], {})
    assert messages.count(refusal(cache)) == 1


def test_model_missing_in_a_read_only_cache_is_compiled(directory):
    cache = directory / "cache"
    cache.mkdir()
    cached, failures, messages = load(directory, cache, read_only=cache)
    assert (cached, failures) == ([False], {})
    assert messages.count(refusal(cache)) == 1
    assert list(cache.iterdir()) == []


def test_model_is_compiled_if_the_cache_directory_cannot_be_made(directory):
    cache = directory / "parent" / "cache"
    cache.parent.mkdir()
    cached, failures, messages = load(directory, cache, read_only=cache.parent)
    assert (cached, failures) == ([False], {})
    assert messages.count(refusal(cache)) == 1


def test_model_is_compiled_if_a_read_only_cache_is_unusable(directory):
    """OpenVINO tries to remove such a file, and fails if it cannot."""
    cache = directory / "cache"
    load(directory, cache)
    (blob,) = cache.glob("*.blob")
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content[:100])
    assert load(directory, cache, read_only=cache)[:2] == [[False], {}]
