"""Recovery of a compiled model after a failed inference.

The CPU plugin (OpenVINO 2026.4.1) recomputes the shapes within a model only if the inputs' shapes differ from those of
the last successful inference. After an inference that failed half-way, a request with the shapes of the last success
would be computed with the shapes of the failed one. A successful inference with other shapes repairs this, and an
example, a request whose outputs are known, verifies it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ovms_rest.models.shapes import Shape, ShapeError
from ovms_rest.models.trial_shapes import choose_other_shapes, differs
from ovms_rest.protocol.datatypes import BYTES, DATATYPES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array, Tensor, TensorMetadata, copy_array, memory_of

Arrays = Mapping[str, Array]

# Limits of inferences after a failure, and of shapes considered for them.
_MAX_ATTEMPTS = 16
_MAX_CANDIDATES = 64
# Limits of the number of examples, and of the bytes of inputs and outputs of each.
_MAX_EXAMPLES = 4
_LARGEST_EXAMPLE = 65_536


class _Example(NamedTuple):
    """Inputs that the model has computed, and their outputs."""

    arrays: Arrays
    outputs: Mapping[str, Array]


class Recovery:
    """The inferences of a model that help it to recover from a failed one."""

    def __init__(
        self,
        inputs: Sequence[TensorMetadata],
        trials: Sequence[Mapping[str, Shape]],
        check_shapes: Callable[[Mapping[str, Shape]], None],
        infer: Callable[[Arrays], Mapping[str, Tensor]],
    ) -> None:
        """Prepare the recovery of a model with these inputs.

        `trials` are shapes that it may compute; `check_shapes` raises ShapeError for shapes that it cannot; `infer`
        raises RuntimeError when it fails, and ShapeError when it succeeded without a usable result.
        """
        self.last: tuple[Shape, ...] = ()  # shapes of the dynamic inputs at the last success
        self._inputs = inputs
        self._dynamic = [port for port in inputs if port.static_shape is None]
        self._trials = trials
        self._check_shapes = check_shapes
        self._infer = infer
        self._examples: list[_Example] = []

    def keep(self, arrays: Arrays, tensors: Mapping[str, Tensor]) -> None:
        """Record a success, and keep it as an example if it is small and more are needed."""
        self.last = self._shapes_of(arrays)
        if any(self._shapes_of(example.arrays) == self.last for example in self._examples):
            return
        outputs = {name: tensor.array for name, tensor in tensors.items()}
        size = sum(array.nbytes for array in (*arrays.values(), *outputs.values()))
        if len(self._examples) < _MAX_EXAMPLES and size <= _LARGEST_EXAMPLE:
            copies = [{name: copy_array(array) for name, array in each.items()} for each in (arrays, outputs)]
            self._examples.append(_Example(*copies))

    def recover(self, failed: Mapping[str, Shape]) -> bool:
        """Run inferences after one of these shapes failed; return whether the model is sane again."""
        for arrays in itertools.islice(self._choose_inputs(failed), _MAX_ATTEMPTS):
            if self._computes(arrays) and self.is_sane():
                return True
        return False

    def is_sane(self) -> bool:
        """Return whether the model computes an example as before; True without examples."""
        if not self._examples:
            return True
        example = next(
            (each for each in self._examples if self._shapes_of(each.arrays) != self.last), self._examples[0]
        )
        try:
            tensors = self._infer(example.arrays)
        except RuntimeError:
            return False
        self.last = self._shapes_of(example.arrays)
        return all(_equal(tensors[name].array, array) for name, array in example.outputs.items())

    def differs_from_last(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether every dynamic dim has another size than at the last success."""
        return all(differs(port, shapes[port.name], last) for port, last in zip(self._dynamic, self.last, strict=False))

    def _shapes_of(self, arrays: Arrays) -> tuple[Shape, ...]:
        return tuple([arrays[port.name].shape for port in self._dynamic])

    def _computes(self, arrays: Arrays) -> bool:
        try:
            self._infer(arrays)
        except ShapeError:  # the inference itself succeeded
            pass
        except RuntimeError:
            return False
        self.last = self._shapes_of(arrays)
        return True

    def _choose_inputs(self, failed: Mapping[str, Shape]) -> Iterator[Arrays]:
        """Yield inputs that the model may compute, with other shapes than at the last success."""
        last = {port.name: shape for port, shape in zip(self._dynamic, self.last, strict=False)}
        if not self._dynamic:  # only shapes computed from values can differ
            yield from fill(self._inputs, failed)
            return
        for example in self._examples:
            if all(example.arrays[name].shape != shape for name, shape in last.items()):
                yield example.arrays
        bases = [*self._trials, *([{**failed, **last}] if last else []), failed]
        for shapes in itertools.islice(choose_other_shapes(self._inputs, bases, last), _MAX_CANDIDATES):
            with contextlib.suppress(ShapeError):
                self._check_shapes(shapes)
                yield from fill(self._inputs, shapes)


def fill(inputs: Sequence[TensorMetadata], shapes: Mapping[str, Shape]) -> Iterator[dict[str, Array]]:
    """Yield arrays of these shapes for all inputs, with values that many models can compute.

    Integers are often sizes, axes or counts, so they are 1 first and 0 later. Strings are empty.
    """
    for integer, other in ((1, 0), (0, 0), (1, 1)):
        yield {port.name: _fill(port.datatype, shapes[port.name], integer, other) for port in inputs}


def _fill(datatype: str, shape: Shape, integer: int, other: int) -> Array:
    if datatype == BYTES:
        return BytesArray(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(0, np.uint8))
    dtype = DATATYPES[datatype].dtype
    return np.full(shape, integer if dtype.kind in "iu" else other, dtype)


def _equal(one: Array, other: Array) -> bool:
    """Return whether two arrays have the same shape and bytes."""
    if isinstance(one, BytesArray) and isinstance(other, BytesArray):
        return one.shape == other.shape and one.elements() == other.elements()
    parts: Any = zip(memory_of(one), memory_of(other), strict=False)
    return one.shape == other.shape and all(mine.tobytes() == its.tobytes() for mine, its in parts)
