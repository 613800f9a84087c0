"""The backend test cases of the `onnx` package: models with inputs and the outputs that ONNX expects of them."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference.ops import op_pool_common

# "real" only has large models that would have to be downloaded.
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


class DataSet(NamedTuple):
    """Arrays by the names of the graph's inputs and outputs; other values than tensors are left as onnx reads them.

    The expected outputs of poolings are zeros.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]


class Case(NamedTuple):
    """A model with its data sets; `name` is unique over all kinds."""

    name: str
    kind: str
    model: onnx.ModelProto
    data_sets: list[DataSet]


def load_cases() -> list[Case]:
    """Load all cases, sorted by name."""
    # onnx computes the expected outputs of poolings in Python, which takes 3.5 of 4.7 s, and nothing compares them.
    with warnings.catch_warnings(), patch.object(op_pool_common, "pool", _make_zeros):
        warnings.simplefilter("ignore")  # onnx computes infinities on purpose
        cases = [_load(test) for kind in KINDS for test in load_model_tests(kind=kind)]
    assert len({case.name for case in cases}) == len(cases)
    return sorted(cases, key=lambda case: case.name)


def _make_zeros(padded: np.ndarray, x_shape: Any, kernel: Any, strides: Any, out_shape: Any, *_: Any, **__: Any) -> Any:
    return np.zeros([*x_shape[:2], *out_shape], padded.dtype)


def _load(test: Any) -> Case:
    model = test.model or onnx.load(Path(test.model_dir) / "model.onnx")
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [port for port in model.graph.input if port.name not in initializers]
    if test.data_sets is not None:
        pairs = test.data_sets
    else:
        folders = sorted(Path(test.model_dir).glob("test_data_set_*"))
        pairs = [(_read(folder, "input", inputs), _read(folder, "output", model.graph.output)) for folder in folders]
    sets = [DataSet(_by_name(inputs, given), _by_name(model.graph.output, wanted)) for given, wanted in pairs]
    return Case(test.name.removeprefix("test_"), test.kind, model, sets)


def _by_name(ports: Any, arrays: Any) -> dict[str, Any]:
    return {port.name: _to_array(array) for port, array in zip(ports, arrays, strict=False)}


def _to_array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _read(folder: Path, prefix: str, ports: Any) -> list[Any]:
    return [
        _parse((folder / f"{prefix}_{index}.pb").read_bytes(), port.type)
        for index, port in enumerate(ports)
        if (folder / f"{prefix}_{index}.pb").exists()
    ]


def _parse(content: bytes, kind: Any) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))
