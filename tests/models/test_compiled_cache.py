"""OpenVINO's cache of compiled models when it is read-only or locked: its models are used if possible, or compiled."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import model_zoo
import pytest

from ovms_rest.models import runtime

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


# --- The lock


@contextmanager
def holding(cache):
    """Lock a cache as another process would; yield a function that releases it."""
    descriptor = os.open(cache / ".lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_cached(cache):
    """Compile a model with a cache; return whether it came from there."""
    properties = {"CACHE_DIR": str(cache), "ENABLE_MMAP": False}
    return runtime._compile(model_zoo.relu((1, 4)), "CPU", properties).get_property("LOADED_FROM_CACHE")


def test_model_is_compiled_while_another_process_keeps_the_cache_locked(tmp_path, monkeypatch, caplog):
    """It is waited for once, not for each model; later the cache is used again."""
    assert [is_cached(tmp_path) for _ in range(2)] == [False, True]
    monkeypatch.setattr(runtime, "_LOCK_SECONDS", 0.1)
    with holding(tmp_path):
        assert not is_cached(tmp_path)
        monkeypatch.setattr(runtime, "_LOCK_SECONDS", 1000)
        assert not is_cached(tmp_path)
    assert caplog.messages == [
        f"another process keeps the cache directory {tmp_path} locked; models are compiled without it meanwhile"
    ]
    assert is_cached(tmp_path)


def test_lock_of_the_cache_is_waited_for(tmp_path, monkeypatch):
    assert not is_cached(tmp_path)
    monkeypatch.setattr(runtime, "_LOCK_SECONDS", 60)
    with holding(tmp_path) as release:
        timer = threading.Timer(0.3, release)
        timer.start()
        assert is_cached(tmp_path)
        timer.join()


def test_other_users_cannot_lock_the_cache(tmp_path):
    is_cached(tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache" / ".lock").stat().st_mode) == 0o600


def test_cache_is_read_without_its_lock_by_users_who_may_not_open_that(tmp_path, monkeypatch):
    """A process of another user would not find OpenVINO's files in a private environment."""
    assert not is_cached(tmp_path)

    def open_as_another_user(path, *arguments, **options):
        if Path(path).name == ".lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, *arguments, **options)

    with holding(tmp_path):
        opening = os.open
        monkeypatch.setattr(os, "open", open_as_another_user)
        assert is_cached(tmp_path)
