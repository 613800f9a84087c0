"""The settings of the service, from environment variables; the fields of `Settings` are the list of them."""

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ovms_rest.errors import ConfigError

log = logging.getLogger("gunicorn.error.ovms_rest")

PREFIX = "OVMS_REST_"
DEMO_CONFIG = Path(__file__).parent / "demo" / "config.json"


def _text(value: str) -> str:
    return value


def _flag(value: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


def _between(low: int, high: int) -> Callable[[str], int]:
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


def _setting(default: Any, parse: Callable[[str], Any], meaning: str) -> Any:
    return field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every field is set by the variable of its name in capitals behind `OVMS_REST_`."""

    config: Path = _setting(DEMO_CONFIG, Path, "path of the JSON config; without it the demo model is served")
    max_body_bytes: int = _setting(
        256 * 2**20,
        # Strings are found in a body by 32-bit offsets, which OpenVINO's string tensors have.
        _between(1, 2**31 - 1),
        "largest body of a request, received or decompressed; above it the answer is 413",
    )
    max_waiting: int = _setting(
        64, _between(1, 1_000_000), "inferences that may wait in a worker; above it the answer is 503 with Retry-After"
    )
    max_held_bytes: int = _setting(
        2**30,
        _between(1, 2**40),
        "bytes that requests and answers under way may hold in a worker; above it the answer is 503 with Retry-After",
    )
    head_timeout_seconds: int = _setting(10, _between(1, 86400), "how long the head of a request may take to come")
    body_timeout_seconds: int = _setting(
        30, _between(1, 86400), "how long a body may take to come, beyond a second for every 100,000 bytes"
    )
    send_timeout_seconds: int = _setting(
        30, _between(1, 86400), "how long a client may take to read an answer, beyond a second for every 100,000 bytes"
    )
    control_bind: str = _setting(
        "", _text, "address (HOST:PORT or unix:PATH) of a worker for all but inferences, which never waits for one"
    )
    model_control: str = _setting(
        "auto",
        _one_of("auto", "none", "all"),
        "where models may be loaded and unloaded and the log be set by call: `auto` is the control address, when there "
        "is one, else from this host; `none` is nowhere, `all` is on every address",
    )
    load_timeout_seconds: int = _setting(
        300, _between(1, 86400), "how long a model may take to be read, compiled and tried before it is given up"
    )
    file_system_poll_wait_seconds: int = _setting(
        1, _between(0, 86400), "how often to look whether the config or a model has changed on the disk; 0 for never"
    )
    cache_dir: str = _setting(
        "",
        _text,
        "directory in which OpenVINO keeps compiled models; empty for none",
    )
    max_image_pixels: int = _setting(
        2**26, _between(1, 2**30), "pixels that an encoded image may have; above it the answer is 400"
    )
    max_request_pixels: int = _setting(
        2**28, _between(1, 2**34), "pixels that all images of an input may have, encoded or as resized"
    )
    access_log: str = _setting(
        "none", _one_of("none", "text", "json"), "what a line for every request is written as; `none` is no line"
    )
    access_log_file: str = _setting(
        "-", _text, "path of the file for these lines, opened anew on SIGUSR1; `-` is the standard output"
    )
    metrics_enable: bool = _setting(False, _flag, "serve /metrics, as `monitoring` in the config does")
    metrics_list: str = _setting("", _text, "metrics to serve, separated by commas; empty for all but optional ones")
    response_compression: bool = _setting(
        False, _flag, "compress answers of inferences when the client asks by Accept-Encoding (gzip, deflate)"
    )
    allowed_origins: str = _setting("", _text, "CORS: value of Access-Control-Allow-Origin; empty turns CORS off")
    allowed_methods: str = _setting("*", _text, "CORS: value of Access-Control-Allow-Methods")
    allowed_headers: str = _setting("*", _text, "CORS: value of Access-Control-Allow-Headers")
    allow_credentials: bool = _setting(False, _flag, "CORS: send Access-Control-Allow-Credentials: true")


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings from environment variables; empty ones count as not set.

    A name that is nearly a setting's is told in the log. Others are left alone: Kubernetes puts variables of its own,
    such as OVMS_REST_SERVICE_HOST, into every pod beside a Service called ovms-rest.

    Raises ConfigError for a value that is not allowed.
    """
    known = {PREFIX + setting.name.upper(): setting for setting in fields(Settings)}
    values, problems = {}, []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or not text:
            continue
        if variable not in known:
            for near in difflib.get_close_matches(variable, known, n=1, cutoff=0.8):
                log.warning("%s is no setting and has no effect; did you mean %s?", variable, near)
            continue
        try:
            values[known[variable].name] = known[variable].metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{variable}: {error}, got {text!r}")
    if problems:
        raise ConfigError(problems)
    return Settings(**values)
