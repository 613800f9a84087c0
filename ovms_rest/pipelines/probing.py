"""Trying the code of a custom node in a throwaway process, so that its crash or hang does not harm the arbiter."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.host.throwaway import Send, start
from ovms_rest.pipelines import c_nodes, python_nodes


class Code(NamedTuple):
    """What is to be tried: a Python file, the name of a Python module or object, or a C library, and the params."""

    kind: Literal["file", "name", "c"]
    place: str
    params: Mapping[str, str]


def probe(code: Code, timeout: float, stop: Callable[[], bool] = lambda: False, descriptors: Sequence[int] = ()) -> Any:
    """Load the code of a node in a process of its own, for `timeout` seconds at most; return what it tells of itself.

    That is nothing for Python and `c_nodes.Description` for C. When `stop` says so, it is given up. The process
    has the `descriptors`, by which the place of the code may go. Raises LoadError.
    """
    task = {**code._asdict(), "params": dict(code.params), "path": sys.path}
    with start(try_code, task, stop, descriptors) as process:
        answer = process.receive(timeout)
    if "reason" in answer:
        raise LoadError(answer["reason"])
    return answer["answer"]


def try_code(task: dict[str, Any], send: Send) -> None:
    """Load code, a Code out of JSON with the `path` to import from, and tell the answer or why there is none."""
    sys.path[:] = task.pop("path")
    try:
        send(answer=_load(Code(**task), lambda step: send(step=step)))
    except LoadError as error:
        send(reason=str(error))


def _load(code: Code, tell: Callable[[str], None]) -> c_nodes.Description | None:
    if code.kind == "c":
        return c_nodes.describe(Path(code.place), code.params, tell)
    tell("being imported")
    if code.kind == "file":
        python_nodes.load_file("", Path(code.place), code.params)
    else:
        python_nodes.load_name("", code.place, code.params)
    return None
