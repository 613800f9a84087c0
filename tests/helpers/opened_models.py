"""Models that are open in this process, compute in FP32, and stay usable unless a test expects otherwise."""

import model_zoo

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.options import ModelOptions, parse_options
from ovms_rest.models.runtime import Model

EXACT = plan_compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, cores=2)


def fail():
    raise AssertionError("a model has become unusable")


def open_path(path, retire=fail, **options):
    """Open version 1 of model 'm', which is a directory or a file, with these options of its configuration."""
    model = Model("m", 1, path, EXACT, parse_options(ModelOptions(**options)))
    model.open(retire)
    return model


def open_model(model, directory, retire=fail, **options):
    """Save a model and open it."""
    return open_path(model_zoo.save(model, directory) / "1", retire, **options)
