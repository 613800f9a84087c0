"""Every format of OpenVINO is found, read and served: as a version, in a flat directory and as a single file."""

import formats
import numpy as np
import pytest
from service import serve, write_config

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino

from ovms_rest.models.compilation import ONE_THREAD
from ovms_rest.models.repository import find_model_file, find_versions

PROPERTIES = {**ONE_THREAD, "INFERENCE_PRECISION_HINT": "f32"}
X = [[-1.5, 2.0, -3.0, 4.25], [0.0, -0.5, 0.5, -4.0]]
Y = [[0.0, 2.0, 0.0, 4.25], [0.0, 0.0, 0.5, 0.0]]


def single_file(written):
    return written.model / "saved_model.pb" if written.model.is_dir() else written.model


@pytest.mark.parametrize("name", formats.FORMATS)
def test_openvino_infers_with_the_model_of_a_version(tmp_path, name):
    written = formats.FORMATS[name](tmp_path / "1")
    (version,) = find_versions(tmp_path).values()
    model = openvino.Core().read_model(find_model_file(version))
    compiled = openvino.Core().compile_model(model, "CPU", PROPERTIES)
    assert compiled({written.input: np.float32(X)})[written.output].tolist() == Y


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize(
    "base_path_of", [lambda written, directory: directory, lambda written, _: single_file(written)]
)
def test_flat_directory_or_single_file_is_the_same_model(tmp_path, name, base_path_of):
    written = formats.FORMATS[name](tmp_path / "model")
    (version,) = find_versions(base_path_of(written, tmp_path / "model")).values()
    assert find_model_file(version) == written.model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Start a worker that serves every format: as version 7, from a flat directory, from a single file."""
    directory = tmp_path_factory.mktemp("formats")
    base_paths, written = {}, {}
    for name, write in formats.FORMATS.items():
        base_paths[name] = directory / name
        write(directory / name / "7")
        base_paths[f"{name}_flat"] = directory / f"{name}_flat"
        written[name] = write(directory / f"{name}_flat")
        base_paths[f"{name}_file"] = single_file(written[name])
    models = [
        {"name": name, "base_path": str(path), "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        for name, path in base_paths.items()
    ]
    with serve(directory, "-w", "1", config=write_config(directory, *models)) as service:
        yield service, written


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize(("suffix", "version"), [("", "7"), ("_flat", "1"), ("_file", "1")])
def test_every_format_is_served(served, name, suffix, version):
    service, written = served
    given = {"name": written[name].input, "shape": [2, 4], "datatype": "FP32", "data": X}
    response = service.infer(f"{name}{suffix}", {"inputs": [given]})
    assert response.status == 200, response.body
    assert response.json() == {
        "model_name": f"{name}{suffix}",
        "model_version": version,
        "outputs": [{"name": written[name].output, "shape": [2, 4], "datatype": "FP32", "data": [*Y[0], *Y[1]]}],
    }
