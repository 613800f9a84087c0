"""Custom nodes in C: inputs and outputs, ownership of memory, and failures."""

import ctypes
import faulthandler
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from node_cases import COMPILER, build_c_node
from timeouts import keep_trying

from ovms_rest.errors import InferenceError, LoadError
from ovms_rest.pipelines.c_nodes import CNode, copy_library
from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.libraries import load_node
from ovms_rest.protocol.tensors import Dim, TensorMetadata

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

X = np.array([[1, 2], [3, 4]], np.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with the library node.so."""
    directory = tmp_path_factory.mktemp("libraries")
    build_c_node(directory / "node.so", "-DWITH_DEINITIALIZE")
    return directory


def load(directory, mode="", timeout=60, **params):
    return load_node(Library("lib", "node.so", directory), {"mode": mode, **params}, timeout)


def opened(directory, mode="", **params):
    node = load(directory, mode, **params)
    node.open()
    return node


def reason_of(directory, mode="", timeout=60):
    with pytest.raises(LoadError) as caught:
        load(directory, mode, timeout)
    return str(caught.value)


def failure(node):
    with pytest.raises(InferenceError) as caught:
        node.execute({"x": X})
    return str(caught.value)


def check_adds_one(node):
    assert np.array_equal(node.execute({"x": X})["y"], X + 1)


def run_in_child(work) -> int:
    """Run work in a forked child; return its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        signal.alarm(20)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- Results


def test_a_dim_of_0_in_an_info_means_any_size(directory):
    node = load(directory)
    assert node.inputs == {"x": TensorMetadata("x", "FP32", (Dim(0, None), Dim(2, 2)))}
    assert node.outputs == {"y": TensorMetadata("y", "FP32", (Dim(0, None), Dim(0, None)))}


def test_a_library_computes_with_its_params(directory):
    node = opened(directory, add="0.5")
    found = node.execute({"x": X})
    assert list(found) == ["y"]
    assert found["y"].dtype == np.float32
    assert np.array_equal(found["y"], X + 0.5)
    assert found["y"].flags.carray


def test_an_input_that_is_not_contiguous_is_copied(directory):
    assert np.array_equal(opened(directory, add="1").execute({"x": X.T})["y"], X.T + 1)


def test_a_read_only_input_is_accepted(directory):
    given = X.copy()
    given.flags.writeable = False
    assert np.array_equal(opened(directory, add="1").execute({"x": given})["y"], X + 1)


def test_each_node_of_a_library_has_its_own_handle(directory):
    one, two = opened(directory, add="1"), opened(directory, add="2")
    assert [node.execute({"x": X})["y"][0, 0] for node in (one, two, one)] == [2, 3, 2]


def test_an_output_may_have_no_elements(directory):
    assert opened(directory, "nothing found").execute({"x": X})["y"].shape == (0, 2)


def test_an_undeclared_output_is_ignored(directory):
    assert list(opened(directory, "one more").execute({"x": X})) == ["y"]


def test_a_node_without_params_passes_null(directory):
    node = load_node(Library("lib", "node.so", directory), {}, 60)
    node.open()
    assert np.array_equal(node.execute({"x": X})["y"], X)


def test_loading_a_node_does_not_open_its_library_in_this_process(tmp_path):
    build_c_node(tmp_path / "unopened.so", "-DWITH_DEINITIALIZE")
    node = load_node(Library("lib", "unopened.so", tmp_path), {}, 60)
    assert "unopened.so" not in Path("/proc/self/maps").read_text()
    node.open()
    assert "/memfd:unopened.so" in Path("/proc/self/maps").read_text()


def test_an_overwritten_library_stays_as_it_was_loaded(tmp_path):
    file = build_c_node(tmp_path / "node.so", "-DWITH_DEINITIALIZE")
    node = load(tmp_path, add="1")

    def work() -> None:
        os.truncate(file, 0)
        node.open()
        check_adds_one(node)
        file.write_bytes(b"x" * 100_000)
        check_adds_one(node)

    assert run_in_child(work) == 0


def test_nodes_of_one_library_share_its_global_state(tmp_path):
    build_c_node(tmp_path / "node.so", "-DWITH_DEINITIALIZE")
    nodes = [load(tmp_path, add=add) for add in "12"]
    for node in nodes:
        node.open()
    library = ctypes.CDLL(copy_library(tmp_path / "node.so").path)
    assert ctypes.c_int.in_dll(library, "initialized").value == 2


@pytest.mark.parametrize("flag", ["-Wl,-rpath,$ORIGIN", "-DFINDS_ITSELF"])
def test_a_library_that_looks_for_files_near_it_is_opened_in_place(tmp_path, flag, caplog):
    caplog.set_level("INFO")
    file = build_c_node(tmp_path / "node.so", "-DWITH_DEINITIALIZE", flag)
    node = load(tmp_path, add="1")
    assert caplog.messages == [
        f"library {file} is opened in place, since it looks for files near it; replace it by renaming only"
    ]

    def work() -> None:
        node.open()
        assert str(file) in Path("/proc/self/maps").read_text()
        check_adds_one(node)

    assert run_in_child(work) == 0


@pytest.mark.parametrize(
    ("precision", "datatype", "dtype"),
    [
        (1, "FP32", np.float32),
        (2, "FP16", np.float16),
        (3, "UINT8", np.uint8),
        (4, "INT8", np.int8),
        (5, "INT16", np.int16),
        (6, "UINT16", np.uint16),
        (7, "INT32", np.int32),
        (8, "FP64", np.float64),
        (9, "INT64", np.int64),
    ],
)
def test_every_precision_maps_to_a_datatype(directory, precision, datatype, dtype):
    node = opened(directory, precision=str(precision))
    found = node.execute({"x": X.astype(dtype)})["y"]
    assert (node.inputs["x"].datatype, node.outputs["y"].datatype, found.dtype) == (datatype, datatype, dtype)
    assert np.array_equal(found, X)


# --- Memory


def count(directory: Path) -> tuple[int, int]:
    library = ctypes.CDLL(copy_library(directory / "node.so").path)  # the copy that nodes have opened
    return tuple(ctypes.c_int.in_dll(library, name).value for name in ("allocated", "released"))


def test_a_thousand_runs_release_all_their_memory(directory):
    node = opened(directory, add="1")
    before = count(directory)
    for _ in range(1000):
        node.execute({"x": X})
    after = count(directory)
    assert after[0] - before[0] == after[1] - before[1] == 3000


def test_an_output_outlives_the_runs_after_it(directory):
    node = opened(directory, add="1")
    first = node.execute({"x": X})["y"]
    for _ in range(10):
        node.execute({"x": X * 2})
    assert np.array_equal(first, X + 1)


GARBAGE = {
    "no name": "returned an output without a name",
    "other name": "returned no output 'y'",
    "unspecified": "returned output 'y' with the precision 0, expected 1 for FP32",
    "other precision": "returned output 'y' with the precision 7, expected 1 for FP32",
    "null dims": "returned output 'y' with NULL dims, expected 1 to 32",
    "no dims": "returned output 'y' with 0 dims, expected 1 to 32",
    "too many dims": "returned output 'y' with 4611686018427387904 dims, expected 1 to 32",
    "one dim": "returned output 'y' with the shape [2], expected [-1,-1]",
    "too few bytes": "returned output 'y' with 15 bytes of data, expected 16 for the shape [2,2] of FP32",
    "null data": "returned output 'y' with NULL data, expected 16 bytes",
    "no memory": "returned output 'y' with 4611686018427387904 bytes of data, which is more than the free memory",
    "twice": "returned output 'y' twice",
}


@pytest.mark.parametrize("mode", GARBAGE)
def test_an_invalid_output_is_reported_and_its_memory_released(directory, caplog, mode):
    node = opened(directory, mode)
    before = count(directory)
    assert failure(node) == f"custom node library 'lib' {GARBAGE[mode]}"
    assert caplog.messages == [f"custom node library 'lib' {GARBAGE[mode]}"]
    after = count(directory)
    assert after[0] - before[0] == after[1] - before[1] > 0


FAILURES = {
    "fails": ("failed: execute returned 5, expected 0", 0),
    "null": ("returned NULL as the array of outputs", 0),
    # Only the array itself is released.
    "none": ("returned 0 outputs, expected 1 to 1024", 1),
    "too many": ("returned 1073741824 outputs, expected 1 to 1024", 1),
}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failure_is_reported_and_only_owned_memory_released(directory, mode):
    node = opened(directory, mode)
    message, released = FAILURES[mode]
    before = count(directory)
    assert failure(node) == f"custom node library 'lib' {message}"
    assert count(directory)[1] - before[1] == released


def test_a_crash_in_execute_ends_only_its_own_process(directory):
    node = load(directory, "crash")

    def work() -> None:
        node.open()
        node.execute({"x": X})

    assert run_in_child(work) == -signal.SIGSEGV


def test_a_forked_child_runs_a_node_that_its_parent_loaded(directory):
    node = load(directory, add="1")

    def work() -> None:
        node.open()
        check_adds_one(node)

    assert run_in_child(work) == 0


# --- Loading


UNFIT = {
    "initialize fails": "initialize returned 3, expected 0",
    "crash in initialize": "ended its trial process with SIGABRT while in initialize",
    "exit in initialize": "ended its trial process with exit code 0 while in initialize",
    "info: crash": "ended its trial process with SIGSEGV while in getOutputsInfo",
    "info: fails": "getOutputsInfo returned 4, expected 0",
    "info: null": "getOutputsInfo returned NULL as the array",
    "info: none": "getOutputsInfo returned 0 tensors, expected 1 to 1024",
    "info: too many": "getOutputsInfo returned 1073741824 tensors, expected 1 to 1024",
    "info: no name": "getOutputsInfo returned a tensor without a name",
    "info: not UTF-8": "getOutputsInfo returned the name b'\\xff', which is not UTF-8",
    "info: unspecified": (
        "getOutputsInfo returned tensor 'y' with the precision 0, expected one from 1 (FP32) to 9 (I64)"
    ),
    "info: null dims": "getOutputsInfo returned tensor 'y' with NULL dims, expected 1 to 32",
    "info: no dims": "getOutputsInfo returned tensor 'y' with 0 dims, expected 1 to 32",
    "info: too many dims": "getOutputsInfo returned tensor 'y' with 4611686018427387904 dims, expected 1 to 32",
    "info: too large": (
        "getOutputsInfo returned tensor 'y' with the dims [0,9223372036854775808], "
        "expected at most 9223372036854775807 each"
    ),
    "info: twice": "getOutputsInfo returned tensor 'y' twice",
}


@pytest.mark.parametrize("mode", UNFIT)
def test_a_library_that_fails_to_load_is_reported(directory, mode):
    assert reason_of(directory, mode) == f"{directory}/node.so: {UNFIT[mode]}"


def test_a_library_that_hangs_is_stopped(directory):
    timeout, reason = keep_trying(
        lambda timeout: reason_of(directory, "hang in initialize", timeout),
        lambda reason: not reason.endswith("while starting"),
    )
    assert reason == f"{directory}/node.so: timed out after {timeout} s while in initialize"


def test_a_missing_function_is_named(tmp_path):
    file = build_c_node(tmp_path / "node.so")
    missing = "has no function deinitialize, which OVMS's custom_node_interface.h requires"
    assert reason_of(tmp_path) == f"{file}: {missing}"


def test_a_file_that_is_not_a_library_is_reported_with_the_linkers_reason(tmp_path):
    file = tmp_path / "node.so"
    file.write_text("garbage")
    assert reason_of(tmp_path) == f"{file}: cannot be opened: {file}: file too short"


def test_a_library_that_disappeared_after_loading_is_reported(tmp_path):
    file = tmp_path / "node.so"
    node = CNode("lib", file, {}, {"inputs": {}, "outputs": {}})
    with pytest.raises(LoadError) as caught:
        node.open()
    assert str(caught.value) == (
        f"library 'lib' ({file}): cannot be opened: {file}: cannot open shared object file: No such file or directory"
    )
