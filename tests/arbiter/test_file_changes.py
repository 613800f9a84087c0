"""Files that are replaced while a service uses them: every response is of the old or the new weights, and none fails.

A model multiplies its input by weights that are all the same number, and returns the least and the greatest product.
"""

import contextlib
import mmap
import os
import shutil
import subprocess
import time

import model_zoo
import numpy as np
import pytest
from generations import PAUSE_SECONDS
from onnx import TensorProto, helper, numpy_helper
from onnx import save as save_onnx
from openvino import Type, opset15
from service import repeating, serve, write_config

SIZE = 65_536  # 64 pages of weights


def write_ir(directory, weight):
    x = model_zoo.parameter("x", (1,), Type.f32)
    product = opset15.multiply(x, opset15.constant(np.full(SIZE, weight, np.float32)))
    least = opset15.reduce_min(product, opset15.constant(np.int64([0])), keep_dims=True)
    greatest = opset15.reduce_max(product, opset15.constant(np.int64([0])), keep_dims=True)
    model_zoo.save(model_zoo.model_of({"least": least, "greatest": greatest}, [x]), directory.parent, directory.name)


def write_onnx(directory, weight, external=False):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("least", "greatest")]
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["product"]),
        helper.make_node("ReduceMin", ["product"], ["least"], axes=[0]),
        helper.make_node("ReduceMax", ["product"], ["greatest"], axes=[0]),
    ]
    weights = numpy_helper.from_array(np.full(SIZE, weight, np.float32), "w")
    graph = helper.make_graph(nodes, "graph", [x], outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    directory.mkdir(parents=True)
    if external:
        save_onnx(model, directory / "m.onnx", save_as_external_data=True, location="m.weights", size_threshold=0)
    else:
        save_onnx(model, directory / "m.onnx")


def write_external(directory, weight):
    write_onnx(directory, weight, external=True)


# The name of a model, what writes it, and the file that has its weights.
FORMATS = {
    "ir": (write_ir, "model.bin"),
    "onnx": (write_onnx, "m.onnx"),
    "external": (write_external, "m.weights"),
    "own": (write_ir, "model.bin"),  # compiled by each worker
}


# --- The ways to replace a file


def cp(source, target):
    subprocess.run(["cp", source, target], check=True)


def cp_p(source, target):
    os.utime(source, ns=(target.stat().st_atime_ns, target.stat().st_mtime_ns))
    subprocess.run(["cp", "-p", source, target], check=True)


def dd_notrunc(source, target):
    subprocess.run(["dd", f"if={source}", f"of={target}", "conv=notrunc", "bs=4k", "status=none"], check=True)


def slow_upload(source, target):
    """Write as scp over a slow network does."""
    content = source.read_bytes()
    with target.open("wb") as stream:
        for start in range(0, len(content), len(content) // 4):
            stream.write(content[start : start + len(content) // 4])
            stream.flush()
            time.sleep(0.1)


def write_by_map(source, target):
    content = source.read_bytes()
    with target.open("r+b") as stream, mmap.mmap(stream.fileno(), len(content)) as map_:
        map_[:] = content


def rename(source, target):
    """Replace as rsync does."""
    shutil.copyfile(source, target.with_name(".part"))
    target.with_name(".part").replace(target)


def delete_and_copy(source, target):
    target.unlink()
    shutil.copyfile(source, target)


def switch_link(source, target):
    place = source.with_name(f"linked-{time.monotonic_ns()}")
    shutil.copyfile(source, place)
    with contextlib.suppress(FileNotFoundError):
        target.with_name(".link").unlink()
    target.with_name(".link").symlink_to(place)
    target.with_name(".link").replace(target)


WAYS = [cp, cp_p, dd_notrunc, slow_upload, write_by_map, rename, delete_and_copy, switch_link]


# --- The service


@contextlib.contextmanager
def clients(service):
    """Infer with all models, one after the other, until the block ends; yield the responses of each model."""
    responses = {name: set() for name in FORMATS}

    def infer():
        for name, found in responses.items():
            found.add(ask(service, name))
            time.sleep(PAUSE_SECONDS)

    with repeating(infer, 1):
        yield responses


def ask(service, name):
    given = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    answer = service.infer(name, {"inputs": [given]})
    if answer.status != 200:
        return answer.status, answer.body
    outputs = {output["name"]: output["data"][0] for output in answer.json()["outputs"]}
    return outputs["least"], outputs["greatest"]


def serves(service, weight):
    return all(ask(service, name) == (weight, weight) for name in FORMATS)


@contextlib.contextmanager
def serving(directory, poll):
    for name, (write, _) in FORMATS.items():
        for weight in (1, 2):
            write(directory / str(weight) / name / "1", weight)
        shutil.copytree(directory / "1" / name, directory / name)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    models = [{"name": name, "base_path": str(directory / name), "plugin_config": dict(exact)} for name in FORMATS]
    models[-1]["plugin_config"] |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}
    config = write_config(directory, *models)
    variables = {"OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": str(poll)}
    with serve(directory, "-w", "2", config=config, **variables) as service:
        assert serves(service, 1)
        yield service, directory
        assert "was sent SIG" not in service.log, service.log
        assert "is given up" not in service.log, service.log


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("live"), poll=0) as served:
        yield served


def replace(directory, weight, way):
    for name, (_, file) in FORMATS.items():
        way(directory / str(weight) / name / "1" / file, directory / name / "1" / file)


def change(service, directory, way):
    """Replace the weights of all models; return the old and the new ones."""
    old = int(ask(service, "ir")[0])
    assert serves(service, old)
    replace(directory, 3 - old, way)
    return old, 3 - old


@pytest.mark.parametrize("way", WAYS)
def test_every_response_is_of_the_old_or_the_new_weights(live, way):
    service, directory = live
    with clients(service) as responses:
        old, new = change(service, directory, way)
        assert service.request("POST", "/v1/config/reload").status == 201
    assert serves(service, new)
    assert set.union(*responses.values()) <= {(old, old), (new, new)}


def test_repeated_copies_during_reloads_do_no_harm(live):
    service, directory = live

    def copy():
        for way in (cp, dd_notrunc):
            for weight in (2, 1):
                replace(directory, weight, way)

    with clients(service) as responses, repeating(copy, 1):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert service.request("POST", "/v1/config/reload").status in (200, 201, 412)
    assert set.union(*responses.values()) <= {(1, 1), (2, 2)}
    replace(directory, 2, cp)
    assert service.request("POST", "/v1/config/reload").status == 201
    assert serves(service, 2)


# --- What the service notices by itself


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A service that looks for changes every second; the version directory of a model is a symbolic link."""
    with serving(tmp_path_factory.mktemp("watched"), poll=1) as served:
        yield served


def test_files_replaced_with_the_same_size_and_time_are_noticed(watched):
    service, directory = watched
    _, new = change(service, directory, cp_p)
    service.wait_for(lambda: serves(service, new))


def test_change_in_a_linked_version_directory_is_noticed(watched):
    service, directory = watched
    version = directory / "ir" / "1"
    version.rename(directory / "elsewhere")
    version.symlink_to(directory / "elsewhere")
    _, new = change(service, directory, cp)
    service.wait_for(lambda: serves(service, new))
    version.unlink()
    (directory / "elsewhere").rename(version)


def test_model_whose_file_is_open_for_writing_is_loaded_when_it_is_closed(watched):
    service, directory = watched
    old = int(ask(service, "ir")[0])
    file = directory / "ir" / "1" / "model.bin"
    reason = f"model 'ir' version 1 {file} is open for writing in another process"
    loaded = service.log.count("model 'ir' version 1 serves from")
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(np.full(SIZE, 3 - old, np.float32).tobytes())
        stream.flush()
        for _ in range(2):
            refused = service.request("POST", "/v1/config/reload")
            assert (refused.status, refused.json()["error"]) == (412, reason)
            assert ask(service, "ir") == (old, old)
        stream.seek(0)
        stream.write(content)
    service.wait_for(lambda: service.log.count("model 'ir' version 1 serves from") > loaded)
    service.wait_for(lambda: service.request("POST", "/v1/config/reload").status == 200)
    assert serves(service, old)
