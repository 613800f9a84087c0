"""Classification: outputs as their highest values with indices and labels, up to tritonclient."""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from decoded_requests import refused
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException
from wire_cases import DTYPES

from ovms_rest.protocol.classification import classify
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Tensor

NAN, INF = float("nan"), float("inf")


def highest(values, k=100, datatype="FP32", labels=()):
    """Return the strings of a classified array."""
    tensor = classify(Tensor("y", datatype, np.array(values, DTYPES[datatype])), k, labels)
    assert (tensor.name, tensor.datatype) == ("y", "BYTES")
    return [element.decode() for element in tensor.array.elements()]


def indices(values, k=100, datatype="FP32"):
    return [int(text.split(":")[1]) for text in highest(values, k, datatype)]


# --- The order


def test_highest_values_come_first():
    assert highest([3, 10, -1, 7], 3) == ["10.000000:1", "7.000000:3", "3.000000:0"]


def test_equal_values_are_ordered_by_index():
    assert indices([1, 5, 1, 5, 5, 1], 4) == [1, 3, 4, 0]


def test_zero_and_minus_zero_are_equal():
    assert highest([-0.0, 0.0, -0.0]) == ["-0.000000:0", "0.000000:1", "-0.000000:2"]


def test_nans_come_last():
    assert indices([NAN, -INF, NAN, 1]) == [3, 1, 0, 2]


@pytest.mark.parametrize("datatype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"])
def test_limits_of_integers_are_ordered(datatype):
    limits = np.iinfo(DTYPES[datatype])
    values = [limits.min, limits.max, limits.min + 1, limits.max - 1]
    assert highest(values, datatype=datatype) == [f"{values[index]}:{index}" for index in (1, 3, 2, 0)]


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_limits_of_floats_are_ordered(datatype):
    largest = float(ml_dtypes.finfo(DTYPES[datatype]).max)
    assert indices([largest, -INF, -largest, INF, 0], datatype=datatype) == [3, 0, 4, 2, 1]


@pytest.mark.parametrize("k", [1, 2, 999, 39_998, 39_999, 40_000, 40_001])
def test_long_rows_have_the_same_order_as_short_ones(k):
    """Long rows are sorted in another way, which could lose equal values and NaNs."""
    values = np.random.default_rng(0).integers(-9, 9, (2, 40_000)).astype(np.float32)
    values[:, ::7] = NAN
    expected = np.stack([np.argsort(-row, kind="stable")[:k] for row in values])
    assert indices(values, k) == expected.ravel().tolist()


def test_long_rows_of_equal_values_are_ordered_by_index():
    assert indices(np.zeros(50_000), 3) == [0, 1, 2]


# --- The text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10.0, "10.000000"),
        (0.1, "0.100000"),
        (-2.5, "-2.500000"),
        (5e-7, "0.000000"),
        (123456.789, "123456.789062"),
        (-0.0, "-0.000000"),
        (3.4028234663852886e38, "340282346638528859811704183484516925440.000000"),
        (INF, "inf"),
        (-INF, "-inf"),
        (NAN, "nan"),
        (-NAN, "nan"),
    ],
)
def test_floats_have_six_decimals(value, text):
    assert highest([value]) == [f"{text}:0"]


@pytest.mark.parametrize("value", [0.1, 1e-7, 5e-7, 2.5e-6, 1e22, 1 / 3, -1e300, 5e-324, INF, -INF])
def test_floats_are_written_as_by_printf(value):
    """Triton uses std::to_string, which is printf's %f."""
    buffer = ctypes.create_string_buffer(400)
    ctypes.CDLL(None).snprintf(buffer, ctypes.c_size_t(400), b"%f:0", ctypes.c_double(value))
    assert highest([value], datatype="FP64") == [buffer.value.decode()]


@pytest.mark.parametrize(("datatype", "text"), [("FP16", "0.333252"), ("BF16", "0.333984"), ("FP32", "0.333333")])
def test_float_is_written_with_the_precision_of_its_datatype(datatype, text):
    assert highest([1 / 3], datatype=datatype) == [f"{text}:0"]


def test_bools_are_written_as_0_and_1():
    assert highest([False, True, True], datatype="BOOL") == ["1:1", "1:2", "0:0"]


def test_integers_keep_all_digits():
    assert highest([2**64 - 1, 2**63], datatype="UINT64") == ["18446744073709551615:0", "9223372036854775808:1"]


def test_labels_follow_the_index():
    assert highest([1, 2], labels=("cat", "größe")) == ["2.000000:1:größe", "1.000000:0:cat"]


def test_missing_label_is_left_out():
    assert highest([1, 3, 2], labels=("cat", "")) == ["3.000000:1", "2.000000:2", "1.000000:0:cat"]


# --- The shape


@pytest.mark.parametrize(
    ("shape", "k", "expected"),
    [
        *(((), 1, (1,)), ((), 5, (1,)), ((4,), 2, (2,)), ((4,), 4, (4,)), ((4,), 5, (4,)), ((4,), 2**63, (4,))),
        *(((1, 4), 2, (1, 2)), ((3, 4), 2, (3, 2)), ((3, 4), 9, (3, 4))),
        *(((2, 3, 4), 5, (2, 5)), ((2, 3, 4), 50, (2, 12)), ((2, 1, 1, 1), 3, (2, 1))),
        *(((0,), 2, (0,)), ((0, 4), 2, (0, 2)), ((0, 4), 9, (0, 4)), ((3, 0), 2, (3, 0)), ((0, 0), 1, (0, 0))),
        *(((2, 0, 4), 2, (2, 0)), ((2**40, 0), 2, (2**40, 0)), ((0, 40_000), 2, (0, 2))),
    ],
)
def test_shape_is_batch_and_classes(shape, k, expected):
    assert classify(Tensor("y", "FP32", np.zeros(shape, np.float32)), k, ()).shape == expected


def test_every_row_has_its_own_classes():
    assert highest([[1, 2, 3], [6, 5, 4]], 2) == ["3.000000:2", "2.000000:1", "6.000000:0", "5.000000:1"]


def test_dims_after_the_batch_are_flattened():
    assert indices([[[1, 2], [4, 3]], [[8, 7], [5, 6]]], 2) == [2, 3, 0, 1]


def test_scalar_has_one_class():
    assert highest(4.5) == ["4.500000:0"]


def test_non_contiguous_output_is_read_in_row_major_order():
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert highest(values, 1) == ["3.000000:1", "4.000000:1", "5.000000:1"]


def test_classified_output_is_not_changed():
    array = np.array([1, 2, 3], np.float32)
    classify(Tensor("y", "FP32", array), 2, ())
    assert array.tolist() == [1, 2, 3]


# --- Rejected outputs


def test_output_of_strings_is_rejected():
    """Some outputs are known to be strings only after the inference (protocol/README.md section 7)."""
    assert refused(classify, Tensor("rows_string", "BYTES", BytesArray.of([b"a"], (1,))), 1, ()) == (
        "output 'rows_string': parameters.classification needs an output of numbers, but its datatype is BYTES"
    )


@pytest.mark.parametrize(
    ("count", "label", "message"),
    [
        (2**20 + 1, 0, "1048577 strings of up to 340 bytes, at most 1048576 are allowed"),
        (2048, 2**18, "2048 strings of up to 1048916 bytes, at most 2047 are allowed"),
    ],
    ids=["many strings", "long labels"],
)
def test_more_strings_than_a_tensor_holds_are_rejected(count, label, message):
    shown = refused(classify, Tensor("y", "BOOL", np.zeros(count, np.bool_)), 2**40, ("x" * label,))
    assert shown == f"output 'y': parameters.classification asks for {message}"


def test_limit_assumes_the_longest_text():
    lowest = float(np.finfo(np.float64).min)
    assert len(highest([lowest], datatype="FP64")[0]) == 317 + len(":0")


# --- Through the service


@pytest.fixture
def client(service):
    with InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        yield client


def relu_input(*rows):
    array = np.array(rows, np.float32)
    made = InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return made


@pytest.mark.parametrize(
    ("binary", "expected"),
    [
        (True, [[b"7.000000:3", b"2.500000:1"], [b"4.000000:0", b"3.000000:1"]]),
        (False, [["7.000000:3", "2.500000:1"], ["4.000000:0", "3.000000:1"]]),
    ],
    ids=["binary", "JSON"],
)
def test_tritonclient_gets_classes(client, binary, expected):
    wanted = InferRequestedOutput("y", binary_data=binary, class_count=2)
    result = client.infer("relu", [relu_input([1, 2.5, -4, 7], [4, 3, 2, 1])], outputs=[wanted])
    assert result.get_output("y")["datatype"] == "BYTES"
    assert result.as_numpy("y").tolist() == expected


@pytest.mark.parametrize("model", ["strings", "matrix"])
def test_tritonclient_gets_an_error_for_an_output_of_strings(client, model):
    """Serve a model of strings, and one whose UINT8 matrix is returned as strings."""
    name, output = {"strings": ("text", "text"), "matrix": ("rows", "rows_string")}[model]
    sent = InferInput(name, [1], "BYTES")
    sent.set_data_from_numpy(np.array(["a"], dtype=object))
    with pytest.raises(InferenceServerException) as error:
        client.infer(model, [sent], outputs=[InferRequestedOutput(output, class_count=1)])
    assert error.value.status() == "400"
    assert error.value.message() == (
        f"output {output!r}: parameters.classification needs an output of numbers, but its datatype is BYTES"
    )
