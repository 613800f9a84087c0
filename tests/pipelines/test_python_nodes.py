"""Custom nodes in Python: their inputs and outputs, loading, and failures."""

import re
import sys

import numpy as np
import pytest
from node_cases import PYTHON_NODE, run_python_node

from ovms_rest.errors import InferenceError, InvalidRequestError, LoadError
from ovms_rest.pipelines.python_nodes import PythonNode, load_file, load_name
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, TensorMetadata

X = np.array([[1, 2], [3, 4]], np.float32)


class Code:
    """A node x FP32 [-1,2] -> y FP32 [-1,2] whose functions a test can replace."""

    def __init__(self, execute=lambda inputs, params: {"y": inputs["x"] + 1}, **tensors):
        self.execute = execute
        self.inputs = lambda params: tensors.get("inputs", {"x": ("FP32", [-1, 2])})
        self.outputs = lambda params: tensors.get("outputs", {"y": ("FP32", [-1, 2])})


def node_of(execute=None, params=None, **tensors):
    """Make a node of a function of the inputs."""
    code = Code(**tensors) if execute is None else Code(lambda inputs, params: execute(inputs), **tensors)
    return PythonNode("lib", code, params or {})


def returning(value):
    return node_of(lambda inputs: value)


def failing(kind, *arguments):
    def fail(*_):
        raise kind(*arguments)

    return fail


# --- Inputs and params


def test_a_node_runs_its_code():
    found = node_of().execute({"x": X})
    assert list(found) == ["y"]
    assert np.array_equal(found["y"], X + 1)


def test_inputs_are_read_only_for_the_code_and_writable_for_others():
    given = X.copy()
    with pytest.raises(InferenceError):
        node_of(lambda inputs: inputs["x"].fill(9)).execute({"x": given})
    assert given.flags.writeable
    assert np.array_equal(given, X)


def test_inputs_are_not_copied():
    seen = []
    node_of(lambda inputs: seen.append(inputs["x"]) or {"y": X}).execute({"x": X})
    assert np.shares_memory(seen[0], X)


def test_the_params_are_read_only_for_all_functions():
    class Asked:
        @staticmethod
        def inputs(params):
            return {"x": ("FP32", [int(params["width"])])}

        outputs = inputs

        @staticmethod
        def execute(inputs, params):
            params["width"] = "9"

    node = PythonNode("lib", Asked, {"width": "2"})
    assert node.inputs["x"].static_shape == (2,)
    with pytest.raises(InferenceError):
        node.execute({"x": X[0]})


def test_opening_a_node_does_nothing():
    assert node_of().open() is None


# --- Strings


def text_node(execute):
    tensors = {"text": ("BYTES", [-1, 2])}
    return node_of(execute, inputs=tensors, outputs=tensors)


TEXTS = BytesArray.of([b"a", b"", b"\xff\0", "ü".encode()], (2, 2))


def test_strings_are_arrays_of_bytes_objects():
    seen = []

    def reverse(inputs):
        seen.append(inputs["text"])
        return {"text": np.vectorize(lambda text: text[::-1], otypes=[object])(inputs["text"])}

    found = text_node(reverse).execute({"text": TEXTS})["text"]
    assert (seen[0].dtype, seen[0].tolist()) == (np.dtype(object), [[b"a", b""], [b"\xff\0", "ü".encode()]])
    assert not seen[0].flags.writeable
    assert (found.shape, found.elements()) == ((2, 2), [b"a", b"", b"\0\xff", "ü".encode()[::-1]])


def test_str_is_encoded_as_utf8():
    found = text_node(lambda inputs: {"text": np.array([["ü", b"a"]], object)}).execute({"text": TEXTS})
    assert found["text"].elements() == ["ü".encode(), b"a"]


def test_an_empty_tensor_of_strings_is_accepted():
    found = text_node(lambda inputs: {"text": np.empty((0, 2), object)}).execute({"text": TEXTS})["text"]
    assert (found.shape, found.elements()) == ((0, 2), [])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.array([["a", 1]], object), "element 1 of output 'text' as int, expected bytes or str"),
        (np.array([["a", "b"]]), "output 'text' with the dtype <U1, expected object for BYTES"),
        (np.array(["a", "b"], object), "output 'text' with the shape [2], expected [-1,2]"),
    ],
)
def test_invalid_strings_are_an_error_of_the_node(output, message):
    with pytest.raises(InferenceError, match=re.escape(message)):
        text_node(lambda inputs: {"text": output}).execute({"text": TEXTS})


# --- Outputs


def test_an_output_that_is_not_contiguous_is_copied():
    found = returning({"y": X.T}).execute({"x": X})["y"]
    assert found.flags.carray
    assert np.array_equal(found, X.T)


def test_an_output_that_is_a_view_of_an_input_is_copied():
    found = node_of(lambda inputs: {"y": inputs["x"][:1]}).execute({"x": X})["y"]
    assert found.flags.carray
    assert not np.shares_memory(found, X)


def test_any_other_output_is_not_copied():
    output = X.copy()
    assert returning({"y": output}).execute({"x": X})["y"] is output


def test_undeclared_outputs_are_ignored():
    assert list(returning({"z": 1, "y": X}).execute({"x": X})) == ["y"]


def test_outputs_come_in_alphabetical_order():
    outputs = {"b": ("FP32", [-1, 2]), "a": ("FP32", [-1, 2])}
    node = node_of(lambda inputs: {"b": X, "a": X}, outputs=outputs)
    assert list(node.outputs) == list(node.execute({"x": X})) == ["a", "b"]


def test_an_output_of_any_declared_size_is_accepted():
    assert returning({"y": X[:0]}).execute({"x": X})["y"].shape == (0, 2)


WRONG = {
    "returned None, expected a dict with an ndarray for each output": None,
    "returned no output 'y', only an empty dict": {},
    "returned no output 'y', only 'z', 3": {"z": X, 3: X},
    "returned a float as output 'y', expected a numpy.ndarray": {"y": 1.0},
    "returned a list as output 'y', expected a numpy.ndarray": {"y": [[1, 2]]},
    "returned a numpy.float32 as output 'y', expected a numpy.ndarray": {"y": np.float32(1)},
    "returned a numpy.ma.MaskedArray as output 'y', expected a numpy.ndarray": {"y": np.ma.array(X)},
    "returned a NoneType as output 'y', expected a numpy.ndarray": {"y": None},
    "returned output 'y' with the dtype float64, expected float32 for FP32": {"y": X.astype(np.float64)},
    "returned output 'y' with the dtype >f4, expected float32 for FP32": {"y": X.astype(">f4")},
    "returned output 'y' with the shape [2], expected [-1,2]": {"y": X[0]},
    "returned output 'y' with the shape [2,1], expected [-1,2]": {"y": X[:, :1]},
}


@pytest.mark.parametrize("words", WRONG)
def test_an_output_that_does_not_fit_is_reported(caplog, words):
    with pytest.raises(InferenceError) as caught:
        returning(WRONG[words]).execute({"x": X})
    assert str(caught.value) == f"custom node library 'lib' {words}"
    assert caplog.messages == [str(caught.value)]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, MemoryError, AssertionError])
def test_an_exception_of_the_code_is_logged_but_not_shown_to_the_client(caplog, kind):
    with pytest.raises(InferenceError) as caught:
        node_of(failing(kind, "secret")).execute({"x": X})
    assert str(caught.value) == "custom node library 'lib' failed: the reason is in the server's log"
    (record,) = caplog.records
    assert record.getMessage() == "custom node library 'lib' failed"
    assert "in fail" in caplog.text
    assert f"{kind.__name__}: secret" in caplog.text


def test_code_may_reject_a_request_with_a_message(caplog):
    with pytest.raises(InvalidRequestError, match=r"^the image is too small$"):
        node_of(failing(InvalidRequestError, "the image is too small")).execute({"x": X})
    assert not caplog.records


# --- Declarations of inputs and outputs


def test_dims_are_sizes_or_ranges():
    inputs = {"b": ("INT64", []), "a": ["BF16", (1, -1, (2, 5), [0, 9])]}
    assert node_of(inputs=inputs).inputs == {
        "a": TensorMetadata("a", "BF16", (Dim(1, 1), Dim(0, None), Dim(2, 5), Dim(0, 9))),
        "b": TensorMetadata("b", "INT64", ()),
    }


FORM = "a datatype and dims, as in ('FP32', [1, -1, (1, 512)])"
NAMES = "BOOL, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, FP16, BF16, FP32, FP64, BYTES"
DIMS = "expected a size, -1 for any, or (low, high)"
UNFIT = [
    (None, f"None, expected a dict with {FORM} for each tensor"),
    ({}, f"{{}}, expected a dict with {FORM} for each tensor"),
    ([("x", "FP32", [1])], f"[('x', 'FP32', [1])], expected a dict with {FORM} for each tensor"),
    ({1: ("FP32", [1])}, "the name 1, expected a non-empty string"),
    ({"": ("FP32", [1])}, "the name '', expected a non-empty string"),
    ({"x": "FP32"}, f"for 'x' 'FP32', expected {FORM}"),
    ({"x": ("FP32",)}, f"for 'x' ('FP32',), expected {FORM}"),
    ({"x": ("FP32", 3)}, f"for 'x' ('FP32', 3), expected {FORM}"),
    ({"x": ("FP32", "33")}, f"for 'x' ('FP32', '33'), expected {FORM}"),
    ({"x": ("float32", [1])}, f"for 'x' the datatype 'float32', expected one of {NAMES}"),
    ({"x": (["FP32"], [1])}, f"for 'x' the datatype ['FP32'], expected one of {NAMES}"),
    ({"x": ("FP32", [1, -2])}, f"for 'x' the dim -2, {DIMS}"),
    ({"x": ("FP32", [1.5])}, f"for 'x' the dim 1.5, {DIMS}"),
    ({"x": ("FP32", [True])}, f"for 'x' the dim True, {DIMS}"),
    ({"x": ("FP32", [None])}, f"for 'x' the dim None, {DIMS}"),
    ({"x": ("FP32", [(3, 2)])}, f"for 'x' the dim (3, 2), {DIMS}"),
    ({"x": ("FP32", [(-1, 2)])}, f"for 'x' the dim (-1, 2), {DIMS}"),
    ({"x": ("FP32", [(1, 2, 3)])}, f"for 'x' the dim (1, 2, 3), {DIMS}"),
    ({"x": ("FP32", [2**63])}, f"for 'x' the dim 9223372036854775808, {DIMS}"),
]


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
@pytest.mark.parametrize(("tensors", "words"), UNFIT)
def test_tensors_of_an_invalid_form_are_reported(kind, tensors, words):
    with pytest.raises(LoadError) as caught:
        node_of(**{kind: tensors})
    assert str(caught.value) == f"{kind}(params) returned {words}"


def test_missing_functions_are_reported():
    class Half:
        inputs = staticmethod(lambda params: {})
        execute = 3

    with pytest.raises(LoadError, match=r"^has no function outputs\(params\) and no execute\(inputs, params\)$"):
        PythonNode("lib", Half, {})


def test_an_exception_of_inputs_is_reported_with_its_line():
    code = Code()
    code.inputs = failing(KeyError, "width")
    line = failing.__code__.co_firstlineno + 2
    with pytest.raises(LoadError) as caught:
        PythonNode("lib", code, {})
    assert str(caught.value) == f"inputs(params) failed with KeyError: 'width' at {__file__}:{line}"


def test_a_load_error_raised_by_the_code_is_unchanged():
    code = Code()
    code.outputs = failing(LoadError, "the param 'width' is missing")
    with pytest.raises(LoadError, match=r"^the param 'width' is missing$"):
        PythonNode("lib", code, {})


# --- Loading


NODE = PYTHON_NODE.replace("+ 1", "+ STEP")


def write(file, text):
    file.write_text(text)
    return file


def test_a_file_is_executed_again_at_each_load(tmp_path):
    """Also after a change of the same size in the same second, which Python's bytecode cache misses."""
    file = tmp_path / "node.py"
    found = []
    for step in (1, 2, 3):
        write(file, NODE + f"STEP = {step}\n")
        found.append(run_python_node(load_file("lib", file, {})))
    assert found == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["node.py"]


def test_modules_beside_a_file_are_imported_again_at_each_load(tmp_path):
    sibling, package = tmp_path / "step_of_test.py", tmp_path / "package_of_test"
    package.mkdir()
    write(package / "__init__.py", "from package_of_test.inner import ZERO")
    write(package / "inner.py", "ZERO = 0")
    file = write(tmp_path / "node.py", NODE + "from step_of_test import STEP\nfrom package_of_test import ZERO\n")
    found = []
    for step in (1, 22):
        write(sibling, f"STEP = {step}")
        found.append(run_python_node(load_file("lib", file, {})))
    assert found == [1, 22]
    assert str(tmp_path) not in sys.path
    assert not {"step_of_test", "package_of_test", "package_of_test.inner"} & sys.modules.keys()


def test_files_of_two_directories_import_their_own_siblings(tmp_path):
    nodes = []
    for step in (1, 2):
        directory = tmp_path / str(step)
        directory.mkdir()
        write(directory / "step_of_test.py", f"STEP = {step}")
        file = write(directory / "node.py", NODE + "from step_of_test import STEP\n")
        nodes.append(load_file("lib", file, {}))
    assert list(map(run_python_node, nodes)) == [1, 2]


def test_modules_imported_from_elsewhere_stay_imported(tmp_path):
    sys.modules.pop("colorsys", None)
    file = write(tmp_path / "node.py", NODE + "import colorsys\nSTEP = 1\n")
    load_file("lib", file, {})
    assert "colorsys" in sys.modules


def test_a_file_may_define_dataclasses(tmp_path):
    """Dataclasses look up their module by name."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\nSTEP = 1\n"
    text += "@dataclass\nclass A:\n    a: int\n"
    assert run_python_node(load_file("lib", write(tmp_path / "node.py", text + NODE), {})) == 1


def test_a_module_is_forgotten_with_its_node(tmp_path):
    file = write(tmp_path / "node.py", NODE + "STEP = 1\n")
    before = set(sys.modules)
    node = load_file("lib", file, {})
    assert len(sys.modules.keys() - before) == 1
    del node
    assert not sys.modules.keys() - before
    write(file, "1 / 0")
    with pytest.raises(LoadError):
        load_file("lib", file, {})
    assert not sys.modules.keys() - before


def test_modules_and_their_objects_are_loaded_by_name(tmp_path, monkeypatch):
    text = NODE + "STEP = 1\nimport sys\nclass A:\n    this = sys.modules[__name__]\n"
    write(tmp_path / "named_of_test.py", text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("named_of_test", "named_of_test:A.this"):
        assert run_python_node(load_name("lib", name, {})) == 1
    with pytest.raises(LoadError, match=r"^the module 'named_of_test' has no 'A\.that'$"):
        load_name("lib", "named_of_test:A.that", {})
    with pytest.raises(LoadError, match=r"^has no function inputs\(params\) and no outputs"):
        load_name("lib", "named_of_test:A", {})
    monkeypatch.delitem(sys.modules, "named_of_test")


BROKEN = [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' at {file}:1"),
    ("\n1 / 0", "ZeroDivisionError: division by zero at {file}:2"),
    ("raise ValueError('two\\nlines')", "ValueError: two lines at {file}:1"),
    ("import sys\nsys.exit(3)", "SystemExit: 3 at {file}:2"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt at {file}:1"),
    ("x = (", "SyntaxError: '(' was never closed (node.py, line 1)"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_a_file_that_cannot_be_imported_is_reported(tmp_path, text, words):
    file = write(tmp_path / "node.py", text)
    with pytest.raises(LoadError) as caught:
        load_file("lib", file, {})
    assert str(caught.value) == f"cannot be imported: {words.format(file=file)}"


def test_a_missing_module_is_reported():
    with pytest.raises(LoadError, match=r"^cannot be imported: ModuleNotFoundError: No module named 'no_such'$"):
        load_name("lib", "no_such.module", {})
