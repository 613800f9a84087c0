"""Requests with the data of a case, as JSON and as binary, and the differences of their responses."""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx_reference import Arrays, Reference, assign, differ
from service import Answer, Service

DATATYPES = {
    "boolean": ("BOOL", np.bool_),
    "i8": ("INT8", np.int8),
    "i16": ("INT16", np.int16),
    "i32": ("INT32", np.int32),
    "i64": ("INT64", np.int64),
    "u8": ("UINT8", np.uint8),
    "u16": ("UINT16", np.uint16),
    "u32": ("UINT32", np.uint32),
    "u64": ("UINT64", np.uint64),
    "f16": ("FP16", np.float16),
    "bf16": ("BF16", ml_dtypes.bfloat16),
    "f32": ("FP32", np.float32),
    "f64": ("FP64", np.float64),
    "string": ("BYTES", object),
}


def find_faults(service: Service, model: str, sets: Sequence[Arrays], reference: Reference) -> Iterator[str]:
    """Send each data set as binary and as JSON; yield a line for each refusal or difference."""
    answer = service.get(f"/v2/models/{model}")
    if answer.status != 200:
        yield f"is not served: {service.get(f'/v2/models/{model}/ready').json()['error']}"
        return
    known = answer.json()
    inputs, outputs = (_find_names(known[kind], getattr(reference, kind)) for kind in ("inputs", "outputs"))
    for arrays, results in zip(sets, reference.results, strict=True):
        given = dict(zip(inputs, assign(reference.inputs, arrays), strict=True))
        expected = dict(zip(outputs, results, strict=True))
        kinds = [DATATYPES[kind][0] for _, kind in reference.inputs]
        yield from _compare("binary", _infer_binary(service, model, given, kinds), expected, reference.is_random)
        if all(map(_is_json, given.values())):
            yield from _compare("JSON", _infer_json(service, model, given, kinds), expected, reference.is_random)


def _find_names(tensors: list[dict[str, Any]], ports: Any) -> list[str]:
    """Return the service's names of the model's tensors, in the model's order."""
    served = {tensor["name"]: tensor["datatype"] for tensor in tensors}
    assert len(served) == len(ports)
    names = [next(name for name in served if name in known) for known, _ in ports]
    assert [served[name] for name in names] == [DATATYPES[kind][0] for _, kind in ports]
    return names


def _infer_binary(service: Service, model: str, arrays: Arrays, datatypes: Sequence[str]) -> Answer:
    sections = [_pack(array) for array in arrays.values()]
    tensors = [
        {"name": name, "shape": array.shape, "datatype": datatype, "parameters": {"binary_data_size": len(section)}}
        for (name, array), datatype, section in zip(arrays.items(), datatypes, sections, strict=True)
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return service.infer(model, head + b"".join(sections), inference_header_content_length=str(len(head)))


def _infer_json(service: Service, model: str, arrays: Arrays, datatypes: Sequence[str]) -> Answer:
    tensors = [
        {"name": name, "shape": array.shape, "datatype": datatype, "data": _to_list(array)}
        for (name, array), datatype in zip(arrays.items(), datatypes, strict=True)
    ]
    return service.infer(model, {"inputs": tensors})


def _compare(form: str, answer: Answer, expected: Arrays, is_random: bool) -> Iterator[str]:
    if answer.status != 200:
        yield f"{form}: {answer.status}: {answer.json()['error']}"
        return
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    at = length
    for tensor in json.loads(answer.body[:length])["outputs"]:
        name, wanted = tensor["name"], expected[tensor["name"]]
        dtype = next(dtype for datatype, dtype in DATATYPES.values() if datatype == tensor["datatype"])
        if form == "binary":
            section = answer.body[at : at + tensor["parameters"]["binary_data_size"]]
            at += len(section)
            flat = _unpack(section) if dtype is object else np.frombuffer(section, dtype)
        else:
            flat = _to_array(tensor["data"], dtype)
            wanted = _as_json_shows(wanted)
        if tuple(tensor["shape"]) != wanted.shape or (not is_random and differ(flat.reshape(wanted.shape), wanted)):
            yield f"{form}: output {name!r} is {flat.tolist()[:8]}, expected {wanted.tolist()}"[:400]
    assert at == len(answer.body)


def _pack(array: np.ndarray) -> bytes:
    if array.dtype.kind not in "OUS":
        return array.tobytes()
    return b"".join(struct.pack("<I", len(element)) + element for element in map(_encode, array.flat))


def _unpack(section: bytes) -> np.ndarray:
    elements = []
    while section:
        (size,) = struct.unpack("<I", section[:4])
        elements.append(section[4 : 4 + size])
        section = section[4 + size :]
    return np.array(elements, object)


def _encode(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def _is_json(array: np.ndarray) -> bool:
    """Return whether JSON can express an array: NaN and the infinities have no form there."""
    return array.dtype.kind in "OUSbiu" or bool(np.isfinite(array).all())


def _to_list(array: np.ndarray) -> list[Any]:
    if array.dtype.kind in "OUS":
        return [_encode(element).decode() for element in array.flat]
    return array.ravel().tolist()


def _to_array(data: list[Any], dtype: Any) -> np.ndarray:
    if dtype is object:
        return np.array([element.encode() for element in data], object)
    if np.dtype(dtype).kind in "biu":
        return np.array(data, dtype)
    return np.array([np.nan if number is None else number for number in data], np.float64).astype(dtype)


def _as_json_shows(array: np.ndarray) -> np.ndarray:
    """Return an array as JSON expresses it: with null, here NaN, for the infinities."""
    if array.dtype.kind in "Obiu":
        return array
    return np.where(np.isinf(array), array.dtype.type(np.nan), array)
