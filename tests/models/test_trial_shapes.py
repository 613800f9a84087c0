"""The shapes that a model is tried with."""

import pytest

from ovms_rest.models.trial_shapes import choose_shapes
from ovms_rest.protocol.tensors import Dim, TensorMetadata

ANY = Dim(0, None)


def choose(*inputs, sizes=None):
    """Return the shapes chosen for inputs x0, x1, ..., each a tuple of sizes, pairs of bounds and Dims."""
    described = [
        TensorMetadata(f"x{number}", "FP32", tuple(Dim(d, d) if type(d) is int else Dim(*d) for d in dims))
        for number, dims in enumerate(inputs)
    ]
    found = choose_shapes(described, [()] * len(inputs) if sizes is None else sizes)
    return [tuple(shapes.values()) for shapes in found]


def test_static_model_has_one_choice():
    assert choose((1, 3), ()) == [((1, 3), ())]


def test_dynamic_dim_is_as_small_as_allowed_and_then_one_more():
    assert choose((ANY, 3)) == [((1, 3),), ((2, 3),)]
    assert choose(((4, 9), 3)) == [((4, 3),), ((5, 3),)]


def test_size_at_its_bound_is_varied_downwards():
    assert choose(((0, 1), 3)) == [((1, 3),), ((0, 3),)]


def test_dims_of_several_inputs_agree_where_they_can():
    """An attention mask has the length of the ids, whatever the config says."""
    assert choose((1, ANY), (1, (16, 512))) == [((1, 16), (1, 16)), ((1, 17), (1, 17))]


def test_each_dim_is_varied_alone_and_all_together():
    assert choose((ANY, ANY)) == [((1, 1),), ((2, 1),), ((1, 2),), ((2, 2),)]


def test_dynamic_dims_get_the_sizes_of_static_ones():
    assert choose((ANY, ANY), (2, 3))[-4:] == [((2, 3), (2, 3)), ((3, 3), (2, 3)), ((2, 4), (2, 3)), ((3, 4), (2, 3))]


def test_sizes_before_a_reshape_come_first():
    found = choose((ANY, ANY, ANY, ANY), sizes=[(1, 8, 8, 3)])
    assert found[:3] == [((1, 8, 8, 3),), ((2, 8, 8, 3),), ((1, 9, 8, 3),)]
    assert ((1, 1, 1, 1),) in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("bounds", "size"), [((1, 4), 4), ((9, 12), 9), (ANY, 8)])
def test_sizes_before_a_reshape_are_cut_off_at_the_bounds(bounds, size):
    assert choose((bounds, 3), sizes=[(8, 3)])[0] == ((size, 3),)


def test_unknown_sizes_and_ranks_are_ignored():
    assert choose((ANY, ANY), (ANY,), sizes=[(None, 5), ()])[0] == ((1, 5), (1,))
