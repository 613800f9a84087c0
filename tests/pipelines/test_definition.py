"""Reading pipelines and libraries from the config file, and the message for every mistake of form."""

from pathlib import Path

import pytest

from ovms_rest.pipelines.definition import (
    DYNAMIC,
    NodeDefinition,
    PipelineDefinition,
    Source,
    check_libraries,
    check_pipelines,
    read_pipeline,
)

PLACE = "pipeline_config_list[0]"
NAME = "expected a non-empty string without '/' and control characters, got"
COUNT = "expected an integer from 1 to 10000, or -1 for any count, got"
CONNECTION = "expected an object with one key, the name of a tensor, got"
SOURCE = "expected an object with node_name and data_item, got"


def a_node(**keys):
    """Make the JSON of a node of a model; keys given as ... are left out."""
    node = {
        "name": "n",
        "type": "DL model",
        "model_name": "m",
        "inputs": [{"b": {"node_name": "request", "data_item": "in"}}],
        "outputs": [{"data_item": "a", "alias": "x"}],
        **keys,
    }
    return {key: value for key, value in node.items() if value is not ...}


def a_custom_node(**keys):
    return a_node(type="custom", model_name=..., library_name="lib", **keys)


def a_pipeline(**keys):
    """Make the JSON of a pipeline; keys given as ... are left out."""
    pipeline = {
        "name": "p",
        "inputs": ["in"],
        "nodes": [a_node()],
        "outputs": [{"out": {"node_name": "n", "data_item": "x"}}],
        **keys,
    }
    return {key: value for key, value in pipeline.items() if value is not ...}


def problems(**keys):
    """Return the problems of a pipeline with these keys, without its place."""
    lines = list(check_pipelines([a_pipeline(**keys)]))
    assert all(line.startswith(PLACE) for line in lines)
    return [line.removeprefix(PLACE).removeprefix(".") for line in lines]


def node_problems(**keys):
    """Return the problems of a node with these keys, without its place."""
    lines = problems(nodes=[a_node(**keys)])
    assert all(line.startswith("nodes[0].") for line in lines)
    return [line.removeprefix("nodes[0].") for line in lines]


# --- Reading


def test_a_pipeline_is_read():
    assert list(check_pipelines([a_pipeline()])) == []
    assert read_pipeline(a_pipeline()) == PipelineDefinition(
        "p",
        ("in",),
        (NodeDefinition("n", "m", None, "", {}, (("b", Source("request", "in")),), (("x", "a"),)),),
        (("out", Source("n", "x")),),
        None,
    )


def test_a_pipeline_may_name_an_example_or_have_none():
    for value, example in ((None, None), (True, None), (False, False), ("a.json", Path("/etc/a.json"))):
        item = a_pipeline(**({} if value is None else {"example": value}))
        assert list(check_pipelines([item])) == []
        assert read_pipeline(item, Path("/etc")).example == example
    for value in (None, "", 1):
        (line,) = check_pipelines([a_pipeline(example=value)])
        assert line.startswith(f"{PLACE}.example: expected the path of a file with a request, true or false, got ")


def test_a_node_of_a_model_may_have_a_version():
    (node,) = read_pipeline(a_pipeline(nodes=[a_node(version=3)])).nodes
    assert (node.model, node.version, node.library) == ("m", 3, "")


def test_a_custom_node_has_a_library_and_params():
    item = a_custom_node(params={"scale": "2"}, demultiply_count=4, gather_from_node="d")
    assert problems(nodes=[item]) == []
    (node,) = read_pipeline(a_pipeline(nodes=[item])).nodes
    assert (node.model, node.version, node.library, node.params) == ("", None, "lib", {"scale": "2"})
    assert (node.count, node.gather_from) == (4, "d")


def test_keys_of_the_other_type_of_node_are_ignored():
    """OVMS's schema has one object for both types."""
    model, custom = read_pipeline(
        a_pipeline(nodes=[a_node(library_name="lib"), a_custom_node() | {"model_name": "m", "version": 2}])
    ).nodes
    assert (model.model, model.library) == ("m", "")
    assert (custom.model, custom.version, custom.library) == ("", None, "lib")


@pytest.mark.parametrize(("value", "count"), [(1, 1), (10000, 10000), (-1, DYNAMIC), (0, DYNAMIC)])
def test_a_count_may_be_dynamic(value, count):
    item = a_pipeline(demultiply_count=value, nodes=[a_node(demultiply_count=value)])
    assert list(check_pipelines([item])) == []
    definition = read_pipeline(item)
    assert (definition.count, definition.nodes[0].count) == (count, count)


def test_repeated_inputs_and_aliases_of_a_node_are_kept():
    """Planning reports them."""
    item = a_node(inputs=a_node()["inputs"] * 2, outputs=a_node()["outputs"] * 2)
    assert problems(nodes=[item]) == []
    (node,) = read_pipeline(a_pipeline(nodes=[item])).nodes
    assert node.inputs == (("b", Source("request", "in")),) * 2
    assert node.outputs == (("x", "a"),) * 2


# --- Pipelines


@pytest.mark.parametrize("items", [None, [], {}, "x"])
def test_the_lists_may_be_empty(items):
    """The check of the root reports a list that is not an array."""
    assert list(check_pipelines(items)) == []


def test_a_pipeline_that_is_not_an_object_is_rejected():
    assert list(check_pipelines([7])) == [f"{PLACE}: expected an object with name, inputs, nodes and outputs, got 7"]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        *(({key: ...}, f"{key}: is missing") for key in ("name", "inputs", "nodes", "outputs")),
        ({"node": []}, "node: unknown key; the nearest known one is 'nodes'"),
        ({"name": ""}, f'name: {NAME} ""'),
        ({"name": "a/b"}, f'name: {NAME} "a/b"'),
        ({"name": 7}, f"name: {NAME} 7"),
        ({"inputs": "in"}, 'inputs: expected an array of strings, got "in"'),
        ({"inputs": ["in", 7]}, 'inputs: expected an array of strings, got ["in",7]'),
        ({"inputs": ["b", "a", "a", "b"]}, "inputs: expected unique names, got more than once 'a', 'b'"),
        ({"nodes": {}}, "nodes: expected an array, got {}"),
        ({"outputs": {}}, "outputs: expected an array, got {}"),
        ({"demultiply_count": -2}, f"demultiply_count: {COUNT} -2"),
        ({"demultiply_count": 10001}, f"demultiply_count: {COUNT} 10001"),
        ({"demultiply_count": "4"}, f'demultiply_count: {COUNT} "4"'),
        ({"demultiply_count": True}, f"demultiply_count: {COUNT} true"),
        ({"demultiply_count": None}, f"demultiply_count: {COUNT} null"),
        ({"outputs": ["out"]}, f'outputs[0]: {CONNECTION} "out"'),
        ({"outputs": [{}]}, f"outputs[0]: {CONNECTION} {{}}"),
        ({"outputs": [{"a": {}, "b": {}}]}, f'outputs[0]: {CONNECTION} {{"a":{{}},"b":{{}}}}'),
        ({"outputs": [{"out": "n"}]}, f'outputs[0].out: {SOURCE} "n"'),
        ({"nodes": [7]}, "nodes[0]: expected an object with name, type, inputs and outputs, got 7"),
    ],
)
def test_a_mistake_in_a_pipeline_is_reported(keys, problem):
    assert problems(**keys) == [problem]


def test_names_of_tensors_in_problems_stay_in_one_line_and_are_cut():
    (problem,) = problems(outputs=[{"\u2028" + "t" * 100: {"node_name": "n", "data_item": ["y"]}}])
    assert problem == f'outputs[0].\\u2028{"t" * 59}....data_item: expected a string, got ["y"]'


def test_at_most_ten_repeated_names_are_listed():
    (problem,) = problems(inputs=[str(number) for number in range(100, 120)] * 2)
    assert problem.startswith("inputs: expected unique names, got more than once '100', ")
    assert problem.endswith(", '109', ...")


def test_a_repeated_pipeline_name_is_rejected():
    assert list(check_pipelines([a_pipeline(), a_pipeline(name="q"), a_pipeline()])) == [
        f"pipeline_config_list[2].name: 'p' is already the name of {PLACE}"
    ]


def test_all_mistakes_are_reported_together():
    assert problems(name=..., inputs=7, nodes=[a_node(name=7, outputs=...)], outputs=[{}]) == [
        "name: is missing",
        "inputs: expected an array of strings, got 7",
        "nodes[0].outputs: is missing",
        "nodes[0].name: expected a string, got 7",
        f"outputs[0]: {CONNECTION} {{}}",
    ]


# --- Nodes


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        *(({key: ...}, f"{key}: is missing") for key in ("name", "type", "model_name", "inputs", "outputs")),
        ({"type": "custom", "model_name": ...}, "library_name: is missing"),
        ({"type": "model"}, "type: expected 'DL model' or 'custom', got \"model\""),
        ({"type": ["custom"]}, "type: expected 'DL model' or 'custom', got [\"custom\"]"),
        ({"name": 7}, "name: expected a string, got 7"),
        ({"model_name": 7}, "model_name: expected a non-empty string, got 7"),
        ({"model_name": ""}, 'model_name: expected a non-empty string, got ""'),
        ({"library_name": ""}, 'library_name: expected a non-empty string, got ""'),
        ({"version": 0}, "version: expected an integer of at least 1, got 0"),
        ({"version": "1"}, 'version: expected an integer of at least 1, got "1"'),
        ({"version": True}, "version: expected an integer of at least 1, got true"),
        ({"params": []}, "params: expected an object, got []"),
        ({"params": {"a": "1", "b": 2}}, "params: the value of b must be a string, got 2"),
        ({"demultiply_count": -2}, f"demultiply_count: {COUNT} -2"),
        ({"gather_from_node": ["d"]}, 'gather_from_node: expected a string, got ["d"]'),
        ({"inputs": {}}, "inputs: expected an array, got {}"),
        ({"outputs": {}}, "outputs: expected an array, got {}"),
        ({"gather_from": "d"}, "gather_from: unknown key; the nearest known one is 'gather_from_node'"),
        ({"inputs": [{}]}, f"inputs[0]: {CONNECTION} {{}}"),
        ({"inputs": [{"b": 7}]}, f"inputs[0].b: {SOURCE} 7"),
        ({"inputs": [{"b": {"node_name": "n"}}]}, "inputs[0].b.data_item: is missing"),
        ({"inputs": [{"b": {"data_item": "n"}}]}, "inputs[0].b.node_name: is missing"),
        ({"inputs": [{"b": {"node_name": "n", "data_item": 7}}]}, "inputs[0].b.data_item: expected a string, got 7"),
        (
            {"inputs": [{"b": {"node_name": "n", "data_item": "x", "alias": "y"}}]},
            "inputs[0].b.alias: unknown key; the nearest known one is 'data_item'; known: 'node_name', 'data_item'",
        ),
        ({"outputs": ["a"]}, 'outputs[0]: expected an object with data_item and alias, got "a"'),
        ({"outputs": [{"alias": "x"}]}, "outputs[0].data_item: is missing"),
        ({"outputs": [{"data_item": "a"}]}, "outputs[0].alias: is missing"),
        ({"outputs": [{"data_item": 7, "alias": "x"}]}, "outputs[0].data_item: expected a string, got 7"),
    ],
)
def test_a_mistake_in_a_node_is_reported(keys, problem):
    assert node_problems(**keys) == [problem]


# --- Libraries

LIBRARIES = "custom_node_library_config_list"


@pytest.mark.parametrize("items", [None, [], {}, [{"name": "lib", "base_path": "lib.so"}]])
def test_valid_libraries_have_no_problems(items):
    assert list(check_libraries(items)) == []


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (["lib.so"], "[0]: expected an object with the keys 'name' and 'base_path', got \"lib.so\""),
        ([{"name": "lib"}], "[0].base_path: is missing"),
        ([{"base_path": "lib.so"}], "[0].name: is missing"),
        ([{"name": 7, "base_path": "lib.so"}], "[0].name: expected a string, got 7"),
        ([{"name": "lib", "base_path": []}], "[0].base_path: expected a string, got []"),
        (
            [{"name": "lib", "base_path": "lib.so", "path": "x"}],
            "[0].path: unknown key; the nearest known one is 'base_path'",
        ),
        (
            [{"name": "lib", "base_path": "1.so"}, {"name": "lib", "base_path": "2.so"}],
            f"[1].name: 'lib' is already the name of {LIBRARIES}[0]",
        ),
    ],
)
def test_a_mistake_in_a_library_is_reported(items, problem):
    assert list(check_libraries(items)) == [f"{LIBRARIES}{problem}"]
