"""Whether the rows of a model's inputs depend on each other, so that a batch of requests gives wrong responses."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import LoadError, ServingError
from ovms_rest.models.batching import Arrays
from ovms_rest.models.runtime import Model
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array

# Rounding changes a row of a batch by less than this, relative to the largest output.
_ROUNDING = 0.05

# By name of an output: its shape, and its values if they are floats, else none; flattened.
Outputs = Mapping[str, tuple[tuple[int, ...], NDArray[np.float64]]]


class Rows(NamedTuple):
    """The outputs of two rows that were inferred together, and of each alone."""

    together: Outputs
    alone: Sequence[Outputs]

    def find_other_shape(self) -> str:
        """Return which output does not have one row for each row of the inputs, "" if all have."""
        for name, (shape, values) in self.together.items():
            if shape[:1] != (2,):
                return f"output {name!r} has the shape {list(shape)} for 2 rows"
            for of_one, values_of_one in (row[name] for row in self.alone):
                if values.size != 2 * values_of_one.size:
                    return f"output {name!r} has the shape {list(shape)} for 2 rows, and {list(of_one)} for one"
        return ""

    def find_dependence(self) -> str:
        """Return which output of a row changes when it is not alone, "" if none does.

        Each output must have one row for each row of the inputs.
        """
        for name, (_, values) in self.together.items():
            alone = np.concatenate([row[name][1] for row in self.alone])
            with np.errstate(invalid="ignore"):
                difference, largest = (np.abs(each).max(initial=0) for each in (values - alone, alone))
            if difference > _ROUNDING * largest:
                return f"rows must not depend on each other, but output {name!r} of a row changes when it is not alone"
        return ""


def check_rows(model: Model) -> None:
    """Infer two rows together and each alone, if the model has computed its trial.

    Raises LoadError if the rows depend on each other. A model whose outputs do not have one row for each row of the
    inputs is accepted, because its requests are answered one by one.
    """
    example = model.example
    rows = None if example is None else infer_rows(model, repeat_row(example, 2))
    if rows is not None and not rows.find_other_shape() and (dependence := rows.find_dependence()):
        raise LoadError(f"max_batch_size: {dependence}")


def repeat_row(arrays: Arrays, rows: int) -> Arrays:
    """Return arrays with the first row of each repeated."""
    return {name: _repeat_row(array, rows) for name, array in arrays.items()}


def _repeat_row(array: Array, rows: int) -> Array:
    if isinstance(array, BytesArray):
        return BytesArray(
            np.repeat(array.begins[:1], rows, axis=0), np.repeat(array.ends[:1], rows, axis=0), array.symbols
        )
    return np.repeat(array[:1] if len(array) else np.zeros_like(array, shape=(1, *array.shape[1:])), rows, axis=0)


def infer_rows(model: Model, example: Arrays) -> Rows | None:
    """Infer two rows of inputs like the example, together and alone; return None if they cannot be computed."""
    random = np.random.default_rng(0)
    arrays = {name: _vary(array, random) for name, array in example.items()}
    try:
        return Rows(
            _infer_floats(model, arrays),
            [_infer_floats(model, {name: _row(array, row) for name, array in arrays.items()}) for row in (0, 1)],
        )
    except ServingError:
        return None


def _vary(array: Array, random: np.random.Generator) -> Array:
    """Return random numbers from 0 to 1 in place of floats, which most models can compute; other arrays as they are."""
    if isinstance(array, BytesArray) or array.dtype.kind in "iub":
        return array
    return random.random(array.shape).astype(array.dtype)


def _row(array: Array, row: int) -> Array:
    if isinstance(array, BytesArray):
        return BytesArray(array.begins[row : row + 1], array.ends[row : row + 1], array.symbols)
    return array[row : row + 1]


def _infer_floats(model: Model, arrays: Arrays) -> Outputs:
    outputs = {}
    for name, tensor in model.infer_alone(arrays).items():
        array, values = tensor.array, np.zeros(0)
        if not isinstance(array, BytesArray) and array.dtype.kind not in "iub":
            values = array.astype(np.float64).ravel()
        outputs[name] = tensor.shape, values
    return outputs
