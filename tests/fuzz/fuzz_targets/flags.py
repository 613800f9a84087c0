"""The command line of `ovms-rest`, and the environment variables of the settings.

The input: arguments separated by NUL; those of the form OVMS_REST_NAME=VALUE are variables.
"""

import contextlib
import functools
import io
import logging
import os

from fuzz_oracles import Failure, attempt_command

from ovms_rest import flags
from ovms_rest.flags import FLAGS, Start, read_flags
from ovms_rest.log import log
from ovms_rest.settings import Settings, read_settings

MAX_LENGTH = 1024
TOKENS = [f"--{name}".encode() for name in FLAGS] + [
    *(
        b"\0",
        b"=",
        b"true",
        b"false",
        b"8000",
        b"{}",
        b"::",
        b"0.0.0.0,::1",
        b"unix:/s",
        b"(1,-1)",
        b"NHWC:NCHW",
        b"--help",
    ),
    *(b"OVMS_REST_MAX_BODY_BYTES=", b"OVMS_REST_MODEL_CONTROL=", b"OVMS_REST_ACCESS_LOG=", b"DEBUG", b"http://x:80"),
]
_EMPTY = "/proc/self/ns"  # a working directory without models to search for
log.setLevel(logging.CRITICAL)
# The parser is the same for every command line, and takes most of the time to make.
flags._make_parser = functools.cache(flags._make_parser)  # type: ignore[assignment]


def seeds() -> list[bytes]:
    """Return command lines with every flag, and settings."""
    lines = [
        ["--config_path", "c.json", "--rest_port", "8000"],
        ["--model_name", "m", "--model_path", "/m", "--rest_port=8000", "--shape", "(1,-1)", "--layout", "NHWC:NCHW"],
        ["--model_name", "m", "--model_path", "s3://b", "--rest_port", "1", "--plugin_config", '{"NUM_STREAMS": 1}'],
        ["/nothing/there", "--rest_workers", "3", "--log_level", "DEBUG", "--metrics_enable", "--metrics_list", "a,b"],
        ["--rest_bind_address", "0.0.0.0,::", "--rest_port", "80", "--config_path", "c", "--bind", "x:1"],
        ["--port", "9000", "--help"],
        ["--model_repository", "x"],
        [
            "OVMS_REST_MAX_BODY_BYTES=1000",
            "OVMS_REST_MODEL_CONTROL=local",
            "OVMS_REST_CONSOLE=maybe",
            "OVMS_REST_MAX=1",
        ],
    ]
    lines += [["--config_path", "c.json", "--rest_port", "8000", f"--{name}", "1"] for name in FLAGS]
    return ["\0".join(line).encode() for line in lines]


def check(data: bytes) -> None:
    """Read a command line and an environment: the result, or a ConfigError of lines."""
    arguments = data.decode(errors="surrogateescape").split("\0")
    environ = {name: value for name, found, value in (argument.partition("=") for argument in arguments) if found}
    settings = attempt_command(read_settings, environ)
    assert isinstance(settings, Settings | Failure)
    arguments = [argument for argument in arguments if not argument.startswith("OVMS_REST_")]
    if any(os.path.exists(os.fsencode(argument)) for argument in arguments if "\0" not in argument):
        return  # directories would be searched
    with contextlib.chdir(_EMPTY), contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            start = attempt_command(read_flags, arguments, 4)
        except SystemExit:  # after --help and --version
            assert shown.getvalue()
            return
    assert isinstance(start, Start | Failure)
    if isinstance(start, Start):
        assert all(type(value) is str for value in start.environ.values())
