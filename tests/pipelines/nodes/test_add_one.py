"""libcustom_node_add_one: one number is added, another subtracted."""

import numpy as np
import pytest
from node_cases import NUMBERS, execute, inputs, outputs

from ovms_rest.pipelines.nodes import add_one


@pytest.mark.parametrize(
    ("params", "added"),
    [
        ({}, 1),
        ({"add_number": "5"}, 5),
        ({"sub_number": "3"}, -2),
        ({"add_number": " +0 ", "sub_number": "2", "output_queue_size": "1", "info_queue_size": "1"}, -2),
    ],
)
def test_one_number_is_added_and_the_other_subtracted(params, added):
    found = execute(add_one, {"input_numbers": NUMBERS}, params)["output_numbers"]
    assert found.dtype == np.float32
    assert found.tolist() == [[number + added for number in range(10)]]


def test_add_one_describes_its_tensors():
    assert inputs(add_one, {}) == {"input_numbers": ("FP32", (1, 10))}
    assert outputs(add_one, {}) == {"output_numbers": ("FP32", (1, 10))}
