"""Options of a model's config that change it before it is compiled: shapes, layouts, preprocessing.

`ModelOptions` has the values of the file; `parse_options` makes a `Preparation` of them, which the module `preparation`
carries out. Formats and meanings are those of the OpenVINO Model Server.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ovms_rest.errors import LoadError
from ovms_rest.protocol.tensors import MAX_DIM, Dim
from ovms_rest.protocol.words import cut, show

T = TypeVar("T")

# The limit of `max_batch_size`.
MAX_BATCH_SIZE = 4096


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The values of the keys of the same names, None for a missing key; their types are already checked."""

    batch_size: int | str | None = None
    shape: str | Mapping[str, str] | None = None
    layout: str | Mapping[str, str] | None = None
    mean: float | str | None = None
    scale: float | str | None = None
    color_format: str | None = None
    precision: str | None = None
    trial: str | bool | None = None
    cpu_extension: str | None = None
    max_batch_size: int = 0


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """The layout of a tensor in the model, and the client's layout if that differs."""

    model: str
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Preparation:
    """The changes to make to a model. In the mappings, the key None stands for the model's only input."""

    shapes: Mapping[str | None, tuple[Dim, ...] | None] = field(default_factory=dict)  # None: all dims are dynamic
    batch: Dim | None = None
    layouts: Mapping[str | None, LayoutChange] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    color: tuple[str, str] | None = None  # the model's and the client's
    precision: tuple[str, str] | None = None  # the client's and the model's, by OpenVINO's names: "u8", "f32"
    trial_request: str = ""  # the file, relative to the version's directory
    has_trial: bool = True
    cpu_extension: str = ""  # the path of a library of operations
    batch_limit: int = 0  # the most rows that are inferred together; 0: requests are inferred alone


# A dim without bounds; for "auto" OVMS gets the same by reloading the model.
_ANY = Dim(0, None)
_AUTO = "auto"
_DIM = re.compile(r"([0-9]{1,19})(?: *: *([0-9]{1,19}))?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# OpenVINO reads mean and scale as FP32: larger numbers become infinite, smaller ones may become zero.
_LARGEST = 3.4028234663852886e38
_SMALLEST = 1.1754943508222875e-38

MODEL_COLORS = ("RGB", "BGR", "GRAY")
_CLIENT_COLORS = (*MODEL_COLORS, "NV12", "I420")
_PLANAR_COLORS = ("NV12_2", "I420_3")

# OpenVINO's names of types by those of the config: "u8" by "uint8".
_KINDS = (("fp", "f", (64, 32, 16)), ("bf", "bf", (16,)), ("int", "i", (64, 32, 16, 8)), ("uint", "u", (64, 32, 16, 8)))
TYPES = {f"{kind}{bits}": f"{short}{bits}" for kind, short, sizes in _KINDS for bits in sizes}
_PACKED_TYPES = ("int4", "uint4", "uint1")


def parse_options(options: ModelOptions) -> Preparation:
    """Parse the options. Raises LoadError with all problems.

    A shape has precedence over a batch size, as in OVMS: `batch` is None if there are `shapes`. Invalid values are
    errors, where OVMS warns and serves the unchanged model, which would shift the mistake to the clients.
    """
    faults: list[str] = []
    layouts = _read(faults, "layout", _parse_layout, options.layout)
    # An invalid layout is reported as such, not as a missing one.
    has_channels = bool(faults) or any("C" in layout.model for layout in layouts.values())
    shapes = _read(faults, "shape", _parse_shape, options.shape)
    batch = _read(faults, "batch_size", _parse_batch, options.batch_size).get(None)
    mean = _read(faults, "mean", _parse_numbers, options.mean).get(None, ())
    scale = _read(faults, "scale", _parse_scale, options.scale).get(None, ())
    color = _read(faults, "color_format", _parse_color, options.color_format).get(None)
    precision = _read(faults, "precision", _parse_precision, options.precision).get(None)
    trial_request = _read(faults, "trial", _parse_trial, options.trial or None).get(None, "")
    for key, of_channels in (("mean", len(mean) > 1), ("scale", len(scale) > 1), ("color_format", color is not None)):
        if of_channels and not has_channels:
            layout = show(options.layout) if options.layout else "none"
            faults.append(f'{key}: needs a layout that says where the channels C are, such as "NHWC", got {layout}')
    if faults:
        raise LoadError("; ".join(faults))
    changes = (shapes, None if shapes else batch, layouts, mean, scale, color, precision)
    extension = options.cpu_extension or ""
    return Preparation(*changes, trial_request, options.trial is not False, extension, options.max_batch_size)


def _read(faults: list[str], key: str, parse: Callable[[Any], T], value: Any) -> dict[str | None, T]:
    """Parse the value of a key, or its values by name; append problems to the faults."""
    named = value if isinstance(value, Mapping) else {} if value is None else {None: value}
    parsed: dict[str | None, T] = {}
    for name, item in named.items():
        try:
            parsed[name] = parse(item)
        except LoadError as error:
            faults.append(f"{key if name is None else f'{key}.{cut(name)}'}: {error}")
    return parsed


# --- Parsers of one value each, which raise LoadError


def _parse_shape(text: str) -> tuple[Dim, ...] | None:
    if text.strip().lower() == _AUTO:
        return None
    items = _split(text)
    if items is None:
        raise LoadError(f'expected dims in parentheses such as "(1,3,200:500,-1)", or "auto", got {show(text)}')
    dims = [_parse_dim(item) for item in items]
    if wrong := [show(item) for item, dim in zip(items, dims, strict=True) if dim is None]:
        raise LoadError(
            "expected each dim to be a size, -1 for any size, or an ascending range such as 200:500, "
            f"got {', '.join(wrong)} in {show(text)}"
        )
    return tuple(filter(None, dims))


def _parse_batch(value: int | str) -> Dim | None:
    text = str(value).strip()
    dim = _ANY if text.lower() == _AUTO else _parse_dim(text)
    if dim is None:
        raise LoadError(
            "expected a size such as 16, 0 for the model's own, -1 for any, an ascending range such as "
            f'"1:16", or "auto", got {show(value)}'
        )
    return dim if dim.size != 0 else None


def _parse_dim(text: str) -> Dim | None:
    if text == "-1":
        return _ANY
    if not (match := _DIM.fullmatch(text)):
        return None
    low = int(match[1])
    high = int(match[2] or low)
    if not match[2]:
        return Dim(low, high) if high < MAX_DIM else None  # to OpenVINO, MAX_DIM means no bound
    return Dim(low, high) if low < high <= MAX_DIM else None


def _parse_layout(text: str) -> LayoutChange:
    layouts = text.replace(" ", "").upper().split(":")
    if not text.isascii() or len(layouts) > 2 or not all(map(_is_layout, layouts)):
        raise LoadError(
            'expected the layouts of client and model such as "NHWC:NCHW", or one for both such as '
            f'"NHWC", each letter once, "?" for any dim and "..." once for several, got {show(text)}'
        )
    client, model = layouts[0], layouts[-1]
    return LayoutChange(model, client if client != model else None)


def _is_layout(text: str) -> bool:
    letters = text.replace("...", "", 1).replace("?", "")
    return text != "" and (letters == "" or letters.isalpha()) and len(set(letters)) == len(letters)


def _parse_numbers(value: float | str) -> tuple[float, ...]:
    text = str(value)
    items = _split(text)
    numbers = [_parse_number(item) for item in ([text.strip()] if items is None else items)]
    if not numbers or None in numbers:
        raise LoadError(
            f'expected a number within FP32, or one for each channel such as "(123.7,116.3,103.5)", got {show(value)}'
        )
    return tuple(number for number in numbers if number is not None)


def _parse_scale(value: float | str) -> tuple[float, ...]:
    numbers = _parse_numbers(value)
    if any(abs(number) < _SMALLEST for number in numbers):
        raise LoadError(f"expected divisors such as 255 that are not zero in FP32, got {show(value)}")
    return numbers


def _parse_number(text: str) -> float | None:
    number = float(text) if _NUMBER.fullmatch(text) else None
    return number if number is not None and abs(number) <= _LARGEST else None


def _parse_color(text: str) -> tuple[str, str]:
    model, colon, client = (part.strip().upper() for part in text.partition(":"))
    if planar := [name for name in _PLANAR_COLORS if name in (model, client)]:
        raise LoadError(
            f"{planar[0]} is not supported, because its planes would be additional inputs; use {planar[0][:4]} in one "
            f'tensor, as in "RGB:{planar[0][:4]}", got {show(text)}'
        )
    if not colon or model not in MODEL_COLORS or client not in _CLIENT_COLORS:
        raise LoadError(
            f"expected the format of the model ({', '.join(MODEL_COLORS)}) and that of the client "
            f'({", ".join(_CLIENT_COLORS)}), such as "RGB:BGR", got {show(text)}'
        )
    return model, client


def _parse_precision(text: str) -> tuple[str, str]:
    names = [name.strip().lower() for name in text.split(":")]
    if packed := [name for name in names if name in _PACKED_TYPES]:
        raise LoadError(
            f"{packed[0]} is not supported, because KServe has no datatype for it; supported are {', '.join(TYPES)}, "
            f'as in "uint8:fp32", got {show(text)}'
        )
    if len(names) > 2 or not all(name in TYPES for name in names):
        raise LoadError(
            'expected the precisions of client and model such as "uint8:fp32", or the client\'s alone such as '
            f'"uint8", of {", ".join(TYPES)}, got {show(text)}'
        )
    return TYPES[names[0]], TYPES[names[1]] if len(names) == 2 else ""


def _split(text: str) -> list[str] | None:
    """Split the items in parentheses or brackets at commas; return None without parentheses or brackets."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("()", "[]"):
        return None
    inner = text[1:-1].strip()
    return [item.strip() for item in inner.split(",")] if inner else []


def _parse_trial(value: str | bool) -> str:
    if value is True:
        return ""
    if os.path.isabs(str(value)) or ".." in str(value).split("/") or "\0" in str(value):
        raise LoadError(
            f"expected the path of a file within the directory of the version, true or false, got {show(value)}"
        )
    return str(value)
