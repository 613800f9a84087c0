"""Encoded images: files sent as BYTES for a 4-D input are decoded to the array for the model.

The rules are those of the OpenVINO Model Server (protocol/README.md section 6, "Encoded images"): OpenCV decodes a file
unchanged (BGR, alpha and 16 bits kept, EXIF ignored), its values are converted to the input's datatype, and then it is
resized where that is allowed. Unlike OVMS, an input of three channels also takes grey images and images with alpha.

Headers are checked first, to limit the costs of decoding (image_files.py).
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_rest.errors import InvalidRequestError
from ovms_rest.models.image_files import FORMATS, IMAGE_WORK, is_honest, measure
from ovms_rest.models.image_resizing import PRECISIONS, Precision, write_image
from ovms_rest.models.opencv import cv2
from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import ImageSize, TensorMetadata
from ovms_rest.protocol.words import count_of, join

# OVMS resizes with these configured layouts, but not with a default one. "N?HWC" has the dim of a demultiplexer.
_RESIZING_LAYOUTS = ("NHWC", "N?HWC", "...")
_DEFAULT_LAYOUT = "N..."
_EXPECTED = f"expected a complete file in one of {', '.join(FORMATS)}"
# The problem that users of OVMS have most (its issue 912).
_NO_LAYOUT = 'the configuration of the model has no "layout"; set "NHWC", or "NHWC:NCHW" for a model that takes NCHW'

# The conversion to BGR by the number of channels.
_TO_BGR = {1: cv2.COLOR_GRAY2BGR, 4: cv2.COLOR_BGRA2BGR}

# The channels of the images that OpenCV encodes and decodes.
_CHANNELS = (1, 3, 4)
# Limits of the images that are drawn for examples: their number, the values of all, those of all when they are equal,
# and the side of an image that will be resized.
_MOST_DRAWN, _MOST_DRAWN_VALUES, _MOST_UNIFORM_VALUES, _DRAWN_SIDE = 16, 2**18, 2**24, 8

# Limits of the work of decoding the images of an input, in units of 10 ns (image_files.py): a constant, 0.17 s, and a
# share per pixel, which costs 1, in a GIF 4, and in an uncompressed GIF 13.
_WORK, _WORK_PER_PIXEL = 2**24, 16
# The limit per pixel that a request may have, however few it has.
_WORK_PER_ALLOWED_PIXEL = 1.5
# PNGs with up to this many bytes of data are not unpacked just to measure the data, which takes nearly as long as
# decoding. At worst these take 1.1 s.
_TRUSTED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of the pixels of one encoded image, and of all images of one input of a request.

    `request` also limits the values of the array that they are decoded to.
    """

    image: int = 2**26
    request: int = 2**28


class ImageReader:
    """Decodes the images of an input; what depends on its metadata alone is computed once."""

    def __init__(self, metadata: TensorMetadata, layout: str | None, limits: ImageLimits) -> None:
        """Prepare for an input of 4 dims; `layout` is the client's, None if none is declared."""
        assert metadata.dims is not None
        self._batch, self._height, self._width, self._channels = metadata.dims
        self._datatype = metadata.datatype
        self._precision = PRECISIONS.get(metadata.datatype)
        self._layout = layout or _DEFAULT_LAYOUT
        self._takes_images = _holds_nhwc(self._layout)
        self._obstacle = _find_obstacle(self._layout, metadata)
        self._limits = limits

    @property
    def expected(self) -> ImageSize | None:
        """The size of the images, None if the layout, the datatype or the number of channels allows none."""
        if not self._takes_images or self._precision is None or not any(map(self._channels.holds, _CHANNELS)):
            return None
        return ImageSize(self._height.size, self._width.size, self._channels.size)

    def draw(self, array: NDArray[Any]) -> list[bytes] | None:
        """Return PNG files that decode to an array [n,height,width,channels], None if there are none.

        The files of an array of equal elements are small, where the input resizes images.
        """
        count, height, width, channels = array.shape
        if self.expected is None or channels not in _CHANNELS or count > _MOST_DRAWN:
            return None
        is_uniform = not any(array.strides)  # one element for all
        if not 0 < array.size <= (_MOST_UNIFORM_VALUES if is_uniform else _MOST_DRAWN_VALUES):
            return None
        if is_uniform:
            array = array[:1]
            if not self._obstacle:
                height, width = min(height, _DRAWN_SIDE), min(width, _DRAWN_SIDE)
            array = array[:, :height, :width]
        pixels = array.astype(np.uint8)
        if not (pixels == array).all():
            return None
        files = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
        drawn: list[bytes] = files * (count // len(files))
        return drawn

    def read(self, strings: BytesArray, label: str) -> NDArray[Any]:
        """Decode images, an array of shape [n], to the array [n,height,width,channels] of the input.

        Raises InvalidRequestError, whose text begins with `label`, for images that cannot be decoded or do not fit.
        """
        self.check_shape(strings.shape, label)
        files = self.split_files(strings, label)
        self.check_work(files, label)
        return self.decode(files, label)

    def decode(self, files: list[NDArray[np.uint8]], label: str) -> NDArray[Any]:
        """Decode files whose number and work have been checked."""
        image = self._fit_channels(_decode(files[0], _name(label, 0)))
        first = image.shape
        # Where the model leaves height, width or channels open, the first image decides.
        target = (self._height.clamp(first[0]), self._width.clamp(first[1]), self._channels.clamp(first[2]))
        precision = self._check_image(image.shape, first, target, _name(label, 0))
        self.check_values((len(files), *target), label)
        if len(files) == 1 and image.shape == target and image.dtype == precision.dtype:
            return image[np.newaxis]
        array: NDArray[Any] = np.empty((len(files), *target), precision.dtype)
        write_image(image, array[0], precision)
        for index in range(1, len(files)):
            image = self._fit_channels(_decode(files[index], _name(label, index)))
            self._check_image(image.shape, first, target, _name(label, index))
            write_image(image, array[index], precision)
        return array

    def _fit_channels(self, image: NDArray[Any]) -> NDArray[Any]:
        """Convert a grey image, or one with alpha, to BGR for an input of three channels; return others unchanged."""
        if self._channels.size != 3 or image.shape[2] not in _TO_BGR:
            return image
        return cv2.cvtColor(image, _TO_BGR[image.shape[2]])

    def check_shape(self, shape: tuple[int, ...], label: str) -> None:
        """Refuse shapes other than [n], a wrong number of images, and layouts that do not allow images."""
        if len(shape) != 1:
            raise InvalidRequestError(f"{label}: encoded images need the shape [n], got {join(shape)}")
        if not self._batch.holds(shape[0]):
            raise InvalidRequestError(f"{label}: got {count_of(shape[0], 'image')}, the model takes {self._batch}")
        if not self._takes_images:
            own = self._layout if sorted(self._layout) == sorted("NHWC") else "NCHW"
            raise InvalidRequestError(
                f"{label}: encoded images need the layout NHWC, this input has {self._layout}; "
                f'set "layout": "NHWC:{own}" in the configuration of the model'
            )
        if shape == (0,):
            raise InvalidRequestError(f"{label}: got no image, at least one is needed")

    def split_files(self, strings: BytesArray, label: str) -> list[NDArray[np.uint8]]:
        """Return the files in strings of shape [n] as views; refuse more files than can be decoded in time."""
        count, most = strings.shape[0], self._allow_work(self._limits.request) // IMAGE_WORK
        if count > most:
            raise InvalidRequestError(f"{label}: got {count_of(count, 'image')}, at most {most} are allowed")
        begins, ends = strings.begins.tolist(), strings.ends.tolist()
        return [strings.symbols[begin:end] for begin, end in zip(begins, ends, strict=True)]

    def _allow_work(self, pixels: int) -> int:
        return _WORK + int(min(_WORK_PER_PIXEL * pixels, _WORK_PER_ALLOWED_PIXEL * self._limits.request))

    def check_work(self, files: list[NDArray[np.uint8]], label: str) -> None:
        """Refuse files that are too large or take too long to decode; stop at the first one."""
        pixels, work, packed = 0, 0, 0
        for index, file in enumerate(files):
            if file.size == 0:
                raise InvalidRequestError(f"{_name(label, index)} is empty, {_EXPECTED}")
            picture = measure(file)
            if picture is None:
                raise _undecodable(_name(label, index))
            if picture.pixels > self._limits.image:
                raise InvalidRequestError(
                    f"{_name(label, index)} has {picture.pixels} pixels, at most {self._limits.image} are allowed"
                )
            pixels += picture.pixels
            work += picture.work
            packed += picture.packed
            if work > (allowed := self._allow_work(pixels)):
                raise InvalidRequestError(
                    f"{label}: up to image {index}, decoding {pixels} pixels takes as much work as {work} usual ones, "
                    f"at most {allowed} are allowed"
                )
            if picture.packed and packed > _TRUSTED_BYTES and not is_honest(file):
                raise InvalidRequestError(f"{_name(label, index)} has more data than its pixels need")
        if pixels > self._limits.request:
            raise InvalidRequestError(
                f"{label}: the images have {pixels} pixels together, at most {self._limits.request} are allowed"
            )

    def _check_image(
        self, shape: tuple[int, ...], first: tuple[int, ...], target: tuple[int, ...], name: str
    ) -> Precision:
        """Refuse an image that cannot be converted to the target's shape; return the precision of the target."""
        if self._obstacle and shape[:2] != first[:2]:
            raise InvalidRequestError(
                f"{name} is {_size(shape)}, image 0 is {_size(first)}, and images are not resized: {self._obstacle}"
            )
        if shape[2] != target[2]:
            if self._layout == _DEFAULT_LAYOUT and target[2] not in _CHANNELS:
                hint = f"; {_NO_LAYOUT}"  # the last dim is not that of channels
            else:
                hint = "; convert it to grey" if target[2] == 1 else ""
            raise InvalidRequestError(f"{name} has {count_of(shape[2], 'channel')}, the model takes {target[2]}{hint}")
        if self._precision is None:
            raise InvalidRequestError(
                f"{name} cannot be converted to {self._datatype}, the precision of this input; supported are "
                f"{', '.join(PRECISIONS)}"
            )
        if self._obstacle and shape[:2] != target[:2]:
            raise InvalidRequestError(
                f"{name} is {_size(shape)}, the model takes {_size(target)}, "
                f"and images are not resized: {self._obstacle}"
            )
        return self._precision

    def check_values(self, shape: tuple[int, ...], label: str) -> None:
        """Refuse a shape with too many values."""
        values = math.prod(shape)
        if values > self._limits.request:
            raise InvalidRequestError(
                f"{label}: the decoded images have the shape {join(shape)} with {values} values, "
                f"at most {self._limits.request} are allowed"
            )


class ShardedImageReader:
    """Decodes the images of a demultiplexed input of a pipeline, each to a shard of its own."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader

    @property
    def expected(self) -> ImageSize | None:
        """The size of the images, as for one shard."""
        return self._reader.expected

    def draw(self, array: NDArray[Any]) -> list[bytes] | None:
        """Return PNG files that decode to an array [n,1,height,width,channels], None if there are none."""
        drawn = [self._reader.draw(shard) for shard in array[:_MOST_DRAWN]]
        files = [shard[0] for shard in drawn if shard is not None]
        return files if len(files) == len(array) else None

    def read(self, strings: BytesArray, label: str) -> NDArray[Any]:
        """Decode images, an array of shape [n], to the array [n,1,height,width,channels] of the input.

        Raises InvalidRequestError, whose text begins with `label`, also for images of different sizes.
        """
        if len(strings.shape) != 1 or strings.shape == (0,):
            raise InvalidRequestError(f"{label}: encoded images need the shape [n], got {join(strings.shape)}")
        files = self._reader.split_files(strings, label)
        self._reader.check_work(files, label)
        self._reader.check_shape((1,), f"{label}: shard 0")
        arrays: list[NDArray[Any]] = []
        for index, file in enumerate(files):
            arrays.append(self._reader.decode([file], f"{label}: shard {index}"))
            if not index:
                self._reader.check_values((len(files), *arrays[0].shape), label)
            if arrays[index].shape != arrays[0].shape:
                raise InvalidRequestError(
                    f"{label}: shard {index} has the shape {join(arrays[index].shape)}, shard 0 {join(arrays[0].shape)}"
                )
        return np.stack(arrays)


def take_images(port: TensorMetadata, layout: str | None, limits: ImageLimits) -> TensorMetadata:
    """Return metadata of an input that also accepts encoded images, if it has four dims."""
    if port.datatype == BYTES or port.dims is None or len(port.dims) != 4:
        return port
    return dataclasses.replace(port, images=ImageReader(port, layout, limits))


def _decode(file: NDArray[np.uint8], name: str) -> NDArray[Any]:
    """Decode a file to [height,width,channels]."""
    try:
        image: NDArray[Any] | None = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise _undecodable(name)
    return image[:, :, np.newaxis] if image.ndim == 2 else image


def _holds_nhwc(layout: str) -> bool:
    """Return whether a layout of 4 dims can be NHWC; "?" is any dim, "..." any number of dims."""
    pattern = re.escape(layout).replace(r"\.\.\.", ".*").replace(r"\?", ".")
    return layout in _RESIZING_LAYOUTS or re.fullmatch(pattern, "NHWC") is not None


def _find_obstacle(layout: str, metadata: TensorMetadata) -> str:
    """Return the reason why images are not resized for an input, "" if they are."""
    if layout == _DEFAULT_LAYOUT:
        return _NO_LAYOUT
    if layout not in _RESIZING_LAYOUTS:
        return f'its layout is {layout}, not NHWC; set "layout": "NHWC" in the configuration of the model'
    assert metadata.dims is not None
    if all(dim.high for dim in metadata.dims):
        return ""
    sizes = (dim.high or usual for dim, usual in zip(metadata.dims, (1, 224, 224, 3), strict=True))
    return (
        f'the model\'s shape is {metadata.describe_shape()}; set a "shape" without unbounded dims in the '
        f'configuration of the model, such as "({",".join(map(str, sizes))})"'
    )


def _name(label: str, index: int) -> str:
    return f"{label}: image {index}"


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} (height x width)"


def _undecodable(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} cannot be decoded, {_EXPECTED}")
