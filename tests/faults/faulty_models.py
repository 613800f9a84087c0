"""What the service under faults serves: models whose answers are known, and pipelines of a node that may crash."""

import json
from pathlib import Path

import crashing_nodes
import generations
import model_zoo
import slow_models


def save(directory: Path) -> Path:
    """Write the models, versioned in version 1, and the pipelines `node` and `fragile`; return their config."""
    models = {
        "relu": model_zoo.relu(),
        "counting": slow_models.counting(),
        "slow": slow_models.slow_relu(),
        "filling": slow_models.filling(),
        "growing": slow_models.growing(),
    }
    save_version(directory / "versioned", 1, factor=1)
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    config = model_zoo.save_all(directory, models, lambda _: exact, **_pipelines(directory))
    root = json.loads(config.read_text())
    root["model_config_list"].append({"config": {"name": "versioned", "base_path": "versioned", **exact}})
    config.write_text(json.dumps(root))
    return config


def save_version(base_path: Path, version: int, factor: float) -> None:
    """Write a version of the model x -> x * factor; it appears all at once, by a renamed directory."""
    made = model_zoo.save(generations.times(factor), base_path.with_name("made"), version)
    base_path.mkdir(exist_ok=True)
    (made / str(version)).rename(base_path / str(version))


def _pipelines(directory: Path) -> dict:
    """Return the sections of two pipelines of the same node, so that those who crash one leave the other alone."""
    sections = crashing_nodes.save(directory, "fragile")
    (pipeline,) = sections["pipeline_config_list"]
    return {**sections, "pipeline_config_list": [pipeline, {**pipeline, "name": "node"}]}
