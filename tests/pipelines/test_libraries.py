"""Finding the code of custom nodes, and trying it where it harms nobody."""

import importlib
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
from service import wait_for_end

from ovms_rest.errors import InferenceError, LoadError
from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.libraries import OVMS_LIBRARIES, load_node
from ovms_rest.pipelines.python_nodes import PythonNode

NODE = """
def inputs(params):
    return {"x": ("FP32", [1])}

outputs = inputs

def execute(inputs, params):
    return {"x": inputs["x"] + 1}
"""


def load(directory, base_path="node.py", timeout=60, stop=lambda: False, **params):
    return load_node(Library("lib", base_path, directory), params, timeout, stop)


def reason_of(directory, base_path="node.py", timeout=60, stop=lambda: False, **params) -> str:
    with pytest.raises(LoadError) as caught:
        load(directory, base_path, timeout, stop, **params)
    return str(caught.value)


def run(node):
    return float(node.execute({"x": np.zeros(1, np.float32)})["x"][0])


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# --- What a base_path stands for


def test_a_python_file_is_found_in_the_directory_of_the_config(tmp_path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "node.py").write_text(NODE)
    node = load(tmp_path, "nodes/node.py")
    assert isinstance(node, PythonNode)
    assert run(node) == 1


def test_an_absolute_path_is_what_it_is(tmp_path):
    (tmp_path / "node.py").write_text(NODE)
    assert run(load(Path("/"), str(tmp_path / "node.py"))) == 1


def test_any_other_file_is_a_c_library(tmp_path):
    (tmp_path / "node.txt").write_text(NODE)
    file = tmp_path / "node.txt"
    assert reason_of(tmp_path, "node.txt").startswith(f"{file}: cannot be opened: {file}: ")


def test_a_file_comes_before_the_library_of_ovms_with_its_name(tmp_path):
    (tmp_path / "libcustom_node_add_one.so").write_text("garbage")
    assert reason_of(tmp_path, "libcustom_node_add_one.so").endswith("libcustom_node_add_one.so: file too short")


@pytest.mark.parametrize("name", ["named_node", "package_of_nodes.named_node", "package_of_nodes:named_node"])
def test_a_python_name_is_imported_from_where_the_service_imports(tmp_path, monkeypatch, name):
    (tmp_path / "package_of_nodes").mkdir()
    (tmp_path / "package_of_nodes" / "__init__.py").write_text("from package_of_nodes import named_node")
    (tmp_path / "package_of_nodes" / "named_node.py").write_text(NODE)
    (tmp_path / "named_node.py").write_text(NODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert run(load(Path("/"), name)) == 1


def test_a_library_of_ovms_that_is_not_there_is_one_of_ours(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    node = load(tmp_path, "/ovms/lib/custom_nodes/libcustom_node_add_one.so")
    node.open()
    given = np.zeros((1, 10), np.float32)
    assert np.array_equal(node.execute({"input_numbers": given})["output_numbers"], given + 1)
    assert caplog.messages == [
        "library 'lib': there is no file /ovms/lib/custom_nodes/libcustom_node_add_one.so; "
        "the built-in module ovms_rest.pipelines.nodes.add_one replaces it"
    ]


def test_a_param_that_one_of_ours_cannot_read_is_told(tmp_path):
    assert reason_of(tmp_path, "libcustom_node_add_one.so", add_number="x").startswith(
        "libcustom_node_add_one.so: param add_number: expected "
    )


def test_what_one_of_ours_cannot_do_is_told_to_the_client_too(tmp_path, caplog):
    node = load(tmp_path, "libcustom_node_image_transformation.so", original_image_layout="NHWC")
    with pytest.raises(InferenceError) as caught:
        node.execute({"image": np.zeros((1, 2, 2, 4), np.float32)})
    assert str(caught.value) == (
        "custom node library 'lib' failed: input image has the shape [1, 2, 2, 4], expected [1, -1, -1, 3]"
    )
    assert caplog.messages == [str(caught.value)]


@pytest.mark.parametrize("name", OVMS_LIBRARIES)
def test_every_library_of_ovms_has_one_of_ours(name):
    """A param that it needs may be missing here, but no function."""
    module = importlib.import_module(OVMS_LIBRARIES[name])
    assert all(callable(getattr(module, item)) for item in ("Options", "inputs", "outputs", "execute"))


@pytest.mark.parametrize(
    "base_path", ["missing.py", "libs/libmissing.so", "a b", "a..b", "a:", ":a", "a:b:c", "", "a\0b"]
)
def test_what_stands_for_nothing_is_told_with_what_was_looked_for(tmp_path, base_path):
    assert reason_of(tmp_path, base_path) == (
        f"there is no file {tmp_path / base_path}, and {base_path!r} is neither a Python module "
        "('package.module' or 'package.module:object') nor one of libcustom_node_add_one.so, "
        "libcustom_node_east_ocr.so, libcustom_node_face_blur.so, libcustom_node_horizontal_ocr.so, "
        "libcustom_node_image_transformation.so, libcustom_node_model_zoo_intel_object_detection.so"
    )


def test_a_python_module_that_is_not_there_is_told(tmp_path):
    assert reason_of(tmp_path, "no_such.module") == (
        "no_such.module: cannot be imported: ModuleNotFoundError: No module named 'no_such'"
    )


def test_a_path_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(NODE)
    (tmp_path / "garbage.so").write_text("garbage")
    monkeypatch.chdir(tmp_path)
    assert run(load(Path())) == 1
    assert reason_of(Path(), "garbage.so").endswith(f"{tmp_path}/garbage.so: file too short")


# --- Trying it


def test_code_is_tried_in_another_process_before_it_is_loaded_in_this_one(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "node.py").write_text(f"import os\nprint(os.getpid(), file=open({str(log)!r}, 'a'))\n{NODE}")
    load(tmp_path)
    one, two = map(int, log.read_text().split())
    assert (one == os.getpid(), two == os.getpid()) == (False, True)


def test_code_that_fails_where_it_is_tried_is_not_loaded(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "node.py").write_text(f"open({str(log)!r}, 'a').write('x')\nimport no_such_module")
    assert reason_of(tmp_path) == (
        f"{tmp_path}/node.py: cannot be imported: "
        f"ModuleNotFoundError: No module named 'no_such_module' at {tmp_path}/node.py:2"
    )
    assert log.read_text() == "x"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import os; os.abort()", "SIGABRT"),
        ("import ctypes; ctypes.string_at(8)", "SIGSEGV"),
    ],
)
def test_code_that_ends_its_process_is_told(tmp_path, text, end):
    (tmp_path / "node.py").write_text(text)
    assert reason_of(tmp_path) == (f"{tmp_path}/node.py: ended its trial process with {end} while being imported")


@pytest.mark.parametrize(
    "text", ["import time; time.sleep(60)", "import os, time; os.closerange(3, 99); time.sleep(60)"]
)
def test_code_that_hangs_is_stopped(tmp_path, text):
    (tmp_path / "node.py").write_text(text)
    before = children()  # those of other tests' fixtures
    assert reason_of(tmp_path, timeout=1) == (f"{tmp_path}/node.py: timed out after 1 s while being imported")
    assert children() == before


def test_a_try_is_given_up_when_the_service_ends(tmp_path):
    (tmp_path / "node.py").write_text("import time; time.sleep(60)")
    started = time.monotonic()
    assert reason_of(tmp_path, stop=lambda: True) == (
        f"{tmp_path}/node.py: was not tried, because the service is shutting down"
    )
    assert time.monotonic() - started < 10


def test_what_the_code_prints_or_reads_is_no_part_of_the_try(tmp_path):
    (tmp_path / "node.py").write_text(f"import sys\nprint('{{\"reason\": 1}}', flush=True)\n{NODE}")
    assert run(load(tmp_path)) == 1


def test_processes_that_the_code_forks_end_with_the_try(tmp_path):
    pids = tmp_path / "pids"
    (tmp_path / "node.py").write_text(
        f"import os, time\nif not os.fork():\n    print(os.getpid(), file=open({str(pids)!r}, 'w'))\n"
        f"    time.sleep(60)\ntime.sleep(0.5)\nos._exit(1)"
    )
    assert reason_of(tmp_path) == (f"{tmp_path}/node.py: ended its trial process with exit code 1 while being imported")
    pid = int(pids.read_text())
    wait_for_end(pid)


def test_a_process_that_cannot_start_is_told(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(NODE)
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert reason_of(tmp_path) == (f"{tmp_path}/node.py: ended its trial process with exit code 1 while starting")


def test_a_process_that_does_not_read_its_params_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "node.py").write_text(NODE)
    (tmp_path / "deaf").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "deaf").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "deaf"))
    assert reason_of(tmp_path, timeout=1, large="x" * 2**20) == (
        f"{tmp_path}/node.py: timed out after 1 s while starting"
    )
