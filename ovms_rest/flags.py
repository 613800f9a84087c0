"""The flags of `ovms-rest`, which are those of the OpenVINO Model Server, and what they mean for the service.

`GROUPS` is the list of them. What OVMS has besides and this server has not is refused by name, with the reason.
`read_flags` finds every mistake in one reading.
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
from ovms_rest.protocol.words import explain_json_error
from ovms_rest.settings import integer_between, parse_boolean, parse_text

Values = Mapping[str, Any]


class UsageError(ConfigError):
    """A call of the command that cannot be understood or carried out."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the service is to be started with.

    `environ` has variables of settings; `model` is the single model as a config has it, None when there is a config
    file; `gunicorn` has settings of gunicorn's; `notes` is for the log.
    """

    environ: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    gunicorn: Mapping[str, Any] = field(default_factory=dict)
    log_path: str = ""
    notes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag: how its value is read, and what it becomes, a setting's variable or a key of the model in a config."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    meaning: str
    setting: str = ""
    key: str = ""


# --- Values: each function reads a text that is not empty, or raises ValueError


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
    """Make a path absolute, symbolic links left as they are; the config refuses what is remote."""
    return text if "://" in text else str(Path(text).absolute())


def _addresses(text: str) -> list[str]:
    """Split a list of addresses, those of IPv6 with or without their brackets."""
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
_PORT = integer_between(0, 65535)
_COUNT = integer_between(0, 10**9)

_SERVABLES = (
    Flag("config_path", parse_text, "FILE", "JSON config with the models", setting="OVMS_REST_CONFIG"),
    Flag("model_name", parse_text, "NAME", "name of a single model, as in its URL", key="name"),
    Flag("model_path", _absolute_path, "PATH", "its directory of versions, or its model file", key="base_path"),
)
_MODEL = (
    Flag("batch_size", parse_text, "N", "8, -1 (any) or 1:16", key="batch_size"),
    Flag("shape", _text_or_json, "SHAPE", '"(1,3,224,224)", or a JSON object keyed by input name', key="shape"),
    Flag("layout", _text_or_json, "LAYOUT", "NHWC:NCHW, or a JSON object keyed by input and output name", key="layout"),
    Flag(
        "model_version_policy",
        _json_object,
        "JSON",
        'versions to serve; default: \'{"latest": {"num_versions": 1}}\'',
        key="model_version_policy",
    ),
    Flag("nireq", _COUNT, "N", "ignored: each worker runs one inference at a time", key="nireq"),
    Flag("target_device", parse_text, "DEVICE", "OpenVINO device; default: CPU", key="target_device"),
    Flag(
        "plugin_config", _json_object, "JSON", "OpenVINO properties of the device, a JSON object", key="plugin_config"
    ),
    Flag("mean", parse_text, "VALUES", 'values to subtract: 127.5 or "(123.7,116.3,103.5)"', key="mean"),
    Flag("scale", parse_text, "VALUES", "values to divide by after that, in the same form", key="scale"),
    Flag("color_format", parse_text, "FORMATS", "RGB:BGR: the model takes RGB, clients send BGR", key="color_format"),
    Flag("precision", parse_text, "TYPES", "uint8:fp32: clients send UINT8, the model takes FP32", key="precision"),
)
_SERVER = (
    Flag("rest_port", _PORT, "PORT", "port to serve on; required"),
    Flag("rest_bind_address", _addresses, "LIST", "addresses to serve on, separated by commas; default: 0.0.0.0"),
    Flag("rest_workers", integer_between(0, 10_000), "N", "worker processes; default and maximum: one per usable core"),
    Flag(
        "file_system_poll_wait_seconds",
        integer_between(0, 86400),
        "N",
        "seconds between checks for changes; default: 1; 0 turns them off",
        setting="OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS",
    ),
    Flag(
        "metrics_enable", parse_boolean, "", "serve Prometheus metrics at /metrics", setting="OVMS_REST_METRICS_ENABLE"
    ),
    Flag(
        "metrics_list",
        _names,
        "LIST",
        "metrics to serve, separated by commas; needs --metrics_enable",
        setting="OVMS_REST_METRICS_LIST",
    ),
    Flag(
        "cache_dir",
        parse_text,
        "DIR",
        "directory where OpenVINO caches compiled models; default: none",
        setting="OVMS_REST_CACHE_DIR",
    ),
    Flag(
        "cpu_extension",
        _absolute_path,
        "FILE",
        "library of an OpenVINO extension, with custom operations",
        setting="OVMS_REST_CPU_EXTENSION",
    ),
    Flag("log_level", _level, "LEVEL", f"{', '.join(_LEVELS)}; default: INFO"),
    Flag("log_path", parse_text, "FILE", "file for the log, in addition to the standard error"),
    Flag(
        "allowed_origins",
        parse_text,
        "TEXT",
        "CORS: Access-Control-Allow-Origin; default: no CORS",
        setting="OVMS_REST_ALLOWED_ORIGINS",
    ),
    Flag(
        "allowed_methods",
        parse_text,
        "TEXT",
        "CORS: Access-Control-Allow-Methods; default: *",
        setting="OVMS_REST_ALLOWED_METHODS",
    ),
    Flag(
        "allowed_headers",
        parse_text,
        "TEXT",
        "CORS: Access-Control-Allow-Headers; default: *",
        setting="OVMS_REST_ALLOWED_HEADERS",
    ),
    Flag(
        "allow_credentials",
        parse_boolean,
        "",
        "CORS: Access-Control-Allow-Credentials; default: false",
        setting="OVMS_REST_ALLOW_CREDENTIALS",
    ),
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
    "what to serve: a config file, or a single model": _SERVABLES,
    "the single model, as the keys of a config": _MODEL,
    "the server": _SERVER,
    f"accepted but ignored: {_WHY_IGNORED}": _TOLERATED,
}
FLAGS: Mapping[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}

_GENERATIVE = "it belongs to the generative API /v3, which is not served here"
_PULLING = "it fetches and prepares generative models, which are not served here"
_MANAGING = "it edits a config file, which is left to you; `ovms-rest check CONFIG` tells whether it is right"
_STATEFUL = "OVMS removed stateful models"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("api_key_file", "allowed_media_domains", "allowed_local_media_path", "verbose_response"), _GENERATIVE
    ),
    **dict.fromkeys(
        ("pull", "source_model", "task", "configure", "overwrite_models", "gguf_filename", "draft_source_model"),
        _PULLING,
    ),
    **dict.fromkeys(("list_models", "add_to_config", "remove_from_config", "model_repository_path"), _MANAGING),
    **dict.fromkeys(
        (
            "stateful",
            "idle_sequence_cleanup",
            "low_latency_transformation",
            "max_sequence_number",
            "sequence_cleaner_poll_wait_minutes",
        ),
        _STATEFUL,
    ),
}

USAGE = """ovms-rest --config_path FILE --rest_port PORT [FLAG ...]
       ovms-rest --model_name NAME --model_path PATH --rest_port PORT [FLAG ...]
       ovms-rest check [CONFIG] [--json]"""


# --- Reading them


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError([message.removeprefix("argument ")])


def read_flags(arguments: Sequence[str], cores: int) -> Start:
    """Read a command line and settle it for a host with so many usable cores. Raises UsageError with all mistakes.

    `--help` and `--version` print and raise SystemExit.
    """
    parsed, rest = _make_parser().parse_known_args(arguments)
    texts = {name: text for name, text in vars(parsed).items() if text is not None}
    problems, values = list(_refuse(rest)), {}
    for name, text in texts.items():
        try:
            if text:  # an empty one counts as not given
                values[name] = FLAGS[name].parse(text)
        except ValueError as error:
            problems.append(f"--{name}: {error}, got {text!r}")
    problems = problems or list(_check_combination(values))
    if problems:
        raise UsageError(problems)
    cleared = {FLAGS[name].setting: "" for name, text in texts.items() if FLAGS[name].setting and not text}
    return Start(
        environ={**cleared, **_environ(values)},
        model=None if "config_path" in values else _model(values),
        gunicorn=_gunicorn(values, cores),
        log_path=values.get("log_path", ""),
        notes=tuple(_notes(values, cores)),
    )


def _make_parser() -> Parser:
    parser = Parser(
        prog="ovms-rest",
        usage=USAGE,
        description="Serve OpenVINO models over the KServe v2 REST API, with the flags of the OpenVINO Model Server, "
        "written as `--name value` or `--name=value`.",
        epilog="`ovms-rest check CONFIG` loads everything a config names, reports on it and exits without serving. "
        "Settings without a flag come from OVMS_REST_* environment variables, gunicorn's own from GUNICORN_CMD_ARGS; "
        "flags take precedence. The exit code is 64 for a usage error, 1 when the service cannot start.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=37, width=104),
        allow_abbrev=False,
    )
    line = f"ovms_rest {__version__}\nOpenVINO {version('openvino')}"
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions and exit", const=line)
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.metavar:
                group.add_argument(f"--{flag.name}", metavar=flag.metavar, help=flag.meaning)
            else:
                group.add_argument(f"--{flag.name}", nargs="?", const="true", metavar="true|false", help=flag.meaning)
    return parser


class _Version(argparse.Action):
    """argparse's own would join the lines."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(self.const)
        parser.exit()


def _refuse(rest: Sequence[str]) -> Iterator[str]:
    """Tell what is wrong with arguments that are no flags of ours."""
    names = [argument.partition("=")[0] for argument in rest if argument.startswith("-")]
    for name in names:
        if reason := REFUSED.get(name.removeprefix("--")):
            yield f"{name} is not supported: {reason}"
        else:
            (near,) = difflib.get_close_matches(name, [f"--{known}" for known in FLAGS], n=1, cutoff=0)
            yield f"{name}: unknown flag; the nearest known one is {near}"
    if not names and rest:  # behind an unknown flag it would be its value
        yield f"unexpected argument {rest[0]!r}; the only command is 'check'"


def _check_combination(values: Values) -> Iterator[str]:
    servable = "use --config_path, or --model_path with --model_name"
    model = [flag.name for flag in _MODEL if flag.name in values]
    if "config_path" not in values:
        missing = [f"--{name}" for name in ("model_name", "model_path") if name not in values]
        if missing:
            yield f"{servable}; {' and '.join(missing)} is missing" if len(missing) == 1 else servable
    elif "model_name" in values or "model_path" in values:
        yield "use either --config_path, or --model_path with --model_name"
    elif model:
        yield f"{_list(model)}: parameters of a model do not go with --config_path, the file has them"
    for name in ("mean", "scale", "color_format", "precision"):
        if name in values and "layout" not in values:
            yield f"--{name} requires --layout to be set"
    port, rest_port = values.get("port"), values.get("rest_port")
    if not rest_port:
        why = "--port is gRPC's, which is not served here" if port else "--port and --rest_port cannot both be unset"
        yield f"--rest_port is missing: {why}"
    elif port == rest_port:
        yield f"--port and --rest_port cannot have the same value, got {port}"
    if "metrics_list" in values and not values.get("metrics_enable"):
        yield "--metrics_list requires --metrics_enable"


def _environ(values: Values) -> dict[str, str]:
    """Write settings as their variables."""
    return {
        FLAGS[name].setting: str(value).lower() if type(value) is bool else str(value)
        for name, value in values.items()
        if FLAGS[name].setting
    }


def _model(values: Values) -> dict[str, Any]:
    """Describe the single model as a config does."""
    return {FLAGS[name].key: value for name, value in values.items() if FLAGS[name].key}


def _gunicorn(values: Values, cores: int) -> dict[str, Any]:
    addresses = values.get("rest_bind_address", [_ANY_IPV4])
    addresses = [address for address in addresses if address not in _covered(addresses)]
    hosts = [f"[{address}]" if ":" in address else address for address in addresses]
    settings: dict[str, Any] = {"bind": [f"{host}:{values['rest_port']}" for host in hosts]}
    if "rest_workers" in values:
        settings["workers"] = min(values["rest_workers"] or cores, cores)
    if "log_level" in values:
        settings["loglevel"] = values["log_level"]
    return settings


def _covered(addresses: Sequence[str]) -> list[str]:
    """Return the addresses that another of the list takes as well, with which they would collide.

    The socket of :: takes IPv4 too, which OVMS's recipe for both families does not know of.
    """
    widest = next((address for address in ("::", _ANY_IPV4) if address in addresses), None)
    return [address for address in addresses if widest and address != widest and (widest == "::" or ":" not in address)]


def _notes(values: Values, cores: int) -> Iterator[tuple[int, str]]:
    """Tell which flags do not have the effect that they have in OVMS; one that asks for nothing is not told."""
    if values.get("rest_workers", 0) > cores:
        yield (
            logging.INFO,
            f"--rest_workers: {cores} instead of {values['rest_workers']}: one per usable core is the maximum",
        )
    addresses = values.get("rest_bind_address", ())
    if covered := _covered(addresses):
        widest = "::, which takes IPv4 too" if "::" in addresses else _ANY_IPV4
        yield logging.INFO, f"--rest_bind_address: {', '.join(covered)} left out, covered by {widest}"
    if tolerated := [flag.name for flag in _TOLERATED if values.get(flag.name)]:
        yield logging.INFO, f"{_list(tolerated)}: ignored: {_WHY_IGNORED}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
