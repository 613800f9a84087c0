"""Custom nodes in C: OVMS's `custom_node_interface.h`, called by ctypes.

A library runs in the workers only, so that a crash ends one of them; the arbiter learns its inputs and outputs from a
throwaway process. It is initialized in every worker, once for each node, and never deinitialized: a worker serves one
generation of models, and its memory ends with it.

Ownership of memory is as in OVMS (`customnodesession.cpp`, `node_library_utils.cpp`): after a call that returned 0,
`release` is called for the `data` and `dims` of every output, the `dims` of every info, and last for their array.
The library keeps the names, and everything that a call allocated before it returned another value.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InferenceError, LoadError
from ovms_rest.log import log
from ovms_rest.models.copies import FileCopy, copy_file
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.protocol.tensors import MAX_DIM, Dim, TensorMetadata
from ovms_rest.protocol.words import join

# "inputs" and "outputs": the datatype and dims of each tensor by name, 0 for any size.
Description = dict[str, dict[str, tuple[str, list[int]]]]

_FUNCTIONS = ("initialize", "deinitialize", "execute", "getInputsInfo", "getOutputsInfo", "release")

# CustomNodeTensorPrecision, without UNSPECIFIED, which is 0.
_DATATYPES = dict(enumerate(("FP32", "FP16", "UINT8", "INT8", "INT16", "UINT16", "INT32", "FP64", "INT64"), 1))
_PRECISIONS = {datatype: precision for precision, datatype in _DATATYPES.items()}
_EXPECTED_PRECISION = "expected one from 1 (FP32) to 9 (I64)"

# Larger numbers come from memory that the library did not initialize.
MAX_TENSORS = 1024
MAX_RANK = 32


class _Tensor(ctypes.Structure):
    """A CustomNodeTensor."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("dims", ctypes.c_void_p),
        ("rank", ctypes.c_uint64),
        ("precision", ctypes.c_int),
    )


class _Info(ctypes.Structure):
    """A CustomNodeTensorInfo."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dims", ctypes.c_void_p),
        ("rank", ctypes.c_uint64),
        ("precision", ctypes.c_int),
    )


class _Param(ctypes.Structure):
    """A CustomNodeParam."""

    _fields_ = (("key", ctypes.c_char_p), ("value", ctypes.c_char_p))


class CNode:
    """A custom node in C."""

    model = None

    def __init__(
        self, library: str, file: Path, params: Mapping[str, str], description: Any, copy: FileCopy | None = None
    ) -> None:
        """Make a node of the result of `describe` in another process, and of the `copy` of the file if there is one."""
        self._library = library
        self._file = file
        self._copy = copy
        self._params = dict(params)
        self.inputs: Mapping[str, TensorMetadata] = _read_description(description["inputs"])
        self.outputs: Mapping[str, TensorMetadata] = _read_description(description["outputs"])
        self._names = {name: (name.encode(), _PRECISIONS[one.datatype]) for name, one in self.inputs.items()}
        self._expected = {
            name.encode(): (one, _PRECISIONS[one.datatype], DATATYPES[one.datatype].dtype)
            for name, one in self.outputs.items()
        }
        self._code: _Code

    def open(self) -> None:
        """Open and initialize the library in this process. Raises LoadError."""
        try:
            self._code = _Code(self._file, self._params, self._copy)
            self._code.initialize()
        except LoadError as error:
            raise LoadError(f"library {self._library!r} ({self._file}): {error}") from error

    def execute(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the library; return copies of its declared outputs. Raises InferenceError."""
        try:
            return self._execute(arrays)
        except InferenceError as error:
            log.error("%s", error)
            raise

    def _execute(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        inputs: Any = (_Tensor * len(arrays))()
        kept = []  # keeps the memory of the pointers alive
        for tensor, (name, given) in zip(inputs, arrays.items(), strict=True):
            array = given if given.flags.c_contiguous else given.copy()
            dims = (ctypes.c_uint64 * array.ndim)(*array.shape)
            kept.append((array, dims))
            tensor.name, tensor.precision = self._names[name]
            tensor.data, tensor.bytes = array.ctypes.data, array.nbytes
            tensor.dims, tensor.rank = ctypes.addressof(dims), array.ndim
        outputs, count = ctypes.c_void_p(), ctypes.c_int()
        status = self._code.execute(inputs, len(arrays), outputs, count)
        if status:
            raise self._blame(f"failed: execute returned {status}, expected 0")
        if not outputs:
            raise self._blame("returned NULL as the array of outputs")
        if not 0 < count.value <= MAX_TENSORS:
            self._code.release(outputs)
            raise self._blame(f"returned {count.value} outputs, expected 1 to {MAX_TENSORS}")
        taken: dict[str, NDArray[Any]] = {}
        fault: InferenceError | None = None
        for tensor in (_Tensor * count.value).from_address(outputs.value or 0):
            try:
                self._take(tensor, taken)
            except InferenceError as error:  # the others must be released first
                fault = fault or error
            self._code.release(tensor.data)
            self._code.release(tensor.dims)
        self._code.release(outputs)
        if fault:
            raise fault
        for name in self.outputs:
            if name not in taken:
                raise self._blame(f"returned no output {name!r}")
        return taken

    def _take(self, tensor: Any, taken: dict[str, NDArray[Any]]) -> None:
        """Copy an output if it is declared. Raises InferenceError for one that does not fit its declaration."""
        if tensor.name is None:
            raise self._blame("returned an output without a name")
        if tensor.name not in self._expected:
            return
        metadata, precision, dtype = self._expected[tensor.name]
        name = metadata.name
        if name in taken:
            raise self._blame(f"returned output {name!r} twice")
        if tensor.precision != precision:
            raise self._blame(
                f"returned output {name!r} with the precision {tensor.precision}, "
                f"expected {precision} for {metadata.datatype}"
            )
        if not tensor.dims or not 0 < tensor.rank <= MAX_RANK:
            raise self._blame(f"returned output {name!r} with {_describe_dims(tensor)}, expected 1 to {MAX_RANK}")
        shape = tuple((ctypes.c_uint64 * tensor.rank).from_address(tensor.dims))
        if not metadata.holds(shape):
            raise self._blame(
                f"returned output {name!r} with the shape {join(shape)}, expected {metadata.describe_shape()}"
            )
        size = math.prod(shape) * dtype.itemsize
        if tensor.bytes != size:
            raise self._blame(
                f"returned output {name!r} with {tensor.bytes} bytes of data, expected {size} "
                f"for the shape {join(shape)} of {metadata.datatype}"
            )
        if size and not tensor.data:
            raise self._blame(f"returned output {name!r} with NULL data, expected {size} bytes")
        try:
            array = np.empty(shape, dtype)
        except (MemoryError, ValueError) as error:  # ValueError: more than numpy can address
            raise self._blame(
                f"returned output {name!r} with {size} bytes of data, which is more than the free memory"
            ) from error
        if size:
            ctypes.memmove(array.ctypes.data, tensor.data, size)
        taken[name] = array

    def _blame(self, fault: str) -> InferenceError:
        return InferenceError(f"custom node library {self._library!r} {fault}")


# The copies opened in this process: the linker identifies a library by its path, so no path may be used again.
_opened: list[FileCopy] = []

# Strings in libraries that find other files relative to their own path, which a copy does not have.
_USES_ITS_PATH = (b"$ORIGIN", b"${ORIGIN}", b"\0dladdr\0")


def copy_library(file: Path) -> FileCopy | None:
    """Return a private copy of a library's file, None if it must be opened in place. Raises LoadError.

    An open library is mapped into memory: if its file is overwritten, workers run other code or die of SIGBUS.
    """
    try:
        copy = copy_file(file)
    except OSError as error:
        log.warning("library %s is opened in place, since it cannot be copied: %s", file, error.strerror)
        return None
    with open(copy.path, "rb") as stream:
        content = stream.read()
    if any(word in content for word in _USES_ITS_PATH):
        log.info("library %s is opened in place, since it looks for files near it; replace it by renaming only", file)
        return None
    return copy


def describe(file: Path, params: Mapping[str, str], report: Callable[[str], None]) -> Description:
    """Open and initialize a library; return its inputs and outputs. Reports each step to `report`. Raises LoadError."""
    report("being opened")
    code = _Code(file, params)
    report("in initialize")
    code.initialize()
    found = {}
    for kind, function in (("inputs", "getInputsInfo"), ("outputs", "getOutputsInfo")):
        report(f"in {function}")
        found[kind] = code.ask(function)
    return found


class _Code:
    """An open library with the params and the handle of one node."""

    def __init__(self, file: Path, params: Mapping[str, str], copy: FileCopy | None = None) -> None:
        """Open the library, or its copy. Raises LoadError."""
        path = copy.path if copy else str(file)
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            reason = " ".join(str(error).split()).replace(path, str(file))
            raise LoadError(f"cannot be opened: {reason}") from error
        if copy:
            _opened.append(copy)
        self._file = file
        missing = [name for name in _FUNCTIONS if not hasattr(self._library, name)]
        if missing:
            raise LoadError(
                f"has no function {' and no '.join(missing)}, which OVMS's custom_node_interface.h requires"
            )
        self._count = len(params)
        self._params: Any = None
        if params:
            encoded = [_Param(key.encode(), value.encode()) for key, value in params.items()]
            self._params = (_Param * len(params))(*encoded)
        self._manager = ctypes.c_void_p()
        self._execute: Any = self._library.execute
        self._release: Any = self._library.release
        self._release.argtypes = (ctypes.c_void_p, ctypes.c_void_p)

    def initialize(self) -> None:
        """Call `initialize`. Raises LoadError."""
        status = self._library.initialize(ctypes.byref(self._manager), self._params, self._count)
        if status:
            raise LoadError(f"initialize returned {status}, expected 0")

    def execute(self, inputs: Any, count: int, outputs: Any, outputs_count: Any) -> int:
        status: int = self._execute(
            inputs, count, ctypes.byref(outputs), ctypes.byref(outputs_count), self._params, self._count, self._manager
        )
        return status

    def release(self, pointer: Any) -> None:
        """Call `release`, unless the pointer is NULL."""
        if pointer and self._release(pointer, self._manager):
            log.error("custom node library %s failed to release its memory", self._file)

    def ask(self, function: str) -> dict[str, tuple[str, list[int]]]:
        """Call `getInputsInfo` or `getOutputsInfo`; return the tensors in alphabetical order. Raises LoadError."""
        infos, count = ctypes.c_void_p(), ctypes.c_int()
        call: Any = getattr(self._library, function)
        status = call(ctypes.byref(infos), ctypes.byref(count), self._params, self._count, self._manager)
        if status:
            raise LoadError(f"{function} returned {status}, expected 0")
        if not infos:
            raise LoadError(f"{function} returned NULL as the array")
        if not 0 < count.value <= MAX_TENSORS:
            self.release(infos)
            raise LoadError(f"{function} returned {count.value} tensors, expected 1 to {MAX_TENSORS}")
        found: dict[str, tuple[str, list[int]]] = {}
        fault: LoadError | None = None
        for info in (_Info * count.value).from_address(infos.value or 0):
            try:
                _read_info(function, info, found)
            except LoadError as error:  # the others must be released first
                fault = fault or error
            self.release(info.dims)
        self.release(infos)
        if fault:
            raise fault
        return dict(sorted(found.items()))


def _read_info(function: str, info: Any, found: dict[str, tuple[str, list[int]]]) -> None:
    if not info.name:
        raise LoadError(f"{function} returned a tensor without a name")
    try:
        name = info.name.decode()
    except UnicodeDecodeError as error:
        raise LoadError(f"{function} returned the name {info.name!r}, which is not UTF-8") from error
    label = f"{function} returned tensor {name!r}"
    if name in found:
        raise LoadError(f"{label} twice")
    if info.precision not in _DATATYPES:
        raise LoadError(f"{label} with the precision {info.precision}, {_EXPECTED_PRECISION}")
    if not info.dims or not 0 < info.rank <= MAX_RANK:
        raise LoadError(f"{label} with {_describe_dims(info)}, expected 1 to {MAX_RANK}")
    sizes = list((ctypes.c_uint64 * info.rank).from_address(info.dims))
    if max(sizes) > MAX_DIM:
        raise LoadError(f"{label} with the dims {join(sizes)}, expected at most {MAX_DIM} each")
    found[name] = _DATATYPES[info.precision], sizes


def _describe_dims(record: Any) -> str:
    return f"{record.rank} dims" if record.dims else "NULL dims"


def _read_description(tensors: Mapping[str, Any]) -> dict[str, TensorMetadata]:
    return {
        name: TensorMetadata(name, datatype, tuple(Dim(size, size or None) for size in sizes))
        for name, (datatype, sizes) in tensors.items()
    }
