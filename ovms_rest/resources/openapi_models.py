"""The part of the OpenAPI document about each model and pipeline: its own path, schemas, and an example that works."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import orjson

from ovms_rest.errors import InvalidRequestError
from ovms_rest.log import log
from ovms_rest.models.example_requests import check_example, encode_example, encode_zeros
from ovms_rest.models.registry import Entry
from ovms_rest.models.runtime import Model
from ovms_rest.models.servable import Servable
from ovms_rest.pipelines.definition import CUSTOM, MODEL
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.plan import REQUEST_STEP, Step
from ovms_rest.protocol.datatypes import BYTES, UINT8
from ovms_rest.protocol.tensors import MAX_DIM, Dim, ImageDecoder, TensorMetadata
from ovms_rest.resources.openapi_routes import FORM, IMAGE, JSON, describe_inference
from ovms_rest.resources.openapi_schemas import Schema, array_of, refer

# Outputs with more classes than this have no labels in the document.
_MOST_LABELS = 10_000
# The bytes that the labels and examples of all models may take; those of the models after that are left out.
MAX_EXTRAS_BYTES = 2**22
# Colors of encoded images; a client sends others, such as NV12, as numbers.
_COLORS = ("BGR", "RGB", "GRAY")
EXTENSION = "x-ovms-rest"


class ModelPaths:
    """Makes the paths of models, and limits what they take together."""

    def __init__(self) -> None:
        self._room = MAX_EXTRAS_BYTES

    def describe(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a path and its operation for every version that serves; that of the highest has no version."""
        for name, entry in sorted(entries.items()):
            path = f"/v2/models/{quote(name, safe='')}"
            versions = sorted(entry.versions.items(), reverse=True)
            for index, (version, servable) in enumerate(versions):
                operation = self._describe(name, entry, version, servable)
                if index == 0:
                    yield f"{path}/infer", {"post": operation}
                if len(versions) > 1:
                    operation = {**operation, "summary": f"{operation['summary']}, version {version}"}
                    yield f"{path}/versions/{version}/infer", {"post": operation}

    def _describe(self, name: str, entry: Entry, version: int, servable: Servable) -> dict[str, Any]:
        metadata = servable.metadata
        path = f"/v2/models/{quote(name, safe='')}/infer"
        operation = describe_inference(path, f"Infer with {entry.kind} {name}", _describe_request(servable))
        example = self._limit(_find_example(name, version, entry, servable))
        lines = [
            f"{title}: {', '.join(f'`{port.name}` {port.datatype}{port.describe_shape()}' for port in ports.values())}."
            for title, ports in (("Inputs", metadata.inputs), ("Outputs", metadata.outputs))
        ]
        content = operation["requestBody"]["content"]
        content |= _describe_plain_bodies(metadata.inputs)
        if example is not None:
            content[JSON]["example"] = example
        elif servable.example is not None and (zeros := encode_zeros(metadata, servable.example)):
            lines.append(
                f"An example would be too long in JSON. This sends zeros in binary:\n\n    {_write(path, *zeros)}"
            )
        operation["description"] = "\n\n".join(lines)
        operation[EXTENSION] = {
            "model": name,
            "version": str(version),
            "kind": entry.kind,
            "inputs": [_describe_input(port, servable) for port in metadata.inputs.values()],
            "outputs": [self._describe_output(port, servable) for port in metadata.outputs.values()],
            "compiled": _describe_compilation(servable),
        }
        if isinstance(servable, Pipeline):
            operation[EXTENSION]["nodes"] = [_describe_node(step) for step in servable.plan.steps]
        return operation

    def _describe_output(self, port: TensorMetadata, servable: Servable) -> dict[str, Any]:
        described = _describe_tensor(port, servable.output_layouts if isinstance(servable, Model) else {})
        labels = _find_labels(port.name, servable)
        if labels and len(labels) <= _MOST_LABELS and _has_classes(port, len(labels)):
            kept = self._limit(list(labels))
            if kept is not None:
                described["labels"] = kept
        return described

    def _limit(self, value: Any) -> Any:
        """Return a value if there is room for it, otherwise None."""
        size = len(orjson.dumps(value))
        if size > self._room:
            return None
        self._room -= size
        return value


def _find_example(name: str, version: int, entry: Entry, servable: Servable) -> dict[str, Any] | None:
    """Return the request from the file that the configuration names if it fits, or else a generated one."""
    if entry.example is not None:
        try:
            check_example(entry.example, servable.metadata)
        except InvalidRequestError as error:
            log.warning("%s %r version %d: its example is left out: %s", entry.kind, name, version, error)
        else:
            return entry.example
    arrays = servable.example
    return None if arrays is None else encode_example(servable.metadata, arrays)


def _write(path: str, head: bytes, zeros: int) -> str:
    """Return a shell command that sends JSON and this number of zeros."""
    return (
        f"(printf %s {shlex.quote(head.decode())}; head -c {zeros} /dev/zero) | "
        f"curl -H 'Inference-Header-Content-Length: {len(head)}' --data-binary @- http://localhost:8000{path}"
    )


# --- Tensors of the extension


def _describe_input(port: TensorMetadata, servable: Servable) -> dict[str, Any]:
    layouts, color = (servable.input_layouts, servable.color) if isinstance(servable, Model) else ({}, "")
    described = _describe_tensor(port, layouts)
    image = None if port.images is None else _describe_image(port.images, color)
    return described if image is None else {**described, "image": image}


def _describe_tensor(port: TensorMetadata, layouts: Mapping[str, str | None]) -> dict[str, Any]:
    dims = (Dim(0, None),) if port.dims is None else port.dims
    shape = [str(dim) if dim.size is None else dim.size for dim in dims]
    layout = layouts.get(port.name)
    return {"name": port.name, "datatype": port.datatype, "shape": shape} | ({"layout": layout} if layout else {})


def _describe_image(images: ImageDecoder, color: str) -> dict[str, Any] | None:
    size = images.expected
    if size is None or (color and color not in _COLORS):
        return None
    return {**size._asdict(), "color": "GRAY" if size.channels == 1 else color or "BGR"}


def _find_labels(name: str, servable: Servable) -> tuple[str, ...]:
    """Return the labels of the model that computes an output."""
    if not isinstance(servable, Pipeline):
        return servable.metadata.labels
    (output,) = (output for output in servable.plan.outputs if output.name == name)
    model = None if output.step == REQUEST_STEP else servable.plan.steps[output.step].part.model
    return () if model is None else model.metadata.labels


def _has_classes(port: TensorMetadata, count: int) -> bool:
    """Return whether the last dim of an output can be its classes."""
    return port.datatype != BYTES and bool(port.dims) and port.dims is not None and port.dims[-1].size == count


def _describe_compilation(servable: Servable) -> dict[str, str]:
    """Return the device and its properties, as in Triton's model configuration."""
    if not isinstance(servable, Model):
        return {}
    compilation = servable.compilation
    properties = {"target_device": compilation.device, **compilation.properties}
    return {
        # A path may have bytes that are not UTF-8.
        key: value.encode(errors="backslashreplace").decode()
        if isinstance(value, str)
        else orjson.dumps(value).decode()
        for key, value in properties.items()
    }


def _describe_node(step: Step) -> dict[str, str]:
    model = step.part.model
    if model is None:
        return {"name": step.name, "type": CUSTOM}
    return {"name": step.name, "type": MODEL, "model": model.metadata.name}


# --- Schemas


def _describe_request(servable: Servable) -> Schema:
    inputs, outputs = servable.metadata.inputs, servable.metadata.outputs
    tensors = [_describe_input_schema(port) for port in inputs.values()]
    requested = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": list(outputs)}, "parameters": refer("OutputParameters")},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": refer("RequestParameters"),
            "inputs": {
                **array_of(tensors[0] if len(tensors) == 1 else {"anyOf": tensors}),
                "minItems": len(tensors),
                "maxItems": len(tensors),
            },
            "outputs": {**array_of(requested), "maxItems": len(outputs)},
        },
    }


def _describe_plain_bodies(inputs: Mapping[str, TensorMetadata]) -> dict[str, Any]:
    """Return the bodies that are the data of inputs (protocol/README.md section 10)."""
    files = {name: {"description": _describe_part(port)} for name, port in inputs.items()}
    form = {"type": "object", "required": list(files), "properties": files}
    content: dict[str, Any] = {FORM: {"schema": form}}
    if len(inputs) == 1 and all(_takes_images(port) for port in inputs.values()):
        content[IMAGE] = {"schema": {"description": "One encoded image, for the only input."}}
    return content


def _describe_part(port: TensorMetadata) -> str:
    if _takes_images(port):
        return "An encoded image; several images are several parts of this name."
    if port.datatype == BYTES:
        return "A string; several strings are several parts of this name."
    return "The elements as a JSON array, or their bytes as a file."


def _takes_images(port: TensorMetadata) -> bool:
    return port.images is not None and port.images.expected is not None


def _describe_input_schema(port: TensorMetadata) -> Schema:
    dims = (Dim(0, None),) if port.dims is None else port.dims
    forms = [_describe_form(port, port.datatype, dims, "")]
    if _takes_images(port):
        text = "Encoded images, such as JPEG or PNG, one in each element."
        forms.append(_describe_form(port, BYTES, (Dim(max(dims[0].low, 1), dims[0].high),), text))
    elif port.datatype == UINT8 and len(dims) == 2:
        text = "Strings, each padded with zeros to a row."
        forms.append(_describe_form(port, BYTES, (dims[0],), text))
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _describe_form(port: TensorMetadata, datatype: str, dims: Sequence[Dim], text: str) -> Schema:
    """Return the schema of an input with elements of a datatype."""
    form: Schema = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": port.name},
            "datatype": {"const": datatype},
            "shape": {
                "type": "array",
                **({"prefixItems": [_describe_dim(dim) for dim in dims]} if dims else {}),
                "minItems": len(dims),
                "maxItems": len(dims),
            },
            "parameters": refer("InputParameters"),
            "data": refer(f"{datatype}_data"),
        },
    }
    return {**form, "description": text} if text else form


def _describe_dim(dim: Dim) -> Schema:
    if dim.size is not None:
        return {"const": dim.size}
    return {"type": "integer", "minimum": dim.low, "maximum": MAX_DIM if dim.high is None else dim.high}
