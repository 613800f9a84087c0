"""The WSGI application, wired: settings, config, models, resources."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import falcon

from ovms_rest.arbiter.reloading import Reloads
from ovms_rest.config import Config, load_config
from ovms_rest.errors import ConfigError, NotFoundError, ServingError, ShortageError, TryLaterError
from ovms_rest.host.cores import usable_cores
from ovms_rest.models.configuration import ModelConfig
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.loading import Host, load_models
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.pipelines.assembly import assemble_pipelines
from ovms_rest.pipelines.definition import Library, PipelineDefinition
from ovms_rest.protocol.words import escape
from ovms_rest.resources.control import MAX_BODY_BYTES, ConfigReload, ConfigStatus, ModelControl, RepositoryIndex
from ovms_rest.resources.cors import Cors
from ovms_rest.resources.entry_points import EntryPoints, Models
from ovms_rest.resources.error_handlers import hand_on, handle_serving_error, serialize_falcon_error
from ovms_rest.resources.health import Live, ModelReady, Ready
from ovms_rest.resources.inference import Infer, Registry
from ovms_rest.resources.log_settings import Logging
from ovms_rest.resources.metadata import EXTENSIONS, ModelDescription, ServerDescription
from ovms_rest.resources.metrics import DEFAULT_METRICS, Metrics, check_metrics_list
from ovms_rest.resources.model_config import ModelConfiguration
from ovms_rest.resources.permission import Permission
from ovms_rest.resources.routing import Request, Router
from ovms_rest.resources.statistics import Statistics
from ovms_rest.settings import Settings, read_settings
from ovms_rest.shared_memory.log_levels import LogLevels
from ovms_rest.shared_memory.statistics import FailureKind
from ovms_rest.telemetry import ServedStatistics, Telemetry

log = logging.getLogger("gunicorn.error.ovms_rest")


class App(falcon.App):  # type: ignore[type-arg]
    """The application with the models that it serves, which gunicorn's hooks open in every worker."""

    log_levels: LogLevels
    models: ModelRegistry
    permission: Permission
    reloads: Reloads
    settings: Settings
    telemetry: Telemetry

    def count_refusal(self, name: str, version: str | None, kind: FailureKind, waited_ns: int) -> None:
        """Count an inference that was refused before the application saw it."""
        with contextlib.suppress(NotFoundError):
            self.models.find(name, version).counters.fail(kind, waited_ns)


def create_app(registry: Registry, settings: Settings, is_ending: Callable[[], bool] = lambda: False) -> App:
    """Wire the resources to what they serve; `is_ending` tells whether the service ends."""
    app = App(router=Router(), request_type=Request, middleware=[Cors(settings)] if settings.allowed_origins else None)
    app.add_error_handler(ServingError, handle_serving_error)
    app.set_error_serializer(serialize_falcon_error)
    extensions = [name for name in EXTENSIONS if name != "model_repository" or settings.model_control != "none"]
    app.add_route("/", EntryPoints())
    app.add_route("/v2", ServerDescription(extensions))
    app.add_route("/v2/health/live", Live())
    app.add_route("/v2/health/ready", Ready(registry, is_ending))
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        app.add_route(model, ModelDescription(registry))
        app.add_route(f"{model}/ready", ModelReady(registry))
        app.add_route(f"{model}/infer", Infer(registry, settings))
    return app


def load_app(environ: Mapping[str, str]) -> App:
    """Read settings and config, load the models and make the application. Raises ConfigError."""
    settings = read_settings(environ)
    _, metrics = read_config(settings.config, settings)
    host, models, permission = host_of(settings), ModelRegistry({}), Permission(settings)
    telemetry = Telemetry(models, settings.max_waiting)

    def load(configs: tuple[ModelConfig, ...], previous: ModelRegistry, stop: Callable[[], bool]) -> ModelRegistry:
        loaded = load_models(configs, host, _tell_progress, previous, stop)
        telemetry.count(loaded.entries)
        return loaded

    def assemble(
        definitions: Sequence[PipelineDefinition],
        libraries: Mapping[str, Library],
        loaded: Mapping[str, Entry],
        previous: Mapping[str, Entry],
        stop: Callable[[], bool],
    ) -> dict[str, Entry]:
        pipelines = assemble_pipelines(definitions, libraries, loaded, previous, host, stop)
        telemetry.count(pipelines)
        return pipelines

    reloads = Reloads(settings.config, models, load, assemble, settings.model_roots, settings.cache_dir)
    reloads.load()
    app = create_app(models, settings, telemetry.is_ending)
    app.models, app.reloads, app.settings, app.telemetry = models, reloads, settings, telemetry
    app.permission, app.log_levels = permission, LogLevels()
    _add_operations(app, metrics)
    return app


def _add_operations(app: App, metrics: list[str] | None) -> None:
    """Wire what tells of the service, and what changes it; `metrics` None is for none."""
    models, telemetry, limit = app.models, app.telemetry, min(app.settings.max_body_bytes, MAX_BODY_BYTES)
    app.add_error_handler(TryLaterError, hand_on)
    app.add_route("/v2/models", Models(app.reloads))
    app.add_route("/v1/config", ConfigStatus(app.reloads))
    app.add_route("/v1/config/reload", ConfigReload(app.reloads))
    app.add_route("/v2/repository/index", RepositoryIndex(app.reloads, limit))
    control = ModelControl(app.reloads, app.permission, limit)
    for what in ("load", "unload"):
        app.add_route(f"/v2/repository/models/{{name}}/{what}", control, suffix=what)
    app.add_route("/v2/logging", Logging(app.log_levels, app.permission, limit))
    model_config = ModelConfiguration(models, telemetry.streams)
    statistics = Statistics(ServedStatistics(telemetry, models))
    app.add_route("/v2/models/stats", statistics)
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        app.add_route(f"{model}/config", model_config)
        app.add_route(f"{model}/stats", statistics)
    app.add_route("/metrics", Metrics(None if metrics is None else telemetry, metrics or DEFAULT_METRICS))


def read_config(path: Path, settings: Settings) -> tuple[Config, list[str] | None]:
    """Read a config and choose which metrics are served: [] all, None none at all.

    Raises ConfigError with all that is wrong with the file and with what the settings say of metrics.
    """
    names = [name.strip() for name in settings.metrics_list.split(",") if name.strip()]
    problems = [f"OVMS_REST_METRICS_LIST: {problem}" for problem in check_metrics_list(names).values()]
    if names and not settings.metrics_enable:
        problems.append("OVMS_REST_METRICS_LIST: needs OVMS_REST_METRICS_ENABLE=true")
    try:
        config = load_config(path)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if config.metrics is not None and settings.metrics_enable:
        problems.append(f"{path}: monitoring: metrics are enabled by OVMS_REST_METRICS_ENABLE already")
    if problems:
        raise ConfigError(problems)
    return config, names if settings.metrics_enable else config.metrics


def _tell_progress(name: str, version: int) -> None:
    log.info("model %r version %d is being tried", name, version)


def host_of(settings: Settings) -> Host:
    """Describe what models are loaded for."""
    limits = ImageLimits(settings.max_image_pixels, settings.max_request_pixels)
    extension = os.path.abspath(settings.cpu_extension) if settings.cpu_extension else ""
    return Host(usable_cores(), settings.load_timeout_seconds, settings.cache_dir, limits, extension)


def get_app() -> App:
    """Make the application from the environment, for gunicorn; a mistake there ends the process with its lines."""
    try:
        return load_app(os.environ)
    except ConfigError as error:
        for problem in error.problems:
            print(f"ovms_rest: {escape(problem)}", file=sys.stderr)
    except ShortageError as error:
        print(f"ovms_rest: {escape(str(error))}", file=sys.stderr)
    sys.exit(1)
