"""The command `ovms-rest`: it starts the service; `ovms-rest check` loads all models and reports on them."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.util import import_app

from ovms_rest.app import App, load_settings_of
from ovms_rest.config import load_config, read_config
from ovms_rest.errors import ConfigError, ShortageError
from ovms_rest.flags import FLAGS, USAGE, Parser, Start, UsageError, read_flags
from ovms_rest.host.cores import usable_cores
from ovms_rest.log import log
from ovms_rest.models.batch_report import measure_batches
from ovms_rest.models.loading import load_models
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.models.repository import MODEL_SUFFIXES
from ovms_rest.models.runtime import Model
from ovms_rest.paths import PathError, find_models
from ovms_rest.pipelines.assembly import assemble_pipelines
from ovms_rest.protocol.tensors import TensorMetadata
from ovms_rest.protocol.words import escape
from ovms_rest.settings import read_settings
from ovms_rest.worker import log_escaping

_EX_PATH = 2  # the exit code of ls and others for a missing file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["check"]:
            return _check(_check_parser().parse_args(arguments[1:]))
        return _serve(read_flags(arguments, usable_cores()))
    except UsageError as error:
        print(f"usage: {USAGE}", file=sys.stderr)
        _print_problems(error.problems)
        return os.EX_USAGE
    except PathError as error:
        _print_problems(error.problems)
        return _EX_PATH


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"ovms-rest: {escape(problem)}", file=sys.stderr)


# --- The service


class Application(BaseApplication):  # type: ignore[misc]
    """The service in gunicorn; flags take precedence over GUNICORN_CMD_ARGS, and this over our defaults."""

    def __init__(self, start: Start) -> None:
        self.start = start
        super().__init__(prog="ovms-rest")

    def load_config(self) -> None:
        """Set gunicorn's settings; gunicorn calls this again at a reload."""
        # Imported here, since it prepares gunicorn and the worker table, which `check` does not need.
        from ovms_rest.arbiter import gunicorn_settings

        for name in gunicorn_settings.__all__:
            self.cfg.set(name, getattr(gunicorn_settings, name))
        others = vars(self.cfg.parser().parse_args(self.cfg.get_cmd_args_from_env()))
        if others["config"]:
            raise ValueError(f"GUNICORN_CMD_ARGS: ovms-rest reads no gunicorn config file, got -c {others['config']}")
        for name, value in others.items():
            if name in self.cfg.settings and value is not None:
                self.cfg.set(name, value)
        for name, value in self.start.gunicorn.items():
            self.cfg.set(name, value)

    def load(self) -> App:
        """Return the application; exit if none of the models given on the command line serves, as OVMS does."""
        for level, note in self.start.notes:
            log.log(level, "%s", note)
        app: App = import_app(self.cfg.wsgi_app)
        entries = app.models.entries
        if self.start.models and not any(entry.versions for entry in entries.values()):
            _print_problems(
                [f"{entry.kind} {name!r} does not serve: {entry.explain()}" for name, entry in entries.items()]
            )
            sys.exit(1)
        return app


def _serve(start: Start) -> int:
    """Run gunicorn, which ends this process."""
    os.environ.update(start.environ)
    if start.models:
        os.environ["OVMS_REST_CONFIG"] = str(_write_config(start.models))
    if start.log_path:
        try:
            handler = logging.FileHandler(start.log_path)
        except OSError as error:
            _print_problems([f"--log_path: {start.log_path} cannot be written: {error.strerror}"])
            return 1
        handler.setFormatter(logging.Formatter(Logger.error_fmt, Logger.datefmt))
        # In addition to gunicorn's own handler; gunicorn reopens both at SIGUSR1.
        logging.getLogger("gunicorn.error").addHandler(handler)
    Application(start).run()
    return 0


def _write_config(models: Sequence[Mapping[str, Any]]) -> Path:
    """Write a config of these models to a file in memory; return its path.

    Raises UsageError for values that are invalid in a config.
    """
    descriptor = os.memfd_create("config.json")
    with open(os.dup(descriptor), "wb") as stream:
        stream.write(orjson.dumps({"model_config_list": [{"config": model} for model in models]}))
    path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        load_config(path)
    except ConfigError as error:
        problems = error.problems
        for flag in (flag for flag in FLAGS.values() if flag.key):
            for separator in (".", ": "):  # before a key in messages on types, and on values
                place = f"{path}: model_config_list[0].config{separator}{flag.key}"
                problems = tuple(problem.replace(place, f"--{flag.name}") for problem in problems)
        raise UsageError(problems) from error
    return path


# --- The check


def _check_parser() -> Parser:
    parser = Parser(
        prog="ovms-rest check",
        usage="ovms-rest check [CONFIG | [NAME=]PATH ...] [--json] [--batching]",
        description="Load everything that a config names, or the models at the given paths, as the service would, and "
        "report on every model and every problem. The settings OVMS_REST_* have the same effect as on the service.",
        epilog="Exits with 0 when everything would serve, else with 1.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="CONFIG | [NAME=]PATH",
        help="the JSON config, or models as `ovms-rest PATH` serves them; default: the config that OVMS_REST_CONFIG "
        "names, or the demo",
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.add_argument(
        "--batching",
        action="store_true",
        help="measure each model with batches of 1, 2, 4 and so on rows, up to its max_batch_size or 32, on one core",
    )
    return parser


def _check(options: argparse.Namespace) -> int:
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno == logging.WARNING)  # errors are in the report
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])
    log_escaping.install()
    try:
        settings = read_settings(os.environ)
        config = read_config(_find_config(options.paths) or settings.config, settings)
        load_settings = load_settings_of(settings)
        registry = load_models(config.models, load_settings, _print_progress)
        pipelines, libraries = config.pipelines, config.libraries
        registry.entries |= assemble_pipelines(pipelines, libraries, registry.entries, {}, load_settings)
    except ConfigError as error:
        report: dict[str, Any] = {"models": [], "pipelines": [], "ovms": [], "problems": list(error.problems)}
    except ShortageError as error:
        report = {"models": [], "pipelines": [], "ovms": [], "problems": [str(error)]}
    else:
        report = describe_registry(registry)
        # Paths are not a file of OVMS's.
        report["ovms"] = list(config.dropped) if _names_config(options.paths) else []
        if options.batching:
            _measure_batches(registry, report)
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        print("\n".join(map(escape, _write(report))))
    return 1 if report["problems"] else 0


def _find_config(arguments: Sequence[str]) -> Path | None:
    """Return the config to check: the given file, or one of the given models; None without arguments.

    Raises PathError.
    """
    if _names_config(arguments):
        return Path(arguments[0]) if arguments else None
    found = find_models(arguments)
    if found.problems:
        raise PathError(found.problems)
    for note in found.notes:
        log.warning("%s", note)
    return _write_config([{"name": model.name, "base_path": str(model.path)} for model in found.models])


def _names_config(arguments: Sequence[str]) -> bool:
    """Return whether the arguments choose a config, and not models."""
    return not arguments or (len(arguments) == 1 and _is_config(arguments[0]))


def _is_config(argument: str) -> bool:
    """Return whether an argument looks like a config and not like a model; neither needs to exist."""
    is_named = "=" in argument and not os.path.lexists(argument)
    return not (is_named or os.path.isdir(argument) or argument.endswith(MODEL_SUFFIXES))


def _print_progress(name: str, version: int) -> None:
    print(f"loading {name!r} version {version} ...", file=sys.stderr, flush=True)


def _measure_batches(registry: ModelRegistry, report: dict[str, Any]) -> None:
    """Add the speeds with batches to the report."""
    for described in report["models"]:
        for version in described["versions"]:
            model = registry.entries[described["name"]].versions[version["version"]]
            assert isinstance(model, Model)
            print(f"measuring {described['name']!r} version {version['version']} ...", file=sys.stderr, flush=True)
            speeds, verdict = measure_batches(model)
            version["batching"] = {
                "speeds": [
                    {"rows": speed.rows, "milliseconds": round(speed.seconds * 1e3, 3), "rows_per_second": speed.rate}
                    for speed in speeds
                ],
                "verdict": verdict,
            }


# --- The report


def describe_registry(registry: ModelRegistry) -> dict[str, Any]:
    """Return the report on all models and pipelines, with a line for each problem, as plain values."""
    models = [_describe_entry(name, entry) for name, entry in registry.entries.items() if entry.kind == "model"]
    pipelines = [_describe_pipeline(name, entry) for name, entry in registry.entries.items() if entry.kind != "model"]
    return {"models": models, "pipelines": pipelines, "problems": registry.problems()}


def _describe_pipeline(name: str, entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "serves": bool(entry.versions)}
    for pipeline in entry.versions.values():
        described["inputs"] = _describe_tensors(pipeline.metadata.inputs, {})
        described["outputs"] = _describe_tensors(pipeline.metadata.outputs, {})
        described["models"] = sorted({model.metadata.name for model in pipeline.dependencies})
    return described


def _describe_entry(name: str, entry: Entry) -> dict[str, Any]:
    versions = []
    for version, model in sorted(entry.versions.items()):
        assert isinstance(model, Model)
        trial, compilation = entry.trials[version], model.compilation
        versions.append(
            {
                "version": version,
                "file": str(model.file),
                "inputs": _describe_tensors(model.metadata.inputs, model.input_layouts),
                "outputs": _describe_tensors(model.metadata.outputs, model.output_layouts),
                "device": compilation.device,
                "properties": dict(compilation.properties),
                "shared": compilation.shared,
                "why": compilation.reason,
                "notes": [*compilation.notes, *model.notes, *entry.notes, *filter(None, [trial.warning])],
                "load_seconds": round(trial.seconds, 3),
                "memory_bytes": trial.memory,
            }
        )
    return {"name": name, "versions": versions}


def _describe_tensors(tensors: Mapping[str, TensorMetadata], layouts: Mapping[str, str | None]) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.describe_shape(),
            "layout": layouts.get(tensor.name),
        }
        for tensor in tensors.values()
    ]


def _write(report: Mapping[str, Any]) -> Iterator[str]:
    for model in report["models"]:
        for version in model["versions"]:
            yield f"model {model['name']!r} version {version['version']}"
            yield f"  file      {version['file']}"
            yield from _write_tensors(version)
            how = "compiled once, shared by all workers" if version["shared"] else "compiled by each worker"
            yield f"  {version['device']:9} {how}: {version['why']}"
            for note in version["notes"]:
                yield f"            {note}"
            yield from _write_batching(version.get("batching"))
            yield f"  loaded    in {version['load_seconds']:.2f} s, {version['memory_bytes'] / 2**20:.1f} MB"
            yield ""
    for pipeline in report["pipelines"]:
        if pipeline["serves"]:
            yield f"pipeline {pipeline['name']!r}"
            yield from _write_tensors(pipeline)
            yield f"  models    {', '.join(pipeline['models']) or 'none'}"
            yield ""
    for line in report["ovms"]:
        yield f"OVMS: {line}"
    for problem in report["problems"]:
        yield f"problem: {problem}"
    serving = f"{sum(bool(model['versions']) for model in report['models'])} of {len(report['models'])} models"
    if report["pipelines"]:
        count = sum(pipeline["serves"] for pipeline in report["pipelines"])
        serving += f" and {count} of {len(report['pipelines'])} pipelines"
    count = len(report["problems"])
    yield f"{serving} serve, {count} problem{'' if count == 1 else 's'}"


def _write_batching(batching: Mapping[str, Any] | None) -> Iterator[str]:
    if batching is None:
        return
    if speeds := batching["speeds"]:
        yield f"  batching  {'rows':>6}  {'ms':>9}  {'rows/s':>9}  {'times':>6}"
        for speed in speeds:
            times = speed["rows_per_second"] / speeds[0]["rows_per_second"]
            numbers = f"{speed['milliseconds']:9.3f}  {speed['rows_per_second']:9.1f}  {times:6.2f}"
            yield f"            {speed['rows']:6}  {numbers}"
    yield f"  {'' if speeds else 'batching':9} {batching['verdict']}"


def _write_tensors(described: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("inputs", "outputs"):
        for tensor in described[kind]:
            layout = f"  layout {tensor['layout']}" if tensor["layout"] else ""
            yield f"  {kind[:-1]:9} {tensor['name']}  {tensor['datatype']}  {tensor['shape']}{layout}"
