"""The command line of `ovms-rest`: paths of models, and flags, which are those of the OpenVINO Model Server.

`GROUPS` lists the flags, including gunicorn's `-b` and `-w`. OVMS's other flags are refused with a reason. `read_flags`
finds every mistake in one reading.
"""

import argparse
import difflib
import ipaddress
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import orjson

from ovms_rest import __version__
from ovms_rest.errors import ConfigError
from ovms_rest.paths import NamedPaths, PathError, find_models
from ovms_rest.protocol.words import explain_json_error
from ovms_rest.settings import PREFIX, integer_between, parse_boolean, parse_text

Values = Mapping[str, Any]


class UsageError(ConfigError):
    """An invalid command line."""


@dataclass(frozen=True, slots=True)
class Start:
    """A command line as the variables of settings, gunicorn's settings, and lines for the log with their levels.

    `models` are models in the form of a config, none if a config file is given.
    """

    environ: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Mapping[str, Any], ...] = ()
    gunicorn: Mapping[str, Any] = field(default_factory=dict)
    log_path: str = ""
    notes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag: how to read its value, and the variable, the key of a model or the setting of gunicorn that it sets.

    `letter` is its short form.
    """

    name: str
    parse: Callable[[str], Any]
    metavar: str
    meaning: str
    setting: str = ""
    key: str = ""
    gunicorn: str = ""
    letter: str = ""


# --- Values: each function parses a non-empty text, or raises ValueError


def _json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    if type(value) is not dict:
        raise ValueError("expected a JSON object")
    return value


def _text_or_json(text: str) -> Any:
    return _json(text) if text.lstrip().startswith(("{", "[")) else text


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({explain_json_error(text, error)})") from None


def _absolute_path(text: str) -> str:
    """Make a path absolute and keep its symbolic links; a remote path is left for the config to refuse."""
    return text if "://" in text else str(Path(text).absolute())


def _addresses(text: str) -> list[str]:
    """Split a list of addresses; those of IPv6 may have brackets."""
    addresses = [address.strip() for address in text.split(",")]
    if not all(map(_is_address, addresses)):
        raise ValueError("expected IP addresses or host names, separated by commas")
    return [address.strip("[]") for address in addresses]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        return re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", text) is not None
    return True


def _binds(text: str) -> list[str]:
    """Split a list of addresses in the format of gunicorn's `-b`."""
    binds = [bind.strip() for bind in text.split(",")]
    if not all(re.fullmatch(r"unix:.+|fd://\d+|[^/]*:\d{1,5}", bind) for bind in binds):
        raise ValueError("expected HOST:PORT, unix:PATH or fd://N, several separated by commas")
    return binds


def _names(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names):
        raise ValueError("expected names, separated by commas")
    return ",".join(names)


_LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error"}


def _level(text: str) -> str:
    try:
        return _LEVELS[text.upper()]
    except KeyError:
        raise ValueError(f"expected one of {', '.join(_LEVELS)}") from None


# --- The flags

_ANY_IPV4 = "0.0.0.0"  # noqa: S104  # OVMS's default
_DEFAULT_PORT = 8000  # gunicorn's
_PORT = integer_between(0, 65535)
_COUNT = integer_between(0, 10**9)


def _option(name: str, parse: Callable[[str], Any], metavar: str, meaning: str) -> Flag:
    """Return a flag that sets the key of its name in the config of a model."""
    return Flag(name, parse, metavar, meaning, key=name)


def _setting(name: str, parse: Callable[[str], Any], metavar: str, meaning: str) -> Flag:
    """Return a flag that sets the setting of its name."""
    return Flag(name, parse, metavar, meaning, setting=PREFIX + name.upper())


_SERVABLES = (
    Flag("config_path", parse_text, "FILE", "JSON config with the models", setting="OVMS_REST_CONFIG"),
    Flag("model_name", parse_text, "NAME", "name of a single model, as in its URL", key="name"),
    Flag("model_path", _absolute_path, "PATH", "directory of its versions, or its model file", key="base_path"),
)
_MODEL = (
    _option("batch_size", parse_text, "N", "8, -1 (any) or 1:16"),
    _option("max_batch_size", _COUNT, "N", "maximum rows of queued requests to infer together; default: no batching"),
    _option("shape", _text_or_json, "SHAPE", '"(1,3,224,224)", or a JSON object keyed by input name'),
    _option("layout", _text_or_json, "LAYOUT", "NHWC:NCHW, or a JSON object keyed by input and output name"),
    _option(
        "model_version_policy",
        _json_object,
        "JSON",
        'versions to serve; default: \'{"latest": {"num_versions": 1}}\'',
    ),
    _option("nireq", _COUNT, "N", "ignored: each worker runs one inference at a time"),
    _option("target_device", parse_text, "DEVICE", "OpenVINO device; default: CPU"),
    _option("plugin_config", _json_object, "JSON", "OpenVINO properties of the device, a JSON object"),
    _option("mean", parse_text, "VALUES", 'values to subtract: 127.5 or "(123.7,116.3,103.5)"'),
    _option("scale", parse_text, "VALUES", "values to divide by afterwards, in the same form"),
    _option("color_format", parse_text, "FORMATS", "RGB:BGR: the model takes RGB, clients send BGR"),
    _option("precision", parse_text, "TYPES", "uint8:fp32: clients send UINT8, the model takes FP32"),
)
_SERVER = (
    Flag("rest_port", _PORT, "PORT", "port to serve on; required without PATH; default with PATH: 8000"),
    Flag(
        "rest_bind_address",
        _addresses,
        "LIST",
        "addresses to serve on, separated by commas; default: 0.0.0.0, with PATH 127.0.0.1",
    ),
    Flag("rest_workers", integer_between(0, 10_000), "N", "worker processes; default and maximum: one per usable core"),
    Flag("bind", _binds, "ADDRESS", "HOST:PORT, unix:PATH or fd://N, as for gunicorn", gunicorn="bind", letter="b"),
    Flag(
        "workers",
        integer_between(1, 10_000),
        "N",
        "worker processes, as for gunicorn: no maximum",
        gunicorn="workers",
        letter="w",
    ),
    _setting(
        "file_system_poll_wait_seconds",
        integer_between(0, 86400),
        "N",
        "seconds between checks for changes; default: 1; 0 turns them off",
    ),
    _setting("metrics_enable", parse_boolean, "", "serve Prometheus metrics at /metrics"),
    _setting("metrics_list", _names, "LIST", "metrics to serve, separated by commas; needs --metrics_enable"),
    _setting("cache_dir", parse_text, "DIR", "directory where OpenVINO caches compiled models; default: none"),
    _setting("cpu_extension", _absolute_path, "FILE", "library of an OpenVINO extension, with custom operations"),
    Flag("log_level", _level, "LEVEL", f"{', '.join(_LEVELS)}; default: INFO"),
    Flag("log_path", parse_text, "FILE", "file for the log, in addition to standard error"),
    _setting("allowed_origins", parse_text, "TEXT", "CORS: Access-Control-Allow-Origin; default: no CORS"),
    _setting("allowed_methods", parse_text, "TEXT", "CORS: Access-Control-Allow-Methods; default: *"),
    _setting("allowed_headers", parse_text, "TEXT", "CORS: Access-Control-Allow-Headers; default: *"),
    _setting("allow_credentials", parse_boolean, "", "CORS: Access-Control-Allow-Credentials; default: false"),
)
_TOLERATED = (
    Flag("port", _PORT, "PORT", "gRPC port"),
    Flag("grpc_bind_address", parse_text, "LIST", "gRPC addresses"),
    Flag("grpc_workers", parse_text, "N", "gRPC servers"),
    Flag("grpc_max_threads", parse_text, "N", "gRPC threads"),
    Flag("grpc_memory_quota", parse_text, "BYTES", "gRPC memory"),
    Flag("grpc_channel_arguments", parse_text, "LIST", "gRPC options"),
    Flag(
        "custom_node_resources_cleaner_interval_seconds",
        integer_between(1, 10**9),
        "N",
        "seconds between clean-ups of custom nodes",
    ),
)

_WHY_IGNORED = "there is no gRPC, and custom nodes are cleaned up when a worker exits"

GROUPS: Mapping[str, Sequence[Flag]] = {
    "what to serve instead of PATH: a config file, or a single model": _SERVABLES,
    "a single model, as the keys of a config": _MODEL,
    "the server": _SERVER,
    f"accepted but ignored: {_WHY_IGNORED}": _TOLERATED,
}
FLAGS: Mapping[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}

_GENERATIVE = "it belongs to the generative API /v3, which is not served"
_PULLING = "it downloads and prepares generative models, which are not served"
_MANAGING = "it edits a config file; edit the file yourself, and check it with `ovms-rest check CONFIG`"
_STATEFUL = "OVMS removed stateful models in 2026.3, and no state is kept between requests here"

REFUSED: Mapping[str, str] = {
    name: reason
    for reason, names in (
        (_GENERATIVE, "api_key_file allowed_media_domains allowed_local_media_path verbose_response"),
        (_PULLING, "pull source_model task configure overwrite_models gguf_filename draft_source_model"),
        (_MANAGING, "list_models add_to_config remove_from_config model_repository_path"),
        (_STATEFUL, "stateful idle_sequence_cleanup low_latency_transformation max_sequence_number"),
        (_STATEFUL, "sequence_cleaner_poll_wait_minutes"),
    )
    for name in names.split()
}

USAGE = """ovms-rest [NAME=]PATH [[NAME=]PATH ...] [FLAG ...]
       ovms-rest --config_path FILE --rest_port PORT [FLAG ...]
       ovms-rest --model_name NAME --model_path PATH --rest_port PORT [FLAG ...]
       ovms-rest check [CONFIG | [NAME=]PATH ...] [--json] [--batching]"""

_DESCRIPTION = """Serve OpenVINO models over the KServe v2 REST API.

A PATH is a model file (OpenVINO .xml with its .bin, .onnx, .pdmodel, .pb, .tflite), the directory of a
model, or a directory of several such directories. The name of a model, part of its URL, is NAME, or is
taken from PATH:

  ovms-rest resnet50.onnx              serves 'resnet50' on http://127.0.0.1:8000
  ovms-rest models/bert                serves 'bert' from models/bert/1, or the highest version there
  ovms-rest models                     serves every model in models/NAME/VERSION/
  ovms-rest en=a/model.xml de=b/model.xml -b 0.0.0.0:9000
                                       serves 'en' and 'de' on port 9000 of all addresses

`curl http://127.0.0.1:8000/v2/models/resnet50` then shows the inputs and outputs of the model, and a
POST to that URL with /infer appended runs an inference. With PATH the service listens on port 8000 and
is reachable from this host only, unless -b or --rest_bind_address is given.

Flags are those of the OpenVINO Model Server, written as `--name value` or `--name=value`, and -b and -w
of gunicorn. Write ./check for a PATH called 'check'."""

_EPILOG = """`ovms-rest check` loads all models that a config or paths name, reports on them and exits without
serving. Settings without a flag are set by OVMS_REST_* environment variables, those of gunicorn by
GUNICORN_CMD_ARGS; flags take precedence. The exit code is 64 for a usage error, 2 for a PATH without a
model, 1 if the service cannot start."""


# --- Reading them


class Parser(argparse.ArgumentParser):
    """A parser that raises an exception for errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError([message.removeprefix("argument ")])


def read_flags(arguments: Sequence[str], cores: int) -> Start:
    """Read a command line for a host with this many usable cores.

    Raises UsageError with all mistakes, or PathError if all of them are in paths. `--help` and `--version` print and
    raise SystemExit.
    """
    arguments, ending = _split_ending(arguments)
    parsed, rest = _make_parser().parse_known_args(_join_booleans(arguments))
    texts = {name: text for name, text in vars(parsed).items() if text is not None}
    problems, values = list(_refuse(rest)), {}
    paths = [] if problems else [*rest, *ending]  # after an unknown flag a path may be its value
    for name, text in texts.items():
        try:
            if text:  # an empty value counts as unset
                values[name] = FLAGS[name].parse(text)
        except ValueError as error:
            problems.append(f"--{name}: {error}, got {text!r}")
    found = find_models(paths)
    problems = problems or list(_check_combination(values, found if paths else None))
    if problems:
        raise UsageError([*problems, *found.problems])
    if found.problems:
        raise PathError(found.problems)
    cleared = {FLAGS[name].setting: "" for name, text in texts.items() if FLAGS[name].setting and not text}
    return Start(
        environ={**cleared, **_environ(values)},
        models=() if "config_path" in values else _models(values, found),
        gunicorn=_gunicorn(values, cores, default="127.0.0.1" if paths else _ANY_IPV4),
        log_path=values.get("log_path", ""),
        notes=tuple(_notes(values, cores, found)),
    )


def _split_ending(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split a command line at `--`, after which there are only paths."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


def _join_booleans(arguments: Sequence[str]) -> list[str]:
    """Add `=true` to each boolean flag without a value, so that a path after it is not taken for one."""
    booleans = {f"--{flag.name}" for flag in FLAGS.values() if not flag.metavar}
    followers = [*arguments, ""][1:]
    return [
        f"{argument}=true" if argument in booleans and follower.lower() not in ("true", "false") else argument
        for argument, follower in zip(arguments, followers, strict=True)
    ]


def _make_parser() -> Parser:
    parser = Parser(
        prog="ovms-rest",
        usage=USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=37, width=104),
        allow_abbrev=False,
    )
    versions = f"ovms_rest {__version__}\nOpenVINO {version('openvino')}"
    parser.add_argument("--version", action="version", version=versions, help="show the versions and exit")
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            names = [f"-{flag.letter}", f"--{flag.name}"] if flag.letter else [f"--{flag.name}"]
            if flag.metavar:
                group.add_argument(*names, metavar=flag.metavar, help=flag.meaning)
            else:
                group.add_argument(*names, nargs="?", const="true", metavar="true|false", help=flag.meaning)
    return parser


def _refuse(rest: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each unknown flag."""
    for name in (argument.partition("=")[0] for argument in rest if argument.startswith("-")):
        if reason := REFUSED.get(name.removeprefix("--")):
            yield f"{name} is not supported: {reason}"
        else:
            near = difflib.get_close_matches(name, [f"--{known}" for known in FLAGS], n=1)
            hint = f"the nearest known one is {near[0]}" if near else "see --help"
            yield f"{name}: unknown flag; {hint}"


def _check_combination(values: Values, found: NamedPaths | None) -> Iterator[str]:
    yield from _check_servable(values, found)
    for name in ("mean", "scale", "color_format", "precision"):
        if name in values and "layout" not in values:
            yield f"--{name} requires --layout to be set"
    yield from _check_addresses(values, found)
    if "workers" in values and "rest_workers" in values:
        yield "use either --workers or --rest_workers"
    if "metrics_list" in values and not values.get("metrics_enable"):
        yield "--metrics_list requires --metrics_enable"


def _check_servable(values: Values, found: NamedPaths | None) -> Iterator[str]:
    servable = "use --config_path, or --model_path with --model_name"
    named = [f"--{flag.name}" for flag in _SERVABLES if flag.name in values]
    model = [flag.name for flag in _MODEL if flag.name in values]
    if found:
        if named:
            advice = "; the name of a model is given as NAME=PATH" if named == ["--model_name"] else ""
            yield f"use either PATH or {' and '.join(named)}{advice}"
        if model and len(found.models) > 1:
            yield f"{_list(model)}: model parameters apply to a single model, got {len(found.models)} models"
    elif not named:
        yield f"nothing to serve: give a PATH, or {servable}"
    elif "config_path" not in values:
        missing = [f"--{name}" for name in ("model_name", "model_path") if name not in values]
        if missing:
            yield f"{servable}; {' and '.join(missing)} is missing"
    elif len(named) > 1:
        yield f"use either {servable.removeprefix('use ')}"
    elif model:
        yield f"{_list(model)}: model parameters cannot be combined with --config_path; set them in the file"


def _check_addresses(values: Values, found: NamedPaths | None) -> Iterator[str]:
    port, rest_port = values.get("port"), values.get("rest_port")
    has_servable = any(flag.name in values for flag in _SERVABLES)
    if "bind" in values:
        if given := [name for name in ("rest_port", "rest_bind_address") if name in values]:
            yield f"use either --bind or {_list(given)}"
    elif not rest_port:
        if port:
            yield "--rest_port is missing: --port is for gRPC, which is not served"
        elif rest_port == 0 or (has_servable and not found):
            yield "--rest_port is missing: it is the port to serve on"
    elif port == rest_port:
        yield f"--port and --rest_port cannot have the same value, got {port}"


def _environ(values: Values) -> dict[str, str]:
    """Return the variables of the settings that flags set."""
    return {
        FLAGS[name].setting: str(value).lower() if type(value) is bool else str(value)
        for name, value in values.items()
        if FLAGS[name].setting
    }


def _models(values: Values, found: NamedPaths) -> tuple[dict[str, Any], ...]:
    """Return the models in the form of a config."""
    options = {FLAGS[name].key: value for name, value in values.items() if FLAGS[name].key}
    if not found.models:
        return (options,)
    return tuple({"name": model.name, "base_path": str(model.path), **options} for model in found.models)


def _gunicorn(values: Values, cores: int, default: str) -> dict[str, Any]:
    """Return the settings of gunicorn that flags set; `default` is the address if only a port is given."""
    settings: dict[str, Any] = {FLAGS[name].gunicorn: value for name, value in values.items() if FLAGS[name].gunicorn}
    if "rest_port" in values or "rest_bind_address" in values:
        addresses = values.get("rest_bind_address", [default])
        addresses = [address for address in addresses if address not in _covered(addresses)]
        hosts = [f"[{address}]" if ":" in address else address for address in addresses]
        settings["bind"] = [f"{host}:{values.get('rest_port', _DEFAULT_PORT)}" for host in hosts]
    if "rest_workers" in values:
        settings["workers"] = min(values["rest_workers"] or cores, cores)
    if "log_level" in values:
        settings["loglevel"] = values["log_level"]
    return settings


def _covered(addresses: Sequence[str]) -> list[str]:
    """Return the addresses that a wildcard address in the list covers, which could not be bound beside it.

    A socket on :: accepts IPv4 too, so OVMS's `0.0.0.0,::` for both families becomes ::.
    """
    widest = next((address for address in ("::", _ANY_IPV4) if address in addresses), None)
    return [address for address in addresses if widest and address != widest and (widest == "::" or ":" not in address)]


def _notes(values: Values, cores: int, found: NamedPaths) -> Iterator[tuple[int, str]]:
    """Yield lines for the log: flags whose effect differs from OVMS's, and the notes on paths."""
    if values.get("rest_workers", 0) > cores:
        yield (
            logging.INFO,
            f"--rest_workers: {cores} instead of {values['rest_workers']}: the maximum is one per usable core",
        )
    addresses = values.get("rest_bind_address", ())
    if covered := _covered(addresses):
        widest = "::, which accepts IPv4 too" if "::" in addresses else _ANY_IPV4
        yield logging.INFO, f"--rest_bind_address: left out {', '.join(covered)}, covered by {widest}"
    if tolerated := [flag.name for flag in _TOLERATED if values.get(flag.name)]:
        yield logging.INFO, f"{_list(tolerated)}: ignored: {_WHY_IGNORED}"
    yield from ((logging.WARNING, note) for note in found.notes)


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
