"""libcustom_node_image_transformation: another size, layout and colour order, less a mean, divided by a scale.

OVMS documents BGR as the default of `original_image_color_order`, as it is here; its library refuses a pipeline
without it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_rest.opencv import cv2
from ovms_rest.pipelines.nodes.params import (
    ANY,
    Arrays,
    Forms,
    Params,
    check_arrays,
    divisor,
    flag,
    image_form,
    layout,
    list_of,
    number,
    one_of,
    param,
    parse_params,
    size,
)
from ovms_rest.pipelines.nodes.pictures import Picture, read_picture, resize, write_picture

_CONVERSIONS = {
    ("GRAY", "BGR"): cv2.COLOR_GRAY2BGR,
    ("GRAY", "RGB"): cv2.COLOR_GRAY2RGB,
    ("BGR", "RGB"): cv2.COLOR_BGR2RGB,
    ("BGR", "GRAY"): cv2.COLOR_BGR2GRAY,
    ("RGB", "BGR"): cv2.COLOR_RGB2BGR,
    ("RGB", "GRAY"): cv2.COLOR_RGB2GRAY,
}
_KEPT = -1  # a size that is the original's

_color_order = one_of("BGR", "RGB", "GRAY")


def _size(text: str) -> int:
    return _KEPT if text == str(_KEPT) else size(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    target_image_width: int = param(_size, _KEPT)
    target_image_height: int = param(_size, _KEPT)
    original_image_color_order: str = param(_color_order, "BGR")
    target_image_color_order: str = param(_color_order, "")  # "" is the original's
    original_image_layout: str = param(layout)
    target_image_layout: str = param(layout, "")  # "" is the original's
    scale: float | None = param(divisor, None)
    scale_values: tuple[float, ...] = param(list_of(divisor), ())
    mean_values: tuple[float, ...] = param(list_of(number), ())
    debug: bool = param(flag, False)  # OVMS writes to its standard output then; nothing here

    def __post_init__(self) -> None:
        for name in ("scale_values", "mean_values"):
            count = len(getattr(self, name))
            if count not in (0, self.target_channels):
                raise ValueError(
                    f"param {name}: expected {self.target_channels} for the target's colour order "
                    f"{self.target_color_order}, got {count}"
                )

    @property
    def target_color_order(self) -> str:
        return self.target_image_color_order or self.original_image_color_order

    @property
    def target_layout(self) -> str:
        return self.target_image_layout or self.original_image_layout

    @property
    def original_channels(self) -> int:
        return 1 if self.original_image_color_order == "GRAY" else 3

    @property
    def target_channels(self) -> int:
        return 1 if self.target_color_order == "GRAY" else 3


def inputs(params: Params) -> Forms:
    """Take an image of any size; its channels are checked when it comes, as OVMS does."""
    parse_params(_Options, params)
    return {"image": ("FP32", (1, ANY, ANY, ANY))}


def outputs(params: Params) -> Forms:
    """Give the image."""
    options = parse_params(_Options, params)
    height, width = options.target_image_height, options.target_image_width  # _KEPT is ANY
    return {"image": image_form(options.target_layout, options.target_channels, height, width)}


def execute(arrays: Arrays, params: Params) -> dict[str, NDArray[np.float32]]:
    """Transform the image. Raises ValueError."""
    options = parse_params(_Options, params)
    check_arrays(arrays, {"image": image_form(options.original_image_layout, options.original_channels, ANY, ANY)})
    if not arrays["image"].size:
        raise ValueError(f"input image has the shape {list(arrays['image'].shape)}, which has no pixels")
    picture = read_picture(arrays["image"], options.original_image_layout)
    original_height, original_width = picture.shape[:2]
    height = original_height if options.target_image_height == _KEPT else options.target_image_height
    width = original_width if options.target_image_width == _KEPT else options.target_image_width
    if options.original_image_color_order != options.target_color_order:
        conversion = _CONVERSIONS[options.original_image_color_order, options.target_color_order]
        picture = cv2.cvtColor(picture, conversion)
    # Whichever picture is the smaller is scaled, as in OVMS.
    if original_height * original_width < height * width:
        picture = resize(_scale(picture, options), width, height)
    else:
        picture = _scale(resize(picture, width, height), options)
    _, dims = image_form(options.target_layout, options.target_channels, height, width)
    transformed = np.empty(dims, np.float32)
    write_picture(picture, transformed[0], options.target_layout)
    return {"image": transformed}


def _scale(picture: Picture, options: _Options) -> Picture:
    """Subtract the mean, then divide; the values of the channels go before one for all."""
    height, width = picture.shape[:2]
    # A row at a time, of which numpy makes a long loop: a sixth of the time of three channels at a time.
    rows = picture.reshape(height, -1)
    if options.mean_values:
        rows = rows - np.tile(np.array(options.mean_values, np.float32), width)
    divisors = options.scale_values or (() if options.scale is None else (options.scale,))
    if divisors:
        # OpenCV's division by a number is a multiplication in FP32 with its reciprocal.
        factors = (1.0 / np.array(divisors, np.float32).astype(np.float64)).astype(np.float32)
        rows = rows * (np.tile(factors, width) if len(factors) > 1 else factors)
    return rows.reshape(height, width, -1)
