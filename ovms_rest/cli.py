"""The command `ovms-rest`: `check` loads what a config names, as the service would, and reports."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from ovms_rest import __version__
from ovms_rest.app import host_of
from ovms_rest.config import load_config
from ovms_rest.errors import ConfigError
from ovms_rest.models.registry import Entry, ModelRegistry, load_models
from ovms_rest.protocol.tensors import TensorMetadata
from ovms_rest.settings import read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="ovms-rest", description="Serve OpenVINO models over the KServe v2 REST API.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ovms_rest {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="load all that a config names, report on it and exit",
        description="Load all that a config names, as the service would, and report on every model and every problem. "
        "The settings OVMS_REST_* count as they do for the service.",
        epilog="Exits with 0 when everything that is configured would serve, else with 1.",
        allow_abbrev=False,
    )
    check.add_argument("config", type=Path, metavar="CONFIG", help="path of the JSON config")
    check.add_argument("--json", action="store_true", help="write the report as JSON")
    check.set_defaults(run=_check)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _check(options: argparse.Namespace) -> int:
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno == logging.WARNING)  # errors are in the report
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])
    try:
        registry = load_models(load_config(options.config), host_of(read_settings(os.environ)), _tell_progress)
    except ConfigError as error:
        report: dict[str, Any] = {"models": [], "problems": list(error.problems)}
    else:
        report = describe_registry(registry)
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        print("\n".join(_write(report)))
    return 1 if report["problems"] else 0


def _tell_progress(name: str, version: int) -> None:
    print(f"loading {name!r} version {version} ...", file=sys.stderr, flush=True)


# --- The report


def describe_registry(registry: ModelRegistry) -> dict[str, Any]:
    """Describe all models, and what is wrong with them in a line for each, as plain values."""
    problems = []
    for name, entry in registry.entries.items():
        if entry.reason:
            problems.append(f"model {name!r} does not serve: {entry.reason}")
        problems += [
            f"version {version} of model {name!r} does not serve: {reason}"
            for version, reason in sorted(entry.failures.items())
        ]
    models = [_describe_entry(name, entry) for name, entry in registry.entries.items()]
    return {"models": models, "problems": problems}


def _describe_entry(name: str, entry: Entry) -> dict[str, Any]:
    versions = []
    for version, model in sorted(entry.versions.items()):
        proof, compilation = entry.proofs[version], model.compilation
        versions.append(
            {
                "version": version,
                "file": str(model.file),
                "inputs": _describe_tensors(model.metadata.inputs, model.layouts),
                "outputs": _describe_tensors(model.metadata.outputs, model.layouts),
                "device": compilation.device,
                "properties": dict(compilation.properties),
                "shared": compilation.shared,
                "why": compilation.reason,
                "notes": list(compilation.notes),
                "load_seconds": round(proof.seconds, 3),
                "memory_bytes": proof.memory,
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
            for kind in ("inputs", "outputs"):
                for tensor in version[kind]:
                    layout = f"  layout {tensor['layout']}" if tensor["layout"] else ""
                    yield f"  {kind[:-1]:9} {tensor['name']}  {tensor['datatype']}  {tensor['shape']}{layout}"
            how = "compiled once, shared by all workers" if version["shared"] else "compiled by each worker"
            yield f"  {version['device']:9} {how}: {version['why']}"
            for note in version["notes"]:
                yield f"            {note}"
            yield f"  loaded    in {version['load_seconds']:.2f} s, {version['memory_bytes'] / 2**20:.1f} MB"
            yield ""
    for problem in report["problems"]:
        yield f"problem: {problem}"
    serving = sum(bool(model["versions"]) for model in report["models"])
    yield f"{serving} of {len(report['models'])} models serve, {len(report['problems'])} problems"


if __name__ == "__main__":
    sys.exit(main())
