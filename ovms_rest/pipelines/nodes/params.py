"""The params of shipped nodes: strings of the config, read once into frozen dataclasses with fields of their names.

Here are the params that several nodes share, and the readers. A reader returns the value of a string, or raises
ValueError with the values that it expected.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovms_rest.checking import as_json

Params = Mapping[str, str]
Arrays = Mapping[str, NDArray[Any]]
Form = tuple[str, tuple[int, ...]]  # the datatype and the dims of a tensor
Forms = dict[str, Form]
_Options = TypeVar("_Options")

ANY = -1
MAX_INT = 2**31 - 1  # of OpenVINO Model Server's and OpenCV's int
_FP32 = np.finfo(np.float32)


def param(read: Callable[[str], Any], default: Any = MISSING) -> Any:
    """Declare a param; without a default it is required."""
    return field(default=default, metadata={"read": read})


def parse_params(options: type[_Options], params: Params) -> _Options:
    """Read params into their dataclass. Raises ValueError with every mistake."""
    known = {item.name: item for item in fields(options)}  # type: ignore[arg-type]  # a dataclass
    values = {}
    problems = []
    for name, text in sorted(params.items()):
        if name not in known:
            (near,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            problems.append(f"unknown param {name}; the nearest known one is {near}")
            continue
        try:
            values[name] = known[name].metadata["read"](text)
        except ValueError as error:
            problems.append(f"param {name}: {error}, got {as_json(text)}")
    problems += [f"param {name} is missing" for name in known if known[name].default is MISSING and name not in params]
    if problems:
        raise ValueError("; ".join(problems))
    return options(**values)


def one_of(*choices: str) -> Callable[[str], str]:
    """Make the reader of one of several words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected {' or '.join(choices)}")
        return text

    return read


def integer(
    low: int = -MAX_INT, form: str = "a whole number", fits: Callable[[int], bool] = lambda number: True
) -> Callable[[str], int]:
    """Make the reader of whole numbers of at least `low` that `fits` accepts; `form` describes them."""

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,10}\s*", text) else None
        if number is None or not low <= number <= MAX_INT or not fits(number):
            raise ValueError(f"expected {form} from {low} to {MAX_INT}")
        return number

    return read


def number(text: str) -> float:
    """Read a number that FP32 can hold."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= float(_FP32.max):
        raise ValueError("expected a number that FP32 can hold")
    return value


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        value = number(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError("expected a number from 0 to 1")
    return value


def not_negative(text: str) -> float:
    """Read a number of at least 0."""
    value = number(text)
    if value < 0:
        raise ValueError("expected a number of at least 0")
    return value


def divisor(text: str) -> float:
    """Read a number that is not 0 in FP32."""
    value = number(text)
    if abs(value) < float(_FP32.tiny):
        raise ValueError("expected a number that is not 0 in FP32")
    return value


def list_of(read: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """Make the reader of a list of numbers such as [123.7,116.3,103.5]."""

    def read_list(text: str) -> tuple[float, ...]:
        body = text[1:-1]
        if len(text) < 2 or text[0] != "[" or text[-1] != "]":
            raise ValueError("expected numbers such as [123.7,116.3,103.5]")
        return tuple(read(item) for item in body.split(",")) if body.strip() else ()

    return read_list


def flag(text: str) -> bool:
    return one_of("true", "false")(text) == "true"


size = integer(1)
layout = one_of("NCHW", "NHWC")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """The params of nodes that take an image of a fixed size and detections in it."""

    original_image_width: int = param(size)
    original_image_height: int = param(size)
    original_image_layout: str = param(layout, "NCHW")
    target_image_width: int = param(size)
    target_image_height: int = param(size)
    target_image_layout: str = param(layout, "NCHW")
    confidence_threshold: float = param(fraction)
    debug: bool = param(flag, False)  # accepted without effect; OVMS writes to its standard output


@dataclass(frozen=True, slots=True, kw_only=True)
class CropOptions(ImageOptions):
    """The params of nodes that cut detections out of the image."""

    convert_to_gray_scale: bool = param(flag, False)
    max_output_batch: int = param(size, 100)


def image_form(layout: str, channels: int, height: int, width: int) -> Form:
    return "FP32", (1, channels, height, width) if layout == "NCHW" else (1, height, width, channels)


def original_form(options: ImageOptions) -> Form:
    return image_form(options.original_image_layout, 3, options.original_image_height, options.original_image_width)


def crops_form(options: CropOptions) -> Form:
    """Return the form of the crops, [N,1,C,H,W] or [N,1,H,W,C]."""
    channels = 1 if options.convert_to_gray_scale else 3
    datatype, dims = image_form(
        options.target_image_layout, channels, options.target_image_height, options.target_image_width
    )
    return datatype, (ANY, *dims)


def text_forms(options: CropOptions) -> Forms:
    """Return the forms of the outputs of a text node: images, boxes and confidences."""
    return {
        "text_images": crops_form(options),
        "text_coordinates": ("INT32", (ANY, 1, 4)),
        "confidence_levels": ("FP32", (ANY, 1, 1)),
    }
