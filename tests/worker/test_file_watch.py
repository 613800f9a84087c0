"""The watch of files: a change asks for one reload, and no system error ends the worker."""

import os
from errno import EIO, ESTALE

import pytest

from ovms_rest.models.watching import CHANGING, stamp
from ovms_rest.shared_memory.messages import Change
from ovms_rest.worker import file_watch
from ovms_rest.worker.file_watch import FileWatch

RELOAD = Change()._asdict()


class FakeMailbox:
    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)


@pytest.fixture
def watched(tmp_path):
    """A file, a mailbox for requests to reload, and the watch of the file."""
    path, mailbox = tmp_path / "config.json", FakeMailbox()
    path.write_text("{}")
    return path, mailbox, FileWatch({path: stamp(path)}, mailbox)


def test_unchanged_file_asks_for_nothing(watched):
    _, mailbox, watch = watched
    watch.look()
    watch.look()
    assert mailbox.messages == []


def test_changed_file_asks_for_one_reload_at_the_second_look(watched):
    path, mailbox, watch = watched
    path.write_text('{"model_config_list": []}')
    watch.look()
    assert mailbox.messages == []
    watch.look()
    assert mailbox.messages == [RELOAD]
    watch.look()
    assert mailbox.messages == [RELOAD]


def test_file_that_changes_between_two_looks_is_left_alone(watched):
    path, mailbox, watch = watched
    for size in range(1, 5):
        path.write_text("{}" + " " * size)
        watch.look()
    assert mailbox.messages == []


def test_reload_of_files_that_were_being_written_is_repeated_after_growing_pauses(watched, monkeypatch):
    path, mailbox, _ = watched
    now = 100.0
    monkeypatch.setattr(file_watch.time, "monotonic", lambda: now)
    watch, asked = FileWatch({path: CHANGING}, mailbox), []
    for _ in range(16):
        watch.look()
        asked.append(len(mailbox.messages))
        now += 0.5
    assert asked == [0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]


def test_system_error_is_logged_once_for_each_kind_and_the_watch_goes_on(tmp_path, caplog, monkeypatch):
    """A worker calls it every second; an error would end it."""
    errors = [ESTALE, ESTALE, EIO, ESTALE, EIO, None]

    def stamp(path):
        error = errors.pop(0)
        if error is not None:
            raise OSError(error, os.strerror(error), str(path))
        return (("changed", 1, 1, 1),)

    config = tmp_path / "config.json"
    watch = FileWatch({config: ()}, FakeMailbox())
    monkeypatch.setattr(file_watch, "stamp", stamp)
    for _ in range(6):
        watch.look()
    assert errors == []
    assert [record.message for record in caplog.records] == [
        "cannot check whether the config or a model has changed, trying again: "
        f"[Errno {error}] {os.strerror(error)}: '{config}'"
        for error in (ESTALE, EIO)
    ]
