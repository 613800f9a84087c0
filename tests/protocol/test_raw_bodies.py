"""Raw data, whose shape is that of the model, and the messages for data that does not fit."""

import numpy as np
import pytest
from decoded_requests import ANY, HEADER, refused
from wire_cases import CASES, fingerprint

from ovms_rest.protocol.raw_bodies import Source, decode_raw_request, fit_shape, read_raw, shape_strings
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs

# --- Bodies with a header length of 0


def raw(body, datatype, *dims):
    return decode_raw_request(memoryview(body), {"x": TensorMetadata("x", datatype, dims)})


def refusal_of_raw(body, datatype, *dims):
    """Return the message of the first step, decoding or validation, that rejects a raw body."""
    metadata = TensorMetadata("x", datatype, dims)
    model = ModelMetadata("m", "1", {"x": metadata}, {})
    return refused(lambda: validate_inputs(decode_raw_request(memoryview(body), model.inputs), model))


@pytest.mark.parametrize(
    ("dims", "size", "shape"),
    [
        *(((), 4, ()), ((ANY,), 12, (3,)), ((ANY,), 0, (0,))),
        ((Dim(2, 2), Dim(3, 3)), 24, (2, 3)),
        ((Dim(0, 0), Dim(3, 3)), 0, (0, 3)),
        ((ANY, Dim(3, 3)), 24, (2, 3)),
        ((Dim(2, 2), ANY), 24, (2, 3)),
        ((Dim(1, 1), ANY, Dim(3, 3)), 24, (1, 2, 3)),
        ((Dim(1, 8), Dim(3, 3)), 24, (2, 3)),
        ((Dim(2, 2), Dim(2, None)), 24, (2, 3)),
        ((ANY, ANY), 12, (1, 3)),
        ((ANY, Dim(2, 2), ANY), 24, (1, 2, 3)),
        ((Dim(1, 4), Dim(1, 4)), 12, (1, 3)),
        ((ANY, ANY), 0, (1, 0)),
    ],
)
def test_raw_body_has_the_shape_of_the_model(dims, size, shape):
    (tensor,) = raw(bytes(size), "FP32", *dims).inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", "FP32", shape)


def test_raw_tensor_is_a_view_on_the_body():
    body = np.zeros(8, np.uint8)
    array = raw(body.data, "FP32", Dim(2, 2)).inputs[0].array
    assert np.shares_memory(array, body)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.datatype != "BYTES" and case.binary], ids=lambda case: case.name
)
def test_raw_body_becomes_the_array(case):
    (tensor,) = raw(case.binary, case.datatype, *(Dim(dim, dim) for dim in case.shape)).inputs
    assert fingerprint(tensor.array) == fingerprint(case.array)


@pytest.mark.parametrize(
    "dims", [(), (Dim(1, 1),), (ANY,), (ANY, ANY), (Dim(0, 4), Dim(1, 1)), (Dim(1, None),)], ids=range(6)
)
@pytest.mark.parametrize("body", [b"", b"abc", b"\xff\0\0", b"\3\0\0\0abc"])
def test_raw_body_of_bytes_is_one_string(dims, body):
    (tensor,) = raw(body, "BYTES", *dims).inputs
    assert (tensor.shape, tensor.array.elements()) == ((1,) * len(dims), [body])


def test_raw_request_gets_all_outputs_in_binary():
    request = raw(bytes(4), "FP32")
    assert (request.outputs, request.binary_output, request.id) == ((), True, "")


TOO_OPEN = (
    "has 2 open dims besides dim 0, which the size of a raw body does not determine; send JSON that gives the shape"
)


@pytest.mark.parametrize(
    ("datatype", "dims", "size", "message"),
    [
        ("FP32", (), 3, "shape [] takes 4 bytes of FP32, the body has 3"),
        ("FP32", (), 0, "shape [] takes 4 bytes of FP32, the body has 0"),
        ("FP32", (Dim(2, 2),), 12, "shape [2] takes 8 bytes of FP32, the body has 12"),
        ("INT8", (Dim(0, 0),), 1, "shape [0] takes 0 bytes of INT8, the body has 1"),
        ("FP32", (ANY, Dim(2, 2)), 12, "shape [-1,2] takes a multiple of 8 bytes of FP32, the body has 12"),
        ("FP32", (ANY, ANY), 6, "shape [-1,-1] takes a multiple of 4 bytes of FP32, the body has 6"),
        ("FP32", (Dim(1, 2),), 12, "shape is [3], the model takes [1:2]"),
        ("FP32", (Dim(4, None),), 12, "shape is [3], the model takes [4:]"),
        ("FP32", (ANY, Dim(1, 2)), 12, "shape is [1,3], the model takes [-1,1:2]"),
        ("FP32", (Dim(2, 4), ANY), 24, "shape is [1,6], the model takes [2:4,-1]"),
        ("FP32", (ANY, ANY, ANY), 24, f"shape [-1,-1,-1] {TOO_OPEN}"),
        ("FP32", (Dim(2, 2), ANY, Dim(1, 8)), 24, f"shape [2,-1,1:8] {TOO_OPEN}"),
        ("BYTES", (Dim(2, 2),), 3, "a raw body is one string, but the model's shape is [2]"),
        ("BYTES", (Dim(0, 0),), 3, "a raw body is one string, but the model's shape is [0]"),
        ("BYTES", (ANY, Dim(2, 3)), 3, "a raw body is one string, but the model's shape is [-1,2:3]"),
    ],
)
def test_raw_body_that_does_not_fit_the_model_is_rejected(datatype, dims, size, message):
    assert refusal_of_raw(bytes(size), datatype, *dims) == f"input 'x': {message}"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            0,
            "has the open dim 0 beside a dim of 0, which the size of a raw body does not determine; send JSON that "
            "gives the shape",
        ),
        (4, "takes 0 bytes of FP32, the body has 4"),
    ],
)
def test_raw_body_cannot_determine_a_dim_beside_one_of_size_0(size, message):
    assert refusal_of_raw(bytes(size), "FP32", ANY, Dim(0, 0)) == f"input 'x': shape [-1,0] {message}"


def test_raw_bool_body_takes_only_0_and_1():
    assert refusal_of_raw(b"\0\2", "BOOL", ANY) == "input 'x': BOOL element 1 is the byte 2, expected 0 or 1"


def test_raw_body_for_a_model_with_two_inputs_is_rejected():
    inputs = {name: TensorMetadata(name, "FP32", (Dim(1, 1),)) for name in ("a", "b")}
    assert refused(decode_raw_request, memoryview(bytes(4)), inputs) == (
        f"{HEADER} is 0, which makes the body the data of a model's only input, but this model has 2 inputs: [a,b]"
    )


# --- Other sources


SOURCE = Source("the part", "nobody knows")


@pytest.mark.parametrize("case", [case for case in CASES if case.datatype != "BYTES"], ids=lambda case: case.name)
def test_raw_data_with_a_shape_becomes_the_array(case):
    tensor = read_raw(memoryview(case.binary), TensorMetadata("x", case.datatype, None), SOURCE, case.shape)
    assert (tensor.name, tensor.datatype) == ("x", case.datatype)
    assert fingerprint(tensor.array) == fingerprint(case.array)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_raw_string_with_a_shape_is_one_element(shape):
    array = read_raw(memoryview(b"abc"), TensorMetadata("x", "BYTES", (ANY,)), SOURCE, shape).array
    assert (array.shape, array.elements()) == (shape, [b"abc"])


def test_messages_name_the_source_of_the_data():
    metadata = TensorMetadata("x", "FP32", (ANY, ANY, ANY))
    assert refused(read_raw, memoryview(bytes(4)), metadata, SOURCE, (2,)) == (
        "input 'x': X-Tensor-Shape [2] takes 8 bytes of FP32, the part has 4"
    )
    assert refused(fit_shape, metadata, 4, SOURCE, 1, "element", "") == (
        "input 'x': shape [-1,-1,-1] has 2 open dims besides dim 0, which nobody knows"
    )
    assert refused(fit_shape, TensorMetadata("x", "FP32", (Dim(1, 1),)), 4, SOURCE, 1, "element", "") == (
        "input 'x': shape [1] takes 1 element, the part has 4"
    )


@pytest.mark.parametrize(
    ("dims", "count", "shape"),
    [
        *(((), 1, ()), ((ANY,), 0, (0,)), ((ANY,), 5, (5,)), ((Dim(2, 2), ANY), 6, (2, 3)), ((ANY, ANY), 4, (4, 1))),
        ((Dim(2, 3), Dim(2, 2)), 4, (2, 2)),
    ],
)
def test_strings_fill_the_first_open_dim(dims, count, shape):
    assert shape_strings(TensorMetadata("x", "BYTES", dims), count) == shape


@pytest.mark.parametrize(("dims", "count"), [((), 0), ((), 2), ((Dim(2, 2), ANY), 5), ((Dim(3, 3),), 2)])
def test_strings_that_do_not_fill_the_shape_are_rejected(dims, count):
    assert refused(shape_strings, TensorMetadata("x", "BYTES", dims), count).startswith(
        f"input 'x': got {count} strings, but the model's shape is "
    )
