"""Reasons out of the texts of OpenVINO's exceptions."""

import pytest

from ovms_rest.models.reasons import find_reason, one_line

TEXT = (
    "Exception from src/inference/src/cpp/infer_request.cpp:223:\n"
    "Check 'a == b' failed at src/core/src/op/matmul.cpp:12:\n"
    "While validating node 'opset1::MatMul MatMul_5 (x[0]:f32[2,3]) -> (f32[...])' with friendly_name 'product':\n"
    "Incompatible dims 3 and 4 at 0x7f00 in /usr/lib/openvino/lib.so:7\n"
)


def test_reason_for_clients_names_the_node_without_locations_paths_and_addresses():
    assert find_reason(RuntimeError(TEXT)) == "node 'product': Incompatible dims 3 and 4 at in"


@pytest.mark.parametrize("text", ["", "[CPU]", "src/plugin.cpp:7:"])
def test_reason_for_clients_is_never_empty(text):
    assert find_reason(RuntimeError(text)) == "OpenVINO gives no reason"


def test_long_reason_is_cut():
    assert find_reason(RuntimeError("x" * 1000)) == "x" * 400
    assert one_line(RuntimeError("x" * 1000)) == "x" * 500


def test_line_for_the_log_omits_locations_in_sources():
    assert one_line(RuntimeError("Exception from a.cpp:1:\n  first\n\nCheck 'a' failed at b.cpp:2:\nsecond")) == (
        "first second"
    )


def test_line_for_the_log_is_the_location_if_there_is_nothing_else():
    assert one_line(RuntimeError("Exception from a.cpp:1:")) == "Exception from a.cpp:1:"
