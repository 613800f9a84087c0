"""Finding the code of a custom node by the `base_path` of its library."""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ovms_rest.errors import InferenceError, LoadError
from ovms_rest.log import log
from ovms_rest.pipelines.c_nodes import CNode, copy_library
from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.nodes.params import parse_params
from ovms_rest.pipelines.plan import Part
from ovms_rest.pipelines.probing import Code, probe
from ovms_rest.pipelines.python_nodes import Params, PythonNode, import_code, load_file, load_name

# The libraries in OVMS's image and the built-in modules that replace them.
OVMS_LIBRARIES = {
    "libcustom_node_add_one.so": "ovms_rest.pipelines.nodes.add_one",
    "libcustom_node_east_ocr.so": "ovms_rest.pipelines.nodes.east_ocr",
    "libcustom_node_face_blur.so": "ovms_rest.pipelines.nodes.face_blur",
    "libcustom_node_horizontal_ocr.so": "ovms_rest.pipelines.nodes.horizontal_ocr",
    "libcustom_node_image_transformation.so": "ovms_rest.pipelines.nodes.image_transformation",
    "libcustom_node_model_zoo_intel_object_detection.so": "ovms_rest.pipelines.nodes.object_detection",
}


def load_node(library: Library, params: Params, timeout: float, stop: Callable[[], bool] = lambda: False) -> Part:
    """Load the code of a library for one node with its params.

    `base_path` is a Python file (.py) or C library; otherwise one of OVMS's libraries, which built-in modules replace;
    otherwise a Python module, or an object in one, as `package.module:object`. Code that is not built in has a trial in
    a throwaway process first, for `timeout` seconds or until `stop` returns True. Raises LoadError, whose text does not
    name the library; a ChangingError for a file that is being written.
    """
    file = library.path.absolute()
    is_file = os.path.isfile(file)  # also False, unlike Path.is_file, where permission is denied
    try:
        if is_file and file.suffix == ".py":
            probe(Code("file", str(file), params), timeout, stop)
            return load_file(library.name, file, params)
        if is_file:
            return _load_c_node(library.name, file, params, timeout, stop)
        if file.name in OVMS_LIBRARIES:
            module = OVMS_LIBRARIES[file.name]
            log.info("library %r: there is no file %s; the built-in module %s replaces it", library.name, file, module)
            return PythonNode(library.name, _BuiltIn(library.name, import_code(module), params), params)
        if _is_python_name(library.base_path):
            probe(Code("name", library.base_path, params), timeout, stop)
            return load_name(library.name, library.base_path, params)
    except LoadError as error:
        raise type(error)(f"{file if is_file else library.base_path}: {error}") from error
    raise LoadError(
        f"there is no file {file}, and {library.base_path!r} is neither a Python module ('package.module' or "
        f"'package.module:object') nor one of {', '.join(OVMS_LIBRARIES)}"
    )


def _load_c_node(library: str, file: Path, params: Params, timeout: float, stop: Callable[[], bool]) -> CNode:
    """Load a C library; its trial and the workers open the same copy. Raises LoadError."""
    copy = copy_library(file)
    if copy is None:
        return CNode(library, file, params, probe(Code("c", str(file), params), timeout, stop))
    try:
        description = probe(Code("c", copy.path, params), timeout, stop, [copy.descriptor])
    except LoadError as error:
        raise type(error)(str(error).replace(copy.path, str(file))) from error
    return CNode(library, file, params, description, copy)


def is_there(library: Library) -> bool:
    """Return whether the code of a library exists, without loading it.

    For a name within a package, only the package is looked for: anything more would import it.
    """
    if os.path.isfile(library.path) or library.path.name in OVMS_LIBRARIES:
        return True
    try:
        return _is_python_name(library.base_path) and bool(find_spec(library.base_path.split(":")[0].split(".")[0]))
    except (ImportError, ValueError):  # a module that is loaded already, without a spec
        return True


class _BuiltIn:
    """A module of `pipelines.nodes` with its params, as the code of a Python node.

    Clients get the texts of its ValueErrors. The params that its functions are called with are ignored.
    """

    def __init__(self, library: str, module: Any, params: Params) -> None:
        """Read the params. Raises LoadError."""
        self._library = library
        self._module = module
        try:
            self._options = parse_params(module.Options, params)
        except ValueError as error:
            raise LoadError(str(error)) from error

    def inputs(self, params: Params) -> Any:
        return self._module.inputs(self._options)

    def outputs(self, params: Params) -> Any:
        return self._module.outputs(self._options)

    def execute(self, arrays: Mapping[str, NDArray[Any]], params: Params) -> Any:
        """Run the module. Raises InferenceError."""
        try:
            return self._module.execute(arrays, self._options)
        except ValueError as error:
            text = f"custom node library {self._library!r} failed: {error}"
            log.error("%s", text)
            raise InferenceError(text) from error


def _is_python_name(text: str) -> bool:
    """Return whether a text looks like the name of a module or object, not of a file."""
    return not text.endswith((".py", ".so")) and all(
        part.isidentifier() for name in text.split(":", 1) for part in name.split(".")
    )
