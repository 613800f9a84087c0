"""The messages of the protocol as values: tensors, what a model takes and gives, requests and responses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ovms_rest.protocol.strings import BytesArray

Array = NDArray[Any] | BytesArray

# KServe v2 allows an unsigned 64-bit dim; OpenVINO's and numpy's are signed.
MAX_DIM = 2**63 - 1

Parameters = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named array on its way in or out: an ndarray of the datatype's dtype, or a BytesArray for BYTES."""

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims."""
        return self.array.shape


class Dim(NamedTuple):
    """The sizes one dimension may have, both ends included; `high` None is no upper bound."""

    low: int
    high: int | None

    def __str__(self) -> str:
        """Write it as the configuration does: 3, -1 or 1:8."""
        if self.low == self.high:
            return str(self.low)
        if self.low == 0 and self.high is None:
            return "-1"
        return f"{self.low}:{'' if self.high is None else self.high}"

    @property
    def size(self) -> int | None:
        """The size of a static dimension, None of any other."""
        return self.low if self.low == self.high else None

    def holds(self, size: int) -> bool:
        """Tell whether a tensor may have that size here."""
        return self.low <= size and (self.high is None or size <= self.high)


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output as the client sees it; `dims` None is an unknown rank, which only outputs have."""

    name: str
    datatype: str
    dims: tuple[Dim, ...] | None
    # The shape when every dim is static: one comparison settles it.
    static_shape: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Settle at load what every request would ask again."""
        sizes = None if self.dims is None else tuple(dim.size for dim in self.dims)
        static = sizes if sizes is not None and None not in sizes else None
        object.__setattr__(self, "static_shape", static)

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of that shape fits."""
        if self.static_shape is not None:
            return shape == self.static_shape
        return self.dims is None or (
            len(shape) == len(self.dims) and all(dim.holds(size) for dim, size in zip(self.dims, shape, strict=True))
        )

    def describe_shape(self) -> str:
        """Write the shape for a person: [1,3,200:500,-1]."""
        return "[...]" if self.dims is None else f"[{','.join(map(str, self.dims))}]"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the metadata response; every dim that is not static is -1."""
        dims = (Dim(0, None),) if self.dims is None else self.dims
        shape = [-1 if dim.size is None else dim.size for dim in dims]
        return {"name": self.name, "datatype": self.datatype, "shape": shape}


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a served version takes and gives; `inputs` and `outputs` are keyed by name, in alphabetical order."""

    name: str
    version: str
    inputs: Mapping[str, TensorMetadata]
    outputs: Mapping[str, TensorMetadata]
    rt_info: Mapping[str, Any] | None = None

    def to_json(self, versions: list[str]) -> dict[str, Any]:
        """Return the model metadata response (protocol.md section 2)."""
        return {
            "name": self.name,
            "versions": versions,
            "platform": "OpenVINO",
            "inputs": [tensor.to_json() for tensor in self.inputs.values()],
            "outputs": [tensor.to_json() for tensor in self.outputs.values()],
        } | ({} if self.rt_info is None else {"rt_info": self.rt_info})


class RequestedOutput(NamedTuple):
    """An output as the client wants it: its name, and whether as binary."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A decoded request. No `outputs` means all of them, each `binary_output` or not."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    id: str = ""
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """What is answered: the outputs in the order in which they are sent, `binary` for each of them."""

    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    binary: tuple[bool, ...]
    id: str = ""
