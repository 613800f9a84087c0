"""Trial requests: files with a request that a model has to compute before it serves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovms_rest.errors import InvalidRequestError, LoadError
from ovms_rest.models.repository import read_file
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.tensors import Array, InferenceRequest, ModelMetadata, copy_array
from ovms_rest.protocol.validation import validate_inputs, validate_outputs

MAX_TRIAL_BYTES = 2**28


def read_trial(file: Path, metadata: ModelMetadata) -> dict[str, Array]:
    """Read an inference request as a client would send it; return the arrays of all inputs of the model by name.

    The file is JSON, followed by the bytes of binary tensors if it has any. Raises LoadError.
    """
    try:
        content = bytearray(read_file(file, MAX_TRIAL_BYTES))
    except LoadError as error:
        raise LoadError(f"trial request: {error}") from error
    metadata = replace(metadata, name=metadata.name or str(file.parent))  # for messages
    try:
        request = _decode(content)
        validate_outputs(request, metadata)
        arrays = validate_inputs(request, metadata)
    except InvalidRequestError as error:
        raise LoadError(f"trial request {file}: {error}") from error
    return {name: copy_array(array) for name, array in arrays.items()}


def _decode(content: bytearray) -> InferenceRequest:
    """Decode a request whose JSON ends with its last brace, as no header says where."""
    text = content.decode("latin-1")  # one character per byte
    try:
        root, end = json.JSONDecoder(strict=False).raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except (ValueError, RecursionError):
        return decode_request(memoryview(content))  # raises with the reason
    has_binary = _has_binary(root) or not text[end:].isspace()
    return decode_request(memoryview(content), end if has_binary else None)


def _has_binary(root: Any) -> bool:
    inputs = root.get("inputs") if isinstance(root, dict) else None
    return isinstance(inputs, list) and any(isinstance(item, dict) and "data" not in item for item in inputs)
