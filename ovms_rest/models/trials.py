"""Shapes to try a model with, before it has seen a request and after one has failed."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from ovms_rest.protocol.tensors import Dim, TensorMetadata

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
