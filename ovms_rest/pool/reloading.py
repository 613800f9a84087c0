"""Reloading: from a change on the disk, or a call, to a new generation of workers that serves it.

The arbiter loads what is new or changed while the old workers go on; a reload is a SIGHUP to it, whoever sends that.
It tells how it went in a page of shared memory, which all workers of all generations see.
"""

import logging
import mmap
import os
import signal
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
# Numbers of eight bytes in front of the outcome: how many reloads were begun and ended, its length, and whether another
# was asked for since. A worker writes only the last; a lost write there is made up for by the signal that goes with it.
_BEGUN, _ENDED, _LENGTH, _ASKED = range(4)
_HEAD_BYTES = 4 * 8


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
        page = memoryview(mmap.mmap(-1, _PAGE_BYTES))
        self._numbers, self._outcome = page[:_HEAD_BYTES].cast("Q"), page[_HEAD_BYTES:]
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

    def run(self, stop: Stop) -> str:
        """Load what has changed. What is wrong with the config is returned, and leaves everything as it was."""
        self._numbers[_BEGUN] += 1
        self._numbers[_ASKED] = 0
        try:
            self.load(stop)
        except ConfigError as error:
            for problem in error.problems:
                log.error("reload failed, everything goes on as it was: %s", problem)
            return "; ".join(error.problems)
        return ""

    def end(self, fault: str) -> None:
        """Tell the outcome when the new generation serves, or what `run` has found wrong with the config."""
        outcome: dict[str, Any] = {"status": 201, "models": self._models.status()}
        if fault:
            outcome = {"status": 400, "error": fault}
        elif problems := self._models.problems():
            outcome = {"status": 412, "error": "; ".join(problems)}
        data = orjson.dumps(outcome)
        if len(data) > len(self._outcome):
            data = orjson.dumps({"status": outcome["status"], "error": "the outcome is too long; it is in the log"})
        self._outcome[: len(data)] = data
        self._numbers[_LENGTH] = len(data)
        self._numbers[_ENDED] = self._numbers[_BEGUN]  # last, for it tells that the rest is there

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
            begun, ended, _, asked = self._numbers
            if not asked and begun == ended and self._look() == self._stamp and not self._models.problems():
                return None
            try:
                load_config(self._config)
            except ConfigError as error:
                raise ReloadError("; ".join(error.problems), 400) from error
            ticket["ended"] = begun + 1
            if not asked:
                self._ask()
        if self._numbers[_ENDED] < ticket["ended"]:
            raise TryLaterError
        outcome: dict[str, Any] = orjson.loads(self._outcome[: self._numbers[_LENGTH]])
        if "error" in outcome:
            raise ReloadError(outcome["error"], outcome["status"])
        models: dict[str, Any] = outcome["models"]
        return models

    def _ask(self) -> None:
        self._numbers[_ASKED] = 1
        os.kill(os.getppid(), signal.SIGHUP)

    # --- Both

    def _look(self) -> Stamp:
        """Describe the config file and the directories of all models that it named when it was read last."""
        return stamp_all(self._paths)
