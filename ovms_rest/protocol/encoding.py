"""From an InferenceResponse to the bytes of its body: the JSON, then the binary tensors."""

from typing import Any

import numpy as np
import orjson

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.datatypes import DATATYPES
from ovms_rest.protocol.strings import BytesArray, pack
from ovms_rest.protocol.tensors import InferenceResponse, Tensor

Buffer = bytes | memoryview


def encode_response(response: InferenceResponse) -> tuple[bytes, list[Buffer]]:
    """Return the JSON of a response and, in the order of the outputs, the data of binary outputs that are not empty.

    The data of contiguous tensors are views on their memory. Raises InvalidRequestError for a string that JSON cannot
    hold.
    """
    outputs, sections = [], []
    for tensor, binary in response.outputs:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.array.shape}
        if binary:
            section = _encode_binary(tensor)
            # Clients in C++ fail at any other key in the parameters of an output.
            output["parameters"] = {"binary_data_size": len(section)}
            if section:
                sections.append(section)
        else:
            output["data"] = _encode_json(tensor)
        outputs.append(output)
    root: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        root["id"] = response.id
    root["outputs"] = outputs
    return orjson.dumps(root, option=orjson.OPT_SERIALIZE_NUMPY), sections


def _encode_binary(tensor: Tensor) -> Buffer:
    if isinstance(tensor.array, BytesArray):
        return pack(tensor.array)
    return np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data  # numpy exports no buffer of bfloat16


def _encode_json(tensor: Tensor) -> Any:
    """Return the elements for orjson, which writes shortest floats and null for NaN (protocol/README.md section 5)."""
    if isinstance(tensor.array, BytesArray):
        return _encode_strings(tensor.name, tensor.array)
    return DATATYPES[tensor.datatype].widen(np.ascontiguousarray(tensor.array).reshape(-1))


def _encode_strings(name: str, array: BytesArray) -> list[str]:
    strings = []
    for index, element in enumerate(array.elements()):
        try:
            strings.append(element.decode())
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"output {name!r}: string {index} is not valid UTF-8 and cannot be returned in JSON; ask for binary "
                "by parameters.binary_data of the output or parameters.binary_data_output of the request; if the body "
                "is only the data of an input, ask by 'Inference-Header-Content-Length: 0'"
            ) from error
    return strings


def encode_error(message: str) -> bytes:
    """Return the body of an error response."""
    return orjson.dumps({"error": message})
