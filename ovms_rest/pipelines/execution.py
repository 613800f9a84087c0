"""Running a pipeline: step by step, in the thread of the request.

The *value* of an output is a list of one array per session of its step, or one stacked array if it is gathered.
Values have numbered positions. How each leaves a step and enters others, and which ones must be copied, is decided
when the pipeline is made.

A model overwrites its outputs when it infers again. A value that is still needed then, by the response at the latest,
is copied as soon as it exists, stacked or one by one.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InferenceError, InvalidRequestError, NoContentError, ServingError
from ovms_rest.models.servable import NOT_COUNTED, InferenceCounters, Servable
from ovms_rest.pipelines.definition import DYNAMIC, MAX_COUNT
from ovms_rest.pipelines.plan import REQUEST_STEP, Output, Plan, Step, Wire
from ovms_rest.protocol.datatypes import BYTES, UINT8
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array, Dim, Tensor, TensorMetadata, copy_array, memory_of
from ovms_rest.protocol.words import join
from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.context import within_child
from ovms_rest.tracing.spans import FIRST_NODE, NodeTimes

Value = Any  # list[Array] | NDArray[Any]
# The number of shards of each demultiplexer in this request, by its step.
Counts = dict[int, int]
# The inputs of a session by name; each is an Array of the kind that planning has checked.
Arrays = dict[str, Any]
# The step and tensor of a value.
_Key = tuple[int, str]

# The limit of all arrays of a value: a request of a few kilobytes can have 10,000 shards.
MAX_VALUE_BYTES = 2**31


class Pipeline:
    """A plan that can be run: a Servable, as a model is."""

    def __init__(self, plan: Plan) -> None:
        """Decide how values pass through the steps; the models need not be open yet."""
        self.plan = plan
        self.metadata = plan.metadata
        self.counters: InferenceCounters = NOT_COUNTED
        self.example: Mapping[str, Array] | None = None  # found by a rehearsal (`pipelines.rehearsal`)
        self.is_rehearsed = False
        models = [model for step in plan.steps if (model := step.part.model) is not None]
        self.dependencies: tuple[Servable, ...] = tuple(dict.fromkeys(models))
        self.batch_limit = max((model.batch_limit for model in models), default=0)
        keys: list[_Key] = [(REQUEST_STEP, name) for name in plan.metadata.inputs]
        self._inputs = list(enumerate(plan.metadata.inputs))
        keys += [(index, item) for index, step in enumerate(plan.steps) for item in step.used]
        slots = {key: slot for slot, key in enumerate(keys)}
        self._no_values = [None] * len(slots)
        faults = _find_faults(plan.steps)
        self._stages = [_Stage(plan, index, slots, faults) for index in range(len(plan.steps))]
        self._results = [_Result(plan, output, slots) for output in plan.outputs]

    def open(self, retire: Callable[[], None]) -> None:
        """Prepare its custom nodes in this process. Raises LoadError.

        Its models are opened and retired as servables of their own, so `retire` is not called.
        """
        for step in self.plan.steps:
            step.part.open()

    def infer(self, arrays: Mapping[str, Array], record: InferenceRecord | None = None) -> dict[str, Tensor]:
        """Infer with an array for every input; return a tensor for every output, by name.

        The arrays are as for Model.infer. The tensors may be views of them, or of memory that the next inference of
        one of its models overwrites. Raises InferenceError, NoContentError if a demultiplexer makes no shards, and
        InvalidRequestError for inputs that the pipeline's own demultiplexer cannot split, or from which its models
        make shapes that do not fit each other.
        """
        values: list[Value] = self._no_values.copy()
        for slot, name in self._inputs:
            values[slot] = [arrays[name]]
        counts: Counts = {}
        if self.plan.count is not None:
            named = [(f"input {name!r}", values[slot]) for slot, name in self._inputs]
            counts[REQUEST_STEP] = _count(named, self.plan.count, InvalidRequestError)
        if record is None or record.nodes is None:
            for stage in self._stages:
                stage.run(values, counts)
        else:
            self._run_recorded(values, counts, record.nodes)
        return {result.name: result.make(values, counts) for result in self._results}

    def _run_recorded(self, values: list[Value], counts: Counts, nodes: list[NodeTimes]) -> None:
        """Run the stages of a request that is recorded, and note the times of each."""
        for number, stage in enumerate(self._stages, FIRST_NODE):
            began, failed = time.monotonic_ns(), True
            try:
                with within_child(number):
                    stage.run(values, counts)
                failed = False
            finally:
                nodes.append(NodeTimes(*stage.about, began, time.monotonic_ns(), stage.count_sessions(counts), failed))


class _Stage:
    """A step prepared to run: from values to values."""

    def __init__(self, plan: Plan, index: int, slots: Mapping[_Key, int], faults: Sequence[type[ServingError]]) -> None:
        step = plan.steps[index]
        label = f"pipeline {plan.metadata.name!r} node {step.name!r}"
        self._label = label
        model = step.part.model
        # For traces: the names of the node, of its model and of that one's version.
        self.about = (step.name, *(("", "") if model is None else (model.metadata.name, model.metadata.version)))
        self._index = index
        self._level = step.level
        self._count = step.count
        self._fault = faults[index]
        self._feeds = [
            _Feed(
                plan, step, wire, slots[wire.step, wire.item], label,
                InvalidRequestError if wire.step == REQUEST_STEP else faults[wire.step],
            )
            for wire in step.wires
        ]  # fmt: skip
        self._keeps = [
            (slots[index, item], item, f"{label} output {item!r}", _choose_keep(plan, (index, item), self._fault))
            for item in step.used
        ]
        self._call = step.part.execute
        # An InvalidRequestError of custom code reaches the client as it is, without a label.
        self._labeled = (InferenceError,) if step.part.model is None else (InferenceError, InvalidRequestError)
        # The values last used here, except the request's, whose memory the caller holds.
        self._free = [slot for key, slot in slots.items() if key[0] != REQUEST_STEP and _last_use(plan, key) == index]

    def count_sessions(self, counts: Counts) -> int:
        """Return how often it runs for the request."""
        return prod([counts[step] for step in self._level]) if self._level else 1

    def run(self, values: list[Value], counts: Counts) -> None:
        """Run all sessions. Raises InferenceError, InvalidRequestError and NoContentError."""
        sessions = self.count_sessions(counts)
        columns = [(feed.tensor, feed.read(values, counts)) for feed in self._feeds]
        for session in range(sessions):
            arrays = {tensor: column[session] for tensor, column in columns}
            try:
                results = self._call(arrays)
            except self._labeled as error:
                raise type(error)(f"{self._label}: {error}") from error
            for slot, item, label, keep in self._keeps:
                values[slot] = keep(values[slot], results[item], arrays, session, sessions, label)
        if self._count is not None:
            named = [(label, values[slot]) for slot, _, label, _ in self._keeps]
            counts[self._index] = _count(named, self._count, self._fault)
        for slot in self._free:
            values[slot] = None


def _count(named: Iterable[tuple[str, Value]], expected: int, fault: type[ServingError]) -> int:
    """Return the number of shards, which must be the same for all values.

    Raises NoContentError for 0 shards, and `fault` if the values cannot be split.
    """
    count, reason = expected, f"demultiply_count is {expected}"
    for label, value in named:
        for array in value:
            if not array.shape:
                raise fault(f"{label}: a tensor without dims cannot be split")
            size = array.shape[0]
            if count == DYNAMIC:
                if size == 0:
                    raise NoContentError(f"{label}: its first dim is 0, so there are no shards")
                if size > MAX_COUNT:
                    raise fault(f"{label}: its first dim is {size}; a demultiplexer makes at most {MAX_COUNT} shards")
                count, reason = size, f"that of {label} is {size}"
            elif size != count:
                raise fault(f"{label}: its first dim is {size}, but {reason}")
    return count


# --- Values out of a step

# From the value so far, the array and inputs of this session, its index, the number of sessions and a label.
Keep = Callable[[Value, Array, Arrays, int, int, str], Value]


def _choose_keep(plan: Plan, key: _Key, fault: type[ServingError]) -> Keep:
    index, _ = key
    step = plan.steps[index]
    if _is_gathered(plan, key):
        return partial(_stack, fault)
    later = plan.steps[index + 1 : _last_use(plan, key) + 1]
    model = step.part.model
    # While the request is parked for a batch, others infer with all models.
    is_parked = any(other.part.model is not None and other.part.model.batch_limit for other in later)
    if model is not None and (step.level or is_parked or any(model is other.part.model for other in later)):
        return _append_copy
    return _append


def _append(value: Value, array: Array, inputs: Arrays, session: int, sessions: int, label: str) -> Value:
    """Keep an array uncopied, unless it is a view of an input.

    A model returns such a view of an input that it passes through; OpenVINO (2026.4.1) does not keep its memory alive.
    """
    for other in inputs.values():
        if _overlaps(array, other):
            return _append_copy(value, array, inputs, session, sessions, label)
    if session == 0:
        return [array]
    value.append(array)
    return value


def _append_copy(value: Value, array: Array, inputs: Arrays, session: int, sessions: int, label: str) -> Value:
    if session == 0:
        _check_size(array, sessions, label)
        return [copy_array(array)]
    value.append(copy_array(array))
    return value


def _stack(
    fault: type[ServingError], value: Value, array: Array, inputs: Arrays, session: int, sessions: int, label: str
) -> Value:
    """Copy an array into one stack for all sessions, which the first one allocates; strings into a list.

    Raises `fault` if the shapes of the sessions differ.
    """
    if session and array.shape != value[0].shape:
        shapes = f"{join(value[0].shape)} and {join(array.shape)}"
        raise fault(f"{label}: its sessions have the shapes {shapes}, which cannot be gathered")
    if isinstance(array, BytesArray):
        return _append_copy(value, array, inputs, session, sessions, label)
    if session == 0:
        _check_size(array, sessions, label)
        value = np.empty((sessions, *array.shape), array.dtype)
    value[session] = array
    return value


def _check_size(array: Array, sessions: int, label: str) -> None:
    """Raise InvalidRequestError if all sessions together need too much memory, judged by the first one."""
    size = array.nbytes
    if size * sessions > MAX_VALUE_BYTES:
        raise InvalidRequestError(
            f"{label}: {sessions} sessions of {size} bytes each exceed the limit of {MAX_VALUE_BYTES} bytes; "
            "send fewer shards"
        )


def _overlaps(array: Array, other: Array) -> bool:
    if isinstance(array, BytesArray) or isinstance(other, BytesArray):
        return any(np.may_share_memory(mine, its) for mine in memory_of(array) for its in memory_of(other))
    return np.may_share_memory(array, other)


# --- Values into a step


class _Feed:
    """An input of a step: makes an array for every session from a value."""

    def __init__(self, plan: Plan, step: Step, wire: Wire, slot: int, label: str, fault: type[ServingError]) -> None:
        """Decide how the value is split, and whether every shape is sure to fit; `fault` is for one that does not."""
        self.tensor = wire.tensor
        self._slot = slot
        self._split: Callable[[Value, int], list[Array]] = _pass
        self._gathers = step.gathers
        source = _given(plan, (wire.step, wire.item))
        dims = source.dims
        if step.gathers is None and _count_of(plan, wire.step) is not None:
            self._split = _shard
            dims = None if dims is None else dims[1:]
        elif step.gathers is not None and step.gathers != wire.step:
            self._split = _gather
            dims = None if dims is None else (_count_dim(plan, step.gathers), *dims)
        self._expected = step.part.inputs[wire.tensor]
        self._is_sure = _fits_always(source, dims, self._expected)
        self._fault = fault
        self._label = f"{label} input {wire.tensor!r}"
        self._taker = "node" if step.part.model is None else "model"

    def read(self, values: list[Value], counts: Counts) -> list[Array]:
        """Return an array for every session. Raises `fault` for one that does not fit."""
        arrays = self._split(values[self._slot], 1 if self._gathers is None else counts[self._gathers])
        if not self._is_sure:
            for array in arrays:
                if not self._expected.holds(array.shape):
                    raise self._fault(
                        f"{self._label}: shape is {join(array.shape)}, "
                        f"the {self._taker} takes {self._expected.describe_shape()}"
                    )
        return arrays


def _pass(value: Value, count: int) -> list[Array]:
    """Return the arrays of the same sessions."""
    return value if isinstance(value, list) else _cut(value)


def _shard(value: Value, count: int) -> list[Array]:
    """Return the shards of the arrays of the enclosing sessions."""
    return [shard for array in value for shard in _cut(array)]


def _gather(value: Value, count: int) -> list[Array]:
    """Return stacks of the arrays of `count` inner sessions each."""
    return _cut(value.reshape(len(value) // count, count, *value.shape[1:]))


def _cut(array: NDArray[Any]) -> list[Array]:
    """Split an array along its first dim into views, which are 0-d arrays where numpy would return scalars."""
    return list(array) if array.ndim > 1 else [array[index, ...] for index in range(len(array))]


def _fits_always(source: TensorMetadata, dims: tuple[Dim, ...] | None, expected: TensorMetadata) -> bool:
    if source.datatype == UINT8 and source.name.lower().endswith("_string"):  # a model may return strings for it
        return False
    return (
        dims is not None
        and expected.dims is not None
        and len(dims) == len(expected.dims)
        and all(
            low <= dim.low and (high is None or (dim.high is not None and dim.high <= high))
            for dim, (low, high) in zip(dims, expected.dims, strict=True)
        )
    )


# --- Values into the response


class _Result:
    """An output of the pipeline: makes its tensor from a value."""

    def __init__(self, plan: Plan, output: Output, slots: Mapping[_Key, int]) -> None:
        self.name = output.name
        self._datatype = plan.metadata.outputs[output.name].datatype
        self._slot = slots[output.step, output.item]
        self._level = _level_of(plan, output.step)

    def make(self, values: list[Value], counts: Counts) -> Tensor:
        """Return the tensor, with a first dim more for every open demultiplexer."""
        value = values[self._slot]
        sizes = [counts[step] for step in self._level]
        if not sizes:
            array: Array = value[0]
        elif isinstance(value, list):
            elements = (element for shard in value for element in shard.elements())
            array = BytesArray.of(elements, (*sizes, *value[0].shape))
        else:
            array = value.reshape(*sizes, *value.shape[1:])
        # A UINT8 matrix may have become strings (protocol/README.md, section 7).
        return Tensor(self.name, BYTES if isinstance(array, BytesArray) else self._datatype, array)


# --- Reading the plan


def _find_faults(steps: Sequence[Step]) -> list[type[ServingError]]:
    """Return, for each step, the error for an output whose shape does not fit.

    If models alone have made it of the request, the client has sent what they cannot compute together. If custom code
    took part, the code may be wrong.
    """
    faults: list[type[ServingError]] = []
    for step in steps:  # after all that it depends on
        is_coded = step.part.model is None or any(
            wire.step != REQUEST_STEP and faults[wire.step] is InferenceError for wire in step.wires
        )
        faults.append(InferenceError if is_coded else InvalidRequestError)
    return faults


def _level_of(plan: Plan, index: int) -> tuple[int, ...]:
    return () if index == REQUEST_STEP else plan.steps[index].level


def _count_of(plan: Plan, index: int) -> int | None:
    return plan.count if index == REQUEST_STEP else plan.steps[index].count


def _count_dim(plan: Plan, index: int) -> Dim:
    count = _count_of(plan, index)
    return Dim(1, MAX_COUNT) if count is None or count == DYNAMIC else Dim(count, count)


def _given(plan: Plan, key: _Key) -> TensorMetadata:
    index, item = key
    if index == REQUEST_STEP:
        return plan.metadata.inputs[item]
    return plan.steps[index].part.outputs[item]


def _last_use(plan: Plan, key: _Key) -> int:
    """Return the last step that uses a value, the number of steps for the response."""
    if any((output.step, output.item) == key for output in plan.outputs):
        return len(plan.steps)
    return max((index for index, step in enumerate(plan.steps) if _takes(step, key)), default=key[0])


def _is_gathered(plan: Plan, key: _Key) -> bool:
    """Return whether the step's own sessions are gathered, not only its shards."""
    if any((output.step, output.item) == key for output in plan.outputs) and _level_of(plan, key[0]):
        return True
    return any(step.gathers not in (None, key[0]) and _takes(step, key) for step in plan.steps)


def _takes(step: Step, key: _Key) -> bool:
    return any((wire.step, wire.item) == key for wire in step.wires)
