"""The plan of a checked pipeline: steps in the order in which they run.

A step runs once for each *session*. A demultiplexer with the count N makes N sessions of each session that it runs in:
its outputs are split along their first dim, and each *shard* goes to a session of its own. A step runs in the sessions
of its *level*, the demultiplexers that are open there, outermost first; session indices count the innermost fastest.
A step that gathers collects the shards of the innermost open demultiplexer: its inputs have one more dim in front.
The response gathers all demultiplexers that are still open.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ovms_rest.errors import InvalidRequestError
from ovms_rest.models.servable import Servable
from ovms_rest.protocol.tensors import Array, ModelMetadata, TensorMetadata, batch_of
from ovms_rest.shared_memory.statistics import FailureKind, InferenceRecord

# The index of the request among the steps; as a demultiplexer it stands for the pipeline's demultiply_count.
REQUEST_STEP = -1


class Part(Protocol):
    """The model, or the custom code with its params, that one node of one pipeline runs."""

    inputs: Mapping[str, TensorMetadata]
    outputs: Mapping[str, TensorMetadata]

    @property
    def model(self) -> Servable | None:
        """The model that it runs, None for custom code."""

    def open(self) -> None:
        """Prepare it in this process, before the first `execute`. Raises LoadError."""

    def execute(self, arrays: Mapping[str, Any]) -> Mapping[str, Array]:
        """Compute the outputs from the inputs, which it must not change.

        Outputs have the declared datatypes and shapes. Numeric ones of custom code are C-contiguous, writable and share
        no memory with the inputs; a model overwrites its own at its next inference. Raises InferenceError.
        """


class ModelPart:
    """A model as the nodes of pipelines run it; each inference is counted as the model's."""

    def __init__(self, model: Servable) -> None:
        self.model = model
        self.inputs: Mapping[str, TensorMetadata] = model.metadata.inputs
        self.outputs: Mapping[str, TensorMetadata] = model.metadata.outputs

    def open(self) -> None:
        """Do nothing: models are opened and retired as servables of their own."""

    def execute(self, arrays: Mapping[str, Any]) -> Mapping[str, Array]:
        """Infer. Raises InferenceError, InvalidRequestError."""
        counters = self.model.counters
        counters.begin()
        started = time.monotonic_ns()
        record = InferenceRecord(0, batch=batch_of(next(iter(arrays.values())).shape))
        try:
            tensors = self.model.infer(arrays, record)
        except Exception as error:
            kind: FailureKind = "invalid" if isinstance(error, InvalidRequestError) else "failed"
            counters.fail(kind, time.monotonic_ns() - started)
            raise
        record.queue_ns = record.parked_ns
        record.infer_ns = time.monotonic_ns() - started - record.parked_ns
        counters.record(record)
        return {name: tensor.array for name, tensor in tensors.items()}


class Wire(NamedTuple):
    """The connection of one input tensor of a step to the step and output that it comes from."""

    tensor: str
    step: int  # REQUEST_STEP for an input of the pipeline
    item: str  # the output tensor of that step (data_item, not alias), or an input of the pipeline


@dataclass(frozen=True, slots=True)
class Step:
    """A node that is ready to run."""

    name: str
    part: Part
    wires: tuple[Wire, ...]
    level: tuple[int, ...]  # the demultiplexers (REQUEST_STEP too) in whose sessions it runs, outermost first
    count: int | None = None  # sessions that it makes of each of its own; DYNAMIC if its outputs decide
    gathers: int | None = None  # the demultiplexer whose shards it collects
    used: tuple[str, ...] = ()  # the outputs that another step or the response uses


class Output(NamedTuple):
    """An output of the pipeline: the step and tensor that it comes from, REQUEST_STEP for an input of the request."""

    name: str
    step: int
    item: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline that is ready to run: every wire comes from an earlier step or from the request."""

    metadata: ModelMetadata
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    count: int | None = None  # sessions that the request is split into
