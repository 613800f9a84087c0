"""Bodies that are data alone: an image, raw elements, or a form.

The input: a byte of options, the lines Content-Type and X-Tensor-Shape (empty for none), and the body. With an odd byte
of options the rest of the input becomes the parts of a form, which must come out again.
"""

from typing import Any

import numpy as np
from fuzz_oracles import Failure, attempt

from ovms_rest.protocol.multipart import split_parts
from ovms_rest.protocol.plain_bodies import decode_typed_request, holds_json
from ovms_rest.protocol.raw_bodies import decode_raw_request
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ImageDecoder, ImageSize, ModelMetadata, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs

ANY = Dim(0, None)
_FORM = "multipart/form-data; boundary=b"
TOKENS = [
    *(b"multipart/form-data; boundary=b", b"application/octet-stream", b"image/png", b"application/json", b"\r\n--b"),
    *(b"Content-Disposition: form-data; name=", b"Content-Type: ", b"X-Tensor-Shape: ", b"\r\n\r\n", b"--b--"),
    *(b"Content-Transfer-Encoding: ", b"filename=", b"name*=utf-8''%20", b"text/plain", b'"x"', b'"s"', b'\\"', b"%22"),
    *(b'{"inputs":[', b"[1,2]", b"1,2", b"boundary=", b"\xff\xd8\xff", b"\x89PNG", b"GIF89a", b"BM", b"P6 "),
]


class _Images(ImageDecoder):
    """Stands for the decoder of an input that takes images; decoding does not call it."""

    expected = ImageSize(None, None, 3)


def _model(*tensors: TensorMetadata) -> ModelMetadata:
    return ModelMetadata("m", "1", {tensor.name: tensor for tensor in tensors}, {})


_MODELS = (
    _model(TensorMetadata("x", "FP32", (ANY, Dim(2, 2)))),
    _model(TensorMetadata("x", "UINT8", (ANY, ANY, ANY, Dim(3, 3)), images=_Images())),
    _model(TensorMetadata("s", "BYTES", (ANY,))),
    _model(TensorMetadata("x", "INT16", (Dim(1, 3),)), TensorMetadata("s", "BYTES", (Dim(1, 1), ANY))),
    _model(TensorMetadata("x", "BOOL", ())),
    _model(TensorMetadata("x", "BF16", (ANY, ANY, ANY))),
)


def seeds() -> list[bytes]:
    """Return bodies of every kind for every model."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n[1,2]\r\n'
        b'--b\r\nContent-Disposition: form-data; name="s"; filename="f"\r\n'
        b"Content-Type: text/plain\r\n\r\nhi\r\n--b--\r\n"
    )
    raw = (
        b'--b\r\nContent-Disposition: form-data; name="x"\r\nX-Tensor-Shape: 1,2\r\n'
        b"Content-Transfer-Encoding: binary\r\n\r\n12345678\r\n--b--"
    )
    json_part = (
        b"--b\r\nContent-Disposition: form-data; name=x\r\nContent-Type: application/json\r\n\r\n[[1,2]]\r\n--b--"
    )
    files = b"--b\r\nContent-Disposition: form-data; name*=utf-8''x; filename=\"a\"\r\n\r\n\x89PNG\r\n--b--"
    kinds = [
        *((_FORM, "", body) for body in (form, raw, json_part, files)),
        ('multipart/form-data; boundary="b c"', "", b"--b c\r\n\r\n\r\n--b c--"),
        ("application/octet-stream", "", b"12345678"),
        ("application/octet-stream", "1, 2", b"12345678"),
        ("application/octet-stream", "", b'{"inputs":[]}'),
        ("image/png", "", b"\x89PNG\r\n\x1a\n"),
        ("raw", "", b"\0\0\0\0\0\0\x80?"),
        ("text/plain", "", b"\xff\xd8\xff"),
        ("text/plain", "", b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]} tail'),
        ("", "", b"a=b&c=d"),
    ]
    made = [
        bytes([2 * number]) + f"{kind}\n{shape}\n".encode() + body
        for number in range(len(_MODELS))
        for kind, shape, body in kinds
    ]
    return [*made, b"\x01x\0data\0s\0more\r\n--b \r\n", b'\x01a"b\0\0\0']


def check(data: bytes) -> None:
    """Decode a body by its Content-Type, or parts that were written as a form."""
    if not data:
        return
    if data[0] & 1:
        _check_form(data[1:])
        return
    model = _MODELS[(data[0] >> 1) % len(_MODELS)]
    lines = data[1:].split(b"\n", 2)
    if len(lines) < 3:
        return
    kind, shape = (line.decode("latin-1").strip() for line in lines[:2])
    body = memoryview(bytearray(lines[2]))
    if kind == "raw":
        request = attempt(decode_raw_request, body, model.inputs)
    else:
        holds_json(body, kind, shape or None)
        request = attempt(decode_typed_request, body, kind, shape or None, model)
    if isinstance(request, Failure):
        return
    for tensor in request.inputs:
        _check_memory(tensor.array, len(body))
    if all(metadata.images is None for metadata in model.inputs.values()):
        attempt(validate_inputs, request, model)


def _check_memory(array: Any, size: int) -> None:
    """Check that the elements are no more than the body holds, and that strings lie in their memory."""
    if isinstance(array, BytesArray):
        assert (array.begins <= array.ends).all()
        assert array.begins.size == 0 or int(array.ends.max()) <= array.symbols.size
        assert array.begins.size <= size + 1
    else:
        assert isinstance(array, np.ndarray)
        assert array.size <= size


def _check_form(data: bytes) -> None:
    """Check that the names and data of parts come out as they were written."""
    fields = data.split(b"\0")
    parts = list(zip(fields[::2], fields[1::2], strict=False))
    written = []
    for name, content in parts:
        text = name.decode("utf-8", "replace").replace("\\", "_").replace("%", "_")
        if "\r" in text or "\n" in text or b"\r\n--b" in b"\r\n" + content:
            return
        written.append((text, content))
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (text.replace('"', "%22").encode(), content)
        for text, content in written
    )
    if not written or sum(len(text.encode()) for text, _ in written) > 4000:
        return
    found = attempt(split_parts, memoryview(body + b"--b--\r\n"), _FORM)
    if isinstance(found, Failure):
        raise AssertionError(f"a valid form was refused: {found.message}")
    assert [(part.name, bytes(part.data)) for part in found] == written
