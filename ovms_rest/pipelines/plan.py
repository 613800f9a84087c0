"""A pipeline that was checked, as steps in the order in which they run; the vocabulary of planning and execution.

A step runs once for each *session*. A demultiplexer with the count N makes N sessions of each that it runs in: its
outputs are split along their first dim, and each part goes to a session of its own. The sessions that a step runs in
are those of its *level*, the demultiplexers that are open there, the outermost first; the index of a session counts
the innermost fastest. A step that gathers collects the sessions of the innermost demultiplexer in front of it: what
comes to it has one more dim in front. The response gathers all that are open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ovms_rest.models.servable import Servable
from ovms_rest.protocol.tensors import Array, ModelMetadata, TensorMetadata

# The place of the request among the steps; as a demultiplexer it is the pipeline's own.
REQUEST_STEP = -1


class CustomNode(Protocol):
    """Code that is a node, for one node of one pipeline with its params."""

    inputs: Mapping[str, TensorMetadata]
    outputs: Mapping[str, TensorMetadata]

    def open(self) -> None:
        """Make it ready in this process, before the first `execute`. Raises LoadError."""

    def execute(self, arrays: Mapping[str, Any]) -> Mapping[str, Array]:
        """Make the outputs of the inputs, which it must not change.

        Every output of numbers is C-contiguous, may be written to and shares no memory with the inputs.

        The datatypes and shapes of what it returns were checked. Raises InferenceError.
        """


class Wire(NamedTuple):
    """An input of a step: the name of its tensor, and the step and its output that it comes from."""

    tensor: str
    step: int  # REQUEST_STEP for an input of the pipeline
    item: str  # the name of that step's output tensor (its data_item, not the alias), or of the pipeline's input


@dataclass(frozen=True, slots=True)
class Step:
    """A node with all that its run needs; exactly one of `model` and `custom` is there."""

    name: str
    wires: tuple[Wire, ...]
    level: tuple[int, ...]  # the steps (REQUEST_STEP too) whose sessions it runs in, outermost first
    count: int | None = None  # of sessions that it makes of each of its own, DYNAMIC if only its outputs tell
    gathers: int | None = None  # the step whose sessions it collects
    model: Servable | None = None
    custom: CustomNode | None = None
    used: tuple[str, ...] = ()  # the outputs that some other step or the response takes

    @property
    def interface(self) -> ModelMetadata | CustomNode:
        """What has its tensors, `inputs` and `outputs` by name."""
        if self.model is not None:
            return self.model.metadata
        assert self.custom is not None
        return self.custom


class Output(NamedTuple):
    """An output of the pipeline: the step (REQUEST_STEP for a request's input) and its output tensor."""

    name: str
    step: int
    item: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline that is ready to run: every wire comes from a step before, or the request."""

    metadata: ModelMetadata
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    count: int | None = None  # of sessions that the request is split into
