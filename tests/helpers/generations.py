"""Services whose workers and models are replaced, and clients that notice if a request fails meanwhile."""

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import model_zoo
import numpy as np
from openvino import Model, Type, opset15
from raw_http import RELU
from service import Answer, Service, repeating

# The request of a model that `times` makes.
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()
# Of clients between requests: loads run only on cores that nobody else wants.
PAUSE_SECONDS = 0.002


def times(factor: float) -> Model:
    """Make a model x FP32 [1,4] -> y = x * factor."""
    x = model_zoo.parameter("x", (1, 4), Type.f32)
    return model_zoo.model_of({"y": opset15.multiply(x, opset15.constant(np.float32(factor)))}, [x])


def save_broken(version: Path) -> None:
    """Write a version that cannot be read."""
    version.mkdir()
    (version / "model.onnx").write_text("garbage")


def works(service: Service) -> bool:
    """Return whether an inference with the model relu succeeds."""
    return service.infer("relu", RELU).json()["outputs"][0]["data"] == [1, 0, 3, 0]


def wait_until_replaced(service: Service, before: Collection[int]) -> None:
    """Wait until there are as many other workers as these, and none of these."""
    service.wait_for(lambda: len(now := service.workers()) == len(before) and not set(now) & set(before))


def hang_up(service: Service) -> None:
    """Have the arbiter reload by SIGHUP, and wait until all workers are new ones."""
    before = service.workers()
    service.signal(signal.SIGHUP)
    wait_until_replaced(service, before)


def settings_with(directory: Path, hook: str = "") -> str:
    """Write the service's settings of gunicorn, followed by a user's; return their path."""
    path = directory / "settings.py"
    path.write_text(f"from ovms_rest.arbiter.gunicorn_settings import *\n{hook}\n")
    return str(path)


def kill_one(service: Service) -> None:
    """Kill a worker and wait until the arbiter has noticed."""
    pid = service.workers()[0]
    os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda: pid not in service.workers())


def checking(service: Service) -> contextlib.AbstractContextManager[list[Exception]]:
    """Infer with the model relu continuously; none may fail."""

    def check() -> None:
        assert works(service), service.log
        time.sleep(PAUSE_SECONDS)

    return repeating(check)


def status(*versions: str, state: str = "AVAILABLE") -> dict:
    """Return the entry of a model without faults in the response of /v1/config."""
    entry = {"state": state, "status": {"error_code": "OK", "error_message": "OK"}}
    return {"model_version_status": [{"version": version, **entry} for version in versions]}


def fault(answer: Answer) -> str:
    """Return the status and the error of a response."""
    return f"{answer.status} {answer.json()['error']}"


def index(service: Service, model: str) -> list[dict]:
    """Return the entries of a model in the repository index."""
    return [entry for entry in service.request("POST", "/v2/repository/index").json() if entry["name"] == model]


class Results(list):
    """The version and the first number of each response."""

    failures: Sequence[Exception] = ()

    def __init__(self, service: Service) -> None:
        self._service = service

    def wait_for_more(self, count: int = 50) -> None:
        """Wait for this many more responses, or a failure."""
        enough = len(self) + count
        self._service.wait_for(lambda: len(self) >= enough or self.failures)


@contextlib.contextmanager
def inferring(service: Service, model: str) -> Iterator[Results]:
    """Infer continuously with a model that `times` made, on connections that are kept alive; none may fail."""

    def infer() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        with contextlib.closing(connection):
            for _ in range(100):
                connection.request("POST", f"/v2/models/{model}/infer", BODY)
                response = connection.getresponse()
                answer = json.loads(response.read())
                results.append((answer["model_version"], answer["outputs"][0]["data"][0]))
                time.sleep(PAUSE_SECONDS)
                if response.getheader("connection") == "close":
                    break

    results = Results(service)
    with repeating(infer, 3) as results.failures:
        results.wait_for_more()
        yield results
        results.wait_for_more()
