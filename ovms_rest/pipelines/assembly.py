"""From definitions to pipelines that serve: finds the models and code of their nodes and plans them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.log import log
from ovms_rest.models.copies import ChangingError
from ovms_rest.models.example_requests import find_example
from ovms_rest.models.images import ImageReader, ShardedImageReader, take_images
from ovms_rest.models.loading import LoadSettings
from ovms_rest.models.registry import Entry
from ovms_rest.models.servable import Servable
from ovms_rest.models.watching import Stamp, stamp
from ovms_rest.pipelines.definition import Library, NodeDefinition, PipelineDefinition
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.libraries import is_there, load_node
from ovms_rest.pipelines.plan import REQUEST_STEP, ModelPart, Part, Plan
from ovms_rest.pipelines.planning import Missing, PipelineError, plan_pipeline
from ovms_rest.protocol.words import list_names

VERSION = 1  # the only version of a pipeline


class _Source(NamedTuple):
    """The inputs of a pipeline's assembly; from equal ones it need not be assembled again."""

    definition: PipelineDefinition
    models: tuple[Servable | Missing | None, ...]  # of its nodes
    nodes: "Mapping[str, _Node]"


class _Node(NamedTuple):
    """A custom node, with the library, stamp and params that it was loaded from."""

    library: Library
    stamp: Stamp
    params: Mapping[str, str]
    node: Part | Missing
    is_changing: bool = False  # the file is being written, so the code could not be loaded


def assemble_pipelines(
    definitions: Sequence[PipelineDefinition],
    libraries: Mapping[str, Library],
    models: Mapping[str, Entry],
    previous: Mapping[str, Entry],
    settings: LoadSettings,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Entry]:
    """Assemble pipelines from models and libraries; the entries of others have all reasons.

    An unchanged pipeline of `previous` is reused. One whose new definition is wrong keeps serving with its previous one
    while its models serve. Once `stop` returns True, no more code is tried.

    Code that no pipeline uses is not loaded; the log has a warning if it does not exist.
    """
    used = {node.library for definition in definitions for node in definition.nodes}
    for name, library in libraries.items():
        if name not in used and not is_there(library):
            log.warning(
                "library %r, which no pipeline uses: there is no file %s, and %r is neither a Python module nor one "
                "of OVMS's libraries",
                name,
                library.path.absolute(),
                library.base_path,
            )
    return {
        definition.name: _assemble(
            definition, libraries, models, previous.get(definition.name, Entry()), settings, stop
        )
        for definition in definitions
    }


def _assemble(
    definition: PipelineDefinition,
    libraries: Mapping[str, Library],
    models: Mapping[str, Entry],
    previous: Entry,
    settings: LoadSettings,
    stop: Callable[[], bool],
) -> Entry:
    before: _Source | None = previous.sources.get(VERSION)
    nodes = {
        node.name: _load_node(node, libraries[node.library], before, settings, stop)
        for node in definition.nodes
        if node.library in libraries
    }
    parts = {
        node.name: _find_model(node, models) if node.model else _find_node(node, nodes) for node in definition.nodes
    }
    served = tuple(part if isinstance(part, Missing) else part.model for part in parts.values())
    source = _Source(definition, served, nodes)
    if before == source and _are_there(previous, models):
        return previous
    changing = any(node.is_changing for node in nodes.values())
    entry = Entry(sources={VERSION: source}, kind="pipeline", is_changing=changing)
    entry.example = find_example(f"pipeline {definition.name!r}", definition.example or None)
    try:
        plan = plan_pipeline(definition, parts, models.keys())
        pipeline = Pipeline(plan if definition.count is None else _split_images(plan))
        pipeline.is_rehearsed = definition.example is False
        entry.versions[VERSION] = pipeline
    except PipelineError as error:
        for problem in error.problems:
            log.error("pipeline %r does not serve: %s", definition.name, problem)
        if previous.kind == "pipeline" and previous.versions and _are_there(previous, models):
            log.warning("pipeline %r keeps serving with its previous definition", definition.name)
            entry.versions = previous.versions
            entry.failures[VERSION] = "; ".join(error.problems)
        else:
            entry.reason, entry.details = "; ".join(error.problems), error.problems
            missing = [(name, part) for name, part in parts.items() if isinstance(part, Missing) and part.is_unloaded]
            expected = {f"node {name!r}: {part.reason}" for name, part in missing}
            entry.lacks_unloaded = expected.issuperset(error.problems)
        return entry
    steps = ", ".join(node.name for node in definition.nodes)
    log.info("pipeline %r serves with the nodes %s", definition.name, steps)
    return entry


def _are_there(entry: Entry, models: Mapping[str, Entry]) -> bool:
    """Return whether the models of a pipeline still serve."""
    serving = [model for other in models.values() for model in other.versions.values()]
    return all(model in serving for pipeline in entry.versions.values() for model in pipeline.dependencies)


def _find_model(node: NodeDefinition, models: Mapping[str, Entry]) -> Part | Missing:
    entry = models.get(node.model)
    if entry is None:
        known = list_names(models) or "none"
        return Missing(f"model {node.model!r} is not configured; configured: {known}")
    if entry.ended:
        return Missing(f"model {node.model!r} was unloaded", is_unloaded=True)
    version = max(entry.versions, default=0) if node.version is None else node.version
    if version in entry.versions:
        return ModelPart(entry.versions[version])
    if node.version is None or not entry.versions:
        return Missing(f"model {node.model!r} does not serve: {entry.explain()}")
    served = ", ".join(map(str, sorted(entry.versions)))
    why = entry.failures.get(version, f"is not served; served: {served}")
    return Missing(f"version {version} of model {node.model!r} {why}")


def _find_node(node: NodeDefinition, nodes: Mapping[str, _Node]) -> Part | Missing:
    if node.name not in nodes:
        return Missing(f"library {node.library!r} is not in custom_node_library_config_list")
    return nodes[node.name].node


def _load_node(
    node: NodeDefinition, library: Library, before: _Source | None, settings: LoadSettings, stop: Callable[[], bool]
) -> _Node:
    """Load the code of a custom node, or reuse it if it has not changed since it was loaded."""
    now = stamp(library.path)
    known = before.nodes.get(node.name) if before else None
    if known is not None and known[:3] == (library, now, node.params) and not isinstance(known.node, Missing):
        return known
    try:
        loaded = load_node(library, node.params, settings.load_timeout, stop)
    except LoadError as error:
        changing = isinstance(error, ChangingError)
        return _Node(library, now, node.params, Missing(f"library {library.name!r}: {error}"), changing)
    # A custom node declares no layouts, so images keep their size.
    loaded.inputs = {name: take_images(tensor, None, settings.limits) for name, tensor in loaded.inputs.items()}
    return _Node(library, now, node.params, loaded)


def _split_images(plan: Plan) -> Plan:
    """Let each shard of a split request be an encoded image where the nodes take images."""
    readers = {
        wire.item: step.part.inputs[wire.tensor].images
        for step in plan.steps
        for wire in step.wires
        if wire.step == REQUEST_STEP and step.gathers != REQUEST_STEP  # a gathering step gets all shards
    }
    inputs = {
        name: replace(tensor, images=ShardedImageReader(reader))
        if isinstance(reader := readers.get(name), ImageReader)
        else tensor
        for name, tensor in plan.metadata.inputs.items()
    }
    return replace(plan, metadata=replace(plan.metadata, inputs=inputs))
