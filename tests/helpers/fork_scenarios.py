"""Scenarios in which forked workers use models compiled before the fork, each in a process of its own.

    python fork_scenarios.py SCENARIO DIRECTORY

DIRECTORY is empty and writable. A scenario ends with exit code 0 or with a traceback. An alarm kills a child that hangs
and fails the scenario.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import model_zoo
import numpy as np
from openvino import Type, opset15

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.copies import copy_model, open_places, seal
from ovms_rest.models.runtime import Model

PATIENCE = 20


def compiled(directory: Path, name: str, model, **plugin_config) -> Model:
    """Compile a model as the arbiter does."""
    return load(model_zoo.save(model, directory / name), **plugin_config)


def load(base_path: Path, cache_dir: Path | str = "", **plugin_config) -> Model:
    """Compile a saved model as the arbiter does."""
    plan = plan_compilation("CPU", plugin_config, cores=2, cache_dir=str(cache_dir))
    path = base_path / "1" / "model.xml"
    with open_places(1) as (place,):
        source = copy_model(path, place)
        seal(place)
        loaded = Model(base_path.name, 1, path, plan, source=source)
        if loaded.compilation.shared:
            loaded.compile()
    return loaded


def is_imported(model: Model) -> bool:
    """Return whether OpenVINO took a compiled model from its cache."""
    return model._compiled.get_property("LOADED_FROM_CACHE")


def fork(work: Callable[[], None]) -> int:
    """Run work in a forked child that ends like a worker; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(PATIENCE)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def join(*pids: int) -> None:
    """Wait for children; fail unless all succeeded."""
    for pid in pids:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, f"a child ended with {status}"


def images(count: int) -> np.ndarray:
    """Return different inputs for different batch sizes."""
    return np.random.default_rng(count).standard_normal((count, 3, 16, 16), np.float32)


def convolutions():
    """A small network with a dynamic batch: image FP32 [-1,3,16,16] -> y."""
    random = np.random.default_rng(0)
    image = model_zoo.parameter("image", (-1, 3, 16, 16), Type.f32)
    data = image
    for channels_in, channels_out in ((3, 16), (16, 32)):
        weights = random.standard_normal((channels_out, channels_in, 3, 3), np.float32)
        data = opset15.relu(opset15.convolution(data, opset15.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1]))
    return model_zoo.model_of({"y": data}, [image])


def many_forks(directory: Path) -> None:
    """Children of one compiled model infer with different shapes, with the results of an unforked process."""
    model = compiled(directory, "m", convolutions())
    reference = compiled(directory, "reference", convolutions())
    infer_in_children(model, reference)


def many_forks_of_an_imported_model(directory: Path) -> None:
    """Children of a model from OpenVINO's cache get the results of one compiled in the process."""
    base_path = model_zoo.save(convolutions(), directory / "m")
    reference = load(base_path, directory / "cache")
    model = load(base_path, directory / "cache")
    assert (is_imported(reference), is_imported(model)) == (False, True)
    infer_in_children(model, reference)


def infer_in_children(model: Model, reference: Model) -> None:
    """Infer with a model in many children, which must get the results of the reference."""
    reference.open(lambda: None)
    expected = {count: reference.infer({"image": images(count)})["y"].array.copy() for count in (1, 2, 5)}

    def work(first: int) -> None:
        model.open(lambda: None)
        for count in (first, 1, 5, 2):
            found = model.infer({"image": images(count)})["y"].array
            assert np.array_equal(found, expected[count])

    for _ in range(20):
        join(*(fork(lambda count=count: work(count)) for count in (1, 2, 5)))


def memory_of_a_model(directory: Path) -> None:
    """Children share the weights of a model, both those of its files and those that OpenVINO computes with."""
    measure_children(load(save_weights(directory), INFERENCE_PRECISION_HINT="f32"))


def memory_of_an_imported_model(directory: Path) -> None:
    """Children share the weights of a model from OpenVINO's cache."""
    base_path = save_weights(directory)
    load(base_path, directory / "cache", INFERENCE_PRECISION_HINT="f32")
    model = load(base_path, directory / "cache", INFERENCE_PRECISION_HINT="f32")
    assert is_imported(model)
    measure_children(model)


WIDTH = 4096  # 64 MiB of weights as FP32


def save_weights(directory: Path) -> Path:
    x = model_zoo.parameter("x", (1, WIDTH), Type.f32)
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    product = opset15.matmul(x, opset15.constant(weights), transpose_a=False, transpose_b=False)
    return model_zoo.save(model_zoo.model_of({"y": product}, [x]), directory / "m")


def measure_children(model: Model) -> None:
    def work() -> None:
        model.open(lambda: None)
        model.infer({"x": np.ones((1, WIDTH), np.float32)})
        sizes = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        private = int(sizes["Private_Dirty:"]) + int(sizes["Private_Clean:"])
        assert private < 0.15 * WIDTH * WIDTH * 4 / 1024, private

    join(fork(work), fork(work))


def compile_while_children_run(directory: Path) -> None:
    """The arbiter keeps compiling while its children infer, and forks others with the new models."""
    models = [compiled(directory, "m0", convolutions())]
    go_on, stop = os.pipe()

    def work() -> None:
        for model in models:
            model.open(lambda: None)
        os.set_blocking(go_on, False)
        while True:
            for model in models:
                model.infer({"image": images(3)})
            try:
                assert os.read(go_on, 1) == b""
            except BlockingIOError:
                continue
            return

    def child() -> None:
        os.close(stop)
        work()

    running = []
    for index in range(1, 5):
        running += [fork(child), fork(child)]
        models.append(compiled(directory, f"m{index}", convolutions()))
        models[-1].open(lambda: None)
        models[-1].infer({"image": images(2)})
    os.close(stop)
    join(*running)


def compile_in_another_thread_while_forking(directory: Path) -> None:
    """The arbiter forks at any moment of a compilation in another thread."""
    model = compiled(directory, "m", convolutions())
    done = threading.Event()

    def compile_others() -> None:
        index = 0
        while not done.is_set():
            compiled(directory, f"other{index}", convolutions())
            index += 1

    thread = threading.Thread(target=compile_others)
    thread.start()

    def work() -> None:
        model.open(lambda: None)
        model.infer({"image": images(2)})

    try:
        for _ in range(20):
            join(fork(work))
    finally:
        done.set()
        thread.join()


def compile_in_children(directory: Path) -> None:
    """A child compiles with more threads and for latency, and keeps inherited models working."""
    shared = compiled(directory, "shared", convolutions())
    shared.open(lambda: None)
    shared.infer({"image": images(1)})
    own = [
        compiled(directory, "latency", convolutions(), PERFORMANCE_HINT="LATENCY"),
        compiled(directory, "throughput", convolutions(), PERFORMANCE_HINT="CUMULATIVE_THROUGHPUT"),
        compiled(directory, "threads", convolutions(), INFERENCE_NUM_THREADS=2),
    ]
    assert not any(model.compilation.shared for model in own)

    def work() -> None:
        for model in (shared, *own):
            model.open(lambda: None)
        results = [model.infer({"image": images(2)})["y"].array.copy() for model in (shared, *own)]
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=0.05, atol=0.5)

    for _ in range(5):
        join(fork(work), fork(work))


def import_in_children(directory: Path) -> None:
    """Children import a model from OpenVINO's cache together; one of them has written it like a trial."""
    shared = compiled(directory, "shared", convolutions())
    shared.open(lambda: None)
    base_path = model_zoo.save(convolutions(), directory / "own")
    own = load(base_path, directory / "cache", PERFORMANCE_HINT="LATENCY")

    def work(imported: bool) -> None:
        own.open(lambda: None)
        assert is_imported(own) == imported
        found = own.infer({"image": images(2)})["y"].array
        np.testing.assert_allclose(found, shared.infer({"image": images(2)})["y"].array, rtol=0.05, atol=0.5)

    join(fork(lambda: work(imported=False)))
    for _ in range(5):
        join(*(fork(lambda: work(imported=True)) for _ in range(4)))


def change_a_cached_model(directory: Path) -> None:
    """A model with weights changed in place is not taken from OpenVINO's cache."""

    def infer(model: Model) -> np.ndarray:
        model.open(lambda: None)
        return model.infer({"image": images(2)})["y"].array.copy()

    base_path = model_zoo.save(convolutions(), directory / "m")
    before = infer(load(base_path, directory / "cache"))
    weights = base_path / "1" / "model.bin"
    content = bytearray(weights.read_bytes())
    content[-4:] = np.float32(100).tobytes()
    times = weights.stat()
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = load(base_path, directory / "cache")
    assert not is_imported(changed)
    assert not np.allclose(infer(changed), before)


def failures_arrive(directory: Path) -> None:
    """An inference that fails in a forked child raises an error there, and the next one succeeds."""
    from ovms_rest.errors import InvalidRequestError

    model = compiled(directory, "m", model_zoo.reshaping())
    x = np.ones(6, np.float32)

    def work() -> None:
        model.open(lambda: None)
        model.infer({"x": x, "dims": np.int64([2, 3])})
        try:
            model.infer({"x": x, "dims": np.int64([4, 2])})
        except InvalidRequestError:
            assert model.infer({"x": x, "dims": np.int64([3, 2])})["y"].shape == (3, 2)
        else:
            raise AssertionError("it did not fail")

    join(fork(work))


SCENARIOS = (
    many_forks,
    many_forks_of_an_imported_model,
    memory_of_a_model,
    memory_of_an_imported_model,
    compile_while_children_run,
    compile_in_another_thread_while_forking,
    compile_in_children,
    import_in_children,
    change_a_cached_model,
    failures_arrive,
)

if __name__ == "__main__":
    next(scenario for scenario in SCENARIOS if scenario.__name__ == sys.argv[1])(Path(sys.argv[2]))
