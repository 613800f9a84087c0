"""The cost of a pipeline beyond its inferences.

    PYTHONPATH=tests/helpers python tests/benchmarks/pipelines.py [SECONDS [ROUNDS]]

Two relu models, of rows of 4 and of 602 KB. In process and in a loop: a chain of the two against their two inferences,
and a demultiplexer before one, with a node that gathers, against an inference for each of its shards; microseconds of
the best round and the median of all. In a service with one worker: the CPU time of a request to the chain against that
of a request to one model plus an inference. Needs wrk (Debian: apt-get install wrk).
"""

import statistics
import time

import model_zoo
import numpy as np
from measure import benchmark, load, pack_array, print_header, print_row
from service import serve

from ovms_rest.models.compilation import Compilation
from ovms_rest.models.runtime import Model
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.plan import REQUEST_STEP, ModelPart, Output, Plan, Step, Wire
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.shared_memory.counters import Counters

CONNECTIONS = 4
SHAPES = {"4 floats": (1, 4), "602 KB": (1, 3, 224, 224)}
SHARDS = 16


class Largest:
    """A custom node x -> y, the largest of all shards."""

    model = None

    def __init__(self, shape):
        self.inputs, self.outputs = described("x", (SHARDS, *shape)), described("y", shape)

    def open(self):
        pass

    def execute(self, arrays):
        """Return one shard, because the node itself is not measured."""
        return {"y": arrays["x"][0]}


def described(name, shape):
    return {name: TensorMetadata(name, "FP32", tuple(Dim(size, size) for size in shape))}


def load_models(directory, shape):
    """Load the models a and b of a shape, with counters as in a service."""
    counters = Counters(1)
    models = []
    for name in "ab":
        base_path = directory / f"{name}{len(shape)}"
        model_zoo.save(model_zoo.relu(shape), base_path)
        model = Model(name, 1, base_path / "1", Compilation("CPU", {"INFERENCE_NUM_THREADS": 1}, False, ""))
        model.open(lambda: None)
        model.counters = counters.of(name, "1")
        models.append(model)
    return models


def make_chain(models, shape):
    """Make in -> a -> b -> out."""
    steps = [
        Step("first", ModelPart(models[0]), (Wire("x", REQUEST_STEP, "in"),), (), used=("y",)),
        Step("second", ModelPart(models[1]), (Wire("x", 0, "y"),), (), used=("y",)),
    ]
    return make("chain", steps, described("in", shape), described("out", shape))


def make_demultiplexer(models, shape, is_gathered):
    """Make in, of SHARDS -> a for each of them -> a node that gathers, or the response that does."""
    steps = [Step("each", ModelPart(models[0]), (Wire("x", REQUEST_STEP, "in"),), (REQUEST_STEP,), used=("y",))]
    if is_gathered:
        steps.append(Step("all", Largest(shape), (Wire("x", 0, "y"),), (), gathers=REQUEST_STEP, used=("y",)))
    given, taken = described("in", (SHARDS, *shape)), described("out", shape if is_gathered else (SHARDS, *shape))
    return make("demultiplexer", steps, given, taken, SHARDS)


def make(name, steps, inputs, outputs, count=None):
    output = Output("out", len(steps) - 1, "y")
    return Pipeline(Plan(ModelMetadata(name, "1", inputs, outputs), tuple(steps), (output,), count))


def cases(directory):
    """Return by name the call of a pipeline, the call of its inferences alone, and their number."""
    found = {}
    for size, shape in SHAPES.items():
        a, b = load_models(directory, shape)
        array = np.random.default_rng(0).standard_normal(shape, np.float32)
        arrays, whole = {"in": array}, {"in": np.stack([array] * SHARDS)}
        shards = [{"x": array.copy()} for _ in range(SHARDS)]

        def two(a=a, b=b, array=array):
            b.infer({"x": a.infer({"x": array})["y"].array})

        def each(a=a, shards=shards):
            for arrays in shards:
                a.infer(arrays)

        chain = make_chain((a, b), shape)
        found[f"chain of 2, {size}"] = lambda chain=chain, arrays=arrays: chain.infer(arrays), two, 2
        for title, is_gathered in (("the response", False), ("a node", True)):
            pipeline = make_demultiplexer((a, b), shape, is_gathered)
            call = lambda pipeline=pipeline, whole=whole: pipeline.infer(whole)  # noqa: E731
            found[f"{SHARDS} shards gathered by {title}, {size}"] = call, each, SHARDS
    return found


def measure(call, seconds):
    """Return the CPU microseconds of a call."""
    count, deadline, started = 0, time.monotonic() + seconds, time.process_time_ns()
    while time.monotonic() < deadline:
        for _ in range(10):
            call()
        count += 10
    return (time.process_time_ns() - started) / count / 1000


def measure_calls(directory, seconds, rounds):
    overhead = "overhead per inference, us: best"
    print_header("pipeline", "inferences alone, us", "pipeline, us", "ratio", overhead, "median")
    for name, (call, alone, inferences) in cases(directory).items():
        pairs = [(measure(alone, seconds), measure(call, seconds)) for _ in range(rounds)]
        bare, whole = (min(times) for times in zip(*pairs, strict=True))
        median = statistics.median(second - first for first, second in pairs) / inferences
        more = (whole - bare) / inferences
        times = f"{bare:.1f}", f"{whole:.1f}"
        print_row(name, *times, *(f"{figure:.2f}" for figure in (whole / bare, more, median)))


def write_config(directory):
    """Save the models a and b of every shape; return a config with them and their chains."""
    models, pipelines = {}, []
    for size, shape in SHAPES.items():
        key = size.replace(" ", "-")
        models |= {f"{name}-{key}": model_zoo.relu(shape) for name in "ab"}
        nodes = [node("first", f"a-{key}", "request", "x"), node("second", f"b-{key}", "first", "y")]
        outputs = [{"y": {"node_name": "second", "data_item": "y"}}]
        pipelines.append({"name": f"chain-{key}", "inputs": ["x"], "nodes": nodes, "outputs": outputs})
    return model_zoo.save_all(directory, models, pipeline_config_list=pipelines)


def node(name, model, source, item):
    return {
        "name": name,
        "type": "DL model",
        "model_name": model,
        "inputs": [{"x": {"node_name": source, "data_item": item}}],
        "outputs": [{"data_item": "y", "alias": "y"}],
    }


def measure_service(directory, seconds, rounds):
    print_header("request", "model, CPU us", "an inference, us", "chain, CPU us", "chain / (model + inference)")
    with serve(directory, "-w", "1", config=write_config(directory)) as service:
        service.wait_for_workers(1)
        for size, shape in SHAPES.items():
            key = size.replace(" ", "-")
            array = np.random.default_rng(0).standard_normal(shape, np.float32)
            body, headers = pack_array(array)
            alone, _ = load_models(directory / "alone", shape)
            results = {"model": [], "bare": [], "chain": []}
            for _ in range(rounds):
                for name, model in (("model", f"a-{key}"), ("chain", f"chain-{key}")):
                    path = f"/v2/models/{model}/infer"
                    done = load(service, directory, path, body, CONNECTIONS, seconds, **headers)
                    results[name].append(done.cpu * 1e3)
                results["bare"].append(measure(lambda alone=alone, array=array: alone.infer({"x": array}), seconds))
            model, bare, chain = (min(values) for values in results.values())
            times = (f"{value:.0f}" for value in (model, bare, chain))
            print_row(f"{size}, binary", *times, f"{chain / (model + bare):.2f}")


def main():
    with benchmark(1, 5) as (directory, seconds, rounds):
        measure_calls(directory / "calls", seconds, rounds)
        print()
        (directory / "service").mkdir()
        measure_service(directory / "service", seconds, rounds)


if __name__ == "__main__":
    main()
