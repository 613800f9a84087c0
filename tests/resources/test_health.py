"""Health of the server and of models, with a registry that is a fake."""

import falcon
import pytest
from falcon.testing import create_req

from ovms_rest.errors import EndingError, NotFoundError, NotReadyError
from ovms_rest.resources.health import Live, ModelReady, Ready
from ovms_rest.shared_memory.counters import Counters


class FakeServable:
    """A version that counts requests."""

    def __init__(self):
        self.counters = Counters(1).of("m", "1")


class FakeRegistry:
    """One model, m; the registry is not ready when there is a reason."""

    def __init__(self, reason=""):
        self.reason = reason
        self.servable = FakeServable()

    def find(self, name, version=None, explain=False):
        if name != "m":
            raise NotFoundError(f"model {name!r} is unknown" if explain else "")
        return self.servable

    def check_ready(self):
        if self.reason:
            raise NotReadyError(self.reason)


def get(resource, **parameters):
    """Call a resource; return the status and the body of its response."""
    response = falcon.Response()
    resource.on_get(create_req(), response, **parameters)
    return response.status_code, response.render_body()


def test_a_process_that_responds_is_live():
    assert get(Live()) == (200, None)


def test_a_registry_that_is_ready_makes_the_server_ready():
    assert get(Ready(FakeRegistry(), lambda: False)) == (200, None)


def test_a_registry_that_is_not_ready_gives_the_reason():
    with pytest.raises(NotReadyError, match=r"^model 'n' does not serve$"):
        get(Ready(FakeRegistry("model 'n' does not serve"), lambda: False))


@pytest.mark.parametrize("reason", ["", "model 'n' does not serve"])
def test_a_service_that_is_shutting_down_is_not_ready(reason):
    with pytest.raises(EndingError, match=r"^the service is shutting down$"):
        get(Ready(FakeRegistry(reason), lambda: True))


def test_the_readiness_of_a_model_is_counted():
    registry = FakeRegistry()
    assert get(ModelReady(registry), name="m", version="1") == (200, None)
    assert registry.servable.counters.read().questions == {"ModelMetadata": 0, "ModelReady": 1}


def test_a_model_that_is_not_ready_gives_the_reason():
    with pytest.raises(NotFoundError, match=r"^model 'n' is unknown$"):
        get(ModelReady(FakeRegistry()), name="n")
