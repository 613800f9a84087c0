"""Requests that fit a model's metadata, and checks of their responses; plain Python, without locust.

The messages of `WrongAnswerError` contain nothing that varies between responses, because locust groups by them.
"""

import json
import math
import random
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

JSON, BINARY, IMAGE = KINDS = ("json", "binary", "image")

# The code in `struct` for an element of a datatype; BF16 and BYTES are packed by hand.
CODES = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
SIZES = {**{datatype: struct.calcsize(f"<{code}") for datatype, code in CODES.items()}, "BF16": 2}
FLOATS = ("FP16", "BF16", "FP32", "FP64")
PICTURE_DATATYPES = ("UINT8", *FLOATS)
PNG_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # grey, RGB, RGBA by the number of channels

# The types of a datatype's elements after `json`. NaN and infinities are null.
_JSON_TYPES: dict[str, set[type]] = {
    **{datatype: {int} for datatype in SIZES},
    **{datatype: {int, float, type(None)} for datatype in FLOATS},
    "BOOL": {bool},
    "BYTES": {str},
}
_WORDS = ("a", "request", "of", "the", "load", "test", "has", "few", "words", "plain", "text", "été", "日本語")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode  # Python's own accepts NaN and Infinity


class UnusableError(Exception):
    """A model that no request can be made for, or options that do not fit it."""


class WrongAnswerError(Exception):
    """A response that does not fit its request."""


class RefusedError(WrongAnswerError):
    """A response of an overloaded server: 429 or 503."""


class Options(NamedTuple):
    """Choices that the metadata leaves open."""

    shapes: Mapping[str, Sequence[int]] = {}  # by "MODEL/INPUT" or "INPUT"
    dynamic_dim: int = 1
    picture_size: int = 64  # for a dynamic height or width
    integers: tuple[int, int] = (0, 1)  # the lowest and the highest value
    pictures: Sequence[bytes] = ()  # image files to send instead of generated ones
    allow_no_content: bool = False  # a pipeline whose demultiplexer makes no shards responds 204


class Request(NamedTuple):
    """An inference request, ready to be sent."""

    id: str
    headers: dict[str, str]
    body: bytes


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Parse "NAME=1,64,64,1;NAME=2,4", where a name is that of an input or MODEL/INPUT. Raises ValueError."""
    shapes = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, dims = part.rpartition("=")
        if not (equals and name):
            raise ValueError(f"expected NAME=1,64,64,1, got {part!r}")
        shapes[name] = tuple(int(dim) for dim in filter(None, (dim.strip() for dim in dims.split(","))))
        if any(dim < 0 for dim in shapes[name]):
            raise ValueError(f"the dims of {name} must not be negative, got {dims}")
    return shapes


def parse_range(text: str) -> tuple[int, int]:
    """Parse "LOW:HIGH". Raises ValueError."""
    low, _, high = text.partition(":")
    if int(low) > int(high):
        raise ValueError(f"expected LOW:HIGH with LOW <= HIGH, got {text}")
    return int(low), int(high)


# --- requests


def supports_images(metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """Return whether encoded images can be sent to an input; `config` is Triton's configuration of the model."""
    return bool(_image_inputs(metadata, config))


def _image_inputs(metadata: Mapping[str, Any], config: Mapping[str, Any] | None) -> set[str]:
    formats = {tensor["name"]: tensor.get("format") for tensor in (config or {}).get("input", ())}
    return {
        tensor["name"]
        for tensor in metadata["inputs"]
        if takes_picture(tensor) and formats.get(tensor["name"]) != "FORMAT_NCHW"
    }


def takes_picture(tensor: Mapping[str, Any]) -> bool:
    """Return whether a tensor has the form of pictures: [n,height,width,channels] of floats or UINT8."""
    shape = tensor["shape"]
    return len(shape) == 4 and shape[3] in PNG_COLOR_TYPES and tensor["datatype"] in PICTURE_DATATYPES


def choose_shape(model: str, tensor: Mapping[str, Any], options: Options) -> list[int]:
    """Return a shape that fits an input. Raises UnusableError when the one in the options does not."""
    name, dims = tensor["name"], tensor["shape"]
    given = options.shapes.get(f"{model}/{name}", options.shapes.get(name))
    if given is not None:
        if not fits(given, dims):
            raise UnusableError(f"--shapes: {name} of {model} has shape {dims}, got {list(given)}")
        return list(given)
    sizes = [
        options.picture_size if takes_picture(tensor) and axis in (1, 2) else options.dynamic_dim
        for axis in range(len(dims))
    ]
    return [size if dim < 0 else dim for size, dim in zip(sizes, dims, strict=True)]


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Return whether a shape fits the dims in a model's metadata, where -1 is any."""
    return len(shape) == len(dims) and all(dim in (-1, size) for size, dim in zip(shape, dims, strict=True))


def make_request(
    metadata: Mapping[str, Any], kind: str, options: Options, seed: int, config: Mapping[str, Any] | None = None
) -> Request:
    """Make a request with random values for all inputs of a model; the same seed gives the same values.

    Raises UnusableError for a datatype that is unknown, and for shapes in the options that do not fit.
    """
    source = random.Random(seed)
    identity = f"{kind}-{seed}"
    images = _image_inputs(metadata, config) if kind == IMAGE else set()
    entries, blobs = [], []
    for tensor in metadata["inputs"]:
        name, datatype = tensor["name"], tensor["datatype"]
        if datatype not in _JSON_TYPES:
            raise UnusableError(f"input {name} of {metadata['name']} has datatype {datatype}, which is unknown here")
        shape = choose_shape(metadata["name"], tensor, options)
        entry = {"name": name, "datatype": datatype, "shape": shape}
        entries.append(entry)
        if name in images:
            entry.update(datatype="BYTES", shape=shape[:1])
            blob = pack("BYTES", [_choose_picture(source, shape, options) for _ in range(shape[0])])
        else:
            values = _make_values(source, tensor, shape, options)
            if kind == JSON:
                entry["data"] = values
                continue
            blob = pack(datatype, values)
        entry["parameters"] = {"binary_data_size": len(blob)}
        blobs.append(blob)
    envelope: dict[str, Any] = {"id": identity, "inputs": entries}
    if kind != JSON:
        envelope["parameters"] = {"binary_data_output": True}
    head = json.dumps(envelope, separators=(",", ":")).encode()
    if kind == JSON:
        return Request(identity, {"Content-Type": "application/json"}, head)
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Request(identity, headers, head + b"".join(blobs))


def _make_values(source: random.Random, tensor: Mapping[str, Any], shape: Sequence[int], options: Options) -> list[Any]:
    count, datatype = math.prod(shape), tensor["datatype"]
    if datatype == "BYTES":
        return [" ".join(source.choices(_WORDS, k=8)) for _ in range(count)]
    if datatype == "BOOL":
        return [source.random() < 0.5 for _ in range(count)]
    if takes_picture(tensor):
        pixels = b"".join(draw_picture(source, *shape[1:]) for _ in range(shape[0]))
        return list(pixels) if datatype == "UINT8" else [round(pixel + source.random(), 3) for pixel in pixels]
    if datatype in FLOATS:
        return [round(source.random(), 4) for _ in range(count)]
    low, high = options.integers
    bits = 8 * SIZES[datatype]
    least, most = (0, 2**bits - 1) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = (min(max(value, least), most) for value in (low, high))
    return [source.randint(low, high) for _ in range(count)]


def pack(datatype: str, values: Sequence[Any]) -> bytes:
    """Pack elements as the binary tensor data extension requires: little-endian, strings after their lengths."""
    if datatype == "BYTES":
        strings = [value if isinstance(value, bytes) else value.encode() for value in values]
        return b"".join(struct.pack("<I", len(string)) + string for string in strings)
    if datatype == "BF16":  # the upper half of an FP32
        singles = struct.pack(f"<{len(values)}f", *values)
        return b"".join(singles[index + 2 : index + 4] for index in range(0, len(singles), 4))
    return struct.pack(f"<{len(values)}{CODES[datatype]}", *values)


def _choose_picture(source: random.Random, shape: Sequence[int], options: Options) -> bytes:
    if options.pictures:
        return source.choice(options.pictures)
    _, height, width, channels = shape
    return encode_png(draw_picture(source, height, width, channels), height, width, channels)


def draw_picture(source: random.Random, height: int, width: int, channels: int) -> bytes:
    """Draw bright bars on dark noise; return the pixels, row by row, from 0 to 250.

    Noise alone hardly compresses, and a plain picture has nothing that a pipeline could find.
    """
    bars = source.randint(2, 4)
    begins = [round((bar + source.uniform(0.2, 0.4)) * width / bars) for bar in range(bars)]
    stroke = max(1, width // (4 * bars))
    bright = bytearray(source.randbytes(width * channels).translate(_DARK))
    for begin in begins:
        for at in range(begin * channels, min(begin + stroke, width) * channels):
            bright[at] = source.randint(200, 250)
    top, bottom = height // 8, height - height // 8
    noise = source.randbytes(height * width * channels).translate(_DARK)
    row = width * channels
    return b"".join(
        bytes(bright) if top <= line < bottom else noise[line * row : (line + 1) * row] for line in range(height)
    )


_DARK = bytes(value % 24 for value in range(256))


def encode_png(pixels: bytes, height: int, width: int, channels: int) -> bytes:
    """Encode 8-bit pixels, row by row, of 1 (grey), 3 (RGB) or 4 (RGBA) channels."""
    row = width * channels
    lines = b"".join(b"\0" + pixels[at : at + row] for at in range(0, height * row, row))  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, PNG_COLOR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# --- responses


def check_models(status: int, content: bytes | None) -> list[str]:
    """Return the names of all models and pipelines with a version that serves. Raises WrongAnswerError."""
    listed = read_object(status, content)
    try:
        return [
            model["name"]
            for model in listed["models"]
            if any(version["state"] == "AVAILABLE" for version in model["versions"])
        ]
    except (LookupError, TypeError):
        raise WrongAnswerError("GET /v2/models does not list models with their versions and states") from None


def check_metadata(name: str, status: int, content: bytes | None) -> dict[str, Any]:
    """Return the metadata of a model. Raises WrongAnswerError when it is not the metadata of that model."""
    metadata = read_object(status, content)
    if metadata.get("name") != name:
        raise WrongAnswerError(f"the metadata of {name} has the name {metadata.get('name')!r}")
    for key in ("inputs", "outputs"):
        tensors = metadata.get(key)
        if not isinstance(tensors, list) or not all(map(_is_tensor, tensors)):
            raise WrongAnswerError(
                f"the metadata of {name} has no list of tensors with name, datatype and shape as {key}"
            )
    return metadata


def _is_tensor(tensor: object) -> bool:
    return (
        isinstance(tensor, dict)
        and isinstance(tensor.get("name"), str)
        and isinstance(tensor.get("datatype"), str)
        and _is_shape(tensor.get("shape"), -1)
    )


def _is_shape(shape: object, least: int) -> bool:
    return isinstance(shape, list) and all(type(dim) is int and dim >= least for dim in shape)


def read_object(status: int, content: bytes | None) -> dict[str, Any]:
    """Return the JSON object of a response. Raises RefusedError or WrongAnswerError when it is an error or not JSON."""
    check_status(status, content)
    try:
        found = _decode((content or b"").decode())
    except ValueError:  # UnicodeDecodeError is one
        raise WrongAnswerError(f"status {status}, but the response is not JSON") from None
    if not isinstance(found, dict):
        raise WrongAnswerError(f"status {status}, but the response is not a JSON object")
    return found


def check_status(status: int, content: bytes | None) -> None:
    """Raise RefusedError or WrongAnswerError, with the server's message, unless the status is 200."""
    if status == 200:
        return
    try:
        message = json.loads(content or b"")["error"]
    except (ValueError, TypeError, LookupError):
        message = "without an error in JSON"
    error = RefusedError if status in (429, 503) else WrongAnswerError
    raise error(f"status {status}: {message}")


def check_answer(
    metadata: Mapping[str, Any],
    request: Request,
    status: int,
    json_length: str | None,
    content: bytes | None,
    allow_no_content: bool = False,
) -> None:
    """Check the response to a request: status, id, names, datatypes, shapes and numbers of elements.

    `json_length` is the response's Inference-Header-Content-Length. Raises WrongAnswerError,
    for 429 and 503 RefusedError.
    """
    if status == 204 and not content:
        if allow_no_content:
            return
        raise WrongAnswerError("status 204: a pipeline found nothing to work on; --allow-no-content 1 accepts that")
    content = content or b""
    binary = b""
    if status == 200 and json_length is not None:
        if not json_length.isdecimal() or int(json_length) > len(content):
            raise WrongAnswerError("Inference-Header-Content-Length is not a number within the body")
        content, binary = content[: int(json_length)], content[int(json_length) :]
    answer = read_object(status, content)
    for key, expected in (("model_name", metadata["name"]), ("id", request.id)):
        if answer.get(key) != expected:
            raise WrongAnswerError(f"{key} differs from the request's")
    blobs = _check_outputs(
        metadata, answer.get("outputs"), "Inference-Header-Content-Length" in request.headers, binary
    )
    if blobs != len(binary):
        raise WrongAnswerError("the body has more bytes than its outputs")


def _check_outputs(metadata: Mapping[str, Any], outputs: Any, wants_binary: bool, binary: bytes) -> int:
    """Check all outputs; return how many bytes they take in the binary part."""
    expected = {tensor["name"]: tensor for tensor in metadata["outputs"]}
    if not isinstance(outputs, list) or not all(map(_is_tensor, outputs)):
        raise WrongAnswerError("outputs is not a list of tensors with name, datatype and shape")
    names = sorted(output["name"] for output in outputs)
    if names != sorted(expected):
        raise WrongAnswerError(f"the outputs are {', '.join(names) or 'none'}, expected {', '.join(sorted(expected))}")
    position = 0
    for output in outputs:
        _check_tensor(expected[output["name"]], output)
        if wants_binary:
            position = _check_binary(output, binary, position)
        else:
            _check_data(output)
    return position


def _check_tensor(expected: Mapping[str, Any], output: Mapping[str, Any]) -> None:
    name, datatype, dims = output["name"], expected["datatype"], expected["shape"]
    if output["datatype"] == "BYTES" and _may_be_strings(expected):
        datatype, dims = "BYTES", dims[:1]
    if output["datatype"] != datatype:
        raise WrongAnswerError(f"output {name} has datatype {output['datatype']}, the metadata {datatype}")
    if not _is_shape(output["shape"], 0) or not fits(output["shape"], dims):
        raise WrongAnswerError(f"output {name} has shape {output['shape']}, the metadata {dims}")


def _may_be_strings(tensor: Mapping[str, Any]) -> bool:
    """Return whether a UINT8 matrix may be returned as strings, one per row: its name ends with _string, as in OVMS."""
    return tensor["datatype"] == "UINT8" and len(tensor["shape"]) == 2 and tensor["name"].lower().endswith("_string")


def _check_data(output: Mapping[str, Any]) -> None:
    name, data, datatype = output["name"], output.get("data"), output["datatype"]
    if not isinstance(data, list):
        raise WrongAnswerError(f"output {name} has no data")
    if len(data) != math.prod(output["shape"]):
        raise WrongAnswerError(f"output {name} does not have the number of elements of its shape {output['shape']}")
    if not set(map(type, data)) <= _JSON_TYPES[datatype]:
        raise WrongAnswerError(f"output {name} has elements that are not {datatype}")


def _check_binary(output: Mapping[str, Any], binary: bytes, begin: int) -> int:
    """Check an output that begins at `begin` in the binary part; return where the next one begins."""
    name, datatype, count = output["name"], output["datatype"], math.prod(output["shape"])
    parameters = output.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if type(size) is not int or "data" in output:
        raise WrongAnswerError(f"output {name} is not binary")
    end = begin + size
    if not begin <= end <= len(binary):
        raise WrongAnswerError(f"output {name} has an invalid binary_data_size")
    if datatype == "BYTES":
        complete = sum(1 for _ in _strings(name, binary, begin, end)) == count
    else:
        complete = size == count * SIZES[datatype]
    if not complete:
        raise WrongAnswerError(f"output {name} does not have the number of elements of its shape {output['shape']}")
    return end


def _strings(name: str, binary: bytes, begin: int, end: int) -> Iterator[int]:
    """Yield the length of every string between two places of the binary part."""
    while begin < end:
        length = int.from_bytes(binary[begin : min(begin + 4, end)], "little")
        begin += 4 + length
        if begin > end:
            raise WrongAnswerError(f"output {name} has a string that is longer than its data")
        yield length
