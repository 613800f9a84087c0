"""The WSGI application, wired: settings, config, models, resources."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import falcon

from ovms_rest.arbiter.crashes import Death, judge
from ovms_rest.arbiter.reloading import Managed, Reloading
from ovms_rest.config import read_config
from ovms_rest.errors import ConfigError, NotFoundError, ServingError, ShortageError, TryLaterError
from ovms_rest.host.cores import usable_cores
from ovms_rest.log import log
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.loading import LoadSettings, load_models
from ovms_rest.models.registry import ModelRegistry
from ovms_rest.models.roots import find_roots
from ovms_rest.models.servable import Registry, Servable
from ovms_rest.models.watching import stamp
from ovms_rest.pipelines.assembly import assemble_pipelines
from ovms_rest.pipelines.rehearsal import rehearse_pipelines
from ovms_rest.protocol.words import escape
from ovms_rest.resources.arbiter_client import ArbiterClient
from ovms_rest.resources.console import PAGE, ConsoleErrors, ConsoleFile, ConsolePlace, ConsoleSettings, read_files
from ovms_rest.resources.console_origin import ConsoleOrigin, ConsolePorts
from ovms_rest.resources.control import MAX_BODY_BYTES, ConfigReload, ConfigStatus, ModelControl, RepositoryIndex
from ovms_rest.resources.cors import Cors
from ovms_rest.resources.crash_guard import CrashGuard
from ovms_rest.resources.entry_points import EntryPoints, Models
from ovms_rest.resources.error_handlers import hand_on, handle_serving_error, serialize_falcon_error
from ovms_rest.resources.health import Live, ModelReady, Ready
from ovms_rest.resources.inference import Infer
from ovms_rest.resources.log_settings import Logging
from ovms_rest.resources.metadata import EXTENSIONS, ModelDescription, ServerDescription
from ovms_rest.resources.metrics import DEFAULT_METRICS, Metrics
from ovms_rest.resources.model_config import ModelConfiguration
from ovms_rest.resources.openapi import OpenApi
from ovms_rest.resources.permission import Permission
from ovms_rest.resources.routing import Request, Router
from ovms_rest.resources.statistics import Statistics
from ovms_rest.resources.tfs import NoPrediction, Predict, SignatureMetadata, VersionStatus, api_of
from ovms_rest.settings import Settings, read_settings
from ovms_rest.shared_memory.crash_table import CrashTable
from ovms_rest.shared_memory.inference_notes import InferenceNotes
from ovms_rest.shared_memory.log_levels import LogLevels
from ovms_rest.shared_memory.recent_lines import RecentLines
from ovms_rest.shared_memory.statistics import FailureKind
from ovms_rest.shared_memory.table import SLOTS, WorkerTable
from ovms_rest.telemetry import ServedStatistics, Telemetry
from ovms_rest.tracing.tracing import Tracing, prepare_tracing
from ovms_rest.worker.file_watch import FileWatch


class App(falcon.App):  # type: ignore[type-arg]
    """The application with its models; gunicorn's hooks call it in the arbiter and open it in every worker."""

    def __init__(
        self,
        settings: Settings,
        models: ModelRegistry,
        telemetry: Telemetry,
        table: WorkerTable,
        reloading: Reloading,
        metrics: list[str] | None,
        api: OpenApi,
        lines: RecentLines,
        tracing: Tracing | None = None,
    ) -> None:
        """Wire all resources; `metrics` are the names of the metrics to serve, [] for all and None to disable them.

        `lines` are the last ones of the log.
        """
        self._ports = ConsolePorts()
        origin = ConsoleOrigin(self._ports) if settings.console and settings.control_bind else None
        self.find_origin_headers = origin.find_headers if origin else None
        arguments = _falcon_arguments(settings, origin)
        super().__init__(**arguments)
        self._routes: Router = arguments["router"]
        self.models = models
        self.watch: Callable[[], None] | None = None
        self._telemetry = telemetry
        self._api = api
        self._lines = lines
        self._is_control = False
        self._notes, self._crashes = InferenceNotes(SLOTS), CrashTable()
        permission = Permission(settings, lambda: self._is_control)
        self.managed = Managed(settings, table, reloading, LogLevels(), permission.describe(), tracing)
        place = ConsolePlace(settings.console, settings.control_bind, lambda: self._is_control, self._ports)
        guard = CrashGuard(self._notes, self._crashes)
        _add_protocol(self, models, settings, guard, telemetry, place)
        self._add_console(place, permission)
        self._add_operations(permission, metrics)

    def _add_operations(self, permission: Permission, metrics: list[str] | None) -> None:
        """Add the resources that describe or change the service."""
        limit = min(self.managed.settings.max_body_bytes, MAX_BODY_BYTES)
        changes = ArbiterClient(self.managed.reloading.mailbox, self.models, self.managed.table.is_ending)
        self.add_error_handler(TryLaterError, hand_on)
        self.add_route("/v2/openapi.json", self._api)
        self.add_route("/v2/models", Models(changes))
        self.add_route("/v1/config", ConfigStatus(changes))
        self.add_route("/v1/config/reload", ConfigReload(changes, permission))
        self.add_route("/v2/repository/index", RepositoryIndex(changes, limit))
        control = ModelControl(changes, permission, limit)
        for action in ("load", "unload"):
            self.add_route(f"/v2/repository/models/{{name}}/{action}", control, suffix=action)
        self.add_route("/v2/logging", Logging(self.managed.log_levels, permission, limit))
        model_config = ModelConfiguration(self.models, self._telemetry.streams)
        statistics = Statistics(ServedStatistics(self._telemetry, self.models))
        self.add_route("/v2/models/stats", statistics)
        for model in _MODEL_ROUTES:
            self.add_route(f"{model}/config", model_config)
            self.add_route(f"{model}/stats", statistics)
        for model in _TFS_ROUTES:
            self.add_route(model, VersionStatus(self.models, changes))
        self.add_route("/metrics", Metrics(None if metrics is None else self._telemetry, metrics or DEFAULT_METRICS))

    def _add_console(self, place: ConsolePlace, permission: Permission) -> None:
        """Add the resources of the console."""
        for path, file in read_files().items():
            self.add_route(f"{PAGE}{path}", ConsoleFile(file, place))
        self.add_route(f"{PAGE}/settings", ConsoleSettings(place, permission))
        self.add_route(f"{PAGE}/errors", ConsoleErrors(place, self._lines))
        self.add_error_handler(Exception, self._note_bug)

    def _note_bug(self, req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
        """Note an exception that nothing has handled, and respond as Falcon does, which logs it."""
        self._lines.note(logging.ERROR, f"{req.method} {req.path} failed: {type(error).__name__}: {error}")
        self._python_error_handler(req, resp, error, params)

    # --- In the arbiter

    def set_ports(self, service: int | None, control: int | None) -> None:
        """Note the TCP ports of the service and of the control address, which the console's page needs."""
        self._ports.service, self._ports.control = service, control

    def describe(self) -> str:
        """Return how many models serve, for the log and systemd."""
        entries = self.models.entries.values()
        return f"{sum(1 for entry in entries if entry.versions)} of {len(entries)} models and pipelines serve"

    def release(self, slot: int, death: Death) -> str:
        """Release what a worker that is gone has counted and noted.

        Return a line for the log, "" unless it died during an inference.
        """
        self._telemetry.counters.release(slot)
        models, line = judge(self._notes, self._crashes, slot, death)
        for model in models:
            name, _, version = model.rpartition("/")
            self._telemetry.counters.count_crash(name, version, slot)
        return line

    # --- In a worker

    def open(self, slot: int, is_control: bool, opening: Callable[[str], None], retire: Callable[[], None]) -> None:
        """Open all models in a worker, given its slot of the worker table.

        `opening` and `retire` are as in `ModelRegistry.open`. The control worker, if there is one, watches the files,
        for no inference waits there.
        """
        self._lines.claim(slot)
        self._telemetry.counters.claim(slot)
        self._notes.claim(slot)
        self.models.open(opening, retire)
        self._api.renew()
        self._is_control = is_control
        reloading = self.managed.reloading
        if is_control or not self.managed.settings.control_bind:
            self.watch = FileWatch(reloading.wanted.stamps, reloading.mailbox).look

    def count_refusal(self, name: str, version: str | None, kind: FailureKind, waited_ns: int, path: str) -> None:
        """Count an inference refused before it reached the application."""
        with contextlib.suppress(NotFoundError):
            self.models.find(name, version).counters.refuse(kind, waited_ns, api_of(path))

    def find_route(self, path: str) -> str:
        """Return the template of the route of a path, "" for an unknown path."""
        found = self._routes.find(path)
        return "" if found is None else str(found[3] or "")

    def has_batches(self) -> bool:
        """Return whether any version infers batches."""
        return any(model.batch_limit for entry in self.models.entries.values() for model in entry.versions.values())

    def find_batched(self, name: str, version: str | None) -> Servable | None:
        """Return a version, None if it infers every request alone, or does not serve."""
        with contextlib.suppress(NotFoundError):
            servable = self.models.find(name, version)
            return servable if servable.batch_limit else None
        return None


# Of TensorFlow Serving's API.
_TFS_ROUTES = ("/v1/models/{name}", "/v1/models/{name}/versions/{version}")
_MODEL_ROUTES = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")


def create_app(registry: Registry, settings: Settings) -> falcon.App:  # type: ignore[type-arg]
    """Return an application with the resources of the protocol alone."""
    app = falcon.App(**_falcon_arguments(settings))
    _add_protocol(app, registry, settings, CrashGuard(InferenceNotes(1), CrashTable()))
    return app


def _falcon_arguments(settings: Settings, origin: ConsoleOrigin | None = None) -> dict[str, Any]:
    """Return the arguments of Falcon's application. Of the middleware, the first has the last word on a response."""
    middleware = [origin] * (origin is not None) + [Cors(settings)] * bool(settings.allowed_origins)
    return {"router": Router(), "request_type": Request, "middleware": middleware or None}


def _add_protocol(
    app: falcon.App,  # type: ignore[type-arg]
    registry: Registry,
    settings: Settings,
    guard: CrashGuard,
    telemetry: Telemetry | None = None,
    console: ConsolePlace | None = None,
) -> None:
    """Add the resources of the protocol; without `telemetry` the application is alone."""
    app.add_error_handler(ServingError, handle_serving_error)
    app.set_error_serializer(serialize_falcon_error)
    extensions = [name for name in EXTENSIONS if name != "model_repository" or settings.model_control != "none"]
    app.add_route("/", EntryPoints(console))
    app.add_route("/v2", ServerDescription(extensions))
    app.add_route("/v2/health/live", Live())
    is_ending, count_workers = (telemetry.is_ending, telemetry.streams) if telemetry else (lambda: False, lambda: 1)
    app.add_route("/v2/health/ready", Ready(registry, is_ending, count_workers))
    for model in _MODEL_ROUTES:
        app.add_route(model, ModelDescription(registry))
        app.add_route(f"{model}/ready", ModelReady(registry))
        app.add_route(f"{model}/infer", Infer(registry, settings, guard))
    for model in _TFS_ROUTES:
        app.add_route(f"{model}:predict", Predict(registry, settings, guard))
        app.add_route(f"{model}/metadata", SignatureMetadata(registry))
        for verb in ("classify", "regress"):
            app.add_route(f"{model}:{verb}", NoPrediction(registry, verb))


def load_app(environ: Mapping[str, str]) -> App:
    """Read settings and config, load the models and make the application. Raises ConfigError."""
    lines = RecentLines(SLOTS)
    lines.install()
    settings = read_settings(environ)
    now = stamp(settings.config)
    config = read_config(settings.config, settings)
    load_settings, models, table = load_settings_of(settings), ModelRegistry({}), WorkerTable(SLOTS, usable_cores())
    tracing = prepare_tracing(environ, SLOTS)
    telemetry = Telemetry(models, table, settings.max_waiting, None if tracing is None else tracing.channel.counters)
    api = OpenApi(models)

    def adopted() -> None:
        telemetry.count(models.entries)
        telemetry.forget_gone()
        api.make()

    reloading = Reloading(
        settings.config,
        models,
        lambda configs, previous, housekeep: (
            load_models(configs, load_settings, _log_progress, ModelRegistry(previous), housekeep).entries
        ),
        lambda definitions, libraries, loaded, previous, housekeep: rehearse_pipelines(
            assemble_pipelines(definitions, libraries, loaded, previous, load_settings, housekeep), housekeep
        ),
        partial(find_roots, model_roots=settings.model_roots, cache_dir=settings.cache_dir),
        adopted,
    )
    reloading.start(config, now)
    return App(settings, models, telemetry, table, reloading, config.metrics, api, lines, tracing)


def _log_progress(name: str, version: int) -> None:
    log.info("model %r version %d is being tried", name, version)


def load_settings_of(settings: Settings) -> LoadSettings:
    """Return the limits and defaults that models are loaded with."""
    limits = ImageLimits(settings.max_image_pixels, settings.max_request_pixels)
    extension = os.path.abspath(settings.cpu_extension) if settings.cpu_extension else ""
    return LoadSettings(usable_cores(), settings.load_timeout_seconds, settings.cache_dir, limits, extension)


def get_app() -> App:
    """Make the application from the environment, for gunicorn; on an error, print its lines and exit."""
    try:
        return load_app(os.environ)
    except ConfigError as error:
        for problem in error.problems:
            print(f"ovms_rest: {escape(problem)}", file=sys.stderr)
    except ShortageError as error:
        print(f"ovms_rest: {escape(str(error))}", file=sys.stderr)
    sys.exit(1)
