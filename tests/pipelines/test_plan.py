"""The parts of nodes that run models; test_execution.py covers their inferences."""

from ovms_rest.pipelines.plan import ModelPart
from ovms_rest.protocol.tensors import ModelMetadata, TensorMetadata


class FakeModel:
    """A servable with only metadata; it cannot be opened."""

    metadata = ModelMetadata("m", "1", {"x": TensorMetadata("x", "FP32", ())}, {"y": TensorMetadata("y", "INT64", ())})


def test_the_tensors_of_a_models_part_are_those_of_its_metadata():
    part = ModelPart(FakeModel())
    assert (part.inputs, part.outputs) == (FakeModel.metadata.inputs, FakeModel.metadata.outputs)


def test_opening_a_models_part_does_not_open_the_model():
    ModelPart(FakeModel()).open()
