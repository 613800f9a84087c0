"""From the definition of a pipeline to its plan, or to a list of all problems.

The rules are OVMS's, which logs the first problem only. Each problem is reported once, at its cause: a missing source
causes no further lines about shapes. The lines do not repeat the pipeline's name.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ovms_rest.log import log
from ovms_rest.pipelines.definition import DYNAMIC, REQUEST, RESPONSE, NodeDefinition, PipelineDefinition, Source
from ovms_rest.pipelines.plan import REQUEST_STEP, Output, Part, Plan, Step, Wire
from ovms_rest.protocol.tensors import Dim, ImageDecoder, ModelMetadata, TensorMetadata


class Missing(NamedTuple):
    """The reason why a node has nothing to run."""

    reason: str
    is_unloaded: bool = False  # a model that was unloaded on purpose


Dims = tuple[Dim, ...]
_Value = TypeVar("_Value")

_ANY = Dim(0, None)
# Outputs of a demultiplexer that go to other nodes need at least this many dims, as in OVMS.
_MIN_RANK = 3


class PipelineError(Exception):
    """A pipeline that cannot be served; `problems` has a line for each fault, without the pipeline's name."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def plan_pipeline(definition: PipelineDefinition, parts: Mapping[str, Part | Missing], taken: Collection[str]) -> Plan:
    """Check a pipeline and order its nodes; `parts` is by node, `taken` are the names of models.

    Logs a warning for everything that can fail for some requests only. Raises PipelineError.
    """
    draft = _Draft(definition, parts)
    draft.check_names(taken)
    draft.check_parts()
    draft.check_demultiplexers()
    draft.find_links()
    draft.check_inputs()
    draft.sort_nodes()
    draft.find_levels()
    draft.check_use()
    draft.find_sessions()
    draft.check_links()
    draft.check_outputs()
    metadata = draft.describe()
    if draft.problems:
        raise PipelineError(draft.problems)
    for warning in draft.warnings:
        log.warning("pipeline %r: %s", definition.name, warning)
    return draft.plan(metadata)


class _Link(NamedTuple):
    """A connection with both ends: an input of a node or output of the pipeline, and its source."""

    tensor: str
    node: str  # REQUEST, or the name of a node
    item: str  # an output of that node, not its alias, or an input of the pipeline


class _Draft:
    """A pipeline while it is checked; each check uses the results of the earlier ones."""

    def __init__(self, definition: PipelineDefinition, parts: Mapping[str, Part | Missing]) -> None:
        """Look up the nodes; the first one counts where several have the same name."""
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.definition = definition
        named = ((node.name, node) for node in definition.nodes if node.name not in (REQUEST, RESPONSE))
        self.nodes = _keep_first(named)
        found = {name: parts[name] for name in self.nodes}
        self.missing = {name: part.reason for name, part in found.items() if isinstance(part, Missing)}
        self.parts = {name: part for name, part in found.items() if not isinstance(part, Missing)}
        # By demultiplexer, the pipeline itself (REQUEST) included.
        counts = {REQUEST: definition.count, **{name: node.count for name, node in self.nodes.items()}}
        self.counts = {name: count for name, count in counts.items() if count is not None}
        # By node; those of the pipeline's outputs by RESPONSE.
        self.links: dict[str, list[_Link]] = {}
        # Whether the source of a connection is unknown, so that checks of unused nodes and inputs would mislead.
        self.lost_node = self.lost_input = False
        # In the order in which they run, without those in and after a cycle.
        self.order: list[str] = []
        # The demultiplexers that are open where a node runs; missing after a problem.
        self.levels: dict[str, tuple[str, ...]] = {REQUEST: ()}
        # The nodes whose gather_from_node is wrong.
        self.unclear: set[str] = set()
        # The number of sessions that a demultiplexer can make.
        self.sessions: dict[str, Dim] = {}
        # Outputs of demultiplexers that cannot be split.
        self.unsplit: set[tuple[str, str]] = set()

    # --- Names

    def check_names(self, taken: Collection[str]) -> None:
        if self.definition.name in taken:
            self.problems.append("a model has the same name; rename one of them")
        if not self.definition.nodes:
            self.problems.append("it has no nodes; a pipeline needs at least one")
        if not self.definition.outputs:
            self.problems.append("it has no outputs; a pipeline needs at least one")
        for name in _find_repeated(node.name for node in self.definition.nodes):
            self.problems.append(f"node {name!r}: the name is not unique; rename the others")
        for name, meaning in ((REQUEST, "beginning"), (RESPONSE, "end")):
            if any(node.name == name for node in self.definition.nodes):
                self.problems.append(
                    f"node {name!r}: the name is reserved for the {meaning} of the pipeline; rename the node"
                )
        for name, node in self.nodes.items():
            for alias in _find_repeated(alias for alias, _ in node.outputs):
                self.problems.append(f"node {name!r}: the alias {alias!r} is not unique; rename the others")
        for name in _find_repeated(name for name, _ in self.definition.outputs):
            self.problems.append(f"output {name!r}: the name is not unique; rename the others")

    def check_parts(self) -> None:
        self.problems.extend(f"node {name!r}: {reason}" for name, reason in self.missing.items())

    # --- Connections

    def check_demultiplexers(self) -> None:
        """Check that a dynamic demultiplexer is the only one and that gather_from_node names a demultiplexer."""
        dynamic = [name for name, count in self.counts.items() if count == DYNAMIC]
        if dynamic and len(self.counts) > 1:
            self.problems.append(
                f"it has the demultiplexers {_join(self.counts)}, but the dynamic demultiply_count of "
                f"{_join(dynamic)} is allowed only without other demultiplexers; give each a count of at least 1"
            )
        for name, node in self.nodes.items():
            if node.gather_from is None or node.gather_from in self.counts:
                continue
            self.unclear.add(name)
            owner = "the pipeline" if node.gather_from == REQUEST else f"node {node.gather_from!r}"
            exists = node.gather_from in self.nodes or node.gather_from == REQUEST
            fault = f"{owner} has no demultiply_count" if exists else "there is no such node"
            known = f"the demultiplexers are {_join(self.counts)}" if self.counts else "there are no demultiplexers"
            self.problems.append(f"node {name!r}: gather_from_node is {node.gather_from!r}, but {fault}; {known}")

    def find_links(self) -> None:
        """Find the source of each input of a node and output of the pipeline."""
        aliases = {name: _keep_first(node.outputs) for name, node in self.nodes.items()}
        wrong: set[tuple[str, str]] = set()
        for reader, connections in self._connections():
            self.links[reader] = []
            for tensor, source in _keep_first(connections).items():
                label = _label(reader, tensor)
                if (fault := self._find_fault(source, aliases)) is not None:
                    self.problems.append(f"{label}: {fault}")
                elif source.node == REQUEST:
                    self.links[reader].append(_Link(tensor, REQUEST, source.item))
                elif self._gives(source.node, item := aliases[source.node][source.item]):
                    self.links[reader].append(_Link(tensor, source.node, item))
                else:
                    wrong.add((source.node, source.item))
        for name, items in aliases.items():
            for alias, item in items.items():
                if self._gives(name, item):
                    continue
                fault = (
                    f"node {name!r} alias {alias!r}: {_name_part(self.nodes[name])} has no output {item!r}; "
                    f"{_list('output', self.parts[name].outputs)}"
                )
                (self.problems if (name, alias) in wrong else self.warnings).append(fault)

    def _connections(self) -> Iterator[tuple[str, Sequence[tuple[str, Source]]]]:
        for name, node in self.nodes.items():
            yield name, node.inputs
        yield RESPONSE, self.definition.outputs

    def _find_fault(self, source: Source, aliases: Mapping[str, Mapping[str, str]]) -> str | None:
        if source.node == REQUEST:
            if source.item in self.definition.inputs:
                return None
            self.lost_input = True
            return f"the pipeline has no input {source.item!r}; {_list('input', self.definition.inputs)}"
        if source.node not in self.nodes:
            self.lost_node = True
            known = f"the nodes are {_join([REQUEST, *self.nodes])}"
            if source.node == RESPONSE:
                return f"{RESPONSE!r} is the end of the pipeline and has no outputs; {known}"
            return f"there is no node {source.node!r}; {known}"
        if source.item not in aliases[source.node]:
            known = _list("alias", aliases[source.node])
            return f"node {source.node!r} has no output with the alias {source.item!r}; {known}"
        return None

    def _gives(self, name: str, item: str) -> bool:
        return name not in self.parts or item in self.parts[name].outputs

    def check_inputs(self) -> None:
        """Check that each input of a part is connected exactly once, and that no others are connected."""
        for name, node in self.nodes.items():
            connected = [tensor for tensor, _ in node.inputs]
            for tensor in _find_repeated(connected):
                sources = [f"{source.item!r} of {source.node!r}" for other, source in node.inputs if other == tensor]
                self.problems.append(
                    f"node {name!r} input {tensor!r}: is connected more than once, to {', '.join(sources)}; keep one"
                )
            if name not in self.parts:
                continue
            inputs, part = self.parts[name].inputs, _name_part(node)
            if not inputs:
                self.problems.append(f"node {name!r}: {part} has no inputs, so nothing would start it")
            for tensor in dict.fromkeys(connected):
                if tensor not in inputs:
                    self.problems.append(
                        f"node {name!r} input {tensor!r}: {part} has no such input; {_list('input', inputs)}"
                    )
            for tensor in inputs:
                if tensor not in connected:
                    self.problems.append(
                        f"node {name!r}: input {tensor!r} of {part} is not connected; "
                        f'add {{"{tensor}": {{"node_name": ..., "data_item": ...}}}} to its inputs'
                    )

    # --- Order and levels

    def _sources(self, name: str) -> list[tuple[str, str]]:
        """Return the connected tensors of a node or the response with their nodes, faulty ones included."""
        connections = self.definition.outputs if name == RESPONSE else self.nodes[name].inputs
        return [(tensor, at.node) for tensor, at in connections if at.node == REQUEST or at.node in self.nodes]

    def sort_nodes(self) -> None:
        """Order the nodes: each after its sources, otherwise as in the file."""
        unsorted = {name: {node for _, node in self._sources(name)} - {REQUEST} for name in self.nodes}
        while ready := next(
            (name for name, others in unsorted.items() if not any(other in unsorted for other in others)), None
        ):
            self.order.append(ready)
            del unsorted[ready]
        if not unsorted:
            return
        # Each node that is left depends on another one that is left: following these leads into a cycle.
        path = [next(iter(unsorted))]
        while path[-1] not in path[:-1]:
            path.append(next(node for _, node in self._sources(path[-1]) if node in unsorted))
        cycle = [*reversed(path[path.index(path[-1]) :])]
        self.problems.append(f"the nodes {' -> '.join(map(repr, cycle))} form a cycle; none of them could start")

    def _leave(self, name: str) -> tuple[str, ...]:
        """Return the demultiplexers that are open after a node."""
        return self.levels[name] + ((name,) if name in self.counts else ())

    def find_levels(self) -> None:
        """Find the level of each node, and check that it gathers from the innermost demultiplexer."""
        for name in self.order:
            sources = self._sources(name)
            if name in self.unclear or any(node not in self.levels for _, node in sources):
                continue
            level = self._leave(sources[0][1]) if sources else ()
            problem = self._find_mixture(sources) or _find_disorder(self.nodes[name].gather_from, level)
            if problem:
                self.unclear.add(name)
                self.problems.append(f"node {name!r}: {problem}")
            else:
                self.levels[name] = level if self.nodes[name].gather_from is None else level[:-1]

    def _find_mixture(self, sources: Sequence[tuple[str, str]]) -> str | None:
        for tensor, node in sources[1:]:
            if (one := self._leave(sources[0][1])) != (other := self._leave(node)):
                return (
                    f"input {sources[0][0]!r} comes from {_name_level(one)}, input {tensor!r} from "
                    f"{_name_level(other)}; all inputs of a node must come from the same sessions"
                )
        return None

    def check_use(self) -> None:
        """Check that every node reaches the response and that every input of the pipeline is used."""
        if self.lost_node or not self.definition.outputs:
            return
        reached, pending = {REQUEST}, [RESPONSE]
        while pending:
            new = [node for _, node in self._sources(pending.pop()) if node not in reached]
            reached.update(new)
            pending.extend(new)
        for name in self.order:
            if name not in reached:
                self.problems.append(f"node {name!r}: none of its outputs reaches the response; connect or remove it")
        connections = [(reader, at) for reader, pairs in self._connections() for _, at in pairs]
        for item in () if self.lost_input else dict.fromkeys(self.definition.inputs):
            readers = {reader for reader, at in connections if at == Source(REQUEST, item)}
            if not readers:
                self.problems.append(f"input {item!r}: no node uses it; connect or remove it")
            elif readers == {RESPONSE}:
                self.problems.append(
                    f"input {item!r}: only the response uses it, so its datatype and shape are unknown; "
                    "connect it to a node as well, or remove it"
                )

    # --- Datatypes and shapes

    def find_sessions(self) -> None:
        """Find how many sessions each demultiplexer makes, and check that its outputs can be split into shards."""
        self.sessions = {name: _ANY if count == DYNAMIC else Dim(count, count) for name, count in self.counts.items()}
        for name in (name for name in self.parts if name in self.counts):
            for tensor in self.parts[name].inputs.values():
                if tensor.datatype == "BYTES":
                    self.problems.append(
                        f"node {name!r} input {tensor.name!r}: has strings (BYTES), which a demultiplexer cannot take"
                    )
            for item in self._find_used(name):
                if problem := self._split(name, item):
                    self.unsplit.add((name, item))
                    self.problems.append(f"node {name!r} output {item!r}: {problem}")

    def _find_used(self, name: str) -> list[str]:
        """Return the outputs of a node that others or the response use, in the order of its declaration."""
        taken = {link.item for link in itertools.chain(*self.links.values()) if link.node == name}
        return [item for item in self.parts[name].outputs if item in taken]

    def _split(self, name: str, item: str) -> str | None:
        """Note how many sessions an output is split into, or return why it cannot be split."""
        output, count = self.parts[name].outputs[item], self.counts[name]
        if self._gives_strings(name, item):
            return f"has strings ({output.datatype}), which cannot be demultiplied"
        if output.dims is None:
            return None
        to_nodes = any(link[1:] == (name, item) for reader in self.nodes for link in self.links[reader])
        least = _MIN_RANK if to_nodes else 1
        shape = output.describe_shape()
        if len(output.dims) < least:
            return (
                f"its shape is {shape}; demultiplying it{' for other nodes' if to_nodes else ''} "
                f"needs at least {least} dim{'s' if least > 1 else ''}"
            )
        first, sessions = output.dims[0], self.sessions[name]
        if (both := _meet(first, sessions)) is None:
            return (
                f"its shape is {shape}; its first dim must be {sessions}, "
                f"{'as for the other outputs' if count == DYNAMIC else 'the demultiply_count of its node'}"
            )
        if count != DYNAMIC and first.size is None:
            self.warnings.append(
                f"node {name!r} output {item!r}: its shape is {shape}; requests for which its first dim is not "
                f"{count}, the demultiply_count of its node, will fail"
            )
        self.sessions[name] = both
        return None

    def check_links(self) -> None:
        """Check that datatypes and shapes fit between nodes."""
        for name in self.parts:
            for link in self.links[name]:
                expected = self.parts[name].inputs.get(link.tensor)
                given = self._find_output(link)
                if expected is None or given is None or (link.node, link.item) in self.unsplit:
                    continue
                if problem := self._compare(name, link, expected, given):
                    self.problems.append(f"node {name!r} input {link.tensor!r}: {problem}")

    def _find_output(self, link: _Link) -> TensorMetadata | None:
        """Return the output that a link begins at, None for an input of the pipeline or if it is unknown."""
        return self.parts[link.node].outputs[link.item] if link.node in self.parts else None

    def _compare(self, name: str, link: _Link, expected: TensorMetadata, given: TensorMetadata) -> str | None:
        source = f"node {link.node!r} output {link.item!r}"
        if expected.datatype != given.datatype:
            return (
                f"its datatype is {expected.datatype}, but {source} gives {given.datatype}; "
                "nothing is converted between nodes"
            )
        if self._gives_strings(link.node, link.item):
            if given.datatype != "BYTES":
                return f"{source} gives strings ({given.datatype}), which can only go to the response"
            if self.nodes[name].gather_from is not None:
                return f"{source} gives strings ({given.datatype}), which cannot be gathered"
        if name in self.unclear or given.dims is None or expected.dims is None:
            return None
        dims, gathered = given.dims, self.nodes[name].gather_from
        note = ""
        if link.node != gathered:
            if link.node in self.counts:
                dims, note = dims[1:], " to each session"
            if gathered is not None:
                dims, note = (self.sessions[gathered], *dims), f" when gathered from {gathered!r}"
        if _meet_all(expected.dims, dims) is not None:
            return None
        return (
            f"its shape is {expected.describe_shape()}, but {source} gives {_describe(dims)}{note}; change the shape "
            "or layout of one in its model's config, or put a custom node between them"
        )

    def _gives_strings(self, name: str, item: str) -> bool:
        """Return whether an output has strings: BYTES, or a UINT8 matrix of a model named `*_string`."""
        output = self.parts[name].outputs[item]
        is_matrix = output.datatype == "UINT8" and (output.dims is None or len(output.dims) == 2)
        return output.datatype == "BYTES" or (
            self.parts[name].model is not None and is_matrix and output.name.lower().endswith("_string")
        )

    def check_outputs(self) -> None:
        """Check that the response gathers no strings."""
        for link in self.links[RESPONSE]:
            given = self._find_output(link)
            if given is None or given.datatype != "BYTES" or (link.node, link.item) in self.unsplit:
                continue
            if level := self.levels.get(link.node):
                self.problems.append(
                    f"output {link.tensor!r}: node {link.node!r} output {link.item!r} has strings (BYTES), which "
                    f"cannot be gathered; it comes from {_name_level(level)}"
                )

    # --- Metadata

    def describe(self) -> ModelMetadata:
        """Describe the pipeline's inputs and outputs; meaningful only without problems."""
        inputs = {name: self._describe_input(name) for name in sorted(set(self.definition.inputs))}
        outputs = {}
        for name, node, item in sorted(self.links[RESPONSE]):
            if node == REQUEST:
                outputs[name] = dataclasses.replace(inputs[item], name=name, images=None)
            elif node in self.parts:
                output = self.parts[node].outputs[item]
                ahead = tuple(self.sessions[other] for other in self.levels.get(node, ()))
                dims = None if output.dims is None else ahead + output.dims
                outputs[name] = TensorMetadata(name, output.datatype, dims)
        return ModelMetadata(self.definition.name, "1", inputs, outputs)

    def _describe_input(self, name: str) -> TensorMetadata:
        """Describe an input of the pipeline as all nodes that use it allow."""
        readers = [
            (reader, tensor)
            for reader in self.parts
            for link in self.links[reader]
            if link[1:] == (REQUEST, name) and (tensor := self.parts[reader].inputs.get(link.tensor))
        ]
        for number, (reader, tensor) in enumerate(readers):
            for other, before in readers[:number]:
                if tensor.datatype != before.datatype or not self._overlap(other, before, reader, tensor):
                    self.problems.append(
                        f"input {name!r}: {_name_input(other, before)}, {_name_input(reader, tensor)}; "
                        "one tensor must fit both"
                    )
                    break
        for reader, tensor in readers:
            if not self._gathers_request(reader) or tensor.dims is None:
                continue
            if not tensor.dims or _meet(self.sessions[REQUEST], tensor.dims[0]) is None:
                self.problems.append(
                    f"node {reader!r} input {tensor.name!r}: its shape is {tensor.describe_shape()}; its first dim "
                    f"must be {self.sessions[REQUEST]}, the demultiply_count of the pipeline"
                )
        if REQUEST in self.counts and any(tensor.datatype == "BYTES" for _, tensor in readers):
            self.problems.append(
                f"input {name!r}: has strings (BYTES), which cannot be demultiplied; "
                "remove the demultiply_count of the pipeline"
            )
        dims = functools.reduce(_meet_known, (self._whole(reader, tensor) for reader, tensor in readers), None)
        datatype = readers[0][1].datatype if readers else ""
        return TensorMetadata(name, datatype, dims, self._find_images([tensor for _, tensor in readers]))

    def _gathers_request(self, reader: str) -> bool:
        return REQUEST in self.counts and self.nodes[reader].gather_from == REQUEST

    def _whole(self, reader: str, tensor: TensorMetadata) -> Dims | None:
        """Return the dims of the request's tensor for an input of a node, None if they are unknown."""
        if REQUEST not in self.counts or tensor.dims is None or self._gathers_request(reader):
            return tensor.dims
        return (self.sessions[REQUEST], *tensor.dims)

    def _overlap(self, one: str, tensor: TensorMetadata, other: str, another: TensorMetadata) -> bool:
        dims, more = self._whole(one, tensor), self._whole(other, another)
        return dims is None or more is None or _meet_all(dims, more) is not None

    def _find_images(self, tensors: Sequence[TensorMetadata]) -> ImageDecoder | None:
        """Return the image decoder of the first node that has one, if all nodes take the same shape."""
        if REQUEST in self.counts or len({tensor.dims for tensor in tensors}) != 1:
            return None
        return next((tensor.images for tensor in tensors if tensor.images is not None), None)

    # --- The plan

    def plan(self, metadata: ModelMetadata) -> Plan:
        """Return the plan of a pipeline without problems."""
        places = {REQUEST: REQUEST_STEP} | {name: place for place, name in enumerate(self.order)}
        steps = [
            Step(
                name,
                self.parts[name],
                tuple(Wire(tensor, places[source], item) for tensor, source, item in self.links[name]),
                tuple(places[other] for other in self.levels[name]),
                node.count,
                None if node.gather_from is None else places[node.gather_from],
                tuple(self._find_used(name)),
            )
            for name, node in ((name, self.nodes[name]) for name in self.order)
        ]
        outputs = tuple(Output(name, places[node], item) for name, node, item in sorted(self.links[RESPONSE]))
        return Plan(metadata, tuple(steps), outputs, self.definition.count)


# --- Dims


def _meet(one: Dim, other: Dim) -> Dim | None:
    """Return the sizes that both allow, None if there are none."""
    low = max(one.low, other.low)
    highs = [dim.high for dim in (one, other) if dim.high is not None]
    high = min(highs) if highs else None
    return None if high is not None and high < low else Dim(low, high)


def _meet_all(one: Dims, other: Dims) -> Dims | None:
    """Return the shapes that both allow, None if there are none."""
    if len(one) != len(other):
        return None
    both = tuple(dim for pair in zip(one, other, strict=True) if (dim := _meet(*pair)) is not None)
    return both if len(both) == len(one) else None


def _meet_known(one: Dims | None, other: Dims | None) -> Dims | None:
    """Return the shapes that both allow; None for one that is unknown."""
    return other if one is None else one if other is None else _meet_all(one, other)


# --- Nodes


def _find_disorder(gathered: str | None, level: tuple[str, ...]) -> str | None:
    """Return why a node cannot gather from a demultiplexer when its inputs come from that level."""
    if gathered is None or level[-1:] == (gathered,):
        return None
    if gathered in level:
        last = level[-1]
        return f"gather_from_node is {gathered!r}, but {last!r} demultiplies after it; gather from {last!r} first"
    return f"gather_from_node is {gathered!r}, but its inputs come from {_name_level(level)}"


def _keep_first(pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    """Make a mapping in which the first of repeated keys counts."""
    mapping: dict[str, _Value] = {}
    for key, value in pairs:
        mapping.setdefault(key, value)
    return mapping


# --- Words


def _find_repeated(names: Iterable[str]) -> list[str]:
    return [name for name, number in collections.Counter(names).items() if number > 1]


def _join(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _list(kind: str, names: Collection[str]) -> str:
    """List names, as in "its inputs are 'a', 'b'"."""
    plural = {"alias": "aliases"}.get(kind, f"{kind}s")
    return f"its {plural} are {_join(names)}" if names else f"it has no {plural}"


def _label(reader: str, tensor: str) -> str:
    return f"output {tensor!r}" if reader == RESPONSE else f"node {reader!r} input {tensor!r}"


def _name_part(node: NodeDefinition) -> str:
    return f"model {node.model!r}" if node.model else f"library {node.library!r}"


def _name_level(level: tuple[str, ...]) -> str:
    return f"the sessions of {_join(level)}" if level else "no demultiplexer"


def _name_input(node: str, tensor: TensorMetadata) -> str:
    return f"node {node!r} input {tensor.name!r} takes {tensor.datatype} {tensor.describe_shape()}"


def _describe(dims: Dims) -> str:
    return f"[{','.join(map(str, dims))}]"
