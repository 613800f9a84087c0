"""Requests to decode, and the error messages for invalid ones."""

import json

import pytest

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.tensors import Dim

VALID = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}
BINARY = {"name": "x", "shape": [2], "datatype": "INT16"}
STRINGS = {"name": "s", "shape": [1], "datatype": "BYTES"}
HEADER = "Inference-Header-Content-Length"
ANY = Dim(0, None)

INTEGERS = {f"INT{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)}
INTEGERS |= {f"UINT{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)}


def decode(root, binary=None):
    """Decode a request, given as a value or JSON text, with the `binary` part after the JSON."""
    head = root if isinstance(root, bytes) else json.dumps(root).encode()
    if binary is None:
        return decode_request(memoryview(head))
    return decode_request(memoryview(head + binary), len(head))


def decode_inputs(*items, binary=None):
    return [tensor.array for tensor in decode({"inputs": items}, binary).inputs]


def refused(function, *arguments, **keys):
    """Return the message of the InvalidRequestError that a call raises."""
    with pytest.raises(InvalidRequestError) as caught:
        function(*arguments, **keys)
    return str(caught.value)


def refusal(root, binary=None):
    return refused(decode, root, binary)


def refusal_of_input(item, binary=None):
    return refusal({"inputs": [item]}, binary)


def written(datatype, shape, data):
    """Return a request with the given text as `data`."""
    return b'{"inputs":[{"name":"x","shape":%s,"datatype":"%s","data":%s}]}' % (
        json.dumps(shape).encode(),
        datatype.encode(),
        data.encode(),
    )


def decode_numbers(datatype, text):
    """Return the numbers of a text such as `1, 2`, decoded as a datatype."""
    return decode(written(datatype, [text.count(",") + 1], f"[{text}]")).inputs[0].array


def without(item, key):
    return {name: value for name, value in item.items() if name != key}


def nested(levels, brackets=b"[]"):
    """Return nested arrays, or nested objects with the key "k"."""
    if brackets == b"[]":
        return b"[" * levels + b"]" * levels
    return b'{"k":' * (levels - 1) + b"{}" + b"}" * (levels - 1)
