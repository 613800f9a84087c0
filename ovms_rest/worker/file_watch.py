"""Watching the config file, models and libraries: one worker asks for a reload when they change."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ovms_rest.errors import BusyError
from ovms_rest.log import log
from ovms_rest.models.watching import CHANGING, Stamp, stamp
from ovms_rest.shared_memory.mailbox import Mailbox
from ovms_rest.shared_memory.messages import Change

# A load of files that were being written is repeated after growing pauses.
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 60.0


class FileWatch:
    """Compares files with the stamps of when they were loaded."""

    def __init__(self, stamps: Mapping[Path, Stamp], mailbox: Mailbox) -> None:
        self._stamps = dict(stamps)
        self._mailbox = mailbox
        self._is_begun = False
        self._previous = self._stamps  # at the last look
        # The stamps at the last request for a reload, when to repeat that without a further change, and the next pause.
        self._requested: dict[Path, Stamp] = {}
        self._repeat_at, self._pause = 0.0, _MIN_PAUSE_SECONDS
        self._logged: set[int | None] = set()  # error numbers

    def look(self) -> None:
        """Ask for a reload when files have changed, but not since the last look: half-written files change again.

        Each kind of system error is logged once and leads to another attempt at the next look: a disk that is
        unavailable for a while ends no worker.
        """
        if not self._is_begun:
            self._is_begun = True
            self._leave_out_forbidden()
        try:
            self._ask_if_changed()
        except OSError as error:
            if error.errno not in self._logged:
                self._logged.add(error.errno)
                log.error("cannot check whether the config or a model has changed, trying again: %s", error)

    def _leave_out_forbidden(self) -> None:
        """Leave out the paths that the arbiter may read and this worker, of another user (--user), may not."""
        forbidden = [path for path in self._stamps if _is_forbidden(path)]
        for path in forbidden:
            log.error("changes of %s are only noticed by a reload: user %d may not read it", path, os.geteuid())
        self._stamps = {path: known for path, known in self._stamps.items() if path not in forbidden}
        self._previous = self._stamps

    def _ask_if_changed(self) -> None:
        now = {path: stamp(path) for path in self._stamps}
        is_stable = now == self._previous
        self._previous = now
        if now == self._stamps or not is_stable or (now == self._requested and time.monotonic() < self._repeat_at):
            return
        log.info("the config or a model has changed")
        with contextlib.suppress(BusyError):  # the next look asks again
            self._mailbox.send(Change()._asdict())
            # A new generation watches by itself. There is none if files were still being written.
            unfinished = {path: CHANGING for path, known in self._stamps.items() if known == CHANGING}
            self._requested, self._stamps = now, now | unfinished
            self._repeat_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _MAX_PAUSE_SECONDS)


def _is_forbidden(path: Path) -> bool:
    try:
        if path.is_dir():
            os.scandir(path).close()
    except OSError as error:
        return isinstance(error, PermissionError)
    return False
