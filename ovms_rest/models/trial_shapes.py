"""Shapes to try a model with, before it has seen a request and after one has failed."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ovms_rest.protocol.tensors import Dim, TensorMetadata

# Those that can be halved several times, which detectors and encoder-decoders do.
_USUAL_SIZES = (32, 64, 224, 640)

Shape = tuple[int, ...]
Sizes = tuple[int | None, ...]


def choose_shapes(inputs: Sequence[TensorMetadata], sizes: Sequence[Sizes]) -> list[Mapping[str, Shape]]:
    """Return shapes for all inputs by name, those that the model takes most likely first, none twice.

    `sizes` are those that the inputs had before the config made them dynamic, None where there is none. What is dynamic
    gets them, so far as it allows, or else what other inputs have in the same dim, for they often have to agree: the
    smallest size that all of them allow which are dynamic there, or that of one which is not. Further shapes have
    another size in one of the dims, or in all that are dynamic.
    """
    columns = itertools.zip_longest(*(port.dims or () for port in inputs))
    fixed = tuple(max((dim.size or 0 for dim in column if dim is not None), default=0) or None for column in columns)
    found: list[Mapping[str, Shape]] = []
    for known in (sizes, [()] * len(inputs), [fixed] * len(inputs)):
        base = _choose_base(inputs, known)
        for axes in _choose_axes(inputs):
            shapes = {
                port.name: tuple(
                    _other(size, dim) if axis in axes else size
                    for axis, (size, dim) in enumerate(zip(shape, port.dims or (), strict=True))
                )
                for port, shape in zip(inputs, base, strict=True)
            }
            if shapes not in found:
                found.append(shapes)
    return found


def choose_usual_shapes(inputs: Sequence[TensorMetadata]) -> Iterator[Mapping[str, Shape]]:
    """Yield shapes for all inputs by name in which dims after the first have sizes that many image models take."""
    for size in _USUAL_SIZES:
        yield {
            port.name: tuple(
                _clamp(size if axis else 1, dim) if dim.size is None else dim.size
                for axis, dim in enumerate(port.dims or ())
            )
            for port in inputs
        }


# Of a dim that is not the first. Halves and doubles come before their neighbours, for a division hides those.
_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: size // 2,
    lambda size: size * 2,
    lambda size: size + 32,
    lambda size: size + 1,
    lambda size: size - 1,
    lambda size: size,
)


def choose_other_shapes(
    inputs: Sequence[TensorMetadata], bases: Iterable[Mapping[str, Shape]], last: Mapping[str, Shape]
) -> Iterator[Mapping[str, Shape]]:
    """Yield shapes for all inputs by name that are like the `bases` and not those of `last`.

    Every input that is in `last` has another shape than there. Those that differ in all of its dynamic dims come first.
    """
    late: list[Mapping[str, Shape]] = []
    seen: list[Mapping[str, Shape]] = []
    for base in bases:
        for shapes in _vary(inputs, base):
            if shapes in seen or any(shapes[name] == shape for name, shape in last.items()):
                continue
            seen.append(shapes)
            if all(_differs(port, shapes[port.name], last[port.name]) for port in inputs if port.name in last):
                yield shapes
            else:
                late.append(shapes)
    yield from late


def _vary(inputs: Sequence[TensorMetadata], base: Mapping[str, Shape]) -> Iterator[Mapping[str, Shape]]:
    yield base
    for first in (lambda size: size + 1, lambda size: size):
        for change in _CHANGES:
            yield {port.name: _change(port, base[port.name], first, change) for port in inputs}


def _change(port: TensorMetadata, shape: Shape, first: Callable[[int], int], change: Callable[[int], int]) -> Shape:
    dims = port.dims or (Dim(0, None),) * len(shape)
    changed = ((change if axis else first)(size) for axis, size in enumerate(shape))
    return tuple(
        size if dim.size is not None else _clamp(max(new, 1), dim)
        for size, new, dim in zip(shape, changed, dims, strict=True)
    )


def _differs(port: TensorMetadata, one: Shape, other: Shape) -> bool:
    dims = port.dims or (Dim(0, None),) * len(one)
    return len(one) == len(other) and all(
        mine != its for mine, its, dim in zip(one, other, dims, strict=True) if dim.size is None
    )


def _choose_base(inputs: Sequence[TensorMetadata], sizes: Sequence[Sizes]) -> list[Shape]:
    dims = [port.dims or () for port in inputs]
    smallest = [
        max((max(dim.low, 1) for dim in column if dim is not None and dim.size is None), default=1)
        for column in itertools.zip_longest(*dims)
    ]
    return [
        tuple(
            _clamp(known or least, dim)
            for dim, known, least in zip(row, (*own, *[None] * (len(row) - len(own))), smallest, strict=False)
        )
        for row, own in zip(dims, sizes, strict=True)
    ]


def _choose_axes(inputs: Sequence[TensorMetadata]) -> Iterator[frozenset[int]]:
    """Yield the dims to be varied: none, each that is dynamic somewhere, all of those."""
    dynamic = {axis for port in inputs for axis, dim in enumerate(port.dims or ()) if dim.size is None}
    yield frozenset()
    yield from (frozenset((axis,)) for axis in sorted(dynamic))
    yield frozenset(dynamic)


def _clamp(size: int, dim: Dim) -> int:
    size = max(size, dim.low)
    return size if dim.high is None else min(size, dim.high)


def _other(size: int, dim: Dim) -> int:
    """Return the next size that a dim allows, or the one before where there is none."""
    larger = _clamp(size + 1, dim)
    return larger if larger != size else _clamp(size - 1, dim)
