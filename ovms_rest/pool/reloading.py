"""Reloading: from a change on the disk, or a call, to a new generation of workers that serves it.

The arbiter loads what is new or changed while the old workers go on; a reload is a SIGHUP to it, whoever sends that.
It tells how it went in a page of shared memory, which all workers of all generations see.
"""

import logging
import mmap
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from ovms_rest.config import ModelConfig, load_config
from ovms_rest.errors import ConfigError, ReloadError, TryLaterError
from ovms_rest.models.registry import ModelRegistry
from ovms_rest.models.watching import Stamp, stamp_all

log = logging.getLogger("gunicorn.error.ovms_rest")

Stop = Callable[[], bool]
Load = Callable[[tuple[ModelConfig, ...], ModelRegistry, Stop], ModelRegistry]

_PAGE_BYTES = 2**20
# How many reloads were begun and ended, whether one was asked for since, and the length of the outcome behind it.
_HEAD = struct.Struct("=QQQQ")


class Reloads:
    """What the arbiter and the workers know of reloads; made before the first fork."""

    def __init__(self, config: Path, models: ModelRegistry, load: Load) -> None:
        """Take the config file, a registry to be filled, and what fills it.

        `load` gets the models that the file names, the registry as it is, and what tells it to stop, and returns a new
        registry.
        """
        self._config = config
        self._models = models
        self._load = load
        self._page = mmap.mmap(-1, _PAGE_BYTES)
        self._paths = [config]
        self._stamp: Stamp = ()
        self._seen: Stamp = ()

    def load(self, stop: Stop = lambda: False) -> None:
        """Load all that the config names. Raises ConfigError, and changes nothing then."""
        self._stamp = self._seen = self._look()
        configs = load_config(self._config)
        self._paths = [self._config, *(config.base_path for config in configs)]
        self._stamp = self._seen = self._look()
        self._models.replace(self._load(configs, self._models, stop))

    # --- In the arbiter

    def run(self, stop: Stop) -> dict[str, Any]:
        """Load what has changed; return the outcome. What is wrong with the config leaves everything as it was."""
        begun, ended, _, length = self._read_head()
        self._write_head(begun + 1, ended, 0, length)
        try:
            self.load(stop)
        except ConfigError as error:
            for problem in error.problems:
                log.error("reload failed, everything goes on as it was: %s", problem)
            return {"status": 400, "error": "; ".join(error.problems)}
        problems = self._models.problems()
        if problems:
            return {"status": 412, "error": "; ".join(problems)}
        return {"status": 201, "models": self._models.status()}

    def end(self, outcome: dict[str, Any]) -> None:
        """Tell the outcome, when the new generation serves."""
        data = orjson.dumps(outcome)
        if _HEAD.size + len(data) > _PAGE_BYTES:
            data = orjson.dumps({"status": outcome["status"], "error": "the outcome is too long; it is in the log"})
        begun, _, asked, _ = self._read_head()
        self._page[_HEAD.size : _HEAD.size + len(data)] = data
        self._write_head(begun, begun, asked, len(data))

    # --- In a worker

    def watch(self) -> None:
        """Ask for a reload when something has changed, and has stayed the same since the last look.

        What is only half written changes again before the next.
        """
        now = self._look()
        if now != self._stamp and now == self._seen:
            self._stamp = now  # the new generation looks for itself
            log.info("the config or a model has changed")
            self._ask()
        self._seen = now

    def request(self, ticket: dict[str, int]) -> dict[str, Any] | None:
        """Reload because a client asks for it; return the status of all models, None when nothing has changed.

        Raises TryLaterError until the new generation serves, with the same `ticket` to be shown again, and ReloadError
        with the reason for one that failed.
        """
        if "ended" not in ticket:
            begun, ended, asked, _ = self._read_head()
            if not asked and begun == ended and self._look() == self._stamp and not self._models.problems():
                return None
            try:
                load_config(self._config)
            except ConfigError as error:
                raise ReloadError("; ".join(error.problems), 400) from error
            ticket["ended"] = begun + 1
            if not asked:
                self._ask()
        _, ended, _, length = self._read_head()
        if ended < ticket["ended"]:
            raise TryLaterError
        outcome: dict[str, Any] = orjson.loads(self._page[_HEAD.size : _HEAD.size + length])
        if "error" in outcome:
            raise ReloadError(outcome["error"], outcome["status"])
        models: dict[str, Any] = outcome["models"]
        return models

    def _ask(self) -> None:
        begun, ended, _, length = self._read_head()
        self._write_head(begun, ended, 1, length)
        os.kill(os.getppid(), signal.SIGHUP)

    # --- Both

    def _look(self) -> Stamp:
        """Describe the config file and the directories of all models that it named when it was read last."""
        return stamp_all(self._paths)

    def _read_head(self) -> tuple[int, int, int, int]:
        begun, ended, asked, length = _HEAD.unpack_from(self._page)
        return begun, ended, asked, length

    def _write_head(self, begun: int, ended: int, asked: int, length: int) -> None:
        _HEAD.pack_into(self._page, 0, begun, ended, asked, length)
