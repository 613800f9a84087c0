"""Checks whether a model can compute given shapes, by OpenVINO's shape inference on a copy without weights.

The CPU plugin (2026.4.1) has two faults that requests must not trigger.

- A failed inference leaves shapes in the compiled model, and the next request may be computed with them. Shapes that do
  not fit are therefore rejected before the plugin sees them.
- A node that gets a tensor without elements is skipped, and its outputs keep old values, possibly another client's.
  Some nodes handle this themselves (`_WRITTEN`); for the others the request is rejected. If only the inference shows
  whether a tensor is empty, as after a NonZero, `add_guard` has the model report it.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset15

from ovms_rest.models.reasons import find_reason

Shape = tuple[int, ...]

# Larger constants are weights, whose values do not affect shapes.
_LARGEST_CONSTANT = 4096

# Operations whose outputs are right when an input has no elements, measured with the CPU plugin: they are either
# computed, or without elements themselves. All others, including those of extensions, count as skipped.
_WRITTEN = frozenset(
    {
        # One output element for each input element, or for each pair that is broadcast: no elements, no output.
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceiling", "Clamp", "Convert", "ConvertLike"),
        *("Cos", "Cosh", "Elu", "Erf", "Exp", "FakeConvert", "FakeQuantize", "Floor", "Gelu", "HSigmoid", "HSwish"),
        *("HardSigmoid", "Identity", "IsFinite", "IsInf", "IsNaN", "Log", "LogicalNot", "Mish", "Negative", "PRelu"),
        *("Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "SoftPlus", "SoftSign", "Sqrt", "Swish", "Tan"),
        *("Tanh", "BitwiseNot", "Add", "BitwiseAnd", "BitwiseLeftShift", "BitwiseOr", "BitwiseRightShift"),
        *("BitwiseXor", "Divide", "Equal", "FloorMod", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd"),
        *("LogicalOr", "LogicalXor", "Maximum", "Minimum", "Mod", "Multiply", "NotEqual", "Power", "Select"),
        *("SquaredDifference", "Subtract"),
        # The same elements, or some of them, in another order or shape.
        *("Broadcast", "DepthToSpace", "Reshape", "Reverse", "ReverseSequence", "Roll", "ShuffleChannels", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "StridedSlice", "Tile", "Transpose", "Unsqueeze", "VariadicSplit"),
        # Along an axis, of the shape of the input.
        *("BatchNormInference", "CumSum", "GRN", "GroupNormalization", "LogSoftmax", "LRN", "MVN", "NormalizeL2"),
        *("RMS", "Softmax"),
        # Computed, each with a value of its own for an empty input.
        *("Bucketize", "Concat", "EmbeddingBagOffsets", "EmbeddingBagOffsetsSum", "EmbeddingBagPacked"),
        *("EmbeddingBagPackedSum", "EmbeddingSegmentsSum", "MatMul", "NonMaxSuppression", "NonZero", "OneHot", "Pad"),
        *("ReduceL1", "ReduceL2", "ReduceLogicalAnd", "ReduceLogicalOr", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSum", "ScatterElementsUpdate", "ScatterNDUpdate", "ScatterUpdate", "ShapeOf"),
        *("SliceScatter", "StringTensorPack", "StringTensorUnpack"),
        # Their bodies are checked instead.
        *("If", "Loop", "TensorIterator"),
        *("Assign", "Constant", "Parameter", "ReadValue", "Result"),
    }
)


class ShapeError(Exception):
    """The model cannot compute inputs of these shapes; the text is the reason."""


class _Suspect(NamedTuple):
    """An operation that the plugin skips when one of its `inputs` has no elements, given as outputs of other nodes."""

    node: Any
    inputs: tuple[Any, ...]

    def describe(self) -> str:
        return f"{self.node.get_type_name()} {self.node.get_friendly_name()!r} gets a tensor without elements"

    def has_output(self) -> bool:
        """Return whether an output has elements, or may have some."""
        return not all(_is_empty(output.get_partial_shape()) for output in self.node.outputs())

    def is_skipped(self) -> bool:
        """Return whether the known shapes leave outputs unwritten."""
        return any(_is_empty(source.get_partial_shape()) for source in self.inputs) and self.has_output()

    def may_be_skipped(self) -> bool:
        """Return whether the values of the inputs decide if outputs are left unwritten."""
        return any(_may_be_empty(source.get_partial_shape()) for source in self.inputs) and self.has_output()


class Guard(NamedTuple):
    """The meaning of a guarded model's additional output, an INT64 vector with the smallest dims of some tensors.

    `entries` has, for each operation, its description and the indices of its inputs and outputs in the vector.
    """

    entries: tuple[tuple[str, list[int], list[int]], ...]

    def check(self, sizes: NDArray[Any]) -> None:
        """Raise ShapeError if an operation was skipped."""
        if sizes.all():
            return
        for description, inputs, outputs in self.entries:
            if not sizes[inputs].all() and (not outputs or sizes[outputs].any()):
                raise ShapeError(description)


class ShapeChecker:
    """Checks shapes on a copy of a model, which needs little memory and leaves the compiled model alone."""

    def __init__(self, model: openvino.Model, inputs: Mapping[str, tuple[int, ...]]) -> None:
        """Copy the structure of a model that is read but not compiled.

        `inputs` has, for every input of a request, the indices of the model's parameters with its shape.
        """
        self._copy = model.clone()
        _settle(self._copy)
        self._suspects = [suspect for node in find_nodes(self._copy) if (suspect := _suspect(node))]
        self._inputs = inputs
        self._has_branches = any(node.get_type_name() == "If" for node in self._copy.get_ops())
        self._lock = threading.Lock()  # gunicorn's threads share the copy
        _drop_weights(self._copy)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise ShapeError unless the model can compute inputs of these shapes, given by name."""
        with self._lock:
            if not self._reshape(shapes):
                return
            for suspect in self._suspects:
                if suspect.is_skipped():
                    raise ShapeError(suspect.describe())

    def find_value_dependent(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Return the names of the operations that make shapes of values, for inputs of checked shapes."""
        with self._lock:
            self._reshape(shapes)
            return [
                node.get_friendly_name()
                for node in find_nodes(self._copy)
                if not any(source.get_partial_shape().is_dynamic for source in node.input_values())
                and any(output.get_partial_shape().is_dynamic for output in node.outputs())
            ]

    def _reshape(self, shapes: Mapping[str, Shape]) -> bool:
        """Propagate shapes through the copy; return False if only the inference shows whether they fit."""
        parameters = {
            index: openvino.PartialShape(list(shape)) for name, shape in shapes.items() for index in self._inputs[name]
        }
        try:
            self._copy.reshape(parameters)
        except RuntimeError as error:
            if self._has_branches:  # the shapes may not fit a branch that will not be taken
                return False
            raise ShapeError(find_reason(error)) from error
        return True

    def add_guard(self, model: openvino.Model, shapes: Mapping[str, Shape] | None) -> Guard | None:
        """Add an output to the original model that reports what `check` cannot know; return the guard that reads it.

        Returns None, and changes nothing, for a model in which shapes decide everything. `shapes` are some that the
        model can compute, None for the model's own.
        """
        if shapes is not None:
            self.check(shapes)
        entries: list[tuple[str, list[int], list[int]]] = []
        sizes: dict[int, tuple[int, Any]] = {}  # index and size by identity, as OpenVINO's == makes a node
        measures = _Measures()
        for copy, node in _pair(self._copy, model):
            for description, *groups in _find_doubts(copy, node, measures):
                inputs, outputs = (
                    [sizes.setdefault(id(size), (len(sizes), size))[0] for size in group] for group in groups
                )
                entries.append((description, inputs, outputs))
        if not entries:
            return None
        model.add_results([opset15.result(opset15.concat([size for _, size in sizes.values()], 0))])
        return Guard(tuple(entries))


def _suspect(node: Any) -> _Suspect | None:
    ports = _find_ports(node)
    return _Suspect(node, tuple(map(node.input_value, ports))) if ports else None


def _find_ports(node: Any) -> list[int]:
    """Return the inputs whose emptiness makes the plugin skip an operation."""
    if node.get_type_name() in _WRITTEN and node.get_type_info().version_id.startswith("opset"):
        return []
    ports = range(node.get_input_size())
    return [port for port in ports if node.input_value(port).get_node().get_type_name() != "Constant"]


def find_nodes(model: openvino.Model) -> Iterator[Any]:
    """Yield the nodes of a model, including those within its loops and branches."""
    for node in model.get_ordered_ops():
        yield node
        for body in _find_bodies(node):
            yield from find_nodes(body)


def _pair(copy: openvino.Model, model: openvino.Model) -> list[tuple[Any, Any]]:
    """Return pairs of a node in the copy and the node of the same kind and name in the model.

    If the copy has no such node (see `_settle`) or several, the model's node stands for it; its shapes are less exact.
    """
    nodes = model.get_ordered_ops()
    copies = {_identify(node): node for node in copy.get_ordered_ops()}
    counts = Counter(map(_identify, (*nodes, *copy.get_ordered_ops())))
    return [(copies.get(_identify(node), node) if counts[_identify(node)] == 2 else node, node) for node in nodes]


def _identify(node: Any) -> tuple[str, str]:
    return node.get_type_name(), node.get_friendly_name()


def _settle(model: openvino.Model) -> None:
    """Reshape a dynamic model once, at which OpenVINO replaces some of its nodes."""
    index = next((index for index, port in enumerate(model.inputs) if port.get_partial_shape().is_dynamic), None)
    if index is None:
        return
    shape = model.inputs[index].get_partial_shape()
    if shape.rank.is_dynamic:
        return
    with contextlib.suppress(RuntimeError):  # the model cannot take the shape, but its nodes are replaced by then
        model.reshape({index: openvino.PartialShape([1] * len(shape))})
    model.reshape({index: shape})


def _find_bodies(node: Any) -> list[Any]:
    kind = node.get_type_name()
    if kind == "If":
        return [node.get_function(0), node.get_function(1)]
    return [node.get_function()] if kind in ("Loop", "TensorIterator") else []


# --- The guard: INT64 vectors of one element that are 0 when a tensor has no elements


class _Measures:
    """The smallest dims of tensors, each computed once, since an output of one operation is an input of others."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Any] = {}

    def smallest_dim(self, tensor: Any) -> Any:
        """Return the smallest dim of a tensor as an INT64 vector of one element, a large number for a scalar."""
        place = tensor.get_node().get_name(), tensor.get_index()
        if place not in self._known:
            size, rank = opset15.shape_of(tensor), tensor.get_partial_shape().rank
            if rank.is_dynamic or rank.get_length() != 1:
                size = opset15.reduce_min(size, opset15.constant([0]), keep_dims=True)
            self._known[place] = size
        return self._known[place]


def _find_doubts(copy: Any, node: Any, measures: _Measures) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield what only the inference shows of a node: a description, sizes that must not be 0, and sizes of outputs.

    If one of the former is 0, outputs with elements were not written; without sizes of outputs, some output was not.
    `copy` is the node whose shapes are known.
    """
    suspect = _suspect(copy)
    if suspect and suspect.may_be_skipped():
        ports = [measures.smallest_dim(node.input_value(port)) for port in _find_ports(node)]
        yield suspect.describe(), ports, list(map(measures.smallest_dim, node.outputs()))
    kind, name = node.get_type_name(), node.get_friendly_name()
    if kind == "Loop" and (counts := _find_counts(node)):
        yield f"Loop {name!r} makes no iteration", counts, []
    bodies = list(zip(_find_bodies(copy), _find_bodies(node), strict=True))
    smallest = [_guard_body(*pair) for pair in bodies]
    if any(smallest):
        description = f"an operation within {kind} {name!r} gets a tensor without elements"
        yield description, [_bring_out(node, [body for _, body in bodies], smallest)], []


def _guard_body(copy: openvino.Model, body: openvino.Model) -> Any | None:
    """Return a size that is 0 if an operation within a loop or branch was skipped, None if none can be skipped."""
    measures = _Measures()
    doubts = [doubt for pair in _pair(copy, body) for doubt in _find_doubts(*pair, measures)]
    sizes = list({id(size): size for _, ports, _ in doubts for size in ports}.values())
    return opset15.reduce_min(opset15.concat(sizes, 0), opset15.constant([0]), keep_dims=True) if sizes else None


def _bring_out(node: Any, bodies: list[openvino.Model], smallest: list[Any | None]) -> Any:
    """Add an output with the smallest size within to a loop or a branch."""
    one = np.ones(1, np.int64)
    if node.get_type_name() == "If":
        results = [opset15.result(opset15.constant(one) if size is None else size) for size in smallest]
        for body, result in zip(bodies, results, strict=True):
            body.add_results([result])
        return node.set_output(*results)
    before = opset15.parameter([1], openvino.Type.i64)
    result = opset15.result(opset15.minimum(before, smallest[0]))
    bodies[0].add_parameters([before])
    bodies[0].add_results([result])
    node.set_merged_input(before, opset15.constant(one).output(0), result.input_value(0))
    return node.get_iter_value(result.output(0), -1)


def _find_counts(loop: Any) -> list[Any]:
    """Return values that are 0 when a loop makes no iteration, if its outputs are wrong in that case."""
    merged = {item.body_value_index for item in loop.get_input_descriptions() if hasattr(item, "body_value_index")}
    if all(
        type(item).__name__ == "BodyOutputDescription" and item.body_value_index in merged
        for item in loop.get_output_descriptions()
    ):
        return []
    sources = (loop.input_value(0), loop.input_value(1))
    return [_as_vector(source) for source in sources if not _is_true_constant(source.get_node())]


def _is_true_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" and bool(node.get_data().all())


def _drop_weights(model: openvino.Model) -> None:
    """Replace weights by parameters, so that the copy does not keep their memory.

    Those within loops and branches stay, because every parameter of a body must be connected.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_byte_size() > _LARGEST_CONSTANT:
            stand_in = opset15.parameter(node.get_output_partial_shape(0), node.get_output_element_type(0))
            node.output(0).replace(stand_in.output(0))
            model.add_parameters([stand_in])


def _is_empty(shape: openvino.PartialShape) -> bool:
    return not shape.rank.is_dynamic and any(dim.is_static and dim.get_length() == 0 for dim in shape)


def _may_be_empty(shape: openvino.PartialShape) -> bool:
    return shape.rank.is_dynamic or any(dim.get_min_length() == 0 for dim in shape)


def _as_vector(value: Any) -> Any:
    return opset15.reshape(opset15.convert(value, "i64"), opset15.constant([1]), special_zero=False)
