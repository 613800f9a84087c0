"""Custom nodes that are written in Python: three functions of a module, or of an object in it.

    import numpy as np

    def inputs(params):
        return {"image": ("FP32", [1, -1, -1, 3])}

    def outputs(params):
        return {"image": ("FP32", [1, int(params["height"]), (1, 4096), 3])}

    def execute(inputs, params):
        return {"image": np.ascontiguousarray(inputs["image"][:, : int(params["height"])])}

`inputs` and `outputs` tell every tensor with its datatype, by the name that KServe v2 has for it, and its dims: each a
size, -1 for any, or (low, high) with both ends included. `execute` gets an ndarray of each input, of that datatype and
within these dims, and returns a dict with an ndarray for each output; it may return more, which is ignored. BYTES are
ndarrays of dtype object whose elements are bytes; as an output they may also be str, which is encoded as UTF-8. The
inputs are read-only, and last no longer than the call. An output that is not C-contiguous or not writable, as every
view of an input, is copied. `params` are those of the node in the config file, strings by name.

Whatever the module does when it is imported, as reading weights, is done once, before the workers are forked: they
share the memory. It must not start threads, which a fork leaves behind. `execute` may be called by several threads.

A client whose request cannot be right is told so by raising `ovms_rest.errors.InvalidRequestError`, with words for it.
Any other exception is an error of the server: it goes to the log, with its traceback.

A file is executed anew for each node at each load, and what lies in its directory can be imported meanwhile; a module
that is named is imported, and so stays as it was imported first until the service ends.
"""

import importlib
import itertools
import logging
import sys
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InferenceError, LoadError, ServingError
from ovms_rest.protocol.datatypes import BYTES, DATATYPE_NAMES, DATATYPES
from ovms_rest.protocol.strings import MAX_BYTES, BytesArray
from ovms_rest.protocol.tensors import MAX_DIM, Array, Dim, TensorMetadata
from ovms_rest.protocol.words import cut, join

log = logging.getLogger("gunicorn.error.ovms_rest")

Params = Mapping[str, str]
# What `inputs` and `outputs` return: the datatype and the dims of every tensor.
Tensors = Mapping[str, tuple[str, list[int | tuple[int, int]]]]
Execute = Callable[[Mapping[str, NDArray[Any]], Params], dict[str, NDArray[Any]]]

_FORM = "a datatype and dims, as in ('FP32', [1, -1, (1, 512)])"
_FUNCTIONS = {"inputs": "inputs(params)", "outputs": "outputs(params)", "execute": "execute(inputs, params)"}
_MAX_TEXT = 500
# The files between a call of a node's code and that code.
_BETWEEN = (__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


class PythonNode:
    """A custom node whose code is in Python."""

    def __init__(self, library: str, code: object, params: Params) -> None:
        """Ask the code, a module or an object, for its inputs and outputs. Raises LoadError."""
        missing = [form for name, form in _FUNCTIONS.items() if not callable(getattr(code, name, None))]
        if missing:
            raise LoadError(f"has no function {' and no '.join(missing)}")
        self._library = library
        self._params: Params = MappingProxyType(dict(params))
        self._execute: Execute = code.execute  # type: ignore[attr-defined]
        self.inputs: Mapping[str, TensorMetadata] = _describe("inputs", code, self._params)
        self.outputs: Mapping[str, TensorMetadata] = _describe("outputs", code, self._params)
        self._expected = [(name, _dtype_of(one), one) for name, one in self.outputs.items()]

    def open(self) -> None:
        """Do nothing: the code was loaded before the fork."""

    def execute(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run the code; return its declared outputs, which share no memory with the inputs. Raises InferenceError.

        What the code raises for the client, a ServingError, is passed on.
        """
        views: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            views[name] = view = _to_objects(array) if isinstance(array, BytesArray) else array.view()
            view.setflags(write=False)
        try:
            found = self._execute(views, self._params)
        except ServingError:
            raise
        except BaseException as error:  # SystemExit too: the worker is not the node's to end
            log.exception("pipeline node code %r failed", self._library)
            raise InferenceError(
                f"pipeline node code {self._library!r} failed: the reason is in the log of the server"
            ) from error
        if not isinstance(found, dict):
            raise self._blame(f"returned {_show(found)}, expected a dict with an ndarray for each output")
        taken: dict[str, Array] = {}
        for name, dtype, metadata in self._expected:
            output: Any = found.get(name)
            if type(output) is not np.ndarray or output.dtype != dtype or not metadata.holds(output.shape):
                raise self._blame(_find_fault(found, metadata, dtype))
            if metadata.datatype == BYTES:
                taken[name] = self._to_strings(name, output)
            else:
                taken[name] = output if output.flags.carray else output.copy()
        return taken

    def _to_strings(self, name: str, objects: NDArray[Any]) -> BytesArray:
        elements = objects.ravel().tolist()
        for index, element in enumerate(elements):
            if type(element) is str:
                elements[index] = element.encode("utf-8", "surrogatepass")
            elif type(element) is not bytes:
                fault = f"element {index} of output {name!r} is a {_name_of(type(element))}, expected bytes or str"
                raise self._blame(f"returned a tensor with another type: {fault}")
        size = sum(map(len, elements))
        if size > MAX_BYTES:
            raise self._blame(f"returned output {name!r} with {size} bytes, at most {MAX_BYTES} are allowed")
        return BytesArray.of(elements, objects.shape)

    def _blame(self, fault: str) -> InferenceError:
        text = f"pipeline node code {self._library!r} {fault}"
        log.error("%s", text)
        return InferenceError(text)


def _dtype_of(tensor: TensorMetadata) -> np.dtype[Any]:
    return np.dtype(object) if tensor.datatype == BYTES else DATATYPES[tensor.datatype].dtype


def _to_objects(array: BytesArray) -> NDArray[Any]:
    objects = np.empty(len(elements := array.elements()), object)
    objects[:] = elements
    return objects.reshape(array.shape)


def _find_fault(found: dict[str, Any], metadata: TensorMetadata, dtype: np.dtype[Any]) -> str:
    """Tell what is wrong with an output."""
    name = metadata.name
    if name not in found:
        return f"returned no output {name!r}, only {', '.join(map(_show, found)) or 'an empty dict'}"
    output = found[name]
    if type(output) is not np.ndarray:
        return f"returned a {_name_of(type(output))} as output {name!r}, expected a numpy.ndarray"
    if output.dtype != dtype:
        return f"returned output {name!r} with the dtype {output.dtype}, expected {dtype} for {metadata.datatype}"
    return f"returned output {name!r} with the shape {join(output.shape)}, expected {metadata.describe_shape()}"


# --- Loading


def load_file(library: str, file: Path, params: Params) -> PythonNode:
    """Execute a file and make a node of the module, which is forgotten with the node. Raises LoadError."""
    name = f"ovms_rest_node_{uuid.uuid4().hex}"  # unique, for what looks itself up by the name of its module
    spec = spec_from_file_location(name, file, loader=_Source(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        with _importable(file.parent), _translated("cannot be imported:"):
            spec.loader.exec_module(module)
        node = PythonNode(library, module, params)
    except LoadError:
        del sys.modules[name]
        raise
    weakref.finalize(node, sys.modules.pop, name, None).atexit = False
    return node


def load_name(library: str, name: str, params: Params) -> PythonNode:
    """Import `package.module` or `package.module:object` and make a node of it. Raises LoadError."""
    return PythonNode(library, import_code(name), params)


def import_code(name: str) -> object:
    """Import `package.module` or `package.module:object`. Raises LoadError."""
    module, _, attributes = name.partition(":")
    with _translated("cannot be imported:"):
        code: object = importlib.import_module(module)
    for attribute in filter(None, attributes.split(".")):
        try:
            code = getattr(code, attribute)
        except AttributeError as error:
            raise LoadError(f"the module {module!r} has no {attributes!r}") from error
    return code


class _Source(SourceFileLoader):
    """Compiles the file as it is: a bytecode cache would not notice a change of the same second and size."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the file."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Have modules of a directory importable meanwhile, and forget them then: another load, or node, has its own."""
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have removed it
            sys.path.remove(str(directory))
        new = {name: sys.modules[name] for name in sys.modules.keys() - before}
        beside = {name for name, module in new.items() if _is_in(module, directory)}
        for name in new:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _is_in(module: ModuleType, directory: Path) -> bool:
    """Tell whether a file or package lies in a directory itself."""
    file = Path(getattr(module, "__file__", None) or "/")
    return directory == (file.parent.parent if file.name == "__init__.py" else file.parent)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn all that code raises into a LoadError of one line, with the place; `what` begins it."""
    try:
        yield
    except LoadError:
        raise
    except BaseException as error:  # SystemExit too: the service is not the module's to end
        name = type(error).__name__
        said = " ".join(str(error).split())[:_MAX_TEXT]
        raise LoadError(f"{what} {name}{said and ': '}{said}{_find_place(error)}") from error


def _find_place(error: BaseException) -> str:
    """Find the line of the node's code that an exception came from, below this file and the machinery of imports."""
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__))
    places = (f" at {file}:{line}" for file, line in frames if file not in _BETWEEN)
    return next(places, "")


# --- What it takes and gives


def _describe(kind: str, code: object, params: Params) -> dict[str, TensorMetadata]:
    """Ask for the inputs or outputs; return them in alphabetical order."""
    function = _FUNCTIONS[kind]
    with _translated(f"{function} failed with"):
        tensors = getattr(code, kind)(params)
    if not isinstance(tensors, dict) or not tensors:
        raise LoadError(f"{function} returned {_show(tensors)}, expected a dict with {_FORM} for each tensor")
    for name in tensors:
        if type(name) is not str or not name:
            raise LoadError(f"{function} returned the name {_show(name)}, expected a string that is not empty")
    return {name: _describe_tensor(function, name, tensors[name]) for name in sorted(tensors)}


def _describe_tensor(function: str, name: str, tensor: Any) -> TensorMetadata:
    label = f"{function} returned for {name!r}"
    if type(tensor) not in (tuple, list) or len(tensor) != 2 or type(tensor[1]) not in (tuple, list):
        raise LoadError(f"{label} {_show(tensor)}, expected {_FORM}")
    datatype, dims = tensor
    if type(datatype) is not str or datatype not in DATATYPE_NAMES:
        raise LoadError(f"{label} the datatype {_show(datatype)}, expected one of {', '.join(DATATYPE_NAMES)}")
    return TensorMetadata(name, datatype, tuple(itertools.starmap(_read_dim, ((label, dim) for dim in dims))))


def _read_dim(label: str, dim: Any) -> Dim:
    if type(dim) is int and dim == -1:
        return Dim(0, None)
    low, high = dim if type(dim) in (tuple, list) and len(dim) == 2 else (dim, dim)
    if type(low) is not int or type(high) is not int or not 0 <= low <= high <= MAX_DIM:
        raise LoadError(f"{label} the dim {_show(dim)}, expected a size, -1 for any, or (low, high)")
    return Dim(low, high)


def _name_of(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _show(value: object) -> str:
    """Repeat a value of the code, in one line and cut where it is long."""
    return cut(" ".join(repr(value).split()))
