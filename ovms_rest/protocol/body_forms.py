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
    (re.compile(rb"\xff\xd8\xff"), "a JPEG file"),
    (re.compile(rb"\x89PNG"), "a PNG file"),
    (re.compile(rb"GIF8[79]a"), "a GIF file"),
    (re.compile(rb"RIFF.{1,4}WEBP", re.DOTALL), "a WebP file"),
    # The file size, and 4 zero bytes.
    (re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "a BMP file"),
    (re.compile(rb"P[1-6][ \t\r\n#]"), "a PNM file"),
)
_MULTIPART = re.compile(rb"--[^\r\n]{1,70}\r?\nContent-", re.IGNORECASE)
_URLENCODED = re.compile(rb"[A-Za-z_][\w.+-]*=")
# How far into the body the end of the JSON is searched for.
_MOST_JSON = 2**16
_SPACE = b" \t\r\n"


def name_image(data: memoryview) -> str:
    """Return the image format whose signature the data begins with, "" for other data."""
    start = bytes(data[:64])
    return next((name for signature, name in _IMAGES if signature.match(start)), "")


def explain_body(body: memoryview, header_length: int | None, model: ModelMetadata | None) -> str:
    """Return what a body is whose first `header_length` bytes (None: all) are not valid JSON, "" if that is unclear."""
    inputs, name = (None, "MODEL") if model is None else (model.inputs, model.name)
    part = body if header_length is None else body[:header_length]
    end = _find_json(body)
    if end is not None and (end > len(part) or bytes(part[end : end + 256]).strip(_SPACE)):
        return _explain_length(end, len(body) - end, header_length)
    start = bytes(part[:256])
    if image := name_image(part):
        return f"it is {image}; {explain_image(inputs, name)}"
    if _MULTIPART.match(start):
        return f"it is multipart/form-data, as `curl -F` sends it; {explain_image(inputs, name)}"
    if start.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; send the header 'Content-Encoding: gzip'"
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte order mark, expected UTF-8 without one"
    if start.lstrip(_SPACE)[:1] != b"{" and _is_binary(start):
        return (
            f"it is binary data that begins with the bytes {start[:8].hex(' ')}; binary data must follow JSON with "
            "name, shape and datatype, and the header Inference-Header-Content-Length gives the length of that JSON"
        )
    if _URLENCODED.match(start):
        first = next(iter(inputs or ()), "INPUT")
        example = json.dumps({"inputs": [{"name": first, "shape": [1], "datatype": "FP32", "data": [0]}]})
        return f"it looks like the fields of a form, name=value; expected JSON such as {example}"
    return ""


def explain_image(inputs: Mapping[str, TensorMetadata] | None, model: str = "MODEL") -> str:
    """Return how to send an image to a model with these inputs (None: unknown), with the command."""
    tensors = [] if inputs is None else list(inputs.values())
    names = [tensor.name for tensor in tensors if tensor.images is not None]
    names += [tensor.name for tensor in tensors if tensor.datatype == BYTES]
    if inputs is not None and not names:
        return f"the model has no input that takes images; its inputs are {list_names(inputs)}"
    name = names[0] if names else "INPUT"
    text = json.dumps({"inputs": [{"name": name, "shape": [1], "datatype": BYTES}]}, separators=(",", ":"))
    url = f"http://HOST:PORT/v2/models/{quote(model, safe='')}/infer"
    others = [tensor.name for tensor in tensors if tensor.name != name]
    return (
        "send JSON, the length of the image as 4 little-endian bytes, and the image, with the length of the JSON in "
        "the header Inference-Header-Content-Length. For FILE: n=$(wc -c <FILE); "
        f"(printf %s {shlex.quote(text)}; "
        r"""printf "$(printf '\\%03o' $((n&255)) $((n>>8&255)) $((n>>16&255)) $((n>>24)))"; cat FILE) | """
        f"curl --data-binary @- -H 'Inference-Header-Content-Length: {len(text)}' {shlex.quote(url)}"
        + (f" (the JSON needs the model's other inputs too: {list_names(others)})" if others else "")
    )


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
