"""Models in OpenVINO: their metadata and their inferences."""

import os
import re

import ml_dtypes
import model_zoo
import numpy as np
import openvino
import pytest
from decoded_requests import refused
from model_zoo import ELEMENT_TYPES
from opened_models import EXACT, open_model, open_path
from openvino import Type, opset15

from ovms_rest.errors import BusyError, InvalidRequestError, LoadError
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.protocol.strings import BytesArray


def describe(tensors):
    return {name: f"{tensor.datatype}{tensor.describe_shape()}" for name, tensor in tensors.items()}


def test_tensors_are_described_in_alphabetical_order(tmp_path):
    metadata = open_model(model_zoo.add(), tmp_path).metadata
    assert list(describe(metadata.inputs).items()) == [("left", "FP32[1,3]"), ("right", "FP32[1,3]")]
    assert list(describe(metadata.outputs)) == ["difference", "sum"]


def test_dynamic_and_ranged_dims_are_kept(tmp_path):
    metadata = open_model(model_zoo.relu("?,1..8,4.."), tmp_path).metadata
    assert describe(metadata.inputs) == {"x": "FP32[-1,1:8,4:]"}
    assert metadata.inputs["x"].to_json()["shape"] == [-1, -1, -1]


def test_outputs_without_names_are_named_by_their_index(tmp_path):
    x = opset15.parameter([2], Type.f32)
    model = openvino.Model([opset15.result(opset15.relu(x)), opset15.result(opset15.abs(x))], [x])
    model_zoo.save(model, tmp_path)
    file = tmp_path / "1" / "model.xml"  # save_model gives names, which other writers of IR do not
    file.write_text(re.sub(r' (output_)?names="[^"]*"', "", file.read_text()))
    metadata = open_path(tmp_path / "1").metadata
    assert (list(metadata.inputs), list(metadata.outputs)) == (["in_0"], ["out_0", "out_1"])


def test_leaves_of_rt_info_are_strings(tmp_path):
    model = model_zoo.relu()
    model.set_rt_info(["cat", "dog"], ["model_info", "labels"])
    model.set_rt_info({"height": 200, "width": 300}, ["model_info", "resolution"])
    metadata = open_model(model, tmp_path).metadata
    assert metadata.to_json(["1"])["rt_info"] == {
        "model_info": {"labels": "cat dog", "resolution": {"height": "200", "width": "300"}}
    }


def test_model_without_model_info_has_no_rt_info(tmp_path):
    assert "rt_info" not in open_model(model_zoo.relu(), tmp_path).metadata.to_json(["1"])


# --- Labels


@pytest.fixture
def labels_of(tmp_path):
    """Return a function that returns the labels of a model; `make` may write its labels.txt."""

    def labels_of(make=lambda file: None, model_info=None):
        model = model_zoo.relu()
        if model_info is not None:
            model.set_rt_info(model_info, ["model_info"])
        model_zoo.save(model, tmp_path)
        make(tmp_path / "1" / "labels.txt")
        return Model("m", 1, tmp_path / "1", EXACT).metadata.labels

    return labels_of


@pytest.mark.parametrize("labels", ["cat black_dog", ["cat", "black_dog"], " cat  black_dog "])
def test_labels_are_read_from_the_rt_info(labels_of, labels):
    assert labels_of(model_info={"labels": labels}) == ("cat", "black_dog")


@pytest.mark.parametrize("model_info", [None, {"a": "b"}, {"labels": ""}, {"labels": {"a": "b"}}, "text"])
def test_model_may_have_no_labels(labels_of, model_info):
    assert labels_of(model_info=model_info) == ()


def test_labels_of_the_rt_info_have_precedence_over_the_file(labels_of):
    assert labels_of(lambda file: file.write_text("dog"), {"labels": "cat"}) == ("cat",)


@pytest.mark.parametrize("model_info", [None, {"labels": " "}, {"labels": {"a": "b"}}, "text"])
def test_file_is_read_without_labels_in_the_rt_info(labels_of, model_info):
    assert labels_of(lambda file: file.write_text("dog"), model_info) == ("dog",)


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (b"tabby cat\ndog", ("tabby cat", "dog")),
        (b"cat\ndog\n", ("cat", "dog")),
        (b"cat\r\ndog\r\n", ("cat", "dog")),
        (b"cat\n\ndog\n", ("cat", "", "dog")),
        (b"  cat \n", ("cat",)),
        ("gr\u00f6\u00dfe\u2028a\n\u65e5".encode(), ("gr\u00f6\u00dfe\u2028a", "\u65e5")),
        (b"\xef\xbb\xbfcat", ("cat",)),
        (b"x" * 2**20, ("x" * 2**20,)),
    ],
    ids=["plain", "newline at the end", "CRLF", "empty line", "spaces", "UTF-8", "byte order mark", "1 MiB"],
)
def test_file_has_a_label_per_line(labels_of, content, labels):
    assert labels_of(lambda file: file.write_bytes(content)) == labels


def test_file_of_labels_may_be_a_link(labels_of, tmp_path):
    (tmp_path / "elsewhere").write_text("cat")
    assert labels_of(lambda file: file.symlink_to(tmp_path / "elsewhere")) == ("cat",)


def test_labels_beside_a_single_file_are_read(tmp_path):
    model_zoo.save_onnx_add_one(tmp_path)
    (tmp_path / "1" / "labels.txt").write_text("cat\ndog")
    assert Model("m", 1, tmp_path / "1" / "add_one.onnx", EXACT).metadata.labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda file: file.write_bytes(b"cat\n\xff"), "'utf-8' codec can't decode byte 0xff in position 4"),
        (lambda file: file.write_bytes(b"x" * (2**20 + 1)), "labels.txt has more than 1048576 bytes"),
        (lambda file: file.mkdir(), "is missing or not a file"),
        (os.mkfifo, "is missing or not a file"),
        (lambda file: file.symlink_to("nowhere"), "is missing or not a file"),
    ],
    ids=["not UTF-8", "too large", "directory", "pipe", "broken link"],
)
def test_unreadable_file_of_labels_is_logged_and_ignored(labels_of, caplog, tmp_path, make, reason):
    assert labels_of(make) == ()
    (line,) = [line for line in caplog.messages if line.startswith("classes have no labels")]
    assert line.startswith(f"classes have no labels, {tmp_path}/1/labels.txt is ignored: ")
    assert reason in line


# --- Inference


@pytest.mark.parametrize("datatype", ELEMENT_TYPES)
@pytest.mark.parametrize("shape", [(3, 2), (0, 2)])
def test_every_datatype_keeps_all_its_bits(tmp_path, datatype, shape):
    model = open_model(model_zoo.passthrough(x=(ELEMENT_TYPES[datatype], (-1, 2))), tmp_path)
    dtype = DATATYPES[datatype].dtype
    random = np.random.default_rng(1)
    array = (
        random.integers(0, 2, shape).astype(bool)
        if datatype == "BOOL"
        else np.frombuffer(bytearray(random.bytes(int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(shape)
    )
    (tensor,) = model.infer({"x": array}).values()
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", datatype, shape)
    assert tensor.array.dtype == dtype
    assert tensor.array.tobytes() == array.tobytes()


def test_bfloat16_is_computed_as_bfloat16(tmp_path):
    model = open_model(model_zoo.relu((4,), Type.bf16), tmp_path)
    array = np.array([1.5, -2, 3.140625, -0.5], ml_dtypes.bfloat16)
    assert model.infer({"x": array})["y"].array.tolist() == [1.5, 0, 3.140625, 0]


def test_scalars_have_the_empty_shape(tmp_path):
    model = open_model(model_zoo.relu(()), tmp_path)
    tensor = model.infer({"x": np.array(4.5, np.float32)})["y"]
    assert (tensor.shape, tensor.array.tolist()) == ((), 4.5)


@pytest.mark.parametrize(
    ("elements", "shape"),
    [
        ([b"abc", b"", b"NULs at the end\0\0", b"\xff\xfe not UTF-8", b"\0", b"\xc3\xa9"], (6,)),
        ([b"a", b"", b"\0\0", b"d"], (2, 2)),
        ([b"", b""], (2,)),
        ([], (0,)),
        ([b"one"], ()),
    ],
)
def test_strings_keep_every_byte_at_any_rank(tmp_path, elements, shape):
    model = open_model(model_zoo.strings([-1] * len(shape)), tmp_path)
    tensor = model.infer({"text": BytesArray.of(elements, shape)})["text"]
    assert (tensor.datatype, tensor.shape, tensor.array.elements()) == ("BYTES", shape, elements)


def test_model_may_take_strings_and_numbers(tmp_path):
    number = model_zoo.parameter("a_number", [2], Type.f32)
    text = model_zoo.parameter("b_text", [-1], Type.string)
    last = model_zoo.parameter("c_last", [1], Type.i64)
    outputs = {"z_number": opset15.relu(number), "b_text": text, "x_last": opset15.abs(last)}
    opened = open_model(model_zoo.model_of(outputs, [number, text, last]), tmp_path)
    strings = BytesArray.of([b"x", b"yz"], (2,))
    tensors = opened.infer({"a_number": np.float32([-1, 2]), "b_text": strings, "c_last": np.int64([-5])})
    assert list(tensors) == ["b_text", "x_last", "z_number"]
    assert tensors["b_text"].array.elements() == [b"x", b"yz"]
    assert tensors["x_last"].array.tolist() == [5]
    assert tensors["z_number"].array.tolist() == [0, 2]


def test_matrix_named_string_is_returned_as_strings(tmp_path):
    model = open_model(model_zoo.matrix(output="rows_STRING"), tmp_path)
    tensor = model.infer({"rows": np.array([[97, 98, 0], [99, 0, 100]], np.uint8)})["rows_STRING"]
    assert (tensor.datatype, tensor.shape, tensor.array.elements()) == ("BYTES", (2,), [b"ab", b"c"])


@pytest.mark.parametrize(
    ("make", "given", "name"),
    [
        (model_zoo.matrix, {"rows": np.zeros((4, 2), np.uint8)}, "rows_string"),
        (model_zoo.strings, {"text": BytesArray.of([b"a"] * 4, (4,))}, "text"),
    ],
    ids=["matrix", "strings"],
)
def test_output_of_too_many_strings_is_rejected(tmp_path, monkeypatch, make, given, name):
    model = open_model(make(), tmp_path)
    assert model.infer(given)[name].shape == (4,)
    monkeypatch.setattr("ovms_rest.models.runtime.MAX_ELEMENTS", 3)
    assert refused(model.infer, given) == (
        f"model 'm' version 1 cannot compute this request: output {name!r} has 4 strings, at most 3 are allowed"
    )


def test_matrix_with_more_bytes_than_offsets_can_address_is_rejected(tmp_path, monkeypatch):
    model = open_model(model_zoo.matrix(), tmp_path)
    monkeypatch.setattr("ovms_rest.models.runtime.MAX_BYTES", 6)
    assert model.infer({"rows": np.zeros((2, 3), np.uint8)})["rows_string"].shape == (2,)
    assert refused(model.infer, {"rows": np.zeros((2, 4), np.uint8)}) == (
        "model 'm' version 1 cannot compute this request: "
        "the strings of output 'rows_string' take 8 bytes, at most 6 are allowed"
    )


def test_other_matrix_is_returned_as_numbers(tmp_path):
    model = open_model(model_zoo.matrix(output="rows_out"), tmp_path)
    assert model.infer({"rows": np.array([[97, 0]], np.uint8)})["rows_out"].datatype == "UINT8"


def test_inputs_are_read_in_place(tmp_path):
    """During the inference, the compiled model's input tensor points to the array, unless that is small."""
    model = open_model(model_zoo.relu(), tmp_path)
    array = np.ones((2000, 4), np.float32)
    model.infer({"x": array})
    pointer = model._local.session._request.get_input_tensor(0).data.__array_interface__["data"][0]
    assert pointer == array.__array_interface__["data"][0]


def test_onnx_model_infers(tmp_path):
    model = open_path(model_zoo.save_onnx_add_one(tmp_path) / "1")
    assert describe(model.metadata.inputs) == {"x": "FP32[-1,2]"}
    assert model.infer({"x": np.array([[1, 2]], np.float32)})["y"].array.tolist() == [[2, 3]]


def multiply(model, left, right):
    product = model.infer({"left": np.ones(left, np.float32), "right": np.ones(right, np.float32)})["product"].array
    assert (product == left[1]).all()
    return product.shape


def test_shapes_that_do_not_fit_are_refused_with_the_node_and_the_dims(tmp_path):
    model = open_model(model_zoo.product(), tmp_path)
    with pytest.raises(InvalidRequestError) as failure:
        multiply(model, (2, 3), (2, 2))
    assert re.fullmatch(
        r"model 'm' version 1 cannot compute this request: node 'MatMul_\d+': Incompatible MatMul matrix "
        r"dimension. First input dimension=3 at COL_INDEX_DIM=1 doesn't match the second input dimension=2 at "
        r"ROW_INDEX_DIM=0",
        str(failure.value),
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_failed_inference_does_not_affect_later_ones(tmp_path, size):
    """OpenVINO alone would refuse the shapes of the last good request forever after a bad one."""
    model = open_model(model_zoo.product(), tmp_path)
    good = (size, size)
    for _ in range(2):
        assert multiply(model, good, good) == good
        with pytest.raises(InvalidRequestError):
            multiply(model, (2, 3), (2, 2))
        assert multiply(model, good, good) == good


def test_shapes_within_the_model_are_checked_before_the_plugin_sees_them(tmp_path):
    """The model needs 7 columns."""
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    model = model_zoo.model_of({"y": opset15.concat([x, opset15.constant(np.ones((2, 7), np.float32))], 0)}, [x])
    opened = open_model(model, tmp_path)
    for rows in (1, 2, 1):
        with pytest.raises(InvalidRequestError, match="Argument shapes are inconsistent"):
            opened.infer({"x": np.ones((rows, 6), np.float32)})
        assert opened.infer({"x": np.ones((rows, 7), np.float32)})["y"].array.shape == (rows + 2, 7)


def reshape(model, size, *dims):
    return model.infer({"x": np.ones(size, np.float32), "dims": np.array(dims, np.int64)})["y"].array


def test_values_that_do_not_fit_are_refused_and_do_not_affect_later_requests(tmp_path):
    model = open_model(model_zoo.reshaping(), tmp_path)
    for size, dims in ((6, (2, 3)), (4, (4, 1)), (6, (3, 2))):
        assert reshape(model, size, *dims).tolist() == np.ones(dims).tolist()
        with pytest.raises(InvalidRequestError) as failure:
            reshape(model, 6, 4, 2)
        assert re.fullmatch(
            r"model 'm' version 1 cannot compute this request: Reshape node with name 'Reshape_\d+' "
            r"reshape: the shape of input data \(6\) conflicts with the reshape pattern \(4.2\)",
            str(failure.value),
        )
        assert reshape(model, size, *dims).tolist() == np.ones(dims).tolist()


def test_model_recovers_by_requests_that_it_computed_before(tmp_path):
    """No invented input fits: the product of the dims must be the size, and the second dim 5."""
    model = open_model(model_zoo.reshaping(columns=5), tmp_path)
    for size, dims in ((10, (2, 5)), (15, (3, 5))):
        assert reshape(model, size, *dims).shape == (dims[0] + 1, 5)
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            reshape(model, 12, 3, 4)
        assert reshape(model, 15, 3, 5).tolist() == np.ones((4, 5)).tolist()
        assert reshape(model, 10, 2, 5).tolist() == np.ones((3, 5)).tolist()


def test_model_without_examples_recovers_by_the_next_request(tmp_path):
    model = open_model(model_zoo.reshaping(columns=5), tmp_path)
    for size, dims in ((10, (2, 5)), (15, (3, 5))):
        with pytest.raises(InvalidRequestError):
            reshape(model, 12, 3, 4)
        assert reshape(model, size, *dims).tolist() == np.ones((dims[0] + 1, 5)).tolist()


def test_failure_with_the_last_shapes_leaves_the_model_unchanged(tmp_path):
    """No other request that the model computes is known, or needed."""
    model = open_model(model_zoo.reshaping(), tmp_path)
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match="conflicts with the reshape pattern"):
            reshape(model, 1, 1, 2)
        assert reshape(model, 1, 1, 1).tolist() == [[1]]


def test_model_that_cannot_recover_refuses_all_requests(tmp_path):
    """The next request has the shapes of the last success, so the worker has to be replaced."""
    retired = []
    model = open_model(model_zoo.reshaping(columns=5), tmp_path, retire=lambda: retired.append(1))
    reshape(model, 10, 2, 5)
    with pytest.raises(InvalidRequestError):
        reshape(model, 12, 3, 4)
    message = r"^model 'm' version 1 is unusable in this worker, which is being replaced$"
    for size, dims in ((10, (2, 5)), (15, (3, 5))):
        with pytest.raises(BusyError, match=message):
            reshape(model, size, *dims)
        assert retired == [1]


def halving(levels):
    """Make a model that halves the sides of pictures `levels` times and doubles them again: x FP32 [n,1,h,w] -> y."""
    x = model_zoo.parameter("x", (-1, 1, -1, -1), Type.f32)
    data = x
    for _ in range(levels):
        data = opset15.max_pool(data, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    scales, axes = np.float32([2**levels] * 2), np.int64([2, 3])
    larger = opset15.interpolate(
        data, scales, "nearest", "scales", axes=axes, coordinate_transformation_mode="asymmetric"
    )
    return model_zoo.model_of({"y": opset15.concat([x, larger], 1)}, [x])


def test_model_that_halves_sizes_is_tried_and_refuses_odd_ones(tmp_path):
    model = open_model(halving(5), tmp_path)
    assert model.warning == ""
    for side in (64, 96, 64):
        with pytest.raises(InvalidRequestError, match="Argument shapes are inconsistent"):
            model.infer({"x": np.ones((1, 1, side, side + 1), np.float32)})
        x = np.ones((1, 1, side, side), np.float32)
        assert (model.infer({"x": x})["y"].array == np.ones((1, 2, side, side))).all()


# --- Memory


def churn():
    """Overwrite freed memory."""
    return [np.full(size, 255, np.uint8) for size in range(16_400, 64_000, 800) for _ in range(3)]


@pytest.mark.parametrize("size", [4_100, 8_900, 3_000_000])
@pytest.mark.parametrize("datatype", ["FP32", "BF16", "INT64"])
def test_input_that_is_passed_through_lives_as_long_as_the_output(tmp_path, size, datatype):
    model = open_model(model_zoo.passthrough(x=(ELEMENT_TYPES[datatype], (-1,))), tmp_path)
    expected = np.arange(size).astype(DATATYPES[datatype].dtype)
    output = model.infer({"x": expected.copy()})["x"].array
    section = output.view(np.uint8).data
    del output
    kept = churn()
    assert bytes(section) == expected.tobytes()
    del kept


def test_state_is_reset_before_each_inference(tmp_path):
    """A client gets neither rows of another client nor those of the trial."""
    model = open_model(model_zoo.accumulating(), tmp_path)
    for value in (1, 2, 3):
        assert model.infer({"x": np.full((1, 2), value, np.float32)})["y"].array.tolist() == [[value, value]]
    assert model.infer({"x": np.full((3, 2), 4, np.float32)})["y"].array.tolist() == [[4, 4]] * 3


def masked(*lengths):
    """Make an encoder whose inputs ids INT64 and mask FP32 need the same length: masked = ids * mask."""
    ids = model_zoo.parameter("ids", (1, lengths[0]), Type.i64)
    mask = model_zoo.parameter("mask", (1, lengths[1]), Type.f32)
    product = opset15.multiply(opset15.convert(ids, "f32"), mask, auto_broadcast="none")
    return model_zoo.model_of({"masked": product}, [ids, mask])


@pytest.mark.parametrize(
    ("model", "shape", "bad", "good"),
    [
        (masked(-1, -1), {"ids": "(1,-1)", "mask": "(1,16:512)"}, ((1, 20), (1, 17)), ((1, 18), (1, 18))),
        (masked(8, 8), {"ids": "auto", "mask": "auto"}, ((1, 9), (1, 8)), ((1, 8), (1, 8))),
        (masked(8, 8), {"ids": "auto", "mask": "auto"}, ((2, 7), (1, 8)), ((1, 7), (1, 7))),
    ],
    ids=["a range for one of two", "auto", "auto, other sizes"],
)
def test_model_made_dynamic_by_the_config_recovers_from_a_failure(tmp_path, model, shape, bad, good):
    opened = open_model(model, tmp_path, shape=shape)

    def infer(ids, mask):
        return opened.infer({"ids": np.full(ids, 2, np.int64), "mask": np.full(mask, 3, np.float32)})["masked"].array

    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            infer(*bad)
        assert infer(*good).tolist() == np.full(good[0], 6).tolist()


def test_model_is_tried_with_its_former_sizes(tmp_path):
    """A convolution of three channels takes no other number, although "auto" allows any."""
    x = model_zoo.parameter("x", (1, 3, 8, 8), Type.f32)
    weights = opset15.constant(np.ones((4, 3, 3, 3), np.float32))
    model = model_zoo.model_of({"y": opset15.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1])}, [x])
    opened = open_model(model, tmp_path, shape="auto")
    assert opened.warning == ""
    with pytest.raises(InvalidRequestError, match="Data batch channel count"):
        opened.infer({"x": np.ones((1, 4, 8, 8), np.float32)})
    assert opened.infer({"x": np.ones((2, 3, 5, 5), np.float32)})["y"].array.shape == (2, 4, 3, 3)


def test_weights_with_another_name_are_read_with_their_model(tmp_path):
    x = model_zoo.parameter("x", (1, 2), Type.f32)
    weights = opset15.constant(np.array([[3, 5]], np.float32))
    model_zoo.save(model_zoo.model_of({"y": opset15.multiply(x, weights)}, [x]), tmp_path)
    (file,) = (tmp_path / "1").glob("*.bin")
    file.rename(tmp_path / "1" / "weights.bin")
    opened = open_path(tmp_path / "1")
    assert opened.infer({"x": np.array([[1, 2]], np.float32)})["y"].array.tolist() == [[3, 10]]


def test_tensor_name_that_is_not_utf8_is_refused(tmp_path):
    model_zoo.save_onnx_add_one(tmp_path)
    (file,) = (tmp_path / "1").iterdir()
    file.write_bytes(file.read_bytes().replace(b"\x01x", b"\x01\xff"))  # a string of one character
    with pytest.raises(LoadError, match=r"^the model has inputs with a name that is not UTF-8: "):
        Model("m", 1, file, EXACT)


def test_model_that_does_not_fit_into_memory_is_refused_with_its_shapes(tmp_path):
    with pytest.raises(LoadError, match=r"^cannot be compiled for CPU: not enough memory for inputs of x \["):
        open_model(model_zoo.relu(), tmp_path, shape="(1000000000000,4)")


def test_strings_of_an_earlier_inference_are_never_returned(tmp_path):
    """OpenVINO leaves the outputs of StringTensorUnpack unchanged when there are no strings."""
    model = open_model(model_zoo.strings((-1, 2)), tmp_path)
    model.infer({"text": BytesArray.of([b"secret", b"strings"], (1, 2))})
    for elements, shape in (([], (0, 2)), ([b""] * 2, (1, 2)), ([b""] * 6, (3, 2))):
        array = model.infer({"text": BytesArray.of(elements, shape)})["text"].array
        assert (array.shape, array.elements()) == (shape, elements)


def test_corrupt_file_is_refused_in_one_line(tmp_path):
    directory = tmp_path / "1"
    directory.mkdir()
    (directory / "model.xml").write_text("<net garbage")
    (directory / "model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"^cannot read .*/1/model\.xml: Unable to read the model: .*$") as failure:
        open_path(directory)
    assert "\n" not in str(failure.value)


def test_unknown_plugin_key_is_refused_in_one_line(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path)
    plan = plan_compilation("CPU", {"NO_SUCH_KEY": 1}, cores=2)
    with pytest.raises(LoadError, match=r"^plugin_config\.NO_SUCH_KEY: CPU has no such property"):
        Model("m", 1, tmp_path / "1" / "model.xml", plan)


def test_datatype_outside_the_protocol_is_refused(tmp_path):
    x = model_zoo.parameter("x", [2], Type.u4)
    model = openvino.Model([opset15.result(opset15.convert(x, "f32"))], [x])
    with pytest.raises(LoadError, match=r"^KServe v2 has no datatype for u4, the element type of tensor 'x'$"):
        open_model(model, tmp_path)


def test_two_tensors_with_one_name_are_refused(tmp_path):
    x = model_zoo.parameter("x", [2], Type.f32)
    y = opset15.relu(x)
    y.output(0).set_names({"y"})
    with pytest.raises(LoadError, match=r"^the model has outputs with the same name: 'y', 'y'$"):
        open_model(openvino.Model([opset15.result(y), opset15.result(y)], [x]), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("CPU_RUNTIME_CACHE_CAPACITY", 0), ("LP_TRANSFORMS_MODE", "NO"), ("EXECUTION_MODE_HINT", "ACCURACY")],
)
def test_unlisted_property_that_the_device_accepts_is_passed_on(tmp_path, key, value):
    model_zoo.save(model_zoo.relu(), tmp_path)
    model = Model("m", 1, tmp_path / "1", plan_compilation("CPU", {key: value}, cores=2))
    model.open(lambda: None)
    assert model.infer({"x": np.float32([[1, -1, 2, -2]])})["y"].array.tolist() == [[1, 0, 2, 0]]


def test_value_that_the_device_refuses_is_reported_in_its_words(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path)
    model = Model("m", 1, tmp_path / "1", plan_compilation("CPU", {"CPU_RUNTIME_CACHE_CAPACITY": "x"}, cores=2))
    with pytest.raises(LoadError, match="Wrong value x for property key CPU_RUNTIME_CACHE_CAPACITY"):
        model.compile()
