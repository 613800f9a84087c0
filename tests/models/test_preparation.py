"""Changes of models by their config: names, layouts, preprocessing, shapes."""

import json

import cv2
import model_zoo
import numpy as np
import pytest
from opened_models import open_path
from openvino import Layout, Type, opset15

from ovms_rest.errors import LoadError
from ovms_rest.protocol.strings import BytesArray

ADDED = np.float32([100, 200, 300]).reshape(3, 1, 1)


def open_model(directory, model, mapping=None, **options):
    """Save a model, and open it with these options and this mapping_config.json."""
    model_zoo.save(model, directory)
    if mapping is not None:
        (directory / "1" / "mapping_config.json").write_text(json.dumps(mapping))
    return open_path(directory / "1", **options)


def refusal(directory, model, mapping=None, **options):
    with pytest.raises(LoadError) as caught:
        open_model(directory, model, mapping, **options)
    return str(caught.value)


def shapes(tensors):
    return {tensor.name: tensor.describe_shape() for tensor in tensors.values()}


def image_model(layout=None):
    """Make a model that adds a constant to each channel of x."""
    x = model_zoo.parameter("x", (1, 3, 2, 2), Type.f32)
    if layout:
        x.set_layout(Layout(layout))
    return model_zoo.model_of({"y": opset15.add(x, opset15.constant(ADDED))}, [x])


# --- Shapes


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"shape": "(5,4)"}, "[5,4]"),
        ({"shape": "(-1,4)"}, "[-1,4]"),
        ({"shape": "(1:8, 4)"}, "[1:8,4]"),
        ({"shape": {"x": "(7,4)"}}, "[7,4]"),
        ({"shape": "auto"}, "[-1,-1]"),
        ({"shape": "(5,4)", "batch_size": 9}, "[5,4]"),
        ({"batch_size": 6}, "[6,4]"),
        ({"batch_size": "6"}, "[6,4]"),
        ({"batch_size": "-1"}, "[-1,4]"),
        ({"batch_size": "auto"}, "[-1,4]"),
        ({"batch_size": "1:16"}, "[1:16,4]"),
        ({"batch_size": 5, "layout": "CN"}, "[2,5]"),
        ({"batch_size": 5, "layout": "...N"}, "[2,5]"),
    ],
)
def test_shapes_and_batch_sizes_change_the_clients_shapes(tmp_path, options, shape):
    model = open_model(tmp_path, model_zoo.relu((2, 4)), **options)
    assert shapes(model.metadata.inputs) == {"x": shape}


def test_only_named_inputs_are_reshaped(tmp_path):
    model = open_model(tmp_path, model_zoo.add((2, 3)), shape={"left": "(1,3)", "right": "(4,3)"})
    assert shapes(model.metadata.inputs) == {"left": "[1,3]", "right": "[4,3]"}
    assert shapes(model.metadata.outputs) == {"difference": "[4,3]", "sum": "[4,3]"}


def test_batch_size_applies_to_all_inputs(tmp_path):
    model = open_model(tmp_path, model_zoo.add((2, 3)), batch_size=5)
    assert shapes(model.metadata.inputs) == {"left": "[5,3]", "right": "[5,3]"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (model_zoo.add, {"shape": "(1,3)"}, "shape: one value is ambiguous for the inputs 'left', 'right'"),
        (model_zoo.add, {"shape": {"z": "(1,3)"}}, "shape: the model has no input 'z'; it has 'left', 'right'"),
        (model_zoo.add, {"shape": {"left": "(1,4)"}}, "the model cannot be reshaped to left [1,4]: "),
        (lambda: model_zoo.relu(()), {"batch_size": 2}, "batch_size: input 'x' has no batch dim; its shape is []"),
        (model_zoo.relu, {"batch_size": 2, "layout": "HW"}, "batch_size: input 'x' has no batch dim; its shape is"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, model, options, message):
    assert refusal(tmp_path, model(), **options).startswith(message)


# --- Layouts


def test_layout_with_a_colon_transposes_in_the_model(tmp_path):
    model = open_model(tmp_path, image_model(), layout="NHWC:NCHW")
    assert shapes(model.metadata.inputs) == {"x": "[1,2,2,3]"}
    assert model.input_layouts["x"] == "NHWC"
    image = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    (tensor,) = model.infer({"x": image}).values()
    np.testing.assert_array_equal(tensor.array, image.transpose(0, 3, 1, 2) + ADDED)


def test_outputs_are_transposed_too_and_keep_their_names(tmp_path):
    model = open_model(tmp_path, image_model(), layout={"y": "NHWC:NCHW"})
    assert shapes(model.metadata.outputs) == {"y": "[1,2,2,3]"}
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(model.infer({"x": image})["y"].array, (image + ADDED).transpose(0, 2, 3, 1))


def test_layout_without_a_colon_changes_nothing(tmp_path):
    model = open_model(tmp_path, image_model(), layout="NCHW")
    assert shapes(model.metadata.inputs) == {"x": "[1,3,2,2]"}
    assert (model.input_layouts, model.output_layouts) == ({"x": "NCHW"}, {"y": None})


def test_shape_is_in_the_layout_of_the_client(tmp_path):
    model = open_model(tmp_path, image_model(), layout="NHWC:NCHW", shape="(-1,2,4:9,3)")
    assert shapes(model.metadata.inputs) == {"x": "[-1,2,4:9,3]"}


def test_model_may_declare_its_layout(tmp_path):
    assert open_model(tmp_path, image_model(layout="NCHW")).input_layouts["x"] == "NCHW"


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (image_model, "NHW", "layout: NHW has 3 dims, tensor 'x' [1,3,2,2]"),
        (image_model, "N", "layout: N has 1 dim, tensor 'x' [1,3,2,2]"),
        (image_model, {"z": "NCHW"}, "layout: the model has no tensor 'z'; it has 'x', 'y'"),
        (model_zoo.add, "NC", "layout: one value is ambiguous for the inputs 'left', 'right'"),
        (image_model, "NHWD:NCHW", "layout or preprocessing cannot be applied: "),
    ],
)
def test_layouts_that_do_not_fit_are_refused(tmp_path, model, layout, message):
    assert refusal(tmp_path, model(), layout=layout).startswith(message)


# --- Preprocessing


@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ({"mean": "(1,2,3)", "scale": "[2,4,8]"}, lambda x: (x - np.float32([1, 2, 3])) / np.float32([2, 4, 8])),
        ({"precision": "uint8:fp32"}, lambda x: x),
        ({"precision": "uint8:fp32", "mean": "5", "scale": "2"}, lambda x: (x - 5) / 2),
        ({"color_format": "RGB:BGR"}, lambda x: x[..., ::-1]),
    ],
    ids=[
        "mean is subtracted before the scale divides",
        "client sends the first precision",
        "mean and scale of integers are computed in floats",
        "colours are converted from the second format",
    ],
)
def test_preprocessing_is_part_of_the_model(tmp_path, options, prepare):
    model = open_model(tmp_path, image_model(), layout="NHWC:NCHW", **options)
    dtype = np.uint8 if "precision" in options else np.float32
    assert model.metadata.inputs["x"].datatype == ("UINT8" if "precision" in options else "FP32")
    image = np.arange(12, dtype=dtype).reshape(1, 2, 2, 3)
    expected = prepare(image.astype(np.float32)).transpose(0, 3, 1, 2) + ADDED
    np.testing.assert_array_equal(model.infer({"x": image})["y"].array, expected)


def test_one_value_applies_to_all_channels(tmp_path):
    model = open_model(tmp_path, model_zoo.relu(), mean=1, scale=2.0)
    assert model.infer({"x": np.float32([[1, 3, 5, 7]])})["y"].array.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("layout", ["NCHW", "NCHW:NCHW"])
@pytest.mark.parametrize("color", ["RGB:BGR", "BGR:RGB"])
def test_colours_are_converted_in_the_declared_layout(tmp_path, layout, color):
    """OpenVINO alone would expect NHWC from the client."""
    model = open_model(tmp_path, image_model(), layout=layout, color_format=color)
    assert shapes(model.metadata.inputs) == {"x": "[1,3,2,2]"}
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    assert np.array_equal(model.infer({"x": x})["y"].array, x[:, ::-1] + ADDED)


@pytest.mark.parametrize("options", [{"mean": 1}, {"scale": 2}, {"precision": "uint8"}])
def test_preprocessing_needs_numbers(tmp_path, options):
    (key,) = options
    message = f"{key}: needs an input of numbers, 'text' takes strings"
    assert refusal(tmp_path, model_zoo.strings(), **options) == message


def test_output_of_the_same_name_does_not_get_the_layout_of_an_input(tmp_path):
    """Images are resized where the input is NHWC."""
    model = open_model(tmp_path, model_zoo.passthrough(t=(Type.u8, (1, 3, 8, 8))), layout="NHWC:NCHW")
    assert set(model.metadata.inputs) == set(model.metadata.outputs) == {"t"}
    reader = model.metadata.inputs["t"].images
    picture = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    assert reader.read(BytesArray.of([picture], (1,)), "x").shape == (1, 8, 8, 3)


@pytest.mark.parametrize("options", [{"mean": 1}, {"scale": 2}, {"precision": "uint8:fp32"}])
def test_preprocessing_needs_a_model_with_one_input(tmp_path, options):
    assert "needs a model with one input, this one has 'left', 'right'" in refusal(tmp_path, model_zoo.add(), **options)


# --- Names


def test_names_are_read_from_mapping_config(tmp_path):
    mapping = {"inputs": {"left": "a"}, "outputs": {"sum": "plus"}}
    model = open_model(tmp_path, model_zoo.add(), mapping)
    assert list(model.metadata.inputs) == ["a", "right"]
    assert list(model.metadata.outputs) == ["difference", "plus"]
    arrays = {"a": np.float32([[1, 2, 3]]), "right": np.float32([[10, 20, 30]])}
    assert model.infer(arrays)["plus"].array.tolist() == [[11, 22, 33]]


def test_options_use_the_mapped_names(tmp_path):
    mapping = {"inputs": {"left": "a"}}
    model = open_model(tmp_path, model_zoo.add(), mapping, shape={"a": "(2,3)", "right": "(2,3)"})
    assert shapes(model.metadata.inputs) == {"a": "[2,3]", "right": "[2,3]"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"inputs": {"middle": "a"}}, "mapping_config.json: inputs: the model has no 'middle'; it has"),
        ({"outputs": {"left": "a"}}, "mapping_config.json: outputs: the model has no 'left'; it has"),
        ({"inputs": {"left": "right"}}, "the model has inputs with the same name: 'right', 'right'"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(tmp_path, mapping, message):
    assert refusal(tmp_path, model_zoo.add(), mapping).startswith(message)
