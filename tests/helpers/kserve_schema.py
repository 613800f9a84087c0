"""JSON Schemas of KServe's ClusterServingRuntime and InferenceService, made from KServe's Python SDK.

The SDK's model classes are generated from the same Go types as KServe's CRDs. `make` keeps the names and types of the
fields, which fields are required, and the classes that the two kinds reach without `status`; unknown fields are
refused. Descriptions are left out. Types of Kubernetes itself are references to the definitions of kubernetes-validate.
`_CRD_RULES` are what the CRDs add to them for fields of KServe's own.

To follow a new release: `pip download --no-deps kserve`, then `python tests/helpers/kserve_schema.py kserve-*.whl`.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service import ROOT

DIRECTORY = ROOT / "tests" / "deploy" / "kserve"
KINDS = ("V1alpha1ClusterServingRuntime", "V1beta1InferenceService")

# References of kubernetes-validate's schemas, which its registry resolves.
KUBERNETES = "_definitions.json#/$defs/"
_PACKAGES = {
    "V1ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    "V1LabelSelector": "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector",
    "ResourceQuantity": "io.k8s.apimachinery.pkg.api.resource.Quantity",
}
_PLAIN = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
_UNTYPED = ("object", "datetime")
# From install/v0.21.0/kserve-crds.yaml of kserve/kserve. What the CRDs say about the fields of containers, such as
# unique keys of lists and the form of quantities, is left out.
_CRD_RULES: dict[str, Any] = {
    "V1alpha1SupportedModelFormat": {"required": ["name"], "properties": {"priority": {"minimum": 1}}},
    "V1beta1ModelFormat": {"required": ["name"]},
    "V1beta1PredictorSpec": {
        "properties": {
            "name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            "scaleMetric": {"enum": ["concurrency", "cpu", "memory", "rps"]},
            "scaleMetricType": {"enum": ["AverageValue", "Utilization", "Value"]},
        }
    },
}


def make(wheel: Path) -> dict[str, Any]:
    """Return the schemas of KINDS in `$defs`, with all that they refer to."""
    _, release, *_ = wheel.name.split("-")
    with zipfile.ZipFile(wheel) as archive:
        sources = [archive.read(name).decode() for name in archive.namelist() if name.startswith("kserve/models/v1")]
    classes = {found[1]: source for source in sources if (found := re.search(r"^class (\w+)\(", source, re.MULTILINE))}
    definitions: dict[str, Any] = {}
    waiting = [*KINDS]
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            definitions[name] = _describe(classes[name]) if name in classes else {}  # the SDK lacks a few classes
            _add(definitions[name], _CRD_RULES.get(name, {}))
            text = json.dumps(definitions[name])
            waiting += re.findall(r'"#/\$defs/(\w+)"', text)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"Made by tests/helpers/kserve_schema.py from KServe's Python SDK {release} (PyPI package kserve, "
        "Copyright The KServe Authors, Apache-2.0).",
        "$defs": dict(sorted(definitions.items())),
    }


def _add(schema: dict[str, Any], rules: dict[str, Any]) -> None:
    """Add rules to a schema, at any depth."""
    for key, value in rules.items():
        if isinstance(value, dict):
            _add(schema[key], value)
        else:
            assert key not in schema, key
            schema[key] = value


def _describe(source: str) -> dict[str, Any]:
    """Return the schema of a model class; `status` is what KServe writes, and left out."""
    fields, types = _assigned(source, "attribute_map"), _assigned(source, "openapi_types")
    required = sorted(set(re.findall(r"Invalid value for `(\w+)`, must not be `None`", source)) - {"status"})
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {fields[name]: _type(types[name]) for name in sorted(fields) if name != "status"},
        "additionalProperties": False,
    }
    return schema | ({"required": [fields[name] for name in required]} if required else {})


def _assigned(source: str, name: str) -> Mapping[str, str]:
    found = re.search(rf"^    {name} = (\{{.*?\}})", source, re.MULTILINE | re.DOTALL)
    assert found, name
    return ast.literal_eval(found[1])


def _type(name: str) -> dict[str, Any]:
    if inner := re.fullmatch(r"list\[(.+)\]", name):
        return {"type": "array", "items": _type(inner[1])}
    if inner := re.fullmatch(r"dict\(str, (.+)\)", name):
        return {"type": "object", "additionalProperties": _type(inner[1])}
    if name in _PLAIN:
        return {"type": _PLAIN[name]}
    if name in _UNTYPED:
        return {}
    if name in _PACKAGES:
        return {"$ref": KUBERNETES + _PACKAGES[name]}
    if re.match(r"V1(alpha|beta)\d", name):
        return {"$ref": f"#/$defs/{name}"}
    if other := re.fullmatch(r"K8sIoApi([A-Z][a-z]+)(V\d)(\w+)", name):
        return {"$ref": f"{KUBERNETES}io.k8s.api.{other[1].lower()}.{other[2].lower()}.{other[3]}"}
    assert name.startswith("V1"), name
    return {"$ref": f"{KUBERNETES}io.k8s.api.core.v1.{name.removeprefix('V1')}"}


if __name__ == "__main__":
    schema = make(Path(sys.argv[1]))
    DIRECTORY.mkdir(exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in schema.pop("$defs").items()]
    head = json.dumps(schema, indent=0)[1:-2]
    (DIRECTORY / "schema.json").write_text("{" + head + ',\n"$defs": {\n' + ",\n".join(lines) + "\n}}\n")
