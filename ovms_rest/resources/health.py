"""Health of the server and of models: liveness and readiness."""

from collections.abc import Callable

import falcon

from ovms_rest.errors import EndingError, NotReadyError
from ovms_rest.models.servable import Registry


class Live:
    """GET /v2/health/live."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond 200: a process that responds is alive."""

    on_head = on_get


class Ready:
    """GET /v2/health/ready."""

    def __init__(self, registry: Registry, is_ending: Callable[[], bool], count_workers: Callable[[], int]) -> None:
        self._registry = registry
        self._is_ending = is_ending
        self._count_workers = count_workers

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond 200 when every configured model and pipeline serves, else 400 with the reasons.

        A service that is shutting down is not ready, though it still responds to the requests that it has received. The
        control worker also responds while there is no worker that infers.
        """
        if self._is_ending():
            raise EndingError("the service is shutting down")
        self._registry.check_ready()
        if not self._count_workers():
            raise NotReadyError("no worker can infer; the arbiter starts others, or its log says why it cannot")

    on_head = on_get


class ModelReady:
    """GET /v2/models/{name}[/versions/{version}]/ready."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Respond 200 when the model serves, else 404 with the reason."""
        self._registry.find(name, version, explain=True).counters.answer("ModelReady")

    on_head = on_get
