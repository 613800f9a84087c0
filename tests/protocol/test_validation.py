"""Validation: whether a request fits a model, and the messages if it does not."""

import numpy as np
import pytest
from decoded_requests import refused

from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import (
    Dim,
    InferenceRequest,
    ModelMetadata,
    Origin,
    RequestedOutput,
    Tensor,
    TensorMetadata,
)
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.protocol.words import join

ANY = Dim(0, None)
ONE, TWO, THREE, FIVE = Dim(1, 1), Dim(2, 2), Dim(3, 3), Dim(5, 5)


def model(*inputs, outputs=()):
    """Return the metadata of a model "m" from its inputs and the names of its outputs."""
    return ModelMetadata(
        "m",
        "1",
        {tensor.name: tensor for tensor in inputs},
        {name: TensorMetadata(name, "FP32", (ANY,)) for name in outputs},
    )


def takes(datatype, *dims, name="x"):
    return TensorMetadata(name, datatype, dims)


def zeros(*shape, name="x"):
    return Tensor(name, "FP32", np.zeros(shape, np.float32))


def strings(elements, shape=None, name="x"):
    return Tensor(name, "BYTES", BytesArray.of(elements, (len(elements),) if shape is None else shape))


def validate(metadata, *tensors):
    return validate_inputs(InferenceRequest(tensors), metadata)


def refusal(metadata, *tensors):
    return refused(validate, metadata, *tensors)


def requested(*outputs, binary=False):
    return InferenceRequest((), tuple(RequestedOutput(*output) for output in outputs), binary)


def refusal_of_outputs(metadata, *outputs):
    return refused(validate_outputs, requested(*outputs), metadata)


# --- Inputs


def test_arrays_are_returned_unchanged_by_name():
    first, second = zeros(1, name="a"), zeros(2, name="b")
    arrays = validate(model(takes("FP32", ONE, name="a"), takes("FP32", TWO, name="b")), second, first)
    assert arrays.keys() == {"a", "b"}
    assert arrays["a"] is first.array
    assert arrays["b"] is second.array


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        *(((), ()), ((TWO, THREE), (2, 3)), ((Dim(0, 0), THREE), (0, 3))),
        *(((ANY,), (0,)), ((ANY,), (7,)), ((ANY, THREE), (0, 3)), ((ANY, ANY), (2, 0))),
        *(((Dim(1, 4),), (1,)), ((Dim(1, 4),), (4,)), ((Dim(0, 4),), (0,)), ((Dim(2, None), ONE), (1000, 1))),
        ((ANY, Dim(2, 3), TWO), (5, 3, 2)),
    ],
)
def test_shape_that_fits_is_accepted(dims, shape):
    assert validate(model(takes("FP32", *dims)), zeros(*shape))["x"].shape == shape


@pytest.mark.parametrize(
    ("dims", "shape", "taken"),
    [
        *(((), (1,), "[]"), ((ONE,), (), "[1]"), ((Dim(0, 0),), (1,), "[0]")),
        *(((TWO, THREE), shape, "[2,3]") for shape in ((2, 4), (3, 2), (6,), (1, 2, 3), (0, 3))),
        *(((ANY, THREE), (2, 4), "[-1,3]"), ((ANY, THREE), (3,), "[-1,3]"), ((ANY, ANY), (1, 1, 1), "[-1,-1]")),
        *(((Dim(2, 4), ANY), (1, 1), "[2:4,-1]"), ((Dim(2, 4), ANY), (5, 1), "[2:4,-1]")),
        *(((Dim(1, None),), (0,), "[1:]"), ((Dim(0, 4),), (5,), "[0:4]")),
    ],
)
def test_shape_that_does_not_fit_is_rejected(dims, shape, taken):
    message = refusal(model(takes("FP32", *dims)), zeros(*shape))
    assert message == f"input 'x': shape is {join(shape)}, the model takes {taken}"


@pytest.mark.parametrize("expected", ["FP64", "FP16", "INT32", "UINT32", "BYTES"])
def test_datatype_is_not_converted(expected):
    assert refusal(model(takes(expected, ONE)), zeros(1)) == f"input 'x': datatype is FP32, the model takes {expected}"


def test_datatype_is_checked_before_the_shape():
    assert refusal(model(takes("INT8", ONE)), zeros(2)) == "input 'x': datatype is FP32, the model takes INT8"


def test_unknown_input_is_rejected_with_the_known_ones():
    metadata = model(takes("FP32", ONE, name="a"), takes("FP32", ONE, name="b"))
    assert refusal(metadata, zeros(1, name="a"), zeros(1, name="c")) == ("model 'm' has no input 'c'; it has 'a', 'b'")


def test_input_names_are_case_sensitive():
    message = refusal(model(takes("FP32", ONE)), zeros(1, name="X"))
    assert message == "model 'm' has no input 'X'; it has 'x'"


def test_repeated_input_is_rejected():
    assert refusal(model(takes("FP32", ONE)), zeros(1), zeros(1)) == "input 'x' is given more than once"


def test_missing_input_is_rejected():
    metadata = model(takes("FP32", ONE, name="a"), takes("FP32", ONE, name="b"))
    assert refusal(metadata, zeros(1, name="b")) == "input 'a' of model 'm' is missing from the request"


def test_missing_inputs_are_named_in_alphabetical_order():
    metadata = model(*(takes("FP32", ONE, name=name) for name in "abcd"))
    assert refusal(metadata, zeros(1, name="c")) == "inputs 'a', 'b', 'd' of model 'm' are missing from the request"


# --- Strings


def test_strings_are_unchanged_for_an_input_of_strings():
    tensor = strings([b"a", b"", b"b\0", b"d"], (2, 2))
    assert validate(model(takes("BYTES", ANY, TWO)), tensor)["x"] is tensor.array


def test_shape_of_strings_must_fit():
    message = refusal(model(takes("BYTES", THREE)), strings([b"a", b"b"]))
    assert message == "input 'x': shape is [2], the model takes [3]"


def test_uint8_for_an_input_of_strings_is_rejected():
    tensor = Tensor("x", "UINT8", np.zeros(1, np.uint8))
    assert refusal(model(takes("BYTES", ANY)), tensor) == "input 'x': datatype is UINT8, the model takes BYTES"


@pytest.mark.parametrize(
    "dims",
    [(ANY, ANY), (TWO, ANY), (ANY, FIVE), (TWO, FIVE), (Dim(1, 2), Dim(5, 9)), (Dim(2, None), Dim(0, 5))],
    ids=["dynamic", "static rows", "static width", "static", "ranged", "open ranges"],
)
def test_strings_for_a_uint8_matrix_become_rows_of_longest_plus_one(dims):
    matrix = validate(model(takes("UINT8", *dims)), strings([b"abcd", b"ab"]))["x"]
    assert matrix.dtype == np.uint8
    assert [row.tobytes() for row in matrix] == [b"abcd\0", b"ab\0\0\0"]


def test_empty_strings_for_a_uint8_matrix_become_rows_of_one_nul():
    assert validate(model(takes("UINT8", ANY, ANY)), strings([b"", b""]))["x"].tolist() == [[0], [0]]


def test_trailing_nuls_count_for_the_width_of_a_matrix():
    assert validate(model(takes("UINT8", ANY, ANY)), strings([b"a\0"]))["x"].tolist() == [[97, 0, 0]]


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        *(((ANY, Dim(4, 4)), "[-1,4]"), ((ANY, Dim(6, 6)), "[-1,6]"), ((TWO, Dim(6, 6)), "[2,6]")),
        *(((THREE, FIVE), "[3,5]"), ((ONE, ANY), "[1,-1]"), ((Dim(3, 4), ANY), "[3:4,-1]")),
        *(((ANY, Dim(1, 4)), "[-1,1:4]"), ((ANY, Dim(6, None)), "[-1,6:]")),
    ],
)
def test_strings_whose_matrix_does_not_fit_are_rejected(dims, shape):
    message = refusal(model(takes("UINT8", *dims)), strings([b"abcd", b"ab"]))
    assert message == (
        "input 'x': shape is [2,5] once its strings are padded with NULs (the longest has 4 bytes), "
        f"the model takes {shape}"
    )


@pytest.mark.parametrize(
    ("elements", "shape", "shown"),
    [([b"a", b"b"], (2, 1), "[2,1]"), ([b"a"], (), "[]"), ([], (0,), "[0]"), ([], (0, 4), "[0,4]")],
)
def test_strings_for_a_uint8_matrix_need_one_dim_and_one_element(elements, shape, shown):
    assert refusal(model(takes("UINT8", ANY, ANY)), strings(elements, shape)) == (
        f"input 'x': BYTES for this UINT8 input must have shape [n] with n at least 1, not {shown}"
    )


def test_strings_whose_matrix_exceeds_1_gib_are_rejected():
    tensor = strings([b"x" * 32_768, *[b""] * 32_767])
    assert refusal(model(takes("UINT8", ANY, ANY)), tensor) == (
        "input 'x': 32768 strings, the longest of 32768 bytes, make a matrix of 1073774592 bytes, "
        "at most 1073741824 are allowed"
    )


@pytest.mark.parametrize(
    ("datatype", "rank"), [("UINT8", 0), ("UINT8", 1), ("UINT8", 3), ("INT8", 2), ("BOOL", 2), ("FP32", 2)]
)
def test_strings_for_other_numbers_than_a_uint8_matrix_are_rejected(datatype, rank):
    message = refusal(model(takes(datatype, *[ANY] * rank)), strings([b"a"]))
    assert message == f"input 'x': datatype is BYTES, the model takes {datatype}"


def test_numbers_for_a_uint8_matrix_are_unchanged():
    tensor = Tensor("x", "UINT8", np.zeros((2, 3), np.uint8))
    assert validate(model(takes("UINT8", ANY, ANY)), tensor)["x"] is tensor.array


# --- Outputs


@pytest.mark.parametrize("binary", [False, True])
def test_all_outputs_are_returned_by_default(binary):
    outputs = validate_outputs(requested(binary=binary), model(outputs=["a", "b", "c"]))
    assert outputs == (("a", binary, 0), ("b", binary, 0), ("c", binary, 0))


def test_outputs_are_returned_in_the_requested_order():
    outputs = validate_outputs(requested(("c", True), ("a", False)), model(outputs=["a", "b", "c"]))
    assert outputs == (("c", True, 0), ("a", False, 0))


def test_unknown_output_is_rejected_with_the_known_ones():
    message = refusal_of_outputs(model(outputs=["a", "b"]), ("a", False), ("z", False))
    assert message == "model 'm' has no output 'z'; it has 'a', 'b'"


def test_repeated_output_is_rejected():
    message = refusal_of_outputs(model(outputs=["a", "b"]), ("a", False), ("b", False), ("a", True))
    assert message == "output 'a' is requested more than once"


def test_classes_of_a_numeric_output_are_accepted():
    outputs = validate_outputs(requested(("b", True, 5), ("a", False)), model(outputs=["a", "b"]))
    assert outputs == (("b", True, 5), ("a", False, 0))


def test_classes_of_an_output_of_strings_are_rejected():
    metadata = ModelMetadata("m", "1", {}, {"text": TensorMetadata("text", "BYTES", (ANY,))})
    assert refusal_of_outputs(metadata, ("text", True, 1)) == (
        "output 'text': parameters.classification needs an output of numbers, but its datatype is BYTES"
    )


# --- Hints at the configuration


def test_convertible_datatype_is_rejected_with_the_setting():
    tensor = TensorMetadata("x", "FP32", (ONE,), origin=Origin(has_precision=True))
    pixel = Tensor("x", "UINT8", np.zeros(1, np.uint8))
    assert refusal(model(tensor), pixel) == (
        "input 'x': datatype is UINT8, the model takes FP32; "
        '"precision": "uint8:fp32" in the configuration of the model makes it take UINT8'
    )
    assert refusal(model(tensor), Tensor("x", "BOOL", np.zeros(1, np.bool_))).endswith("the model takes FP32")
    assert refusal(model(tensor), strings([b"a"])).endswith("the model takes FP32")


def test_shape_in_the_models_own_layout_is_recognized():
    dims = (ONE, FIVE, TWO, THREE)
    tensor = TensorMetadata("x", "FP32", dims, origin=Origin("NHWC:NCHW", (ONE, THREE, FIVE, TWO)))
    assert refusal(model(tensor), zeros(1, 3, 5, 2)) == (
        "input 'x': shape is [1,3,5,2], the model takes [1,5,2,3]; [1,3,5,2] is in the layout of the model itself, "
        'NCHW, but its configuration has "layout": "NHWC:NCHW", so clients send NHWC'
    )
    assert refusal(model(tensor), zeros(1, 2, 5, 3)).endswith("the model takes [1,5,2,3]")
