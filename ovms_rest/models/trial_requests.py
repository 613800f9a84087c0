"""The request in a file that a model is tried with before it serves."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovms_rest.errors import InvalidRequestError, LoadError
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.tensors import Array, InferenceRequest, ModelMetadata, copy_array
from ovms_rest.protocol.validation import validate_inputs, validate_outputs

MAX_TRIAL_BYTES = 2**28


def read_trial(file: Path, metadata: ModelMetadata) -> dict[str, Array]:
    """Read an inference request as a client would send it; return the array for every input of the model, by name.

    The file is JSON, with the bytes of the binary tensors behind it if it has any. Raises LoadError.
    """
    content = _read(file)
    metadata = replace(metadata, name=metadata.name or str(file.parent))  # in messages
    try:
        request = _decode(content)
        validate_outputs(request, metadata)
        arrays = validate_inputs(request, metadata)
    except InvalidRequestError as error:
        raise LoadError(f"trial request {file}: {error}") from error
    return {name: copy_array(array) for name, array in arrays.items()}


def _read(file: Path) -> bytearray:
    if not os.path.isfile(file):  # opening a pipe would take for ever
        raise LoadError(f"trial request {file}: there is no such file")
    try:
        with file.open("rb") as stream:
            content = bytearray(stream.read(MAX_TRIAL_BYTES + 1))
    except OSError as error:
        raise LoadError(f"trial request {file}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_TRIAL_BYTES:
        raise LoadError(f"trial request {file}: has more than {MAX_TRIAL_BYTES} bytes")
    return content


def _decode(content: bytearray) -> InferenceRequest:
    """Decode a request whose JSON ends where its braces do, as there is no header that says where."""
    text = content.decode("latin-1")  # a character for each byte
    try:
        root, end = json.JSONDecoder(strict=False).raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except (ValueError, RecursionError):
        return decode_request(memoryview(content))  # which says what is wrong
    has_binary = _has_binary(root) or not text[end:].isspace()
    return decode_request(memoryview(content), end if has_binary else None)


def _has_binary(root: Any) -> bool:
    inputs = root.get("inputs") if isinstance(root, dict) else None
    return isinstance(inputs, list) and any(isinstance(item, dict) and "data" not in item for item in inputs)
