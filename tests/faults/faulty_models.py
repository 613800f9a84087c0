"""What the service under faults serves: models whose answers are known, and a node that does what its input says."""

import json
from pathlib import Path

import generations
import model_zoo
import slow_models

# Inputs of the pipeline `fragile` from which on, downwards, it crashes, aborts and hangs. Each request takes one of its
# own, as the service recognizes inputs that have crashed a worker.
CRASH, ABORT, HANG = -1_000_000, -2_000_000, -3_000_000
# Written as a file of its own, which the service loads as a custom node.
_NODE = f"""
import ctypes, os
def inputs(params): return {{"x": ("FP32", [1])}}
def outputs(params): return {{"y": ("FP32", [1])}}
def execute(inputs, params):
    asked = inputs["x"][0]
    while asked <= {HANG}:
        pass
    if asked <= {ABORT}:
        os.abort()
    if asked <= {CRASH}:
        ctypes.string_at(0)
    return {{"y": inputs["x"].copy()}}
"""


def save(directory: Path) -> Path:
    """Write the models, versioned in version 1, and the pipelines `node` and `fragile`; return their config."""
    models = {
        "relu": model_zoo.relu(),
        "counting": slow_models.counting(),
        "slow": slow_models.slow_relu(),
        "filling": slow_models.filling(),
        "growing": slow_models.growing(),
    }
    (directory / "node.py").write_text(_NODE)
    save_version(directory / "versioned", 1, factor=1)
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    config = model_zoo.save_all(directory, models, lambda _: exact, **_pipelines())
    root = json.loads(config.read_text())
    root["model_config_list"].append({"config": {"name": "versioned", "base_path": "versioned", **exact}})
    config.write_text(json.dumps(root))
    return config


def save_version(base_path: Path, version: int, factor: float) -> None:
    """Write a version of the model x -> x * factor; it appears all at once, by a renamed directory."""
    made = model_zoo.save(generations.times(factor), base_path.with_name("made"), version)
    base_path.mkdir(exist_ok=True)
    (made / str(version)).rename(base_path / str(version))


def _pipelines() -> dict:
    node = {"name": "n", "type": "custom", "library_name": "node", "outputs": [{"data_item": "y", "alias": "y"}]}
    node["inputs"] = [{"x": {"node_name": "request", "data_item": "x"}}]
    pipeline = {"inputs": ["x"], "nodes": [node], "outputs": [{"y": {"node_name": "n", "data_item": "y"}}]}
    return {
        "custom_node_library_config_list": [{"name": "node", "base_path": "node.py"}],
        "pipeline_config_list": [{"name": name, **pipeline} for name in ("node", "fragile")],
    }


def ask_node(number: float) -> dict:
    """Return a request to one of the pipelines."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}]}
