"""libcustom_node_add_one: ten numbers with one added to each, or another number; OVMS's example of a custom node."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_rest.pipelines.nodes.params import Arrays, Forms, Params, check_arrays, integer, param, parse_params, size

_DIMS = (1, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    add_number: int = param(integer(0), 1)
    sub_number: int = param(integer(0), 0)
    output_queue_size: int = param(size, 10)  # of memory that OVMS keeps
    info_queue_size: int = param(size, 10)


def inputs(params: Params) -> Forms:
    """Take the numbers."""
    parse_params(_Options, params)
    return {"input_numbers": ("FP32", _DIMS)}


def outputs(params: Params) -> Forms:
    """Give the numbers."""
    parse_params(_Options, params)
    return {"output_numbers": ("FP32", _DIMS)}


def execute(arrays: Arrays, params: Params) -> dict[str, NDArray[np.float32]]:
    """Add one number and subtract the other. Raises ValueError."""
    options = parse_params(_Options, params)
    check_arrays(arrays, inputs(params))
    return {"output_numbers": arrays["input_numbers"] + np.float32(options.add_number) - np.float32(options.sub_number)}
