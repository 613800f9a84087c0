"""The JSON config file: accepted content, its meaning, and a line for every mistake."""

import json
import os
from pathlib import Path

import pytest

from ovms_rest.config import load_config, parse_model, read_config
from ovms_rest.errors import ConfigError
from ovms_rest.models.configuration import ModelConfig, check_values_of
from ovms_rest.models.options import ModelOptions
from ovms_rest.models.repository import LATEST, VersionPolicy
from ovms_rest.pipelines.definition import Library, PipelineDefinition
from ovms_rest.settings import Settings

NIREQ = "expected an integer from 0 to 100000, got"
NAME = "expected a non-empty string without '/' and control characters, got"
BASE_PATH = "expected the path of a directory or a model file, got"
LOCAL = "only local directories and files can be served, got"
PLUGIN_VALUE = "must be a string, a number or a boolean, got"
VERSION_POLICY = (
    'expected {"latest": {"num_versions": 2}}, {"all": {}} or {"specific": {"versions": [1, 3]}} '
    "with numbers from 1 on, got"
)
BATCH_SIZE = 'expected an integer or a string such as "1:16", got'
SHAPE = 'a string such as "(1,3,224,224)" or an array such as [1,3,224,224]'
SHAPES = f"expected {SHAPE}, or an object of these by input, got"
LAYOUT = 'a string such as "NHWC:NCHW"'
LAYOUTS = f"expected {LAYOUT}, or an object of these by tensor, got"
PER_CHANNEL = 'expected a number or a string such as "(123.7,116.3,103.5)", got'
COLOR_FORMAT = 'expected a string such as "RGB:BGR", got'
PRECISION = 'expected a string such as "uint8:fp32", got'
METRICS_LIST = "metrics_list: expected an array of strings, got"
ENDPOINT_PATH = "is not supported: OVMS removed it, the path is always /metrics"
LIBRARY = "expected an object with the keys 'name' and 'base_path', got"
CUSTOM_LOADER = "is not supported: custom loaders are compiled C++, and OVMS has deprecated them"
MEDIAPIPE = "is not supported: MediaPipe graphs are not served here"
STATEFUL = "is not supported: OVMS removed stateful models in 2026.3, and no state is kept between requests here"
ITEM = "expected an object with the only key 'config', an object, got"
UNKNOWN = "unknown key; the nearest known one is"
ONLY_CONFIG = "unknown key; the only known one is 'config'"


KNOWN = (
    "known: 'name', 'base_path', 'target_device', 'plugin_config', 'nireq', 'allow_cache', 'model_version_policy', "
    "'batch_size', 'max_batch_size', 'shape', 'layout', 'mean', 'scale', 'color_format', 'precision', 'trial', "
    "'cpu_extension', 'example'"
)


@pytest.fixture
def read(tmp_path):
    """Read a config of this content from the file `tmp_path / "config.json"`, with these settings."""

    def read(content, **settings):
        file = tmp_path / "config.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_config(file, Settings(**settings))

    return read


@pytest.fixture
def load(read):
    """Return the models of a config."""
    return lambda content: read(content).models


@pytest.fixture
def load_one(load):
    """Return the model of a config with one model of these keys."""
    return lambda **keys: load(model(**keys))[0]


@pytest.fixture
def problems(read, tmp_path):
    """Return the problems of a config of this content; those of the file without its path."""

    def problems(content, **settings):
        with pytest.raises(ConfigError) as caught:
            read(content, **settings)
        place = f"{tmp_path / 'config.json'}: "
        assert settings or all(line.startswith(place) for line in caught.value.problems)
        return [line.removeprefix(place) for line in caught.value.problems]

    return problems


def models(*configs):
    """Return the root of a config with these models."""
    return {"model_config_list": [{"config": config} for config in configs]}


def model(**keys):
    """Return the root of a config with one model."""
    return models({"name": "m", **keys})


def root(**keys):
    """Return the root of a config without models."""
    return {"model_config_list": [], **keys}


# --- Accepted content


def test_model_needs_only_a_name(load, tmp_path):
    assert load(models({"name": "m"})) == (
        ModelConfig("m", tmp_path, "CPU", {}, VersionPolicy(latest=1), ModelOptions(), nireq=0, allow_cache=False),
    )


def test_models_keep_the_order_of_the_file(load):
    assert [config.name for config in load(models({"name": "b"}, {"name": "a"}))] == ["b", "a"]


def test_config_may_have_no_models(load):
    assert load(root()) == ()


@pytest.mark.parametrize("base_path", ["digits", "a/b", "../other", "/srv/digits", "dir with ümlaut", "a/model.onnx"])
def test_relative_base_path_starts_at_the_file(load_one, tmp_path, base_path):
    assert load_one(base_path=base_path).base_path == tmp_path / base_path


@pytest.mark.parametrize("name", ["resnet 50", "modèle", "a.b", "模型", "a%2Fb"])
def test_name_may_have_any_character_but_a_slash(load, name):
    assert load(models({"name": name}))[0].name == name


def test_empty_target_device_is_the_cpu(load_one):
    assert load_one(target_device="").target_device == "CPU"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_device", "CPU"),
        ("target_device", "AUTO:CPU"),
        ("plugin_config", {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 2, "ENABLE_CPU_PINNING": False, "F": 0.5}),
        ("nireq", 0),
        ("nireq", 1),
        ("nireq", 100_000),
        ("allow_cache", True),
        ("allow_cache", False),
    ],
)
def test_value_is_kept(load_one, key, value):
    assert getattr(load_one(**{key: value}), key) == value


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"latest": {"num_versions": 1}}, LATEST),
        ({"latest": {"num_versions": 12}}, VersionPolicy(latest=12)),
        ({"all": {}}, VersionPolicy()),
        ({"specific": {"versions": [3, 1, 3]}}, VersionPolicy(specific=frozenset({1, 3}))),
        ({"specific": {"versions": []}}, VersionPolicy(specific=frozenset())),
    ],
)
def test_version_policy_has_three_forms(load_one, policy, expected):
    assert load_one(model_version_policy=policy).version_policy == expected


OPTIONS = {
    "batch_size": [0, 16, -1, "1:16", "auto"],
    "shape": ["(1,3,224,224)", {"x": "(1,-1)", "y": "auto"}, {}],
    "layout": ["NHWC:NCHW", {"x": "NHWC:NCHW", "out": "CN:NC"}],
    "mean": [127, 127.5, "(1,2,3)"],
    "scale": [255, 0.5, "[1,2,3]"],
    "color_format": ["RGB:BGR"],
    "precision": ["uint8:fp32"],
    "trial": ["request.json", False],
}


def test_the_path_of_an_example_is_relative_to_the_config(load_one, tmp_path):
    assert load_one(example="a/b.json").example == tmp_path / "a" / "b.json"
    assert load_one(example="/etc/a.json").example == Path("/etc/a.json")
    assert load_one().example is None


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OPTIONS.items() for value in values])
def test_options_are_kept(load_one, key, value):
    assert load_one(**{key: value}).options == ModelOptions(**{key: value})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([1, 3, 224, 224], "(1,3,224,224)"),
        ([1, "200:500", -1, "-1"], "(1,200:500,-1,-1)"),
        ([], "()"),
        ({"x": [1, -1], "y": "(1,2)"}, {"x": "(1,-1)", "y": "(1,2)"}),
    ],
)
def test_shape_as_array_becomes_text(load_one, shape, expected):
    assert load_one(shape=shape).options.shape == expected


INVALID = {
    "shape": ["(1,x)", ["x"], {"x": ""}],
    "layout": ["NN"],
    "batch_size": [-2, "many"],
    "mean": ["red"],
    "scale": [0],
    "color_format": ["CMYK"],
    "precision": ["int4"],
    "trial": ["/etc/passwd"],
    "plugin_config": [{"NO_SUCH_PROPERTY": "1"}],
    "target_device": ["TOASTER"],
    "nireq": [100_001],
    "base_path": ["s3://bucket/m", "a\0b", "a" * 300],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in INVALID.items() for value in values])
def test_invalid_value_does_not_refuse_the_file(load, key, value):
    """Its model alone is not served."""
    assert [config.name for config in load(models({"name": "m", key: value}, {"name": "n"}))] == ["m", "n"]


@pytest.mark.parametrize(
    "keys",
    [
        {"pipeline_config_list": []},
        {"custom_node_library_config_list": []},
        {"custom_node_library_config_list": [{"name": "lib", "base_path": "libs/lib.so"}]},
        {"custom_loader_config_list": []},
        {"mediapipe_config_list": []},
        {"monitoring": {"metrics": {"enable": False}}},
        {"monitoring": {"metrics": {"enable": True}}},
        {"monitoring": {"metrics": {"enable": True, "metrics_list": []}}},
        {"monitoring": {"metrics": {"enable": False, "metrics_list": ["ovms_requests_success", "ovms_streams"]}}},
    ],
)
def test_other_keys_of_the_root_are_accepted(load, keys):
    assert load(root(**keys)) == ()


# The complete example in OVMS's documentation.
EVERY_KEY = {
    **models(
        {
            "name": "resnet",
            "base_path": "models/resnet50",
            "target_device": "CPU",
            "nireq": 8,
            "batch_size": "1:16",
            "layout": "NHWC:NCHW",
            "model_version_policy": {"latest": {"num_versions": 2}},
            "plugin_config": {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "4"},
            "allow_cache": True,
        },
        {
            "name": "bert",
            "base_path": "/models/bert",
            "shape": {"input_ids": "(1,-1)", "attention_mask": "(1,16:512)"},
        },
    ),
    "custom_node_library_config_list": [{"name": "lib", "base_path": "libs/libnode.so"}],
    "pipeline_config_list": [],
    "monitoring": {"metrics": {"enable": True, "metrics_list": ["ovms_requests_success", "ovms_infer_req_queue_size"]}},
}


def test_file_with_every_key_is_read(load, tmp_path):
    assert load(EVERY_KEY) == (
        ModelConfig(
            name="resnet",
            base_path=tmp_path / "models/resnet50",
            target_device="CPU",
            plugin_config={"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "4"},
            version_policy=VersionPolicy(latest=2),
            options=ModelOptions(batch_size="1:16", layout="NHWC:NCHW"),
            nireq=8,
            allow_cache=True,
        ),
        ModelConfig(
            name="bert",
            base_path=Path("/models/bert"),
            options=ModelOptions(shape={"input_ids": "(1,-1)", "attention_mask": "(1,16:512)"}),
        ),
    )


# --- Refused files


@pytest.mark.parametrize(("name", "reason"), [("none.json", "No such file or directory"), ("", "Is a directory")])
def test_path_that_is_not_a_file_is_reported(tmp_path, name, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert caught.value.problems == (f"{tmp_path / name}: cannot be read: {reason}",)


@pytest.mark.parametrize("has_writer", [False, True], ids=["without a writer", "with a silent writer"])
def test_config_at_a_named_pipe_is_reported_without_waiting_for_a_writer(tmp_path, has_writer):
    os.mkfifo(path := tmp_path / "config.json")
    opened = [os.open(path, os.O_RDWR)] if has_writer else []
    try:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert caught.value.problems == (f"{path}: cannot be read: it is not a regular file",)


def test_invalid_json_is_reported(problems):
    (line,) = problems(b"{")
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
def test_root_must_be_an_object(problems, content, shown):
    assert problems(content) == [f"expected an object with the key 'model_config_list', got {shown}"]


# --- Refused keys

ROOT_MISTAKES = [
    ({}, ["model_config_list: is missing"]),
    *(
        (root(**{key: value}), [f"{key}: expected an array, got {shown}"])
        for key in ("model_config_list", "pipeline_config_list", "custom_node_library_config_list")
        for value, shown in (({}, "{}"), (None, "null"))
    ),
    ({"model_config_list": "m"}, ['model_config_list: expected an array, got "m"']),
    ({"model_config_list": ["m"]}, [f'model_config_list[0]: {ITEM} "m"']),
    ({"model_config_list": [None]}, [f"model_config_list[0]: {ITEM} null"]),
    ({"model_config_list": [{}]}, ["model_config_list[0].config: is missing"]),
    ({"model_config_list": [{"config": []}]}, ["model_config_list[0].config: expected an object, got []"]),
    (
        {"model_config_list": [{"name": "m"}]},
        ["model_config_list[0].config: is missing", f"model_config_list[0].name: {ONLY_CONFIG}"],
    ),
    (
        {"model_config_list": [{"config": {"shape": 5, "foo": 1}, "target_device": "CPU"}]},
        [
            f"model_config_list[0].target_device: {ONLY_CONFIG}",
            "model_config_list[0].config.name: is missing",
            f"model_config_list[0].config.shape: {SHAPES} 5",
            f"model_config_list[0].config.foo: {UNKNOWN} 'color_format'; {KNOWN}",
        ],
    ),
    (root(model_config_lst=[]), [f"model_config_lst: {UNKNOWN} 'model_config_list'"]),
    (root(pipelines=[]), [f"pipelines: {UNKNOWN} 'pipeline_config_list'"]),
    (
        root(pipeline_config_list=[{}]),
        [f"pipeline_config_list[0].{key}: is missing" for key in ("name", "inputs", "nodes", "outputs")],
    ),
    (root(monitoring=False), ["monitoring: expected an object, got false"]),
    (root(monitoring=[]), ["monitoring: expected an object, got []"]),
    (root(monitoring={}), ["monitoring.metrics: is missing"]),
    (
        root(monitoring={"metric": {}}),
        ["monitoring.metrics: is missing", f"monitoring.metric: {UNKNOWN} 'metrics'"],
    ),
    (root(monitoring={"metrics": True}), ["monitoring.metrics: expected an object, got true"]),
    (root(custom_loader_config_list=[{}]), [f"custom_loader_config_list: {CUSTOM_LOADER}; expected [], got [{{}}]"]),
    (root(custom_loader_config_list=None), [f"custom_loader_config_list: {CUSTOM_LOADER}; expected [], got null"]),
    (root(mediapipe_config_list=[{}]), [f"mediapipe_config_list: {MEDIAPIPE}; expected [], got [{{}}]"]),
    (root(mediapipe_config_list={}), [f"mediapipe_config_list: {MEDIAPIPE}; expected [], got {{}}"]),
]


@pytest.mark.parametrize(("content", "lines"), ROOT_MISTAKES)
def test_mistake_in_the_root_names_its_place(problems, content, lines):
    assert problems(content) == lines


@pytest.mark.parametrize(
    ("libraries", "lines"),
    [
        (["lib"], [f'[0]: {LIBRARY} "lib"']),
        ([{"name": "lib", "base_path": "lib.so"}, {}], ["[1].name: is missing", "[1].base_path: is missing"]),
        (
            [{"name": 1, "base_path": None, "path": "lib.so"}],
            [
                "[0].name: expected a string, got 1",
                "[0].base_path: expected a string, got null",
                f"[0].path: {UNKNOWN} 'base_path'",
            ],
        ),
    ],
)
def test_mistake_in_the_libraries_names_its_place(problems, libraries, lines):
    expected = [f"custom_node_library_config_list{line}" for line in lines]
    assert problems(root(custom_node_library_config_list=libraries)) == expected


@pytest.mark.parametrize(
    ("metrics", "lines"),
    [
        ({}, ["enable: is missing"]),
        ({"enable": 0}, ["enable: expected true or false, got 0"]),
        ({"enable": "true"}, ['enable: expected true or false, got "true"']),
        ({"enable": True, "metrics_list": "a"}, [f'{METRICS_LIST} "a"']),
        ({"enable": True, "metrics_list": None}, [f"{METRICS_LIST} null"]),
        ({"enable": True, "metrics_list": ["a", 1]}, [f'{METRICS_LIST} ["a",1]']),
        ({"enable": True, "list": []}, [f"list: {UNKNOWN} 'metrics_list'"]),
        (
            {"enable": False, "metrics_list": ["ovms_foo", *["ovms_streams"] * 2]},
            [
                "metrics_list[0]: unknown metric 'ovms_foo'; the nearest known one is 'ovms_responses'",
                "metrics_list[2]: 'ovms_streams' is listed more than once",
            ],
        ),
        ({"enable": True, "endpoint_path": "/metrics"}, [f"endpoint_path: {ENDPOINT_PATH}"]),
        ({"enable": True, "Endpoint_Path": "/metrics"}, [f"Endpoint_Path: {ENDPOINT_PATH}"]),
    ],
)
def test_mistake_in_the_metrics_names_its_place(problems, metrics, lines):
    assert problems(root(monitoring={"metrics": metrics})) == [f"monitoring.metrics.{line}" for line in lines]


def as_json(value):
    return json.dumps(value, separators=(",", ":"))


# Values of a wrong type by key, with the message.
WRONG_TYPES = [
    ("name", NAME, ["", None, 1, ["m"], "a/b"]),
    ("base_path", BASE_PATH, ["", None, ["a"]]),
    ("target_device", "expected a string, got", [["CPU"], None, 0]),
    ("plugin_config", "expected an object, got", ['{"NUM_STREAMS":1}', [], None]),
    ("nireq", NIREQ, [-1, "4", 4.0, True, None]),
    ("allow_cache", "expected true or false, got", ["true", 1, None]),
    ("batch_size", BATCH_SIZE, [1.5, True, None, [1]]),
    ("shape", SHAPES, [5, None, [1, 2.5], [1, True], [[1, 2]]]),
    ("layout", LAYOUTS, [["N", "C"], None]),
    ("mean", PER_CHANNEL, [None, True, [1, 2, 3]]),
    ("scale", PER_CHANNEL, [{}]),
    ("color_format", COLOR_FORMAT, [["RGB", "BGR"]]),
    ("precision", PRECISION, [None, 32]),
    ("trial", "expected the path of a file with a request, true or false, got", [None, ""]),
    ("example", "expected the path of a file with a request, got", [None, "", True]),
]
MODEL_MISTAKES = [
    *(({key: value}, f"{key}: {message} {as_json(value)}") for key, message, values in WRONG_TYPES for value in values),
    ({"plugin_config": {"A": 1, "B": {}}}, f"plugin_config: the value of B {PLUGIN_VALUE} {{}}"),
    ({"plugin_config": {"B": [1]}}, f"plugin_config: the value of B {PLUGIN_VALUE} [1]"),
    ({"plugin_config": {"B": None}}, f"plugin_config: the value of B {PLUGIN_VALUE} null"),
    (
        {"plugin_config": {"A": {}, "B": 1, "C": []}},
        f"plugin_config: the value of A {PLUGIN_VALUE} {{}}; the value of C {PLUGIN_VALUE} []",
    ),
    ({"shape": {"x": None}}, f"shape: the value of x must be {SHAPE}, got null"),
    (
        {"shape": {"x": 1, "y": "(1)", "z": {"a": "(1)"}}},
        f'shape: the value of x must be {SHAPE}, got 1; the value of z must be {SHAPE}, got {{"a":"(1)"}}',
    ),
    ({"layout": {"x": ["N"]}}, f'layout: the value of x must be {LAYOUT}, got ["N"]'),
    ({"version": 1}, "version: is not supported: model_version_policy selects the versions to serve"),
    ({"custom_loader_options": {}}, f"custom_loader_options: {CUSTOM_LOADER}"),
    ({"graph_path": "graph.pbtxt"}, f"graph_path: {MEDIAPIPE}"),
    ({"subconfig": "subconfig.json"}, f"subconfig: {MEDIAPIPE}"),
    *(({"stateful": value}, f"stateful: {STATEFUL}") for value in (True, 0, "false", None)),
    *(
        ({key: False}, f"{key}: {STATEFUL}")
        for key in ("idle_sequence_cleanup", "low_latency_transformation", "max_sequence_number")
    ),
    ({"basepath": "m"}, f"basepath: {UNKNOWN} 'base_path'"),
    ({"model_name": "m"}, f"model_name: {UNKNOWN} 'name'"),
    ({"target-device": "CPU"}, f"target-device: {UNKNOWN} 'target_device'"),
    ({"plugin_confg": {}}, f"plugin_confg: {UNKNOWN} 'plugin_config'"),
    ({"SHAPE": "(1)"}, f"SHAPE: {UNKNOWN} 'shape'"),
    # Unsupported keys are never proposed, and recognized in the plural and in upper case.
    ({"versions": 1}, "versions: is not supported: model_version_policy selects the versions to serve"),
    ({"Stateful": True}, f"Stateful: {STATEFUL}"),
    ({"status": 1}, f"status: {UNKNOWN} 'base_path'; {KNOWN}"),
    ({"states": 1}, f"states: {UNKNOWN} 'shape'"),
    ({"endpoint": "/m"}, f"endpoint: {UNKNOWN} 'cpu_extension'; {KNOWN}"),
]


VERSION_POLICY_MISTAKES = [
    *("all", None, 1, [], {}, {"newest": {}}),
    *({"all": None}, {"all": {"x": 1}}, {"all": {}, "latest": {"num_versions": 1}}),
    *({"latest": content} for content in ({}, 1, ["num_versions", 1], {"versions": [1]}, {"num_versions": 1, "x": 1})),
    *({"latest": {"num_versions": number}} for number in (0, -1, "1", True, 1.0)),
    *({"specific": content} for content in ({}, [1], {"versions": [1], "x": 1})),
    *({"specific": {"versions": versions}} for versions in (1, {}, [0], ["1"], [1, True])),
]


@pytest.mark.parametrize("policy", VERSION_POLICY_MISTAKES)
def test_version_policy_of_another_form_is_refused(problems, policy):
    assert problems(model(model_version_policy=policy)) == [
        f"model_config_list[0].config.model_version_policy: {VERSION_POLICY} {as_json(policy)}"
    ]


@pytest.mark.parametrize(("keys", "line"), MODEL_MISTAKES)
def test_mistake_in_a_model_names_its_place(problems, keys, line):
    assert problems(models({"name": "first"}, {"name": "m", **keys})) == [f"model_config_list[1].config.{line}"]


@pytest.mark.parametrize(
    ("key", "shown"),
    [("", ""), ("\U0001f600", "\U0001f600"), ("x" * 1000, "x" * 60 + "...")],
    ids=["empty", "emoji", "long"],
)
def test_key_unlike_any_known_one_is_refused(problems, key, shown):
    (line,) = problems(root(**{key: 1}))
    assert line.startswith(f"{shown}: unknown key; the nearest known one is ")


def test_list_of_unknown_keys_and_wrong_values_is_limited(problems):
    """Finding the nearest known key takes time for each."""
    keys = {f"key {index}": 1 for index in range(1000)}
    lines = problems(models({"name": "m", **keys}))
    assert (len(lines), lines[-1]) == (11, "model_config_list[0].config: 990 more unknown keys")
    (line,) = problems(models({"name": "m", "plugin_config": {key: [] for key in keys}}))
    assert line.count("must be") == 10
    assert line.endswith("got []; 990 more are invalid")


def test_model_without_name_is_refused(problems):
    assert problems(models({"base_path": "m"})) == ["model_config_list[0].config.name: is missing"]


def test_repeated_name_is_refused_with_its_first_place(problems):
    assert problems(models({"name": "m"}, {"name": "n"}, {"name": "m"}, {"name": "m"})) == [
        "model_config_list[2].config.name: 'm' is already the name of model_config_list[0]",
        "model_config_list[3].config.name: 'm' is already the name of model_config_list[0]",
    ]


def test_names_are_case_sensitive(load):
    assert len(load(models({"name": "m"}, {"name": "M"}))) == 2


def test_all_mistakes_are_reported_together(problems):
    content = {
        "monitoring": {},
        "pipelines": 1,
        "custom_node_library_config_list": [{"name": "lib"}],
        "model_config_list": [
            {"config": {"nireq": "4", "shape": 1}},
            7,
            {"config": {"name": "m"}},
            {"config": {"name": "m", "base_path": "s3://b"}},
        ],
    }
    assert problems(content) == [
        f"pipelines: {UNKNOWN} 'pipeline_config_list'",
        "model_config_list[0].config.name: is missing",
        f'model_config_list[0].config.nireq: {NIREQ} "4"',
        f"model_config_list[0].config.shape: {SHAPES} 1",
        f"model_config_list[1]: {ITEM} 7",
        "model_config_list[3].config.name: 'm' is already the name of model_config_list[2]",
        "custom_node_library_config_list[0].base_path: is missing",
        "monitoring.metrics: is missing",
        f'model_config_list[3].config: base_path: {LOCAL} "s3://b"',
    ]


@pytest.mark.parametrize(
    ("text", "shown"), [("x" * 76, f'["{"x" * 76}"]'), ("x" * 77, f'["{"x" * 77}"...'), ("x" * 999, f'["{"x" * 78}...')]
)
def test_long_value_is_cut_in_the_message(problems, text, shown):
    assert problems(model(precision=[text])) == [f"model_config_list[0].config.precision: {PRECISION} {shown}"]


@pytest.mark.parametrize("levels", [300, 1000])
def test_deeply_nested_value_is_reported_like_any_other(problems, levels):
    """Orjson reads 1024 levels, more than Python's parser, but writes only 254."""
    content = b'{"model_config_list": ' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"
    (line,) = problems(content)
    assert line.startswith("model_config_list: expected an array, got ")


# --- Invalid values


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({"nireq": 100_001}, ["nireq: expected at most 100000, got 100001"]),
        ({"base_path": "s3://bucket/m"}, [f'base_path: {LOCAL} "s3://bucket/m"']),
        ({"base_path": "azfs://share/m"}, [f'base_path: {LOCAL} "azfs://share/m"']),
    ],
)
def test_invalid_value_is_a_problem_of_its_model(load_one, keys, lines):
    assert check_values_of(load_one(**keys)).problems == lines


def test_all_invalid_values_of_a_model_are_reported(load_one):
    config = load_one(nireq=100_001, shape="(1", layout="Q:", plugin_config={"NUM_STREAMS": "x"})
    nireq, options, plugin_config = check_values_of(config).problems
    assert nireq.startswith("nireq: ")
    assert "layout: " in options
    assert "; shape: " in options
    assert plugin_config.startswith("plugin_config.NUM_STREAMS: ")


def test_refused_file_reports_invalid_values_too(problems):
    unknown, shape, layout = problems(
        models({"name": "a", "shape": "(1", "foo": 1}, {"name": "b", "layout": "Q:"}, {"name": "c"})
    )
    assert unknown.startswith("model_config_list[0].config.foo: ")
    assert shape.startswith("model_config_list[0].config: shape: expected dims ")
    assert layout.startswith("model_config_list[1].config: layout: expected ")


def test_layout_of_a_wrong_type_is_not_reported_as_missing(problems):
    assert problems(model(layout=5, color_format="RGB:BGR", mean="(1,2,3)")) == [
        f"model_config_list[0].config.layout: {LAYOUTS} 5"
    ]


# --- Repeated keys

REPEATED = "duplicate key"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"model_config_list": [], "model_config_list": []}', [f"model_config_list: {REPEATED}"]),
        (
            '{"model_config_list": [{"config": {"name": "a"}}, {"config": {"name": "m", "shape": {"x": "(1)", '
            '"x": "(2)", "x": "(3)"}, "name": "m"}}], "pipeline_config_list": [], "pipeline_config_list": []}',
            [
                f"pipeline_config_list: {REPEATED}",
                f"model_config_list[1].config.name: {REPEATED}",
                f"model_config_list[1].config.shape.x: {REPEATED}",
            ],
        ),
        (
            '{"model_config_list": [], "model_config_list": 1, "x\\u0079": 1, "xy": 2}',
            [f"model_config_list: {REPEATED}", f"xy: {REPEATED}", "model_config_list: expected an array, got 1"],
        ),
    ],
)
def test_repeated_key_names_its_place(problems, content, lines):
    assert [line for line in problems(content.encode()) if not line.startswith("xy: unknown")] == lines


# --- Metrics


ON = {"monitoring": {"metrics": {"enable": True}}}
SOME = {"metrics_list": ["ovms_streams"]}
SETTINGS = {"metrics_enable": True, "metrics_list": "ovms_streams, ovms_current_requests,"}


@pytest.mark.parametrize(
    ("monitoring", "settings", "metrics"),
    [
        ({}, {}, None),
        ({"monitoring": {"metrics": {"enable": False, **SOME}}}, {}, None),
        (ON, {}, []),
        ({"monitoring": {"metrics": {"enable": True, **SOME}}}, {}, ["ovms_streams"]),
        ({}, {"metrics_enable": True}, []),
        ({}, SETTINGS, ["ovms_streams", "ovms_current_requests"]),
    ],
)
def test_metrics_are_those_of_the_file_or_the_settings(read, monitoring, settings, metrics):
    assert read(root(**monitoring), **settings).metrics == metrics


@pytest.mark.parametrize(
    ("content", "settings", "lines"),
    [
        (root(), {"metrics_list": "ovms_streams"}, ["OVMS_REST_METRICS_LIST: requires OVMS_REST_METRICS_ENABLE=true"]),
        (
            root(**ON),
            {"metrics_enable": True},
            ["monitoring: OVMS_REST_METRICS_ENABLE enables metrics already; remove one of the two"],
        ),
        (
            {},
            {"metrics_enable": True, "metrics_list": "ovms_foo"},
            [
                "OVMS_REST_METRICS_LIST: unknown metric 'ovms_foo'; the nearest known one is 'ovms_responses'",
                "model_config_list: is missing",
            ],
        ),
    ],
)
def test_mistakes_in_settings_and_file_are_reported_together(problems, content, settings, lines):
    assert problems(content, **settings) == lines


# --- Pipelines


PIPELINE = {"name": "p", "inputs": [], "nodes": [], "outputs": []}


def test_pipelines_and_libraries_are_read(read, tmp_path):
    libraries = [{"name": "crop", "base_path": "nodes/crop.py"}]
    config = read(root(pipeline_config_list=[PIPELINE], custom_node_library_config_list=libraries))
    assert config.pipelines == (PipelineDefinition("p"),)
    assert config.libraries == {"crop": Library("crop", "nodes/crop.py", tmp_path)}
    assert config.libraries["crop"].path == tmp_path / "nodes" / "crop.py"


def test_pipeline_may_not_have_the_name_of_a_model(problems):
    content = model(name="p") | {"pipeline_config_list": [PIPELINE, PIPELINE | {"name": "q"}]}
    assert problems(content) == ["pipeline_config_list[0].name: 'p' is already the name of model_config_list[0]"]


def test_missing_names_do_not_clash(problems):
    content = models({"base_path": "m"}) | {"pipeline_config_list": [{**PIPELINE, "name": None}, {"inputs": []}]}
    assert not [line for line in problems(content) if "the name of" in line]


def test_pipelines_have_different_names(problems):
    assert problems(root(pipeline_config_list=[PIPELINE, PIPELINE])) == [
        "pipeline_config_list[1].name: 'p' is already the name of pipeline_config_list[0]"
    ]


# --- The configuration in a load request


DESCRIBING = "is not supported: it follows from the model; leave it out"


def test_load_request_takes_keys_of_the_file_and_of_triton():
    given = {"base_path": "models/m", "version_policy": {"all": {}}, "backend": "openvino", "platform": "OpenVINO"}
    assert parse_model("m", given, Path("/etc"), None) == ModelConfig(
        "m", Path("/etc/models/m"), version_policy=VersionPolicy()
    )


def test_known_model_keeps_only_its_path():
    base = ModelConfig("m", Path("/srv/m"), nireq=7)
    assert parse_model("m", {"target_device": "GPU"}, Path("/etc"), base) == ModelConfig(
        "m", Path("/srv/m"), target_device="GPU"
    )
    assert parse_model("m", {"base_path": "n"}, Path("/etc"), base).base_path == Path("/etc/n")
    remote = parse_model("m", {"base_path": "s3://b/m"}, Path("/etc"), base)
    assert parse_model("m", {}, Path("/etc"), remote).remote == "s3://b/m"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"nam": "m"}, f"config.nam: {UNKNOWN} 'name'"),
        ({"name": "n"}, 'config.name: expected "m" as in the path, got "n"'),
        ({"example": "/etc/passwd"}, "config.example: is not supported: only the config file may name an example"),
        ({"backend": "onnxruntime"}, 'config.backend: expected openvino, got "onnxruntime"'),
        ({"platform": 1}, "config.platform: expected openvino, got 1"),
        ({"max_batch_size": -1}, "config.max_batch_size: expected an integer from 0 to 4096, got -1"),
        ({"max_batch_size": 4097}, "config.max_batch_size: expected an integer from 0 to 4096, got 4097"),
        ({"max_batch_size": True}, "config.max_batch_size: expected an integer from 0 to 4096, got true"),
        ({"input": []}, f"config.input: {DESCRIBING}"),
        ({"instance_group": []}, "config.instance_group: is not supported: each worker is one instance; leave it out"),
        ({"version_policy": {"none": {}}}, f'config.model_version_policy: {VERSION_POLICY} {{"none":{{}}}}'),
    ],
)
def test_mistake_in_a_load_request_names_its_key(given, problem):
    with pytest.raises(ConfigError) as caught:
        parse_model("m", given, Path("/etc"), ModelConfig("m", Path("/srv/m")))
    assert caught.value.problems == (problem,)


def test_new_model_needs_a_path():
    with pytest.raises(ConfigError) as caught:
        parse_model("m", {"nireq": "4"}, Path("/etc"), None)
    assert caught.value.problems == (f'config.nireq: {NIREQ} "4"', "config.base_path: is missing, and model 'm' is new")
