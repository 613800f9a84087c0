"""Checks whether a request fits a model, and the arrays for the model's inputs."""

from functools import partial

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.classification import refuse_strings
from ovms_rest.protocol.datatypes import BOOL, BYTES, DATATYPES, UINT8
from ovms_rest.protocol.strings import BytesArray, measure_matrix, to_matrix
from ovms_rest.protocol.tensors import Array, InferenceRequest, ModelMetadata, RequestedOutput, Tensor, TensorMetadata
from ovms_rest.protocol.words import count_of, join, list_names, quote

_names = partial(list_names, most=20)
# The datatypes in the spelling of a model's configuration.
_PRECISIONS = {name: name.lower() for name in DATATYPES if name != BOOL}


def validate_inputs(request: InferenceRequest, metadata: ModelMetadata) -> dict[str, Array]:
    """Return the array for every input of the model, by name.

    Raises InvalidRequestError unless the request has each input exactly once, with its datatype and a shape that fits.
    """
    arrays: dict[str, Array] = {}
    for tensor in request.inputs:
        expected = metadata.inputs.get(tensor.name)
        if expected is None:
            raise unknown_input(tensor.name, metadata)
        if tensor.name in arrays:
            raise InvalidRequestError(f"input {tensor.name!r} is given more than once")
        arrays[tensor.name] = _fit(tensor, expected)
    if len(arrays) != len(metadata.inputs):
        missing = metadata.inputs.keys() - arrays.keys()
        noun, verb = ("input", "is") if len(missing) == 1 else ("inputs", "are")
        raise InvalidRequestError(
            f"{noun} {_names(sorted(missing))} of model {metadata.name!r} {verb} missing from the request"
        )
    return arrays


def unknown_input(name: str, metadata: ModelMetadata) -> InvalidRequestError:
    """Return the error for an input that a model does not have."""
    return InvalidRequestError(f"model {metadata.name!r} has no input {quote(name)}; it has {_names(metadata.inputs)}")


def validate_outputs(request: InferenceRequest, metadata: ModelMetadata) -> tuple[RequestedOutput, ...]:
    """Return the outputs of the response in order: the requested ones, or all in alphabetical order.

    Raises InvalidRequestError for an unknown or repeated name, and for the classes of an output of strings.
    """
    if not request.outputs:
        return metadata.all_outputs[request.binary_output]
    seen = set()
    for name, _, classification in request.outputs:
        expected = metadata.outputs.get(name)
        if expected is None:
            raise InvalidRequestError(
                f"model {metadata.name!r} has no output {quote(name)}; it has {_names(metadata.outputs)}"
            )
        if name in seen:
            raise InvalidRequestError(f"output {name!r} is requested more than once")
        seen.add(name)
        if classification and expected.datatype == BYTES:
            refuse_strings(name)
    return request.outputs


def _fit(tensor: Tensor, expected: TensorMetadata) -> Array:
    if tensor.datatype != expected.datatype:
        if expected.images is not None and isinstance(tensor.array, BytesArray):
            return expected.images.read(tensor.array, f"input {tensor.name!r}")
        if takes_strings(expected) and isinstance(tensor.array, BytesArray):
            return _fit_strings(tensor, tensor.array, expected)
        raise InvalidRequestError(
            f"input {tensor.name!r}: datatype is {tensor.datatype}, the model takes {expected.datatype}"
            f"{_suggest_precision(tensor, expected)}"
        )
    if not expected.holds(tensor.shape):
        raise InvalidRequestError(
            f"input {tensor.name!r}: shape is {join(tensor.shape)}, the model takes {expected.describe_shape()}"
            f"{_explain_layout(tensor.shape, expected)}"
        )
    return tensor.array


def _suggest_precision(tensor: Tensor, expected: TensorMetadata) -> str:
    """Return a hint at the setting that would have OpenVINO convert the numbers, "" without one."""
    is_number = _PRECISIONS.keys() >= {tensor.datatype, expected.datatype}
    if expected.origin is None or not expected.origin.has_precision or not is_number:
        return ""
    return (
        f'; "precision": "{_PRECISIONS[tensor.datatype]}:{_PRECISIONS[expected.datatype]}" in the configuration of the '
        f"model makes it take {tensor.datatype}"
    )


def _explain_layout(shape: tuple[int, ...], expected: TensorMetadata) -> str:
    """Return a hint for a shape in the model's own layout where clients send another, "" for other shapes."""
    origin = expected.origin
    if origin is None or not origin.layout or not TensorMetadata("", expected.datatype, origin.dims).holds(shape):
        return ""
    client, model = origin.layout.split(":")
    return (
        f'; {join(shape)} is in the layout of the model itself, {model}, but its configuration has "layout": '
        f'"{origin.layout}", so clients send {client}'
    )


def takes_strings(expected: TensorMetadata) -> bool:
    """Return whether an input is a UINT8 matrix, which also takes BYTES (protocol/README.md section 7)."""
    return expected.datatype == UINT8 and expected.dims is not None and len(expected.dims) == 2


def _fit_strings(tensor: Tensor, strings: BytesArray, expected: TensorMetadata) -> Array:
    label = f"input {tensor.name!r}"
    if len(tensor.shape) != 1 or tensor.shape == (0,):
        raise InvalidRequestError(
            f"{label}: {BYTES} for this {UINT8} input must have shape [n] with n at least 1, not {join(tensor.shape)}"
        )
    shape = measure_matrix(strings, label)
    if not expected.holds(shape):
        raise InvalidRequestError(
            f"{label}: shape is {join(shape)} once its strings are padded with NULs (the longest has "
            f"{count_of(shape[1] - 1, 'byte')}), the model takes {expected.describe_shape()}"
        )
    return to_matrix(strings, label)
