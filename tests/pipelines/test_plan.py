"""The steps of a plan as values."""

from ovms_rest.pipelines.plan import Step
from ovms_rest.protocol.tensors import ModelMetadata


class FakeModel:
    """A servable with only metadata."""

    metadata = ModelMetadata("m", "1", {}, {})


def test_the_interface_of_a_model_step_is_its_metadata():
    assert Step("n", (), (), model=FakeModel()).interface is FakeModel.metadata


def test_the_interface_of_a_custom_step_is_its_code():
    node = object()
    assert Step("n", (), (), custom=node).interface is node
