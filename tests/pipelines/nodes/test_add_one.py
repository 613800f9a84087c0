"""libcustom_node_add_one: one number is added, another subtracted."""

import pytest
from node_cases import NODES, NUMBERS

NODE = NODES["add_one"]


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
    found = NODE.run({"input_numbers": NUMBERS}, **params)["output_numbers"]
    assert found.tolist() == [[number + added for number in range(10)]]


def test_add_one_describes_its_tensors():
    assert NODE.inputs() == {"input_numbers": ("FP32", (1, 10))}
    assert NODE.outputs() == {"output_numbers": ("FP32", (1, 10))}
