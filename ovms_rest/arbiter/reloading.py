"""Changing what is served: from a change on the disk, or a call, to a new generation of workers that serves it.

The arbiter loads what is new or changed while the old workers go on. Workers ask it by messages, and read how it went
from what it publishes. What was loaded with a configuration of its own, or unloaded, by a call, is known to the arbiter
alone: it holds for all workers that it forks, and is forgotten when the service ends.
"""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ovms_rest.arbiter.pauses import Pauses
from ovms_rest.config import Config, load_config, parse_model
from ovms_rest.errors import BusyError, ConfigError, NotFoundError, ReloadError, ShortageError, TryLaterError
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.models.roots import check_paths, find_roots
from ovms_rest.models.watching import Stamp, stamp
from ovms_rest.pipelines.definition import Library, PipelineDefinition
from ovms_rest.protocol.words import list_names, quote
from ovms_rest.shared_memory.mailbox import Mailbox

log = logging.getLogger("gunicorn.error.ovms_rest")

Stop = Callable[[], bool]
Load = Callable[[tuple[ModelConfig, ...], ModelRegistry, Stop], ModelRegistry]
Assemble = Callable[
    [Sequence[PipelineDefinition], Mapping[str, Library], Mapping[str, Entry], Mapping[str, Entry], Stop],
    dict[str, Entry],
]

# The stamp of files that were being written when they were to be loaded: no other is equal, so that a reload follows.
_CHANGING: Stamp = (("", 0, 0, 0, 0),)

# A load of such files is repeated after growing pauses.
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 60.0

# So many outcomes are kept for callers who have not looked yet, and so much of each text, all of which is in the log.
_KEPT_OUTCOMES = 256
_KEPT_BYTES = 2000
# So many descriptors have to be free for a change: without one, a model that cannot be read looks like a broken one.
_SPARE_DESCRIPTORS = 16


class Change(NamedTuple):
    """What is asked for: a reload of all that has changed, or one model to be loaded or unloaded.

    `id` is that under which the outcome is looked for, "" when nobody does; `config` is the one that came with a load;
    with `dependents` the pipelines that use an unloaded model go with it.
    """

    what: Literal["reload", "load", "unload"] = "reload"
    name: str = ""
    config: dict[str, Any] | None = None
    dependents: bool = False
    id: str = ""


class _Outcome(NamedTuple):
    """What came of a change: an HTTP status, and what went wrong."""

    status: int
    error: str = ""


class Reloads:
    """What the arbiter and the workers know of changes; made before the first fork."""

    def __init__(
        self,
        config: Path,
        models: ModelRegistry,
        load: Load,
        assemble: Assemble = lambda definitions, libraries, models, previous, stop: {},
        model_roots: str = "",
        cache_dir: str = "",
    ) -> None:
        """Take the config file, a registry to be filled, and what fills it.

        `load` gets the models to load, the registry as it is, and what tells it to stop, and returns a new registry.
        `assemble` gets pipelines, libraries, the models of which to make them, all that served before, and the same.
        The last two are the settings of the same names: below them, too, a call may name paths.
        """
        self._config = config
        self._models = models
        self._load = load
        self._assemble = assemble
        self._model_roots = model_roots
        self._cache_dir = cache_dir
        self._mailbox = Mailbox()
        # Of what is served: what the file says, what a call says instead or besides, and what a call took away.
        self._filed: dict[str, ModelConfig] = {}
        self._given: dict[str, ModelConfig] = {}
        self._pipelines: dict[str, PipelineDefinition] = {}
        self._libraries: Mapping[str, Library] = {}
        self._unloaded: set[str] = set()
        # How the disk was when it was read.
        self._stamps: dict[Path, Stamp] = {config: ()}
        self._seen = self._stamps
        # What was found when a reload was last asked for, when to ask again although nothing has changed since, and
        # after how many seconds for the time after that.
        self._asked: dict[Path, Stamp] = {}
        self._repeat_at, self._pause = 0.0, _MIN_PAUSE_SECONDS
        self._told: set[int | None] = set()  # the kinds of errors that looking met with, by their numbers
        self._is_watching = False
        self._outcomes: dict[str, _Outcome] = {}
        self._run: list[tuple[Change, _Outcome]] = []
        self._changed = False
        self._fault = ""  # why the config file, as it is now, is not what is served
        self._pauses = Pauses()  # between reloads for which the system lacks something

    # --- In the arbiter

    def load(self, stop: Stop = lambda: False) -> None:
        """Load all that is to be served. Raises ConfigError, and changes nothing then."""
        now = stamp(self._config)
        config = self._read_config(now)
        filed = {model.name: model for model in config.models}
        pipelines = {pipeline.name: pipeline for pipeline in config.pipelines}
        gone = (self._filed.keys() - filed.keys()) | pipelines.keys()
        given = {name: model for name, model in self._given.items() if name not in gone}
        wanted = filed | given
        unloaded = self._unloaded & (wanted.keys() | pipelines.keys())
        models = [model for name, model in wanted.items() if name not in unloaded]
        paths = [*(model.base_path for model in models), *(library.path for library in config.libraries.values())]
        stamps = {self._config: now} | {path: stamp(path) for path in paths}
        loaded = self._load(tuple(models), self._models, stop).entries
        entries = {name: loaded.get(name) or self._models.entries[name] for name in wanted}
        entries = self._join(entries, pipelines, config.libraries, unloaded, stop)
        self._filed, self._given, self._unloaded = filed, given, unloaded
        self._pipelines, self._libraries = pipelines, config.libraries
        self._stamps = self._seen = stamps | dict.fromkeys(self._find_changing(entries), _CHANGING)
        self._fault = ""
        self._replace(entries)

    def receive(self) -> list[Change]:
        """Return what workers have asked for, and a reload when one is due again."""
        changes = [Change(**message) for message in self._mailbox.receive()]
        return [*changes, Change()] if self.is_due() else changes

    def is_due(self) -> bool:
        """Return whether a reload that failed for want of something is to be tried again."""
        return bool(self._pauses.failures) and self._pauses.is_over()

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
            _check_descriptors()
            if change.what == "reload":
                self.load(stop)
                self._pauses.reset()
            elif change.what == "load":
                self._load_one(change.name, change.config, stop)
            else:
                self._unload_one(change.name, change.dependents, stop)
        except ConfigError as error:
            for problem in error.problems:
                log.error("%s failed, the service goes on as it was: %s", change.what, problem)
            return _Outcome(400, "; ".join(error.problems))
        except NotFoundError as error:
            return _Outcome(404, str(error))
        except ReloadError as error:
            log.error("load of model %r failed: %s", change.name, error)
            return _Outcome(error.status, str(error))
        except (ShortageError, MemoryError) as error:
            return self._put_off(change, error)
        except Exception:  # the arbiter is what the whole service hangs on
            log.exception("%s failed, the service goes on as it was", change.what)
            return _Outcome(500, "internal error; the reason is in the log of the server")
        return _Outcome(200)

    def _put_off(self, change: Change, error: ShortageError | MemoryError) -> _Outcome:
        """Schedule another attempt of a reload, since no worker reports a change on the disk twice.

        A load or unload is left to its caller, who gets the reason.
        """
        reason = str(error) or "out of memory"
        if change.what != "reload":
            log.error("%s of model %r failed, the service goes on as it was: %s", change.what, change.name, reason)
        else:
            if not self._pauses.failures:
                log.error("reload failed, the service goes on as it was and tries again: %s", reason)
            self._pauses.fail()
        return _Outcome(503, reason)

    def _load_one(self, name: str, given: dict[str, Any] | None, stop: Stop) -> None:
        """Load a model as the file says, or with the configuration `given`, and nothing else.

        Raises NotFoundError, ConfigError and ReloadError. A model that does not serve then goes on as it was.
        """
        file = load_config(self._config)
        if pipeline := next((pipeline for pipeline in file.pipelines if pipeline.name == name), None):
            self._load_pipeline(pipeline, file, given, stop)
            return
        if name in self._pipelines:
            raise NotFoundError(f"pipeline {name!r} is not in {self._config} any more")
        filed = {model.name: model for model in file.models}
        config = filed.get(name) or self._given.get(name)
        if given is not None:
            config = parse_model(name, given, self._config.parent, config)
            roots = find_roots(file.models, self._model_roots, self._cache_dir)
            if outside := list(check_paths(given, config, roots)):
                raise ReloadError("; ".join(outside), 403)
        elif config is None:
            known = list_names(filed) or "none"
            raise NotFoundError(f"model {quote(name)} is not in {self._config}, where there are: {known}")
        now = stamp(config.base_path)
        entry = self._load((config,), self._models, stop).entries[name]
        problems = entry.problems(name)
        if problems and (given is not None or name in self._unloaded):
            raise ReloadError("; ".join(problems), 412)
        entries = {**self._models_of(self._filed | self._given), name: entry}
        entries = self._join(entries, self._pipelines, self._libraries, self._unloaded - {name}, stop)
        if name in filed:
            self._filed[name] = filed[name]
        if given is not None or name not in filed:
            self._given[name] = config
        else:
            self._given.pop(name, None)
        self._unloaded.discard(name)
        self._stamps = self._seen = {**self._stamps, config.base_path: _CHANGING if entry.is_changing else now}
        self._replace(entries)

    def _load_pipeline(
        self, pipeline: PipelineDefinition, file: Config, given: dict[str, Any] | None, stop: Stop
    ) -> None:
        """Load a pipeline as the file says now, with its libraries. Raises ReloadError."""
        name = pipeline.name
        if given is not None:
            raise ReloadError(f"{name!r} is a pipeline, which takes no configuration by call", 400)
        own = {node.library: file.libraries[node.library] for node in pipeline.nodes if node.library in file.libraries}
        stamps = {library.path: stamp(library.path) for library in own.values()}
        models = self._models_of(self._filed | self._given)
        entry = self._assemble([pipeline], own, models, self._models.entries, stop)[name]
        if name in self._unloaded and (problems := entry.problems(name)):
            raise ReloadError("; ".join(problems), 412)
        self._pipelines[name] = pipeline
        self._libraries = {**self._libraries, **own}
        self._stamps = self._seen = {**self._stamps, **stamps} | dict.fromkeys(
            self._find_changing({name: entry}), _CHANGING
        )
        self._unloaded.discard(name)
        self._replace({**self._models.entries, name: entry})

    def _unload_one(self, name: str, dependents: bool, stop: Stop) -> None:
        """Take a model or a pipeline away, with those that depend on it when asked to. Raises NotFoundError."""
        wanted = self._filed | self._given
        if name not in wanted and name not in self._pipelines:
            raise NotFoundError(f"model {quote(name)} is unknown")
        names = {name}
        if dependents:
            names |= {
                pipeline.name
                for pipeline in self._pipelines.values()
                if any(node.model == name for node in pipeline.nodes)
            }
        entries, unloaded = dict(self._models.entries), self._unloaded | names
        for other in sorted(names - self._unloaded):
            log.info("%s %r is unloaded", entries[other].kind, other)
            entries[other] = entries[other].end()
        models = {other: entries[other] for other in wanted}
        joined = self._join(models, self._pipelines, self._libraries, unloaded, stop)
        self._unloaded = unloaded
        self._replace({other: entries[other] if other in unloaded else entry for other, entry in joined.items()})
        served = {model.base_path for other, model in wanted.items() if other not in self._unloaded}
        kept = {self._config, *served, *(library.path for library in self._libraries.values())}
        self._stamps = self._seen = {path: of for path, of in self._stamps.items() if path in kept}

    def _find_changing(self, entries: Mapping[str, Entry]) -> set[Path]:
        """Return the paths of what could not be loaded because it was being written."""
        changing = {name for name, entry in entries.items() if entry.is_changing}
        nodes = [node for name in changing & self._pipelines.keys() for node in self._pipelines[name].nodes]
        models = self._filed | self._given
        return {models[name].base_path for name in changing & models.keys()} | {
            self._libraries[node.library].path for node in nodes if node.library in self._libraries
        }

    def _models_of(self, wanted: Mapping[str, ModelConfig]) -> dict[str, Entry]:
        """Return the models as they are now."""
        return {name: self._models.entries[name] for name in wanted if name in self._models.entries}

    def _join(
        self,
        models: dict[str, Entry],
        pipelines: Mapping[str, PipelineDefinition],
        libraries: Mapping[str, Library],
        unloaded: set[str],
        stop: Stop,
    ) -> dict[str, Entry]:
        """Return these models with the pipelines that can be made of them; unloaded ones are as they were."""
        before = self._models.entries
        definitions = [pipeline for name, pipeline in pipelines.items() if name not in unloaded]
        assembled = self._assemble(definitions, libraries, models, before, stop)
        return models | {name: assembled.get(name) or before[name] for name in pipelines}

    def _replace(self, entries: dict[str, Entry]) -> None:
        self._models.replace(ModelRegistry(entries))

    def _differs(self, before: dict[str, Entry]) -> bool:
        """Tell whether what serves, or what is told of it, is not the same as before."""
        after = self._models.entries
        return list(before) != list(after) or any(after[name].differs(entry) for name, entry in before.items())

    def _read_config(self, now: Stamp) -> Config:
        """Read the config file; one that is wrong is not read again until it changes."""
        try:
            return load_config(self._config)
        except ConfigError as error:
            self._stamps = self._seen = {**self._stamps, self._config: now}
            self._fault = "; ".join(error.problems)
            raise

    def end(self, fault: str = "") -> None:
        """Publish what came of the changes, when the new generation serves; its workers may have died at a model.

        `fault` is the reason why it does not serve yet, "" when it does.
        """
        for change, outcome in self._run:
            if change.id:
                serves = self._judge(change) if not fault else _Outcome(503, fault)
                self._outcomes[change.id] = outcome if outcome.error else serves
        kept = max(_KEPT_OUTCOMES, len(self._run))  # nobody has looked at those of this run yet
        self._outcomes = dict(list(self._outcomes.items())[-kept:])
        outcomes = {id_: [outcome.status, _cut(outcome.error)] for id_, outcome in self._outcomes.items()}
        try:
            self._mailbox.publish({"models": self._models.status(), "outcomes": outcomes, "fault": _cut(self._fault)})
        except Exception:  # out of memory, say; the arbiter goes on, and the next change publishes these outcomes too
            log.exception("cannot publish the outcomes of %d changes", len(self._run))

    def _judge(self, change: Change) -> _Outcome:
        """Tell what came of a change by what serves."""
        entry = self._models.entries.get(change.name)
        if change.what == "reload":
            problems = self._models.problems()
        elif entry is not None:
            problems = entry.problems(change.name)
        elif change.what == "load":  # a reload that came with it has read another config
            return _Outcome(404, f"model {quote(change.name)} is not in {self._config} any more")
        else:
            problems = []
        if problems:
            return _Outcome(412, "; ".join(problems))
        return _Outcome(201 if self._changed else 200)

    # --- In a worker

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's form; what serves says so when the config is not taken up."""
        status = self._models.status()
        fault = (self._mailbox.read() or {}).get("fault")
        if fault:
            for entry in status.values():
                for version in entry["model_version_status"]:
                    status_of = version["status"]
                    if version["state"] == "AVAILABLE" and status_of["error_message"] == "OK":
                        status_of["error_message"] = f"still serves as before; the config is invalid now: {fault}"
        return status

    def watch(self) -> None:
        """Ask for a reload when something has changed, and has stayed the same since the last look.

        What is only half written changes again before the next. Whatever the system refuses is logged, once for each
        kind of error, and tried again at the next look: a disk that is away for a while costs no worker.
        """
        if not self._is_watching:
            self._is_watching = True
            self._leave_out_forbidden()
        try:
            self._ask_if_changed()
        except OSError as error:
            if error.errno not in self._told:
                self._told.add(error.errno)
                log.error("cannot tell whether the config or a model has changed, and goes on trying: %s", error)

    def _leave_out_forbidden(self) -> None:
        """Stop looking at paths that the arbiter may read and this worker, of another user (--user), may not."""
        forbidden = [path for path in self._stamps if _is_forbidden(path)]
        for path in forbidden:
            log.error("changes of %s are only noticed by a reload: user %d may not read it", path, os.geteuid())
        self._stamps = self._seen = {path: of for path, of in self._stamps.items() if path not in forbidden}

    def _ask_if_changed(self) -> None:
        now = self._look()
        if now != self._stamps and now == self._seen and (now != self._asked or time.monotonic() >= self._repeat_at):
            log.info("the config or a model has changed")
            with contextlib.suppress(BusyError):  # then there will be another look
                self._mailbox.send(Change()._asdict())
                # A new generation looks for itself. There is none if files were still being written.
                unfinished = {path: _CHANGING for path, of in self._stamps.items() if of == _CHANGING}
                self._asked, self._stamps = now, now | unfinished
                self._repeat_at = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, _MAX_PAUSE_SECONDS)
        self._seen = now

    def request(self, ticket: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Reload because a client asks for it; return whether anything has changed, and the status of all models.

        The status is the arbiter's: this worker may be of a generation that another reload has replaced meanwhile.

        Raises TryLaterError until the new generation serves, with the same `ticket` to be shown again, and ReloadError
        with the reason for one that failed.
        """
        outcome, models = self._ask(ticket, Change())
        return outcome.status == 201, models

    def load_model(self, ticket: dict[str, Any], name: str, config: dict[str, Any] | None) -> None:
        """Load a model because a client asks for it, as the file says or with a configuration of its own.

        Raises TryLaterError until every worker serves it so, with the same `ticket` to be shown again; NotFoundError
        and ReloadError with the reason for what failed; BusyError, and InvalidRequestError for too large a config.
        """
        self._ask(ticket, Change("load", name, config))

    def unload_model(self, ticket: dict[str, Any], name: str, dependents: bool) -> None:
        """Unload a model, and the pipelines that use it when `dependents` says so, because a client asks for it.

        Raises TryLaterError, NotFoundError and BusyError as above.
        """
        self._ask(ticket, Change("unload", name, dependents=dependents))

    def _ask(self, ticket: dict[str, Any], change: Change) -> tuple[_Outcome, dict[str, Any]]:
        """Have the arbiter make a change, once for a ticket; return what came of it, and the status of all models."""
        if "id" not in ticket:
            # Process ids come again.
            ticket.update(id=f"{os.getpid()}-{time.monotonic_ns()}", writes=self._mailbox.writes())
            self._mailbox.send(change._replace(id=ticket["id"])._asdict())
        if not self._is_made(ticket):
            raise TryLaterError(partial(self._is_made, ticket))
        told = ticket["published"]
        outcome = _Outcome(*told["outcomes"][ticket["id"]])
        if outcome.status == 404:
            raise NotFoundError(outcome.error)
        if outcome.error:
            raise ReloadError(outcome.error, outcome.status)
        return outcome, told["models"]

    def _is_made(self, ticket: dict[str, Any]) -> bool:
        """Return whether the arbiter has published the outcome of a change, and keep it in the ticket."""
        writes = self._mailbox.writes()
        if "published" not in ticket and writes != ticket["writes"] and (published := self._mailbox.read()) is not None:
            ticket["writes"] = writes
            if ticket["id"] in published["outcomes"]:
                ticket["published"] = published
        return "published" in ticket

    # --- Both

    def _look(self) -> dict[Path, Stamp]:
        """Describe the config file and the directories of all models that are to be served."""
        return {path: stamp(path) for path in self._stamps}


def _check_descriptors() -> None:
    """Raise ShortageError unless this process may open as many files as a change may need at a time."""
    pipes = []
    try:
        for _ in range(_SPARE_DESCRIPTORS // 2):
            pipes.append(os.pipe())  # one at a time: when one fails, those before it are closed
    except OSError as error:
        raise ShortageError(f"fewer than {_SPARE_DESCRIPTORS} more files may be opened: {error.strerror}") from error
    finally:
        for descriptor in itertools.chain(*pipes):
            os.close(descriptor)


def _cut(text: str) -> str:
    """Return as much of a text as is kept."""
    return text.encode(errors="backslashreplace")[:_KEPT_BYTES].decode(errors="ignore")


def _is_forbidden(path: Path) -> bool:
    try:
        if path.is_dir():
            os.scandir(path).close()
    except OSError as error:
        return isinstance(error, PermissionError)
    return False
