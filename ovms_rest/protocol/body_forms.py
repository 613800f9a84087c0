"""Hints in the refusal of a body that is not an inference request: what it seems to be, and how to send its content.

All of this runs only for requests that were refused already.
"""

import json
import re
import shlex
import struct
from collections.abc import Mapping
from urllib.parse import quote

from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.tensors import ModelMetadata, TensorMetadata
from ovms_rest.protocol.words import count_of, list_names

# `curl -d @file` removes the CR, LF and NUL of a file, so a signature here ends before the first of them.
_IMAGES = (
    (re.compile(rb"\xff\xd8\xff"), "a JPEG file", "image/jpeg"),
    (re.compile(rb"\x89PNG"), "a PNG file", "image/png"),
    (re.compile(rb"GIF8[79]a"), "a GIF file", "image/gif"),
    (re.compile(rb"RIFF.{1,4}WEBP", re.DOTALL), "a WebP file", "image/webp"),
    # The file size, and 4 zero bytes.
    (re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "a BMP file", "image/bmp"),
    (re.compile(rb"P[1-6][ \t\r\n#]"), "a PNM file", "image/x-portable-anymap"),
)
_MULTIPART = re.compile(rb"--[^\r\n]{1,70}\r?\nContent-", re.IGNORECASE)
_URLENCODED = re.compile(rb"[A-Za-z_][\w.+-]*=")
# How far into the body the end of the JSON is searched for.
_MOST_JSON = 2**16
_SPACE = b" \t\r\n"
# Inputs that a command shows.
_MOST_FIELDS = 5


def name_image(data: memoryview) -> str:
    """Return the image format whose signature the data begins with, "" for other data."""
    start = bytes(data[:64])
    return next((name for signature, name, _ in _IMAGES if signature.match(start)), "")


def explain_body(body: memoryview, header_length: int | None, model: ModelMetadata | None) -> str:
    """Return what a body is whose first `header_length` bytes (None: all) are not valid JSON, "" if that is unclear."""
    inputs, name = (None, "MODEL") if model is None else (model.inputs, model.name)
    part = body if header_length is None else body[:header_length]
    end = _find_json(body)
    if end is not None and (end > len(part) or bytes(part[end : end + 256]).strip(_SPACE)):
        return _explain_length(end, len(body) - end, header_length)
    start = bytes(part[:256])
    if image := name_image(part):
        return f"it is {image}; {explain_image(inputs, name, image, header_length is not None)}"
    if _MULTIPART.match(start):
        return (
            "it is multipart/form-data, but its headers do not say so; let the client set Content-Type, as `curl -F` "
            f"does{'' if header_length is None else ', and leave out Inference-Header-Content-Length'}"
        )
    if start.startswith(b"\x1f\x8b"):
        return (
            "it is compressed by gzip; a body that is compressed once needs the header 'Content-Encoding: gzip', and "
            "one that is compressed twice is not supported"
        )
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte order mark, expected UTF-8 without one"
    if start.lstrip(_SPACE)[:1] != b"{" and _is_binary(start):
        return (
            f"it is binary data that begins with the bytes {start[:8].hex(' ')}; binary data must follow JSON with "
            "name, shape and datatype, and the header Inference-Header-Content-Length gives the length of that JSON; "
            "the data of a model's only input may come alone, with the header 'Content-Type: application/octet-stream'"
        )
    if _URLENCODED.match(start):
        first = next(iter(inputs or ()), "INPUT")
        example = json.dumps({"inputs": [{"name": first, "shape": [1], "datatype": "FP32", "data": [0]}]})
        return f"it looks like the fields of a form, name=value; expected JSON such as {example}"
    return ""


def explain_image(
    inputs: Mapping[str, TensorMetadata] | None, model: str = "MODEL", image: str = "", has_length: bool = False
) -> str:
    """Return how to send an image to a model with these inputs (None: unknown), with the command.

    `image` comes from `name_image`; `has_length` is whether the request had Inference-Header-Content-Length.
    """
    tensors = [] if inputs is None else list(inputs.values())
    if inputs is not None and not any(_takes_files(tensor) for tensor in tensors):
        return f"the model has no input that takes images; its inputs are {list_names(inputs)}"
    if inputs is not None and len(tensors) > 1:
        return explain_form(inputs, model)
    media_type = next((media_type for _, name, media_type in _IMAGES if name == image), "image/png")
    without = ", and without Inference-Header-Content-Length" if has_length else ""
    return (
        f"send it with its Content-Type{without}: curl --data-binary @FILE -H 'Content-Type: {media_type}' "
        f"{_write_url(model)}"
    )


def explain_form(inputs: Mapping[str, TensorMetadata], model: str) -> str:
    """Return how to send data for several inputs, with the command."""
    shown = list(inputs)[:_MOST_FIELDS]
    fields = " ".join(f"-F {shlex.quote(f'{name}=@FILE{index}')}" for index, name in enumerate(shown, 1))
    more = " ..." if len(inputs) > len(shown) else ""
    return f"send multipart/form-data with a part for each input: curl {fields}{more} {_write_url(model)}"


def _takes_files(tensor: TensorMetadata) -> bool:
    return tensor.images is not None or tensor.datatype == BYTES


def _write_url(model: str) -> str:
    return shlex.quote(f"http://HOST:PORT/v2/models/{quote(model, safe='')}/infer")


def explain_prefix(section: memoryview, count: int) -> str:
    """Return what is missing if the data of `count` strings begins like an image, "" for other data."""
    image = name_image(section)
    if not image:
        return ""
    own = f", here {struct.pack('<I', len(section)).hex(' ')}" if count == 1 and len(section) < 2**32 else ""
    return (
        f"; the data begins like {image}, but each element must be preceded by its length as 4 little-endian "
        f"bytes{own}, and binary_data_size includes them"
    )


def _explain_length(end: int, rest: int, header_length: int | None) -> str:
    if header_length is None:
        return (
            f"the JSON ends after {count_of(end, 'byte')} and {count_of(rest, 'byte')} more follow; data after "
            f"the JSON needs the header 'Inference-Header-Content-Length: {end}'"
        )
    return f"the JSON ends after {count_of(end, 'byte')}, but Inference-Header-Content-Length is {header_length}"


def _find_json(body: memoryview) -> int | None:
    """Return the length of the JSON request at the beginning of a body, None if there is none."""
    text = bytes(body[:_MOST_JSON]).decode("latin-1")  # one character per byte, so positions are the same
    try:
        root, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if type(root) is not dict or type(root.get("inputs")) is not list:
        return None
    return end


def _is_binary(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if len(start) - error.start >= 4 or len(start) < 256:  # not just the cut in the middle of a character
            return True
        text = start[: error.start].decode()
    return any(character < " " and character not in "\t\n\r" for character in text)
