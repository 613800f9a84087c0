"""Planning a pipeline: its order, levels and metadata, and the message for each broken rule."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_rest.pipelines.definition import DYNAMIC, NodeDefinition, PipelineDefinition, Source
from ovms_rest.pipelines.plan import REQUEST_STEP, Output, Wire
from ovms_rest.pipelines.planning import Missing, PipelineError, plan_pipeline
from ovms_rest.protocol.tensors import Dim, TensorMetadata

UNKNOWN_RANK = "unknown"
SHAPE_HINT = "change the shape or layout of one in its model's config, or put a custom node between them"


def dim(value):
    """Make a dim of a size, -1 for any, or a range as text."""
    if isinstance(value, str):
        low, high = value.split(":")
        return Dim(int(low), int(high) if high else None)
    return Dim(0, None) if value == -1 else Dim(value, value)


def tensors(items):
    """Make tensors of {name: shape}, which are FP32, or {name: (datatype, shape)}."""
    made = {}
    for name, item in items.items():
        datatype, shape = item if isinstance(item, tuple) else ("FP32", item)
        made[name] = TensorMetadata(name, datatype, None if shape == UNKNOWN_RANK else tuple(map(dim, shape)))
    return made


class FakeModel:
    """The part of a model, with only inputs and outputs."""

    model = "m"

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = tensors(inputs), tensors(outputs)


class FakeCode(FakeModel):
    """A custom node with only inputs and outputs."""

    model = None


TEN = [1, 10]


def giving(output, given=TEN):
    """Make a model b -> a of these shapes."""
    return FakeModel({"b": given}, {"a": output})


def splitter(*shape):
    """Make a custom node i -> o of a shape."""
    return FakeCode({"i": TEN}, {"o": list(shape)})


def maximum(count):
    """Make a custom node t -> a that gathers this many shards."""
    return FakeCode({"t": [count, 1, 10]}, {"a": TEN})


DUMMY = giving(TEN)
TWO = FakeModel({"b": TEN, "c": TEN}, {"a": TEN})
SPLITTER = splitter(4, 1, 10)


def node(name, part=DUMMY, count=None, gather=None, aliases=None, **inputs):
    """Make a node and its part; inputs are "node.alias", aliases default to the names of the outputs."""
    connections = tuple((tensor, Source(*source.split("."))) for tensor, source in inputs.items())
    if aliases is None:
        aliases = tuple((output, output) for output in part.outputs)
    model, library = ("", "lib") if isinstance(part, FakeCode) else ("m", "")
    return NodeDefinition(name, model, None, library, {}, connections, aliases, count, gather), part


N = node("n", b="request.in")
SPLIT = node("split", SPLITTER, 4, i="request.in")


def pipeline(*nodes, inputs=("in",), outputs=None, count=None):
    """Make a definition and its parts; outputs are {name: "node.alias"}, by default the first of the last node."""
    if outputs is None:
        last, _ = nodes[-1]
        outputs = {"out": f"{last.name}.{last.outputs[0][0]}"}
    pairs = outputs.items() if isinstance(outputs, dict) else outputs
    definition = PipelineDefinition(
        "p",
        tuple(inputs),
        tuple(definition for definition, _ in nodes),
        tuple((output, Source(*source.split("."))) for output, source in pairs),
        count,
    )
    return definition, {definition.name: part for definition, part in nodes}


def plan(*nodes, **keys):
    return plan_pipeline(*pipeline(*nodes, **keys), ())


def problems(*nodes, taken=(), **keys):
    with pytest.raises(PipelineError) as caught:
        plan_pipeline(*pipeline(*nodes, **keys), taken)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def case(*nodes, **keys):
    return nodes, keys


def shapes(metadata):
    """Return {name: (datatype, shape)} of tensors by name."""
    return {name: f"{tensor.datatype} {tensor.describe_shape()}" for name, tensor in metadata.items()}


# --- The plans of OVMS's examples


def test_nodes_of_a_chain_run_in_order():
    result = plan(node("n1", b="request.in"), node("n2", b="n1.a"))
    first, second = result.steps
    assert (first.name, first.wires, first.part) == ("n1", (Wire("b", REQUEST_STEP, "in"),), DUMMY)
    assert (second.name, second.wires, second.used) == ("n2", (Wire("b", 0, "a"),), ("a",))
    assert result.outputs == (Output("out", 1, "a"),)
    assert [(step.level, step.count, step.gathers) for step in result.steps] == [((), None, None)] * 2
    assert (result.metadata.name, result.metadata.version, result.count) == ("p", "1", None)
    assert shapes(result.metadata.inputs) == {"in": "FP32 [1,10]"}
    assert shapes(result.metadata.outputs) == {"out": "FP32 [1,10]"}


def test_a_wire_has_the_name_of_the_output_not_of_its_alias():
    result = plan(
        node("n1", b="request.in", aliases=(("x", "a"),)),
        node("n2", b="n1.x", aliases=(("y", "a"),)),
        outputs={"out": "n2.y"},
    )
    assert result.steps[1].wires == (Wire("b", 0, "a"),)
    assert result.outputs == (Output("out", 1, "a"),)


def test_an_ensemble_fans_out_and_in():
    googlenet = FakeModel({"input": ["1:8", 224, 224, 3]}, {"Softmax": [-1, 1001]})
    resnet = FakeModel({"map": [-1, 224, -1, 3]}, {"softmax_tensor": [-1, 1001]})
    argmax = FakeModel({"input1": [-1, 1001], "input2": [-1, 1001]}, {"argmax:0": ("INT64", [-1])})
    result = plan(
        node("argmax_node", argmax, input1="googlenet_node.probability", input2="resnet_node.probability"),
        node("googlenet_node", googlenet, input="request.image", aliases=(("probability", "Softmax"),)),
        node("resnet_node", resnet, map="request.image", aliases=(("probability", "softmax_tensor"),)),
        inputs=["image"],
        outputs={"label": "argmax_node.argmax:0"},
    )
    assert [step.name for step in result.steps] == ["googlenet_node", "resnet_node", "argmax_node"]
    assert result.steps[2].wires == (Wire("input1", 0, "Softmax"), Wire("input2", 1, "softmax_tensor"))
    assert shapes(result.metadata.inputs) == {"image": "FP32 [1:8,224,224,3]"}
    assert shapes(result.metadata.outputs) == {"label": "INT64 [-1]"}


def operations(*last):
    """Plan OVMS's example of four operations whose results a model gets one by one, and `last` nodes."""
    different = FakeCode({"input_numbers": TEN, "op_factors": [1, 4]}, {"results": [4, 1, 10]})
    ops = node("ops", different, 4, input_numbers="request.numbers", op_factors="request.factors")
    return plan(ops, node("dummy", b="ops.results"), *last, inputs=["numbers", "factors"])


def test_a_gathering_node_runs_outside_the_sessions_it_gathers():
    result = operations(node("max", maximum(4), gather="ops", t="dummy.a"))
    assert [step.level for step in result.steps] == [(), (0,), ()]
    assert [step.count for step in result.steps] == [4, None, None]
    assert [step.gathers for step in result.steps] == [None, None, 0]
    assert [step.part.model for step in result.steps] == [None, "m", None]
    assert shapes(result.metadata.outputs) == {"out": "FP32 [1,10]"}


def test_the_response_gathers_shards_that_no_node_gathered():
    assert shapes(operations().metadata.outputs) == {"out": "FP32 [4,1,10]"}


def test_a_detection_pipeline_outputs_its_crops_and_a_result_for_each():
    detector = FakeModel({"image": [1, 512, 512, 3]}, {"detection": [1, 1, 200, 7]})
    extract = FakeCode(
        {"image": [1, 512, 512, 3], "detection": [1, 1, 200, 7]},
        {"images": [-1, 1, 72, 72, 3], "coordinates": [-1, 1, 4], "label_ids": ("INT32", [-1, 1, 1])},
    )
    attributes = FakeModel({"input": [1, 72, 72, 3]}, {"color": [1, 7], "type": [1, 4]})
    result = plan(
        node("vehicle_detection", detector, image="request.image"),
        node("extract", extract, DYNAMIC, image="request.image", detection="vehicle_detection.detection"),
        node("recognition", attributes, input="extract.images"),
        inputs=["image"],
        outputs={
            "vehicle_images": "extract.images",
            "vehicle_coordinates": "extract.coordinates",
            "types": "recognition.type",
            "colors": "recognition.color",
        },
    )
    assert [(step.name, step.level, step.count) for step in result.steps] == [
        ("vehicle_detection", (), None),
        ("extract", (), DYNAMIC),
        ("recognition", (1,), None),
    ]
    assert result.steps[1].used == ("images", "coordinates")
    assert result.outputs == (
        Output("colors", 2, "color"),
        Output("types", 2, "type"),
        Output("vehicle_coordinates", 1, "coordinates"),
        Output("vehicle_images", 1, "images"),
    )
    assert shapes(result.metadata.outputs) == {
        "colors": "FP32 [-1,1,7]",
        "types": "FP32 [-1,1,4]",
        "vehicle_coordinates": "FP32 [-1,1,4]",
        "vehicle_images": "FP32 [-1,1,72,72,3]",
    }
    assert list(result.metadata.outputs) == sorted(result.metadata.outputs)


@pytest.mark.parametrize(("count", "shown"), [(DYNAMIC, "-1"), (3, "3")])
def test_a_pipeline_with_a_count_splits_its_requests(count, shown):
    resnet = FakeModel({"0": [1, 3, 224, 224]}, {"1463": [1, 1000]})
    result = plan(
        node("n", resnet, **{"0": "request.image"}), inputs=["image"], outputs={"prob": "n.1463"}, count=count
    )
    assert (result.count, result.steps[0].level) == (count, (REQUEST_STEP,))
    assert shapes(result.metadata.inputs) == {"image": f"FP32 [{shown},1,3,224,224]"}
    assert shapes(result.metadata.outputs) == {"prob": f"FP32 [{shown},1,1000]"}


def test_a_custom_node_feeds_a_model():
    transformation = FakeCode({"image": [1, -1, -1, 3]}, {"image": [1, 224, 224, 3]})
    resnet = FakeModel({"input": [1, 224, 224, 3]}, {"1463": [1, 1000]})
    result = plan(
        node("transform", transformation, image="request.0"),
        node("resnet", resnet, input="transform.image"),
        inputs=["0"],
        outputs={"1463": "resnet.1463"},
    )
    assert [step.part for step in result.steps] == [transformation, resnet]
    assert shapes(result.metadata.inputs) == {"0": "FP32 [1,-1,-1,3]"}


# --- Order, levels, used outputs


def test_independent_nodes_keep_the_order_of_the_file():
    result = plan(
        node("d", b="c.a"),
        node("a", b="request.in"),
        node("c", b="b.a"),
        node("b", b="request.in"),
        outputs={"one": "a.a", "two": "d.a"},
    )
    assert [step.name for step in result.steps] == ["a", "b", "c", "d"]


def test_nested_demultiplexers_open_and_close_levels():
    result = plan(
        node("outer", splitter(2, 1, 10), 2, i="request.in"),
        node("inner", splitter(3, 1, 10), 3, i="outer.o"),
        node("n", b="inner.o"),
        node("close_inner", maximum(3), gather="inner", t="n.a"),
        node("close_outer", maximum(2), gather="outer", t="close_inner.a"),
        outputs={"both": "n.a", "inner": "inner.o", "one": "close_inner.a", "none": "close_outer.a"},
    )
    assert [step.level for step in result.steps] == [(), (0,), (0, 1), (0,), ()]
    assert [step.gathers for step in result.steps] == [None, None, None, 1, 0]
    assert shapes(result.metadata.outputs) == {
        "both": "FP32 [2,3,1,10]",
        "inner": "FP32 [2,3,1,10]",
        "none": "FP32 [1,10]",
        "one": "FP32 [2,1,10]",
    }


def test_a_node_may_gather_and_demultiply():
    regroup = FakeCode({"t": [4, 1, 10]}, {"o": [5, 1, 10]})
    nodes = node("n", b="split.o"), node("regroup", regroup, 5, "split", t="n.a"), node("last", b="regroup.o")
    result = plan(SPLIT, *nodes)
    assert [(step.level, step.count, step.gathers) for step in result.steps][2:] == [((), 5, 0), ((2,), None, None)]


def test_a_node_gathering_from_its_source_gets_the_whole_output():
    result = plan(SPLIT, node("max", maximum(4), gather="split", t="split.o"))
    assert (result.steps[1].level, result.steps[1].gathers) == ((), 0)


def test_a_node_may_gather_from_the_request():
    both = FakeCode({"t": [-1, 1, 10], "w": [-1, 1, 10]}, {"m": [1]})
    result = plan(
        N,
        node("max", both, gather="request", t="n.a", w="request.in"),
        outputs={"o": "max.m", "echo": "request.in"},
        count=DYNAMIC,
    )
    assert (result.steps[1].level, result.steps[1].gathers) == ((), REQUEST_STEP)
    assert result.steps[1].wires[1] == Wire("w", REQUEST_STEP, "in")
    assert result.outputs[0] == Output("echo", REQUEST_STEP, "in")
    assert shapes(result.metadata.inputs) == {"in": "FP32 [-1,1,10]"}
    assert shapes(result.metadata.outputs) == {"echo": "FP32 [-1,1,10]", "o": "FP32 [1]"}


def test_unconnected_outputs_are_not_used():
    both = FakeModel({"b": TEN}, {"a": [1, 10], "rest": [1], "z": [2]})
    result = plan(node("n", both, b="request.in"), outputs={"z": "n.z", "a": "n.a"})
    assert result.steps[0].used == ("a", "z")


# --- Metadata


def test_an_input_has_the_shapes_that_all_its_nodes_allow():
    one, other = giving([1], ["1:8", -1]), giving([1], ["4:", 3])
    nodes = node("n1", one, b="request.in"), node("n2", other, b="request.in")
    result = plan(*nodes, outputs={"x": "n1.a", "y": "n2.a"})
    assert shapes(result.metadata.inputs) == {"in": "FP32 [4:8,3]"}


def test_an_input_of_unknown_rank_fits_every_other():
    unknown = giving([1], UNKNOWN_RANK)
    nodes = [node("n1", unknown, b="request.in"), node("n2", b="request.in"), node("n3", unknown, b="request.in")]
    result = plan(*nodes, outputs={"x": "n1.a", "y": "n2.a", "z": "n3.a"})
    assert shapes(result.metadata.inputs) == {"in": "FP32 [1,10]"}


def test_inputs_are_in_alphabetical_order():
    two = FakeModel({"b": [1], "c": [2]}, {"a": [1]})
    result = plan(node("n", two, b="request.z", c="request.a"), inputs=["z", "a"])
    assert list(result.metadata.inputs) == ["a", "z"]


def test_an_output_of_unknown_rank_fits_every_input():
    unknown = giving(UNKNOWN_RANK)
    result = plan(
        node("n1", unknown, 4, b="request.in"),
        node("n2", unknown, b="n1.a"),
        node("n3", b="n2.a"),
        outputs={"whole": "n1.a", "gathered": "n2.a", "known": "n3.a"},
    )
    assert shapes(result.metadata.outputs) == {
        "gathered": "FP32 [...]",
        "known": "FP32 [4,1,10]",
        "whole": "FP32 [...]",
    }


def test_a_dynamic_count_is_shown_as_the_first_dim_when_that_is_static():
    result = plan(node("split", SPLITTER, DYNAMIC, i="request.in"), node("n", b="split.o"))
    assert shapes(result.metadata.outputs) == {"out": "FP32 [4,1,10]"}


def test_an_output_of_a_demultiplexer_keeps_its_own_first_dim():
    result = plan(node("split", splitter(-1, 10), 4, i="request.in"))
    assert shapes(result.metadata.outputs) == {"out": "FP32 [-1,10]"}


def test_an_output_wired_to_the_request_has_the_metadata_of_the_input():
    result = plan(node("n", b="request.in"), outputs={"out": "n.a", "echo": "request.in"})
    assert result.outputs == (Output("echo", REQUEST_STEP, "in"), Output("out", 0, "a"))
    assert shapes(result.metadata.outputs)["echo"] == "FP32 [1,10]"
    assert result.metadata.outputs["echo"].name == "echo"


class FakeImages:
    """An image decoder without a function, compared by identity."""


def taking_images(images, shape=(1, 4, 4, 3)):
    """Make a model whose input "b" takes encoded images."""
    model = FakeModel({}, {"a": [1]})
    model.inputs = {"b": TensorMetadata("b", "FP32", tuple(map(dim, shape)), images)}
    return model


def find_images(*models, **keys):
    """Return the image decoder of an input that goes to all these models."""
    nodes = [node(f"n{number}", model, b="request.in") for number, model in enumerate(models)]
    outputs = {f"o{number}": f"n{number}.a" for number in range(len(models))}
    return plan(*nodes, outputs=outputs, **keys).metadata.inputs["in"].images


def test_an_input_decodes_images_as_its_first_node_that_can():
    first, second = FakeImages(), FakeImages()
    assert find_images(taking_images(first)) is first
    assert find_images(taking_images(None), taking_images(first), taking_images(second)) is first


def test_an_input_whose_nodes_take_different_shapes_takes_no_images():
    assert find_images(taking_images(FakeImages()), taking_images(FakeImages(), (-1, 4, 4, 3))) is None


def test_an_input_of_a_pipeline_with_a_count_takes_no_images():
    assert find_images(taking_images(FakeImages()), count=2) is None


# --- Problems

N1 = node("n1", b="request.in")
D = node("d", SPLITTER, 4, i="request.in")
UNUSED = "none of its outputs reaches the response; connect or remove it"
ONLY = "is allowed only without other demultiplexers; give each a count of at least 1"
NONE = "there are no demultiplexers"


def dynamic(name, count, source):
    return node(name, splitter(-1, 1, 10), count, i=source)


def gather(name, demultiplexer, source, first=4, second=1):
    return node(name, FakeCode({"t": [first, second, 10]}, {"a": TEN}), gather=demultiplexer, t=source)


def splits(*shape, for_node=False):
    """Make the case of a demultiplexer with the count 4 and an output of this shape."""
    d = node("d", splitter(*shape), 4, i="request.in")
    return case(d, node("n", b="d.o")) if for_node else case(d)


# Nodes and keys of a pipeline, and all its problems.
PROBLEMS = {
    # Names and parts
    "name of a model": (case(N, taken=["p"]), "a model has the same name; rename one of them"),
    "no nodes or outputs": (
        case(inputs=[], outputs={}),
        "it has no nodes; a pipeline needs at least one",
        "it has no outputs; a pipeline needs at least one",
    ),
    "repeated node": (case(N, N, node("n", b="x.y")), "node 'n': the name is not unique; rename the others"),
    "request as a name": (
        case(node("request", b="request.in"), N),
        "node 'request': the name is reserved for the beginning of the pipeline; rename the node",
    ),
    "response as a name": (
        case(node("response", b="request.in"), N),
        "node 'response': the name is reserved for the end of the pipeline; rename the node",
    ),
    "repeated alias": (
        case(node("n", b="request.in", aliases=(("a", "a"), ("a", "a")))),
        "node 'n': the alias 'a' is not unique; rename the others",
    ),
    "repeated output": (
        case(N, outputs=[("o", "n.a"), ("o", "n.a")]),
        "output 'o': the name is not unique; rename the others",
    ),
    "missing part": (
        case(node("n1", Missing("gone"), b="request.in", aliases=(("a", "z"),)), node("n2", b="n1.a")),
        "node 'n1': gone",
    ),
    "several": (
        case(node("n1", Missing("gone"), b="request.in", aliases=(("a", "z"),)), node("n2", c="n1.a"), taken=["p"]),
        "a model has the same name; rename one of them",
        "node 'n1': gone",
        "node 'n2' input 'c': model 'm' has no such input; its inputs are 'b'",
        "node 'n2': input 'b' of model 'm' is not connected; "
        'add {"b": {"node_name": ..., "data_item": ...}} to its inputs',
    ),
    # Connections
    "unknown source node": (
        case(N1, node("n2", b="n3.a")),
        "node 'n2' input 'b': there is no node 'n3'; the nodes are 'request', 'n1', 'n2'",
    ),
    "response as a source": (
        case(N, outputs={"o": "response.a", "p": "n.a"}),
        "output 'o': 'response' is the end of the pipeline and has no outputs; the nodes are 'request', 'n'",
    ),
    "unknown input of the pipeline": (
        case(node("n", b="request.inn")),
        "node 'n' input 'b': the pipeline has no input 'inn'; its inputs are 'in'",
    ),
    "unknown alias": (
        case(N1, node("n2", b="n1.x"), node("n3", b="n2.a", aliases=()), outputs={"out": "n3.a"}),
        "node 'n2' input 'b': node 'n1' has no output with the alias 'x'; its aliases are 'a'",
        "output 'out': node 'n3' has no output with the alias 'a'; it has no aliases",
    ),
    "connected alias of an unknown output": (
        case(
            node("n1", b="request.in", aliases=(("x", "z"),)),
            node("n2", b="n1.x"),
            node("n3", b="n1.x"),
            outputs={"o": "n2.a", "p": "n3.a"},
        ),
        "node 'n1' alias 'x': model 'm' has no output 'z'; its outputs are 'a'",
    ),
    "unknown input of a node": (
        case(node("n", b="request.in", c="request.in")),
        "node 'n' input 'c': model 'm' has no such input; its inputs are 'b'",
    ),
    "part without inputs": (
        case(node("n", FakeModel({}, {"a": [1]})), inputs=[]),
        "node 'n': model 'm' has no inputs, so nothing would start it",
    ),
    "unconnected input": (
        case(node("n", SPLITTER), inputs=[]),
        "node 'n': input 'i' of library 'lib' is not connected; "
        'add {"i": {"node_name": ..., "data_item": ...}} to its inputs',
    ),
    "cycle": (
        case(
            node("n1", TWO, b="request.in", c="n3.a"),
            node("n2", b="n1.a"),
            node("n3", b="n2.a"),
            node("n4", b="n3.a"),
        ),
        "the nodes 'n1' -> 'n2' -> 'n3' -> 'n1' form a cycle; none of them could start",
    ),
    "node that is its own source": (
        case(node("n", b="n.a"), inputs=[]),
        "the nodes 'n' -> 'n' form a cycle; none of them could start",
    ),
    "nodes that do not reach the response": (
        case(N1, node("n2", b="n1.a"), node("n3", b="n2.a"), outputs={"o": "n1.a"}),
        f"node 'n2': {UNUSED}",
        f"node 'n3': {UNUSED}",
    ),
    "unused input": (case(N, inputs=["in", "more"]), "input 'more': no node uses it; connect or remove it"),
    "input that only the response uses": (
        case(N, inputs=["in", "x"], outputs={"o": "n.a", "echo": "request.x"}),
        "input 'x': only the response uses it, so its datatype and shape are unknown; "
        "connect it to a node as well, or remove it",
    ),
    # Demultiplexers
    "dynamic demultiplexer beside another": (
        case(dynamic("d1", 4, "request.in"), dynamic("d2", DYNAMIC, "d1.o")),
        f"it has the demultiplexers 'd1', 'd2', but the dynamic demultiply_count of 'd2' {ONLY}",
    ),
    "dynamic demultiplexers beside another": (
        case(dynamic("d1", 4, "request.in"), dynamic("d2", DYNAMIC, "d1.o"), count=DYNAMIC),
        f"it has the demultiplexers 'request', 'd1', 'd2', but the dynamic demultiply_count of 'request', 'd2' {ONLY}",
    ),
    "gathering from an unknown node": (
        case(node("n", gather="x", b="request.in")),
        f"node 'n': gather_from_node is 'x', but there is no such node; {NONE}",
    ),
    "gathering from a node that does not demultiply": (
        case(D, node("n", b="d.o"), gather("g", "n", "n.a")),
        "node 'g': gather_from_node is 'n', but node 'n' has no demultiply_count; the demultiplexers are 'd'",
    ),
    "gathering from a request that is not split": (
        case(node("n", gather="request", b="request.in")),
        f"node 'n': gather_from_node is 'request', but the pipeline has no demultiply_count; {NONE}",
    ),
    "gathering from an outer demultiplexer first": (
        case(D, node("d2", SPLITTER, 4, i="d.o"), gather("g", "d", "d2.o")),
        "node 'g': gather_from_node is 'd', but 'd2' demultiplies after it; gather from 'd2' first",
    ),
    "gathering outside the sessions": (
        case(D, N, gather("g", "d", "n.a"), outputs={"o": "g.a", "d": "d.o"}),
        "node 'g': gather_from_node is 'd', but its inputs come from no demultiplexer",
    ),
    "gathering twice": (
        case(D, gather("g1", "d", "d.o"), gather("g2", "d", "g1.a")),
        "node 'g2': gather_from_node is 'd', but its inputs come from no demultiplexer",
    ),
    "inputs from different sessions": (
        case(D, node("n", TWO, b="d.o", c="request.in"), node("after", b="n.a")),
        "node 'n': input 'b' comes from the sessions of 'd', input 'c' from no demultiplexer; "
        "all inputs of a node must come from the same sessions",
    ),
    "split for a node with 2 dims": (
        splits(4, 10, for_node=True),
        "node 'd' output 'o': its shape is [4,10]; demultiplying it for other nodes needs at least 3 dims",
    ),
    "split for the response without dims": (
        splits(),
        "node 'd' output 'o': its shape is []; demultiplying it needs at least 1 dim",
    ),
    "split into 5 for 4": (
        splits(5, 1, 10, for_node=True),
        "node 'd' output 'o': its shape is [5,1,10]; its first dim must be 4, the demultiply_count of its node",
    ),
    "split into 5 to 8 for 4": (
        splits("5:8", 1),
        "node 'd' output 'o': its shape is [5:8,1]; its first dim must be 4, the demultiply_count of its node",
    ),
    "different first dims of a dynamic demultiplexer": (
        case(
            node("d", FakeCode({"i": TEN}, {"o": [4, 1, 10], "q": [3, 1]}), DYNAMIC, i="request.in"),
            node("n", b="d.o"),
            outputs={"o": "n.a", "q": "d.q"},
        ),
        "node 'd' output 'q': its shape is [3,1]; its first dim must be 4, as for the other outputs",
    ),
    "node gathering another count from the request": (
        case(gather("g", "request", "request.in", 3), count=4),
        "node 'g' input 't': its shape is [3,1,10]; its first dim must be 4, the demultiply_count of the pipeline",
    ),
    # Shapes and datatypes
    "shapes between nodes": (
        case(node("n1", giving([4, 1, 10]), b="request.in"), node("n2", b="n1.a")),
        f"node 'n2' input 'b': its shape is [1,10], but node 'n1' output 'a' gives [4,1,10]; {SHAPE_HINT}",
    ),
    "shape of a shard": (
        splits(4, 2, 10, for_node=True),
        f"node 'n' input 'b': its shape is [1,10], but node 'd' output 'o' gives [2,10] to each session; {SHAPE_HINT}",
    ),
    "shape of 4 gathered tensors": (
        case(D, node("n", b="d.o"), gather("g", "d", "n.a", 5, 2)),
        "node 'g' input 't': its shape is [5,2,10], but node 'n' output 'a' gives [4,1,10] when gathered from 'd'; "
        f"{SHAPE_HINT}",
    ),
    "shape of any number of gathered tensors": (
        case(dynamic("d", DYNAMIC, "request.in"), node("n", b="d.o"), gather("g", "d", "n.a", 5, 2)),
        "node 'g' input 't': its shape is [5,2,10], but node 'n' output 'a' gives [-1,1,10] when gathered from 'd'; "
        f"{SHAPE_HINT}",
    ),
    "shape of an output gathered from its own demultiplexer": (
        case(D, gather("g", "d", "d.o", 4, 2)),
        f"node 'g' input 't': its shape is [4,2,10], but node 'd' output 'o' gives [4,1,10]; {SHAPE_HINT}",
    ),
    "datatypes between nodes": (
        case(node("n1", giving(("INT64", [1, 10])), b="request.in"), node("n2", b="n1.a")),
        "node 'n2' input 'b': its datatype is FP32, but node 'n1' output 'a' gives INT64; "
        "nothing is converted between nodes",
    ),
    "an input for nodes of different shapes": (
        case(N1, node("n2", giving([1], [1, 11]), b="request.in"), outputs={"x": "n1.a", "y": "n2.a"}),
        "input 'in': node 'n1' input 'b' takes FP32 [1,10], node 'n2' input 'b' takes FP32 [1,11]; "
        "one tensor must fit both",
    ),
    "an input for nodes of different datatypes": (
        case(N1, node("n2", giving([1], ("INT64", [1, 10])), b="request.in"), outputs={"x": "n1.a", "y": "n2.a"}),
        "input 'in': node 'n1' input 'b' takes FP32 [1,10], node 'n2' input 'b' takes INT64 [1,10]; "
        "one tensor must fit both",
    ),
    "an input for nodes of different ranks": (
        case(N1, node("n2", giving([1], [10]), b="request.in"), outputs={"x": "n1.a", "y": "n2.a"}),
        "input 'in': node 'n1' input 'b' takes FP32 [1,10], node 'n2' input 'b' takes FP32 [10]; "
        "one tensor must fit both",
    ),
    # Strings
    "UINT8 matrix named string": (  # the name decides, even where a node takes a matrix of the same shape
        case(
            node("n1", FakeModel({"b": TEN}, {"text_STRING": ("UINT8", [-1, -1])}), b="request.in"),
            node("n2", giving(("UINT8", [-1, -1]), ("UINT8", [-1, -1])), b="n1.text_STRING"),
        ),
        "node 'n2' input 'b': node 'n1' output 'text_STRING' gives strings (UINT8), which can only go to the response",
    ),
    "demultiplied strings": (
        case(node("d", giving(("BYTES", [4, 1, 1]), ("BYTES", [-1])), 4, b="request.in"), node("n", b="d.a")),
        "node 'd' input 'b': has strings (BYTES), which a demultiplexer cannot take",
        "node 'd' output 'a': has strings (BYTES), which cannot be demultiplied",
    ),
    "strings of a split request": (
        case(node("n", giving([1], ("BYTES", [-1])), b="request.in"), count=2),
        "input 'in': has strings (BYTES), which cannot be demultiplied; remove the demultiply_count of the pipeline",
    ),
    "strings gathered by the response": (
        case(D, node("n", giving(("BYTES", [1])), b="d.o")),
        "output 'out': node 'n' output 'a' has strings (BYTES), which cannot be gathered; "
        "it comes from the sessions of 'd'",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_mistake_is_reported_once_at_its_cause(name):
    (nodes, keys), *expected = PROBLEMS[name]
    assert problems(*nodes, **keys) == expected


def test_an_unconnected_alias_of_an_unknown_output_is_only_a_warning(caplog):
    plan(node("n", SPLITTER, i="request.in", aliases=(("o", "o"), ("x", "z"))), outputs={"o": "n.o"})
    assert caplog.messages == ["pipeline 'p': node 'n' alias 'x': library 'lib' has no output 'z'; its outputs are 'o'"]


def test_an_input_connected_twice_is_rejected():
    definition, parts = pipeline(N1, node("n2", b="request.in"), outputs={"o": "n2.a", "p": "n1.a"})
    first, second = definition.nodes
    twice = replace(second, inputs=(*second.inputs, ("b", Source("n1", "a"))))
    with pytest.raises(PipelineError) as caught:
        plan_pipeline(replace(definition, nodes=(first, twice)), parts, ())
    assert caught.value.problems == (
        "node 'n2' input 'b': is connected more than once, to 'in' of 'request', 'a' of 'n1'; keep one",
    )


def test_an_unused_output_need_not_be_splittable():
    split = FakeCode({"i": TEN}, {"o": [4, 1, 10], "q": [3]})
    assert plan(node("d", split, 4, i="request.in"), outputs={"o": "d.o"}).steps[0].used == ("o",)


@pytest.mark.parametrize(("first", "shown"), [(-1, "-1"), ("1:8", "1:8")])
def test_a_count_that_some_requests_may_miss_is_a_warning(caplog, first, shown):
    plan(node("d", splitter(first, 1, 10), 4, i="request.in"), node("n", b="d.o"))
    assert caplog.messages == [
        f"pipeline 'p': node 'd' output 'o': its shape is [{shown},1,10]; requests for which its first dim is not 4, "
        "the demultiply_count of its node, will fail"
    ]


@pytest.mark.parametrize(("first", "count"), [(4, 4), (-1, DYNAMIC), (4, DYNAMIC)])
def test_a_count_that_every_request_meets_is_no_warning(caplog, first, count):
    plan(node("d", splitter(first, 1, 10), count, i="request.in"), node("n", b="d.o"))
    assert caplog.messages == []


@pytest.mark.parametrize("shape", [[-1, 10], ["1:3", "5:"], [1, "10:20"], UNKNOWN_RANK])
def test_shapes_fit_when_they_overlap(shape):
    assert plan(node("n1", giving(shape), b="request.in"), node("n2", b="n1.a")).steps[1].name == "n2"


@pytest.mark.parametrize("shape", [["2:3", 10], [1, "0:9"], [1], [1, 10, 1]])
def test_shapes_do_not_fit_when_they_do_not_overlap(shape):
    (problem,) = problems(node("n1", giving(shape), b="request.in"), node("n2", b="n1.a"))
    assert problem.startswith("node 'n2' input 'b': its shape is [1,10], but node 'n1' output 'a' gives [")


STRINGS = giving(("BYTES", [-1]), ("BYTES", [-1]))


def test_strings_pass_from_the_request_to_the_response():
    result = plan(node("n", STRINGS, b="request.in"))
    assert shapes(result.metadata.inputs) == {"in": "BYTES [-1]"}
    assert shapes(result.metadata.outputs) == {"out": "BYTES [-1]"}


def test_strings_pass_between_nodes():
    result = plan(node("n1", STRINGS, b="request.in"), node("n2", STRINGS, b="n1.a"))
    assert shapes(result.metadata.outputs) == {"out": "BYTES [-1]"}


def test_a_uint8_matrix_of_custom_code_stays_one_under_a_name_of_strings():
    code = FakeCode({"i": TEN}, {"text_string": ("UINT8", [-1, -1])})
    taker = giving([1], ("UINT8", [-1, -1]))
    assert plan(node("n1", code, i="request.in"), node("n2", taker, b="n1.text_string")).steps[1].part is taker


def test_strings_gathered_by_a_node_are_rejected():
    takes = giving(("BYTES", [1]), ("BYTES", [-1, 1]))
    nodes = D, node("n", giving(("BYTES", [1])), b="d.o"), node("g", takes, gather="d", b="n.a")
    assert "node 'g' input 'b': node 'n' output 'a' gives strings (BYTES), which cannot be gathered" in problems(*nodes)


# --- Any definition

NAMES = st.sampled_from(["n0", "n1", "n2", "n3", "request", "response", "x"])
ITEMS = st.sampled_from(["a", "b", "c"])
SHAPES = st.one_of(
    st.lists(st.sampled_from([-1, 1, 2, "1:3"]), max_size=3), st.sampled_from([[2, 1, 1], [1, 1], UNKNOWN_RANK])
)
TENSORS = st.dictionaries(ITEMS, st.tuples(st.sampled_from(["FP32", "FP32", "INT64", "BYTES"]), SHAPES), max_size=3)
PARTS = st.one_of(
    st.builds(FakeModel, TENSORS, TENSORS), st.builds(FakeCode, TENSORS, TENSORS), st.just(Missing("gone"))
)
COUNTS = st.sampled_from([None, None, None, DYNAMIC, 1, 2])
SOURCES = st.builds(Source, NAMES, ITEMS)


@st.composite
def wild_pipelines(draw):
    """Draw any definition with its parts."""
    names = draw(st.lists(NAMES, max_size=4))
    parts = {name: draw(PARTS) for name in names}
    nodes = [
        NodeDefinition(
            name,
            *(("", None, "lib") if isinstance(parts[name], FakeCode) else ("m", None, "")),
            {},
            tuple(draw(st.lists(st.tuples(ITEMS, SOURCES), max_size=3))),
            tuple(draw(st.lists(st.tuples(ITEMS, ITEMS), max_size=3))),
            draw(COUNTS),
            draw(st.one_of(st.none(), st.none(), NAMES)),
        )
        for name in names
    ]
    inputs = tuple(draw(st.lists(ITEMS, max_size=3)))
    outputs = tuple(draw(st.lists(st.tuples(ITEMS, SOURCES), max_size=3)))
    return PipelineDefinition("p", inputs, tuple(nodes), outputs, draw(COUNTS)), parts


@given(wild_pipelines())
def test_every_definition_has_a_plan_or_problems(drawn):
    """No definition raises another exception or has the same problem twice."""
    definition, parts = drawn
    try:
        result = plan_pipeline(definition, parts, ())
    except PipelineError as error:
        lines = error.problems
    else:
        check(result)
        return
    assert lines
    assert len(set(lines)) == len(lines)


@st.composite
def sound_pipelines(draw):
    """Draw a valid definition, its nodes in any order, with their parts."""
    count = draw(COUNTS)
    counts = st.sampled_from([None, None, 2, 3]) if count != DYNAMIC else st.none()
    # The sources, with the demultiplexers that are open after them.
    sources = {Source("request", "in"): () if count is None else ("request",)}
    definitions, parts = [], {}
    for number in range(draw(st.integers(1, 6))):
        name = f"n{number}"
        level = draw(st.sampled_from(sorted(set(sources.values()))))
        fitting = [source for source, other in sources.items() if other == level]
        chosen = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=3))
        part = FakeModel(
            {f"i{place}": UNKNOWN_RANK for place in range(len(chosen))}, {"a": UNKNOWN_RANK, "b": UNKNOWN_RANK}
        )
        gathers = draw(st.sampled_from([None, level[-1]])) if level else None
        own = draw(counts)
        connections = tuple((f"i{place}", source) for place, source in enumerate(chosen))
        aliases = (("first", "a"), ("second", "b"))
        definitions.append(NodeDefinition(name, "m", None, "", {}, connections, aliases, own, gathers))
        parts[name] = part
        left = level if gathers is None else level[:-1]
        for alias, _ in aliases:
            sources[Source(name, alias)] = left if own is None else (*left, name)
    outputs = [(f"o{number}", source) for number, source in enumerate(sources)]
    nodes = draw(st.permutations(definitions))
    return PipelineDefinition("p", ("in",), tuple(nodes), tuple(outputs), count), parts, sources


@given(sound_pipelines())
def test_every_valid_definition_has_a_plan(drawn):
    definition, parts, sources = drawn
    result = plan_pipeline(definition, parts, ())
    check(result)
    names = {place: step.name for place, step in enumerate(result.steps)} | {REQUEST_STEP: "request"}
    for step in result.steps:
        left = sources[Source(step.name, "first")]
        level = tuple(names[place] for place in step.level)
        assert level == (left if step.count is None else left[:-1])


def check(result):
    """Check the invariants of every plan."""
    leave = [() if result.count is None else (REQUEST_STEP,)]  # that of the request last, as its place -1 is
    for place, step in enumerate(result.steps):
        assert all(wire.step == REQUEST_STEP or 0 <= wire.step < place for wire in step.wires)
        (level,) = {leave[wire.step] for wire in step.wires}
        if step.gathers is not None:
            assert level[-1] == step.gathers
            level = level[:-1]
        assert step.level == level
        assert len({wire.tensor for wire in step.wires}) == len(step.wires)
        leave.insert(place, level if step.count is None else (*level, place))
    taken = {(wire.step, wire.item) for step in result.steps for wire in step.wires}
    taken |= {(output.step, output.item) for output in result.outputs}
    assert taken == {(place, item) for place, step in enumerate(result.steps) for item in step.used} | {
        (REQUEST_STEP, item) for item in result.metadata.inputs
    }
    assert [output.name for output in result.outputs] == list(result.metadata.outputs)
    assert [tensor.name for tensor in result.metadata.outputs.values()] == list(result.metadata.outputs)
