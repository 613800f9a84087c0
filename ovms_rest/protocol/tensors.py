"""The messages of the protocol as values: tensors, metadata of models, requests and responses.

Values made for every request are NamedTuples, which take a third of the time of frozen dataclasses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from ovms_rest.protocol.strings import BytesArray

Array = NDArray[Any] | BytesArray

# KServe v2 allows an unsigned 64-bit dim; OpenVINO's and numpy's are signed.
MAX_DIM = 2**63 - 1

Parameters = Mapping[str, str | int | float | bool]
NO_PARAMETERS: Parameters = MappingProxyType({})


def memory_of(array: Array) -> tuple[NDArray[Any], ...]:
    """Return the ndarrays that an array consists of."""
    return (array.begins, array.ends, array.symbols) if isinstance(array, BytesArray) else (array,)


def copy_array(array: Array) -> Array:
    """Return an array with memory of its own."""
    if isinstance(array, BytesArray):
        return BytesArray(*(part.copy() for part in memory_of(array)))
    return array.copy()


class Tensor(NamedTuple):
    """An input or output: an ndarray of the datatype's dtype, or a BytesArray for BYTES, with its name.

    The array owns its memory, or refers to the owner through numpy's chain of bases. So a view on it, such as a section
    of a response, may outlive the request.
    """

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def batch_of(shape: tuple[int, ...]) -> int:
    """Return the number of inferences that a tensor of a shape counts as: its first dim, 1 for a scalar.

    Without elements it is 0, for its first dim may be larger than counters hold.
    """
    return 0 if 0 in shape else shape[0] if shape else 1


class Dim(NamedTuple):
    """The sizes that a dimension may have, from `low` to `high`, both included; `high` None means no upper bound."""

    low: int
    high: int | None

    def __str__(self) -> str:
        """Return it as in the configuration: 3, -1 or 1:8."""
        if self.low == self.high:
            return str(self.low)
        if self.low == 0 and self.high is None:
            return "-1"
        return f"{self.low}:{'' if self.high is None else self.high}"

    @property
    def size(self) -> int | None:
        """The size of a static dimension, None for any other."""
        return self.low if self.low == self.high else None

    def holds(self, size: int) -> bool:
        """Return whether a tensor may have that size here."""
        return self.low <= size and (self.high is None or size <= self.high)

    def clamp(self, size: int) -> int:
        """Return the allowed size that is nearest to this one."""
        size = max(size, self.low)
        return size if self.high is None else min(size, self.high)


class ImageSize(NamedTuple):
    """The size of the images that an input takes; None where it takes any."""

    height: int | None
    width: int | None
    channels: int | None


class ImageDecoder(Protocol):
    """Decodes the encoded images of an input."""

    @property
    def expected(self) -> ImageSize | None:
        """The size of the images, None if the configuration of the input allows none."""

    def draw(self, array: NDArray[Any]) -> list[bytes] | None:
        """Return small files that decode to an array for the input, None if there are none."""

    def read(self, strings: BytesArray, label: str) -> NDArray[Any]:
        """Return the images of a request as an array. Raises InvalidRequestError, beginning with `label`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """For messages: how the configuration changed an input of a model, and how it could.

    `layout` is the setting that transposes, such as "NHWC:NCHW" ("" for none); `dims` are those of the model itself.
    `has_precision` is whether the setting `precision` is available and unset.
    """

    layout: str = ""
    dims: tuple[Dim, ...] = ()
    has_precision: bool = False


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output as the client sees it; `dims` None means an unknown rank, which only outputs have.

    Inputs that also take encoded images have `images`, inputs of models `origin`.
    """

    name: str
    datatype: str
    dims: tuple[Dim, ...] | None
    images: ImageDecoder | None = field(default=None, compare=False)
    origin: Origin | None = field(default=None, compare=False)
    # The shape when every dim is static, to check a request by one comparison.
    static_shape: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Compute at load what every request needs."""
        sizes = None if self.dims is None else tuple(dim.size for dim in self.dims)
        static = sizes if sizes is not None and None not in sizes else None
        object.__setattr__(self, "static_shape", static)

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of that shape fits."""
        if self.static_shape is not None:
            return shape == self.static_shape
        if self.dims is None:
            return True
        if len(shape) != len(self.dims):
            return False
        for (low, high), size in zip(self.dims, shape, strict=True):
            if size < low or (high is not None and size > high):
                return False
        return True

    def describe_shape(self) -> str:
        """Return the shape for messages: [1,3,200:500,-1]."""
        return "[...]" if self.dims is None else f"[{','.join(map(str, self.dims))}]"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the metadata response; every dim that is not static is -1."""
        dims = (Dim(0, None),) if self.dims is None else self.dims
        shape = [-1 if dim.size is None else dim.size for dim in dims]
        return {"name": self.name, "datatype": self.datatype, "shape": shape}


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The tensors of a served version; `inputs` and `outputs` are keyed by name, in alphabetical order.

    `labels` are the names of the classes of its outputs, by index.
    """

    name: str
    version: str
    inputs: Mapping[str, TensorMetadata]
    outputs: Mapping[str, TensorMetadata]
    rt_info: Mapping[str, Any] | None = None
    labels: tuple[str, ...] = ()
    # All outputs, for requests that name none: as JSON and as binary.
    all_outputs: tuple[tuple["RequestedOutput", ...], tuple["RequestedOutput", ...]] = field(init=False)
    # The elements of the outputs whose shapes are static, and whether there are other outputs.
    static_elements: int = field(init=False)
    has_dynamic_outputs: bool = field(init=False)

    def __post_init__(self) -> None:
        """Compute at load what every request needs."""
        shapes = [output.static_shape for output in self.outputs.values()]
        object.__setattr__(self, "static_elements", sum(math.prod(shape) for shape in shapes if shape is not None))
        object.__setattr__(self, "has_dynamic_outputs", None in shapes)
        as_json, as_binary = (tuple(RequestedOutput(name, binary) for name in self.outputs) for binary in (False, True))
        object.__setattr__(self, "all_outputs", (as_json, as_binary))

    def to_json(self, versions: list[str]) -> dict[str, Any]:
        """Return the model metadata response (protocol/README.md section 2)."""
        return {
            "name": self.name,
            "versions": versions,
            "platform": "OpenVINO",
            "inputs": [tensor.to_json() for tensor in self.inputs.values()],
            "outputs": [tensor.to_json() for tensor in self.outputs.values()],
        } | ({} if self.rt_info is None else {"rt_info": self.rt_info})


class RequestedOutput(NamedTuple):
    """An output in a request: its name, whether as binary, and the number of classes, 0 for its values."""

    name: str
    binary: bool
    classification: int = 0


class InferenceRequest(NamedTuple):
    """A decoded request. Empty `outputs` means all of them, as binary if `binary_output`.

    `timeout_us` is how long it may wait for its inference, 0 without a limit. `priority` is 1 for the first, then 2,
    and so on; 0 comes last.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    id: str = ""
    parameters: Parameters = NO_PARAMETERS
    timeout_us: int = 0
    priority: int = 0


class InferenceResponse(NamedTuple):
    """A response: the outputs in the order of sending, each with whether it is sent as binary."""

    model_name: str
    model_version: str
    outputs: Sequence[tuple[Tensor, bool]]
    id: str = ""
