"""Tile operations, split into steps that the CPU plugin computes.

If the model computes the repeats of a Tile or the client sends them, the plugin (OpenVINO 2026.4.1) leaves the output
unwritten when it has to loop over more than six dims, as for a 4-D tensor repeated along three of them: the client
would get old memory. A Tile that repeats at most two dims never needs more than five.
"""

from typing import Any

import numpy as np
import openvino
from openvino import opset15

from ovms_rest.models.shapes import find_nodes

_MOST_LOOPS = 6
_STEP = 2  # dims per Tile


def split_tiles(model: openvino.Model) -> None:
    """Replace every Tile whose output the plugin may leave unwritten by several Tiles that it computes."""
    suspects = [node for node in find_nodes(model) if node.get_type_name() == "Tile" and _may_be_unwritten(node)]
    for node in suspects:
        node.output(0).replace(_tile_in_steps(node).output(0))
    if suspects:
        model.validate_nodes_and_infer_types()


def _may_be_unwritten(node: Any) -> bool:
    data, repeats = (node.input_value(index).get_partial_shape() for index in range(2))
    if node.input_value(1).get_node().get_type_name() == "Constant":
        return False  # OpenVINO tiles these one dim at a time
    if data.rank.is_dynamic or repeats.is_dynamic:
        return False  # the plugin refuses these
    rank: int = data.rank.get_length()
    count: int = repeats.get_shape()[0]
    # Two loops for each repeated dim, for its repeats and its size, and one for all dims before these.
    return 2 * min(rank, count) + (rank > count) > _MOST_LOOPS


def _tile_in_steps(node: Any) -> Any:
    repeats = node.input_value(1)
    count = repeats.get_shape()[0]
    one = opset15.constant(np.ones(1), repeats.get_element_type())
    tiled = node.input_value(0)
    for begin in range(0, count, _STEP):
        axes = np.arange(count)
        chosen = opset15.constant((axes >= begin) & (axes < begin + _STEP))
        tiled = opset15.tile(tiled, opset15.select(chosen, repeats, one)).output(0)
    last = tiled.get_node()
    last.set_friendly_name(node.get_friendly_name())
    return last
