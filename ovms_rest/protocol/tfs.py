"""TensorFlow Serving's REST API: its requests for predictions, and its responses (protocol/README.md section 11).

Whatever the bytes are, decoding raises only InvalidRequestError, for a mistake of the client, and BodyTooLargeError for
JSON that would take too much memory. A request in the row form lists instances, one in the column form has whole
tensors; the response has the form of its request.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NoReturn

import numpy as np
import orjson
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.datatypes import BYTES, DATATYPES, Datatype
from ovms_rest.protocol.decoding import (
    DEFAULT_LIMITS,
    LARGE_SIZE,
    MANY_VALUES,
    MAX_DEPTH,
    MAX_RANK,
    check_unknown,
    read_numbers,
    read_strings,
    without_garbage_collection,
)
from ovms_rest.protocol.json_memory import NUMBERS, OBJECTS, BodyLimits, check_memory
from ovms_rest.protocol.numbers import NestedNumbers, UnsuitedError, looks_numeric, parse_nested, to_array
from ovms_rest.protocol.strings import MAX_ELEMENTS, BytesArray
from ovms_rest.protocol.tensors import InferenceRequest, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.validation import takes_strings, unknown_input
from ovms_rest.protocol.words import (
    count_of,
    cut,
    describe,
    explain_invalid_json,
    explain_utf8_error,
    join,
    list_names,
    quote,
    show,
)

SIGNATURE = "serving_default"

_ROWS, _COLUMNS = "instances", "inputs"
_FORMS = frozenset({_ROWS, _COLUMNS})
_KEYS = frozenset({*_FORMS, "signature_name"})
# A name that ends so makes an output of strings one of bytes, which are written in base64.
_BYTES_SUFFIX = "_bytes"
# Rows, and values that are not finite, that are written at a time, as each takes objects of Python's meanwhile.
_AT_A_TIME = 4096
_MAX_INTEGER, _MIN_INTEGER = 2**64 - 1, -(2**63)

# Datatypes in TensorFlow's words (tensorflow/core/framework/types.proto).
_DTYPES = {
    "BOOL": "DT_BOOL",
    "INT8": "DT_INT8",
    "INT16": "DT_INT16",
    "INT32": "DT_INT32",
    "INT64": "DT_INT64",
    "UINT8": "DT_UINT8",
    "UINT16": "DT_UINT16",
    "UINT32": "DT_UINT32",
    "UINT64": "DT_UINT64",
    "FP16": "DT_HALF",
    "BF16": "DT_BFLOAT16",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "BYTES": "DT_STRING",
}


# --- Requests


def decode_prediction(
    body: memoryview, model: ModelMetadata, limits: BodyLimits = DEFAULT_LIMITS, large_size: int = LARGE_SIZE
) -> InferenceRequest:
    """Decode the body of a request for a prediction; the shapes of its tensors are those of its nested arrays.

    Values of the JSON that may take more than `limits` allows raise BodyTooLargeError. JSON of `large_size` bytes and
    more is tried as numbers first, which changes only the time.
    """
    if len(body) < large_size:
        return _read_root(*_parse(body), model)
    if looks_numeric(body):
        check_memory(body, NUMBERS, limits.json_values)
        request = _decode_numeric(body, model)
        if request is not None:
            return request
    check_memory(body, OBJECTS, limits.json_values)
    if len(body) < MANY_VALUES:
        return _read_root(*_parse(body), model)
    with without_garbage_collection():
        return _read_root(*_parse(body), model)


def _decode_numeric(body: memoryview, model: ModelMetadata) -> InferenceRequest | None:
    """Return a request whose arrays are numbers, decoded without an object for each; None when orjson must decide."""
    try:
        return _read_root(parse_nested(body, _FORMS, MAX_DEPTH), False, model)
    except (UnsuitedError, InvalidRequestError):  # only the path through orjson writes messages
        return None


def _parse(body: memoryview) -> tuple[Any, bool]:
    """Parse JSON; return it, and whether it has the tokens NaN and Infinity, which JSON does not know."""
    if not body:
        raise InvalidRequestError("the request is empty, expected a JSON object with the key 'instances' or 'inputs'")
    try:
        return orjson.loads(body), False
    except orjson.JSONDecodeError as error:
        text = bytes(body)
        if b"NaN" in text or b"Infinity" in text:
            return _parse_tokens(text), True
        raise InvalidRequestError(f"the request is not valid JSON: {explain_invalid_json(text, error)}") from error


def _parse_tokens(text: bytes) -> Any:
    """Parse JSON with the tokens NaN, Infinity and -Infinity."""
    try:
        return json.loads(text.decode(), parse_int=_parse_integer, parse_float=_parse_float)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the request is not valid JSON: {explain_utf8_error(error)}") from error
    except RecursionError as error:
        raise InvalidRequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise InvalidRequestError(f"the request is not valid JSON: {error}") from error


def _parse_integer(text: str) -> int | float:
    """Return an integer of JSON as orjson does: as a float if it has more than 64 bits."""
    number = int(text) if len(text) <= len(str(_MIN_INTEGER)) else math.inf
    return number if _MIN_INTEGER <= number <= _MAX_INTEGER else _parse_float(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {cut(text)} is beyond the range of FP64")
    return number


def _read_root(root: Any, has_tokens: bool, model: ModelMetadata) -> InferenceRequest:
    if type(root) is not dict:
        raise InvalidRequestError(
            f"the request is {describe(root)}, expected an object with the key 'instances' or 'inputs'"
        )
    check_unknown(root, _KEYS, 1)
    _check_signature(root)
    forms = root.keys() & _FORMS
    if len(forms) != 1:
        found = "both 'instances' and 'inputs'" if forms else "neither 'instances' nor 'inputs'"
        raise InvalidRequestError(
            f"the request has {found}, expected one of them: 'instances' with a list of rows, or 'inputs' with whole "
            "tensors"
        )
    is_rows = _ROWS in forms
    values = _read_rows(root[_ROWS], model) if is_rows else _read_columns(root[_COLUMNS], model)
    tensors = []
    strings = 0
    for expected, value, place in values:
        tensor = _read_tensor(value, expected, place, has_tokens)
        if isinstance(tensor.array, BytesArray):
            strings += math.prod(tensor.shape)
            if strings > MAX_ELEMENTS:
                raise InvalidRequestError(
                    f"{place}: the request has {strings} strings up to here, at most {MAX_ELEMENTS} are allowed"
                )
        tensors.append(tensor)
    return InferenceRequest(tuple(tensors), is_rows=is_rows)


def _check_signature(root: dict[str, Any]) -> None:
    signature = root.get("signature_name", SIGNATURE)
    if type(signature) is not str:
        raise InvalidRequestError(f"signature_name is {describe(signature)}, expected a string")
    if signature not in (SIGNATURE, ""):
        raise InvalidRequestError(
            f"signature_name is {show(signature)}, but models have the one signature '{SIGNATURE}' here"
        )


class _Place:
    """Where a tensor is in a request: a value below `root`, in the row form that of `key` in each item."""

    __slots__ = ("_key", "_root", "shape")

    def __init__(self, root: str, key: str = "") -> None:
        self._root = root
        self._key = f"[{key!r}]" if key else ""
        self.shape: tuple[int, ...] = ()  # of the tensor, once it is known

    def __str__(self) -> str:
        return f"{self._root}{self._key}"

    def at(self, index: int, shape: Sequence[int]) -> str:
        """Return the place of a value by its index in row-major order among those nested in arrays of a shape."""
        indexes = [f"[{int(number)}]" for number in np.unravel_index(index, shape)] if shape else []
        indexes[1:1] = [self._key]
        return self._root + "".join(indexes) if shape else str(self)

    def element(self, index: int) -> str:
        return self.at(index, self.shape)


_Value = tuple[TensorMetadata, Any, _Place]


def _is_base64(value: Any) -> bool:
    """Return whether a value is {"b64": "..."}, which is an element, and no object of named inputs."""
    return type(value) is dict and len(value) == 1 and type(value.get("b64")) is str


def _only_input(model: ModelMetadata, form: str, expected: str) -> TensorMetadata:
    """Return the input that a value without a name is for."""
    if len(model.inputs) != 1:
        example = ", ".join(f"{show(name)}: ..." for name in list(model.inputs)[:10])
        raise InvalidRequestError(
            f"{form} has no names, but model {model.name!r} has {count_of(len(model.inputs), 'input')}: "
            f"{list_names(model.inputs)}; expected {expected} {{{example}}}"
        )
    (tensor,) = model.inputs.values()
    return tensor


def _read_rows(instances: Any, model: ModelMetadata) -> Iterator[_Value]:
    """Yield every tensor of the row form: an instance is a row of the only input, or an object with rows of all."""
    if type(instances) is NestedNumbers:
        yield _only_input(model, _ROWS, "a list of objects"), instances, _Place(_ROWS)
        return
    if type(instances) is not list or not instances:
        found = "empty" if instances == [] else describe(instances)
        raise InvalidRequestError(f"instances is {found}, expected a list of one or more instances")
    first = instances[0]
    if type(first) is not dict or _is_base64(first):
        yield _only_input(model, _ROWS, "a list of objects"), instances, _Place(_ROWS)
        return
    if set(map(type, instances)) != {dict}:
        index = next(index for index, instance in enumerate(instances) if type(instance) is not dict)
        raise InvalidRequestError(
            f"instances[{index}] is {describe(instances[index])}, but instances[0] is an object; expected objects with "
            f"the same keys"
        )
    for name in first:
        if name not in model.inputs:
            raise unknown_input(name, model)
        try:
            rows = [instance[name] for instance in instances]
        except KeyError:
            index = next(index for index, instance in enumerate(instances) if name not in instance)
            raise InvalidRequestError(
                f"instances[{index}] has no key {quote(name)}, but instances[0] does; expected the same keys in all"
            ) from None
        yield model.inputs[name], rows, _Place(_ROWS, name)
    if set(map(len, instances)) != {len(first)}:
        index = next(index for index, instance in enumerate(instances) if len(instance) != len(first))
        name = next(name for name in instances[index] if name not in first)
        raise InvalidRequestError(
            f"instances[{index}] has the key {quote(name)}, but instances[0] does not; expected the same keys in all"
        )


def _read_columns(inputs: Any, model: ModelMetadata) -> Iterator[_Value]:
    """Yield every tensor of the column form: the value of the only input, or an object of the values by name."""
    if type(inputs) is list and inputs and type(inputs[0]) is dict and "datatype" in inputs[0]:
        raise InvalidRequestError(
            "inputs is a list of tensors as in KServe v2, whose requests go to POST /v2/models/{name}/infer; expected "
            "the values of the only input, or an object with the values by the names of the inputs"
        )
    if type(inputs) is not dict or _is_base64(inputs):
        yield _only_input(model, _COLUMNS, "an object"), inputs, _Place(_COLUMNS)
        return
    for name, value in inputs.items():
        if name not in model.inputs:
            raise unknown_input(name, model)
        yield model.inputs[name], value, _Place(f"{_COLUMNS}[{name!r}]")


def _read_tensor(value: Any, expected: TensorMetadata, place: _Place, has_tokens: bool) -> Tensor:
    """Return a value, an element or arrays of elements, as a tensor."""
    name, datatype = expected.name, expected.datatype
    if type(value) is NestedNumbers:
        if len(value.shape) > MAX_RANK:
            raise UnsuitedError
        return Tensor(name, datatype, to_array(value.numbers, datatype, value.shape))
    if type(value) is list:
        elements, place.shape, types = _flatten(value, place)
    else:
        elements, types = [value], {type(value)}
    if datatype == BYTES:
        return Tensor(name, BYTES, _strings(elements, types, place))
    if elements and types <= _types_of_strings(expected):
        place.shape = place.shape or (1,)
        return Tensor(name, BYTES, _strings(elements, types, place))
    row = DATATYPES[datatype]
    if expected.images is not None and not types <= row.json_types:
        _refuse_image(elements, row, place)
    read = _read_tokens if has_tokens and float in row.json_types else read_numbers
    return Tensor(name, datatype, read(elements, types, row, place).reshape(place.shape))


_NOTHING: frozenset[type] = frozenset()
_BASE64: Final = frozenset({dict})
_STRINGS: Final = frozenset({dict, str})


def _types_of_strings(expected: TensorMetadata) -> frozenset[type]:
    """Return the types of the elements that a numeric input takes as BYTES: for images, or for rows of characters."""
    return _BASE64 if expected.images is not None else _STRINGS if takes_strings(expected) else _NOTHING


def _refuse_image(elements: list[Any], datatype: Datatype, place: _Place) -> NoReturn:
    """Refuse the first element of an input of images that is not a number; it may be the base64 without an object."""
    index, element = next((index, item) for index, item in enumerate(elements) if type(item) not in datatype.json_types)
    raise InvalidRequestError(
        f"{place.element(index)} is {show(element)}, expected {datatype.json_kind}, or encoded images, each as "
        '{"b64": "..."}'
    )


def _strings(elements: list[Any], types: set[type], place: _Place) -> BytesArray:
    try:
        return BytesArray.of(read_strings(elements, types, place), place.shape)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which Python's parser lets through
        raise InvalidRequestError(
            f"{place}: the string {show(error.object)} is not valid Unicode: {error.reason}"
        ) from error


def _flatten(value: list[Any], place: _Place) -> tuple[list[Any], tuple[int, ...], set[type]]:
    """Return the elements of nested arrays, their shape, and the types of the elements.

    Raises InvalidRequestError unless all arrays of one level have the same length.
    """
    shape = [len(value)]
    while list in (types := set(map(type, value))):
        if len(types) > 1:
            _refuse_mixture(value, shape, place)
        sizes = set(map(len, value))
        if len(sizes) > 1:
            _refuse_lengths(value, shape, place)
        if len(shape) == MAX_RANK:
            raise InvalidRequestError(f"{place} is nested deeper than the {MAX_RANK} dims that a tensor may have")
        shape += sizes
        value = list(chain.from_iterable(value))
    return value, tuple(shape), types


def _refuse_mixture(items: list[Any], shape: list[int], place: _Place) -> NoReturn:
    first = type(items[0]) is list
    index, item = next((index, item) for index, item in enumerate(items) if (type(item) is list) is not first)
    raise InvalidRequestError(
        f"{place.at(index, shape)} is {describe(item)}, but {place.at(0, shape)} is {describe(items[0])}; "
        "the arrays of a tensor must be nested equally"
    )


def _refuse_lengths(items: list[Any], shape: list[int], place: _Place) -> NoReturn:
    index, item = next((index, item) for index, item in enumerate(items) if len(item) != len(items[0]))
    raise InvalidRequestError(
        f"{place.at(index, shape)} has {count_of(len(item), 'element')}, but {place.at(0, shape)} has {len(items[0])}; "
        "the arrays of a tensor must have the same length"
    )


def _read_tokens(elements: list[Any], types: set[type], datatype: Datatype, place: _Place) -> NDArray[Any]:
    """Return elements as floats like `read_numbers`; NaN and infinities are elements too."""
    if not types <= datatype.json_types:
        return read_numbers(elements, types, datatype, place)  # refuses them
    values = np.array(elements, np.float64)
    special = ~np.isfinite(values)
    finite = [0.0 if is_special else element for element, is_special in zip(elements, special, strict=True)]
    array = read_numbers(finite, types, datatype, place)
    array[special] = values[special]
    return array


# --- Responses


def measure_structure(outputs: Sequence[Tensor], is_rows: bool) -> int:
    """Return the bytes that a response has beyond its elements and a comma after each."""
    size = 0
    for tensor in outputs:
        lists = 1
        for dim in tensor.shape[:-1]:
            lists *= dim
            size += 2 * lists
    if is_rows and len(outputs) > 1 and outputs[0].shape:
        size += outputs[0].shape[0] * (2 + sum(len(tensor.name.encode()) + 3 for tensor in outputs))
    return size


def encode_prediction(outputs: Sequence[Tensor], is_rows: bool) -> bytes:
    """Return the JSON of a response with these outputs: `predictions`, a row for each instance, or `outputs`.

    Raises InvalidRequestError for strings that JSON cannot hold, and for outputs that are not rows of one batch.
    """
    if is_rows:
        return b'{"predictions":%b}' % _encode_rows(outputs)
    values = {tensor.name: _encode_values(tensor) for tensor in outputs}
    return _dumps({"outputs": values if len(values) != 1 else next(iter(values.values()))})


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _encode_rows(outputs: Sequence[Tensor]) -> bytes:
    """Return the list of predictions: values if the model has one output, else objects by the names of the outputs."""
    count = _count_rows(outputs)
    if len(outputs) == 1:
        return _dumps(_encode_values(outputs[0]))
    names = [tensor.name for tensor in outputs]
    parts = []
    for begin in range(0, count, _AT_A_TIME):
        tensors = [_cut_rows(tensor, begin, begin + _AT_A_TIME) for tensor in outputs]
        rows = zip(*map(_list_rows, tensors), strict=True)
        parts.append(_dumps([dict(zip(names, row, strict=True)) for row in rows])[1:-1])
    return b"[%b]" % b",".join(parts)


def _count_rows(outputs: Sequence[Tensor]) -> int:
    """Return the number of rows that all outputs have."""
    counts = {tensor.name: tensor.shape[0] if tensor.shape else None for tensor in outputs}
    first = next(iter(counts.values()), 0)
    if first is None or len(set(counts.values())) > 1:
        shapes = ", ".join(f"{tensor.name!r} {join(tensor.shape)}" for tensor in outputs[:10])
        raise InvalidRequestError(
            f"the outputs are not rows of one batch, their shapes are {shapes}; a request in the column form, with "
            "'inputs' instead of 'instances', returns them"
        )
    return first


def _cut_rows(tensor: Tensor, begin: int, end: int) -> Tensor:
    array = tensor.array
    if isinstance(array, BytesArray):
        return tensor._replace(array=BytesArray(array.begins[begin:end], array.ends[begin:end], array.symbols))
    return tensor._replace(array=array[begin:end])


def _list_rows(tensor: Tensor) -> list[Any]:
    """Return the rows of a tensor for orjson; those of numbers are cut from the JSON of all of them."""
    values = _encode_values(tensor)
    if isinstance(tensor.array, BytesArray) or not tensor.array.size:
        return list(values)
    depth = tensor.array.ndim - 1  # of a row
    begin, end = b"[" * depth, b"]" * depth
    rows = _dumps(values)[1 + depth : -1 - depth].split(end + b"," + begin)
    return [orjson.Fragment(begin + row + end) for row in rows]


def _widen(tensor: Tensor) -> NDArray[Any]:
    assert not isinstance(tensor.array, BytesArray)
    return DATATYPES[tensor.datatype].widen(np.ascontiguousarray(tensor.array).reshape(tensor.shape))


def _encode_values(tensor: Tensor) -> Any:
    """Return the nested elements of a tensor for orjson."""
    if isinstance(tensor.array, BytesArray):
        return _encode_strings(tensor.name, tensor.array)
    array = _widen(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return orjson.Fragment(_write_tokens(array))
    return array if array.shape else array[()]


def _write_tokens(array: NDArray[Any]) -> bytes:
    """Return floats, some not finite, as JSON with NaN, Infinity and -Infinity, for which orjson writes null."""
    text = _dumps(array if array.shape else array[()])
    special = array[~np.isfinite(array)]
    if np.isnan(special).all():
        return text.replace(b"null", b"NaN")
    nulls = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("n"))
    written = bytearray(text[: nulls[0]])
    for begin in range(0, len(nulls), _AT_A_TIME):
        end = begin + _AT_A_TIME
        parts = text[nulls[begin] : nulls[end] if end < len(nulls) else None].split(b"null")
        values = special[begin:end].tolist()
        tokens = [b"NaN" if value != value else b"Infinity" if value > 0 else b"-Infinity" for value in values]
        written += b"".join(chain.from_iterable(zip(parts, [*tokens, b""], strict=True)))
    return bytes(written)


def _encode_strings(name: str, array: BytesArray) -> Any:
    """Return strings as nested lists; those of an output whose name ends in _bytes as objects {"b64": "..."}."""
    encode = _encode_bytes(array) if name.endswith(_BYTES_SUFFIX) else _decode_strings(name, array)
    return np.fromiter(encode, object, array.begins.size).reshape(array.shape).tolist()


def _encode_bytes(array: BytesArray) -> Iterator[orjson.Fragment]:
    return (orjson.Fragment(b'{"b64":"%b"}' % base64.b64encode(element)) for element in array)


def _decode_strings(name: str, array: BytesArray) -> Iterator[str]:
    for index, element in enumerate(array):
        try:
            yield element.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"output {name!r}: string {index} is not valid UTF-8 and cannot be returned in JSON, except as base64 "
                f"from an output whose name ends in {_BYTES_SUFFIX!r}; POST /v2/models/{{name}}/infer returns binary "
                "data"
            ) from error


# --- Metadata and status


def describe_signature(metadata: ModelMetadata) -> dict[str, Any]:
    """Return the metadata response: the one signature of a model.

    TensorFlow Serving spells keys as `model_spec`, OVMS spelled them as `modelSpec`; clients of either find theirs.
    """
    spec, camel_spec = (
        {"name": metadata.name, spell("signature_name"): "", "version": metadata.version}
        for spell in (str, _camel_case)
    )
    signatures, camel_signatures = ({SIGNATURE: _describe_tensors(metadata, spell)} for spell in (str, _camel_case))
    return {
        "model_spec": spec,
        "modelSpec": camel_spec,
        "metadata": {
            "signature_def": {
                "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
                "signature_def": signatures,
                "signatureDef": camel_signatures,
            }
        },
    }


_Spell = Callable[[str], str]


def _camel_case(name: str) -> str:
    """Return the name of a field as the JSON form of protobuf writes it."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _describe_tensors(metadata: ModelMetadata, spell: _Spell) -> dict[str, Any]:
    return {
        "inputs": {name: _describe_tensor(tensor, spell) for name, tensor in metadata.inputs.items()},
        "outputs": {name: _describe_tensor(tensor, spell) for name, tensor in metadata.outputs.items()},
        spell("method_name"): "tensorflow/serving/predict",
    }


def _describe_tensor(tensor: TensorMetadata, spell: _Spell) -> dict[str, Any]:
    """Return datatype and shape; the sizes are strings, as the 64-bit integers of protobuf are in JSON."""
    dims = [{"size": "-1" if dim.size is None else str(dim.size), "name": ""} for dim in tensor.dims or ()]
    return {
        "dtype": _DTYPES[tensor.datatype],
        spell("tensor_shape"): {"dim": dims, spell("unknown_rank"): tensor.dims is None},
        "name": tensor.name,
    }


def describe_status(statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the status response from the statuses of versions in OVMS's format: the newest version comes first."""
    versions = sorted(statuses, key=lambda status: int(status["version"]), reverse=True)
    return {"model_version_status": [{**status, "status": _describe_outcome(status["status"])} for status in versions]}


def _describe_outcome(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an outcome without a message if it is no error; OVMS's message is OK."""
    return {**outcome, "error_message": ""} if outcome["error_message"] == "OK" else outcome
