"""Models in OpenVINO: read, described, compiled, inferred.

Only this module, `preparation`, `shapes` and `tiles` import it.

Strings bypass OpenVINO's Python binding, which drops NULs at the end of an element and crashes on a tensor without
elements. A model's string tensors are replaced by the three tensors of StringTensorPack and StringTensorUnpack, which
make up a BytesArray; an output also has its shape.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset15

from ovms_rest.errors import BusyError, InvalidRequestError, LoadError
from ovms_rest.log import log
from ovms_rest.models.batching import Batching
from ovms_rest.models.compilation import ONE_THREAD, Compilation, PluginValue, check_properties
from ovms_rest.models.copies import Source, read_in_place
from ovms_rest.models.example_requests import make_constant
from ovms_rest.models.extensions import ADVICE, extend, find_tokenizers, lacks_operations
from ovms_rest.models.images import ImageLimits, take_images
from ovms_rest.models.options import TYPES, LayoutChange, Preparation
from ovms_rest.models.preparation import find_layout, name_tensors, prepare
from ovms_rest.models.reasons import find_reason, one_line
from ovms_rest.models.recovery import Recovery, fill
from ovms_rest.models.repository import directory_of, read_file, read_mapping
from ovms_rest.models.servable import NOT_COUNTED, InferenceCounters, Servable
from ovms_rest.models.shapes import Guard, Shape, ShapeChecker, ShapeError
from ovms_rest.models.signal_stack import use_ordinary_stack
from ovms_rest.models.tiles import split_tiles
from ovms_rest.models.trial_requests import read_trial
from ovms_rest.models.trial_shapes import choose_shapes, choose_usual_shapes
from ovms_rest.protocol.datatypes import BYTES, UINT8
from ovms_rest.protocol.strings import MAX_BYTES, MAX_ELEMENTS, BytesArray, from_matrix
from ovms_rest.protocol.tensors import Array, Dim, ModelMetadata, Origin, Tensor, TensorMetadata, copy_array
from ovms_rest.shared_memory.statistics import InferenceRecord

_LABELS_FILE = "labels.txt"
MAX_LABELS_BYTES = 2**20

NO_CHANGES = Preparation()
DEFAULT_LIMITS = ImageLimits()

_BF16_NOTE = (
    "computes FP32 in BF16, OpenVINO's default on this CPU; plugin_config "
    '{"INFERENCE_PRECISION_HINT": "f32"} keeps FP32'
)

# Up to this many bytes, copying an input costs less than the 4 us in which OpenVINO takes over its memory.
_SMALL_INPUT = 16_384
# The number of shapes that a model is tried with, when opened and after a failure.
_MAX_TRIALS = 4
# Shapes that a model has computed are known, and not checked again.
_MAX_KNOWN_SHAPES = 4096
# For these reasons a cache may be unwritable, and can still be read.
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})
_LOCK = ".lock"
# How long to wait for another process that has locked the cache: the arbiter replaces no workers meanwhile.
_LOCK_SECONDS = 5.0
_LOCK_POLL_SECONDS = 0.05
# The caches for whose lock this process has waited in vain.
_kept: set[Path] = set()
# Without its Python wrapper, which prepares inputs that are already prepared here.
_infer_base = openvino._pyopenvino.InferRequest.infer
# opset15's functions would make the extension's nodes for strings once a Python node has imported openvino_tokenizers,
# which changes OpenVINO's classes.
_factory = openvino._pyopenvino.NodeFactory("opset15")

# KServe's datatypes by OpenVINO's names of types: "UINT8" by "u8".
_DATATYPES = {"boolean": "BOOL", "string": BYTES} | {short: name.upper() for name, short in TYPES.items()}


# The shape and the value of all elements of generated inputs, by name.
Invented = Mapping[str, tuple[Sequence[int], int]]


@dataclass(frozen=True, slots=True)
class _Port:
    """An input or output as the client sees it, and the indices of its tensors in the compiled model.

    BYTES has begins, ends and symbols, and an output also its shape.
    """

    metadata: TensorMetadata
    indices: tuple[int, ...]


class Model:
    """A version of a model: read by the constructor, compiled by `compile`, ready in this process after `open`."""

    def __init__(
        self,
        name: str,
        version: int,
        path: Path,
        compilation: Compilation,
        preparation: Preparation = NO_CHANGES,
        limits: ImageLimits = DEFAULT_LIMITS,
        source: Source | None = None,
    ) -> None:
        """Read the model in a version's directory or file, and apply its preparation.

        `source` is read instead of the files themselves, if there is one. Raises LoadError.
        """
        self.compilation = compilation
        self._source = source or read_in_place(path)
        self.file = Path(self._source.file)
        self.counters: InferenceCounters = NOT_COUNTED
        self.dependencies: tuple[Servable, ...] = ()
        self._local = threading.local()
        self._retire: Callable[[], None] = lambda: None
        self._compiled: Any = None
        self.warning = ""  # what `open` could not show
        self.notes: tuple[str, ...] = ()  # for the user, about the way it computes
        self.invented: Invented | None = None
        properties = compilation.properties
        check_properties(
            properties,
            compilation.device,
            _supported_properties(compilation.device),
            lambda key: _accepts(compilation.device, key, properties[key]),
        )
        read = _read(self._source, preparation.cpu_extension)
        info = ["model_info"]
        rt_info = {"model_info": _plain(read.get_rt_info(info))} if read.has_rt_info(info) else None
        names = name_tensors(read, read_mapping(path))
        self._read: Any
        self._read, sizes = prepare(read, *names, preparation)
        split_tiles(self._read)
        named = list(zip(names, (self._read.inputs, self._read.outputs), strict=True))
        inputs, outputs = (list(map(_describe, *each)) for each in named)
        # By name; None where neither the model nor the config declares a layout.
        self.input_layouts, self.output_layouts = (
            dict(zip(names, map(find_layout, nodes), strict=True)) for names, nodes in named
        )
        self._trials = [*choose_shapes(inputs, sizes), *choose_usual_shapes(inputs)]
        inputs = [take_images(port, self.input_layouts[port.name], limits) for port in inputs]
        inputs = [_trace(port, preparation, len(inputs) == 1) for port in inputs]
        self._inputs, self._outputs = _split_strings(self._read, inputs, outputs)
        self.has_state = bool(self._read.get_variables())
        self._dynamic = [port.metadata.name for port in self._inputs if port.metadata.static_shape is None]
        self._is_dynamic_within = self._read.is_dynamic()
        self._known: set[tuple[Shape, ...]] = set()
        self._is_damaged = self._is_broken = False
        self.metadata = ModelMetadata(
            name,
            str(version),
            {port.metadata.name: port.metadata for port in self._inputs},
            {port.metadata.name: port.metadata for port in self._outputs},
            rt_info,
            _find_labels(rt_info, path),
        )
        self.color = preparation.color[1] if preparation.color else ""  # of the images that clients send
        self.batch_limit = preparation.batch_limit
        self._batching = Batching(self.metadata, self.batch_limit, self.infer_alone) if self.batch_limit else None
        self._has_trial = preparation.has_trial
        self._trial: Mapping[str, Array] | None = None
        if preparation.trial_request:
            self._trial_file = directory_of(path) / preparation.trial_request
            self._trial = read_trial(self._trial_file, self.metadata)
        self._examine()

    def compile(self) -> None:
        """Compile the model for its device. Raises LoadError."""
        device, properties = self.compilation.device, self.compilation.properties
        try:
            # Unless the user enables it, OpenVINO does not map files of its cache either.
            self._compiled = _compile(self._read, device, {"ENABLE_MMAP": False, **properties})
        except RuntimeError as error:
            reason = self._source.clean(one_line(error))
            if "bad_alloc" in reason:
                inputs = ", ".join(f"{port.name} {port.describe_shape()}" for port in self.metadata.inputs.values())
                reason = f"not enough memory for inputs of {inputs}"
            raise LoadError(f"cannot be compiled for {device}: {reason}") from error
        self._source.check()  # some weights are read only now
        self._read = None
        if device == "CPU" and self._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16:
            self.notes = (_BF16_NOTE,)

    def open(self, retire: Callable[[], None]) -> None:
        """Make the model ready in this process: compile it unless it was inherited compiled, and infer once.

        The inference of a trial request has to succeed; if one with invented values fails, `warning` says so. `retire`
        is called after an inference whose failure leaves the model unusable in this process. Raises LoadError.
        """
        if self._compiled is None:
            self.compile()
        self._local = threading.local()  # the parent process may have left a session in it
        self._retire = retire
        if self._trial is not None:
            try:
                tensors = self._infer(self._trial)
            except (ShapeError, RuntimeError) as error:
                raise self._fail_trial(error) from error
            self._remember(self._trial, tensors)
        elif self._has_trial:
            self._infer_invented()

    def _fail_trial(self, error: Exception) -> LoadError:
        return LoadError(f"fails at its trial request {self._trial_file}: {find_reason(error)}")

    def _infer_invented(self) -> None:
        failure = "all shapes that were tried failed"
        metadata = [port.metadata for port in self._inputs]
        for arrays in itertools.chain.from_iterable(fill(metadata, shapes) for shapes in self._trials):
            try:
                tensors = self._infer(arrays)
            except ShapeError as error:  # about an output; the inference itself succeeded
                log.debug("model %r was warmed up with values that it cannot compute: %s", self.metadata.name, error)
                return
            except RuntimeError as error:
                failure = one_line(error)
            else:
                self._remember(arrays, tensors)
                self.invented = _describe_constants(arrays)
                return
        # Clients may know sizes and values that work.
        self.warning = (
            f'the trial with invented inputs failed: {failure}; in the configuration, "trial" can name a file with a '
            "request, or be false for no trial"
        )

    def infer(self, arrays: Mapping[str, Array], record: InferenceRecord | None = None) -> Mapping[str, Tensor]:
        """Infer with an array for every input; return a tensor for every output, by name.

        In a worker, a model with `max_batch_size` may infer together with other requests, and notes that in the record.
        The arrays must be writable, as OpenVINO reads them in place. The memory of a tensor lives as long as the
        tensor, but the thread's next inference may overwrite it. Raises InvalidRequestError for inputs that the model
        cannot compute, and BusyError when memory is short or the worker is about to be replaced.
        """
        return self.infer_alone(arrays) if self._batching is None else self._batching.infer(arrays, record)

    def infer_alone(self, arrays: Mapping[str, Array]) -> Mapping[str, Tensor]:
        """Infer, as `infer` does, but never together with other requests."""
        if self._is_damaged:
            return self._infer_damaged(arrays)
        shapes = tuple([arrays[port].shape for port in self._dynamic])
        is_known = not shapes or shapes in self._known
        if not is_known:
            try:
                self._check_shapes(_shapes_of(arrays))
            except ShapeError as error:
                raise self._cannot_compute(error) from error
        try:
            tensors = self._infer(arrays)
        except ShapeError as error:  # about an output; the inference itself succeeded
            raise self._cannot_compute(error) from error
        except RuntimeError as error:
            raise self._fail(error, _shapes_of(arrays)) from error
        if is_known:
            self._recovery.last = shapes
        else:
            self._remember(arrays, tensors)
        return tensors

    @property
    def trial(self) -> Mapping[str, Array] | None:
        """The inputs of the trial request in the config, None without one."""
        return self._trial

    @property
    def example(self) -> Mapping[str, Array] | None:
        """The inputs of the trial request, or the `invented` ones; None if the model has computed none of them."""
        if self._trial is not None or self.invented is None:
            return self._trial
        return {
            name: make_constant(self.metadata.inputs[name].datatype, tuple(shape), value)
            for name, (shape, value) in self.invented.items()
        }

    @property
    def trial_shapes(self) -> list[Mapping[str, Shape]]:
        """The shapes that the model is tried with otherwise, by input."""
        return self._trials

    # --- Shapes

    def _examine(self) -> None:
        """Prepare the checks of shapes, and have the model report what shapes alone do not show."""
        # The third tensor of strings, their symbols, has any length.
        shaped = {port.metadata.name: port.indices[:2] for port in self._inputs}
        checker = ShapeChecker(self._read, shaped)
        if self._dynamic and self._trial is not None:
            self._trials = [_shapes_of(self._trial)]
            try:
                checker.check(self._trials[0])
            except ShapeError as error:
                raise self._fail_trial(error) from error
        elif self._dynamic:
            computable = (shapes for shapes in self._trials if _is_computable(checker, shapes))
            self._trials = list(itertools.islice(computable, _MAX_TRIALS))
        self._guard = checker.add_guard(self._read, self._trials[0] if self._dynamic and self._trials else None)
        self._checker = checker if self._is_dynamic_within else None
        metadata = [port.metadata for port in self._inputs]
        self._recovery = Recovery(metadata, self._trials, self._check_shapes, self._infer)

    def _check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Raise ShapeError unless the model can compute inputs of these shapes."""
        if self._checker is not None:
            self._checker.check(shapes)

    def _remember(self, arrays: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> None:
        """Add the shapes of a successful inference to the known ones."""
        if len(self._known) >= _MAX_KNOWN_SHAPES:
            self._known.clear()
        self._known.add(tuple([arrays[port].shape for port in self._dynamic]))
        self._recovery.keep(arrays, tensors)

    # --- Failures

    def _cannot_compute(self, reason: object) -> InvalidRequestError:
        return InvalidRequestError(
            f"model {self.metadata.name!r} version {self.metadata.version} cannot compute this request: {reason}"
        )

    def _fail(self, error: RuntimeError, shapes: Mapping[str, Shape]) -> Exception:
        """Recover the model after a failed inference; return the error for the client."""
        name, version = self.metadata.name, self.metadata.version
        log.warning("inference of model %r version %s failed: %s", name, version, one_line(error))
        if self._is_dynamic_within and not self._is_untouched(error, shapes) and not self._recovery.recover(shapes):
            # The next request may recover it, if its shapes differ from those of the last success.
            log.warning("model %r version %s has not recovered from that failure yet", name, version)
            self._is_damaged = True
        if "bad_alloc" in str(error) or "ot enough memory" in str(error):
            return BusyError(f"not enough memory for this request to model {name!r} version {version}")
        return self._cannot_compute(find_reason(error))

    def _is_untouched(self, error: RuntimeError, shapes: Mapping[str, Shape]) -> bool:
        """Return whether a failed inference left the compiled model unchanged.

        It did if the shapes are those of the last success, and the only operation that makes shapes of values failed.
        """
        if self._checker is None or tuple([shapes[port] for port in self._dynamic]) != self._recovery.last:
            return False
        names = self._checker.find_value_dependent(shapes)
        return len(names) == 1 and f"'{names[0]}'" in str(error)

    def _infer_damaged(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Infer with a model that has not recovered from a failure, if that is safe.

        Otherwise the model is unusable in this process, which has to be replaced.
        """
        if self._is_broken or not self._recovery.differs_from_last(_shapes_of(arrays)):
            raise self._give_up()
        self._is_damaged = False
        tensors = self.infer(arrays)
        copies = {name: tensor._replace(array=copy_array(tensor.array)) for name, tensor in tensors.items()}
        if not self._recovery.is_sane():
            raise self._give_up()
        return copies

    def _give_up(self) -> BusyError:
        """Have this process replaced; return the error for the client, which may try again."""
        name, version = self.metadata.name, self.metadata.version
        if not self._is_broken:
            log.error("model %r version %s is unusable in this worker after a failed inference", name, version)
            self._is_damaged = self._is_broken = True
            self._retire()
        return BusyError(f"model {name!r} version {version} is unusable in this worker, which is being replaced")

    def _infer(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        try:
            session: _Session = self._local.session
        except AttributeError:
            session = self._local.session = _Session(
                self._compiled, self._inputs, self._outputs, self.has_state, self._guard
            )
        return session.infer(arrays)


def _describe_constants(arrays: Mapping[str, Array]) -> Invented:
    """Return shape and value of arrays of equal elements, 0 for empty strings."""
    return {
        name: (list(array.shape), 0 if isinstance(array, BytesArray) or not array.size else int(array.flat[0]))
        for name, array in arrays.items()
    }


def _shapes_of(arrays: Mapping[str, Array]) -> dict[str, Shape]:
    return {name: array.shape for name, array in arrays.items()}


def _is_computable(checker: ShapeChecker, shapes: Mapping[str, Shape]) -> bool:
    try:
        checker.check(shapes)
    except ShapeError:
        return False
    return True


class _Session:
    """OpenVINO's inference request for one thread, and its own memory for small inputs."""

    def __init__(
        self, compiled: Any, inputs: list[_Port], outputs: list[_Port], has_state: bool, guard: Guard | None
    ) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = inputs
        self._outputs = [(port, _READERS.get(port.metadata.datatype, _read_numbers)) for port in outputs]
        self._has_state = has_state
        self._guard = guard
        self._own: dict[int, NDArray[Any]] = {}
        # The inputs that OpenVINO reads in place at this inference, and may pass through as outputs.
        self._lent: list[NDArray[Any]] = []

    def infer(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Infer; see Model.infer. Raises RuntimeError.

        Raises ShapeError when the guard finds an output unwritten, and for an output of too many strings.
        """
        if self._has_state:
            self._request.reset_state()  # requests must not see each other's state
        if self._lent:  # left by a failed inference
            self._lent = []
        for port in self._inputs:
            array: Any = arrays[port.metadata.name]
            if isinstance(array, BytesArray):
                parts: tuple[NDArray[Any], ...] = (array.begins, array.ends, array.symbols)
                for index, part in zip(port.indices, parts, strict=True):
                    self._set(index, part)
            else:
                self._set(port.indices[0], array)
        results = list(_infer_base(self._request, {}, True, False).values())
        if self._lent:
            lent, self._lent = self._lent, []
            results = [_own(result, lent) for result in results]
        if self._guard is not None:
            self._guard.check(results[-1])
        return {port.metadata.name: read(port, results) for port, read in self._outputs}

    def _set(self, index: int, array: NDArray[Any]) -> None:
        if array.nbytes <= _SMALL_INPUT:
            own = self._own.get(index)
            if own is not None and own.shape == array.shape:
                own[...] = array
                return
            array = self._own[index] = array.copy()
        else:
            self._own.pop(index, None)
            self._lent.append(array)
        self._request.set_input_tensor(index, _share(array))


def _own(result: NDArray[Any], lent: list[NDArray[Any]]) -> NDArray[Any]:
    """Return an array that keeps its memory alive, by numpy's chain of bases.

    If a model passes an input through, OpenVINO (2026.4.1) returns a view that does not keep the input's memory alive.
    It becomes a view on the input's array.
    """
    for array in lent:
        if np.may_share_memory(result, array):
            memory = array.reshape(-1).view(np.uint8)
            offset = result.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
            return np.ndarray(result.shape, result.dtype, memory, offset, result.strides)
    return result


@functools.cache
def _core() -> openvino.Core:
    core = openvino.Core()
    with contextlib.suppress(RuntimeError):  # the first model will fail with the reason
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, which sets up a signal stack
    use_ordinary_stack()
    return core


def _read(source: Source, extension: str) -> openvino.Model:
    """Read a model, with an extension's operations, and those of tokenizers if some are missing. Raises LoadError."""
    source.check()
    if extension:
        extend(_core(), extension)
    try:
        try:
            return _read_model(source)
        except RuntimeError as error:
            tokenizers = find_tokenizers()
            if not lacks_operations(error) or tokenizers is None:
                raise
            extend(_core(), tokenizers)
            return _read_model(source)
    except RuntimeError as error:
        advice = f"; {ADVICE}" if lacks_operations(error) else ""
        raise LoadError(f"cannot read {source.file}: {source.clean(one_line(error))}{advice}") from error


def _read_model(source: Source) -> openvino.Model:
    paths = [source.model, source.weights] if source.weights else [source.model]
    return _core().read_model(*paths, config={"ENABLE_MMAP": source.may_map})


def _compile(model: openvino.Model, device: str, properties: dict[str, PluginValue]) -> Any:
    """Compile a model, or import it from the cache. Raises RuntimeError and LoadError.

    The cache is locked meanwhile, as OpenVINO writes its files in place: of 50 processes that filled a cache five at a
    time, two died of SIGBUS; of 100 with the lock, none. A model is compiled without the cache if another process keeps
    the lock.
    """
    uncached = {name: value for name, value in properties.items() if name != "CACHE_DIR"}
    if not properties.get("CACHE_DIR"):
        return _core().compile_model(model, device, uncached)
    directory = Path(str(properties["CACHE_DIR"]))
    refusal = _find_refusal(directory)
    if refusal:
        _log_refusal(directory, refusal)
    with _locked(directory) as is_ours:
        if is_ours and not refusal:
            return _core().compile_model(model, device, properties)
        if is_ours and os.path.isdir(directory):
            # Fails if OpenVINO tries to remove a file of the cache, such as one of another release.
            with contextlib.suppress(RuntimeError):
                return _core().compile_model(model, device, properties)
    return _core().compile_model(model, device, uncached)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a cache for the block; yield whether it may be used, which it may not while another process keeps the lock.

    A cache is used unlocked if it has no lock file, as it never had a writer, or that of another user.
    """
    try:
        lock = os.open(directory / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    with os.fdopen(lock, "rb"):
        # A process that has waited in vain does not wait for every other model, too.
        is_ours = _lock(lock, 0.0 if directory in _kept else _LOCK_SECONDS)
        if is_ours:
            _kept.discard(directory)
        elif directory not in _kept:
            _kept.add(directory)
            line = "another process keeps the cache directory %s locked; models are compiled without it meanwhile"
            log.warning(line, directory)
        yield is_ours


def _lock(descriptor: int, seconds: float) -> bool:
    """Lock a file exclusively within these seconds; return whether that succeeded, or is not supported."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:  # on a file system without locks
            return True
        else:
            return True


def _find_refusal(directory: Path) -> str | None:
    """Make a cache directory and its lock file; return the reason why they cannot be written, None if they can.

    Raises LoadError for a path that cannot be a directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Whoever may open the file may lock it.
        os.close(os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno in _UNWRITABLE:
            return os.strerror(error.errno)
        raise LoadError(f"the cache directory {directory} cannot be written: {error.strerror}") from error
    return None


@functools.cache
def _log_refusal(directory: Path, reason: str) -> None:
    line = "the cache directory %s cannot be written: %s; models that are missing there are compiled at each start"
    log.info(line, directory, reason)


@functools.cache
def _accepts(device: str, name: str, value: PluginValue) -> bool:
    """Return whether all named devices accept a property, even if they do not list it."""
    x = opset15.parameter([1], openvino.Type.f32)
    model = openvino.Model([opset15.result(opset15.relu(x))], [x], "")
    for part in _name_devices(device):
        try:
            _core().compile_model(model, part, {**(ONE_THREAD if part == "CPU" else {}), name: value})
        except RuntimeError as error:
            if "nsupported" in str(error):  # a wrong value is reported when the model is compiled
                return False
    return True


def _name_devices(device: str) -> list[str]:
    """Return the devices in a composite one, as AUTO and the like accept any property silently."""
    _, _, named = device.partition(":")
    return [name.partition("(")[0] for name in (named or device).replace("-", "").split(",") if name]


def _supported_properties(device: str) -> dict[str, str]:
    """Return the properties of a device, or of all devices in a composite one, each "RO" or "RW"."""
    supported: dict[str, str] = {}
    composite, _, named = device.partition(":")
    if not named and composite in ("AUTO", "MULTI"):
        named = ",".join(_core().available_devices)
    for name in [composite, *named.replace("-", "").split(",")]:
        with contextlib.suppress(RuntimeError):  # the compilation will report an unknown device
            supported |= _core().get_property(name.partition("(")[0], "SUPPORTED_PROPERTIES") if name else {}
    return supported


# --- Metadata


def _is_permutation(change: LayoutChange, rank: int) -> bool:
    client = change.client or ""
    return len(client) == rank and client.isalpha() and sorted(client) == sorted(change.model)


def _trace(port: TensorMetadata, preparation: Preparation, is_only: bool) -> TensorMetadata:
    """Record what the configuration changed of an input, and whether its precision can still be changed."""
    change = preparation.layouts.get(port.name) or (preparation.layouts.get(None) if is_only else None)
    layout, dims = "", tuple[Dim, ...]()
    if change and port.dims and _is_permutation(change, len(port.dims)):
        assert change.client
        layout = f"{change.client}:{change.model}"
        dims = tuple(port.dims[change.client.index(letter)] for letter in change.model)
    return dataclasses.replace(port, origin=Origin(layout, dims, is_only and preparation.precision is None))


def _describe(name: str, port: Any) -> TensorMetadata:
    element_type = port.get_element_type().get_type_name()
    if element_type not in _DATATYPES:
        raise LoadError(f"KServe v2 has no datatype for {element_type}, the element type of tensor {name!r}")
    shape = port.get_partial_shape()
    dims = None if shape.rank.is_dynamic else tuple(map(_describe_dim, shape))
    return TensorMetadata(name, _DATATYPES[element_type], dims)


def _describe_dim(dim: Any) -> Dim:
    high = dim.get_max_length()
    return Dim(dim.get_min_length(), None if high == -1 else high)


def _find_labels(rt_info: Mapping[str, Any] | None, path: Path) -> tuple[str, ...]:
    """Return the labels of the outputs' classes, from the model's rt_info or from the labels.txt of the version.

    The file is in the version's directory, or beside the model's single file, and has a label per line. If it cannot be
    read, the log says so and classes have no labels.
    """
    model_info = (rt_info or {}).get("model_info")
    labels = model_info.get("labels") if isinstance(model_info, dict) else None
    if isinstance(labels, str) and labels.split():
        return tuple(labels.split())
    file = directory_of(path) / _LABELS_FILE
    if not os.path.lexists(file):
        return ()
    try:
        lines = read_file(file, MAX_LABELS_BYTES).decode("utf-8-sig").removesuffix("\n").split("\n")
    except (LoadError, UnicodeDecodeError) as error:
        log.warning("classes have no labels, %s is ignored: %s", file, error)
        return ()
    return tuple(line.strip() for line in lines)


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _split_strings(
    model: openvino.Model, inputs: list[TensorMetadata], outputs: list[TensorMetadata]
) -> tuple[list[_Port], list[_Port]]:
    """Replace every string tensor by those of a _Port; return the ports in alphabetical order."""
    parameters = [[parameter] for parameter in model.get_parameters()]
    results = [[result] for result in model.get_results()]
    for nodes in parameters:
        if nodes[0].get_element_type() == openvino.Type.string:
            (whole,) = nodes
            shape = whole.get_partial_shape()
            nodes[:] = [
                opset15.parameter(shape, openvino.Type.i32),
                opset15.parameter(shape, openvino.Type.i32),
                opset15.parameter(openvino.PartialShape([-1]), openvino.Type.u8),
            ]
            pack = _factory.create("StringTensorPack", [node.output(0) for node in nodes], {})
            whole.output(0).replace(pack.output(0))
            model.remove_parameter(whole)
            model.add_parameters(nodes)
    for nodes in results:
        if nodes[0].get_element_type() == openvino.Type.string:
            (whole,) = nodes
            unpacked = _factory.create("StringTensorUnpack", [whole.input_value(0)], {})
            # For a tensor without elements StringTensorUnpack is skipped, and its outputs keep old values.
            shape = opset15.shape_of(whole.input_value(0))
            nodes[:] = [*(opset15.result(unpacked.output(index)) for index in range(3)), opset15.result(shape)]
            model.remove_result(whole)
            model.add_results(nodes)
    model.validate_nodes_and_infer_types()
    return (
        _sort_ports(inputs, parameters, model.get_parameter_index),
        _sort_ports(outputs, results, model.get_result_index),
    )


def _sort_ports(described: list[TensorMetadata], nodes: list[list[Any]], index_of: Any) -> list[_Port]:
    ports = [_Port(metadata, tuple(map(index_of, parts))) for metadata, parts in zip(described, nodes, strict=True)]
    return sorted(ports, key=lambda port: port.metadata.name)


# --- Arrays to and from OpenVINO


def _share(array: NDArray[Any]) -> openvino.Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # unknown to the binding
        bits = array.view(np.uint16)
        return openvino.Tensor(bits, bits.shape, openvino.Type.bf16)
    return openvino.Tensor(array, True)


def _read_numbers(port: _Port, results: list[NDArray[Any]]) -> Tensor:
    return Tensor(port.metadata.name, port.metadata.datatype, results[port.indices[0]])


def _read_bfloat16(port: _Port, results: list[NDArray[Any]]) -> Tensor:
    return Tensor(port.metadata.name, "BF16", results[port.indices[0]].view(ml_dtypes.bfloat16))


def _read_uint8(port: _Port, results: list[NDArray[Any]]) -> Tensor:
    """A matrix whose name ends in _string holds strings (protocol/README.md section 7, "Strings")."""
    name, array = port.metadata.name, results[port.indices[0]]
    if array.ndim == 2 and name.lower().endswith("_string"):
        _check_strings(name, len(array), array.size)
        return Tensor(name, BYTES, from_matrix(array))
    return Tensor(name, UINT8, array)


def _read_strings(port: _Port, results: list[NDArray[Any]]) -> Tensor:
    begins, ends, symbols, shape = (results[index] for index in port.indices)
    if 0 in shape:
        return Tensor(port.metadata.name, BYTES, BytesArray.of([], tuple(shape.tolist())))
    _check_strings(port.metadata.name, begins.size, symbols.size)
    return Tensor(port.metadata.name, BYTES, BytesArray(begins, ends, symbols))


def _check_strings(name: str, count: int, size: int) -> None:
    """Raise ShapeError for more strings than can be written in time, and for more bytes than their offsets can address.

    A request of 33 KB, decompressed to a matrix of 33,554,432 rows, would take 7.5 GB.
    """
    if count > MAX_ELEMENTS:
        raise ShapeError(f"output {name!r} has {count} strings, at most {MAX_ELEMENTS} are allowed")
    if size > MAX_BYTES:
        raise ShapeError(f"the strings of output {name!r} take {size} bytes, at most {MAX_BYTES} are allowed")


_READERS = {BYTES: _read_strings, UINT8: _read_uint8, "BF16": _read_bfloat16}
