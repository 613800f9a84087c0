"""libcustom_node_add_one: adds a number to ten numbers; OVMS's example of a custom node."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovms_rest.pipelines.nodes.params import Arrays, Forms, integer, param, size

_DIMS = (1, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    add_number: int = param(integer(0), 1)
    sub_number: int = param(integer(0), 0)
    output_queue_size: int = param(size, 10)  # accepted without effect; OVMS pools memory
    info_queue_size: int = param(size, 10)


def inputs(options: Options) -> Forms:
    return {"input_numbers": ("FP32", _DIMS)}


def outputs(options: Options) -> Forms:
    return {"output_numbers": ("FP32", _DIMS)}


def execute(arrays: Arrays, options: Options) -> dict[str, NDArray[np.float32]]:
    """Add one number and subtract the other."""
    return {"output_numbers": arrays["input_numbers"] + np.float32(options.add_number) - np.float32(options.sub_number)}
