"""The outputs of OpenVINO without a server, from a process that reads, compiles and infers models, and may crash."""

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino

from ovms_rest.models.compilation import plan_compilation

PATIENCE = 60  # seconds for one model

# As the service compiles a model whose plugin_config asks for exactness.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}

Arrays = Mapping[str, np.ndarray]
# The names and the element type of each input or output.
Ports = tuple[tuple[frozenset[str], str], ...]


class Task(NamedTuple):
    """A model file and the inputs of each inference; `is_dynamic` makes every dim of the model's inputs dynamic."""

    file: Path
    sets: list[Arrays]
    is_dynamic: bool = False


class Reference(NamedTuple):
    """The outputs of a model in its order, for each data set, or why there are none.

    `failed` is the step that failed: "read", "compile", "infer" or "crash". `is_random` says that another inference
    with the same inputs had other outputs.
    """

    failed: str = ""
    reason: str = ""
    inputs: Ports = ()
    outputs: Ports = ()
    results: tuple[tuple[np.ndarray, ...], ...] = ()
    is_random: bool = False


def compute_all(tasks: Iterable[Task]) -> Iterator[Reference]:
    """Compute models one after the other in a process of their own, which is replaced when it crashes or hangs."""
    context = multiprocessing.get_context("spawn")
    process = connection = None
    try:
        for task in tasks:
            if process is None:
                connection, other = context.Pipe()
                process = context.Process(target=_compute_received, args=(other,), daemon=True)
                process.start()
                other.close()
            try:
                connection.send(task)
                if not connection.poll(PATIENCE):
                    raise EOFError
                yield connection.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                process.kill()
                process.join()
                yield Reference("crash", f"exit code {process.exitcode}")
                process = None
    finally:
        if process is not None:
            process.kill()
            process.join()


def _compute_received(connection: Any) -> None:
    core = openvino.Core()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_compute(core, task))


def _compute(core: openvino.Core, task: Task) -> Reference:
    step, ports = "read", {}
    try:
        model = core.read_model(task.file)
        ports = {"inputs": _describe(model.inputs), "outputs": _describe(model.outputs)}
        step = "compile"
        if task.is_dynamic:
            shapes = (port.get_partial_shape() for port in model.inputs)
            model.reshape({index: openvino.PartialShape([-1] * len(shape)) for index, shape in enumerate(shapes)})
        plan = plan_compilation("CPU", EXACT, cores=2)
        compiled = core.compile_model(model, plan.device, dict(plan.properties))
        step = "infer"
        results, is_random = [], False
        for arrays in task.sets:
            request = compiled.create_infer_request()
            first = _infer(request, model, arrays)
            try:
                _infer(request, model, {name: _disturb(array) for name, array in arrays.items()})
            except RuntimeError:
                request = core.compile_model(model, plan.device, dict(plan.properties)).create_infer_request()
            is_random |= any(map(differ, first, _infer(request, model, arrays)))
            results.append(tuple(first))
    except Exception as error:  # of whatever class, it is OpenVINO's
        return Reference(step, f"{type(error).__name__}: {error}", **ports)
    return Reference(results=tuple(results), is_random=is_random, **ports)


def _describe(ports: Any) -> Ports:
    return tuple((frozenset(port.get_names()), port.get_element_type().get_type_name()) for port in ports)


def _infer(request: Any, model: Any, arrays: Arrays) -> list[np.ndarray]:
    for index, array in enumerate(assign(_describe(model.inputs), arrays)):
        request.set_input_tensor(index, _to_tensor(np.ascontiguousarray(array).reshape(array.shape)))
    request.infer()
    return [_from_tensor(request.get_output_tensor(index)) for index in range(len(model.outputs))]


def assign(ports: Ports, arrays: Arrays) -> list[np.ndarray]:
    """Return the array of each input, by its name in the graph, or by its place where OpenVINO has renamed it."""
    found = []
    for place, (names, _) in enumerate(ports):
        known = [array for name, array in arrays.items() if name in names]
        found.append(known[0] if known else list(arrays.values())[place])
    return found


def _to_tensor(array: np.ndarray) -> openvino.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return openvino.Tensor(array.view(np.uint16), array.shape, openvino.Type.bf16)
    return openvino.Tensor(array)


def _from_tensor(tensor: openvino.Tensor) -> np.ndarray:
    kind = tensor.get_element_type()
    if kind == openvino.Type.string:
        array = np.empty(tuple(tensor.get_shape()), object)
        array.flat = [text if isinstance(text, bytes) else text.encode() for text in tensor.bytes_data.flat]
        return array
    array = np.array(tensor.data)
    return array.view(ml_dtypes.bfloat16) if kind == openvino.Type.bf16 else array


def _disturb(array: np.ndarray) -> np.ndarray:
    """Return other floating-point numbers, so that an inference leaves different values in memory."""
    return array * array.dtype.type(2) + array.dtype.type(1) if array.dtype.kind == "f" else array


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays differ in datatype, shape or a bit, where all NaN are equal."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return True
    if one.dtype == object:
        return one.tolist() != other.tolist()
    if one.size == 0:
        return False
    mine, its = (np.ascontiguousarray(each).reshape(-1) for each in (one, other))
    same = (mine.view(np.uint8) == its.view(np.uint8)).reshape(one.size, -1).all(axis=1)
    if one.dtype.kind == "f" or one.dtype == ml_dtypes.bfloat16:
        same |= np.isnan(mine) & np.isnan(its)
    return not same.all()
