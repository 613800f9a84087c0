"""Changes of a model before it is compiled, as its config asks: layouts, preprocessing, shapes.

The changes become part of the model, so that requests need no further steps. Tensors are identified by their index, as
a model need not name them; the names here are those that clients see.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import openvino
from openvino.preprocess import ColorFormat, PrePostProcessor

from ovms_rest.errors import LoadError
from ovms_rest.models.options import MODEL_COLORS, LayoutChange, Preparation
from ovms_rest.models.reasons import one_line
from ovms_rest.models.repository import NameMapping
from ovms_rest.protocol.tensors import Dim
from ovms_rest.protocol.words import count_of, list_names

_COLORS = {
    "RGB": ColorFormat.RGB,
    "BGR": ColorFormat.BGR,
    "GRAY": ColorFormat.GRAY,
    "NV12": ColorFormat.NV12_SINGLE_PLANE,
    "I420": ColorFormat.I420_SINGLE_PLANE,
}


def name_tensors(model: openvino.Model, mapping: NameMapping) -> tuple[list[str], list[str]]:
    """Return the names of inputs and outputs that clients see, in the model's order.

    These are the model's own names, those of `mapping_config.json`, or in_<index> and out_<index> for tensors without a
    name. Raises LoadError for a mapping of an unknown name, and for repeated names.
    """
    inputs = _name(model.inputs, mapping.inputs, "inputs", "in_")
    return inputs, _name(model.outputs, mapping.outputs, "outputs", "out_")


def _name(ports: Sequence[Any], mapping: Mapping[str, str], kind: str, prefix: str) -> list[str]:
    if not ports:
        raise LoadError(f"the model has no {kind}")
    try:
        real: set[str] = {name for port in ports for name in port.get_names()}
    except UnicodeDecodeError as error:
        raise LoadError(f"the model has {kind} with a name that is not UTF-8: {error.object!r}") from error
    if unknown := sorted(mapping.keys() - real):
        raise LoadError(f"mapping_config.json: {kind}: the model has no {unknown[0]!r}; it has {_list(real)}")
    names = []
    for index, port in enumerate(ports):
        mapped = sorted(mapping[name] for name in port.get_names() if name in mapping)
        names.append(mapped[0] if mapped else port.get_any_name() if port.get_names() else f"{prefix}{index}")
    if len(set(names)) != len(names):
        raise LoadError(f"the model has {kind} with the same name: {_list(names)}")
    return names


def prepare(
    model: openvino.Model, inputs: Sequence[str], outputs: Sequence[str], preparation: Preparation
) -> tuple[openvino.Model, list[tuple[int | None, ...]]]:
    """Carry out a preparation; return the changed model, and the sizes of its inputs before they were reshaped.

    The sizes are in the client's layout, None for dynamic dims. Raises LoadError.
    """
    if preparation.layouts or preparation.mean or preparation.scale or preparation.color or preparation.precision:
        model = _preprocess(model, inputs, outputs, preparation)
    sizes = [_find_sizes(port) for port in model.inputs]
    if preparation.shapes or preparation.batch:
        _reshape(model, inputs, preparation)
    return model, sizes


def _find_sizes(port: Any) -> tuple[int | None, ...]:
    shape = port.get_partial_shape()
    return () if shape.rank.is_dynamic else tuple(dim.get_length() if dim.is_static else None for dim in shape)


def find_layout(port: Any) -> str | None:
    """Return the layout that the model declares for an input or output, such as "NHWC" or "N..."; None without one."""
    layout = openvino.layout_helpers.get_layout(port)
    return None if layout.empty else layout.to_string().strip("[]").replace(",", "")


def _preprocess(
    model: openvino.Model, inputs: Sequence[str], outputs: Sequence[str], preparation: Preparation
) -> openvino.Model:
    processor = PrePostProcessor(model)
    for name, change in preparation.layouts.items():
        if name in outputs and name not in inputs:
            port = outputs.index(name)
            _set_layout(processor.output(port), model.outputs[port], outputs[port], change)
        elif name is not None and name not in inputs:
            raise LoadError(f"layout: the model has no tensor {name!r}; it has {_list([*inputs, *outputs])}")
        else:
            port = _find(name, inputs, "layout")
            _set_layout(processor.input(port), model.inputs[port], inputs[port], change)
            # With a colour conversion OpenVINO would expect NHWC from clients; NV12 and I420 have no other layout.
            if not change.client and preparation.color and preparation.color[1] in MODEL_COLORS:
                processor.input(port).tensor().set_layout(openvino.Layout(change.model))
    changes = [key for key in ("mean", "scale", "color", "precision") if getattr(preparation, key)]
    if changes:
        if len(inputs) != 1:
            raise LoadError(f"{changes[0]}: needs a model with one input, this one has {_list(inputs)}")
        element_type = model.inputs[0].get_element_type()
        if element_type == openvino.Type.string:
            raise LoadError(f"{changes[0]}: needs an input of numbers, {inputs[0]!r} takes strings")
        _convert(processor.input(0), element_type, preparation)
    try:
        return processor.build()
    except RuntimeError as error:
        raise LoadError(f"layout or preprocessing cannot be applied: {one_line(error)}") from error


def _set_layout(info: Any, port: Any, name: str, change: LayoutChange) -> None:
    rank = port.get_partial_shape().rank
    for layout in filter(None, (change.model, change.client)):
        letters = len(layout.replace("...", ""))
        if rank.is_static and (rank.get_length() < letters or (rank.get_length() > letters and "..." not in layout)):
            raise LoadError(
                f"layout: {layout} has {count_of(letters, 'dim')}, tensor {name!r} {port.get_partial_shape()}"
            )
    info.model().set_layout(openvino.Layout(change.model))
    if change.client:
        info.tensor().set_layout(openvino.Layout(change.client))


def _convert(info: Any, element_type: openvino.Type, preparation: Preparation) -> None:
    """Convert the client's tensor to the model's: type, colours, mean, scale."""
    client, model = preparation.precision or ("", "")
    if client:
        info.tensor().set_element_type(getattr(openvino.Type, client))
    steps = info.preprocess()
    inner = getattr(openvino.Type, model) if model else element_type
    if (preparation.mean or preparation.scale) and not inner.is_real():
        inner = openvino.Type.f32  # integers minus a mean, or divided by a scale, need fractions
    if client or inner != element_type:
        steps.convert_element_type(inner)
    if preparation.color:
        target, source = preparation.color
        if source != target:
            info.tensor().set_color_format(_COLORS[source])
            steps.convert_color(_COLORS[target])
    if preparation.mean:
        steps.mean(list(preparation.mean) if len(preparation.mean) > 1 else preparation.mean[0])
    if preparation.scale:
        steps.scale(list(preparation.scale) if len(preparation.scale) > 1 else preparation.scale[0])
    if inner != element_type:
        steps.convert_element_type(element_type)


# --- Shapes


def _reshape(model: openvino.Model, inputs: Sequence[str], preparation: Preparation) -> None:
    shapes: dict[int, openvino.PartialShape] = {}
    for name, dims in preparation.shapes.items():
        index = _find(name, inputs, "shape")
        if dims is None:
            rank = model.inputs[index].get_partial_shape().rank
            if rank.is_dynamic:
                continue  # any shape fits already
            dims = (Dim(0, None),) * rank.get_length()
        shapes[index] = openvino.PartialShape([_dimension(dim) for dim in dims])
    if preparation.batch:
        for index, port in enumerate(model.inputs):
            shape = port.get_partial_shape()
            shape[_find_batch(port, inputs[index])] = _dimension(preparation.batch)
            shapes[index] = shape
    try:
        model.reshape(shapes)
    except RuntimeError as error:
        asked = ", ".join(f"{inputs[index]} {shape.to_string()}" for index, shape in shapes.items())
        raise LoadError(f"the model cannot be reshaped to {asked}: {one_line(error)}") from error


def _find_batch(port: Any, name: str) -> int:
    """Return the index of the batch dim: N in the layout, the first without a layout."""
    shape, layout = port.get_partial_shape(), find_layout(port) or "N..."
    at = -1
    if shape.rank.is_static and "N" in layout:
        before, _, after = layout.partition("...")
        at = before.index("N") if "N" in before else len(shape) - len(after) + after.index("N")
    if at < 0 or at >= len(shape):
        raise LoadError(f"batch_size: input {name!r} has no batch dim; its shape is {shape}, its layout {layout}")
    return at


def _dimension(dim: Dim) -> openvino.Dimension:
    return openvino.Dimension(dim.low, -1 if dim.high is None else dim.high)


def _find(name: str | None, inputs: Sequence[str], key: str) -> int:
    if name is None:
        if len(inputs) != 1:
            advice = "give an object with a value for each name"
            raise LoadError(f"{key}: one value is ambiguous for the inputs {_list(inputs)}; {advice}")
        return 0
    if name not in inputs:
        raise LoadError(f"{key}: the model has no input {name!r}; it has {_list(inputs)}")
    return inputs.index(name)


def _list(names: Iterable[str]) -> str:
    return list_names(sorted(names))
