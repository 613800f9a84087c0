"""Finding the code of custom nodes by base_path."""

import importlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from node_cases import PYTHON_NODE, run_python_node

from ovms_rest.errors import InferenceError, LoadError
from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.libraries import OVMS_LIBRARIES, load_node
from ovms_rest.pipelines.python_nodes import PythonNode


def load(directory, base_path="node.py", **params):
    return load_node(Library("lib", base_path, directory), params, 60)


def reason_of(directory, base_path="node.py", **params):
    with pytest.raises(LoadError) as caught:
        load(directory, base_path, **params)
    return str(caught.value)


def test_a_python_file_is_found_in_the_directory_of_the_config(tmp_path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "node.py").write_text(PYTHON_NODE)
    node = load(tmp_path, "nodes/node.py")
    assert isinstance(node, PythonNode)
    assert run_python_node(node) == 1


def test_an_absolute_path_ignores_the_directory_of_the_config(tmp_path):
    (tmp_path / "node.py").write_text(PYTHON_NODE)
    assert run_python_node(load(Path("/"), str(tmp_path / "node.py"))) == 1


def test_any_other_file_is_a_c_library(tmp_path):
    file = tmp_path / "node.txt"
    file.write_text(PYTHON_NODE)
    assert reason_of(tmp_path, "node.txt").startswith(f"{file}: cannot be opened: {file}: ")


def test_a_file_takes_precedence_over_a_built_in_library(tmp_path):
    (tmp_path / "libcustom_node_add_one.so").write_text("garbage")
    assert reason_of(tmp_path, "libcustom_node_add_one.so").endswith("libcustom_node_add_one.so: file too short")


@pytest.mark.parametrize("name", ["named_node", "package_of_nodes.named_node", "package_of_nodes:named_node"])
def test_a_python_name_is_imported_from_the_import_path(tmp_path, monkeypatch, name):
    (tmp_path / "package_of_nodes").mkdir()
    (tmp_path / "package_of_nodes" / "__init__.py").write_text("from package_of_nodes import named_node")
    (tmp_path / "package_of_nodes" / "named_node.py").write_text(PYTHON_NODE)
    (tmp_path / "named_node.py").write_text(PYTHON_NODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_python_node(load(Path("/"), name)) == 1


def test_a_missing_library_of_ovms_is_replaced_by_a_built_in_module(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    node = load(tmp_path, "/ovms/lib/custom_nodes/libcustom_node_add_one.so")
    node.open()
    given = np.zeros((1, 10), np.float32)
    assert np.array_equal(node.execute({"input_numbers": given})["output_numbers"], given + 1)
    assert caplog.messages == [
        "library 'lib': there is no file /ovms/lib/custom_nodes/libcustom_node_add_one.so; "
        "the built-in module ovms_rest.pipelines.nodes.add_one replaces it"
    ]


def test_an_invalid_param_of_a_built_in_node_is_reported(tmp_path):
    assert reason_of(tmp_path, "libcustom_node_add_one.so", add_number="x").startswith(
        "libcustom_node_add_one.so: param add_number: expected "
    )


def test_the_client_gets_the_reason_of_a_failed_built_in_node(tmp_path, caplog):
    node = load(tmp_path, "libcustom_node_image_transformation.so", original_image_layout="NHWC")
    with pytest.raises(InferenceError) as caught:
        node.execute({"image": np.zeros((1, 2, 2, 4), np.float32)})
    assert str(caught.value) == (
        "custom node library 'lib' failed: input image has the shape [1, 2, 2, 4], expected [1, -1, -1, 3]"
    )
    assert caplog.messages == [str(caught.value)]


@pytest.mark.parametrize("name", OVMS_LIBRARIES)
def test_every_library_of_ovms_has_a_built_in_module(name):
    """Its functions exist; its params are tested with each node."""
    module = importlib.import_module(OVMS_LIBRARIES[name])
    assert all(callable(getattr(module, item)) for item in ("Options", "inputs", "outputs", "execute"))


@pytest.mark.parametrize(
    "base_path", ["missing.py", "libs/libmissing.so", "a b", "a..b", "a:", ":a", "a:b:c", "", "a\0b"]
)
def test_a_base_path_without_code_is_reported_with_all_alternatives(tmp_path, base_path):
    assert reason_of(tmp_path, base_path) == (
        f"there is no file {tmp_path / base_path}, and {base_path!r} is neither a Python module "
        "('package.module' or 'package.module:object') nor one of libcustom_node_add_one.so, "
        "libcustom_node_east_ocr.so, libcustom_node_face_blur.so, libcustom_node_horizontal_ocr.so, "
        "libcustom_node_image_transformation.so, libcustom_node_model_zoo_intel_object_detection.so"
    )


def test_a_missing_python_module_is_reported(tmp_path):
    assert reason_of(tmp_path, "no_such.module") == (
        "no_such.module: cannot be imported: ModuleNotFoundError: No module named 'no_such'"
    )


def test_a_path_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(PYTHON_NODE)
    (tmp_path / "garbage.so").write_text("garbage")
    monkeypatch.chdir(tmp_path)
    assert run_python_node(load(Path())) == 1
    assert reason_of(Path(), "garbage.so").endswith(f"{tmp_path}/garbage.so: file too short")


def test_code_has_its_trial_in_another_process_before_it_is_loaded(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "node.py").write_text(f"import os\nprint(os.getpid(), file=open({str(log)!r}, 'a'))\n{PYTHON_NODE}")
    load(tmp_path)
    one, two = map(int, log.read_text().split())
    assert (one == os.getpid(), two == os.getpid()) == (False, True)


def test_code_that_fails_its_trial_is_not_loaded(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "node.py").write_text(f"open({str(log)!r}, 'a').write('x')\nimport no_such_module")
    assert reason_of(tmp_path) == (
        f"{tmp_path}/node.py: cannot be imported: "
        f"ModuleNotFoundError: No module named 'no_such_module' at {tmp_path}/node.py:2"
    )
    assert log.read_text() == "x"
