"""Running pipelines: results, memory and failures, with models that overwrite their outputs."""

import weakref

import ml_dtypes
import model_zoo
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import Type, opset15

from ovms_rest.errors import InferenceError, InvalidRequestError, NoContentError
from ovms_rest.models.compilation import Compilation
from ovms_rest.models.runtime import Model
from ovms_rest.models.servable import NOT_COUNTED
from ovms_rest.pipelines import execution
from ovms_rest.pipelines.definition import DYNAMIC
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.plan import REQUEST_STEP, ModelPart, Output, Plan, Step, Wire
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.shared_memory.counters import Counters

POISON = 85


# --- Models, nodes, pipelines


def tensor(name, *sizes, datatype="FP32"):
    """Describe a tensor; -1 means any size."""
    return TensorMetadata(name, datatype, tuple(Dim(0, None) if size == -1 else Dim(size, size) for size in sizes))


def by_name(tensors):
    return {tensor.name: tensor for tensor in tensors}


class FakeModel:
    """A model that infers by a function of arrays by name, and overwrites all its earlier outputs first."""

    def __init__(self, function, inputs, outputs):
        self.metadata = ModelMetadata("m", "1", by_name(inputs), by_name(outputs))
        self.counters = NOT_COUNTED
        self.function = function
        self.given, self.spoiled = [], 0

    batch_limit = 0

    def infer(self, arrays, record=None):
        for array in self.given[self.spoiled :]:  # the earlier ones are overwritten already
            (array.symbols if isinstance(array, BytesArray) else array)[...] = POISON
        for array in arrays.values():
            if not isinstance(array, BytesArray):
                assert type(array) is np.ndarray
                assert array.flags.carray
        results = self.function(**arrays)
        self.spoiled = len(self.given)
        self.given += results.values()
        return {name: Tensor(name, self.metadata.outputs[name].datatype, array) for name, array in results.items()}


class FakeNode:
    """A custom node that is a function of arrays by name."""

    model = None

    def __init__(self, function, inputs, outputs):
        self.inputs, self.outputs = by_name(inputs), by_name(outputs)
        self.execute = lambda arrays: function(**arrays)
        self.opened = 0

    def open(self):
        self.opened += 1


def x_to_y(kind, function, *sizes, datatype="FP32"):
    """Make a model or node whose input x and output y have the same shape."""
    return kind(function, [tensor("x", *sizes, datatype=datatype)], [tensor("y", *sizes, datatype=datatype)])


def adder(number, *sizes):
    """Make a model x -> y = x + number."""
    return x_to_y(FakeModel, lambda x: {"y": x + np.float32(number)}, *sizes)


def one():
    return adder(1, 1, 10)


def step(name, runs, level="", count=None, gathers=None, **wires):
    """Describe a step; wires are {tensor: "node.item"}, `level` and `gathers` name demultiplexers."""
    return name, runs, level.split(), count, gathers, wires


def split(*sizes, name="split", source="request.in", level="", item="whole"):
    """Describe a step that passes a tensor on and splits it."""
    node = FakeNode(lambda x: {item: x.copy()}, [tensor("x", *sizes)], [tensor(item, *sizes)])
    return step(name, node, level, sizes[0], x=source)


def make(inputs, *steps, count=None, **outputs):
    """Make the pipeline p of described steps; the outputs are {name: "node.item"}."""
    places = {"request": REQUEST_STEP} | {name: place for place, (name, *_) in enumerate(steps)}
    taken = [source.split(".") for *_, wires in steps for source in wires.values()]
    taken += [source.split(".") for source in outputs.values()]
    made = [
        Step(
            name,
            ModelPart(runs) if hasattr(runs, "infer") else runs,
            tuple(Wire(key, places[node], item) for key, (node, item) in sources(wires)),
            tuple(places[other] for other in level),
            shards,
            None if gathers is None else places[gathers],
            tuple(dict.fromkeys(item for node, item in taken if node == name)),
        )
        for name, runs, level, shards, gathers, wires in steps
    ]
    described = {output: TensorMetadata(output, "FP32", None) for output in outputs}
    results = tuple(Output(key, places[node], item) for key, (node, item) in sources(outputs))
    return Pipeline(Plan(ModelMetadata("p", "1", by_name(inputs), described), tuple(made), results, count))


def sources(connections):
    return [(key, source.split(".")) for key, source in connections.items()]


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def infer(pipeline, given, **others):
    """Infer with an array for the input "in", and others; return arrays by name."""
    return {name: tensor.array for name, tensor in pipeline.infer({"in": given, **others}).items()}


def failure(error, pipeline, given, **others):
    """Return the message of the error that this inference raises."""
    with pytest.raises(error) as caught:
        infer(pipeline, given, **others)
    return str(caught.value)


IN = [tensor("in", 1, 10)]
X = numbers(1, 10)


def chain(first, second):
    """Make in -> first -> second -> out."""
    inputs = [tensor("in", *(dim.low for dim in first.metadata.inputs["x"].dims))]
    return make(inputs, step("n1", first, x="request.in"), step("n2", second, x="n1.y"), out="n2.y")


# --- OVMS's examples


def test_a_model_can_run_twice_in_a_chain():
    model = one()
    assert (infer(chain(model, model), X)["out"] == X + 2).all()


def test_parallel_models_feed_one_node():
    inputs = [tensor("left", 1, 10), tensor("right", 1, 10)]
    joined = FakeModel(lambda left, right: {"sum": left + right}, inputs, [tensor("sum", 1, 10)])
    pipeline = make(
        IN,
        step("a", one(), x="request.in"),
        step("b", adder(10, 1, 10), x="request.in"),
        step("c", joined, left="a.y", right="b.y"),
        out="c.sum",
        a="a.y",
    )
    results = infer(pipeline, X)
    assert (results["out"] == 2 * X + 11).all()
    assert (results["a"] == X + 1).all()


def operations():
    """Describe a static demultiplexer followed by a model."""

    def operate(x, factors):
        add, subtract, multiply, divide = factors[0]
        return {"results": np.stack([x + add, x - subtract, x * multiply, x / divide])}

    different = FakeNode(operate, [tensor("x", 1, 10), tensor("factors", 1, 4)], [tensor("results", 4, 1, 10)])
    return [
        step("ops", different, count=4, x="request.in", factors="request.factors"),
        step("dummy", one(), "ops", x="ops.results"),
    ]


OPERANDS = [*IN, tensor("factors", 1, 4)]
FACTORS = np.float32([[1, 2, 3, 4]])
OPERATED = np.stack([X + 1, X - 2, X * 3, X / 4])


def chooser(seen):
    """Describe a node that gathers the results of the operations and returns the largest."""

    def function(x):
        seen.append(x)
        return {"max": x.max(0)}

    return step(
        "choose", FakeNode(function, [tensor("x", 4, 1, 10)], [tensor("max", 1, 10)]), gathers="ops", x="dummy.y"
    )


def test_a_static_demultiplexer_is_gathered_by_a_node():
    pipeline = make(OPERANDS, *operations(), chooser([]), out="choose.max")
    assert (infer(pipeline, X, factors=FACTORS)["out"] == (OPERATED + 1).max(0)).all()


def test_the_response_gathers_shards_that_no_node_gathers():
    results = infer(make(OPERANDS, *operations(), out="dummy.y", whole="ops.results"), X, factors=FACTORS)
    assert (results["out"] == OPERATED + 1).all()
    assert (results["whole"] == OPERATED).all()


def detection(found):
    """Make image -> detector -> cropper of `found` crops -> two recognisers; return it with the first of these."""
    crop = FakeNode(
        lambda image, detection: {
            "crops": np.stack([image[:, :4] * i for i in range(found)]) if found else np.zeros((0, 1, 4), np.float32),
            "confidences": np.arange(found, dtype=np.float32).reshape(found, 1, 1),
        },
        [tensor("image", 1, 10), tensor("detection", 1, 10)],
        [tensor("crops", -1, 1, 4), tensor("confidences", -1, 1, 1)],
    )
    color = adder(1, 1, 4)
    pipeline = make(
        IN,
        step("detect", one(), x="request.in"),
        step("crop", crop, count=DYNAMIC, image="request.in", detection="detect.y"),
        step("color", color, "crop", x="crop.crops"),
        step("type", adder(2, 1, 4), "crop", x="crop.crops"),
        crops="crop.crops",
        confidences="crop.confidences",
        colors="color.y",
        types="type.y",
    )
    return pipeline, color


@pytest.mark.parametrize("found", [1, 3])
def test_a_dynamic_demultiplexer_runs_once_per_shard(found):
    results = infer(detection(found)[0], X)
    crops = np.stack([X[:, :4] * i for i in range(found)])
    assert (results["crops"] == crops).all()
    assert (results["colors"] == crops + 1).all()
    assert (results["types"] == crops + 2).all()
    assert results["confidences"].shape == (found, 1, 1)


def test_a_dynamic_demultiplexer_without_shards_raises_no_content():
    pipeline, color = detection(0)
    message = "pipeline 'p' node 'crop' output 'crops': its first dim is 0, so there are no shards"
    assert failure(NoContentError, pipeline, X) == message
    assert not color.given


@pytest.mark.parametrize("count", [3, DYNAMIC])
def test_a_pipeline_with_a_count_splits_its_requests(count):
    steps = step("n", adder(1, 1, 4), "request", x="request.in")
    x = numbers(3, 1, 4)
    results = infer(make([tensor("in", count, 1, 4)], steps, out="n.y", whole="request.in", count=count), x)
    assert (results["out"] == x + 1).all()
    assert results["whole"] is x


def test_a_custom_node_feeds_a_model():
    normalize = x_to_y(FakeNode, lambda x: {"y": (x - 2) / 4}, 1, 10)
    pipeline = make(IN, step("prepare", normalize, x="request.in"), step("n", one(), x="prepare.y"), out="n.y")
    assert (infer(pipeline, X)["out"] == (X - 2) / 4 + 1).all()


# --- Levels


def nested():
    """Describe in [2,3,4] -> split by 2 -> split by 3 -> add 1."""
    return [
        split(2, 3, 4, name="outer"),
        split(3, 4, name="inner", source="outer.whole", level="outer", item="rows"),
        step("add", adder(1, 4), "outer inner", x="inner.rows"),
    ]


NESTED = [tensor("in", 2, 3, 4)]


def test_nested_demultiplexers_are_gathered_in_reverse():
    by_sum = x_to_y(FakeModel, lambda x: {"y": x - x.sum()}, 3, 4)
    total = x_to_y(FakeModel, lambda x: {"y": x * 2}, 2, 3, 4)
    pipeline = make(
        NESTED,
        *nested(),
        step("sum", by_sum, "outer", gathers="inner", x="add.y"),
        step("all", total, gathers="outer", x="sum.y"),
        out="all.y",
    )
    x = numbers(2, 3, 4)
    assert (infer(pipeline, x)["out"] == 2 * (x + 1 - (x + 1).sum((1, 2), keepdims=True))).all()


def test_the_response_gathers_all_levels_outermost_first():
    results = infer(make(NESTED, *nested(), out="add.y", rows="inner.rows"), numbers(2, 3, 4))
    assert (results["out"] == numbers(2, 3, 4) + 1).all()
    assert (results["rows"] == numbers(2, 3, 4)).all()


def test_a_node_gathering_from_its_source_gets_the_whole_output():
    gathering = step("n", adder(1, 3, 4), gathers="split", x="split.whole")
    results = infer(make([tensor("in", 3, 4)], split(3, 4), gathering, out="n.y"), numbers(3, 4))
    assert (results["out"] == numbers(3, 4) + 1).all()


def test_shards_of_a_vector_are_arrays_without_dims():
    scalar = x_to_y(FakeModel, lambda x: {"y": np.asarray(x + 1)})
    pipeline = make([tensor("in", 3)], split(3), step("n", scalar, "split", x="split.whole"), out="n.y")
    assert infer(pipeline, numbers(3))["out"].tolist() == [1, 2, 3]


def test_empty_shards_are_gathered():
    pipeline = make(
        [tensor("in", 2, 0)],
        split(2, 0),
        step("n", adder(1, 0), "split", x="split.whole"),
        step("all", adder(1, 2, 0), gathers="split", x="n.y"),
        out="all.y",
    )
    assert infer(pipeline, numbers(2, 0))["out"].shape == (2, 0)


def test_sessions_may_pass_different_shapes_to_the_next_node():
    grow = FakeModel(lambda x: {"y": np.repeat(x, int(x[0]) + 1)}, [tensor("x", 1)], [tensor("y", -1)])
    shrink = FakeModel(lambda x: {"y": np.float32([x.size])}, [tensor("x", -1)], [tensor("y", 1)])
    pipeline = make(
        [tensor("in", 3, 1)],
        split(3, 1),
        step("grow", grow, "split", x="split.whole"),
        step("shrink", shrink, "split", x="grow.y"),
        out="shrink.y",
    )
    assert infer(pipeline, numbers(3, 1))["out"].tolist() == [[1], [2], [3]]


# --- Any pipeline


def weigh(x, y):
    """Compute a value that depends on all inputs of a session."""
    return {"z": np.asarray(2 * x + y + x.sum()), "w": np.asarray(x - y)}


def expect(x, y, depth):
    """Compute the same for all sessions in numpy, with their levels as the first dims."""
    axes = tuple(range(depth, x.ndim))
    return {"z": 2 * x + y + x.sum(axes, keepdims=True), "w": x - y}


@st.composite
def pipelines(draw):
    """Make a pipeline, its input, and its outputs as computed by numpy."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    ports = [TensorMetadata(name, "INT64", None) for name in "xyzw"]
    parts = [kind(weigh, ports[:2], ports[2:]) for kind in (FakeModel, FakeModel, FakeNode)]
    count = draw(st.sampled_from([None, shape[0], DYNAMIC]))
    given = np.arange(np.prod(shape)).reshape(shape)
    values = {"request.in": given}
    # The keys of values by the demultiplexers that are open after them.
    keys = {("request",) if count else (): ["request.in"]}
    steps = []
    for index in range(draw(st.integers(1, 7))):
        name = f"n{index}"
        level = draw(st.sampled_from(sorted(keys)))
        wires = {port: draw(st.sampled_from(keys[level])) for port in "xy"}
        gathers = None
        if level and draw(st.booleans()):
            *rest, gathers = level
            level = tuple(rest)
        results = expect(*(values[wire] for wire in wires.values()), len(level))
        part, shards, opened = draw(st.sampled_from(parts)), None, level
        if len(level) < min(3, len(shape)) and draw(st.booleans()):
            shards = draw(st.sampled_from([shape[len(level)], DYNAMIC]))
            opened = (*level, name)
        steps.append(step(name, part, " ".join(level), shards, gathers, **wires))
        for item, array in results.items():
            values[f"{name}.{item}"] = array
            keys.setdefault(opened, []).append(f"{name}.{item}")
    chosen = draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=6, unique=True))
    outputs = {f"out{number}": key for number, key in enumerate(chosen)}
    pipeline = make([TensorMetadata("in", "INT64", None)], *steps, count=count, **outputs)
    return pipeline, given, {name: values[key] for name, key in outputs.items()}


@settings(max_examples=200)
@given(pipelines())
def test_every_pipeline_computes_the_same_as_numpy(case):
    pipeline, given, expected = case
    for _ in range(2):  # again, over the memory that the first run left
        results = infer(pipeline, given.copy())
        assert results.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(results[name], array)


# --- Memory


def watching(seen, kind=FakeModel):
    """Make x -> y = x + 1, a model or node that keeps its inputs in `seen`."""
    return x_to_y(kind, lambda x: seen.append(x) or {"y": x + 1}, 1, 10)


def test_a_chain_of_two_models_copies_nothing():
    seen = []
    first, second = one(), watching(seen)
    result = infer(chain(first, second), X)["out"]
    assert seen[0] is first.given[0]
    assert result is second.given[0]


def test_the_last_result_of_a_model_used_twice_is_not_copied():
    model = one()
    assert infer(chain(model, model), X)["out"] is model.given[1]


def twice(model, given=IN):
    """Make a pipeline that gives its input to a model twice."""
    return make(given, step("n1", model, x="request.in"), step("n2", model, x="request.in"), first="n1.y", last="n2.y")


def test_a_result_is_copied_for_the_response_when_its_model_runs_again():
    model = one()
    results = infer(twice(model), X)
    assert (results["first"] == X + 1).all()
    assert results["last"] is model.given[1]


def test_a_result_is_not_copied_when_its_model_runs_again_after_its_last_use():
    seen = []
    model = one()
    steps = step("n1", model, x="request.in"), step("n2", watching(seen), x="n1.y"), step("n3", model, x="n2.y")
    assert (infer(make(IN, *steps, out="n3.y"), X)["out"] == X + 3).all()
    assert seen[0] is model.given[0]


def test_shards_are_views_on_what_is_split():
    seen, whole = [], numbers(4, 1, 10)
    node = FakeNode(lambda x: {"whole": whole}, [tensor("x", 1, 10)], [tensor("whole", 4, 1, 10)])
    steps = step("split", node, count=4, x="request.in"), step("n", watching(seen), "split", x="split.whole")
    results = infer(make(IN, *steps, out="n.y", whole="split.whole"), X)
    assert len(seen) == 4
    assert all(np.shares_memory(shard, whole[index]) for index, shard in enumerate(seen))
    assert results["whole"] is whole


def test_the_gathered_array_goes_to_the_response_and_to_a_node_as_one_memory():
    seen = []
    results = infer(make(OPERANDS, *operations(), chooser(seen), out="choose.max", all="dummy.y"), X, factors=FACTORS)
    assert np.shares_memory(results["all"], seen[0])
    assert (results["all"] == OPERATED + 1).all()


def test_an_input_that_a_model_passes_through_is_copied():
    """OpenVINO returns a view of the input that does not keep its memory alive."""
    first, through = one(), x_to_y(FakeModel, lambda x: {"y": x.view()}, 1, 10)
    steps = step("n1", first, x="request.in"), step("through", through, x="n1.y"), step("n2", first, x="through.y")
    results = infer(make(IN, *steps, out="n2.y", through="through.y"), X)
    assert (results["through"] == X + 1).all()
    assert (results["out"] == X + 2).all()


def test_memory_is_freed_after_its_last_use():
    made, alive = [], []

    def give(x):
        array = x + 1
        made.append(weakref.ref(array))
        return {"y": array}

    def look(x):
        alive.append([reference() is not None for reference in made])
        return {"y": x + 1}

    a, b, c = (x_to_y(FakeNode, function, 1, 10) for function in (give, give, look))
    infer(make(IN, step("a", a, x="request.in"), step("b", b, x="a.y"), step("c", c, x="b.y"), out="c.y"), X)
    assert alive == [[False, True]]


# --- Strings

STRINGS = [tensor("in", -1, datatype="BYTES")]


def texts():
    return BytesArray.of([b"a", b"", b"b\0"], (3,))


def reverser():
    """Make a model of strings, x -> y reversed."""

    def reverse(x):
        return {"y": BytesArray.of([element[::-1] for element in x.elements()], x.shape)}

    return x_to_y(FakeModel, reverse, -1, datatype="BYTES")


def test_strings_pass_from_the_request_through_a_node_to_the_response():
    model = reverser()
    (result,) = make(STRINGS, step("n", model, x="request.in"), out="n.y").infer({"in": texts()}).values()
    assert (result.datatype, result.array.elements()) == ("BYTES", [b"a", b"", b"\0b"])
    assert result.array is model.given[0]


def test_strings_pass_between_nodes():
    pipeline = make(STRINGS, step("n1", reverser(), x="request.in"), step("n2", reverser(), x="n1.y"), out="n2.y")
    assert infer(pipeline, texts())["out"].elements() == texts().elements()


def test_strings_are_copied_like_numbers():
    assert infer(twice(reverser(), STRINGS), texts())["first"].elements() == [b"a", b"", b"\0b"]


def test_strings_that_are_passed_through_are_copied():
    through = x_to_y(FakeModel, lambda x: {"y": x}, -1, datatype="BYTES")
    given = texts()
    result = infer(make(STRINGS, step("n", through, x="request.in"), out="n.y"), given)["out"]
    assert result.elements() == given.elements()
    assert not np.shares_memory(result.symbols, given.symbols)


def namer(name="y", datatype="BYTES"):
    """Make a model of numbers, x -> y, a string for each."""
    sizes = (-1,) if datatype == "BYTES" else (-1, -1)
    return FakeModel(
        lambda x: {name: BytesArray.of([b"%d" % number for number in x], x.shape)},
        [tensor("x", 2)],
        [tensor(name, *sizes, datatype=datatype)],
    )


@pytest.mark.parametrize("model", [namer(), namer("y_string", "UINT8")])
def test_strings_of_sessions_are_gathered_by_the_response(model):
    (item,) = model.metadata.outputs
    steps = split(3, 2), step("n", model, "split", x="split.whole")
    (result,) = make([tensor("in", 3, 2)], *steps, out=f"n.{item}").infer({"in": numbers(3, 2)}).values()
    assert (result.datatype, result.shape) == ("BYTES", (3, 2))
    assert result.array.elements() == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_a_uint8_matrix_that_became_strings_fits_no_model():
    taker = FakeModel(lambda x: {"y": x}, [tensor("x", -1, -1, datatype="UINT8")], [tensor("y", -1, -1)])
    steps = step("n", namer("y_string", "UINT8"), x="request.in"), step("n2", taker, x="n.y_string")
    message = "pipeline 'p' node 'n2' input 'x': shape is [2], the model takes [-1,-1]"
    assert failure(InvalidRequestError, make([tensor("in", 2)], *steps, out="n2.y"), numbers(2)) == message


# --- Failures


def failing(error):
    def fail(**arrays):
        raise error

    return fail


def dynamic(*shapes, count=DYNAMIC, sizes=(-1, -1)):
    """Make in -> a node that splits an output of each shape -> an adder of the first."""
    names = [f"o{index}" for index in range(len(shapes))]
    node = FakeNode(
        lambda x: {name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)},
        [tensor("x", 1, 10)],
        [tensor(name, *sizes) for name in names],
    )
    steps = step("n", node, count=count, x="request.in"), step("m", adder(1, *sizes[1:]), "n", x="n.o0")
    return make(IN, *steps, out="m.y", **{name: f"n.{name}" for name in names})


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (dynamic((3, 2), count=4), "'o0': its first dim is 3, but demultiply_count is 4"),
        (dynamic((0, 2), count=4), "'o0': its first dim is 0, but demultiply_count is 4"),
        (dynamic((2, 2), (3, 2)), "'o1': its first dim is 3, but that of pipeline 'p' node 'n' output 'o0' is 2"),
        (dynamic((2, 2), (0, 2)), "'o1': its first dim is 0, but that of pipeline 'p' node 'n' output 'o0' is 2"),
        (dynamic((10_001, 2)), "'o0': its first dim is 10001; a demultiplexer makes at most 10000 shards"),
        (dynamic((), sizes=()), "'o0': a tensor without dims cannot be split"),
    ],
)
def test_an_output_that_cannot_be_split_fails(pipeline, message):
    assert failure(InferenceError, pipeline, X) == f"pipeline 'p' node 'n' output {message}"


@pytest.mark.parametrize("gathered", [True, False])
def test_sessions_that_need_too_much_memory_are_rejected(monkeypatch, gathered):
    """A small request can have many shards that each become large."""
    monkeypatch.setattr(execution, "MAX_VALUE_BYTES", 400)
    wide = FakeModel(lambda x: {"y": np.repeat(x, 30, axis=-1)}, [tensor("x", 1)], [tensor("y", 30)])
    short = FakeModel(lambda y: {"z": y[:1]}, [tensor("y", 30)], [tensor("z", 1)])
    steps = step("n", wide, "request", x="request.in"), step("s", short, "request", y="n.y")
    pipeline = make([tensor("in", -1, 1)], *steps, count=DYNAMIC, out="n.y" if gathered else "s.z")
    assert infer(pipeline, numbers(3, 1))["out"].shape == ((3, 30) if gathered else (3, 1))
    assert failure(InvalidRequestError, pipeline, numbers(4, 1)) == (
        "pipeline 'p' node 'n' output 'y': 4 sessions of 120 bytes each exceed the limit of 400 bytes; "
        "send fewer shards"
    )


def test_the_largest_number_of_shards_is_accepted():
    assert infer(dynamic((10_000, 2)), X)["out"].shape == (10_000, 2)


@pytest.mark.parametrize(
    ("count", "x", "y", "error", "message"),
    [
        (3, 3, 2, InvalidRequestError, "input 'y': its first dim is 2, but demultiply_count is 3"),
        (DYNAMIC, 3, 2, InvalidRequestError, "input 'y': its first dim is 2, but that of input 'in' is 3"),
        (DYNAMIC, 0, 0, NoContentError, "input 'in': its first dim is 0, so there are no shards"),
        (
            DYNAMIC, 10_001, 10_001, InvalidRequestError,
            "input 'in': its first dim is 10001; a demultiplexer makes at most 10000 shards",
        ),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_split_is_rejected(count, x, y, error, message):
    both = FakeModel(lambda x, y: {"z": x + y}, [tensor("x", 1), tensor("y", 1)], [tensor("z", 1)])
    steps = step("n", both, "request", x="request.in", y="request.y")
    pipeline = make([tensor("in", -1, 1), tensor("y", -1, 1)], steps, count=count, out="n.z")
    assert failure(error, pipeline, numbers(x, 1), y=numbers(y, 1)) == message


def repeater(kind=FakeModel):
    """Make x -> y with x elements."""
    return kind(lambda x: {"y": np.zeros((1, int(x.max())), np.float32)}, [tensor("x", 1)], [tensor("y", 1, -1)])


# Who made a value decides who has to mend it: models compute what the client sent, custom code may be wrong.
MAKERS = pytest.mark.parametrize(("maker", "error"), [(FakeModel, InvalidRequestError), (FakeNode, InferenceError)])


@MAKERS
def test_different_shapes_cannot_be_gathered(maker, error):
    pipeline = make(
        [tensor("in", -1, 1)], step("n", repeater(maker), "request", x="request.in"), count=DYNAMIC, out="n.y"
    )
    assert failure(error, pipeline, numbers(2, 1) + 3) == (
        "pipeline 'p' node 'n' output 'y': its sessions have the shapes [1,3] and [1,4], which cannot be gathered"
    )


def test_different_shapes_that_a_model_makes_of_the_shards_of_a_node_are_a_failure():
    steps = split(2, 1), step("n", repeater(), "split", x="split.whole")
    assert failure(InferenceError, make([tensor("in", 2, 1)], *steps, out="n.y"), numbers(2, 1) + 3) == (
        "pipeline 'p' node 'n' output 'y': its sessions have the shapes [1,3] and [1,4], which cannot be gathered"
    )


@MAKERS
def test_an_output_with_another_number_of_shards_is_reported(maker, error):
    """What a model splits has as many rows as the request has numbers."""
    through = maker(lambda x: {"y": x}, [tensor("x", -1, 1)], [tensor("y", -1, 1)])
    steps = step("n", through, count=2, x="request.in"), step("m", adder(1, 1), "n", x="n.y")
    message = "pipeline 'p' node 'n' output 'y': its first dim is 3, but demultiply_count is 2"
    assert failure(error, make([tensor("in", -1, 1)], *steps, out="m.y"), numbers(3, 1)) == message


@MAKERS
@pytest.mark.parametrize(
    ("taker", "word"), [(adder(1, 1, 5), "model"), (x_to_y(FakeNode, lambda x: {"y": x}, 1, 5), "node")]
)
def test_a_shape_that_does_not_fit_is_reported(maker, error, taker, word):
    pipeline = make([tensor("in", 1)], step("a", repeater(maker), x="request.in"), step("n", taker, x="a.y"), out="n.y")
    assert infer(pipeline, np.float32([5]))["out"].shape == (1, 5)
    message = f"pipeline 'p' node 'n' input 'x': shape is [1,10], the {word} takes [1,5]"
    assert failure(error, pipeline, np.float32([10])) == message


def test_a_shape_that_a_model_makes_of_the_output_of_a_node_is_a_failure():
    steps = step("c", x_to_y(FakeNode, lambda x: {"y": x}, 1), x="request.in"), step("a", repeater(), x="c.y")
    pipeline = make([tensor("in", 1)], *steps, step("n", adder(1, 1, 5), x="a.y"), out="n.y")
    message = "pipeline 'p' node 'n' input 'x': shape is [1,10], the model takes [1,5]"
    assert failure(InferenceError, pipeline, np.float32([10])) == message


def test_the_shape_of_every_session_must_fit():
    """The sessions of n output 1x3, then 1x4; a accepts only the first."""
    a = step("a", adder(1, 1, 3), "split", x="n.y")
    pipeline = make([tensor("in", 2, 1)], split(2, 1), step("n", repeater(), "split", x="split.whole"), a, out="a.y")
    message = "pipeline 'p' node 'a' input 'x': shape is [1,4], the model takes [1,3]"
    assert failure(InferenceError, pipeline, numbers(2, 1) + 3) == message


def test_a_gathered_shape_must_fit():
    steps = (
        step("n", adder(1, 1), "request", x="request.in"),
        step("all", adder(1, 2, 1), gathers="request", x="n.y"),
    )
    pipeline = make([tensor("in", -1, 1)], *steps, count=DYNAMIC, out="all.y")
    assert infer(pipeline, numbers(2, 1))["out"].tolist() == [[2], [3]]
    message = "pipeline 'p' node 'all' input 'x': shape is [3,1], the model takes [2,1]"
    assert failure(InvalidRequestError, pipeline, numbers(3, 1)) == message


@pytest.mark.parametrize("kind", [FakeModel, FakeNode], ids=["model", "custom"])
def test_a_failure_names_its_pipeline_and_node(kind):
    part = x_to_y(kind, failing(InferenceError("failed")), 1, 10)
    pipeline = make(IN, step("n", part, x="request.in"), out="n.y")
    assert failure(InferenceError, pipeline, X) == "pipeline 'p' node 'n': failed"


def test_an_error_that_a_node_raises_for_the_client_is_unchanged():
    part = x_to_y(FakeNode, failing(InvalidRequestError("no image")), 1, 10)
    assert failure(InvalidRequestError, make(IN, step("n", part, x="request.in"), out="n.y"), X) == "no image"


# --- As a servable


def test_opening_a_pipeline_opens_its_custom_nodes():
    node = watching([], FakeNode)
    make(IN, step("n", node, x="request.in"), step("m", one(), x="n.y"), out="m.y").open(lambda: None)
    assert node.opened == 1


def test_its_dependencies_are_its_models_without_repetition():
    model, other = one(), one()
    steps = step("a", model, x="request.in"), step("b", other, x="a.y"), step("c", model, x="b.y")
    assert make(IN, *steps, out="c.y").dependencies == (model, other)


def test_every_inference_is_counted_by_its_model():
    steps = operations()
    model = steps[1][1]
    model.counters = Counters(1).of("m", "1")
    infer(make(OPERANDS, *steps, out="dummy.y"), X, factors=FACTORS)
    read = model.counters.read()
    assert (read.inference_count, read.success.count, read.active) == (4, 4, 0)
    assert [(batch.batch_size, batch.count) for batch in read.batches] == [(1, 4)]
    assert read.compute_infer.ns > 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [(InferenceError("failed"), "failed"), (RuntimeError("a bug"), "failed"), (InvalidRequestError("no"), "invalid")],
)
def test_every_failure_is_counted_by_its_model(error, kind):
    model = x_to_y(FakeModel, failing(error))
    model.counters = Counters(1).of("m", "1")
    failure(type(error), make([tensor("in")], step("n", model, x="request.in"), out="n.y"), numbers())
    read = model.counters.read()
    assert (read.failures[kind].count, read.success.count, read.active) == (1, 0, 0)


def test_a_model_is_active_during_its_inference():
    model = one()
    model.counters = Counters(1).of("m", "1")
    active = []
    model.function = lambda x: active.append(model.counters.read().active) or {"y": x + 1}
    infer(chain(model, one()), X)
    assert active == [1]


# --- OpenVINO

LARGE = (1, 100_000)  # larger than the arrays that are copied in any case


def load(directory, model, name="m"):
    """Save a model, read it and open it."""
    model_zoo.save(model, directory / name)
    made = Model(name, 1, directory / name / "1", Compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, False, ""))
    made.open(lambda: None)
    return made


def increment(shape=LARGE):
    """Make a model x -> y = x + 1."""
    x = model_zoo.parameter("x", shape, Type.f32)
    return model_zoo.model_of({"y": opset15.add(x, opset15.constant(np.float32(1)))}, [x])


def test_a_chain_of_two_models_of_openvino(tmp_path):
    noise = np.random.default_rng(0).standard_normal(LARGE, np.float32)
    first, second = load(tmp_path, model_zoo.relu((-1, 100_000)), "a"), load(tmp_path, increment(), "b")
    pipeline = chain(first, second)
    for _ in range(2):
        x = noise.copy()
        result = infer(pipeline, x)["out"]
        assert (result == np.maximum(noise, 0) + 1).all()
        assert (x == noise).all()
    assert np.shares_memory(result, second.infer({"x": noise})["y"].array)


@pytest.mark.parametrize("shape", [LARGE, (-1, 100_000), (1, 10)])
def test_a_chain_of_one_model_of_openvino_twice(tmp_path, shape):
    model = load(tmp_path, increment(shape))
    x = numbers(1, shape[1])
    steps = step("n1", model, x="request.in"), step("n2", model, x="n1.y")
    results = infer(make([tensor("in", 1, shape[1])], *steps, first="n1.y", out="n2.y"), x)
    assert (results["first"] == x + 1).all()
    assert (results["out"] == x + 2).all()


def test_a_demultiplexer_before_a_model_of_openvino(tmp_path):
    steps = step("n", load(tmp_path, increment()), "request", x="request.in")
    x = numbers(3, *LARGE)
    assert (infer(make([tensor("in", -1, *LARGE)], steps, count=DYNAMIC, out="n.y"), x)["out"] == x + 1).all()


def test_an_input_that_openvino_passes_through_stays_valid(tmp_path):
    """The pipeline frees the input of `through`."""
    through = load(tmp_path, model_zoo.passthrough(x=(Type.f32, (2, *LARGE))), "b")
    steps = (
        step("n", load(tmp_path, increment(), "a"), "request", x="request.in"),
        step("through", through, gathers="request", x="n.y"),
    )
    x = numbers(2, *LARGE)
    result = infer(make([tensor("in", 2, *LARGE)], *steps, count=2, out="through.x"), x)["out"]
    others = [np.full(x.shape, index, np.float32) for index in range(20)]
    assert (result == x + 1).all()
    assert len(others) == 20


def test_bfloat16_goes_from_model_to_model(tmp_path):
    a, b = (load(tmp_path, model_zoo.passthrough(x=(Type.bf16, (-1, 2))), name) for name in "ab")
    steps = step("n1", a, x="request.in"), step("n2", b, x="n1.x")
    bits = np.arange(20_000, dtype=np.uint16).reshape(-1, 2)
    x = bits.view(ml_dtypes.bfloat16)
    result = infer(make([tensor("in", -1, 2, datatype="BF16")], *steps, out="n2.x"), x)["out"]
    assert result.dtype == ml_dtypes.bfloat16
    assert (result.view(np.uint16) == bits).all()


def test_strings_go_through_a_model_of_openvino(tmp_path):
    pipeline = make(STRINGS, step("n", load(tmp_path, model_zoo.strings()), text="request.in"), out="n.text")
    assert infer(pipeline, texts())["out"].elements() == [b"a", b"", b"b\0"]


def test_a_failure_of_openvino_names_its_pipeline_and_node(tmp_path):
    steps = step("n", load(tmp_path, model_zoo.product()), left="request.in", right="request.in")
    message = (
        r"^pipeline 'p' node 'n': model 'm' version 1 cannot compute this request: node 'MatMul_\d+': Incompatible"
    )
    with pytest.raises(InvalidRequestError, match=message):
        infer(make([tensor("in", -1, -1)], steps, out="n.product"), numbers(2, 3))
