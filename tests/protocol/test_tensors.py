"""The messages as values: dims, shapes and metadata in JSON, and the memory of arrays."""

import numpy as np
import pytest

from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata, batch_of, copy_array, memory_of

ANY = Dim(0, None)
ONE, TWO, THREE = Dim(1, 1), Dim(2, 2), Dim(3, 3)


@pytest.mark.parametrize(
    ("dim", "text", "size"),
    [(THREE, "3", 3), (Dim(0, 0), "0", 0), (ANY, "-1", None), (Dim(1, 8), "1:8", None), (Dim(2, None), "2:", None)],
)
def test_dim_is_written_as_in_the_configuration(dim, text, size):
    assert (str(dim), dim.size) == (text, size)


@pytest.mark.parametrize(
    ("dim", "sizes"), [(THREE, {3}), (ANY, {0, 1, 2, 3, 9}), (Dim(1, 3), {1, 2, 3}), (Dim(2, None), {2, 3, 9})]
)
def test_dim_holds_the_sizes_in_its_range(dim, sizes):
    assert {size for size in (0, 1, 2, 3, 9) if dim.holds(size)} == sizes


@pytest.mark.parametrize(("shape", "batch"), [((), 1), ((3,), 3), ((2, 5), 2), ((0,), 0), ((2**62, 0), 0)])
def test_batch_is_the_first_dim_of_a_tensor_with_elements(shape, batch):
    assert batch_of(shape) == batch


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.int16), BytesArray.of([b"ab", b"c"], (2,))], ids=["numbers", "strings"]
)
def test_copy_has_equal_memory_of_its_own(array):
    copy = copy_array(array)
    for part, original in zip(memory_of(copy), memory_of(array), strict=True):
        assert part.tobytes() == original.tobytes()
        assert not np.shares_memory(part, original)
    assert copy.nbytes == array.nbytes == sum(part.nbytes for part in memory_of(array))


# --- Metadata


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((), []),
        ((TWO, THREE), [2, 3]),
        ((Dim(0, 0), ONE), [0, 1]),
        ((ANY, THREE), [-1, 3]),
        ((Dim(1, 8), Dim(2, None)), [-1, -1]),
        (None, [-1]),
    ],
    ids=["scalar", "static", "zero", "dynamic", "ranged", "unknown rank"],
)
def test_dims_that_are_not_static_are_minus_one_in_metadata(dims, shape):
    assert TensorMetadata("x", "FP32", dims).to_json() == {"name": "x", "datatype": "FP32", "shape": shape}


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ((), "[]"),
        ((ONE, THREE, Dim(200, 500), ANY), "[1,3,200:500,-1]"),
        ((Dim(2, None), Dim(0, 4), Dim(0, 0)), "[2:,0:4,0]"),
        (None, "[...]"),
    ],
)
def test_shape_is_described_as_in_the_configuration(dims, text):
    assert TensorMetadata("x", "FP32", dims).describe_shape() == text


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_unknown_rank_fits_every_shape(shape):
    assert TensorMetadata("y", "FP32", None).holds(shape)


def test_model_metadata_has_tensors_and_versions():
    metadata = ModelMetadata(
        "m",
        "2",
        {"x": TensorMetadata("x", "FP32", (ANY, TWO))},
        {"y": TensorMetadata("y", "INT64", ())},
        {"model_info": {"a": "b"}},
    )
    assert metadata.to_json(["1", "2"]) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "OpenVINO",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "INT64", "shape": []}],
        "rt_info": {"model_info": {"a": "b"}},
    }


def test_model_metadata_has_rt_info_only_if_the_model_does():
    assert "rt_info" not in ModelMetadata("m", "1", {}, {}).to_json(["1"])
