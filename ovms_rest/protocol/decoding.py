"""From the bytes of an inference request to an InferenceRequest (KServe v2 and its binary tensor data extension).

Whatever the bytes are, every function raises only InvalidRequestError, for a mistake of the client; `decode_request`
also raises BodyTooLargeError for JSON that would take too much memory.
A `label` names the place in the request for a message: `inputs[0] 'image'`.
"""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.body_forms import explain_body, explain_prefix
from ovms_rest.protocol.datatypes import BOOL, BYTES, DATATYPE_NAMES, DATATYPES, Datatype
from ovms_rest.protocol.json_memory import NUMBERS, OBJECTS, BodyLimits, check_memory, choose_limits
from ovms_rest.protocol.numbers import NumberArray, UnsuitedError, looks_numeric, parse_numeric, to_array
from ovms_rest.protocol.strings import MAX_ELEMENTS, BytesArray, decode_base64, unpack
from ovms_rest.protocol.tensors import (
    MAX_DIM,
    NO_PARAMETERS,
    Array,
    InferenceRequest,
    ModelMetadata,
    Parameters,
    RequestedOutput,
    Tensor,
    TensorMetadata,
)
from ovms_rest.protocol.validation import unknown_input
from ovms_rest.protocol.words import (
    ABSENT,
    count_of,
    cut,
    describe,
    explain_invalid_json,
    join,
    list_names,
    quote,
    show,
)

MAX_DEPTH = 100
# Bytes of JSON from which simdjson is tried. It gains from 4 KB on where numbers have 6 digits, from 11 KB with 18.
LARGE_SIZE = 8192
DEFAULT_LIMITS = choose_limits(2**28)
# Bytes of JSON from which the garbage collector is paused.
MANY_VALUES = 2**20
# numpy's limit; no OpenVINO model has more.
MAX_RANK = 64
# The dims of a tensor without elements cost a client nothing, but may become those of outputs: the sum over dim 1 of
# [1099511627776,0] has as many zeros. So they may be those of a tensor whose elements a body has room for, and in any
# case multiply to this.
MIN_EMPTY = 2**20
# Bytes of a BYTES element in a body: at least its length.
_LENGTH = 4
# Comparing up to this many numbers one by one is faster than numpy.
_FEW = 64
_ELEMENTS = {str: "the string ", bool: "the boolean "}
_REQUEST_KEYS = frozenset({"id", "parameters", "inputs", "outputs"})
_INPUT_KEYS = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_KEYS = frozenset({"name", "parameters"})


def decode_request(
    body: memoryview,
    header_length: int | None = None,
    large_size: int = LARGE_SIZE,
    model: ModelMetadata | None = None,
    limits: BodyLimits = DEFAULT_LIMITS,
) -> InferenceRequest:
    """Decode the body of an inference request.

    The first `header_length` bytes (None: all) are JSON; the binary tensors follow in the order of the inputs and
    become views on `body`. JSON of `large_size` bytes and more is tried as numbers first, which changes only the time.

    More inputs or outputs than `model` has are refused before they are decoded. Values of the JSON that may take more
    than `limits` allows raise BodyTooLargeError. The limit of a body bounds the dims of tensors without elements.
    """
    json_part, binary_part = (body, body[:0]) if header_length is None else (body[:header_length], body[header_length:])
    try:
        return _decode_json(json_part, binary_part, large_size, model, limits)
    except orjson.JSONDecodeError as error:
        reason = explain_body(body, header_length, model) or explain_invalid_json(json_part, error)
        raise InvalidRequestError(f"the request is not valid JSON: {reason}") from error


def _decode_json(
    json_part: memoryview,
    binary_part: memoryview,
    large_size: int,
    model: ModelMetadata | None,
    limits: BodyLimits,
) -> InferenceRequest:
    """Decode with the parser that suits the size of the JSON."""
    if len(json_part) < large_size:
        return _decode_root(_parse_json(json_part), binary_part, model, limits)
    if looks_numeric(json_part):
        check_memory(json_part, NUMBERS, limits.json_values)
        request = decode_numeric(json_part, binary_part, model, limits)
        if request is not None:
            return request
    check_memory(json_part, OBJECTS, limits.json_values)
    if len(json_part) < MANY_VALUES:
        return _decode_root(_parse_json(json_part), binary_part, model, limits)
    with without_garbage_collection():
        return _decode_root(_parse_json(json_part), binary_part, model, limits)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which finds nothing among millions of new values and doubles their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def decode_numeric(
    json_part: memoryview,
    binary_part: memoryview,
    model: ModelMetadata | None = None,
    limits: BodyLimits = DEFAULT_LIMITS,
) -> InferenceRequest | None:
    """Return a request whose `data` are numbers, decoded without an object for each; None when orjson must decide."""
    try:
        return _decode_root(parse_numeric(json_part, MAX_DEPTH), binary_part, model, limits)
    except (UnsuitedError, InvalidRequestError):  # only the path through orjson writes messages
        return None


def _decode_root(
    root: dict[str, Any], binary_part: memoryview, model: ModelMetadata | None, limits: BodyLimits
) -> InferenceRequest:
    check_unknown(root, _REQUEST_KEYS, 1)
    if model is not None:
        _check_counts(root, model)
    request_id = root.get("id", "")
    if type(request_id) is not str:
        raise InvalidRequestError(f"id is {describe(request_id)}, expected a string")
    parameters, binary_output, timeout_us, priority = NO_PARAMETERS, False, 0, 0
    if "parameters" in root:
        parameters = _decode_parameters(root, "")
        binary_output = _decode_flag(parameters, "binary_data_output", "")
        timeout_us = _decode_integer(parameters, "timeout", "")
        priority = _decode_integer(parameters, "priority", "")
    try:
        inputs = _decode_inputs(root, binary_part, limits.body)
    except InvalidRequestError:
        if model is not None:
            _check_names(root.get("inputs"), model)
        raise
    outputs = _decode_outputs(root, binary_output)
    return InferenceRequest(inputs, outputs, binary_output, request_id, parameters, timeout_us, priority)


# --- The JSON part


def _parse_json(part: memoryview) -> dict[str, Any]:
    if not part:
        raise InvalidRequestError("the request has no JSON, expected an object with the key 'inputs'")
    root = orjson.loads(part)
    if type(root) is not dict:
        raise InvalidRequestError(f"the request is {describe(root)}, expected an object with the key 'inputs'")
    return root


def check_unknown(owner: dict[str, Any], known: frozenset[str], depth: int) -> None:
    """Refuse values of unknown keys that are nested deeper than MAX_DEPTH, in an object at that depth.

    The depth of known keys is limited where they are decoded.
    """
    if not known.issuperset(owner):
        _check_depth([value for key, value in owner.items() if key not in known], depth)


def _check_depth(values: list[Any], depth: int) -> None:
    while containers := [value for value in values if type(value) is list or type(value) is dict]:
        depth += 1
        if depth > MAX_DEPTH:
            _refuse_depth()
        values = list(chain.from_iterable(item.values() if type(item) is dict else item for item in containers))


def _refuse_depth() -> NoReturn:
    raise InvalidRequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _prefix(label: object) -> str:
    return f"{label}: " if label else ""


def _decode_parameters(owner: dict[str, Any], label: object) -> Parameters:
    parameters = owner.get("parameters", ABSENT)
    if parameters is ABSENT:
        return NO_PARAMETERS
    if type(parameters) is not dict:
        raise InvalidRequestError(f"{_prefix(label)}parameters is {describe(parameters)}, expected an object")
    for name, value in parameters.items():
        if type(value) not in (str, int, float, bool):
            raise InvalidRequestError(
                f"{_prefix(label)}parameters.{cut(name)} is {describe(value)}, expected a string, a number or a boolean"
            )
    return parameters


def _decode_flag(parameters: Parameters, name: str, label: object, default: bool = False) -> bool:
    flag = parameters.get(name, default)
    if type(flag) is not bool:
        raise InvalidRequestError(f"{_prefix(label)}parameters.{name} is {describe(flag)}, expected a boolean")
    return flag


def _decode_integer(parameters: Parameters, name: str, label: object, low: int = 0) -> int:
    """Return a parameter that is an integer of at least `low`; 0 when it is missing."""
    if name not in parameters:
        return 0
    number = parameters[name]
    if type(number) is not int or number < low:
        raise InvalidRequestError(
            f"{_prefix(label)}parameters.{name} is {show(number)}, expected an integer of at least {low}"
        )
    return number


def _refuse_shared_memory(parameters: Parameters, label: object) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidRequestError(
            f"{label}: parameters.shared_memory_region asks for shared memory, which is not supported; "
            "send and receive the data in JSON or as binary"
        )


def _check_counts(root: dict[str, Any], model: ModelMetadata) -> None:
    """Refuse more inputs or outputs than the model has, before any is decoded."""
    items = root.get("inputs")
    if type(items) is list and len(items) > len(model.inputs):
        _refuse_count(items, "inputs", model, model.inputs)
    if "outputs" in root:
        items = root["outputs"]
        if type(items) is list and len(items) > len(model.outputs):
            _refuse_count(items, "outputs", model, model.outputs)


def _refuse_count(items: list[Any], key: str, model: ModelMetadata, tensors: Mapping[str, TensorMetadata]) -> NoReturn:
    raise InvalidRequestError(
        f"{key} has {len(items)} entries, but model {model.name!r} has only {len(tensors)}: {list_names(tensors)}"
        f"{_find_surplus(items, key, tensors)}"
    )


def _check_names(items: Any, model: ModelMetadata) -> None:
    """Refuse an unknown input by its name, a better hint than an error in its data."""
    for item in items if type(items) is list else ():
        name = item.get("name") if type(item) is dict else None
        if type(name) is str and name not in model.inputs:
            raise unknown_input(name, model)


def _find_surplus(items: list[Any], key: str, tensors: Mapping[str, TensorMetadata]) -> str:
    """Return a note on the first entry that is unknown or repeated, which is among the first few."""
    known = set()
    for index, item in enumerate(items[: len(tensors) + 1]):
        name = item.get("name") if type(item) is dict else None
        if type(name) is not str:
            break
        if name not in tensors or name in known:
            return f"; {key}[{index}] {quote(name)} is {'repeated' if name in known else 'unknown'}"
        known.add(name)
    return ""


def _decode_outputs(root: dict[str, Any], binary_output: bool) -> tuple[RequestedOutput, ...]:
    items = root.get("outputs", ABSENT)
    if items is ABSENT:
        return ()
    if type(items) is not list:
        raise InvalidRequestError(f"outputs is {describe(items)}, expected an array of objects")
    outputs = []
    for index, item in enumerate(items):
        if type(item) is not dict:
            raise InvalidRequestError(f"outputs[{index}] is {describe(item)}, expected an object with the key 'name'")
        check_unknown(item, _OUTPUT_KEYS, 3)
        name = item.get("name")
        if type(name) is not str:
            _refuse_name(item, f"outputs[{index}]")
        binary, classification = binary_output, 0
        if "parameters" in item:
            label = _ItemLabel("outputs", index, name)
            parameters = _decode_parameters(item, label)
            _refuse_shared_memory(parameters, label)
            binary = _decode_flag(parameters, "binary_data", label, binary_output)
            classification = _decode_integer(parameters, "classification", label, low=1)
        outputs.append(RequestedOutput(name, binary, classification))
    return tuple(outputs)


def _refuse_name(item: dict[str, Any], label: object) -> NoReturn:
    raise InvalidRequestError(f"{label}: name is {describe(item.get('name', ABSENT))}, expected a string")


# --- Inputs


class Label(Protocol):
    """The place of a tensor in a request, for messages."""

    def element(self, index: int) -> str:
        """Return the place of an element by its index in row-major order."""


def _decode_inputs(root: dict[str, Any], binary_part: memoryview, max_body: int) -> tuple[Tensor, ...]:
    items = root.get("inputs", ABSENT)
    if type(items) is not list or not items:
        found = "empty" if items == [] else describe(items)
        hint = "; requests with 'instances' go to POST /v1/models/{name}:predict" if "instances" in root else ""
        raise InvalidRequestError(f"inputs is {found}, expected an array of one or more objects{hint}")
    tensors, rest, strings = [], binary_part, 0
    for index, item in enumerate(items):
        if type(item) is not dict:
            raise InvalidRequestError(
                f"inputs[{index}] is {describe(item)}, expected an object with name, shape and datatype"
            )
        check_unknown(item, _INPUT_KEYS, 3)
        name = item.get("name")
        if type(name) is not str:
            _refuse_name(item, f"inputs[{index}]")
        label = _ItemLabel("inputs", index, name)
        shape = decode_shape(item, label)
        datatype = _decode_datatype(item, label)
        check_empty(shape, datatype, max_body, label)
        if datatype == BYTES:
            strings += math.prod(shape)
            if strings > MAX_ELEMENTS:
                raise InvalidRequestError(
                    f"{label}: the request has {strings} strings up to here, at most {MAX_ELEMENTS} are allowed"
                )
        size = None
        if "parameters" in item:
            parameters = _decode_parameters(item, label)
            _refuse_shared_memory(parameters, label)
            size = parameters.get("binary_data_size")
        if "data" in item:
            if size is not None:
                raise InvalidRequestError(
                    f"{label} has both data and parameters.binary_data_size, expected only one of them"
                )
            array = decode_json_data(item["data"], datatype, shape, label)
        else:
            if size is None and not rest and 0 not in shape:
                raise InvalidRequestError(
                    f"{label}: data is missing, and the body has no binary data for it after the JSON "
                    "(Inference-Header-Content-Length says where the JSON ends)"
                )
            if datatype == BYTES and size is None:
                size = _take_rest(items, index, len(rest), label)
            array, rest = _decode_binary_data(rest, size, datatype, shape, label)
        tensors.append(Tensor(name, datatype, array))
    if rest:
        raise InvalidRequestError(
            f"the data after the JSON has {count_of(len(rest), 'byte')} more than the inputs take: "
            f"{len(binary_part)} instead of {len(binary_part) - len(rest)}"
        )
    return tuple(tensors)


class TextLabel(str):
    """A text as the place of a tensor."""

    __slots__ = ()

    def element(self, index: int) -> str:
        return f"{self}: data[{index}]"


class _ItemLabel:
    """The place of an input or output for messages, formatted only when there is one."""

    __slots__ = ("_index", "_key", "_name")

    def __init__(self, key: str, index: int, name: str) -> None:
        self._key = key
        self._index = index
        self._name = name

    def __str__(self) -> str:
        return f"{self._key}[{self._index}] {quote(self._name)}"

    def element(self, index: int) -> str:
        return f"{self}: data[{index}]"


def _take_rest(items: list[Any], index: int, left: int, label: object) -> int:
    """Return the size of a BYTES input without binary_data_size: all bytes left, if no binary input follows."""
    if any(type(item) is dict and "data" not in item for item in items[index + 1 :]):
        raise InvalidRequestError(
            f"{label}: parameters.binary_data_size is missing; a BYTES input may leave it out only when it is the "
            "last binary one"
        )
    return left


def decode_shape(item: dict[str, Any], label: object) -> tuple[int, ...]:
    """Return the shape of an input."""
    shape = item.get("shape", ABSENT)
    if type(shape) is not list:
        raise InvalidRequestError(f"{label}: shape is {describe(shape)}, expected an array of integers")
    if len(shape) > MAX_RANK:
        raise InvalidRequestError(f"{label}: shape has {len(shape)} dims, at most {MAX_RANK} are allowed")
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:
            raise InvalidRequestError(f"{label}: shape has the dim {show(dim)}, expected integers from 0 to {MAX_DIM}")
    return tuple(shape)


def check_empty(shape: tuple[int, ...], datatype: str, max_body: int, label: object) -> None:
    """Refuse the shape of a tensor without elements whose other dims are larger than `max_body` allows."""
    if 0 not in shape:
        return
    most = min(max_body // _LENGTH, MAX_ELEMENTS) if datatype == BYTES else max_body // DATATYPES[datatype].size
    most = max(most, MIN_EMPTY)
    if math.prod(dim or 1 for dim in shape) > most:
        raise InvalidRequestError(
            f"{label}: the dims of shape {join(shape)} other than 0 multiply to more than {most}, "
            f"the limit for {datatype}"
        )


def _decode_datatype(item: dict[str, Any], label: object) -> str:
    datatype = item.get("datatype", ABSENT)
    if type(datatype) is not str or (datatype not in DATATYPES and datatype != BYTES):
        found = show(datatype) if type(datatype) is str else describe(datatype)
        raise InvalidRequestError(f"{label}: datatype is {found}, expected one of {', '.join(DATATYPE_NAMES)}")
    return datatype


def decode_json_data(data: Any, datatype: str, shape: tuple[int, ...], label: Label) -> Array:
    """Return the `data` of an input in JSON, nested in any form, as an array."""
    if type(data) is NumberArray:
        return to_array(data, datatype, shape)
    if type(data) is not list:
        raise InvalidRequestError(f"{label}: data is {describe(data)}, expected an array")
    elements, types = _flatten(data)
    count = math.prod(shape)
    if len(elements) != count:
        raise InvalidRequestError(
            f"{label}: data has {count_of(len(elements), 'element')}, but shape {join(shape)} needs {count}"
        )
    if datatype == BYTES:
        return BytesArray.of(read_strings(elements, types, label), shape)
    return read_numbers(elements, types, DATATYPES[datatype], label).reshape(shape)


def _flatten(data: list[Any]) -> tuple[list[Any], set[type]]:
    """Return the elements of an array nested in any form, and their types."""
    depth = 4  # root, inputs, inputs[i], data
    while (types := set(map(type, data))) == {list}:
        depth += 1
        if depth > MAX_DEPTH:
            _refuse_depth()
        data = list(chain.from_iterable(data))
    if list in types:
        mixed, data = data, []
        _flatten_mixed(mixed, data, depth)
        types = set(map(type, data))
    return data, types


def _flatten_mixed(items: list[Any], elements: list[Any], depth: int) -> None:
    """Append the elements of an array that mixes arrays and elements, in one pass."""
    if depth > MAX_DEPTH:
        _refuse_depth()
    for item in items:
        if type(item) is list:
            _flatten_mixed(item, elements, depth + 1)
        else:
            elements.append(item)


def read_strings(elements: list[Any], types: set[type], label: Label) -> list[bytes]:
    """Return the bytes of BYTES elements: strings, or objects {"b64": "..."}, which are bytes in base64.

    Such an object has no other key, as in the API of TensorFlow Serving.
    """
    if types <= {str}:
        return [element.encode() for element in elements]
    encoded = []
    for index, element in enumerate(elements):
        if type(element) is str:
            encoded.append(element.encode())
            continue
        if type(element) is not dict or list(element) != ["b64"]:
            found = f"{_ELEMENTS.get(type(element), '')}{show(element)}"
            raise InvalidRequestError(f'{label.element(index)} is {found}, BYTES takes strings and {{"b64": "..."}}')
        place = f'{label.element(index)}["b64"]'
        if type(element["b64"]) is not str:
            raise InvalidRequestError(f"{place} is {describe(element['b64'])}, expected a string in base64")
        encoded.append(decode_base64(element["b64"], place))
    return encoded


def read_numbers(elements: list[Any], types: set[type], datatype: Datatype, label: Label) -> NDArray[Any]:
    """Return JSON elements as an array, floats rounded once from 64 bits. Raises for elements that do not fit."""
    if (
        0 < len(elements) <= _FEW
        and types <= datatype.json_types
        and -datatype.bound < min(elements)
        and max(elements) < datatype.bound
    ):
        return np.array(elements, datatype.dtype)
    values = f"{datatype.name} takes {datatype.json_values}"
    if not types <= datatype.json_types:
        _refuse_element(elements, datatype.json_types, values, f"{datatype.name} takes {datatype.json_kind}", label)
    try:
        with np.errstate(over="ignore"):
            array = datatype.read(elements)
    except OverflowError as error:  # numpy's refusal of an integer out of range
        limits = np.iinfo(datatype.dtype)
        index = next(index for index, element in enumerate(elements) if not limits.min <= element <= limits.max)
        raise InvalidRequestError(f"{label.element(index)} is {show(elements[index])}, {values}") from error
    if float in datatype.json_types and not np.isfinite(array).all():
        index = int(np.isfinite(array).argmin())
        raise InvalidRequestError(f"{label.element(index)} is {show(elements[index])}, {values}")
    return array


def _refuse_element(
    elements: list[Any], allowed: set[type] | frozenset[type], values: str, kind: str, label: Label
) -> NoReturn:
    """Refuse the first element of another JSON type, with the range of the datatype if it is a number."""
    index, element = next((index, item) for index, item in enumerate(elements) if type(item) not in allowed)
    found = f"{_ELEMENTS.get(type(element), '')}{show(element)}"
    if type(element) is float and element.is_integer() and not -(2**63) < element < 2**64:
        found = f"beyond 64 bits, about {found}"  # as orjson reads such an integer
    expected = values if type(element) is float or type(element) is int else kind
    raise InvalidRequestError(f"{label.element(index)} is {found}, {expected}")


def _decode_binary_data(
    rest: memoryview, size: Any, datatype: str, shape: tuple[int, ...], label: object
) -> tuple[Array, memoryview]:
    """Return the tensor at the front of `rest`, and the bytes after it. `size` None is a missing binary_data_size."""
    if size is not None and (type(size) is not int or size < 0):
        raise InvalidRequestError(
            f"{label}: parameters.binary_data_size is {show(size)}, expected an integer of at least 0"
        )
    count = math.prod(shape)
    if datatype != BYTES:
        needed = count * DATATYPES[datatype].size
        if size is not None and size != needed:
            raise InvalidRequestError(
                f"{label}: parameters.binary_data_size is {size}, but {datatype} of shape {join(shape)} "
                f"takes {count_of(needed, 'byte')}"
            )
        size = needed
    if size > len(rest):
        raise InvalidRequestError(
            f"{label} needs {count_of(size, 'byte')} of binary data, but the body has {len(rest)} left after the JSON "
            "(Inference-Header-Content-Length says where the JSON ends)"
        )
    section, rest = rest[:size], rest[size:]
    if datatype == BYTES:
        try:
            begins, ends = unpack(section, count, label)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{error}{explain_prefix(section, count)}") from error
        return view_strings(begins, ends, section, shape), rest
    return view_elements(section, DATATYPES[datatype], shape, label), rest


def view_strings(begins: Sequence[int], ends: Sequence[int], symbols: memoryview, shape: tuple[int, ...]) -> BytesArray:
    """Return strings as an array, given where in `symbols` they begin and end."""
    return BytesArray(
        np.array(begins, np.int32).reshape(shape),
        np.array(ends, np.int32).reshape(shape),
        np.frombuffer(symbols, np.uint8),
    )


def view_elements(section: memoryview, datatype: Datatype, shape: tuple[int, ...], label: object) -> NDArray[Any]:
    """Return bytes as an array: a view, or a copy if they are not aligned for the datatype."""
    array = np.frombuffer(section, np.uint8)
    if datatype.name == BOOL and array.size and array.max() > 1:
        index = int((array > 1).argmax())
        raise InvalidRequestError(f"{label}: BOOL element {index} is the byte {array[index]}, expected 0 or 1")
    array = array.view(datatype.dtype)
    return (array if array.flags.aligned else array.copy()).reshape(shape)
