"""Pipelines and libraries as the config file defines them, in OVMS's format (README.md, "Keys"); checks their form.

`pipelines.planning` checks whether a pipeline fits its models and libraries.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ovms_rest.checking import Check, Problem, as_json, check_keys, check_name, check_values, fits, is_a, is_text
from ovms_rest.protocol.words import cut, list_names, quote

# The implicit first and last node of every pipeline.
REQUEST, RESPONSE = "request", "response"

MODEL, CUSTOM = "DL model", "custom"

# The count of a demultiplexer whose outputs decide how many shards there are.
DYNAMIC = -1
MAX_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of a tensor: an input of the pipeline (node "request"), or the alias of a node's output."""

    node: str
    item: str


@dataclass(frozen=True, slots=True)
class NodeDefinition:
    """A node that runs a model or the code of a library; the other name is empty.

    `inputs` are pairs of a tensor and its source, `outputs` pairs of an alias and its tensor, in the order of the file,
    repeated ones included. `count` is the number of shards of its outputs, `gather_from` the node whose shards it
    collects.
    """

    name: str
    model: str = ""
    version: int | None = None
    library: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[str, Source], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    count: int | None = None
    gather_from: str | None = None


@dataclass(frozen=True, slots=True)
class PipelineDefinition:
    """A pipeline; with a `count`, the inputs of a request are split into shards.

    `example` is a file with a request, False if none is to be tried before the pipeline serves.
    """

    name: str
    inputs: tuple[str, ...] = ()
    nodes: tuple[NodeDefinition, ...] = ()
    outputs: tuple[tuple[str, Source], ...] = ()
    count: int | None = None
    example: Path | Literal[False] | None = None


@dataclass(frozen=True, slots=True)
class Library:
    """The code of custom nodes: `base_path` as configured, which is relative to `directory` if it is a path."""

    name: str
    base_path: str
    directory: Path

    @property
    def path(self) -> Path:
        """The path of the code if it is a file."""
        return self.directory / self.base_path


# --- Reading


def read_pipeline(item: Mapping[str, Any], directory: Path = Path()) -> PipelineDefinition:
    """Read a pipeline whose form has been checked; its paths are relative to `directory`."""
    example = item.get("example", True)
    return PipelineDefinition(
        item["name"],
        tuple(item["inputs"]),
        tuple(map(_read_node, item["nodes"])),
        tuple(_read_connections(item["outputs"])),
        _read_count(item.get("demultiply_count")),
        directory / example if isinstance(example, str) else None if example else False,
    )


def _read_node(item: Mapping[str, Any]) -> NodeDefinition:
    is_model = item["type"] == MODEL
    return NodeDefinition(
        item["name"],
        item["model_name"] if is_model else "",
        item.get("version") if is_model else None,
        "" if is_model else item["library_name"],
        item.get("params", {}),
        tuple(_read_connections(item["inputs"])),
        tuple((output["alias"], output["data_item"]) for output in item["outputs"]),
        _read_count(item.get("demultiply_count")),
        item.get("gather_from_node"),
    )


def _read_connections(items: list[dict[str, dict[str, str]]]) -> Iterator[tuple[str, Source]]:
    for item in items:
        for tensor, source in item.items():
            yield tensor, Source(source["node_name"], source["data_item"])


def _read_count(value: int | None) -> int | None:
    """Read `demultiply_count`, in which 0 means -1 (deprecated in OVMS)."""
    return DYNAMIC if value == 0 else value


# --- Checking


def check_pipelines(items: Any) -> Iterator[Problem]:
    """Check the form of `pipeline_config_list`."""
    yield from _check_items(items, "pipeline_config_list", "name, inputs, nodes and outputs", _check_pipeline)
    yield from _check_names_differ(items, "pipeline_config_list")


def check_libraries(items: Any) -> Iterator[Problem]:
    """Check the form of `custom_node_library_config_list`."""
    yield from _check_items(items, "custom_node_library_config_list", "the keys 'name' and 'base_path'", _check_library)
    yield from _check_names_differ(items, "custom_node_library_config_list")


def _check_items(
    items: Any, place: str, keys: str, check: Callable[[dict[str, Any], str], Iterator[Problem]]
) -> Iterator[Problem]:
    """Check every object of an array; the check of the array's owner reports what is not an array."""
    for index, item in enumerate(items if type(items) is list else ()):
        if type(item) is dict:
            yield from check(item, f"{place}[{index}]")
        else:
            yield f"{place}[{index}]: expected an object with {keys}, got {as_json(item)}"


def _check_names_differ(items: Any, place: str) -> Iterator[Problem]:
    first_places: dict[str, str] = {}
    for index, item in enumerate(items if type(items) is list else ()):
        name = item.get("name") if type(item) is dict else None
        if type(name) is str and (first := first_places.setdefault(name, f"{place}[{index}]")) != f"{place}[{index}]":
            yield f"{place}[{index}].name: {quote(name)} is already the name of {first}"


def _check_pipeline(item: dict[str, Any], place: str) -> Iterator[Problem]:
    yield from check_keys(item, f"{place}.", _PIPELINE_KEYS, ("name", "inputs", "nodes", "outputs"))
    yield from _check_items(item.get("nodes"), f"{place}.nodes", "name, type, inputs and outputs", _check_node)
    yield from _check_connections(item.get("outputs"), f"{place}.outputs")


def _check_library(item: dict[str, Any], place: str) -> Iterator[Problem]:
    yield from check_keys(item, f"{place}.", _LIBRARY_KEYS, ("name", "base_path"))


def _check_node(item: dict[str, Any], place: str) -> Iterator[Problem]:
    needed = {MODEL: ("model_name",), CUSTOM: ("library_name",)}.get(str(item.get("type")), ())
    yield from check_keys(item, f"{place}.", _NODE_KEYS, ("name", "type", *needed, "inputs", "outputs"))
    yield from _check_connections(item.get("inputs"), f"{place}.inputs")
    yield from _check_items(item.get("outputs"), f"{place}.outputs", "data_item and alias", _check_output)


def _check_output(item: dict[str, Any], place: str) -> Iterator[Problem]:
    yield from check_keys(item, f"{place}.", _OUTPUT_KEYS, ("data_item", "alias"))


def _check_connections(items: Any, place: str) -> Iterator[Problem]:
    for index, item in enumerate(items if type(items) is list else ()):
        if type(item) is not dict or len(item) != 1:
            yield f"{place}[{index}]: expected an object with one key, the name of a tensor, got {as_json(item)}"
            continue
        ((tensor, source),) = item.items()
        label = f"{place}[{index}].{cut(tensor)}"
        if type(source) is dict:
            yield from check_keys(source, f"{label}.", _SOURCE_KEYS, ("node_name", "data_item"))
        else:
            yield f"{label}: expected an object with node_name and data_item, got {as_json(source)}"


def _check_count(value: Any) -> Problem | None:
    if type(value) is not int or not -1 <= value <= MAX_COUNT:
        return f"expected an integer from 1 to {MAX_COUNT}, or -1 for any count, got {as_json(value)}"
    return None


def _check_reference(value: Any) -> Problem | None:
    return None if type(value) is str and value else f"expected a non-empty string, got {as_json(value)}"


def _check_type(value: Any) -> Problem | None:
    return None if value in (MODEL, CUSTOM) else f"expected {MODEL!r} or {CUSTOM!r}, got {as_json(value)}"


def _check_version(value: Any) -> Problem | None:
    return None if type(value) is int and value >= 1 else f"expected an integer of at least 1, got {as_json(value)}"


def _check_names(value: Any) -> Problem | None:
    if type(value) is not list or not all(type(name) is str for name in value):
        return f"expected an array of strings, got {as_json(value)}"
    repeated = sorted({name for name in value if value.count(name) > 1})
    return f"expected unique names, got more than once {list_names(repeated)}" if repeated else None


def _check_params(value: Any) -> Problem | None:
    if type(value) is not dict:
        return f"expected an object, got {as_json(value)}"
    return check_values(value, lambda item: type(item) is str, "a string")


_TEXT = is_a("a string", str)
_ARRAY = is_a("an array", list)

_PIPELINE_KEYS: Mapping[str, Check] = {
    "name": check_name,
    "inputs": _check_names,
    "nodes": _ARRAY,
    "outputs": _ARRAY,
    "demultiply_count": _check_count,
    "example": fits(
        "the path of a file with a request, true or false", lambda value: type(value) is bool or is_text(value)
    ),
}
_NODE_KEYS: Mapping[str, Check] = {
    "name": _TEXT,
    "type": _check_type,
    "model_name": _check_reference,
    "version": _check_version,
    "library_name": _check_reference,
    "params": _check_params,
    "inputs": _ARRAY,
    "outputs": _ARRAY,
    "demultiply_count": _check_count,
    "gather_from_node": _TEXT,
}
_SOURCE_KEYS: Mapping[str, Check] = {"node_name": _TEXT, "data_item": _TEXT}
_OUTPUT_KEYS: Mapping[str, Check] = {"data_item": _TEXT, "alias": _TEXT}
_LIBRARY_KEYS: Mapping[str, Check] = {"name": _TEXT, "base_path": _TEXT}
