"""The settings of the service, from environment variables; the fields of `Settings` are the list of them."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ovms_rest.errors import ConfigError
from ovms_rest.log import log

PREFIX = "OVMS_REST_"
DEMO_CONFIG = Path(__file__).parent / "demo" / "config.json"


# --- Values: each function parses a non-empty text, or raises ValueError; flags.py uses the public ones too


def parse_text(value: str) -> str:
    """Return any text unchanged."""
    return value


def parse_boolean(value: str) -> bool:
    """Parse true or false, in upper or lower case, or 1 or 0."""
    try:
        return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of integers within these limits, written with the digits 0 to 9 only."""

    def parse(value: str) -> int:
        if not (value.isascii() and value.isdigit() and low <= int(value.lstrip("0")[:20] or 0) <= high):
            raise ValueError(f"expected an integer from {low} to {high}")
        return int(value)

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return value.lower()

    return parse


_SECONDS = integer_between(1, 86400)


# --- The settings


def _setting(default: Any, parse: Callable[[str], Any], meaning: str) -> Any:
    return field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings; the variable of each is `OVMS_REST_` and its name in capitals."""

    config: Path = _setting(DEMO_CONFIG, Path, "path of the JSON config; without it the demo model is served")
    max_body_bytes: int = _setting(
        256 * 2**20,
        # OpenVINO's string tensors have 32-bit offsets into the body.
        integer_between(1, 2**31 - 1),
        "bytes allowed in the body of a request, as received and after decompression; control routes allow 1 MiB at "
        "most; a larger body gets 413, and so does JSON whose values would take more than five times as much memory",
    )
    max_waiting: int = _setting(
        64,
        integer_between(1, 1_000_000),
        "inferences that may be queued in one worker; further ones get 503 with Retry-After",
    )
    max_held_bytes: int = _setting(
        2**30,
        integer_between(1, 2**40),
        "bytes of received requests and unsent responses that one worker may hold; a request or response that would "
        "exceed them gets 503 with Retry-After",
    )
    max_worker_memory_bytes: int = _setting(
        0,
        integer_between(0, 2**50),
        "bytes of memory that one worker may use in addition to shared memory; a worker that uses more is replaced "
        "once its successor is ready; 0 for no limit",
    )
    head_timeout_seconds: int = _setting(10, _SECONDS, "seconds allowed for receiving the head of a request")
    body_timeout_seconds: int = _setting(
        30,
        _SECONDS,
        "seconds allowed for receiving a body; every 100,000 bytes received add one, but the time left never exceeds "
        "this setting; beyond it the response is 408",
    )
    send_timeout_seconds: int = _setting(
        30,
        _SECONDS,
        "seconds a client may take to read a response; every 100,000 bytes read add one, but the time left never "
        "exceeds this setting; beyond it the connection is closed",
    )
    control_bind: str = _setting(
        "",
        parse_text,
        "HOST:PORT or unix:PATH of an extra worker that serves everything except inference, so it never waits for one",
    )
    model_control: str = _setting(
        "auto",
        _one_of("auto", "local", "none", "all"),
        "who may load and unload models and change the log by requests: `auto`: clients of the control address only; "
        "`local`: also this host, but not through a proxy or from a web page of another site; `none`: nobody; `all`: "
        "everyone",
    )
    console: bool = _setting(
        True, parse_boolean, "serve the console at /console, on the control address only if there is one"
    )
    model_roots: str = _setting(
        "",
        parse_text,
        "directories, separated by `:`, below which a load request may name paths, in addition to the directories of "
        "the models in the config file",
    )
    load_timeout_seconds: int = _setting(
        300,
        _SECONDS,
        "seconds allowed for reading, compiling and trying a model; while workers serve, time for which the model gets "
        "no core does not count, up to three times as much",
    )
    file_system_poll_wait_seconds: int = _setting(
        1,
        integer_between(0, 86400),
        "seconds between checks for changes of the config and the models; 0 turns them off",
    )
    cache_dir: str = _setting(
        "",
        parse_text,
        "directory where OpenVINO caches compiled models, unless a model's `CACHE_DIR` names another; empty for none. "
        "A directory that cannot be written is only read. Nothing removes the files of models that have changed or are "
        "gone: delete its `.blob` files from time to time, at any moment",
    )
    cpu_extension: str = _setting(
        "",
        parse_text,
        "library of an OpenVINO extension with operations for all models without a `cpu_extension` of their own; "
        "tokenizers need none if `openvino-tokenizers` is installed",
    )
    max_image_pixels: int = _setting(
        2**26, integer_between(1, 2**30), "pixels allowed in one encoded image; a larger image gets 400"
    )
    max_request_pixels: int = _setting(
        2**28,
        integer_between(1, 2**34),
        "pixels allowed in all encoded images of one input together, and values (channels counted) in the array that "
        "they become; beyond either the response is 400. It also bounds the other costs of decoding them",
    )
    access_log: str = _setting(
        "none",
        _one_of("none", "text", "json"),
        "format of the access log, one line per request: `text` or `json`; `none` turns it off",
    )
    access_log_file: str = _setting(
        "-", parse_text, "path of the access log, reopened on SIGUSR1; `-` is standard output"
    )
    metrics_enable: bool = _setting(False, parse_boolean, "serve /metrics, as `monitoring` in the config does")
    metrics_list: str = _setting("", parse_text, "metrics to serve, separated by commas; empty for the default ones")
    response_compression: bool = _setting(
        False, parse_boolean, "compress inference responses for clients whose Accept-Encoding names gzip or deflate"
    )
    allowed_origins: str = _setting("", parse_text, "CORS: value of Access-Control-Allow-Origin; empty turns CORS off")
    allowed_methods: str = _setting("*", parse_text, "CORS: value of Access-Control-Allow-Methods")
    allowed_headers: str = _setting("*", parse_text, "CORS: value of Access-Control-Allow-Headers")
    allow_credentials: bool = _setting(False, parse_boolean, "CORS: send Access-Control-Allow-Credentials: true")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from environment variables; empty variables count as unset.

    A name similar to that of a setting is reported in the log. Others are ignored: Kubernetes puts variables such as
    OVMS_REST_SERVICE_HOST into every pod of a namespace that has a Service called ovms-rest.

    Raises ConfigError for invalid values.
    """
    known = {PREFIX + setting.name.upper(): setting for setting in fields(Settings)}
    values, problems = {}, []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or not text:
            continue
        if variable not in known:
            for near in difflib.get_close_matches(variable, known, n=1, cutoff=0.8):
                log.warning("unknown setting %s ignored; did you mean %s?", variable, near)
            continue
        try:
            values[known[variable].name] = known[variable].metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{variable}: {error}, got {text!r}")
    if problems:
        raise ConfigError(problems)
    return Settings(**values)


def cors_headers(settings: Settings) -> dict[str, str]:
    """Return the CORS headers of every response, none if CORS is off."""
    if not settings.allowed_origins:
        return {}
    headers = {
        "Access-Control-Allow-Origin": settings.allowed_origins,
        "Access-Control-Allow-Methods": settings.allowed_methods,
        "Access-Control-Allow-Headers": settings.allowed_headers,
        # Without it a page could not read a binary response.
        "Access-Control-Expose-Headers": "Inference-Header-Content-Length",
    }
    if settings.allow_credentials:
        headers["Access-Control-Allow-Credentials"] = "true"
    return headers
