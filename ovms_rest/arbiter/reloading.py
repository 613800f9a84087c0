"""The arbiter's side of changes: running them while the workers keep serving, and publishing their outcomes.

Workers ask for changes over the mailbox (`resources.arbiter_client`, `worker.file_watch`), and read the outcomes in it.
"""

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ovms_rest.arbiter.changes import (
    Assemble,
    Entries,
    Housekeeping,
    Loader,
    LoadModels,
    Wanted,
    differ,
    load,
    load_model,
    unload_model,
)
from ovms_rest.arbiter.pauses import Pauses
from ovms_rest.config import Config, load_config
from ovms_rest.errors import (
    ConfigError,
    ForbiddenError,
    InvalidConfigError,
    LoadFailedError,
    NotFoundError,
    ReloadError,
    ServingError,
    ShortageError,
    UnavailableError,
)
from ovms_rest.log import log
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.registry import ModelRegistry
from ovms_rest.models.roots import Roots, find_roots
from ovms_rest.models.watching import Stamp, stamp
from ovms_rest.protocol.words import quote
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.log_levels import LogLevels
from ovms_rest.shared_memory.mailbox import Mailbox
from ovms_rest.shared_memory.messages import Change, Outcome
from ovms_rest.shared_memory.table import WorkerTable
from ovms_rest.tracing.tracing import Tracing

# The number of outcomes kept for callers that have not looked yet, and the bytes of each text; the log has all of it.
_KEPT_OUTCOMES = 256
_KEPT_BYTES = 2000
# A change needs this many free descriptors: without one, a model that cannot be read looks like a broken one.
_SPARE_DESCRIPTORS = 16
# A model is given up when this many workers have died while they opened it, and none born since has become ready.
MAX_DEATHS = 3


class Reloading:
    """Runs changes and replaces the registry; made before the first fork, and used in the arbiter."""

    def __init__(
        self,
        path: Path,
        models: ModelRegistry,
        load_models: LoadModels,
        assemble: Assemble = lambda definitions, libraries, models, previous, housekeep: {},
        find_roots: Callable[[Iterable[ModelConfig]], Roots] = find_roots,
        adopted: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin with an empty registry; `path` is that of the config file.

        `adopted` is called when the registry has been replaced, before workers are forked that serve it.
        """
        self.wanted = Wanted(path)
        self.mailbox = Mailbox()
        self._models = models
        self._load_models = load_models
        self._assemble = assemble
        self._find_roots = find_roots
        self._adopted = adopted
        self._deaths: dict[str, list[float]] = {}  # monotonic times when workers died, by the model that they opened
        self._outcomes: dict[str, Outcome] = {}
        self._fault = ""  # why the config file on disk is not in use
        self._pauses = Pauses()  # between reloads that fail because the system lacks a resource

    def start(self, config: Config, now: Stamp) -> None:
        """Load a config; `now` is the stamp of its file, taken before it was read."""
        self._adopt(*load(self.wanted, config, now, self._loader(lambda: False)))

    def receive(self) -> list[Change]:
        """Return the changes that workers asked for, and a reload when another attempt is due."""
        changes = [Change(**message) for message in self.mailbox.receive()]
        return [*changes, Change()] if self.is_due() else changes

    def is_due(self) -> bool:
        """Return whether a reload that failed for lack of a resource is due for another attempt."""
        return bool(self._pauses.failures) and self._pauses.is_over()

    def run(self, changes: Sequence[Change], housekeep: Housekeeping, renew: Callable[[bool], str]) -> None:
        """Run changes, and publish their outcomes once workers serve them.

        `housekeep` is called often while models load, which ends early when it returns True. `renew` gets whether the
        registry changed, replaces the generation if needed, and returns why that does not serve yet, "" if it does.
        """
        self._deaths.clear()  # a model that is loaded again may fail as often again
        before = dict(self._models.entries)
        results: list[tuple[Change, ServingError | None]] = []
        for change in changes:
            # One reload serves all that ask for it.
            same = next(((error,) for other, error in results if change.action == other.action == "reload"), None)
            results.append((change, same[0] if same else self._run(change, housekeep)))
        has_changed = differ(before, self._models.entries)
        del before
        if has_changed:
            _free_replaced()
        fault = renew(has_changed)
        for change, error in results:
            if change.id:
                self._outcomes[change.id] = self._judge(change, error, fault, has_changed)
        self._publish(len(results))

    def count_death(self, name: str) -> None:
        """Count a worker that died while it opened a version, "model/version"; give that up after some."""
        deaths = self._deaths.setdefault(name, [])
        deaths.append(time.monotonic())
        if len(deaths) >= MAX_DEATHS:
            del self._deaths[name]
            self._models.give_up(name, f"{MAX_DEATHS} workers died or hung while they opened it")

    def forget_deaths(self, born: float) -> None:
        """Forget the deaths before a worker was born that is ready: it has opened every version."""
        for name, deaths in list(self._deaths.items()):
            if left := [died for died in deaths if died >= born]:
                self._deaths[name] = left
            else:
                del self._deaths[name]

    def _run(self, change: Change, housekeep: Housekeeping) -> ServingError | None:
        """Run a change; return why it failed, if that is known before the new generation serves."""
        try:
            _check_descriptors()
            self._make(change, self._loader(housekeep))
        except ConfigError as error:
            for problem in error.problems:
                log.error("%s failed; the service continues unchanged: %s", change.action, problem)
            return InvalidConfigError("; ".join(error.problems))
        except NotFoundError as error:
            return error
        except (ForbiddenError, ReloadError) as error:
            log.error("load of model %r failed: %s", change.name, error)
            return error
        except (ShortageError, MemoryError) as error:
            return self._postpone(change, str(error) or "out of memory")
        except Exception:  # without the arbiter the whole service would end
            log.exception("%s failed; the service continues unchanged", change.action)
            return ReloadError("internal error; the reason is in the server's log")
        return None

    def _make(self, change: Change, loader: Loader) -> None:
        wanted = self.wanted
        if change.action == "reload":
            now = stamp(wanted.path)
            self._adopt(*load(wanted, self._read_config(now), now, loader))
            self._fault = ""
            self._pauses.reset()
        elif change.action == "load":
            file = load_config(wanted.path)
            self._adopt(*load_model(wanted, file, change.name, change.config, self._find_roots, loader))
            if change.name in self.wanted.unloaded:  # its entry has the reasons, for those who ask later
                raise LoadFailedError("; ".join(self._models.entries[change.name].problems(change.name)))
        else:
            self._adopt(*unload_model(wanted, change.name, change.dependents, loader))
            for name in sorted(self.wanted.unloaded - wanted.unloaded):
                log.info("%s %r is unloaded", self._models.entries[name].kind, name)

    def _loader(self, housekeep: Housekeeping) -> Loader:
        return Loader(self._load_models, self._assemble, dict(self._models.entries), housekeep)

    def _adopt(self, wanted: Wanted, entries: Entries) -> None:
        self.wanted = wanted
        self._models.replace(ModelRegistry(entries))
        self._adopted()

    def _read_config(self, now: Stamp) -> Config:
        """Read the config file; an invalid one is not read again until it changes."""
        try:
            return load_config(self.wanted.path)
        except ConfigError as error:
            self.wanted = self.wanted.with_stamps({self.wanted.path: now}, {})
            self._fault = "; ".join(error.problems)
            raise

    def _postpone(self, change: Change, reason: str) -> UnavailableError:
        """Schedule another attempt of a reload, since no worker reports a change on disk twice; callers try again."""
        if change.action != "reload":
            log.error("%s of model %r failed; the service continues unchanged: %s", change.action, change.name, reason)
        else:
            if not self._pauses.failures:
                log.error("reload failed; the service continues unchanged and retries: %s", reason)
            self._pauses.fail()
        return UnavailableError(reason)

    def _judge(self, change: Change, error: ServingError | None, fault: str, has_changed: bool) -> Outcome:
        """Return the outcome of a change by the versions that serve: new workers may have died at a model."""
        error = error or (UnavailableError(fault) if fault else self._find_error(change))
        return Outcome(False, type(error).__name__, _cut(str(error))) if error else Outcome(has_changed)

    def _find_error(self, change: Change) -> ServingError | None:
        entry = self._models.entries.get(change.name)
        if change.action == "reload":
            problems = self._models.problems()
        elif entry is not None:
            problems = [] if entry.ended else entry.problems(change.name)
        elif change.action == "load":  # a reload in the same run has read another config
            return NotFoundError(f"model {quote(change.name)} is not in {self.wanted.path} any more")
        else:
            problems = []
        return LoadFailedError("; ".join(problems)) if problems else None

    def _publish(self, count: int) -> None:
        kept = max(_KEPT_OUTCOMES, count)  # those of this run were not read yet
        self._outcomes = dict(list(self._outcomes.items())[-kept:])
        outcomes = {id_: [*outcome] for id_, outcome in self._outcomes.items()}
        try:
            self.mailbox.publish({"models": self._models.status(), "outcomes": outcomes, "fault": _cut(self._fault)})
        except Exception:  # out of memory, say; the next change publishes these outcomes too
            log.exception("cannot publish the outcomes of %d changes", count)


class Managed(NamedTuple):
    """What the arbiter manages for the application; `permission` says from where models may be loaded by call."""

    settings: Settings
    table: WorkerTable
    reloading: Reloading
    log_levels: LogLevels
    permission: str
    tracing: Tracing | None = None  # None if no spans are sent


def _free_replaced() -> None:
    """Free the models that have been replaced: they are in cycles, and frozen in the garbage collector since a fork.

    Once before the new workers are forked, not before each of them: it writes to most pages of the arbiter, which the
    workers forked before then have for themselves.
    """
    gc.unfreeze()
    gc.collect()


def _check_descriptors() -> None:
    """Raise ShortageError unless this process may open as many files as a change may need at a time."""
    pipes = []
    try:
        for _ in range(_SPARE_DESCRIPTORS // 2):
            pipes.append(os.pipe())  # one at a time: when one fails, those before it are closed
    except OSError as error:
        raise ShortageError(f"fewer than {_SPARE_DESCRIPTORS} file descriptors are free: {error.strerror}") from error
    finally:
        for descriptor in itertools.chain(*pipes):
            os.close(descriptor)


def _cut(text: str) -> str:
    """Return the part of a text that is published."""
    return text.encode(errors="backslashreplace")[:_KEPT_BYTES].decode(errors="ignore")
