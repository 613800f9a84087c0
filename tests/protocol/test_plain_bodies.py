"""Bodies that are data alone: which ones are, what they become, and the messages for those that do not fit."""

import json
import struct

import numpy as np
import pytest
from decoded_requests import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError
from ovms_rest.protocol import plain_bodies
from ovms_rest.protocol.decoding import DEFAULT_LIMITS, decode_request
from ovms_rest.protocol.plain_bodies import decode_typed_request, holds_json
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs

ANY, OCTETS, PNG = Dim(0, None), "application/octet-stream", "image/png"
FORM = "multipart/form-data; boundary=B"
FLOATS = struct.pack("<4f", 1, -2, 3, -4)


class Images:
    """Decodes no images, but remembers that it should."""

    def read(self, strings, label):
        return strings


def model(**inputs):
    """Return a model with inputs of a datatype and dims, (datatype, *dims); "images" are 4 dims of FP32."""
    tensors = {}
    for name, value in inputs.items():
        if value == "images":
            tensors[name] = TensorMetadata(name, "FP32", (ANY,) * 4, Images())
        else:
            datatype, *dims = value
            tensors[name] = TensorMetadata(
                name, datatype, tuple(dim if isinstance(dim, Dim) else Dim(dim, dim) for dim in dims)
            )
    return ModelMetadata("m", "1", tensors, {})


NUMBERS = model(x=("FP32", ANY, 2))
STRINGS = model(s=("BYTES", ANY))
IMAGES = model(image="images")
TWO = model(image="images", x=("FP32", ANY, 2))


def decode(body, content_type, of=NUMBERS, shape=None):
    return decode_typed_request(memoryview(bytearray(body)), content_type, shape, of)


def read(body, content_type, of=NUMBERS, shape=None):
    """Return the arrays of a request by input: lists of numbers, or lists of bytes, with their shapes."""
    arrays = {}
    for tensor in decode(body, content_type, of, shape).inputs:
        values = tensor.array.elements() if isinstance(tensor.array, BytesArray) else tensor.array.ravel().tolist()
        arrays[tensor.name] = tensor.datatype, tensor.shape, values
    return arrays


def refusal(body, content_type, of=NUMBERS, shape=None):
    """Return the message of the first step, decoding or validation, that rejects a body."""
    return refused(lambda: validate_inputs(decode(body, content_type, of, shape), of))


def form(*parts):
    """Return a form of parts (name, data, *header lines); a file name is written as the header line "file"."""
    lines = []
    for name, data, *fields in parts:
        file = '; filename="f"' if "file" in fields else ""
        head = [f'Content-Disposition: form-data; name="{name}"{file}', *(field for field in fields if field != "file")]
        data = data if isinstance(data, bytes) else data.encode()
        lines.append(b"--B\r\n" + "\r\n".join(head).encode() + b"\r\n\r\n" + data + b"\r\n")
    return b"".join(lines) + b"--B--\r\n"


# --- Which bodies are data


JSON_REQUESTS = [b"{}", b" \r\n\t{ }", b'{"inputs":[]}', b'{\n "a":1}', b"{", b"{ ", b'{"', b'{"broken']
OTHERS = [b"", b" ", b"[]", b"[{}]", b"null", b"{'inputs':[]}", b"{x", b"{{", b"\xef\xbb\xbf{}", b"a{}", b"--B", FLOATS]


@pytest.mark.parametrize("content_type", [OCTETS, PNG, FORM, "image/jpeg"])
@pytest.mark.parametrize("body", JSON_REQUESTS)
def test_body_that_begins_like_an_object_is_json_whatever_its_content_type(body, content_type):
    expected = refused(decode_request, memoryview(body), model=TWO)
    hint = "; the body begins like JSON, and application/octet-stream that does so needs the header X-Tensor-Shape"
    assert refusal(body, content_type, TWO) == expected + (hint if content_type == OCTETS else "")


@pytest.mark.parametrize("content_type", [OCTETS, PNG, FORM, "", "text/plain"])
def test_request_in_json_is_decoded_whatever_its_content_type(content_type):
    body = b' {"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
    assert read(body, content_type, shape=None if content_type == OCTETS else "1") == {"x": ("FP32", (1, 2), [1, 2])}


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "application/json", "text/plain", "application/x-www-form-urlencoded", "garbage;;=", "\xff", "multipart"),
        *("multipart/mixed; boundary=B", "application/octet-streams", "image", "application/json; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("body", OTHERS)
def test_body_of_another_content_type_is_left_to_json(body, content_type):
    assert refusal(body, content_type, STRINGS, "1") == refused(decode_request, memoryview(body), model=STRINGS)


@pytest.mark.parametrize("body", OTHERS)
def test_body_that_does_not_begin_like_an_object_does_not_hold_json(body):
    assert not holds_json(memoryview(body), None, None)


def test_only_raw_elements_with_a_shape_may_begin_like_json():
    body = memoryview(b'{"a":1}')
    assert not holds_json(body, OCTETS, "1")
    assert all(holds_json(body, kind, shape) for kind, shape in ((OCTETS, None), (None, "1"), (PNG, "1"), (FORM, "1")))
    assert read(body, OCTETS, STRINGS, "1") == {"s": ("BYTES", (1,), [b'{"a":1}'])}


@pytest.mark.parametrize("content_type", ["Application/Octet-Stream", "application/octet-stream;x=y", " image/png ;"])
def test_content_type_ignores_case_and_parameters(content_type):
    assert read(b"abc", content_type, STRINGS) == {"s": ("BYTES", (1,), [b"abc"])}


def test_request_gets_all_outputs_as_json():
    request = decode(FLOATS, OCTETS)
    assert (request.outputs, request.binary_output, request.id, request.priority) == ((), False, "", 0)


# --- One image


@pytest.mark.parametrize("content_type", [PNG, "image/jpeg", "image/x-unknown", "IMAGE/PNG"])
def test_body_of_an_image_is_one_element(content_type):
    assert read(b"\x89PNG", content_type, IMAGES) == {"image": ("BYTES", (1,), [b"\x89PNG"])}


def test_string_may_be_an_image_too():
    strings = model(s=("BYTES", ANY, 1))
    assert read(b"\x89PNG", PNG, strings) == {"s": ("BYTES", (1, 1), [b"\x89PNG"])}


def test_image_is_a_view_on_the_body():
    body = memoryview(bytearray(b"\x89PNG"))
    (tensor,) = decode_typed_request(body, PNG, None, IMAGES, DEFAULT_LIMITS._replace(json_values=0)).inputs
    assert np.shares_memory(tensor.array.symbols, np.frombuffer(body, np.uint8))


def test_image_for_an_input_of_numbers_is_rejected():
    assert refusal(b"\x89PNG", PNG) == (
        "Content-Type is image/png, but input 'x' of model 'm' does not take images; it takes FP32 of shape [-1,2], "
        "for example as application/octet-stream"
    )


@pytest.mark.parametrize("content_type", [PNG, OCTETS])
def test_body_for_several_inputs_is_rejected_with_the_form_to_send(content_type):
    assert refusal(b"\x89PNG", content_type, TWO) == (
        f"Content-Type is {content_type}, which makes the body the data of a model's only input, but model 'm' has 2 "
        "inputs: 'image', 'x'; send multipart/form-data with a part for each input: "
        "curl -F image=@FILE1 -F x=@FILE2 http://HOST:PORT/v2/models/m/infer"
    )


@pytest.mark.parametrize("model", [TWO, model(x=("FP32", 2))])
def test_long_content_type_of_an_image_is_cut_in_the_message(model):
    message = refusal(b"\x89PNG", f"image/\x85{'p' * 8000}", model)
    assert message.startswith(f"Content-Type is image/\\x85{'p' * 53}..., ")


# --- Raw elements


@pytest.mark.parametrize(
    ("shape", "expected"), [(None, (2, 2)), ("2,2", (2, 2)), (" 1 , 4 ", (1, 4)), ("4", (4,)), ("1,1,4", (1, 1, 4))]
)
def test_raw_elements_have_the_shape_of_the_header_or_the_model(shape, expected):
    assert read(FLOATS, OCTETS, shape=shape) == {"x": ("FP32", expected, [1, -2, 3, -4])}


def test_raw_elements_may_be_none_with_a_shape():
    assert read(b"", OCTETS, shape="0,2") == {"x": ("FP32", (0, 2), [])}
    assert refusal(b"", OCTETS) == "the body is empty, expected the data of input 'x'"


def test_raw_string_is_the_whole_body():
    assert read(b"\3\0\0\0abc", OCTETS, STRINGS) == {"s": ("BYTES", (1,), [b"\3\0\0\0abc"])}
    assert read(b"", OCTETS, STRINGS, "1,1") == {"s": ("BYTES", (1, 1), [b""])}


INTEGERS = "integers from 0 to 9223372036854775807, separated by commas"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("3,2", "X-Tensor-Shape [3,2] takes 24 bytes of FP32, the body has 16"),
        ("1,4", "shape is [1,4], the model takes [-1,2]"),
        (
            "9223372036854775808",
            "shape has the dim 9223372036854775808, expected integers from 0 to 9223372036854775807",
        ),
        ("1," * 64 + "1", "shape has 65 dims, at most 64 are allowed"),
        *(
            (text, f"X-Tensor-Shape is {json.dumps(text)}, expected {INTEGERS}")
            for text in ("", "[2,2]", "2x2", "-1,2", "2,,2", "2,", "2.0,2", "1" * 20, "2 2")
        ),
        ("\u0662,2", f'X-Tensor-Shape is "\u0662,2", expected {INTEGERS}'),
    ],
)
def test_invalid_shape_of_raw_elements_is_rejected(shape, message):
    assert refusal(FLOATS, OCTETS, shape=shape) == f"input 'x': {message}"


@pytest.mark.parametrize(
    ("body", "content_type", "shape"),
    [(b"", OCTETS, "0,4194305"), (form(("x", b"", "X-Tensor-Shape: 0,4194305")), FORM, None)],
)
def test_dims_of_raw_elements_beside_0_may_be_those_of_a_tensor_that_fits_into_a_body(body, content_type, shape):
    any_size = model(x=("FP32", ANY, ANY))
    (tensor,) = decode_typed_request(memoryview(body), content_type, shape, any_size).inputs
    assert tensor.shape == (0, 4194305)
    with pytest.raises(InvalidRequestError, match="multiply to more than 4194304, the limit for FP32"):
        decode_typed_request(memoryview(body), content_type, shape, any_size, DEFAULT_LIMITS._replace(body=2**24))


def test_huge_shape_of_raw_elements_costs_nothing():
    message = refusal(b"", OCTETS, shape="0,9223372036854775807")
    assert message.startswith(
        "input 'x': the dims of shape [0,9223372036854775807] other than 0 multiply to more than "
    )


@pytest.mark.parametrize(
    ("body", "of", "shape", "message"),
    [
        (FLOATS[:9], NUMBERS, None, "input 'x': shape [-1,2] takes a multiple of 8 bytes of FP32, the body has 9"),
        (
            FLOATS,
            model(x=("FP32", 1, ANY, ANY)),
            None,
            "input 'x': shape [1,-1,-1] has 2 open dims besides dim 0, which the size of the body does not determine; "
            "send the header 'X-Tensor-Shape: 1,...'",
        ),
        (b"a", STRINGS, "2", "input 's': the body is one string, but X-Tensor-Shape is [2]"),
        (b"a", model(s=("BYTES", 2)), None, "input 's': a raw body is one string, but the model's shape is [2]"),
    ],
)
def test_raw_elements_that_do_not_fit_are_rejected(body, of, shape, message):
    assert refusal(body, OCTETS, of, shape) == message


def test_image_as_raw_elements_is_recognized():
    message = refusal(b"\x89PNG\r\n\x1a\n1", OCTETS, model(image="images"))
    assert message.endswith(
        "; it is a PNG file; send it with its Content-Type: curl --data-binary @FILE -H 'Content-Type: image/png' "
        "http://HOST:PORT/v2/models/m/infer"
    )
    assert "the model has no input that takes images" in refusal(b"\x89PNG5", OCTETS)


# --- Forms


def test_parts_are_the_inputs_of_their_names():
    body = form(("x", FLOATS, "file"), ("image", b"\xff\xd8", f"Content-Type: {PNG}"))
    assert read(body, FORM, TWO) == {
        "image": ("BYTES", (1,), [b"\xff\xd8"]),
        "x": ("FP32", (2, 2), [1, -2, 3, -4]),
    }


def test_images_of_one_name_are_elements_in_their_order():
    body = form(*(("image", data, "file") for data in (b"c", b"a", b"b")))
    assert read(body, FORM, IMAGES) == {"image": ("BYTES", (3,), [b"c", b"a", b"b"])}


def test_images_of_a_form_are_views_on_the_body():
    body = memoryview(bytearray(form(("image", b"a", "file"), ("image", b"b", "file"))))
    (tensor,) = decode_typed_request(body, FORM, None, IMAGES, DEFAULT_LIMITS._replace(json_values=0)).inputs
    assert np.shares_memory(tensor.array.symbols, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("dims", "count", "shape"),
    [
        *(((ANY,), 3, (3,)), ((ANY, 1), 3, (3, 1)), ((1, ANY), 3, (1, 3)), ((ANY, ANY), 3, (3, 1)), ((3,), 3, (3,))),
        *(((2, ANY), 4, (2, 2)), ((Dim(2, 4), 1), 3, (3, 1)), ((), 1, ())),
    ],
)
def test_strings_of_one_name_have_the_shape_of_the_model(dims, count, shape):
    body = form(*(("s", f"{index}") for index in range(count)))
    assert read(body, FORM, model(s=("BYTES", *dims)))["s"][1:] == (shape, [b"%d" % index for index in range(count)])


@pytest.mark.parametrize(("dims", "count"), [((2,), 3), ((2, ANY), 3), ((), 2), ((0, ANY), 1)])
def test_number_of_strings_that_does_not_fit_is_rejected(dims, count):
    message = refusal(form(*[("s", "a")] * count), FORM, model(s=("BYTES", *dims)))
    assert message.startswith("input 's': ")
    assert ", but the model's shape is [" in message


@pytest.mark.parametrize(
    "field", ["file", "Content-Type: text/plain", f"Content-Type: {OCTETS}", f"Content-Type: {PNG}"]
)
def test_part_of_any_kind_but_json_is_a_string(field):
    assert read(form(("s", '["a"]', field)), FORM, STRINGS)["s"] == ("BYTES", (1,), [b'["a"]'])


@pytest.mark.parametrize(
    ("text", "of", "expected"),
    [
        ("[1, 2, 3, 4]", NUMBERS, ("FP32", (2, 2), [1, 2, 3, 4])),
        ("[[1,2],[3,4],[5,6]]\n", NUMBERS, ("FP32", (3, 2), [1, 2, 3, 4, 5, 6])),
        ("[]", NUMBERS, ("FP32", (0, 2), [])),
        ("[[]]", model(x=("FP32", ANY, ANY)), ("FP32", (1, 0), [])),
        ("7", model(x=("INT64",)), ("INT64", (), [7])),
        ("7", model(x=("INT64", 1, 1)), ("INT64", (1, 1), [7])),
        ("[true,false]", model(x=("BOOL", ANY)), ("BOOL", (2,), [True, False])),
        ("9007199254740993", model(x=("INT64", ANY)), ("INT64", (1,), [9007199254740993])),
        ("[[[[1]]]]", model(x="images"), ("FP32", (1, 1, 1, 1), [1])),
    ],
)
@pytest.mark.parametrize("fields", [(), ("Content-Type: text/plain",), ("Content-Type: application/json", "file")])
def test_text_is_numbers_in_json(text, of, expected, fields):
    assert read(form(("x", text, *fields)), FORM, of)["x"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a",{"b64":"/w=="}]', ((2,), [b"a", b"\xff"])),
        ('"a"', ((1,), [b"a"])),
        ('{"b64":"/w=="}', ((1,), [b"\xff"])),
        ('[["a"],["b"]]', ((2, 1), [b"a", b"b"])),
    ],
)
def test_strings_in_json_need_its_content_type(text, expected):
    body = form(("s", text, "Content-Type: application/json"))
    assert read(body, FORM, STRINGS)["s"][1:] == expected


@pytest.mark.parametrize("of", [NUMBERS, model(x="images")])
def test_part_with_a_shape_is_raw_elements(of):
    body = form(("x", FLOATS, "X-Tensor-Shape: 1,2,2,1", f"Content-Type: {PNG}"))
    assert read(body, FORM, of)["x"] == ("FP32", (1, 2, 2, 1), [1, -2, 3, -4])


@pytest.mark.parametrize("fields", [("file",), (f"Content-Type: {OCTETS}",), ("file", "Content-Type: image/png")])
def test_file_for_an_input_of_numbers_is_raw_elements(fields):
    assert read(form(("x", FLOATS, *fields)), FORM)["x"] == ("FP32", (2, 2), [1, -2, 3, -4])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("y", "1")], "model 'm' has no input 'y'; it has 'image', 'x'"),
        ([("", "1")], "model 'm' has no input ''; it has 'image', 'x'"),
        ([("image", "a", "file")], "input 'x' of model 'm' is missing from the request"),
        (
            [("x", "[1]"), ("x", "[2]")],
            "input 'x' has 2 parts; only images and strings may come in several parts, one in each",
        ),
        (
            [("image", "a", "file"), ("image", "[1]")],
            "input 'image' has 2 parts; only images and strings may come in several parts, one in each",
        ),
        ([("x", "1,2")], "input 'x': the part is not valid JSON: "),
        ([("x", "")], "input 'x': the part is not valid JSON: "),
        ([("x", "[NaN]")], "input 'x': the part is not valid JSON: "),
        ([("x", "[1e999]")], "input 'x': the part is not valid JSON: the number 1e999 is beyond the range of FP64: "),
        ([("x", '["a","b"]')], "input 'x': data[0] is the string \"a\", FP32 takes numbers"),
        ([("x", '{"a":1}')], "input 'x': shape [-1,2] takes a multiple of 2 elements, the array has 1"),
        ([("x", "[1,2,3]")], "input 'x': shape [-1,2] takes a multiple of 2 elements, the array has 3"),
        ([("x", "[[1],[2]]"), ("image", "a", "file")], "input 'x': shape is [2,1], the model takes [-1,2]"),
        ([("x", "[[1,2],[3]]")], "input 'x': the arrays in dim 1 have lengths from 1 to 2, expected one"),
        ([("x", "[[1,2],3]")], "input 'x': dim 0 of the array has elements beside arrays"),
        ([("x", "[" * 65 + "]" * 65)], "input 'x': the array has more than 64 dims, the limit"),
        ([("x", "[" * 5000 + "]" * 5000)], "input 'x': the part is not valid JSON: "),
        (
            [("image", "[1,2]")],
            "input 'image': shape [-1,-1,-1,-1] has 3 open dims besides dim 0, which the length of a flat array does "
            "not determine; nest it",
        ),
        ([("x", "1", "file")], "input 'x': shape [-1,2] takes a multiple of 8 bytes of FP32, the part has 1"),
        ([("x", FLOATS, "X-Tensor-Shape: a")], "input 'x': X-Tensor-Shape is \"a\", expected integers from 0 to "),
    ],
)
def test_part_that_does_not_fit_is_rejected(parts, message):
    assert refusal(form(*parts), FORM, TWO).startswith(message)


def test_numbers_of_a_part_may_take_only_so_much_memory():
    with pytest.raises(BodyTooLargeError, match="the values of the JSON would take"):
        decode_typed_request(
            memoryview(form(("x", "[" + "1," * 10_000 + "1]"))),
            FORM,
            None,
            NUMBERS,
            DEFAULT_LIMITS._replace(json_values=2**16),
        )


def test_strings_of_a_part_are_limited(monkeypatch):
    monkeypatch.setattr(plain_bodies, "MAX_ELEMENTS", 2)
    body = form(("s", '["","",""]', "Content-Type: application/json"))
    assert refusal(body, FORM, STRINGS) == "input 's' has 3 strings, at most 2 are allowed"


bodies = st.binary(max_size=60) | st.lists(
    st.tuples(
        st.sampled_from(["x", "image", "s"]),
        st.binary(max_size=20) | st.sampled_from(["[1,2]", "[[1]]", '["a"]', "7", "{}", "null", "[[1],2]"]),
        st.sampled_from(["file", "A: b", "Content-Type: application/json", "X-Tensor-Shape: 1,2", "X-Tensor-Shape: 0"]),
    ),
    max_size=3,
).map(lambda parts: form(*parts))


@settings(max_examples=300)
@given(
    bodies,
    st.sampled_from([OCTETS, PNG, FORM]),
    st.none() | st.text("0123456789, ", max_size=5),
    st.sampled_from([NUMBERS, STRINGS, IMAGES, TWO]),
)
def test_any_body_is_rejected_or_decoded(body, content_type, shape, of):
    try:
        request = decode(body, content_type, of, shape)
    except InvalidRequestError:
        return
    assert {tensor.name for tensor in request.inputs} <= set(of.inputs)
