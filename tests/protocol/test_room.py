"""The size of a response is known before it is encoded, and one that does not fit is rejected."""

import ml_dtypes
import numpy as np
import pytest
from costs import measure_cost

from ovms_rest.errors import BusyError
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.protocol.encoding import encode_response
from ovms_rest.protocol.room import SMALL_OUTPUTS, Room, check_outputs, check_requested, describe_lack, unlimited
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, InferenceResponse, ModelMetadata, RequestedOutput, Tensor, TensorMetadata

COUNT = SMALL_OUTPUTS + 1000


def room(limit, held=0):
    return lambda: Room(held, limit)


def extremes(datatype):
    """Return values with the longest and shortest texts in JSON."""
    dtype = DATATYPES[datatype].dtype
    generator = np.random.default_rng(0)
    if datatype == "BOOL":
        return generator.integers(0, 2, COUNT).astype(dtype)
    bits = generator.integers(0, 256, COUNT * dtype.itemsize, np.uint8).view(dtype)
    limits = ml_dtypes.finfo(dtype) if dtype.kind not in "iu" else np.iinfo(dtype)
    bits[:2] = limits.min, limits.max
    return bits


def written(tensor):
    """Return the size of the numbers in JSON, each with a comma or the closing bracket."""
    _, _, numbers = encode_response(InferenceResponse("m", "1", [(tensor, False)]))[0].partition(b'"data":[')
    return len(numbers.partition(b"]")[0]) + 1


@pytest.mark.parametrize("values", ["extremes", "zeros"])
@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_numbers_in_json_are_measured_exactly(datatype, values):
    array = extremes(datatype) if values == "extremes" else np.zeros(COUNT, DATATYPES[datatype].dtype)
    outputs = [(Tensor("y", datatype, array.reshape(2, -1)), False)]
    size = written(outputs[0][0])
    pieces = -(-COUNT // 2**16)
    check_outputs(outputs, room(size + pieces))
    check_outputs(outputs, room(size + pieces + 5000, held=5000))
    with pytest.raises(BusyError, match=r"no room for a response of \d+ bytes: OVMS_REST_MAX_HELD_BYTES allows \d+$"):
        check_outputs(outputs, room(size - pieces - 1))
    with pytest.raises(BusyError, match=r"unfinished requests and responses hold 5000 of \d+$"):
        check_outputs(outputs, room(size - pieces - 1 + 5000, held=5000))


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_binary_outputs_count_their_bytes(datatype):
    array = np.zeros(COUNT, DATATYPES[datatype].dtype)
    outputs = [(Tensor("y", datatype, array), True), (Tensor("z", datatype, array), True)]
    check_outputs(outputs, room(2 * array.nbytes))
    with pytest.raises(BusyError, match=f"a response of {2 * array.nbytes} bytes"):
        check_outputs(outputs, room(2 * array.nbytes - 1))


def test_strings_count_their_bytes_and_in_json_their_python_objects():
    array = BytesArray.of([b"abc"] * COUNT, (COUNT,))
    check_outputs([(Tensor("y", "BYTES", array), True)], room(7 * COUNT))
    with pytest.raises(BusyError):
        check_outputs([(Tensor("y", "BYTES", array), True)], room(7 * COUNT - 1))
    with pytest.raises(BusyError):
        check_outputs([(Tensor("y", "BYTES", array), False)], room(100 * COUNT))
    check_outputs([(Tensor("y", "BYTES", array), False)], room(150 * COUNT))


MANY_STRINGS = """
import numpy as np
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Tensor
from ovms_rest.protocol.tfs import encode_prediction
begins = np.arange(0, 4_000_000, 8, dtype=np.int32)
array = BytesArray(begins, begins + 8, np.full(4_000_000, ord("a"), np.uint8))
"""


@pytest.mark.parametrize("name", ["y", "y_bytes"])
def test_strings_of_a_prediction_take_no_more_memory_than_is_counted(name):
    """Those in base64, of an output named _bytes, took 330 bytes each."""
    cost = measure_cost(MANY_STRINGS, f"encode_prediction([Tensor({name!r}, 'BYTES', array)], False)")
    assert cost.error == ""
    array = BytesArray.of([b"a" * 8] * 500_000, (500_000,))
    with pytest.raises(BusyError):
        check_outputs([(Tensor(name, "BYTES", array), False)], room(cost.mebibytes * 2**20))


def test_few_large_strings_are_measured():
    array = BytesArray.of([b"x" * 1_000_000], (1,))
    with pytest.raises(BusyError):
        check_outputs([(Tensor("y", "BYTES", array), True)], room(1_000_000))


def test_small_outputs_are_not_measured():
    """The worker measures them once they are encoded."""
    check_outputs([(Tensor("y", "UINT8", np.zeros(SMALL_OUTPUTS, np.uint8)), True)], room(0))


@pytest.mark.parametrize(
    ("output", "size"),
    [
        (RequestedOutput("static", True), 4_000_000),
        (RequestedOutput("static", False), 2_000_000),
        (RequestedOutput("static", True, 5), 0),
        (RequestedOutput("dynamic", True), 0),
        (RequestedOutput("strings", True), 400_000),
    ],
)
def test_only_static_shapes_count_before_the_inference(output, size):
    shapes = {"static": ("FP32", 1_000_000), "dynamic": ("FP32", None), "strings": ("BYTES", 100_000)}
    outputs = {name: TensorMetadata(name, datatype, (Dim(dim or 0, dim),)) for name, (datatype, dim) in shapes.items()}
    metadata = ModelMetadata("m", "1", {}, outputs)
    assert (metadata.static_elements, metadata.has_dynamic_outputs) == (1_100_000, True)
    check_requested([output], metadata, Room(0, size))
    if size:
        with pytest.raises(BusyError, match=f"a response of {size} bytes"):
            check_requested([output], metadata, Room(0, size - 1))


def test_room_is_unlimited_under_other_servers():
    outputs = [(Tensor("y", "FP32", np.zeros(COUNT, np.float32)), False)]
    check_outputs(outputs, unlimited)


def test_only_a_size_beyond_the_limit_names_the_setting():
    assert (
        describe_lack("a body", 11, Room(0, 10)) == "no room for a body of 11 bytes: OVMS_REST_MAX_HELD_BYTES allows 10"
    )
    assert describe_lack("a body", 10, Room(5, 10)) == (
        "no room for a body of 10 bytes: unfinished requests and responses hold 5 of 10"
    )
