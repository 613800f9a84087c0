"""The trial of a custom node's code in a throwaway process, so that a crash or hang does not harm the arbiter."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.host.throwaway import Send, start
from ovms_rest.pipelines import c_nodes, python_nodes


class Code(NamedTuple):
    """The code to try: a Python file, the name of a Python module or object, or a C library, with the node's params."""

    kind: Literal["file", "name", "c"]
    place: str
    params: Mapping[str, str]


def probe(code: Code, timeout: float, stop: Callable[[], bool] = lambda: False, descriptors: Sequence[int] = ()) -> Any:
    """Load code in a throwaway process; return a `c_nodes.Description` of C code, None for Python.

    The trial ends after `timeout` seconds, or once `stop` returns True. The process inherits the `descriptors`, which
    the code's path may go through. Raises LoadError.
    """
    task = {**code._asdict(), "params": dict(code.params), "path": sys.path}
    with start(try_code, task, stop, descriptors) as process:
        message = process.receive(timeout)
    if "reason" in message:
        raise LoadError(message["reason"])
    return message["result"]


def try_code(task: dict[str, Any], send: Send) -> None:
    """Run in the throwaway process: load a Code, given as JSON with its import `path`, and report the result."""
    sys.path[:] = task.pop("path")
    try:
        send(result=_load(Code(**task), lambda step: send(step=step)))
    except LoadError as error:
        send(reason=str(error))


def _load(code: Code, report: Callable[[str], None]) -> c_nodes.Description | None:
    if code.kind == "c":
        return c_nodes.describe(Path(code.place), code.params, report)
    report("being imported")
    if code.kind == "file":
        python_nodes.load_file("", Path(code.place), code.params)
    else:
        python_nodes.load_name("", code.place, code.params)
    return None
