"""Metadata of the server and of models, with a registry that is a fake."""

import falcon
import orjson
import pytest
from falcon.testing import create_req

from ovms_rest import __version__
from ovms_rest.errors import NotFoundError
from ovms_rest.protocol.tensors import Dim, ModelMetadata, TensorMetadata
from ovms_rest.resources.metadata import ModelDescription, ServerDescription
from ovms_rest.shared_memory.counters import Counters

METADATA = ModelMetadata(
    "m", "1", {"x": TensorMetadata("x", "FP32", (Dim(0, None), Dim(3, 3)))}, {"y": TensorMetadata("y", "BYTES", ())}
)


class FakeServable:
    """A version that counts requests."""

    def __init__(self):
        self.metadata = METADATA
        self.counters = Counters(1).of("m", "1")


class FakeRegistry:
    """Two versions of one model, m."""

    def __init__(self):
        self.servable = FakeServable()

    def find(self, name, version=None, explain=False):
        if name != "m":
            raise NotFoundError(f"model {name!r} is unknown" if explain else "")
        return self.servable

    def versions(self, name):
        return ["1", "2"]


def get(resource, **parameters):
    """Call a resource; return the JSON of its response."""
    response = falcon.Response()
    resource.on_get(create_req(), response, **parameters)
    return orjson.loads(response.render_body())


def test_the_server_names_its_version_and_extensions():
    assert get(ServerDescription(["a", "b"])) == {"name": "ovms_rest", "version": __version__, "extensions": ["a", "b"]}


def test_a_model_lists_its_versions_and_tensors():
    assert get(ModelDescription(FakeRegistry()), name="m") == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "OpenVINO",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "BYTES", "shape": []}],
    }


def test_a_request_for_the_metadata_of_a_model_is_counted():
    registry = FakeRegistry()
    get(ModelDescription(registry), name="m", version="1")
    assert registry.servable.counters.read().questions == {"ModelMetadata": 1, "ModelReady": 0}


def test_the_metadata_of_an_unknown_model_give_the_reason():
    with pytest.raises(NotFoundError, match=r"^model 'n' is unknown$"):
        get(ModelDescription(FakeRegistry()), name="n")
