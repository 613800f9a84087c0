"""Schemas of the OpenAPI document: what requests and responses have in common for all models."""

from typing import Any

import ml_dtypes
import numpy as np

from ovms_rest.protocol.datatypes import BYTES, DATATYPE_NAMES, DATATYPES, Datatype
from ovms_rest.protocol.tensors import MAX_DIM

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}


def refer(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def array_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def object_of(required: Schema, optional: Schema | None = None) -> Schema:
    """Return the schema of an object with these properties; others are allowed too."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def map_of(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _describe_element(datatype: Datatype) -> Schema:
    """Return the schema of one element in JSON."""
    kind = datatype.dtype.kind
    if kind == "b":
        return BOOLEAN
    if kind in "iu":
        info = np.iinfo(datatype.dtype)
        return {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}
    largest = float(ml_dtypes.finfo(datatype.dtype).max)  # type: ignore[no-untyped-call]
    return {"type": "number", "minimum": -largest, "maximum": largest}


# Only base64 with bits left over at its end does not match.
_BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$"
_BYTES: Schema = {
    "anyOf": [
        STRING,
        {**object_of({"b64": {**STRING, "pattern": _BASE64}}), "description": "Any bytes, in base64."},
    ]
}


def _describe_data(datatype: str) -> tuple[Schema, Schema]:
    """Return the schemas of the data of an input and of an output."""
    element = _BYTES if datatype == BYTES else _describe_element(DATATYPES[datatype])
    given = {
        "type": "array",
        "items": {"anyOf": [element, refer(f"{datatype}_data")]},
        "description": "All elements in row-major order, flat or nested in any form.",
    }
    returned = STRING if datatype == BYTES else element
    if returned["type"] == "number":
        returned = {"type": ["number", "null"], "description": "NaN and infinities are null."}
    return given, array_of(returned)


_SHAPE: Schema = array_of({"type": "integer", "minimum": 0, "maximum": MAX_DIM})
_PARAMETERS: Schema = map_of({"type": ["string", "number", "boolean"]})
_DATATYPE: Schema = {"enum": list(DATATYPE_NAMES)}
_SIZE: Schema = {
    "type": "integer",
    "minimum": 0,
    "description": "The bytes of this tensor after the JSON; the tensor then has no data.",
}
_STATE: Schema = object_of({"version": STRING, "state": STRING})
_METADATA_TENSOR = object_of({"name": STRING, "datatype": _DATATYPE, "shape": array_of({**INTEGER, "minimum": -1})})
_DURATION = object_of({"count": INTEGER, "ns": INTEGER})
_STATUS = object_of(
    {
        "version": STRING,
        "state": {"enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]},
        "status": object_of({"error_code": STRING, "error_message": STRING}),
    }
)
_LOG_SETTINGS: Schema = {
    "log_info": BOOLEAN,
    "log_warning": BOOLEAN,
    "log_error": BOOLEAN,
    "log_verbose_level": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "log_format": {"enum": ["default", "ISO8601"]},
}

_DATA = {name: _describe_data(name) for name in DATATYPE_NAMES}

SCHEMAS: dict[str, Schema] = {
    "Error": object_of({"error": {**STRING, "description": "What was wrong, what came and what is allowed."}}),
    "EntryPoints": object_of({"name": STRING, "version": STRING, "routes": map_of(STRING)}),
    "Server": object_of({"name": STRING, "version": STRING, "extensions": array_of(STRING)}),
    "Models": object_of({"models": array_of(object_of({"name": STRING, "versions": array_of(_STATE)}))}),
    "ModelMetadata": object_of(
        {
            "name": STRING,
            "versions": array_of(STRING),
            "platform": STRING,
            "inputs": array_of(_METADATA_TENSOR),
            "outputs": array_of(_METADATA_TENSOR),
        },
        {"rt_info": {"type": "object"}},
    ),
    "ModelConfiguration": object_of(
        {
            "name": STRING,
            "platform": STRING,
            "max_batch_size": INTEGER,
            "input": array_of({"type": "object"}),
            "output": array_of({"type": "object"}),
        }
    ),
    "Statistics": object_of(
        {
            "model_stats": array_of(
                object_of(
                    {
                        "name": STRING,
                        "version": STRING,
                        "last_inference": INTEGER,
                        "inference_count": INTEGER,
                        "execution_count": INTEGER,
                        "inference_stats": map_of(_DURATION),
                        "batch_stats": array_of({"type": "object"}),
                    }
                )
            )
        }
    ),
    "Statuses": map_of(object_of({"model_version_status": array_of(_STATUS)})),
    "IndexRequest": object_of({}, {"ready": {**BOOLEAN, "description": "Whether to list only what serves."}}),
    "Index": array_of(object_of({"name": STRING, "version": STRING, "state": STRING}, {"reason": STRING})),
    "LoadRequest": object_of(
        {},
        {
            "parameters": object_of(
                {},
                {
                    "config": {
                        **STRING,
                        "contentMediaType": "application/json",
                        "description": "A JSON object with keys of a model in the config file, to load it with.",
                    }
                },
            )
        },
    ),
    "UnloadRequest": object_of(
        {},
        {
            "parameters": object_of(
                {},
                {"unload_dependents": {**BOOLEAN, "description": "Whether to unload pipelines that use the model."}},
            )
        },
    ),
    "LogSettings": object_of({"log_file": STRING, **_LOG_SETTINGS}),
    "LogChanges": object_of({}, _LOG_SETTINGS),
    "ConsoleSettings": object_of(
        {
            "version": STRING,
            "service": {"type": ["string", "null"], "description": "Where to infer; empty for the same address."},
            "obstacle": {"type": ["string", "null"], "description": "Why this client may not change the service."},
        }
    ),
    "ConsoleErrors": object_of(
        {
            "lines": array_of(
                object_of({"time": {"type": "number"}, "process": INTEGER, "level": STRING, "text": STRING}),
            )
        }
    ),
    "InferenceRequest": object_of(
        {"inputs": {**array_of(refer("InputTensor")), "minItems": 1}},
        {"id": STRING, "parameters": refer("RequestParameters"), "outputs": array_of(refer("RequestedOutput"))},
    ),
    "InputTensor": object_of(
        {"name": STRING, "shape": _SHAPE, "datatype": _DATATYPE},
        {"parameters": refer("InputParameters"), "data": {"type": "array"}},
    ),
    "InputParameters": {**_PARAMETERS, "properties": {"binary_data_size": _SIZE}},
    "RequestParameters": {
        **_PARAMETERS,
        "properties": {
            "binary_data_output": {**BOOLEAN, "description": "Whether outputs are binary by default."},
            "timeout": {
                "type": "integer",
                "minimum": 0,
                "description": "Microseconds within which the inference must start, 0 for no limit.",
            },
            "priority": {"type": "integer", "minimum": 0, "description": "1 is served first; 0 comes last."},
        },
    },
    "RequestedOutput": object_of({"name": STRING}, {"parameters": refer("OutputParameters")}),
    "OutputParameters": {
        **_PARAMETERS,
        "properties": {
            "binary_data": {**BOOLEAN, "description": "Whether this output is binary."},
            "classification": {
                "type": "integer",
                "minimum": 1,
                "description": 'Return the top classes, as strings "<value>:<index>:<label>".',
            },
        },
    },
    "InferenceResponse": object_of(
        {"model_name": STRING, "model_version": STRING, "outputs": array_of(refer("OutputTensor"))}, {"id": STRING}
    ),
    "OutputTensor": object_of(
        {"name": STRING, "shape": _SHAPE, "datatype": _DATATYPE},
        {"data": {"type": "array"}, "parameters": object_of({"binary_data_size": INTEGER})},
    ),
    **{f"{name}_data": given for name, (given, _) in _DATA.items()},
    **{f"{name}_result": returned for name, (_, returned) in _DATA.items()},
}
