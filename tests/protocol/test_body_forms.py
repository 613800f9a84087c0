"""Hints for bodies that are not inference requests: what they seem to be, and how to send their content."""

import json
import subprocess

import cv2
import numpy as np
import pytest
from decoded_requests import refused
from service import ROOT, serve

from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.raw_bodies import decode_raw_request
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata

PICTURE = np.arange(36, dtype=np.uint8).reshape(4, 3, 3)
FILES = {
    "a JPEG file": cv2.imencode(".jpg", PICTURE)[1].tobytes(),
    "a PNG file": cv2.imencode(".png", PICTURE)[1].tobytes(),
    "a GIF file": b"GIF89a" + bytes(20),
    "a BMP file": cv2.imencode(".bmp", PICTURE)[1].tobytes(),
    "a WebP file": cv2.imencode(".webp", PICTURE)[1].tobytes(),
    "a PNM file": cv2.imencode(".ppm", PICTURE)[1].tobytes(),
}
TYPES = {
    "a JPEG file": "image/jpeg",
    "a PNG file": "image/png",
    "a GIF file": "image/gif",
    "a BMP file": "image/bmp",
    "a WebP file": "image/webp",
    "a PNM file": "image/x-portable-anymap",
}
HEAD = b'{"inputs":[{"name":"s","shape":[1],"datatype":"BYTES"}]}'
STRINGS = ModelMetadata("m", "1", {"s": TensorMetadata("s", "BYTES", (Dim(0, None),))}, {})
NUMBERS = ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", (Dim(2, 2),))}, {})


def refusal(body, length=None, model=STRINGS):
    return refused(decode_request, memoryview(body), length, model=model)


@pytest.mark.parametrize("model", [STRINGS, None])
@pytest.mark.parametrize("name", FILES)
def test_image_as_body_is_recognized(name, model):
    message = refusal(FILES[name], model=model)
    hint = f"it is {name}; send it with its Content-Type: curl --data-binary @FILE -H 'Content-Type: {TYPES[name]}' "
    assert message.startswith(f"the request is not valid JSON: {hint}http://HOST:PORT/v2/models/")


def test_image_with_a_header_length_is_recognized():
    file = FILES["a PNG file"]
    message = refusal(file, len(file))
    assert ": it is a PNG file; send it with its Content-Type, and without Inference-Header-Content-Length: " in message


def test_image_for_a_model_of_two_inputs_is_a_part_of_a_form():
    inputs = {name: TensorMetadata(name, "BYTES", (Dim(0, None),)) for name in ("a", "it's")}
    message = refusal(FILES["a PNG file"], model=ModelMetadata("m n", "1", inputs, {}))
    command = """curl -F a=@FILE1 -F 'it'"'"'s=@FILE2' http://HOST:PORT/v2/models/m%20n/infer"""
    assert message.endswith(f"send multipart/form-data with a part for each input: {command}")


def test_command_for_a_form_names_few_inputs():
    inputs = {name: TensorMetadata(name, "BYTES", (Dim(0, None),)) for name in "abcdefgh"}
    message = refusal(FILES["a PNG file"], model=ModelMetadata("m", "1", inputs, {}))
    assert " -F e=@FILE5 ... http://HOST:PORT/" in message


@pytest.mark.parametrize("name", FILES)
def test_image_is_recognized_without_the_bytes_that_curl_d_removes(name):
    body = FILES[name].translate(None, b"\r\n\0")
    message = refusal(body)
    if name in ("a BMP file", "a PNM file"):  # too little of them is left
        assert message.startswith("the request is not valid JSON: ")
    else:
        assert f": it is {name}; " in message


@pytest.mark.parametrize(("length", "hint"), [(None, ""), (3, ", and leave out Inference-Header-Content-Length")])
def test_form_sent_by_curl_is_recognized(length, hint):
    head = b'--------------------------d74496d6\r\nContent-Disposition: form-data; name="f"\r\n\r\n'
    body = head + FILES["a PNG file"]
    assert refusal(body, length and len(body)) == (
        "the request is not valid JSON: it is multipart/form-data, but its headers do not say so; let the client set "
        f"Content-Type, as `curl -F` does{hint}"
    )


def test_model_without_image_inputs_gets_no_image_command():
    message = refusal(FILES["a PNG file"], model=NUMBERS)
    assert message.endswith("it is a PNG file; the model has no input that takes images; its inputs are 'x'")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x00\x00\x80\x3f", "it is binary data that begins with the bytes 00 00 80 3f; "),
        (b"\xfe\xdc" * 500, "it is binary data that begins with the bytes fe dc fe dc fe dc fe dc; "),
        (b"\x1f\x8b\x08\x00", "it is compressed by gzip; a body that is compressed once needs the header "),
        (b"\xef\xbb\xbf" + HEAD, "it begins with a byte order mark, "),
        (b"image=cat.jpg", "it looks like the fields of a form, "),
    ],
)
def test_other_bodies_are_recognized(body, reason):
    assert refusal(body).startswith(f"the request is not valid JSON: {reason}")


@pytest.mark.parametrize("body", [b"hello", b"{'inputs':[]}", "é".encode() * 300, b'{"id":"\xff"}', HEAD[:-1], b"   {"])
def test_invalid_json_gets_the_message_of_the_parser(body):
    assert refusal(body).startswith("the request is not valid JSON: ")
    assert "binary" not in refusal(body)


def test_missing_header_length_is_suggested_with_its_value():
    assert refusal(HEAD + b"\x02\0\0\0ab\xff") == (
        "the request is not valid JSON: the JSON ends after 56 bytes and 7 bytes more follow; data after the JSON "
        "needs the header 'Inference-Header-Content-Length: 56'"
    )


@pytest.mark.parametrize("length", [50, 60])
def test_wrong_header_length_is_corrected_in_the_message(length):
    assert refusal(HEAD + b"\x02\0\0\0ab\xff", length) == (
        f"the request is not valid JSON: the JSON ends after 56 bytes, but Inference-Header-Content-Length is {length}"
    )


def test_whitespace_after_the_json_belongs_to_it():
    request = decode_request(memoryview(HEAD + b" \n\x01\0\0\0a"), 58, model=STRINGS)
    assert request.inputs[0].array.elements() == [b"a"]


@pytest.mark.parametrize("name", FILES)
def test_image_without_length_prefix_is_recognized_and_its_length_given(name):
    file = FILES[name]
    message = refusal(HEAD + file, len(HEAD))
    assert message.endswith(
        f"; the data begins like {name}, but each element must be preceded by its length as 4 little-endian bytes, "
        f"here {len(file).to_bytes(4, 'little').hex(' ')}, and binary_data_size includes them"
    )


def test_image_as_raw_numeric_data_is_recognized():
    message = refused(decode_raw_request, memoryview(FILES["a PNG file"]), NUMBERS.inputs)
    assert "it is a PNG file; the model has no input that takes images" in message


def test_commands_in_the_messages_send_the_image(tmp_path):
    """The commands are run unchanged, for the pipeline and the model of the demo."""
    samples = ROOT / "ovms_rest" / "demo" / "samples"
    with serve(tmp_path) as service:
        for model, file, values in (("number", "number-65902.png", [6, 5, 9, 0, 2]), ("digits", "digit-7.png", [7])):
            picture = samples / file
            url = f"http://127.0.0.1:{service.port}/v2/models/{model}/infer"
            refused = subprocess.run(
                ["curl", "-s", "--data-binary", f"@{picture}", url], capture_output=True, text=True, check=True
            )
            _, _, command = json.loads(refused.stdout)["error"].partition("send it with its Content-Type: ")
            command = command.replace("FILE", str(picture)).replace("HOST:PORT", f"127.0.0.1:{service.port}")
            answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
            assert values in [output["data"] for output in json.loads(answer.stdout)["outputs"]]
