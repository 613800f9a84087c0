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

# Operations by what the model has of them: outputs by name, inputs, a request, and one that leaves the operation
# without elements to work on. What is expected of that is an array for each output, or a word of the refusal.
CASES = {}


def case(expected):
    def add(build):
        CASES[build.__name__] = (build, expected)
        return build

    return add


def inputs(**shapes):
    """Make inputs of these shapes: INT64 for names that begin with n, FP32 for others."""
    return [
        model_zoo.parameter(name, shape, Type.i64 if name.startswith("n") else Type.f32)
        for name, shape in shapes.items()
    ]


def constant(value):
    return opset15.constant(np.array(value, np.int64))


def numbers(*shape):
    """Make positive numbers, different ones each time."""
    return RANDOM.uniform(1, 2, shape).astype(np.float32)


def none(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@case("TopK")
def topk():
    (x,) = inputs(x=(-1, -1))
    node = opset15.topk(x, constant(1), 1, "max", "value")
    return {"y": node.output(0), "i": node.output(1)}, [x], [numbers(4, 5)], [none(4, 0)]


@case("TopK")
def topk_behind_which_all_is_written():
    (x,) = inputs(x=(-1, -1))
    return (
        {"y": opset15.relu(opset15.topk(x, constant(1), 1, "max", "value").output(0))},
        [x],
        [numbers(4, 5)],
        [none(4, 0)],
    )


@case("TopK")
def topk_of_a_slice_of_nothing():
    (x,) = inputs(x=(4, -1))
    rest = opset15.slice(x, constant([1]), constant([1000]), constant([1]), constant([1]))
    return {"y": opset15.topk(rest, constant(1), 1, "max", "value").output(0)}, [x], [numbers(4, 5)], [numbers(4, 1)]


@case("TopK")
def topk_of_what_values_select():
    (x,) = inputs(x=(8,))
    places = opset15.non_zero(opset15.greater(x, opset15.constant(np.float32(0))))
    chosen = opset15.gather(x, opset15.squeeze(places, constant([0])), constant(0))
    return {"y": opset15.topk(chosen, constant(1), 0, "max", "value").output(0)}, [x], [numbers(8)], [-numbers(8)]


@case("TopK")
def topk_of_what_values_select_of_any_number():
    (x,) = inputs(x=(-1,))
    places = opset15.non_zero(opset15.greater(x, opset15.constant(np.float32(0))))
    chosen = opset15.gather(x, opset15.squeeze(places, constant([0])), constant(0))
    return {"y": opset15.topk(chosen, constant(1), 0, "max", "value").output(0)}, [x], [numbers(8)], [-numbers(8)]


def sequence(kind, gates):
    (x,) = inputs(x=(1, -1, 3))
    size = 4
    weights = [opset15.constant(numbers(1, gates * size, width)) for width in (3, size)]
    bias = opset15.constant(numbers(1, gates * size))
    state = opset15.constant(np.full((1, 1, size), 0.25, np.float32))
    length = opset15.gather(opset15.shape_of(x), constant([1]), constant(0))
    states = [state, state] if kind == "lstm" else [state]
    node = getattr(opset5, f"{kind}_sequence")(x, *states, length, *weights, bias, size, "forward")
    outputs = {f"y{index}": node.output(index) for index in range(node.get_output_size())}
    return outputs, [x], [numbers(1, 5, 3)], [none(1, 0, 3)]


@case("LSTMSequence")
def lstm():
    return sequence("lstm", 4)


@case("GRUSequence")
def gru():
    return sequence("gru", 3)


@case("RNNSequence")
def rnn():
    return sequence("rnn", 1)


def loop(count, more, concatenate):
    """Make a loop that adds 1; return its output and the parameters."""
    (x,) = inputs(x=(1, 4))
    value, again = opset15.parameter((1, 4), Type.f32), opset15.constant(True)
    step = opset15.add(value, opset15.constant(np.float32([1])))
    results = [opset15.result(step), opset15.result(again)]
    node = opset5.loop(count, more)
    node.set_function(openvino.Model(results, [value], "body"))
    node.set_special_body_ports([-1, 1])
    node.set_merged_input(value, x.output(0), results[0].input_value(0))
    output = results[0].output(0)
    y = node.get_concatenated_slices(output, 0, 1, 1, -1, 0) if concatenate else node.get_iter_value(output, -1)
    return y, x


@case("Loop")
def loop_that_gathers_what_it_does_not_make():
    (n,) = inputs(n=())
    y, x = loop(n, opset15.constant(True), True)
    return {"y": y}, [n, x], [np.int64(3), numbers(1, 4)], [np.int64(0), numbers(1, 4)]


@case("Loop")
def loop_whose_condition_fails():
    more = model_zoo.parameter("more", (), Type.boolean)
    y, x = loop(constant(5), more, True)
    return {"y": y}, [more, x], [np.bool_(True), numbers(1, 4)], [np.bool_(False), numbers(1, 4)]


@case({"y": np.full((1, 4), 9, np.float32)})
def loop_that_keeps_what_it_got():
    (n,) = inputs(n=())
    y, x = loop(n, opset15.constant(True), False)
    return {"y": y}, [n, x], [np.int64(3), numbers(1, 4)], [np.int64(0), np.full((1, 4), 9, np.float32)]


@case("ScaledDotProductAttention")
def attention():
    q, k, v = inputs(q=(1, 2, -1, 4), k=(1, 2, -1, 4), v=(1, 2, -1, 4))
    y = opset13.scaled_dot_product_attention(q, k, v)
    empty = none(1, 2, 0, 4)
    return {"y": y}, [q, k, v], [numbers(1, 2, 3, 4) for _ in "qkv"], [numbers(1, 2, 3, 4), empty, empty]


@case("SearchSorted")
def search_sorted():
    x, v = inputs(x=(-1,), v=(-1,))
    return {"y": opset15.search_sorted(x, v)}, [x, v], [np.float32([1, 2, 3]), numbers(4)], [none(0), numbers(4)]


@case("AvgPool")
def pool():
    (x,) = inputs(x=(1, 2, -1, -1))
    return (
        {"y": opset15.avg_pool(x, [1, 1], [1, 1], [1, 1], [2, 2], False)},
        [x],
        [numbers(1, 2, 4, 4)],
        [none(1, 2, 0, 0)],
    )


@case("Convolution")
def convolution():
    (x,) = inputs(x=(1, 2, -1, -1))
    weights = opset15.constant(numbers(3, 2, 3, 3))
    y = opset15.convolution(x, weights, [1, 1], [2, 2], [2, 2], [1, 1])
    return {"y": y}, [x], [numbers(1, 2, 4, 4)], [none(1, 2, 0, 0)]


@case("GatherND")
def gather_nd():
    x, n = inputs(x=(-1, 3), n=(1, 1))
    return {"y": opset8.gather_nd(x, n, 0)}, [x, n], [numbers(4, 3), np.int64([[1]])], [none(0, 3), np.int64([[0]])]


@case("Gather")
def gather():
    x, n = inputs(x=(-1, 3), n=(2,))
    return (
        {"y": opset15.gather(x, n, constant(0))},
        [x, n],
        [numbers(4, 3), np.int64([1, 0])],
        [none(0, 3), np.int64([0, 0])],
    )


@case("Unique")
def unique():
    (x,) = inputs(x=(-1,))
    return {"y": opset15.unique(x).output(0)}, [x], [numbers(4)], [none(0)]


@case("SegmentMax")
def segment_max():
    x, n = inputs(x=(-1, 3), n=(-1,))
    y = opset16.segment_max(x, n, constant(2), fill_mode="ZERO")
    return {"y": y}, [x, n], [numbers(4, 3), np.int64([0, 0, 1, 1])], [none(0, 3), none(0, dtype=np.int64)]


@case("ROIAlign")
def roi_align():
    (x,) = inputs(x=(1, 2, -1, -1))
    boxes = opset15.constant(np.float32([[0, 0, 1, 1]]))
    y = opset15.roi_align(x, boxes, constant([0]), 2, 2, 1, 1.0, "avg", "asymmetric")
    return {"y": y}, [x], [numbers(1, 2, 4, 4)], [none(1, 2, 0, 0)]


@case("Interpolate")
def interpolate():
    (x,) = inputs(x=(1, 2, -1, -1))
    y = opset15.interpolate(x, constant([2, 2]), "nearest", "sizes", axes=constant([2, 3]))
    return {"y": y}, [x], [numbers(1, 2, 4, 4)], [none(1, 2, 0, 0)]


@case("AdaptiveAvgPool")
def adaptive_pool():
    (x,) = inputs(x=(1, 2, -1))
    return {"y": opset15.adaptive_avg_pool(x, constant([3]))}, [x], [numbers(1, 2, 4)], [none(1, 2, 0)]


@case("TopK")
def topk_within_a_branch():
    x, c = model_zoo.parameter("x", (-1, 3), Type.f32), model_zoo.parameter("c", (), Type.boolean)
    bodies = []
    for make in (opset15.relu, lambda x: opset15.topk(x, constant(1), 0, "max", "value").output(0)):
        parameter = opset15.parameter((-1, 3), Type.f32)
        bodies.append((parameter, opset15.result(make(parameter))))
    (then, then_result), (other, other_result) = bodies
    node = opset8.if_op(c)
    node.set_then_body(openvino.Model([then_result], [then]))
    node.set_else_body(openvino.Model([other_result], [other]))
    node.set_input(x.output(0), then, other)
    return (
        {"y": node.set_output(then_result, other_result)},
        [x, c],
        [numbers(4, 3), np.bool_(False)],
        [none(0, 3), np.bool_(False)],
    )


def selecting(x):
    """Return the highest of the positive values of a vector."""
    places = opset15.non_zero(opset15.greater(x, opset15.constant(np.float32(0))))
    chosen = opset15.gather(x, opset15.squeeze(places, constant([0])), constant(0))
    return opset15.topk(chosen, constant(1), 0, "max", "value").output(0)


@case("an operation within If")
def topk_of_what_values_select_within_a_branch():
    x, c = model_zoo.parameter("x", (8,), Type.f32), model_zoo.parameter("c", (), Type.boolean)
    bodies = []
    for make in (lambda x: opset15.reduce_sum(x, constant([0]), keep_dims=True), selecting):
        parameter = opset15.parameter((8,), Type.f32)
        bodies.append((parameter, opset15.result(make(parameter))))
    (then, then_result), (other, other_result) = bodies
    node = opset8.if_op(c)
    node.set_then_body(openvino.Model([then_result], [then]))
    node.set_else_body(openvino.Model([other_result], [other]))
    node.set_input(x.output(0), then, other)
    y = node.set_output(then_result, other_result)
    return {"y": y}, [x, c], [numbers(8), np.bool_(False)], [-numbers(8), np.bool_(False)]


@case("an operation within Loop")
def topk_of_what_values_select_within_a_loop():
    x = model_zoo.parameter("x", (8,), Type.f32)
    value, again = opset15.parameter((8,), Type.f32), opset15.constant(True)
    results = [opset15.result(selecting(value)), opset15.result(again)]
    node = opset5.loop(constant(2), opset15.constant(True))
    node.set_function(openvino.Model(results, [value], "body"))
    node.set_special_body_ports([-1, 1])
    node.set_invariant_input(value, x.output(0))
    return {"y": node.get_iter_value(results[0].output(0), -1)}, [x], [numbers(8)], [-numbers(8)]


@case("an operation within TensorIterator")
def topk_of_what_values_select_in_each_slice():
    x = model_zoo.parameter("x", (3, 8), Type.f32)
    row = opset15.parameter((1, 8), Type.f32)
    result = opset15.result(selecting(opset15.reshape(row, constant([8]), special_zero=False)))
    node = opset15.tensor_iterator()
    node.set_function(openvino.Model([result], [row], "body"))
    node.set_sliced_input(row, x.output(0), 0, 1, 1, -1, 0)
    y = node.get_concatenated_slices(result.output(0), 0, 1, 1, -1, 0)
    empty = numbers(3, 8)
    empty[1] *= -1
    return {"y": y}, [x], [numbers(3, 8)], [empty]


def reducing(name):
    (x,) = inputs(x=(-1, -1))
    source = opset15.convert(x, "boolean") if "logical" in name else x
    reduced = getattr(opset15, name)(source, constant([1]), keep_dims=False)
    return {"y": opset15.convert(reduced, "f32")}, [x], [numbers(4, 5)], [none(4, 0)]


LARGEST = np.finfo(np.float32).max
for name, value in {
    "reduce_sum": 0,
    "reduce_mean": 0,
    "reduce_l1": 0,
    "reduce_l2": 0,
    "reduce_prod": 1,
    "reduce_max": -LARGEST,
    "reduce_min": LARGEST,
    "reduce_logical_or": 0,
    "reduce_logical_and": 1,
}.items():
    CASES[name] = (lambda name=name: reducing(name), {"y": np.full(4, value, np.float32)})


@case({"y": np.zeros((4, 3), np.float32)})
def product():
    x, v = inputs(x=(-1, -1), v=(-1, -1))
    return {"y": opset15.matmul(x, v, False, False)}, [x, v], [numbers(4, 5), numbers(5, 3)], [none(4, 0), none(0, 3)]


@case({"y": np.zeros((2, 4, 3), np.float32)})
def product_of_batches():
    x, v = inputs(x=(-1, -1, -1), v=(-1, -1, -1))
    y = opset15.matmul(x, v, False, False)
    return {"y": y}, [x, v], [numbers(2, 4, 5), numbers(2, 5, 3)], [none(2, 4, 0), none(2, 0, 3)]


@case({"y": np.full((2, 3), 7, np.float32)})
def pad():
    (x,) = inputs(x=(-1, 3))
    y = opset15.pad(x, constant([1, 0]), constant([1, 0]), "constant", opset15.constant(np.float32(7)))
    return {"y": y}, [x], [numbers(4, 3)], [none(0, 3)]


NINES = np.full((4, 3), 9, np.float32)


@case({"y": NINES})
def scatter():
    x, n, v = inputs(x=(4, 3), n=(-1,), v=(-1, 3))
    y = opset15.scatter_update(x, n, v, constant(0))
    return (
        {"y": y},
        [x, n, v],
        [numbers(4, 3), np.int64([1]), numbers(1, 3)],
        [NINES, none(0, dtype=np.int64), none(0, 3)],
    )


@case({"y": NINES})
def scatter_elements():
    x, n, v = inputs(x=(4, 3), n=(-1, 3), v=(-1, 3))
    y = opset15.scatter_elements_update(x, n, v, constant(0))
    empty = none(0, 3, dtype=np.int64)
    return {"y": y}, [x, n, v], [numbers(4, 3), np.int64([[1, 2, 0]]), numbers(1, 3)], [NINES, empty, none(0, 3)]


@case({"y": NINES})
def scatter_nd():
    x, n, v = inputs(x=(4, 3), n=(-1, 1), v=(-1, 3))
    empty = none(0, 1, dtype=np.int64)
    y = opset15.scatter_nd_update(x, n, v)
    return {"y": y}, [x, n, v], [numbers(4, 3), np.int64([[1]]), numbers(1, 3)], [NINES, empty, none(0, 3)]


@case({"y": NINES})
def slice_scatter():
    x, v, n = inputs(x=(4, 3), v=(-1, 3), n=(1,))
    y = opset15.slice_scatter(x, v, constant([0]), n, constant([1]), constant([0]))
    return {"y": y}, [x, v, n], [numbers(4, 3), numbers(2, 3), np.int64([2])], [NINES, none(0, 3), np.int64([0])]


@case({"y": np.zeros((2, 3), np.float32)})
def embedding_segments():
    n, ns = inputs(n=(-1,), ns=(-1,))
    y = opset5.embedding_segments_sum(opset15.constant(numbers(5, 3)), n, ns, constant(2))
    return {"y": y}, [n, ns], [np.int64([1, 2]), np.int64([0, 1])], [none(0, dtype=np.int64)] * 2


@case({"y": NINES})
def concatenation():
    x, v = inputs(x=(-1, 3), v=(-1, 3))
    return {"y": opset15.concat([x, v], 0)}, [x, v], [numbers(2, 3), numbers(2, 3)], [none(0, 3), NINES]


@case({"y0": np.zeros((0, 3), np.float32), "y1": NINES})
def split():
    x, n = inputs(x=(-1, 3), n=(2,))
    node = opset15.variadic_split(x, constant(0), n)
    return (
        {"y0": node.output(0), "y1": node.output(1)},
        [x, n],
        [numbers(4, 3), np.int64([2, 2])],
        [NINES, np.int64([0, 4])],
    )


@case({"y": np.zeros(4, np.float32)})
def buckets():
    x, v = inputs(x=(4,), v=(-1,))
    y = opset15.convert(opset15.bucketize(x, v, "i64"), "f32")
    return {"y": y}, [x, v], [numbers(4), np.float32([-1, 0, 1])], [numbers(4), none(0)]


@case({"y": np.zeros((0, 3), np.int64), "valid": np.zeros(1, np.int64)})
def boxes():
    x, v = inputs(x=(1, -1, 4), v=(1, 1, -1))
    limits = constant(10), opset15.constant(np.float32(0.5)), opset15.constant(np.float32(0))
    node = opset5.non_max_suppression(x, v, *limits)
    return (
        {"y": node.output(0), "valid": node.output(2)},
        [x, v],
        [numbers(1, 5, 4).cumsum(2), numbers(1, 1, 5)],
        [none(1, 0, 4), none(1, 1, 0)],
    )


@case({"y": np.zeros((2, 0), np.int64)})
def places():
    (x,) = inputs(x=(-1, 3))
    return {"y": opset15.non_zero(x)}, [x], [numbers(4, 3)], [none(0, 3)]


@case({"y": np.zeros(4, np.float32)})
def one_hot():
    (n,) = inputs(n=(-1,))
    one, zero = (opset15.constant(np.float32(value)) for value in (1, 0))
    y = opset15.reduce_sum(opset15.one_hot(n, constant(4), one, zero, 1), constant([0]), keep_dims=False)
    return {"y": y}, [n], [np.int64([1, 2])], [none(0, dtype=np.int64)]


@case({"y": np.zeros((0, 3), np.float32)})
def softmax():
    (x,) = inputs(x=(-1, 3))
    return {"y": opset15.softmax(x, 1)}, [x], [numbers(4, 3)], [none(0, 3)]


def infer(model, names, arrays):
    given = {name: np.array(array) for name, array in zip(names, arrays, strict=True)}
    return {name: tensor.array.copy() for name, tensor in model.infer(given).items()}


@pytest.mark.parametrize("name", CASES)
def test_operation_without_elements_is_computed_or_refused(tmp_path, name):
    """OpenVINO alone would return the outputs of the previous inference."""
    build, expected = CASES[name]
    outputs, parameters, _, _ = build()
    for key, output in outputs.items():
        getattr(output, "output", lambda index, output=output: output)(0).set_names({key})
    results = [opset15.result(output) for output in outputs.values()]
    model_zoo.save(openvino.Model(results, parameters, "m"), tmp_path)
    model = Model("m", 1, tmp_path / "1", EXACT)
    retired = []
    model.open(lambda: retired.append(1))
    names = [parameter.get_friendly_name() for parameter in parameters]
    for _ in range(3):
        _, _, usual, empty = build()
        found = infer(model, names, usual)
        assert found.keys() == outputs.keys()
        if isinstance(expected, str):
            end = "(gets a tensor without elements|makes no iteration)$"
            with pytest.raises(InvalidRequestError, match=f"cannot compute this request: {expected} '.*' {end}"):
                infer(model, names, empty)
        else:
            found = infer(model, names, empty)
            assert found.keys() == expected.keys()
            for key, array in expected.items():
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
    x, c = model_zoo.parameter("x", (-1,), Type.f32), model_zoo.parameter("c", (), Type.boolean)
    then, other = (opset15.parameter((-1,), Type.f32) for _ in range(2))
    fitting = opset15.result(opset15.add(then, opset15.constant(np.ones(3, np.float32)), auto_broadcast="none"))
    node = opset8.if_op(c)
    node.set_then_body(openvino.Model([fitting], [then]))
    node.set_else_body(openvino.Model([any_size := opset15.result(opset15.relu(other))], [other]))
    node.set_input(x.output(0), then, other)
    model = openvino.Model([opset15.result(node.set_output(fitting, any_size))], [x, c], "m")
    ShapeChecker(model, {"x": (0,), "c": (1,)}).check({"x": (5,), "c": ()})


def test_checker_keeps_no_weights():
    x = model_zoo.parameter("x", (-1, 1000), Type.f32)
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
    (x,) = inputs(x=(3, -1))
    product = opset15.matmul(
        opset15.transpose(x, constant([1, 0])), opset15.constant(np.eye(3, dtype=np.float32)), 0, 0
    )
    columns = opset15.transpose(product, constant([1, 0]))
    best = opset15.topk(columns, constant(1), 1, "max", "value").output(0)
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
            opened.infer({"x": none(3, 0)})
