"""Shapes to try a model with: before the first request, and after a failed one."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ovms_rest.protocol.tensors import Dim, TensorMetadata

# Sizes that can be halved several times, as detectors and encoder-decoders do.
_USUAL_SIZES = (32, 64, 224, 640)

Shape = tuple[int, ...]
Sizes = tuple[int | None, ...]


def choose_shapes(inputs: Sequence[TensorMetadata], sizes: Sequence[Sizes]) -> list[Mapping[str, Shape]]:
    """Return different shapes for all inputs by name; those that the model is most likely to accept come first.

    `sizes` are those of the inputs before the config made them dynamic, None where they had none. A dynamic dim gets
    its former size if it allows that; otherwise the size of the same dim of other inputs, as these often have to agree:
    the smallest size that all inputs with a dynamic dim there allow, or the size of a static one. Further shapes have
    another size in one dynamic dim, or in all of them.
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
    """Yield shapes for all inputs by name, whose dims after the first have sizes that many image models accept."""
    for size in _USUAL_SIZES:
        yield {
            port.name: tuple(
                dim.clamp(size if axis else 1) if dim.size is None else dim.size
                for axis, dim in enumerate(port.dims or ())
            )
            for port in inputs
        }


# Changes of dims after the first. Halves and doubles come before neighbours, as a division may hide those.
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
    """Yield shapes for all inputs by name that vary the `bases`; inputs in `last` get another shape than there.

    Shapes that differ from `last` in all dynamic dims come first.
    """
    late: list[Mapping[str, Shape]] = []
    found: list[Mapping[str, Shape]] = []
    for base in bases:
        for shapes in _vary(inputs, base):
            if shapes in found or any(shapes[name] == shape for name, shape in last.items()):
                continue
            found.append(shapes)
            if all(differs(port, shapes[port.name], last[port.name]) for port in inputs if port.name in last):
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
        size if dim.size is not None else dim.clamp(max(new, 1))
        for size, new, dim in zip(shape, changed, dims, strict=True)
    )


def differs(port: TensorMetadata, one: Shape, other: Shape) -> bool:
    """Return whether two shapes of an input have the same rank and other sizes in all dynamic dims."""
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
            dim.clamp(known or least)
            for dim, known, least in zip(row, (*own, *[None] * (len(row) - len(own))), smallest, strict=False)
        )
        for row, own in zip(dims, sizes, strict=True)
    ]


def _choose_axes(inputs: Sequence[TensorMetadata]) -> Iterator[frozenset[int]]:
    """Yield the dims to vary: none, each dim that is dynamic in some input, all of these."""
    dynamic = {axis for port in inputs for axis, dim in enumerate(port.dims or ()) if dim.size is None}
    yield frozenset()
    yield from (frozenset((axis,)) for axis in sorted(dynamic))
    yield frozenset(dynamic)


def _other(size: int, dim: Dim) -> int:
    """Return the next larger size that a dim allows, or the next smaller one at its bound."""
    larger = dim.clamp(size + 1)
    return larger if larger != size else dim.clamp(size - 1)
