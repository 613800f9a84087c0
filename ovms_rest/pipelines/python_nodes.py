"""Custom nodes in Python: three functions of a module, or of an object in it.

    import numpy as np

    def inputs(params):
        return {"image": ("FP32", [1, -1, -1, 3])}

    def outputs(params):
        return {"image": ("FP32", [1, int(params["height"]), (1, 4096), 3])}

    def execute(inputs, params):
        return {"image": np.ascontiguousarray(inputs["image"][:, : int(params["height"])])}

README.md, "Custom nodes in Python", is the contract. Code is imported before the workers are forked, which share its
memory; it must not start threads, since a fork does not copy them. `execute` may be called by several threads.

A file is executed again for each node at each load, and can import modules from its directory meanwhile. A module that
is given by name is imported once and stays as it is until the service ends.
"""

import importlib
import itertools
import sys
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InferenceError, LoadError, ServingError
from ovms_rest.log import log
from ovms_rest.protocol.datatypes import BYTES, DATATYPE_NAMES, DATATYPES
from ovms_rest.protocol.strings import MAX_BYTES, BytesArray
from ovms_rest.protocol.tensors import MAX_DIM, Array, Dim, TensorMetadata
from ovms_rest.protocol.words import cut, join

Params = Mapping[str, str]
# The result of `inputs` and `outputs`: the datatype and dims of every tensor.
Tensors = Mapping[str, tuple[str, list[int | tuple[int, int]]]]
Execute = Callable[[Mapping[str, NDArray[Any]], Params], dict[str, NDArray[Any]]]

_FORM = "a datatype and dims, as in ('FP32', [1, -1, (1, 512)])"
_FUNCTIONS = {"inputs": "inputs(params)", "outputs": "outputs(params)", "execute": "execute(inputs, params)"}
_MAX_TEXT = 500
# The files on the stack between our call and the node's code.
_BETWEEN = (__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


class PythonNode:
    """A custom node in Python."""

    model = None

    def __init__(self, library: str, code: object, params: Params) -> None:
        """Get the inputs and outputs of the code, a module or an object. Raises LoadError."""
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
        """Do nothing: code in Python is loaded before the fork."""

    def execute(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run the code; return its declared outputs, which share no memory with the inputs.

        Raises InferenceError, and every ServingError that the code raises for the client.
        """
        views: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            views[name] = view = _to_objects(array) if isinstance(array, BytesArray) else array.view()
            view.setflags(write=False)
        try:
            found = self._execute(views, self._params)
        except ServingError:
            raise
        except BaseException as error:  # SystemExit too: a node must not end the worker
            log.exception("custom node library %r failed", self._library)
            raise InferenceError(
                f"custom node library {self._library!r} failed: the reason is in the server's log"
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
                kind = _name_of(type(element))
                raise self._blame(f"returned element {index} of output {name!r} as {kind}, expected bytes or str")
        size = sum(map(len, elements))
        if size > MAX_BYTES:
            raise self._blame(f"returned output {name!r} with {size} bytes; at most {MAX_BYTES} are allowed")
        return BytesArray.of(elements, objects.shape)

    def _blame(self, fault: str) -> InferenceError:
        text = f"custom node library {self._library!r} {fault}"
        log.error("%s", text)
        return InferenceError(text)


def _dtype_of(tensor: TensorMetadata) -> np.dtype[Any]:
    return np.dtype(object) if tensor.datatype == BYTES else DATATYPES[tensor.datatype].dtype


def _to_objects(array: BytesArray) -> NDArray[Any]:
    objects = np.empty(len(elements := array.elements()), object)
    objects[:] = elements
    return objects.reshape(array.shape)


def _find_fault(found: dict[str, Any], metadata: TensorMetadata, dtype: np.dtype[Any]) -> str:
    """Return why an output is invalid."""
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
    """Execute a file and make a node of it; its module is forgotten with the node. Raises LoadError."""
    name = f"ovms_rest_node_{uuid.uuid4().hex}"  # unique, since dataclasses and others look up their module by name
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
    """A loader without a bytecode cache, which would miss a change within the same second and of the same size."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Make the modules of a directory importable, and forget them afterwards: each load of a node has its own."""
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    find = partial(_make_finder, directory)
    sys.path_hooks.insert(0, find)
    _forget_finders(directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have removed it
            sys.path.remove(str(directory))
        with suppress(ValueError):
            sys.path_hooks.remove(find)
        _forget_finders(directory)
        new = {name: sys.modules[name] for name in sys.modules.keys() - before}
        beside = {name for name, module in new.items() if _is_in(module, directory)}
        for name in new:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _make_finder(directory: Path, place: str) -> FileFinder:
    """Return a finder of modules in a directory, or below it, that has no bytecode cache either (a path hook)."""
    if not Path(place).is_relative_to(directory) or not Path(place).is_dir():  # a file may be an archive of modules
        raise ImportError
    return FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Source, SOURCE_SUFFIXES))


def _forget_finders(directory: Path) -> None:
    for place in [place for place in sys.path_importer_cache if Path(place).is_relative_to(directory)]:
        del sys.path_importer_cache[place]


def _is_in(module: ModuleType, directory: Path) -> bool:
    """Return whether a module or package lies directly in a directory."""
    file = Path(getattr(module, "__file__", None) or "/")
    return directory == (file.parent.parent if file.name == "__init__.py" else file.parent)


@contextmanager
def _translated(beginning: str) -> Iterator[None]:
    """Turn every exception of the code into a one-line LoadError with its place, which begins with this text."""
    try:
        yield
    except LoadError:
        raise
    except BaseException as error:  # SystemExit too: a module must not end the service
        name = type(error).__name__
        text = " ".join(str(error).split())[:_MAX_TEXT]
        raise LoadError(f"{beginning} {name}{text and ': '}{text}{_find_place(error)}") from error


def _find_place(error: BaseException) -> str:
    """Find the line of the node's code that an exception came from, skipping this file and the import machinery."""
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__))
    places = (f" at {file}:{line}" for file, line in frames if file not in _BETWEEN)
    return next(places, "")


# --- Inputs and outputs


def _describe(kind: str, code: object, params: Params) -> dict[str, TensorMetadata]:
    """Return the inputs or outputs of the code in alphabetical order."""
    function = _FUNCTIONS[kind]
    with _translated(f"{function} failed with"):
        tensors = getattr(code, kind)(params)
    if not isinstance(tensors, dict) or not tensors:
        raise LoadError(f"{function} returned {_show(tensors)}, expected a dict with {_FORM} for each tensor")
    for name in tensors:
        if type(name) is not str or not name:
            raise LoadError(f"{function} returned the name {_show(name)}, expected a non-empty string")
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
    """Return the repr of a value as one line, cut where it is long."""
    return cut(" ".join(repr(value).split()))
