"""libcustom_node_image_transformation: converts size, layout and colour order, subtracts a mean, divides by a scale.

OVMS documents BGR as the default of `original_image_color_order`, as here; its library rejects a pipeline without it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_rest.models.opencv import cv2
from ovms_rest.pipelines.nodes.params import (
    ANY,
    Arrays,
    Forms,
    divisor,
    flag,
    image_form,
    layout,
    list_of,
    number,
    one_of,
    param,
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
_KEPT = -1  # keeps the original's size

_color_order = one_of("BGR", "RGB", "GRAY")


def _count_channels(color_order: str) -> int:
    return 1 if color_order == "GRAY" else 3


def _size(text: str) -> int:
    return _KEPT if text == str(_KEPT) else size(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    target_image_width: int = param(_size, _KEPT)
    target_image_height: int = param(_size, _KEPT)
    original_image_color_order: str = param(_color_order, "BGR")
    target_image_color_order: str = param(_color_order, "")  # "" keeps the original's
    original_image_layout: str = param(layout)
    target_image_layout: str = param(layout, "")  # "" keeps the original's
    scale: float | None = param(divisor, None)
    scale_values: tuple[float, ...] = param(list_of(divisor), ())
    mean_values: tuple[float, ...] = param(list_of(number), ())
    debug: bool = param(flag, False)  # accepted without effect; OVMS writes to its standard output

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a value for each channel."""
        order, channels = self.target_color_order, _count_channels(self.target_color_order)
        for name in ("scale_values", "mean_values"):
            if (count := len(getattr(self, name))) not in (0, channels):
                raise ValueError(
                    f"param {name}: expected {channels} for the target's colour order {order}, got {count}"
                )

    @property
    def target_color_order(self) -> str:
        return self.target_image_color_order or self.original_image_color_order

    @property
    def target_layout(self) -> str:
        return self.target_image_layout or self.original_image_layout


def inputs(options: Options) -> Forms:
    """Return the form of an image of any size; `execute` checks its channels, as OVMS does."""
    return {"image": ("FP32", (1, ANY, ANY, ANY))}


def outputs(options: Options) -> Forms:
    height, width = options.target_image_height, options.target_image_width  # _KEPT is ANY
    return {"image": image_form(options.target_layout, _count_channels(options.target_color_order), height, width)}


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[np.float32]]:
    """Transform the image. Raises ValueError for a wrong number of channels, or no pixels."""
    _check_shape(arrays["image"].shape, options)
    picture = read_picture(arrays["image"], options.original_image_layout)
    original_height, original_width = picture.shape[:2]
    height = original_height if options.target_image_height == _KEPT else options.target_image_height
    width = original_width if options.target_image_width == _KEPT else options.target_image_width
    if options.original_image_color_order != options.target_color_order:
        conversion = _CONVERSIONS[options.original_image_color_order, options.target_color_order]
        picture = cv2.cvtColor(picture, conversion)
    # The smaller picture is scaled, as in OVMS.
    if original_height * original_width < height * width:
        picture = resize(_scale(picture, options), width, height)
    else:
        picture = _scale(resize(picture, width, height), options)
    _, dims = image_form(options.target_layout, _count_channels(options.target_color_order), height, width)
    transformed = np.empty(dims, np.float32)
    write_picture(picture, transformed[0], options.target_layout)
    return {"image": transformed}


def _check_shape(shape: tuple[int, ...], options: Options) -> None:
    """Raise ValueError for a shape that `inputs` allows but the params do not."""
    _, dims = image_form(options.original_image_layout, _count_channels(options.original_image_color_order), ANY, ANY)
    if any(dim not in (ANY, length) for dim, length in zip(dims, shape, strict=True)):
        raise ValueError(f"input image has the shape {list(shape)}, expected {list(dims)}")
    if 0 in shape:
        raise ValueError(f"input image has the shape {list(shape)}, which has no pixels")


def _scale(picture: Picture, options: Options) -> Picture:
    """Subtract the mean, then divide; `scale_values` take precedence over `scale`."""
    height, width = picture.shape[:2]
    # Whole rows make long loops in numpy: a sixth of the time of looping over three channels.
    rows = picture.reshape(height, -1)
    if options.mean_values:
        rows = rows - np.tile(np.array(options.mean_values, np.float32), width)
    divisors = options.scale_values or (() if options.scale is None else (options.scale,))
    if divisors:
        # OpenCV's division by a number is a multiplication in FP32 with its reciprocal.
        factors = (1.0 / np.array(divisors, np.float32).astype(np.float64)).astype(np.float32)
        rows = rows * (np.tile(factors, width) if len(factors) > 1 else factors)
    return rows.reshape(height, width, -1)
