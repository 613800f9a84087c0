"""Shapes that a model cannot compute are refused, and old values of outputs are never returned."""

import os

import model_zoo
import numpy as np
import openvino
import pytest
from openvino import Type, opset5, opset8, opset13, opset15, opset16

from ovms_rest.errors import InvalidRequestError
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model
from ovms_rest.models.shapes import ShapeChecker, ShapeError

EXACT = plan_compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, cores=2)
RANDOM = np.random.default_rng(1)

# Operations by name: how outputs are built from inputs, the inputs, and what is expected of a request that leaves the
# operation without elements to work on: the outputs, or a word of the refusal. An input has its shape in the model, its
# values in a usual request, and those in that request; a tuple stands for any numbers of that shape.
CASES = {}


def case(expected, **inputs):
    def add(build):
        CASES[build.__name__] = (build, inputs, expected)
        return build

    return add


def parameter(name, shape):
    """Make an input: INT64 if its name begins with n, BOOL for c, FP32 for others."""
    return model_zoo.parameter(name, shape, {"n": Type.i64, "c": Type.boolean}.get(name[0], Type.f32))


def array_of(name, values):
    if isinstance(values, tuple):
        return numbers(*values).astype(np.int64 if name.startswith("n") else np.float32)
    return np.array(values)


def constant(value):
    return opset15.constant(np.array(value, np.int64))


def numbers(*shape):
    """Make positive numbers, different ones each time."""
    return RANDOM.uniform(1, 2, shape).astype(np.float32)


def maximum(x, axis=1):
    return opset15.topk(x, constant(1), axis, "max", "value").output(0)


def selecting(x):
    """Return the highest of the positive values of a vector."""
    places = opset15.non_zero(opset15.greater(x, opset15.constant(np.float32(0))))
    chosen = opset15.gather(x, opset15.squeeze(places, constant([0])), constant(0))
    return maximum(chosen, axis=0)


@case("TopK", x=((-1, -1), (4, 5), (4, 0)))
def topk(x):
    node = opset15.topk(x, constant(1), 1, "max", "value")
    return {"y": node.output(0), "i": node.output(1)}


@case("TopK", x=((-1, -1), (4, 5), (4, 0)))
def topk_before_a_relu(x):
    return opset15.relu(maximum(x))


@case("TopK", x=((4, -1), (4, 5), (4, 1)))
def topk_of_an_empty_slice(x):
    return maximum(opset15.slice(x, constant([1]), constant([1000]), constant([1]), constant([1])))


@case("TopK", x=((8,), (8,), -numbers(8)))
def topk_of_selected_values(x):
    return selecting(x)


@case("TopK", x=((-1,), (8,), -numbers(8)))
def topk_of_selected_values_of_any_number(x):
    return selecting(x)


def sequence(kind, gates, x):
    size = 4
    weights = [opset15.constant(numbers(1, gates * size, width)) for width in (3, size)]
    bias = opset15.constant(numbers(1, gates * size))
    state = opset15.constant(np.full((1, 1, size), 0.25, np.float32))
    length = opset15.gather(opset15.shape_of(x), constant([1]), constant(0))
    states = [state, state] if kind == "lstm" else [state]
    node = getattr(opset5, f"{kind}_sequence")(x, *states, length, *weights, bias, size, "forward")
    return {f"y{index}": node.output(index) for index in range(node.get_output_size())}


@case("LSTMSequence", x=((1, -1, 3), (1, 5, 3), (1, 0, 3)))
def lstm(x):
    return sequence("lstm", 4, x)


@case("GRUSequence", x=((1, -1, 3), (1, 5, 3), (1, 0, 3)))
def gru(x):
    return sequence("gru", 3, x)


@case("RNNSequence", x=((1, -1, 3), (1, 5, 3), (1, 0, 3)))
def rnn(x):
    return sequence("rnn", 1, x)


def loop(x, count, more, concatenate):
    """Make a loop that adds 1."""
    value, again = opset15.parameter((1, 4), Type.f32), opset15.constant(True)
    step = opset15.add(value, opset15.constant(np.float32([1])))
    results = [opset15.result(step), opset15.result(again)]
    node = opset5.loop(count, more)
    node.set_function(openvino.Model(results, [value], "body"))
    node.set_special_body_ports([-1, 1])
    node.set_merged_input(value, x.output(0), results[0].input_value(0))
    output = results[0].output(0)
    return node.get_concatenated_slices(output, 0, 1, 1, -1, 0) if concatenate else node.get_iter_value(output, -1)


@case("Loop", n=((), 3, 0), x=((1, 4), (1, 4), (1, 4)))
def loop_without_iterations(n, x):
    return loop(x, n, opset15.constant(True), True)


@case("Loop", c=((), True, False), x=((1, 4), (1, 4), (1, 4)))
def loop_whose_condition_fails(c, x):
    return loop(x, constant(5), c, True)


@case(np.full((1, 4), 9, np.float32), n=((), 3, 0), x=((1, 4), (1, 4), np.full((1, 4), 9, np.float32)))
def loop_that_keeps_its_input(n, x):
    return loop(x, n, opset15.constant(True), False)


ROWS = ((1, 2, -1, 4), (1, 2, 3, 4), (1, 2, 0, 4))


@case("ScaledDotProductAttention", q=(*ROWS[:2], (1, 2, 3, 4)), k=ROWS, v=ROWS)
def attention(q, k, v):
    return opset13.scaled_dot_product_attention(q, k, v)


@case("SearchSorted", x=((-1,), np.float32([1, 2, 3]), (0,)), v=((-1,), (4,), (4,)))
def search_sorted(x, v):
    return opset15.search_sorted(x, v)


IMAGE = ((1, 2, -1, -1), (1, 2, 4, 4), (1, 2, 0, 0))


@case("AvgPool", x=IMAGE)
def pool(x):
    return opset15.avg_pool(x, [1, 1], [1, 1], [1, 1], [2, 2], False)


@case("Convolution", x=IMAGE)
def convolution(x):
    return opset15.convolution(x, opset15.constant(numbers(3, 2, 3, 3)), [1, 1], [2, 2], [2, 2], [1, 1])


@case("GatherND", x=((-1, 3), (4, 3), (0, 3)), n=((1, 1), [[1]], [[0]]))
def gather_nd(x, n):
    return opset8.gather_nd(x, n, 0)


@case("Gather", x=((-1, 3), (4, 3), (0, 3)), n=((2,), [1, 0], [0, 0]))
def gather(x, n):
    return opset15.gather(x, n, constant(0))


@case("Unique", x=((-1,), (4,), (0,)))
def unique(x):
    return opset15.unique(x).output(0)


@case("SegmentMax", x=((-1, 3), (4, 3), (0, 3)), n=((-1,), [0, 0, 1, 1], (0,)))
def segment_max(x, n):
    return opset16.segment_max(x, n, constant(2), fill_mode="ZERO")


@case("ROIAlign", x=IMAGE)
def roi_align(x):
    boxes = opset15.constant(np.float32([[0, 0, 1, 1]]))
    return opset15.roi_align(x, boxes, constant([0]), 2, 2, 1, 1.0, "avg", "asymmetric")


@case("Interpolate", x=IMAGE)
def interpolate(x):
    return opset15.interpolate(x, constant([2, 2]), "nearest", "sizes", axes=constant([2, 3]))


@case("AdaptiveAvgPool", x=((1, 2, -1), (1, 2, 4), (1, 2, 0)))
def adaptive_pool(x):
    return opset15.adaptive_avg_pool(x, constant([3]))


def branch(x, c, shape, then, other):
    """Make an If that computes one of two functions of x."""
    inner = [opset15.parameter(shape, Type.f32) for _ in range(2)]
    results = [opset15.result(make(each)) for make, each in zip((then, other), inner, strict=True)]
    node = opset8.if_op(c)
    node.set_then_body(openvino.Model(results[:1], inner[:1]))
    node.set_else_body(openvino.Model(results[1:], inner[1:]))
    node.set_input(x.output(0), *inner)
    return node.set_output(*results)


@case("TopK", x=((-1, 3), (4, 3), (0, 3)), c=((), False, False))
def topk_within_a_branch(x, c):
    return branch(x, c, (-1, 3), opset15.relu, lambda x: maximum(x, axis=0))


@case("an operation within If", x=((8,), (8,), -numbers(8)), c=((), False, False))
def topk_of_selected_values_within_a_branch(x, c):
    return branch(x, c, (8,), lambda x: opset15.reduce_sum(x, constant([0]), keep_dims=True), selecting)


@case("an operation within Loop", x=((8,), (8,), -numbers(8)))
def topk_of_selected_values_within_a_loop(x):
    value, again = opset15.parameter((8,), Type.f32), opset15.constant(True)
    results = [opset15.result(selecting(value)), opset15.result(again)]
    node = opset5.loop(constant(2), opset15.constant(True))
    node.set_function(openvino.Model(results, [value], "body"))
    node.set_special_body_ports([-1, 1])
    node.set_invariant_input(value, x.output(0))
    return node.get_iter_value(results[0].output(0), -1)


@case("an operation within TensorIterator", x=((3, 8), (3, 8), numbers(3, 8) * np.float32([[1], [-1], [1]])))
def topk_of_selected_values_in_each_slice(x):
    row = opset15.parameter((1, 8), Type.f32)
    result = opset15.result(selecting(opset15.reshape(row, constant([8]), special_zero=False)))
    node = opset15.tensor_iterator()
    node.set_function(openvino.Model([result], [row], "body"))
    node.set_sliced_input(row, x.output(0), 0, 1, 1, -1, 0)
    return node.get_concatenated_slices(result.output(0), 0, 1, 1, -1, 0)


def reducing(name):
    def build(x):
        source = opset15.convert(x, "boolean") if "logical" in name else x
        return opset15.convert(getattr(opset15, name)(source, constant([1]), keep_dims=False), "f32")

    return build


LARGEST = np.finfo(np.float32).max
OF_NOTHING = dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_l1", "reduce_l2", "reduce_logical_or"), 0) | {
    "reduce_prod": 1,
    "reduce_logical_and": 1,
    "reduce_max": -LARGEST,
    "reduce_min": LARGEST,
}
for name, value in OF_NOTHING.items():
    CASES[name] = (reducing(name), {"x": ((-1, -1), (4, 5), (4, 0))}, np.full(4, value, np.float32))


@case(np.zeros((4, 3), np.float32), x=((-1, -1), (4, 5), (4, 0)), v=((-1, -1), (5, 3), (0, 3)))
def product(x, v):
    return opset15.matmul(x, v, False, False)


@case(np.zeros((2, 4, 3), np.float32), x=((-1, -1, -1), (2, 4, 5), (2, 4, 0)), v=((-1, -1, -1), (2, 5, 3), (2, 0, 3)))
def product_of_batches(x, v):
    return opset15.matmul(x, v, False, False)


@case(np.full((2, 3), 7, np.float32), x=((-1, 3), (4, 3), (0, 3)))
def pad(x):
    return opset15.pad(x, constant([1, 0]), constant([1, 0]), "constant", opset15.constant(np.float32(7)))


NINES = np.full((4, 3), 9, np.float32)
TARGET = ((4, 3), (4, 3), NINES)


@case(NINES, x=TARGET, n=((-1,), [1], (0,)), v=((-1, 3), (1, 3), (0, 3)))
def scatter(x, n, v):
    return opset15.scatter_update(x, n, v, constant(0))


@case(NINES, x=TARGET, n=((-1, 3), [[1, 2, 0]], (0, 3)), v=((-1, 3), (1, 3), (0, 3)))
def scatter_elements(x, n, v):
    return opset15.scatter_elements_update(x, n, v, constant(0))


@case(NINES, x=TARGET, n=((-1, 1), [[1]], (0, 1)), v=((-1, 3), (1, 3), (0, 3)))
def scatter_nd(x, n, v):
    return opset15.scatter_nd_update(x, n, v)


@case(NINES, x=TARGET, v=((-1, 3), (2, 3), (0, 3)), n=((1,), [2], [0]))
def slice_scatter(x, v, n):
    return opset15.slice_scatter(x, v, constant([0]), n, constant([1]), constant([0]))


@case(np.zeros((2, 3), np.float32), n=((-1,), [1, 2], (0,)), ns=((-1,), [0, 1], (0,)))
def embedding_segments(n, ns):
    return opset5.embedding_segments_sum(opset15.constant(numbers(5, 3)), n, ns, constant(2))


@case(NINES, x=((-1, 3), (2, 3), (0, 3)), v=((-1, 3), (2, 3), NINES))
def concatenation(x, v):
    return opset15.concat([x, v], 0)


@case({"y0": np.zeros((0, 3), np.float32), "y1": NINES}, x=((-1, 3), (4, 3), NINES), n=((2,), [2, 2], [0, 4]))
def split(x, n):
    node = opset15.variadic_split(x, constant(0), n)
    return {"y0": node.output(0), "y1": node.output(1)}


@case(np.zeros(4, np.float32), x=((4,), (4,), (4,)), v=((-1,), np.float32([-1, 0, 1]), (0,)))
def buckets(x, v):
    return opset15.convert(opset15.bucketize(x, v, "i64"), "f32")


@case(
    {"y": np.zeros((0, 3), np.int64), "valid": np.zeros(1, np.int64)},
    x=((1, -1, 4), numbers(1, 5, 4).cumsum(2), (1, 0, 4)),
    v=((1, 1, -1), (1, 1, 5), (1, 1, 0)),
)
def boxes(x, v):
    limits = constant(10), opset15.constant(np.float32(0.5)), opset15.constant(np.float32(0))
    node = opset5.non_max_suppression(x, v, *limits)
    return {"y": node.output(0), "valid": node.output(2)}


@case(np.zeros((2, 0), np.int64), x=((-1, 3), (4, 3), (0, 3)))
def places(x):
    return opset15.non_zero(x)


@case(np.zeros(4, np.float32), n=((-1,), [1, 2], (0,)))
def one_hot(n):
    one, zero = (opset15.constant(np.float32(value)) for value in (1, 0))
    return opset15.reduce_sum(opset15.one_hot(n, constant(4), one, zero, 1), constant([0]), keep_dims=False)


@case(np.zeros((0, 3), np.float32), x=((-1, 3), (4, 3), (0, 3)))
def softmax(x):
    return opset15.softmax(x, 1)


def infer(model, arrays):
    return {name: tensor.array.copy() for name, tensor in model.infer(arrays).items()}


@pytest.mark.parametrize("name", CASES)
def test_operation_without_elements_is_computed_or_refused(tmp_path, name):
    """OpenVINO alone would return the outputs of the previous inference."""
    build, inputs, expected = CASES[name]
    parameters = {key: parameter(key, shape) for key, (shape, _, _) in inputs.items()}
    outputs = build(**parameters)
    outputs = outputs if isinstance(outputs, dict) else {"y": outputs}
    results = [opset15.result(output) for output in outputs.values()]
    for key, result in zip(outputs, results, strict=True):
        result.input_value(0).set_names({key})
    model_zoo.save(openvino.Model(results, list(parameters.values()), "m"), tmp_path)
    model = Model("m", 1, tmp_path / "1", EXACT)
    retired = []
    model.open(lambda: retired.append(1))
    for _ in range(3):
        found = infer(model, {key: array_of(key, usual) for key, (_, usual, _) in inputs.items()})
        assert found.keys() == outputs.keys()
        empty = {key: array_of(key, values) for key, (_, _, values) in inputs.items()}
        if isinstance(expected, str):
            end = "(gets a tensor without elements|makes no iteration)$"
            with pytest.raises(InvalidRequestError, match=f"cannot compute this request: {expected} '.*' {end}"):
                infer(model, empty)
        else:
            found = infer(model, empty)
            arrays = expected if isinstance(expected, dict) else {"y": expected}
            assert found.keys() == arrays.keys()
            for key, array in arrays.items():
                assert np.array_equal(found[key], array), key
    assert not retired


# --- Checks


def test_shapes_that_fit_are_accepted_and_others_reported():
    checker = ShapeChecker(model_zoo.product(), {"left": (0,), "right": (1,)})
    for _ in range(2):
        checker.check({"left": (2, 3), "right": (3, 4)})
        with pytest.raises(ShapeError, match=r"First input dimension=3 .* second input dimension=4"):
            checker.check({"left": (2, 3), "right": (4, 4)})


def test_branch_that_is_not_taken_need_not_fit():
    """Only the values decide which branch is taken."""
    x, c, three = parameter("x", (-1,)), parameter("c", ()), opset15.constant(np.ones(3, np.float32))
    y = branch(x, c, (-1,), lambda x: opset15.add(x, three, auto_broadcast="none"), opset15.relu)
    model = openvino.Model([opset15.result(y)], [x, c], "m")
    ShapeChecker(model, {"x": (0,), "c": (1,)}).check({"x": (5,), "c": ()})


def test_checker_keeps_no_weights():
    x = parameter("x", (-1, 1000))
    weights = opset15.constant(np.ones((1000, 1000), np.float32))
    model = model_zoo.model_of({"y": opset15.matmul(x, weights, False, False)}, [x])
    checker = ShapeChecker(model, {"x": (0,)})
    sizes = [node.get_byte_size() for node in checker._copy.get_ops() if node.get_type_name() == "Constant"]
    assert sum(sizes) == 0
    checker.check({"x": (3, 1000)})


def test_forked_process_checks_shapes():
    checker = ShapeChecker(model_zoo.product(), {"left": (0,), "right": (1,)})
    checker.check({"left": (2, 3), "right": (3, 4)})
    pid = os.fork()
    if pid == 0:
        for size in range(1, 50):
            checker.check({"left": (2, size), "right": (size, 4)})
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("model", [model_zoo.relu(), model_zoo.product(), model_zoo.add(), model_zoo.strings()])
def test_models_whose_shapes_decide_everything_get_no_guard(model):
    before = len(model.get_results())
    indices = {str(index): (index,) for index in range(len(model.inputs))}
    assert ShapeChecker(model, indices).add_guard(model, None) is None
    assert len(model.get_results()) == before


def transpose_multiply_and_choose():
    """Make x [3,n] -> y [3,1], the largest of each row; OpenVINO removes the first Transpose at a reshape."""
    x, identity = parameter("x", (3, -1)), opset15.constant(np.eye(3, dtype=np.float32))
    product = opset15.matmul(opset15.transpose(x, constant([1, 0])), identity, 0, 0)
    best = maximum(opset15.transpose(product, constant([1, 0])))
    return model_zoo.model_of({"y": opset15.relu(best)}, [x])


def test_model_that_openvino_changes_when_it_is_reshaped_is_guarded(tmp_path):
    model, copy = transpose_multiply_and_choose(), transpose_multiply_and_choose()
    copy.reshape({0: openvino.PartialShape([3, 2])})
    assert len(copy.get_ops()) != len(model.get_ops())
    opened = Model("model", 1, model_zoo.save(model, tmp_path) / "1", EXACT)
    opened.open(lambda: None)
    x = numbers(3, 5)
    for _ in range(2):
        assert opened.infer({"x": x})["y"].array.tolist() == x.max(1, keepdims=True).tolist()
        with pytest.raises(InvalidRequestError, match=r"TopK '.*' gets a tensor without elements"):
            opened.infer({"x": numbers(3, 0)})
