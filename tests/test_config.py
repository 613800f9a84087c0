"""The JSON config file: what is accepted, what it means, and the line for every mistake."""

import json

import pytest

from ovms_rest.config import ModelConfig, load_config
from ovms_rest.errors import ConfigError

NIREQ = "expected an integer from 0 to 100000, got"
NAME = "expected a string that is not empty and has no '/', got"
PLUGIN_VALUE = "has to be a string, a number or a boolean, got"
VERSION_POLICY = 'only {"latest": {"num_versions": 1}}, the default, is supported yet, got'
MONITORING = 'metrics are not served yet, only {"metrics": {"enable": false}} is allowed, got'
CUSTOM_LOADER = "is not supported: custom loaders, deprecated by OVMS too, would have to be compiled C++"
MEDIAPIPE = "is not supported: MediaPipe graphs are not served here"
STATEFUL = "is not supported: OVMS removed stateful models"
ITEM = "expected an object with the only key 'config', an object, got"


@pytest.fixture
def load(tmp_path):
    """Load a config of this content from the file `tmp_path / "config.json"`."""

    def load(content):
        file = tmp_path / "config.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return load_config(file)

    return load


@pytest.fixture
def problems(load, tmp_path):
    """Return the lines that a config of this content is refused with, without the file's path at their beginning."""

    def problems(content):
        with pytest.raises(ConfigError) as caught:
            load(content)
        place = f"{tmp_path / 'config.json'}: "
        assert all(line.startswith(place) for line in caught.value.problems)
        return [line.removeprefix(place) for line in caught.value.problems]

    return problems


def models(*configs):
    """Make the root of a config file with these models."""
    return {"model_config_list": [{"config": config} for config in configs]}


def model(**keys):
    """Make the root of a config file with one model."""
    return models({"name": "m", **keys})


def root(**keys):
    """Make the root of a config file without models."""
    return {"model_config_list": [], **keys}


# --- What is accepted


def test_a_model_needs_no_more_than_a_name(load, tmp_path):
    assert load(models({"name": "m"})) == (ModelConfig("m", tmp_path, "CPU", {}),)


def test_models_keep_the_order_of_the_file(load):
    assert [config.name for config in load(models({"name": "b"}, {"name": "a"}))] == ["b", "a"]


def test_there_may_be_no_model(load):
    assert load(root()) == ()


@pytest.mark.parametrize(
    ("base_path", "expected"),
    [
        ("digits", "digits"),
        ("a/b", "a/b"),
        ("../other", "../other"),
        ("/srv/digits", "/srv/digits"),
        ("dir with ümlaut", "dir with ümlaut"),
    ],
)
def test_base_path_is_relative_to_the_file_unless_absolute(load, tmp_path, base_path, expected):
    (config,) = load(model(base_path=base_path))
    assert config.base_path == tmp_path / expected


@pytest.mark.parametrize("name", ["resnet 50", "modèle", "a.b", "模型", "a%2Fb"])
def test_a_name_may_have_any_character_but_a_slash(load, name):
    assert load(models({"name": name}))[0].name == name


@pytest.mark.parametrize(("target_device", "expected"), [("CPU", "CPU"), ("AUTO:CPU", "AUTO:CPU"), ("", "CPU")])
def test_target_device_is_taken_as_it_is(load, target_device, expected):
    assert load(model(target_device=target_device))[0].target_device == expected


def test_plugin_config_is_taken_as_it_is(load):
    properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 2, "ENABLE_CPU_PINNING": False, "F": 0.5}
    assert load(model(plugin_config=properties))[0].plugin_config == properties


@pytest.mark.parametrize(
    "keys",
    [
        {"nireq": 0},
        {"nireq": 100_000},
        {"allow_cache": True},
        {"allow_cache": False},
        {"model_version_policy": {"latest": {"num_versions": 1}}},
    ],
)
def test_keys_of_a_model_that_change_nothing_are_accepted(load, tmp_path, keys):
    assert load(model(**keys)) == (ModelConfig("m", tmp_path, "CPU", {}),)


@pytest.mark.parametrize(
    "keys",
    [
        {"pipeline_config_list": []},
        {"custom_node_library_config_list": []},
        {"monitoring": {"metrics": {"enable": False}}},
    ],
)
def test_keys_of_the_root_that_change_nothing_are_accepted(load, keys):
    assert load(root(**keys)) == ()


# --- What is refused: the file as a whole


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "none.json")
    assert caught.value.problems == (f"{tmp_path}/none.json: cannot be read: No such file or directory",)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert caught.value.problems == (f"{tmp_path}: cannot be read: Is a directory",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{'model_config_list': []}",
        b'{"model_config_list": [],}',
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b"// comment\n{}",
    ],
)
def test_a_file_that_is_not_json_is_told(problems, content):
    (line,) = problems(content)
    assert line.startswith("is not valid JSON: ")


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ([], "[]"),
        (None, "null"),
        ("model_config_list", '"model_config_list"'),
        (1, "1"),
        ([{"config": {}}], '[{"config":{}}]'),
    ],
)
def test_the_root_is_an_object(problems, content, shown):
    assert problems(content) == [f"expected an object with the key 'model_config_list', got {shown}"]


# --- What is refused: key by key

ROOT_MISTAKES = [
    ({}, ["model_config_list: is missing"]),
    ({"model_config_list": {}}, ["model_config_list: expected an array, got {}"]),
    ({"model_config_list": None}, ["model_config_list: expected an array, got null"]),
    ({"model_config_list": "m"}, ['model_config_list: expected an array, got "m"']),
    ({"model_config_list": ["m"]}, [f'model_config_list[0]: {ITEM} "m"']),
    ({"model_config_list": [None]}, [f"model_config_list[0]: {ITEM} null"]),
    ({"model_config_list": [{}]}, [f"model_config_list[0]: {ITEM} {{}}"]),
    ({"model_config_list": [{"config": []}]}, [f'model_config_list[0]: {ITEM} {{"config":[]}}']),
    ({"model_config_list": [{"name": "m"}]}, [f'model_config_list[0]: {ITEM} {{"name":"m"}}']),
    (
        {"model_config_list": [{"config": {"name": "m"}, "x": 1}]},
        [f'model_config_list[0]: {ITEM} {{"config":{{"name":"m"}},"x":1}}'],
    ),
    (root(model_config_lst=[]), ["model_config_lst: unknown key; the nearest known one is 'model_config_list'"]),
    (root(pipelines=[]), ["pipelines: unknown key; the nearest known one is 'pipeline_config_list'"]),
    (root(pipeline_config_list=[{}]), ["pipeline_config_list: pipelines are not supported yet, only [] is allowed"]),
    (root(pipeline_config_list={}), ["pipeline_config_list: pipelines are not supported yet, only [] is allowed"]),
    (
        root(custom_node_library_config_list=[{}]),
        ["custom_node_library_config_list: custom nodes are not supported yet, only [] is allowed"],
    ),
    (
        root(custom_node_library_config_list=None),
        ["custom_node_library_config_list: custom nodes are not supported yet, only [] is allowed"],
    ),
    (
        root(monitoring={"metrics": {"enable": True}}),
        [f'monitoring: {MONITORING} {{"metrics":{{"enable":true}}}}'],
    ),
    (root(monitoring={}), [f"monitoring: {MONITORING} {{}}"]),
    (root(monitoring=False), [f"monitoring: {MONITORING} false"]),
    (
        root(monitoring={"metrics": {"enable": False, "metrics_list": []}}),
        [f'monitoring: {MONITORING} {{"metrics":{{"enable":false,"metrics_list":[]}}}}'],
    ),
    (root(custom_loader_config_list=[]), [f"custom_loader_config_list: {CUSTOM_LOADER}"]),
    (root(mediapipe_config_list=[]), [f"mediapipe_config_list: {MEDIAPIPE}"]),
]


@pytest.mark.parametrize(("content", "lines"), ROOT_MISTAKES)
def test_a_mistake_in_the_root_is_told_with_its_place(problems, content, lines):
    assert problems(content) == lines


MODEL_MISTAKES = [
    ({"name": ""}, f'name: {NAME} ""'),
    ({"name": None}, f"name: {NAME} null"),
    ({"name": 1}, f"name: {NAME} 1"),
    ({"name": ["m"]}, f'name: {NAME} ["m"]'),
    ({"name": "a/b"}, f'name: {NAME} "a/b"'),
    ({"base_path": "a\0b"}, r'base_path: a path has no NUL character, got "a\u0000b"'),
    ({"base_path": ""}, 'base_path: expected the path of a directory, got ""'),
    ({"base_path": None}, "base_path: expected the path of a directory, got null"),
    ({"base_path": ["a"]}, 'base_path: expected the path of a directory, got ["a"]'),
    ({"base_path": "s3://bucket/m"}, 'base_path: only local directories can be served, got "s3://bucket/m"'),
    ({"base_path": "gs://bucket/m"}, 'base_path: only local directories can be served, got "gs://bucket/m"'),
    ({"base_path": "azfs://share/m"}, 'base_path: only local directories can be served, got "azfs://share/m"'),
    ({"target_device": ["CPU"]}, 'target_device: expected a string, got ["CPU"]'),
    ({"target_device": None}, "target_device: expected a string, got null"),
    ({"target_device": 0}, "target_device: expected a string, got 0"),
    ({"plugin_config": '{"NUM_STREAMS":1}'}, 'plugin_config: expected an object, got "{\\"NUM_STREAMS\\":1}"'),
    ({"plugin_config": []}, "plugin_config: expected an object, got []"),
    ({"plugin_config": None}, "plugin_config: expected an object, got null"),
    ({"plugin_config": {"A": 1, "B": {}}}, f"plugin_config: the value of B {PLUGIN_VALUE} {{}}"),
    ({"plugin_config": {"B": [1]}}, f"plugin_config: the value of B {PLUGIN_VALUE} [1]"),
    ({"plugin_config": {"B": None}}, f"plugin_config: the value of B {PLUGIN_VALUE} null"),
    ({"nireq": -1}, f"nireq: {NIREQ} -1"),
    ({"nireq": 100_001}, f"nireq: {NIREQ} 100001"),
    ({"nireq": "4"}, f'nireq: {NIREQ} "4"'),
    ({"nireq": 4.0}, f"nireq: {NIREQ} 4.0"),
    ({"nireq": True}, f"nireq: {NIREQ} true"),
    ({"nireq": None}, f"nireq: {NIREQ} null"),
    ({"allow_cache": "true"}, 'allow_cache: expected true or false, got "true"'),
    ({"allow_cache": 1}, "allow_cache: expected true or false, got 1"),
    ({"allow_cache": None}, "allow_cache: expected true or false, got null"),
    (
        {"model_version_policy": {"latest": {"num_versions": 2}}},
        f'model_version_policy: {VERSION_POLICY} {{"latest":{{"num_versions":2}}}}',
    ),
    ({"model_version_policy": {"all": {}}}, f'model_version_policy: {VERSION_POLICY} {{"all":{{}}}}'),
    (
        {"model_version_policy": {"specific": {"versions": [1]}}},
        f'model_version_policy: {VERSION_POLICY} {{"specific":{{"versions":[1]}}}}',
    ),
    ({"model_version_policy": "all"}, f'model_version_policy: {VERSION_POLICY} "all"'),
    ({"model_version_policy": {}}, f"model_version_policy: {VERSION_POLICY} {{}}"),
    ({"model_version_policy": None}, f"model_version_policy: {VERSION_POLICY} null"),
    ({"batch_size": "auto"}, 'batch_size: is not supported yet, got "auto"; leave it out'),
    ({"batch_size": 0}, "batch_size: is not supported yet, got 0; leave it out"),
    ({"shape": "auto"}, 'shape: is not supported yet, got "auto"; leave it out'),
    ({"shape": {"x": "(1,3)"}}, 'shape: is not supported yet, got {"x":"(1,3)"}; leave it out'),
    ({"layout": "NHWC:NCHW"}, 'layout: is not supported yet, got "NHWC:NCHW"; leave it out'),
    ({"mean": "[1,2,3]"}, 'mean: is not supported yet, got "[1,2,3]"; leave it out'),
    ({"scale": 255}, "scale: is not supported yet, got 255; leave it out"),
    ({"color_format": "RGB:BGR"}, 'color_format: is not supported yet, got "RGB:BGR"; leave it out'),
    ({"precision": None}, "precision: is not supported yet, got null; leave it out"),
    ({"custom_loader_options": {}}, f"custom_loader_options: {CUSTOM_LOADER}"),
    ({"graph_path": "graph.pbtxt"}, f"graph_path: {MEDIAPIPE}"),
    ({"subconfig": "subconfig.json"}, f"subconfig: {MEDIAPIPE}"),
    ({"stateful": False}, f"stateful: {STATEFUL}"),
    ({"idle_sequence_cleanup": True}, f"idle_sequence_cleanup: {STATEFUL}"),
    ({"low_latency_transformation": False}, f"low_latency_transformation: {STATEFUL}"),
    ({"max_sequence_number": 500}, f"max_sequence_number: {STATEFUL}"),
    ({"basepath": "m"}, "basepath: unknown key; the nearest known one is 'base_path'"),
    ({"model_name": "m"}, "model_name: unknown key; the nearest known one is 'name'"),
    ({"target-device": "CPU"}, "target-device: unknown key; the nearest known one is 'target_device'"),
    ({"plugin_confg": {}}, "plugin_confg: unknown key; the nearest known one is 'plugin_config'"),
]


@pytest.mark.parametrize(("keys", "line"), MODEL_MISTAKES)
def test_a_mistake_in_a_model_is_told_with_its_place(problems, keys, line):
    assert problems(models({"name": "first"}, {"name": "m", **keys})) == [f"model_config_list[1].config.{line}"]


@pytest.mark.parametrize("keys", [{"": 1}, {"\U0001f600": 1}, {"x" * 1000: 1}])
def test_a_key_like_no_known_one_is_refused_too(problems, keys):
    (line,) = problems(root(**keys))
    assert line.startswith(f"{next(iter(keys))}: unknown key; the nearest known one is ")


def test_a_model_without_a_name_is_told(problems):
    assert problems(models({"base_path": "m"})) == ["model_config_list[0].config.name: is missing"]


def test_a_name_that_comes_again_is_told_with_its_first_place(problems):
    assert problems(models({"name": "m"}, {"name": "n"}, {"name": "m"}, {"name": "m"})) == [
        "model_config_list[2].config.name: 'm' is the name of model_config_list[0] already",
        "model_config_list[3].config.name: 'm' is the name of model_config_list[0] already",
    ]


def test_names_that_differ_in_case_are_different(load):
    assert len(load(models({"name": "m"}, {"name": "M"}))) == 2


def test_all_mistakes_are_told_at_once(problems):
    content = {
        "monitoring": {},
        "pipelines": 1,
        "model_config_list": [
            {"config": {"nireq": "4", "shape": "auto"}},
            7,
            {"config": {"name": "m"}},
            {"config": {"name": "m", "base_path": "s3://b"}},
        ],
    }
    assert problems(content) == [
        f"monitoring: {MONITORING} {{}}",
        "pipelines: unknown key; the nearest known one is 'pipeline_config_list'",
        "model_config_list[0].config.name: is missing",
        f'model_config_list[0].config.nireq: {NIREQ} "4"',
        'model_config_list[0].config.shape: is not supported yet, got "auto"; leave it out',
        f"model_config_list[1]: {ITEM} 7",
        'model_config_list[3].config.base_path: only local directories can be served, got "s3://b"',
        "model_config_list[3].config.name: 'm' is the name of model_config_list[2] already",
    ]


def test_the_text_of_the_error_is_its_lines(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load({"model_config_list": 1, "mediapipe_config_list": []})
    assert str(caught.value) == "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("layout", "shown"), [("x" * 78, f'"{"x" * 78}"'), ("x" * 79, f'"{"x" * 79}...'), ("x" * 999, f'"{"x" * 79}...')]
)
def test_a_long_value_is_cut_in_the_message(problems, layout, shown):
    assert problems(model(layout=layout)) == [
        f"model_config_list[0].config.layout: is not supported yet, got {shown}; leave it out"
    ]


def test_a_deeply_nested_value_is_told_like_any_other(problems):
    """Orjson reads 1024 levels but writes only 254."""
    content = b'{"model_config_list": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}"
    (line,) = problems(content)
    assert line.startswith("model_config_list: expected an array, got ")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            model(model_version_policy={"latest": {"num_versions": True}}),
            f'model_config_list[0].config.model_version_policy: {VERSION_POLICY} {{"latest":{{"num_versions":true}}}}',
        ),
        (
            model(model_version_policy={"latest": {"num_versions": 1.0}}),
            f'model_config_list[0].config.model_version_policy: {VERSION_POLICY} {{"latest":{{"num_versions":1.0}}}}',
        ),
        (root(monitoring={"metrics": {"enable": 0}}), f'monitoring: {MONITORING} {{"metrics":{{"enable":0}}}}'),
    ],
)
def test_a_value_of_another_type_is_not_the_default(problems, content, line):
    """To Python 1, 1.0 and true are equal."""
    assert problems(content) == [line]
