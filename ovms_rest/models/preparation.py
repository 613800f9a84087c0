"""Changing a model as its config asks before it is compiled: layouts, preprocessing, shapes.

Whatever is changed becomes a part of the model, so that nothing of it costs a request a step of its own. Tensors are
told apart by their place, for a model need not name them; the names here are those that clients see.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import openvino
from openvino.preprocess import ColorFormat, PrePostProcessor

from ovms_rest.errors import LoadError
from ovms_rest.models.options import MODEL_COLORS, LayoutChange, Preparation
from ovms_rest.models.repository import NameMapping
from ovms_rest.protocol.tensors import Dim

_COLORS = {
    "RGB": ColorFormat.RGB,
    "BGR": ColorFormat.BGR,
    "GRAY": ColorFormat.GRAY,
    "NV12": ColorFormat.NV12_SINGLE_PLANE,
    "I420": ColorFormat.I420_SINGLE_PLANE,
}


def name_tensors(model: openvino.Model, mapping: NameMapping) -> tuple[list[str], list[str]]:
    """Return the names that clients see of inputs and outputs, in the model's order.

    They are the model's own, another by `mapping_config.json`, or in_<place> and out_<place> for those without one.
    Raises LoadError for a mapping of what is not there, and for names that are not different.
    """
    return (
        _name(model.inputs, mapping.inputs, "inputs", "in_"),
        _name(model.outputs, mapping.outputs, "outputs", "out_"),
    )


def _name(ports: Sequence[Any], mapping: Mapping[str, str], kind: str, prefix: str) -> list[str]:
    if not ports:
        raise LoadError(f"the model has no {kind}")
    try:
        real: set[str] = {name for port in ports for name in port.get_names()}
    except UnicodeDecodeError as error:
        raise LoadError(f"the model has {kind} with a name that is not UTF-8: {error.object!r}") from error
    if unknown := sorted(mapping.keys() - real):
        raise LoadError(f"mapping_config.json: {kind}: {unknown[0]!r} is not of the model, which has {_quote(real)}")
    names = []
    for index, port in enumerate(ports):
        mapped = sorted(mapping[name] for name in port.get_names() if name in mapping)
        names.append(mapped[0] if mapped else port.get_any_name() if port.get_names() else f"{prefix}{index}")
    if len(set(names)) != len(names):
        raise LoadError(f"the model has {len(names)} {kind} with {len(set(names))} different names: {_quote(names)}")
    return names


def prepare(
    model: openvino.Model, inputs: Sequence[str], outputs: Sequence[str], preparation: Preparation
) -> tuple[openvino.Model, list[tuple[int | None, ...]]]:
    """Carry out a preparation; return the changed model, and the sizes that its inputs had before they were reshaped.

    The sizes are in the layout of the client, None where there was none. Raises LoadError.
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
    """Return the layout that the model declares for an input or output: "NHWC", "N...", None when it does not."""
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
            raise LoadError(f"layout: {name!r} is no tensor of the model, which has {_quote([*inputs, *outputs])}")
        else:
            port = _find(name, inputs, "layout")
            _set_layout(processor.input(port), model.inputs[port], inputs[port], change)
            # Where colours are converted OpenVINO would have the client send NHWC; NV12 and I420 have no other layout.
            if not change.client and preparation.color and preparation.color[1] in MODEL_COLORS:
                processor.input(port).tensor().set_layout(openvino.Layout(change.model))
    changes = [key for key in ("mean", "scale", "color", "precision") if getattr(preparation, key)]
    if changes:
        if len(inputs) != 1:
            raise LoadError(f"{changes[0]}: works for models with one input, this one has {_quote(inputs)}")
        element_type = model.inputs[0].get_element_type()
        if element_type == openvino.Type.string:
            raise LoadError(f"{changes[0]}: works for numbers, input {inputs[0]!r} takes strings")
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
            raise LoadError(f"layout: {layout} has {letters} dims, tensor {name!r} {port.get_partial_shape()}")
    info.model().set_layout(openvino.Layout(change.model))
    if change.client:
        info.tensor().set_layout(openvino.Layout(change.client))


def _convert(info: Any, element_type: openvino.Type, preparation: Preparation) -> None:
    """Have the input take what the client sends and turn it into what the model takes: type, colours, mean, scale."""
    client, model = preparation.precision or ("", "")
    if client:
        info.tensor().set_element_type(getattr(openvino.Type, client))
    steps = info.preprocess()
    inner = getattr(openvino.Type, model) if model else element_type
    if (preparation.mean or preparation.scale) and not inner.is_real():
        inner = openvino.Type.f32  # what is subtracted from integers, and divides them, is none
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
                continue  # whatever comes fits already
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
        raise LoadError(f"the model cannot take the shape asked for, {asked}: {one_line(error)}") from error


def _find_batch(port: Any, name: str) -> int:
    """Find the dim of the batch: N in the layout, the first when there is none."""
    shape, layout = port.get_partial_shape(), find_layout(port) or "N..."
    if shape.rank.is_dynamic or "N" not in layout:
        raise LoadError(f"batch_size: input {name!r} has no batch dim; its shape is {shape}, its layout {layout}")
    before, several, behind = layout.partition("...")
    at = before.index("N") if "N" in before else len(shape) - len(behind) + behind.index("N") if several else -1
    if not 0 <= at < len(shape):
        raise LoadError(f"batch_size: input {name!r} has no batch dim; its shape is {shape}, its layout {layout}")
    return at


def _dimension(dim: Dim) -> openvino.Dimension:
    return openvino.Dimension(dim.low, -1 if dim.high is None else dim.high)


def _find(name: str | None, inputs: Sequence[str], key: str) -> int:
    if name is None:
        if len(inputs) != 1:
            raise LoadError(
                f"{key}: one value does not tell which of the inputs {_quote(inputs)} it is for; "
                "give an object with a value for each name"
            )
        return 0
    if name not in inputs:
        raise LoadError(f"{key}: {name!r} is no input of the model, whose inputs are {_quote(inputs)}")
    return inputs.index(name)


def _quote(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


_PLACE = re.compile(r"(?:Check '.*?' failed at|Exception from) \S+:\d+:?|\b(?:src|thirdparty)/\S+:\d+:?")
_NODE = re.compile(r"While validating node '\S+ .*?' with friendly_name '(?P<name>.*?)':")
_PATH = re.compile(r"(?<![\w.])/[\w.+-]+(?:/[\w.+-]+)+(?::\d+)?")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
_LONGEST_REASON = 400


def find_reason(error: Exception) -> str:
    """Return what an exception of OpenVINO says of nodes and dims, in one line, for the client of a request.

    The places in OpenVINO's sources, paths and addresses are left out (protocol.md section 1).
    """
    text = _NODE.sub(r"node '\g<name>':", str(error))
    for pattern in (_PLACE, _PATH, _ADDRESS):
        text = pattern.sub("", text)
    words = " ".join(text.replace("[CPU]", "").replace("[cpu]", "").split())
    return words[:_LONGEST_REASON] or "OpenVINO gives no reason"


def one_line(error: Exception) -> str:
    """Reduce an exception of OpenVINO to what it says, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from ", "Check "))]
    return " ".join(said or lines)[:500]
