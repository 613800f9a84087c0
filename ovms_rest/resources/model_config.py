"""Triton's model configuration extension, for its client tools.

A version that infers no batches has a `max_batch_size` of 0, and its `dims` are the whole shape, so that perf_analyzer
uses shapes unchanged; otherwise `dims` leave out the first dim, as Triton's do. Names, datatypes and order are those of
the metadata.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import falcon
import orjson

from ovms_rest.models.runtime import Model
from ovms_rest.models.servable import Servable
from ovms_rest.protocol.datatypes import BYTES
from ovms_rest.protocol.tensors import TensorMetadata

# The only layouts that Triton has names for.
_FORMATS = {"NHWC": "FORMAT_NHWC", "NCHW": "FORMAT_NCHW"}


class ConfiguredModels(Protocol):
    """The registry."""

    def find(self, name: str, version: str | None = None, explain: bool = False) -> Servable:
        """Return a version, the highest for None. Raises NotFoundError, with the reason if `explain` is set."""

    def version_policy(self, name: str) -> dict[str, Any]:
        """Return the version policy of a model in Triton's form."""


class ModelConfiguration:
    """GET /v2/models/{name}[/versions/{version}]/config."""

    def __init__(self, models: ConfiguredModels, count_workers: Callable[[], int]) -> None:
        """Describe models of a registry; `count_workers` returns 0 if the number is unknown."""
        self._models = models
        self._count_workers = count_workers

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Respond with the model's configuration."""
        servable = self._models.find(name, version, explain=True)
        resp.data = orjson.dumps(describe_config(servable, self._models.version_policy(name), self._count_workers()))

    on_head = on_get


def describe_config(servable: Servable, version_policy: dict[str, Any], workers: int) -> dict[str, Any]:
    """Return the ModelConfig of a version in Triton's JSON; without the number of workers where that is 0.

    A pipeline is not compiled, has no file and declares no layouts.
    """
    metadata, device, file = servable.metadata, "CPU", ""
    properties: Mapping[str, Any] = {}
    layouts: Mapping[str, str | None] = {}
    limit = 0
    if isinstance(servable, Model):
        device, properties = servable.compilation.device, servable.compilation.properties
        limit = servable.batch_limit
        layouts, file = servable.input_layouts, servable.file.name
    instances = {"name": metadata.name, "kind": "KIND_CPU" if device == "CPU" else "KIND_AUTO"}
    return {
        "name": metadata.name,
        "platform": "OpenVINO",
        "backend": "openvino",
        "version_policy": version_policy,
        "max_batch_size": limit,
        **({"dynamic_batching": {"max_queue_delay_microseconds": 0}} if limit else {}),
        "input": [_describe_input(tensor, layouts.get(tensor.name), limit > 0) for tensor in metadata.inputs.values()],
        "output": [_describe_output(tensor, limit > 0) for tensor in metadata.outputs.values()],
        "instance_group": [{**instances, "count": workers} if workers else instances],
        "default_model_filename": file,
        "parameters": {
            key: {"string_value": value if isinstance(value, str) else orjson.dumps(value).decode()}
            for key, value in {"target_device": device, **properties}.items()
        },
        "model_transaction_policy": {"decoupled": False},
    }


def _describe_input(tensor: TensorMetadata, layout: str | None, is_batched: bool) -> dict[str, Any]:
    return {
        **_describe(tensor, is_batched),
        "format": _FORMATS.get(layout or "", "FORMAT_NONE"),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
    }


def _describe_output(tensor: TensorMetadata, is_batched: bool) -> dict[str, Any]:
    return {**_describe(tensor, is_batched), "label_filename": "", "is_shape_tensor": False}


def _describe(tensor: TensorMetadata, is_batched: bool) -> dict[str, Any]:
    described = tensor.to_json()
    datatype = "STRING" if tensor.datatype == BYTES else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{datatype}", "dims": described["shape"][is_batched:]}
