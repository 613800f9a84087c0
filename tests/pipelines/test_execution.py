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
from ovms_rest.pipelines.plan import REQUEST_STEP, Output, Plan, Step, Wire
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.shared_memory.counters import Counters

POISON = 85


# --- Models, nodes, pipelines


def tensor(name, *sizes, datatype="FP32"):
    """Describe a tensor; -1 means any size."""
    return TensorMetadata(name, datatype, tuple(Dim(0, None) if size == -1 else Dim(size, size) for size in sizes))


def by_name(*tensors):
    return {tensor.name: tensor for tensor in tensors}


class FakeModel:
    """A model that infers by a function of arrays by name, and overwrites all its earlier outputs first."""

    def __init__(self, function, inputs, outputs, name="m"):
        """Describe the tensors."""
        self.metadata = ModelMetadata(name, "1", by_name(*inputs), by_name(*outputs))
        self.counters = NOT_COUNTED
        self.function = function
        self.given, self.spoiled = [], 0

    def infer(self, arrays):
        """Infer."""
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

    def __init__(self, function, inputs, outputs):
        """Describe the tensors."""
        self.inputs, self.outputs = by_name(*inputs), by_name(*outputs)
        self.execute = lambda arrays: function(**arrays)
        self.opened = 0

    def open(self):
        """Count the calls."""
        self.opened += 1


def adder(number=1, *sizes, name="m"):
    """Make a model x -> y = x + number."""
    sizes = sizes or (1, 10)
    return FakeModel(lambda x: {"y": x + np.float32(number)}, [tensor("x", *sizes)], [tensor("y", *sizes)], name)


def node(function, inputs, outputs):
    return {"custom": FakeNode(function, inputs, outputs)}


def make(inputs, steps, outputs, count=None, name="p"):
    """Make a pipeline of steps (name, wires, other fields) and outputs {name: (step, item)}."""
    taken = [(wire[1], wire[2]) for _, wires, _ in steps for wire in wires] + list(outputs.values())
    made = []
    for index, (step, wires, fields) in enumerate(steps):
        used = tuple(dict.fromkeys(item for source, item in taken if source == index))
        made.append(Step(step, tuple(Wire(*wire) for wire in wires), used=used, **{"level": (), **fields}))
    described = {output: TensorMetadata(output, "FP32", None) for output in outputs}
    metadata = ModelMetadata(name, "1", by_name(*inputs), described)
    return Pipeline(Plan(metadata, tuple(made), tuple(Output(key, *value) for key, value in outputs.items()), count))


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def infer(pipeline, **arrays):
    """Infer; return arrays by name."""
    return {name: tensor.array for name, tensor in pipeline.infer(arrays).items()}


REQUEST = REQUEST_STEP
IN = tensor("in", 1, 10)


def split(count, *sizes, name="whole"):
    """Make the fields of a node x -> whole = x, whose output is split."""
    return {
        **node(lambda x: {name: x.copy()}, [tensor("x", *sizes)], [tensor(name, *sizes)]),
        "count": count,
    }


def chain(first, second):
    """Make in -> first -> second -> out."""
    steps = [("n1", [("x", REQUEST, "in")], {"model": first}), ("n2", [("x", 0, "y")], {"model": second})]
    return make([tensor("in", *(dim.low for dim in first.metadata.inputs["x"].dims))], steps, {"out": (1, "y")})


# --- OVMS's examples


def test_a_model_can_run_twice_in_a_chain():
    model = adder()
    x = numbers(1, 10)
    assert (infer(chain(model, model), **{"in": x})["out"] == x + 2).all()


def test_parallel_models_feed_one_node():
    joined = FakeModel(
        lambda left, right: {"sum": left + right},
        [tensor("left", 1, 10), tensor("right", 1, 10)],
        [tensor("sum", 1, 10)],
    )
    steps = [
        ("a", [("x", REQUEST, "in")], {"model": adder(1)}),
        ("b", [("x", REQUEST, "in")], {"model": adder(10)}),
        ("c", [("left", 0, "y"), ("right", 1, "y")], {"model": joined}),
    ]
    x = numbers(1, 10)
    results = infer(make([IN], steps, {"out": (2, "sum"), "a": (0, "y")}), **{"in": x})
    assert (results["out"] == 2 * x + 11).all()
    assert (results["a"] == x + 1).all()


FACTORS = tensor("factors", 1, 4)


def operations(**fields):
    """Make the steps of a static demultiplexer followed by a model."""

    def operate(x, factors):
        add, subtract, multiply, divide = factors[0]
        return {"results": np.stack([x + add, x - subtract, x * multiply, x / divide])}

    different = node(operate, [tensor("x", 1, 10), FACTORS], [tensor("results", 4, 1, 10)])
    return [
        ("ops", [("x", REQUEST, "in"), ("factors", REQUEST, "factors")], {**different, "count": 4, **fields}),
        ("dummy", [("x", 0, "results")], {"model": adder(), "level": (0,)}),
    ]


GIVEN = {"in": numbers(1, 10), "factors": np.float32([[1, 2, 3, 4]])}
OPERATED = np.stack([GIVEN["in"] + 1, GIVEN["in"] - 2, GIVEN["in"] * 3, GIVEN["in"] / 4])


def test_a_static_demultiplexer_is_gathered_by_a_node():
    choose = node(lambda x: {"max": x.max(0)}, [tensor("x", 4, 1, 10)], [tensor("max", 1, 10)])
    steps = [*operations(), ("choose", [("x", 1, "y")], {**choose, "gathers": 0})]
    assert (infer(make([IN, FACTORS], steps, {"out": (2, "max")}), **GIVEN)["out"] == (OPERATED + 1).max(0)).all()


def test_the_response_gathers_shards_that_no_node_gathers():
    results = infer(make([IN, FACTORS], operations(), {"out": (1, "y"), "whole": (0, "results")}), **GIVEN)
    assert (results["out"] == OPERATED + 1).all()
    assert (results["whole"] == OPERATED).all()


def detection(found):
    """Make image -> detector -> cropper of `found` crops -> two recognisers; the steps and their outputs."""
    crop = node(
        lambda image, detection: {
            "crops": np.stack([image[:, :4] * i for i in range(found)]) if found else np.zeros((0, 1, 4), np.float32),
            "confidences": np.arange(found, dtype=np.float32).reshape(found, 1, 1),
        },
        [tensor("image", 1, 10), tensor("detection", 1, 10)],
        [tensor("crops", -1, 1, 4), tensor("confidences", -1, 1, 1)],
    )
    steps = [
        ("detect", [("x", REQUEST, "in")], {"model": adder()}),
        ("crop", [("image", REQUEST, "in"), ("detection", 0, "y")], {**crop, "count": DYNAMIC}),
        ("color", [("x", 1, "crops")], {"model": adder(1, 1, 4), "level": (1,)}),
        ("type", [("x", 1, "crops")], {"model": adder(2, 1, 4), "level": (1,)}),
    ]
    return steps, {"crops": (1, "crops"), "confidences": (1, "confidences"), "colors": (2, "y"), "types": (3, "y")}


@pytest.mark.parametrize("found", [1, 3])
def test_a_dynamic_demultiplexer_runs_once_per_shard(found):
    steps, outputs = detection(found)
    results = infer(make([IN], steps, outputs), **{"in": numbers(1, 10)})
    crops = np.stack([numbers(1, 10)[:, :4] * i for i in range(found)])
    assert (results["crops"] == crops).all()
    assert (results["colors"] == crops + 1).all()
    assert (results["types"] == crops + 2).all()
    assert results["confidences"].shape == (found, 1, 1)


def test_a_dynamic_demultiplexer_without_shards_raises_no_content():
    steps, outputs = detection(0)
    with pytest.raises(NoContentError) as caught:
        infer(make([IN], steps, outputs), **{"in": numbers(1, 10)})
    assert str(caught.value) == "pipeline 'p' node 'crop' output 'crops': its first dim is 0, so there are no shards"
    assert not steps[2][2]["model"].given


@pytest.mark.parametrize("count", [3, DYNAMIC])
def test_a_pipeline_with_a_count_splits_its_requests(count):
    steps = [("n", [("x", REQUEST, "in")], {"model": adder(1, 1, 4), "level": (REQUEST,)})]
    x = numbers(3, 1, 4)
    results = infer(
        make([tensor("in", count, 1, 4)], steps, {"out": (0, "y"), "in": (REQUEST, "in")}, count), **{"in": x}
    )
    assert (results["out"] == x + 1).all()
    assert results["in"] is x


def test_a_custom_node_feeds_a_model():
    normalize = node(lambda x: {"image": (x - 2) / 4}, [tensor("x", 1, 10)], [tensor("image", 1, 10)])
    steps = [
        ("prepare", [("x", REQUEST, "in")], normalize),
        ("n", [("x", 0, "image")], {"model": adder()}),
    ]
    x = numbers(1, 10)
    assert (infer(make([IN], steps, {"out": (1, "y")}), **{"in": x})["out"] == (x - 2) / 4 + 1).all()


# --- Levels


def nested():
    """Make in [2,3,4] -> split by 2 -> split by 3 -> add 1."""
    return [
        ("outer", [("x", REQUEST, "in")], split(2, 2, 3, 4)),
        ("inner", [("x", 0, "whole")], {**split(3, 3, 4, name="rows"), "level": (0,)}),
        ("add", [("x", 1, "rows")], {"model": adder(1, 4), "level": (0, 1)}),
    ]


NESTED = tensor("in", 2, 3, 4)


def test_nested_demultiplexers_are_gathered_in_reverse():
    by_sum = FakeModel(lambda x: {"y": x - x.sum()}, [tensor("x", 3, 4)], [tensor("y", 3, 4)])
    total = FakeModel(lambda x: {"y": x * 2}, [tensor("x", 2, 3, 4)], [tensor("y", 2, 3, 4)])
    steps = [
        *nested(),
        ("sum", [("x", 2, "y")], {"model": by_sum, "level": (0,), "gathers": 1}),
        ("all", [("x", 3, "y")], {"model": total, "gathers": 0}),
    ]
    x = numbers(2, 3, 4)
    expected = 2 * (x + 1 - (x + 1).sum((1, 2), keepdims=True))
    assert (infer(make([NESTED], steps, {"out": (4, "y")}), **{"in": x})["out"] == expected).all()


def test_the_response_gathers_all_levels_outermost_first():
    results = infer(make([NESTED], nested(), {"out": (2, "y"), "rows": (1, "rows")}), **{"in": numbers(2, 3, 4)})
    assert (results["out"] == numbers(2, 3, 4) + 1).all()
    assert (results["rows"] == numbers(2, 3, 4)).all()


def test_a_node_gathering_from_its_source_gets_the_whole_output():
    model = adder(1, 3, 4)
    steps = [
        ("split", [("x", REQUEST, "in")], split(3, 3, 4)),
        ("n", [("x", 0, "whole")], {"model": model, "gathers": 0}),
    ]
    assert (
        infer(make([tensor("in", 3, 4)], steps, {"out": (1, "y")}), **{"in": numbers(3, 4)})["out"] == numbers(3, 4) + 1
    ).all()


def test_shards_of_a_vector_are_arrays_without_dims():
    steps = [
        ("split", [("x", REQUEST, "in")], split(3, 3)),
        (
            "n",
            [("x", 0, "whole")],
            {
                "model": FakeModel(lambda x: {"y": np.asarray(x + 1)}, [tensor("x")], [tensor("y")]),
                "level": (0,),
            },
        ),
    ]
    assert infer(make([tensor("in", 3)], steps, {"out": (1, "y")}), **{"in": numbers(3)})["out"].tolist() == [1, 2, 3]


def test_empty_shards_are_gathered():
    steps = [
        ("split", [("x", REQUEST, "in")], split(2, 2, 0)),
        ("n", [("x", 0, "whole")], {"model": adder(1, 0), "level": (0,)}),
        ("all", [("x", 1, "y")], {"model": adder(1, 2, 0), "gathers": 0}),
    ]
    assert infer(make([tensor("in", 2, 0)], steps, {"out": (2, "y")}), **{"in": numbers(2, 0)})["out"].shape == (2, 0)


def test_sessions_may_pass_different_shapes_to_the_next_node():
    grow = FakeModel(lambda x: {"y": np.repeat(x, int(x[0]) + 1)}, [tensor("x", 1)], [tensor("y", -1)])
    shrink = FakeModel(lambda x: {"y": np.float32([x.size])}, [tensor("x", -1)], [tensor("y", 1)])
    steps = [
        ("split", [("x", REQUEST, "in")], split(3, 3, 1)),
        ("grow", [("x", 0, "whole")], {"model": grow, "level": (0,)}),
        ("shrink", [("x", 1, "y")], {"model": shrink, "level": (0,)}),
    ]
    results = infer(make([tensor("in", 3, 1)], steps, {"out": (2, "y")}), **{"in": numbers(3, 1)})
    assert results["out"].tolist() == [[1], [2], [3]]


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
    models = [FakeModel(weigh, ports[:2], ports[2:]) for _ in range(2)]
    count = draw(st.sampled_from([None, shape[0], DYNAMIC]))
    given = np.arange(np.prod(shape)).reshape(shape)
    values = {(REQUEST, "in"): given}
    # The values by the demultiplexers that are open after them.
    behind = {(REQUEST,) if count else (): [(REQUEST, "in")]}
    steps = []
    for index in range(draw(st.integers(1, 7))):
        level = draw(st.sampled_from(sorted(behind)))
        wires = [(name, *draw(st.sampled_from(behind[level]))) for name in "xy"]
        gathers = None
        if level and draw(st.booleans()):
            *rest, gathers = level
            level = tuple(rest)
        results = expect(*(values[wire[1:]] for wire in wires), len(level))
        fields = {"level": level, "gathers": gathers}
        kind = draw(st.integers(0, 2))
        fields |= {"model": models[kind]} if kind < 2 else node(weigh, ports[:2], ports[2:])
        opened = level
        if len(level) < min(3, len(shape)) and draw(st.booleans()):
            fields["count"] = draw(st.sampled_from([shape[len(level)], DYNAMIC]))
            opened = (*level, index)
        steps.append((f"n{index}", wires, fields))
        for name, array in results.items():
            values[index, name] = array
            behind.setdefault(opened, []).append((index, name))
    chosen = draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=6, unique=True))
    outputs = {f"out{number}": key for number, key in enumerate(chosen)}
    inputs = [TensorMetadata("in", "INT64", None)]
    return make(inputs, steps, outputs, count), given, {name: values[key] for name, key in outputs.items()}


@settings(max_examples=500, deadline=None)
@given(pipelines())
def test_every_pipeline_computes_the_same_as_numpy(case):
    pipeline, given, expected = case
    for _ in range(2):  # again, over the memory that the first run left
        results = infer(pipeline, **{"in": given.copy()})
        assert results.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(results[name], array)


# --- Memory


def test_a_chain_of_two_models_copies_nothing():
    seen = []
    first = adder()
    second = FakeModel(lambda x: seen.append(x) or {"y": x + 1}, [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    result = infer(chain(first, second), **{"in": numbers(1, 10)})["out"]
    assert seen[0] is first.given[0]
    assert result is second.given[0]


def test_the_last_result_of_a_model_used_twice_is_not_copied():
    model = adder()
    assert infer(chain(model, model), **{"in": numbers(1, 10)})["out"] is model.given[1]


def test_a_result_is_copied_for_the_response_when_its_model_runs_again():
    model = adder()
    steps = [("n1", [("x", REQUEST, "in")], {"model": model}), ("n2", [("x", REQUEST, "in")], {"model": model})]
    results = infer(make([IN], steps, {"first": (0, "y"), "last": (1, "y")}), **{"in": numbers(1, 10)})
    assert (results["first"] == numbers(1, 10) + 1).all()
    assert results["last"] is model.given[1]


def test_a_result_is_not_copied_when_its_model_runs_again_after_its_last_use():
    seen = []
    model = adder()
    other = FakeModel(lambda x: seen.append(x) or {"y": x + 1}, [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    steps = [
        ("n1", [("x", REQUEST, "in")], {"model": model}),
        ("n2", [("x", 0, "y")], {"model": other}),
        ("n3", [("x", 1, "y")], {"model": model}),
    ]
    assert (infer(make([IN], steps, {"out": (2, "y")}), **{"in": numbers(1, 10)})["out"] == numbers(1, 10) + 3).all()
    assert seen[0] is model.given[0]


def test_shards_are_views_on_what_is_split():
    seen, whole = [], numbers(4, 1, 10)
    model = FakeModel(lambda x: seen.append(x) or {"y": x + 1}, [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    made = {**node(lambda x: {"whole": whole}, [tensor("x", 1, 10)], [tensor("whole", 4, 1, 10)]), "count": 4}
    steps = [("split", [("x", REQUEST, "in")], made), ("n", [("x", 0, "whole")], {"model": model, "level": (0,)})]
    results = infer(make([IN], steps, {"out": (1, "y"), "whole": (0, "whole")}), **{"in": numbers(1, 10)})
    assert len(seen) == 4
    assert all(np.shares_memory(shard, whole[index]) for index, shard in enumerate(seen))
    assert results["whole"] is whole


def test_the_gathered_array_goes_to_the_response_and_to_a_node_as_one_memory():
    seen = []
    choose = node(lambda x: seen.append(x) or {"max": x.max(0)}, [tensor("x", 4, 1, 10)], [tensor("max", 1, 10)])
    steps = [*operations(), ("choose", [("x", 1, "y")], {**choose, "gathers": 0})]
    results = infer(make([IN, FACTORS], steps, {"out": (2, "max"), "all": (1, "y")}), **GIVEN)
    assert np.shares_memory(results["all"], seen[0])
    assert (results["all"] == OPERATED + 1).all()


def test_an_input_that_a_model_passes_through_is_copied():
    """OpenVINO returns a view of the input that does not keep its memory alive."""
    through = FakeModel(lambda x: {"y": x.view()}, [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    first = adder()
    steps = [
        ("n1", [("x", REQUEST, "in")], {"model": first}),
        ("through", [("x", 0, "y")], {"model": through}),
        ("n2", [("x", 1, "y")], {"model": first}),
    ]
    results = infer(make([IN], steps, {"out": (2, "y"), "through": (1, "y")}), **{"in": numbers(1, 10)})
    assert (results["through"] == numbers(1, 10) + 1).all()
    assert (results["out"] == numbers(1, 10) + 2).all()


def test_memory_is_freed_after_its_last_use():
    made, alive = [], []

    def give(x):
        array = x + 1
        made.append(weakref.ref(array))
        return {"y": array}

    def look(x):
        alive.append([reference() is not None for reference in made])
        return {"y": x + 1}

    ports = [tensor("x", 1, 10)], [tensor("y", 1, 10)]
    steps = [
        ("a", [("x", REQUEST, "in")], node(give, *ports)),
        ("b", [("x", 0, "y")], node(give, *ports)),
        ("c", [("x", 1, "y")], node(look, *ports)),
    ]
    infer(make([IN], steps, {"out": (2, "y")}), **{"in": numbers(1, 10)})
    assert alive == [[False, True]]


# --- Strings


def texts():
    return BytesArray.of([b"a", b"", b"b\0"], (3,))


def reverser():
    """Make a model of strings, x -> y reversed."""

    def reverse(x):
        return {"y": BytesArray.of([element[::-1] for element in x.elements()], x.shape)}

    return FakeModel(reverse, [tensor("x", -1, datatype="BYTES")], [tensor("y", -1, datatype="BYTES")])


def test_strings_pass_from_the_request_through_a_node_to_the_response():
    model = reverser()
    steps = [("n", [("x", REQUEST, "in")], {"model": model})]
    (result,) = make([tensor("in", -1, datatype="BYTES")], steps, {"out": (0, "y")}).infer({"in": texts()}).values()
    assert (result.datatype, result.array.elements()) == ("BYTES", [b"a", b"", b"\0b"])
    assert result.array is model.given[0]


def test_strings_pass_between_nodes():
    steps = [("n1", [("x", REQUEST, "in")], {"model": reverser()}), ("n2", [("x", 0, "y")], {"model": reverser()})]
    result = infer(make([tensor("in", -1, datatype="BYTES")], steps, {"out": (1, "y")}), **{"in": texts()})["out"]
    assert result.elements() == texts().elements()


def test_strings_are_copied_like_numbers():
    model = reverser()
    steps = [("n1", [("x", REQUEST, "in")], {"model": model}), ("n2", [("x", REQUEST, "in")], {"model": model})]
    results = infer(
        make([tensor("in", -1, datatype="BYTES")], steps, {"first": (0, "y"), "out": (1, "y")}), **{"in": texts()}
    )
    assert results["first"].elements() == [b"a", b"", b"\0b"]


def test_strings_that_are_passed_through_are_copied():
    through = FakeModel(lambda x: {"y": x}, [tensor("x", -1, datatype="BYTES")], [tensor("y", -1, datatype="BYTES")])
    given = texts()
    steps = [("n", [("x", REQUEST, "in")], {"model": through})]
    result = infer(make([tensor("in", -1, datatype="BYTES")], steps, {"out": (0, "y")}), **{"in": given})["out"]
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
    steps = [
        ("split", [("x", REQUEST, "in")], split(3, 3, 2)),
        ("n", [("x", 0, "whole")], {"model": model, "level": (0,)}),
    ]
    (result,) = make([tensor("in", 3, 2)], steps, {"out": (1, item)}).infer({"in": numbers(3, 2)}).values()
    assert (result.datatype, result.shape) == ("BYTES", (3, 2))
    assert result.array.elements() == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_a_uint8_matrix_that_became_strings_fits_no_model():
    taker = FakeModel(lambda x: {"y": x}, [tensor("x", -1, -1, datatype="UINT8")], [tensor("y", -1, -1)])
    steps = [
        ("n", [("x", REQUEST, "in")], {"model": namer("y_string", "UINT8")}),
        ("n2", [("x", 0, "y_string")], {"model": taker}),
    ]
    with pytest.raises(InferenceError) as caught:
        infer(make([tensor("in", 2)], steps, {"out": (1, "y")}), **{"in": numbers(2)})
    assert str(caught.value) == "pipeline 'p' node 'n2' input 'x': shape is [2], the model takes [-1,-1]"


# --- Failures


def failing(error):
    def fail(**arrays):
        raise error

    return fail


def dynamic(*shapes, count=DYNAMIC, sizes=(-1, -1)):
    """Make in -> a node that splits an output of each shape -> an adder of the first."""
    names = [f"o{index}" for index in range(len(shapes))]
    made = node(
        lambda x: {name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)},
        [tensor("x", 1, 10)],
        [tensor(name, *sizes) for name in names],
    )
    steps = [
        ("n", [("x", REQUEST, "in")], {**made, "count": count}),
        ("m", [("x", 0, "o0")], {"model": adder(1, *sizes[1:]), "level": (0,)}),
    ]
    return make([IN], steps, {"out": (1, "y"), **{name: (0, name) for name in names}})


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (dynamic((3, 2), count=4), "output 'o0': its first dim is 3, but demultiply_count is 4"),
        (dynamic((0, 2), count=4), "output 'o0': its first dim is 0, but demultiply_count is 4"),
        (
            dynamic((2, 2), (3, 2)),
            "output 'o1': its first dim is 3, but that of pipeline 'p' node 'n' output 'o0' is 2",
        ),
        (
            dynamic((2, 2), (0, 2)),
            "output 'o1': its first dim is 0, but that of pipeline 'p' node 'n' output 'o0' is 2",
        ),
        (dynamic((10_001, 2)), "output 'o0': its first dim is 10001; a demultiplexer makes at most 10000 shards"),
        (dynamic((), sizes=()), "output 'o0': a tensor without dims cannot be split"),
    ],
)
def test_an_output_that_cannot_be_split_fails(pipeline, message):
    with pytest.raises(InferenceError) as caught:
        infer(pipeline, **{"in": numbers(1, 10)})
    assert str(caught.value) == f"pipeline 'p' node 'n' {message}"


@pytest.mark.parametrize("gathered", [True, False])
def test_sessions_that_need_too_much_memory_are_rejected(monkeypatch, gathered):
    """A small request can have many shards that each become large."""
    monkeypatch.setattr(execution, "MAX_VALUE_BYTES", 400)
    wide = FakeModel(lambda x: {"y": np.repeat(x, 30, axis=-1)}, [tensor("x", 1)], [tensor("y", 30)])
    short = FakeModel(lambda y: {"z": y[:1]}, [tensor("y", 30)], [tensor("z", 1)], name="short")
    steps = [
        ("n", [("x", REQUEST, "x")], {"model": wide, "level": (REQUEST,)}),
        ("s", [("y", 0, "y")], {"model": short, "level": (REQUEST,)}),
    ]
    outputs = {"out": (0, "y")} if gathered else {"out": (1, "z")}
    pipeline = make([tensor("x", -1, 1)], steps, outputs, DYNAMIC)
    assert infer(pipeline, x=numbers(3, 1))["out"].shape == ((3, 30) if gathered else (3, 1))
    with pytest.raises(InvalidRequestError) as caught:
        infer(pipeline, x=numbers(4, 1))
    assert str(caught.value) == (
        "pipeline 'p' node 'n' output 'y': 4 sessions of 120 bytes each exceed the limit of 400 bytes; "
        "send fewer shards"
    )


def test_the_largest_number_of_shards_is_accepted():
    assert infer(dynamic((10_000, 2)), **{"in": numbers(1, 10)})["out"].shape == (10_000, 2)


@pytest.mark.parametrize(
    ("count", "x", "y", "error", "message"),
    [
        (3, 3, 2, InvalidRequestError, "input 'y': its first dim is 2, but demultiply_count is 3"),
        (DYNAMIC, 3, 2, InvalidRequestError, "input 'y': its first dim is 2, but that of input 'x' is 3"),
        (DYNAMIC, 0, 0, NoContentError, "input 'x': its first dim is 0, so there are no shards"),
        (
            DYNAMIC, 10_001, 10_001, InvalidRequestError,
            "input 'x': its first dim is 10001; a demultiplexer makes at most 10000 shards",
        ),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_split_is_rejected(count, x, y, error, message):
    both = FakeModel(lambda x, y: {"z": x + y}, [tensor("x", 1), tensor("y", 1)], [tensor("z", 1)])
    steps = [("n", [("x", REQUEST, "x"), ("y", REQUEST, "y")], {"model": both, "level": (REQUEST,)})]
    pipeline = make([tensor("x", -1, 1), tensor("y", -1, 1)], steps, {"out": (0, "z")}, count)
    with pytest.raises(error) as caught:
        infer(pipeline, x=numbers(x, 1), y=numbers(y, 1))
    assert str(caught.value) == message


def repeater(*sizes):
    """Make a model x -> y with x elements."""
    return FakeModel(
        lambda x: {"y": np.zeros((1, int(x.max())), np.float32)}, [tensor("x", *sizes)], [tensor("y", 1, -1)]
    )


def test_different_shapes_cannot_be_gathered():
    steps = [
        ("split", [("x", REQUEST, "in")], split(2, 2, 1)),
        ("n", [("x", 0, "whole")], {"model": repeater(1), "level": (0,)}),
    ]
    with pytest.raises(InferenceError) as caught:
        infer(make([tensor("in", 2, 1)], steps, {"out": (1, "y")}), **{"in": numbers(2, 1) + 3})
    assert str(caught.value) == (
        "pipeline 'p' node 'n' output 'y': its sessions have the shapes [1,3] and [1,4], which cannot be gathered"
    )


@pytest.mark.parametrize(
    ("taker", "word"),
    [
        ({"model": adder(1, 1, 5)}, "model"),
        (node(lambda x: {"y": x}, [tensor("x", 1, 5)], [tensor("y", 1, 5)]), "node"),
    ],
)
def test_a_shape_that_does_not_fit_is_reported(taker, word):
    steps = [("a", [("x", REQUEST, "in")], {"model": repeater(1)}), ("n", [("x", 0, "y")], taker)]
    pipeline = make([tensor("in", 1)], steps, {"out": (1, "y")})
    assert infer(pipeline, **{"in": np.float32([5])})["out"].shape == (1, 5)
    with pytest.raises(InferenceError) as caught:
        infer(pipeline, **{"in": np.float32([10])})
    assert str(caught.value) == f"pipeline 'p' node 'n' input 'x': shape is [1,10], the {word} takes [1,5]"


def test_the_shape_of_every_session_must_fit():
    """The sessions of n output 1x3, then 1x4; a accepts only the first."""
    steps = [
        ("split", [("x", REQUEST, "in")], split(2, 2, 1)),
        ("n", [("x", 0, "whole")], {"model": repeater(1), "level": (0,)}),
        ("a", [("x", 1, "y")], {"model": adder(1, 1, 3), "level": (0,)}),
    ]
    with pytest.raises(InferenceError, match=r"node 'a' input 'x': shape is \[1,4\], the model takes \[1,3\]"):
        infer(make([tensor("in", 2, 1)], steps, {"out": (2, "y")}), **{"in": numbers(2, 1) + 3})


def test_a_gathered_shape_must_fit():
    steps = [
        ("n", [("x", REQUEST, "in")], {"model": adder(1, 1), "level": (REQUEST,)}),
        ("all", [("x", 0, "y")], {"model": adder(1, 2, 1), "gathers": REQUEST}),
    ]
    pipeline = make([tensor("in", -1, 1)], steps, {"out": (1, "y")}, DYNAMIC)
    assert infer(pipeline, **{"in": numbers(2, 1)})["out"].tolist() == [[2], [3]]
    with pytest.raises(InferenceError, match=r"node 'all' input 'x': shape is \[3,1\], the model takes \[2,1\]"):
        infer(pipeline, **{"in": numbers(3, 1)})


@pytest.mark.parametrize("kind", ["model", "custom"])
def test_a_failure_names_its_pipeline_and_node(kind):
    fields = {"model": FakeModel, "custom": FakeNode}
    step = {kind: fields[kind](failing(InferenceError("failed")), [tensor("x", 1, 10)], [tensor("y", 1, 10)])}
    with pytest.raises(InferenceError) as caught:
        infer(make([IN], [("n", [("x", REQUEST, "in")], step)], {"out": (0, "y")}), **{"in": numbers(1, 10)})
    assert str(caught.value) == "pipeline 'p' node 'n': failed"


def test_an_error_that_a_node_raises_for_the_client_is_unchanged():
    step = node(failing(InvalidRequestError("no image")), [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    with pytest.raises(InvalidRequestError, match=r"^no image$"):
        infer(make([IN], [("n", [("x", REQUEST, "in")], step)], {"out": (0, "y")}), **{"in": numbers(1, 10)})


# --- As a servable


def test_opening_a_pipeline_opens_its_custom_nodes():
    step = node(lambda x: {"y": x}, [tensor("x", 1, 10)], [tensor("y", 1, 10)])
    pipeline = make(
        [IN], [("n", [("x", REQUEST, "in")], step), ("m", [("x", 0, "y")], {"model": adder()})], {"out": (1, "y")}
    )
    pipeline.open(lambda: None)
    assert step["custom"].opened == 1


def test_its_dependencies_are_its_models_without_repetition():
    model, other = adder(), adder()
    steps = [(f"n{i}", [("x", i - 1, "y" if i else "in")], {"model": m}) for i, m in enumerate((model, other, model))]
    assert make([IN], steps, {"out": (2, "y")}).dependencies == (model, other)


def test_every_inference_is_counted_by_its_model():
    steps = operations()
    model = steps[1][2]["model"]
    model.counters = Counters(1).of("m", "1")
    infer(make([IN, FACTORS], steps, {"out": (1, "y")}), **GIVEN)
    read = model.counters.read()
    assert (read.inference_count, read.success.count, read.active) == (4, 4, 0)
    assert [(batch.batch_size, batch.count) for batch in read.batches] == [(1, 4)]
    assert read.compute_infer.ns > 0


@pytest.mark.parametrize("error", [InferenceError("failed"), RuntimeError("a bug")])
def test_every_failure_is_counted_by_its_model(error):
    model = FakeModel(failing(error), [tensor("x")], [tensor("y")])
    model.counters = Counters(1).of("m", "1")
    with pytest.raises(type(error)):
        infer(
            make([tensor("in")], [("n", [("x", REQUEST, "in")], {"model": model})], {"out": (0, "y")}),
            **{"in": numbers()},
        )
    read = model.counters.read()
    assert (read.failures["failed"].count, read.success.count, read.active) == (1, 0, 0)


def test_a_model_is_active_during_its_inference():
    model = adder()
    model.counters = Counters(1).of("m", "1")
    active = []
    model.function = lambda x: active.append(model.counters.read().active) or {"y": x + 1}
    infer(chain(model, adder()), **{"in": numbers(1, 10)})
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


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal(LARGE, np.float32)


def test_a_chain_of_two_models_of_openvino(tmp_path, noise):
    first, second = load(tmp_path, model_zoo.relu((-1, 100_000)), "a"), load(tmp_path, increment(), "b")
    pipeline = chain(first, second)
    for _ in range(2):
        x = noise.copy()
        result = infer(pipeline, **{"in": x})["out"]
        assert (result == np.maximum(noise, 0) + 1).all()
        assert (x == noise).all()
    assert np.shares_memory(result, second.infer({"x": noise})["y"].array)


@pytest.mark.parametrize("shape", [LARGE, (-1, 100_000), (1, 10)])
def test_a_chain_of_one_model_of_openvino_twice(tmp_path, shape):
    model = load(tmp_path, increment(shape))
    x = numbers(1, shape[1])
    steps = [("n1", [("x", REQUEST, "in")], {"model": model}), ("n2", [("x", 0, "y")], {"model": model})]
    results = infer(make([tensor("in", 1, shape[1])], steps, {"first": (0, "y"), "out": (1, "y")}), **{"in": x})
    assert (results["first"] == x + 1).all()
    assert (results["out"] == x + 2).all()


def test_a_demultiplexer_before_a_model_of_openvino(tmp_path):
    model = load(tmp_path, increment())
    steps = [("n", [("x", REQUEST, "in")], {"model": model, "level": (REQUEST,)})]
    x = numbers(3, *LARGE)
    assert (
        infer(make([tensor("in", -1, *LARGE)], steps, {"out": (0, "y")}, DYNAMIC), **{"in": x})["out"] == x + 1
    ).all()


def test_an_input_that_openvino_passes_through_stays_valid(tmp_path):
    """The pipeline frees the input of `through`."""
    model, through = (
        load(tmp_path, increment(), "a"),
        load(tmp_path, model_zoo.passthrough(x=(Type.f32, (2, *LARGE))), "b"),
    )
    steps = [
        ("n", [("x", REQUEST, "in")], {"model": model, "level": (REQUEST,)}),
        ("through", [("x", 0, "y")], {"model": through, "gathers": REQUEST}),
    ]
    x = numbers(2, *LARGE)
    result = infer(make([tensor("in", 2, *LARGE)], steps, {"out": (1, "x")}, 2), **{"in": x})["out"]
    others = [np.full(x.shape, index, np.float32) for index in range(20)]
    assert (result == x + 1).all()
    assert len(others) == 20


def test_bfloat16_goes_from_model_to_model(tmp_path):
    a, b = (load(tmp_path, model_zoo.passthrough(x=(Type.bf16, (-1, 2))), name) for name in "ab")
    steps = [("n1", [("x", REQUEST, "in")], {"model": a}), ("n2", [("x", 0, "x")], {"model": b})]
    bits = np.arange(20_000, dtype=np.uint16).reshape(-1, 2)
    x = bits.view(ml_dtypes.bfloat16)
    result = infer(make([tensor("in", -1, 2, datatype="BF16")], steps, {"out": (1, "x")}), **{"in": x})["out"]
    assert result.dtype == ml_dtypes.bfloat16
    assert (result.view(np.uint16) == bits).all()


def test_strings_go_through_a_model_of_openvino(tmp_path):
    steps = [("n", [("text", REQUEST, "in")], {"model": load(tmp_path, model_zoo.strings())})]
    pipeline = make([tensor("in", -1, datatype="BYTES")], steps, {"out": (0, "text")})
    assert infer(pipeline, **{"in": texts()})["out"].elements() == [b"a", b"", b"b\0"]


def test_a_failure_of_openvino_names_its_pipeline_and_node(tmp_path):
    steps = [("n", [("left", REQUEST, "in"), ("right", REQUEST, "in")], {"model": load(tmp_path, model_zoo.product())})]
    message = (
        r"^pipeline 'p' node 'n': model 'm' version 1 cannot compute this request: node 'MatMul_\d+': Incompatible"
    )
    with pytest.raises(InvalidRequestError, match=message):
        infer(make([tensor("in", -1, -1)], steps, {"out": (0, "product")}), **{"in": numbers(2, 3)})
