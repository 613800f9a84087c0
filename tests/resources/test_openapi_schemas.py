"""Schemas of the OpenAPI document: they take what the protocol takes."""

import pytest
from jsonschema import Draft202012Validator

from ovms_rest.resources.openapi_schemas import SCHEMAS


def fits(name, value):
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    return Draft202012Validator(root).is_valid(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_valid(name):
    Draft202012Validator.check_schema(SCHEMAS[name])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("INT8_data", [-128, 127], True),
        ("INT8_data", [[-128], [[127]]], True),
        ("INT8_data", [], True),
        ("INT8_data", [128], False),
        ("INT8_data", [1.5], False),
        ("INT8_data", [None], False),
        ("INT8_data", 1, False),
        ("UINT64_data", [2**64 - 1], True),
        ("UINT64_data", [-1], False),
        ("FP16_data", [65504], True),
        ("FP16_data", [65536], False),
        ("FP64_data", [1e308], True),
        ("BOOL_data", [True], True),
        ("BOOL_data", [1], False),
        ("BYTES_data", ["a", {"b64": "/w=="}], True),
        ("BYTES_data", [{"b64": "/w"}], False),
        ("BYTES_data", [{"b64": "/x=="}], False),
        ("BYTES_data", [{}], False),
        ("FP32_result", [1, None], True),
        ("INT32_result", [None], False),
        ("InferenceRequest", {"inputs": []}, False),
        ("InferenceRequest", {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}, True),
        ("InferenceRequest", {"inputs": [{"name": "x", "shape": [-1], "datatype": "FP32", "data": [1]}]}, False),
        ("RequestParameters", {"timeout": 5, "other": "x"}, True),
        ("RequestParameters", {"timeout": "5"}, False),
        ("RequestParameters", {"other": None}, False),
    ],
)
def test_a_value_fits_its_schema_as_in_the_protocol(name, value, expected):
    assert fits(name, value) == expected
