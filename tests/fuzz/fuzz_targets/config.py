"""The config file, and the configuration in a request to load a model.

The input: a byte (0: a file, else a load request), two unused bytes, and the JSON.
"""

import json
import os
from pathlib import Path
from typing import Any

import orjson
from fuzz_json import make_mutator
from fuzz_oracles import Failure, attempt_config

from ovms_rest.config import Config, load_config, parse_model
from ovms_rest.models.configuration import CheckedValues, ModelConfig, check_values_of

# A file in memory, which ends with the process; libFuzzer ends it without cleaning up.
_FILE = Path(f"/proc/self/fd/{os.memfd_create('config')}")

_MODEL = {
    "name": "m",
    "base_path": "/m",
    "target_device": "CPU",
    "nireq": 1,
    "allow_cache": True,
    "batch_size": "1:16",
    "model_version_policy": {"specific": {"versions": [1, 3]}},
    "plugin_config": {"NUM_STREAMS": 1},
    "trial": False,
    "shape": {"x": "(1,3,200:500,-1)"},
    "layout": {"x": "NHWC:NCHW"},
    "mean": "(1,2.5,3)",
    "scale": 255,
    "color_format": "RGB:BGR",
    "precision": "uint8:fp32",
    "max_batch_size": 8,
    "cpu_extension": "a.so",
}
_NODE = {
    "name": "n",
    "type": "DL model",
    "model_name": "m",
    "version": 1,
    "demultiply_count": 0,
    "params": {"a": "1"},
    "inputs": [{"x": {"node_name": "request", "data_item": "x"}}],
    "outputs": [{"data_item": "y", "alias": "y"}],
}
_CUSTOM = {**_NODE, "name": "c", "type": "custom", "library_name": "l", "gather_from_node": "n"}
_PIPELINE = {
    "name": "p",
    "inputs": ["x"],
    "nodes": [_NODE, _CUSTOM],
    "demultiply_count": 2,
    "example": "e.json",
    "outputs": [{"y": {"node_name": "c", "data_item": "y"}}],
}
_ROOT = {
    "model_config_list": [{"config": _MODEL}],
    "pipeline_config_list": [_PIPELINE],
    "custom_node_library_config_list": [{"name": "l", "base_path": "l.so"}],
    "monitoring": {"metrics": {"enable": True, "metrics_list": ["ovms_requests_success"]}},
    "mediapipe_config_list": [],
}
_LOADED = {key: value for key, value in _MODEL.items() if key not in ("name", "cpu_extension")}

KEYS = sorted(
    {*_MODEL, *_NODE, *_CUSTOM, *_PIPELINE, *_ROOT, "config", "metrics", "enable", "metrics_list", "stateful"}
)
TOKENS = [f'"{key}"'.encode() for key in KEYS]
mutate = make_mutator(
    3,
    [*KEYS, "a\nb", "k" * 99, "\u2028", "batchsize", "latest", "all"],
    [
        *_MODEL.values(),
        {"latest": {"num_versions": 1}},
        {"all": {}},
        "auto",
        "s3://b/m",
        "(1,-1)",
        "[1,3]",
        "NCHW",
        {"a": {}},
    ],
)


def seeds() -> list[bytes]:
    """Return a file with every key, smaller ones, and the configuration of a load request."""
    minimal = {"model_config_list": [{"config": {"name": "m", "base_path": "/m"}}]}
    roots: list[Any] = [
        _ROOT,
        minimal,
        {"model_config_list": []},
        {},
        [],
        {**minimal, "pipeline_config_list": [_PIPELINE]},
    ]
    texts = [json.dumps(root).encode() for root in roots]
    texts += [
        b'\xef\xbb\xbf{"model_config_list":[],"model_config_list":[]}',
        b"\xff\xfe{\0}\0",
        b'{"a": 1 // b\n}',
        b'{"\xff',
    ]
    loads = [
        _LOADED,
        {"version_policy": {"all": {}}, "platform": "openvino"},
        {"base_path": "/m", "cpu_extension": "a"},
    ]
    return [b"\0\xff\xff" + text for text in texts] + [b"\1\xff\xff" + json.dumps(load).encode() for load in loads]


def check(data: bytes) -> None:
    """Read the configuration twice, and check its values; only ConfigErrors escape."""
    if len(data) < 3:
        return
    if data[0]:
        _check_load(data[3:])
        return
    _FILE.write_bytes(data[3:])
    config = attempt_config(load_config, _FILE)
    assert config == attempt_config(load_config, _FILE)
    if isinstance(config, Failure):
        return
    root = json.loads(data[3:].decode("utf-8-sig"))
    assert isinstance(config, Config)
    assert [model.name for model in config.models] == [item["config"]["name"] for item in root["model_config_list"]]
    assert len(config.pipelines) == len(root.get("pipeline_config_list", []))
    for model in config.models:
        _check_values(model)


def _check_load(text: bytes) -> None:
    try:
        config = orjson.loads(text)
    except orjson.JSONDecodeError:
        return
    if type(config) is dict:
        model = attempt_config(parse_model, "m", config, Path("/d"), None)
        if not isinstance(model, Failure):
            assert model.name == "m"
            assert model.options.cpu_extension is None, "a load request named a library"
            _check_values(model)


def _check_values(model: ModelConfig) -> None:
    found = check_values_of(model)
    assert isinstance(found, CheckedValues)
    for problem in found.problems:
        assert isinstance(problem, str)
