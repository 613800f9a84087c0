"""Changing what is served: from a change on the disk, or a call, to a new generation of workers that serves it.

The arbiter loads what is new or changed while the old workers go on. Workers ask it by messages, and read how it went
from what it publishes. What was loaded with a configuration of its own, or unloaded, by a call, is known to the arbiter
alone: it holds for all workers that it forks, and is forgotten when the service ends.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ovms_rest.config import ModelConfig, load_config, parse_model
from ovms_rest.errors import BusyError, ConfigError, NotFoundError, ReloadError, TryLaterError
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.models.watching import Stamp, stamp
from ovms_rest.pool.mailbox import Mailbox
from ovms_rest.protocol.words import quote

log = logging.getLogger("gunicorn.error.ovms_rest")

Stop = Callable[[], bool]
Load = Callable[[tuple[ModelConfig, ...], ModelRegistry, Stop], ModelRegistry]

# So many outcomes are kept for those who asked and have not looked yet.
_KEPT_OUTCOMES = 1024


class Change(NamedTuple):
    """What is asked for: a reload of all that has changed, or one model to be loaded or unloaded.

    `id` is that under which the outcome is looked for, "" when nobody does; `config` is the one that came with a load.
    """

    what: Literal["reload", "load", "unload"] = "reload"
    name: str = ""
    config: dict[str, Any] | None = None
    id: str = ""


class _Outcome(NamedTuple):
    """What came of a change: an HTTP status, and what went wrong."""

    status: int
    error: str = ""


class Reloads:
    """What the arbiter and the workers know of changes; made before the first fork."""

    def __init__(self, config: Path, models: ModelRegistry, load: Load) -> None:
        """Take the config file, a registry to be filled, and what fills it.

        `load` gets the models to load, the registry as it is, and what tells it to stop, and returns a new registry.
        """
        self._config = config
        self._models = models
        self._load = load
        self._mailbox = Mailbox()
        self._ids = itertools.count()
        # Of what is served: what the file says, what a call says instead or besides, and what a call took away.
        self._filed: dict[str, ModelConfig] = {}
        self._given: dict[str, ModelConfig] = {}
        self._unloaded: set[str] = set()
        # How the disk was when it was read.
        self._stamps: dict[Path, Stamp] = {config: ()}
        self._seen = self._stamps
        self._outcomes: dict[str, _Outcome] = {}
        self._run: list[tuple[Change, _Outcome]] = []
        self._changed = False

    # --- In the arbiter

    def load(self, stop: Stop = lambda: False) -> None:
        """Load all that is to be served. Raises ConfigError, and changes nothing then."""
        now = stamp(self._config)
        filed = {config.name: config for config in self._read_config(now)}
        gone = self._filed.keys() - filed.keys()
        given = {name: config for name, config in self._given.items() if name not in gone}
        wanted = filed | given
        unloaded = self._unloaded & wanted.keys()
        configs = [config for name, config in wanted.items() if name not in unloaded]
        stamps = {self._config: now} | {config.base_path: stamp(config.base_path) for config in configs}
        loaded = self._load(tuple(configs), self._models, stop).entries
        self._filed, self._given, self._unloaded = filed, given, unloaded
        self._stamps = self._seen = stamps
        self._replace({name: loaded.get(name) or self._models.entries[name] for name in wanted})

    def receive(self) -> list[Change]:
        """Return what workers have asked for."""
        return [Change(**message) for message in self._mailbox.receive()]

    def run(self, changes: list[Change], stop: Stop) -> bool:
        """Make changes; tell whether workers have to be forked anew to serve, or to tell, what has come of them."""
        before = dict(self._models.entries)
        self._run = []
        reloaded = None
        for change in changes:
            if change.what != "reload":
                outcome = self._make(change, stop)
            elif reloaded is None:
                outcome = reloaded = self._make(change, stop)
            else:  # one serves all who ask for it
                outcome = reloaded
            self._run.append((change, outcome))
        self._changed = self._differs(before)
        return self._changed

    def _make(self, change: Change, stop: Stop) -> _Outcome:
        """Make a change; tell what is wrong with it, if that is known before the new generation serves."""
        try:
            if change.what == "reload":
                self.load(stop)
            elif change.what == "load":
                self._load_one(change.name, change.config, stop)
            else:
                self._unload_one(change.name)
        except ConfigError as error:
            for problem in error.problems:
                log.error("%s failed, everything goes on as it was: %s", change.what, problem)
            return _Outcome(400, "; ".join(error.problems))
        except NotFoundError as error:
            return _Outcome(404, str(error))
        except ReloadError as error:
            log.error("load of model %r failed: %s", change.name, error)
            return _Outcome(error.status, str(error))
        except Exception:  # the arbiter is what the whole service hangs on
            log.exception("%s failed, everything goes on as it was", change.what)
            return _Outcome(500, "internal error; the reason is in the log of the server")
        return _Outcome(200)

    def _load_one(self, name: str, given: dict[str, Any] | None, stop: Stop) -> None:
        """Load a model as the file says, or with the configuration `given`, and nothing else.

        Raises NotFoundError, ConfigError and ReloadError. A model that does not serve then goes on as it was.
        """
        filed = {config.name: config for config in load_config(self._config)}
        config = filed.get(name) or self._given.get(name)
        if given is not None:
            config = parse_model(name, given, self._config.parent, config)
        elif config is None:
            known = ", ".join(map(repr, itertools.islice(filed, 10))) or "none"
            raise NotFoundError(f"model {quote(name)} is not in {self._config}, where there are: {known}")
        now = stamp(config.base_path)
        entry = self._load((config,), self._models, stop).entries[name]
        problems = entry.problems(name)
        if problems and (given is not None or name in self._unloaded):
            raise ReloadError("; ".join(problems), 412)
        if name in filed:
            self._filed[name] = filed[name]
        if given is not None or name not in filed:
            self._given[name] = config
        else:
            self._given.pop(name, None)
        self._unloaded.discard(name)
        self._stamps = self._seen = {**self._stamps, config.base_path: now}
        self._replace({**self._models.entries, name: entry})

    def _unload_one(self, name: str) -> None:
        """Take a model away. Raises NotFoundError."""
        config = self._given.get(name) or self._filed.get(name)
        if config is None:
            raise NotFoundError(f"model {quote(name)} is unknown")
        if name in self._unloaded:
            return
        log.info("model %r is unloaded", name)
        self._unloaded.add(name)
        served = self._models.entries[name].versions
        self._replace({**self._models.entries, name: Entry(ended=tuple(served) or (1,), policy=config.version_policy)})
        others = {other.base_path for other_name, other in self._wanted().items() if other_name != name}
        if config.base_path not in others:
            self._stamps = self._seen = {path: of for path, of in self._stamps.items() if path != config.base_path}

    def _wanted(self) -> dict[str, ModelConfig]:
        wanted = self._filed | self._given
        return {name: config for name, config in wanted.items() if name not in self._unloaded}

    def _replace(self, entries: dict[str, Entry]) -> None:
        self._models.replace(ModelRegistry(entries))

    def _differs(self, before: dict[str, Entry]) -> bool:
        """Tell whether what serves, or what is told of it, is not the same as before."""
        after = self._models.entries
        return list(before) != list(after) or any(after[name].differs(entry) for name, entry in before.items())

    def _read_config(self, now: Stamp) -> tuple[ModelConfig, ...]:
        """Read the config file; one that is wrong is not read again until it changes."""
        try:
            return load_config(self._config)
        except ConfigError:
            self._stamps = self._seen = {**self._stamps, self._config: now}
            raise

    def end(self) -> None:
        """Publish what came of the changes, when the new generation serves; its workers may have died at a model."""
        for change, outcome in self._run:
            if change.id:
                self._outcomes[change.id] = outcome if outcome.error else self._judge(change)
        self._outcomes = dict(list(self._outcomes.items())[-_KEPT_OUTCOMES:])
        outcomes = {id_: list(outcome) for id_, outcome in self._outcomes.items()}
        told = {"models": self._models.status(), "outcomes": outcomes}
        if not self._mailbox.publish(told):
            log.error("the status of %d models is too long for the answers of reloads", len(self._models.entries))
            self._mailbox.publish({**told, "models": {}})

    def _judge(self, change: Change) -> _Outcome:
        """Tell what came of a change by what serves."""
        if change.what == "reload":
            problems = self._models.problems()
        else:
            problems = self._models.entries[change.name].problems(change.name)
        if problems:
            return _Outcome(412, "; ".join(problems))
        return _Outcome(201 if self._changed else 200)

    # --- In a worker

    def watch(self) -> None:
        """Ask for a reload when something has changed, and has stayed the same since the last look.

        What is only half written changes again before the next.
        """
        now = self._look()
        if now != self._stamps and now == self._seen:
            log.info("the config or a model has changed")
            with contextlib.suppress(BusyError):  # then there will be another look
                self._mailbox.send(Change()._asdict())
                self._stamps = now  # the new generation looks for itself
        self._seen = now

    def request(self, ticket: dict[str, Any]) -> dict[str, Any] | None:
        """Reload because a client asks for it; return the status of all models, None when nothing has changed.

        Raises TryLaterError until the new generation serves, with the same `ticket` to be shown again, and ReloadError
        with the reason for one that failed.
        """
        outcome, models = self._ask(ticket, Change())
        return models if outcome.status == 201 else None

    def load_model(self, ticket: dict[str, Any], name: str, config: dict[str, Any] | None) -> None:
        """Load a model because a client asks for it, as the file says or with a configuration of its own.

        Raises TryLaterError until every worker serves it so, with the same `ticket` to be shown again; NotFoundError
        and ReloadError with the reason for what failed; BusyError, and InvalidRequestError for too large a config.
        """
        self._ask(ticket, Change("load", name, config))

    def unload_model(self, ticket: dict[str, Any], name: str) -> None:
        """Unload a model because a client asks for it. Raises TryLaterError, NotFoundError and BusyError as above."""
        self._ask(ticket, Change("unload", name))

    def _ask(self, ticket: dict[str, Any], change: Change) -> tuple[_Outcome, dict[str, Any]]:
        """Have the arbiter make a change, once for a ticket; return what came of it, and the status of all models."""
        if "id" not in ticket:
            ticket.update(id=f"{os.getpid()}-{next(self._ids)}", writes=self._mailbox.writes())
            self._mailbox.send(change._replace(id=ticket["id"])._asdict())
        writes = self._mailbox.writes()
        told = None if writes == ticket["writes"] else self._mailbox.read()
        if told is None:
            raise TryLaterError
        if ticket["id"] not in told["outcomes"]:
            ticket["writes"] = writes
            raise TryLaterError
        outcome = _Outcome(*told["outcomes"][ticket["id"]])
        if outcome.status == 404:
            raise NotFoundError(outcome.error)
        if outcome.error:
            raise ReloadError(outcome.error, outcome.status)
        return outcome, told["models"]

    # --- Both

    def _look(self) -> dict[Path, Stamp]:
        """Describe the config file and the directories of all models that are to be served."""
        return {path: stamp(path) for path in self._stamps}
