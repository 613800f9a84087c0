"""Properties of decoding and encoding for any bytes and any tensor."""

import copy
import json
import math

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import DTYPES, fingerprint

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.classification import classify
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.encoding import encode_response
from ovms_rest.protocol.raw_bodies import decode_raw_request
from ovms_rest.protocol.strings import BytesArray, from_matrix, pack, to_matrix, unpack
from ovms_rest.protocol.tensors import Dim, InferenceRequest, InferenceResponse, Tensor, TensorMetadata

DATATYPES = [*DTYPES, "BYTES"]


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except InvalidRequestError as error:
        return error


# --- Mutated requests


def nest(value, levels, key):
    """Return a value inside nested arrays, or nested objects with one key."""
    for _ in range(levels):
        value = [value] if key is None else {key: value}
    return value


names = st.sampled_from(["x", "y", "", "\u00e9", "a\0"]) | st.text(max_size=5)
BINARY_KEYS = ["binary_data_size", "binary_data"]
keys = st.sampled_from(["inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", *BINARY_KEYS])
known_parameters = st.sampled_from(
    [*BINARY_KEYS, "binary_data_output", "classification", "timeout", "priority", "shared_memory_region"]
)
numbers = (
    st.integers(-3, 300)
    | st.integers(-(2**65), 2**65)
    | st.sampled_from([2**31, 2**59, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)])
    | st.floats(allow_nan=False, allow_infinity=False)
)
scalars = st.none() | st.booleans() | numbers | names
small = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(keys | names, children, max_size=4),
    max_leaves=10,
)
anything = small | st.builds(nest, small, st.integers(90, 110) | st.integers(240, 400), st.none() | keys)

shapes = st.lists(st.integers(0, 3), max_size=3)
data = st.recursive(numbers | st.booleans() | names, lambda children: st.lists(children, max_size=4), max_leaves=12)
parameters = st.dictionaries(names | known_parameters, st.booleans() | numbers | names, max_size=2)
inputs = st.fixed_dictionaries(
    {"name": names, "shape": shapes, "datatype": st.sampled_from(DATATYPES)},
    optional={"data": st.lists(data, max_size=4), "parameters": parameters},
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(inputs, min_size=1, max_size=3)},
    optional={
        "id": names,
        "parameters": parameters,
        "outputs": st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": parameters}), max_size=2),
    },
)
header_lengths = st.none() | st.integers(0, 400)


def places(value, path=()):
    """Return the paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def mutated(draw, valid):
    """Draw a request with one value replaced, removed or added."""
    request = copy.deepcopy(draw(valid))
    _, *inner = places(request)
    *path, last = draw(st.sampled_from(inner))
    owner = request
    for key in path:
        owner = owner[key]
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "replace":
            owner[last] = draw(anything)
        case "remove":
            del owner[last]
        case "add" if isinstance(owner, dict):
            owner[draw(keys | names)] = draw(anything)
        case "add":
            owner.insert(last, draw(anything))
    return request


@st.composite
def complete_requests(draw):
    """Draw a valid request and its binary part."""
    items, binary = [], b""
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        tensor = draw(tensors().filter(is_text))
        in_binary = draw(st.booleans())
        item, section = written(Tensor(name, tensor.datatype, finite(tensor.array)), in_binary)
        items.append(item)
        binary += section
    return {"inputs": items, "id": draw(names)}, binary


# --- Tensors


def finite(array):
    """Return an array with zeros where JSON has no number."""
    if isinstance(array, BytesArray) or array.dtype.kind in "biu":
        return array
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(array), array, array.dtype.type(0)).astype(array.dtype).reshape(array.shape)


def is_text(tensor):
    if tensor.datatype != "BYTES":
        return True
    return all(element.decode(errors="replace").encode() == element for element in tensor.array.elements())


@st.composite
def tensors(draw):
    """Draw a tensor of any datatype, shape and bits; strings are text or any bytes."""
    datatype = draw(st.sampled_from(DATATYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    count = int(np.prod(shape))
    if datatype == "BYTES":
        strings = draw(st.sampled_from([st.binary(max_size=6), st.text(max_size=6).map(str.encode)]))
        elements = draw(st.lists(strings, min_size=count, max_size=count))
        return Tensor("t", "BYTES", BytesArray.of(elements, shape))
    if datatype == "BOOL":
        return Tensor("t", "BOOL", draw(hnp.arrays(np.bool_, shape)))
    dtype = np.dtype(DTYPES[datatype])
    bits = draw(hnp.arrays(f"u{dtype.itemsize}", shape))
    return Tensor("t", datatype, bits.view(dtype))


def joined(elements):
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def written(tensor, binary):
    """Return a tensor as an input (the output that it is encoded to) and its binary data."""
    head, sections = encode_response(InferenceResponse("m", "1", [(tensor, binary)]))
    return json.loads(head)["outputs"][0], b"".join(sections)


def sent_back(response):
    """Return a response as a request: its JSON with the outputs as inputs, and the binary data."""
    head, sections = encode_response(response)
    head = head.replace(b'"outputs":[', b'"inputs":[', 1)
    return decode_request(memoryview(head + b"".join(sections)), len(head))


# --- Any bytes


@settings(max_examples=300)
@given(st.binary(max_size=200), header_lengths)
def test_any_bytes_are_rejected_or_decoded(body, header_length):
    assert isinstance(outcome(decode_request, memoryview(body), header_length), (InferenceRequest, InvalidRequestError))


@settings(max_examples=300)
@given(complete_requests())
def test_complete_request_is_decoded(complete):
    root, binary = complete
    head = json.dumps(root).encode()
    request = decode_request(memoryview(head + binary), len(head))
    assert [tensor.name for tensor in request.inputs] == [item["name"] for item in root["inputs"]]


@settings(max_examples=300)
@given(complete_requests(), st.integers(0, 2000), st.binary(max_size=4), header_lengths)
def test_complete_request_with_replaced_bytes_is_rejected_or_decoded(complete, place, other, header_length):
    root, binary = complete
    head = json.dumps(root).encode()
    body = head + binary
    place %= len(body)
    body = memoryview(body[:place] + other + body[place + len(other) :])
    for length in (header_length, len(head)):
        assert isinstance(outcome(decode_request, body, length), (InferenceRequest, InvalidRequestError))


@st.composite
def dims(draw):
    low = draw(st.integers(0, 3))
    return Dim(low, draw(st.none() | st.integers(low, low + 3)))


metadata = st.builds(TensorMetadata, st.just("t"), st.sampled_from(DATATYPES), st.lists(dims(), max_size=4).map(tuple))


@settings(max_examples=500)
@given(st.binary(max_size=64) | st.integers(0, 64).map(bytes), st.lists(metadata, min_size=1, max_size=2))
def test_any_raw_body_is_rejected_or_becomes_one_tensor(body, inputs):
    by_name = {f"t{index}": tensor for index, tensor in enumerate(inputs)}
    request = outcome(decode_raw_request, memoryview(body), by_name)
    if not isinstance(request, InvalidRequestError):
        ((tensor,), (expected,)) = request.inputs, inputs
        assert tensor.datatype == expected.datatype
        assert len(tensor.shape) == len(expected.dims)
        if tensor.datatype == "BYTES":
            assert tensor.array.elements() == [body]
        else:
            assert tensor.array.tobytes() == body


@settings(max_examples=300)
@given(st.binary(max_size=40) | st.lists(st.binary(max_size=3)).map(joined), st.integers(0, 12))
def test_any_section_is_rejected_or_filled_by_its_elements(section, count):
    found = outcome(unpack, memoryview(section), count, "x")
    if not isinstance(found, InvalidRequestError):
        elements = [section[begin:end] for begin, end in zip(*found, strict=True)]
        assert len(elements) == count
        assert joined(elements) == section


# --- Classes


def classified(values, k):
    """Return the highest values of a flat list by the simplest possible algorithm."""
    numbers = [-value if value == value else float("inf") for value in values]
    order = sorted(range(len(values)), key=lambda index: (values[index] != values[index], numbers[index], index))
    form = "%f:%d" if any(isinstance(value, float) for value in values) else "%d:%d"
    return [(form % (values[index], index)).encode() for index in order[:k]]


@settings(max_examples=400)
@given(tensors().filter(lambda tensor: tensor.datatype != "BYTES"), st.integers(1, 30))
def test_classes_of_any_output_are_its_highest_values(tensor, k):
    array = tensor.array
    rows = array if array.ndim >= 2 else array.reshape(1, -1)
    found = classify(tensor, k, ())
    expected = [text for row in rows for text in classified(row.ravel().tolist(), k)]
    assert found.array.elements() == expected
    assert found.shape == (*array.shape[: array.ndim >= 2], min(k, math.prod(rows.shape[1:])))


# --- Round trips


@settings(max_examples=400)
@given(tensors())
def test_binary_tensor_survives_a_round_trip(tensor):
    (returned,) = sent_back(InferenceResponse("m", "1", [(tensor, True)])).inputs
    assert (returned.name, returned.datatype) == (tensor.name, tensor.datatype)
    assert fingerprint(returned.array) == fingerprint(tensor.array)


@settings(max_examples=400)
@given(tensors().filter(is_text))
def test_json_tensor_survives_a_round_trip(tensor):
    array = finite(tensor.array)
    (returned,) = sent_back(InferenceResponse("m", "1", [(Tensor("t", tensor.datatype, array), False)])).inputs
    assert (returned.name, returned.datatype) == (tensor.name, tensor.datatype)
    assert fingerprint(returned.array) == fingerprint(array)


@settings(max_examples=200)
@given(st.lists(st.tuples(names, tensors().filter(is_text), st.booleans()), min_size=1, max_size=4), names)
def test_several_tensors_keep_their_order_in_a_round_trip(items, request_id):
    sent = [(Tensor(name, tensor.datatype, finite(tensor.array)), binary) for name, tensor, binary in items]
    request = sent_back(InferenceResponse("m", "1", sent, request_id))
    assert request.id == request_id
    assert [(tensor.name, fingerprint(tensor.array)) for tensor in request.inputs] == [
        (tensor.name, fingerprint(tensor.array)) for tensor, _ in sent
    ]


@settings(max_examples=200)
@given(tensors().filter(lambda tensor: tensor.datatype != "BYTES"))
def test_raw_body_survives_a_round_trip(tensor):
    static = TensorMetadata("t", tensor.datatype, tuple(Dim(size, size) for size in tensor.shape))
    (returned,) = decode_raw_request(memoryview(tensor.array.tobytes()), {"t": static}).inputs
    assert fingerprint(returned.array) == fingerprint(tensor.array)


@settings(max_examples=200)
@given(hnp.arrays(np.float32, st.integers(0, 20)))
def test_fp32_is_written_without_superfluous_digits(array):
    head, _ = encode_response(InferenceResponse("m", "1", [(Tensor("t", "FP32", finite(array)), False)]))
    texts = json.loads(head, parse_float=str)["outputs"][0]["data"]
    digits = [text.lower().split("e")[0].replace(".", "").lstrip("-").strip("0") for text in texts]
    shortest = [np.format_float_scientific(value, unique=True).split("e")[0] for value in finite(array)]
    assert [len(item) for item in digits] == [len(item.replace(".", "").lstrip("-").strip("0")) for item in shortest]


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=10), max_size=10))
def test_any_strings_survive_packing(elements):
    packed = pack(BytesArray.of(elements, (len(elements),)))
    assert packed == joined(elements)
    begins, ends = unpack(memoryview(packed), len(elements), "x")
    assert [packed[begin:end] for begin, end in zip(begins, ends, strict=True)] == elements


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=10).map(lambda element: element.replace(b"\0", b"")), max_size=10))
def test_any_strings_without_nul_survive_a_matrix(elements):
    assert from_matrix(to_matrix(BytesArray.of(elements, (len(elements),)), "x")).elements() == elements
