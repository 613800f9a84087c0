"""TensorFlow Serving's REST API: predictions, and the status and metadata of models (protocol/README.md section 11)."""

import time
from typing import Any

import falcon
import orjson

from ovms_rest.errors import InvalidRequestError, NotFoundError
from ovms_rest.models.servable import Registry
from ovms_rest.protocol.encoding import Buffer
from ovms_rest.protocol.room import SMALL_OUTPUTS, check_outputs, unlimited
from ovms_rest.protocol.routes import is_prediction, read_version
from ovms_rest.protocol.tensors import InferenceRequest, InferenceResponse, ModelMetadata
from ovms_rest.protocol.tfs import (
    decode_prediction,
    describe_signature,
    describe_status,
    encode_prediction,
    measure_structure,
)
from ovms_rest.protocol.words import join, quote
from ovms_rest.resources.body import Environ
from ovms_rest.resources.control import Statuses
from ovms_rest.resources.inference import Infer
from ovms_rest.shared_memory.statistics import Api, InferenceRecord


def api_of(path: str) -> Api:
    """Return the API of the inference with this path."""
    return "TensorFlowServing" if is_prediction(path) else "KServe"


class Predict(Infer):
    """POST /v1/models/{name}[/versions/{version}]:predict: an inference in the forms of TensorFlow Serving."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Infer, and count it as a prediction."""
        record = req.env.setdefault("ovms_rest.inference", InferenceRecord(time.monotonic_ns()))
        record.api = "TensorFlowServing"
        super().on_post(req, resp, name, read_version(version))

    def _decode(
        self, body: memoryview, header_length: int | None, metadata: ModelMetadata, environ: Environ
    ) -> InferenceRequest:
        return decode_prediction(body, metadata, self._limits)

    def _encode(
        self, response: InferenceResponse, request: InferenceRequest, environ: Environ
    ) -> tuple[bytes, list[Buffer]]:
        outputs = [tensor for tensor, _ in response.outputs]
        structure = measure_structure(outputs, request.is_rows)
        if structure > SMALL_OUTPUTS:
            check_outputs(response.outputs, environ.get("ovms_rest.room", unlimited), structure)
        return encode_prediction(outputs, request.is_rows), []


class NoPrediction:
    """POST /v1/models/{name}[/versions/{version}]:classify and :regress."""

    def __init__(self, registry: Registry, verb: str) -> None:
        self._registry = registry
        self._verb = verb

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Refuse it, as TensorFlow Serving does for a model without a signature for it."""
        self._registry.find(name, read_version(version))
        raise InvalidRequestError(
            f"model {name!r} has no {self._verb!r} signature, as OpenVINO models have none; "
            f"POST /v1/models/{{name}}:predict takes tensors, and POST /v2/models/{{name}}/infer returns the highest "
            f"classes with their labels by the parameter 'classification' of an output"
        )


class SignatureMetadata:
    """GET /v1/models/{name}[/versions/{version}]/metadata."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Respond with the datatypes and shapes of the model's tensors as a signature."""
        servable = self._registry.find(name, read_version(version), explain=True)
        servable.counters.answer("GetModelMetadata")
        resp.data = orjson.dumps(describe_signature(servable.metadata))

    on_head = on_get


class VersionStatus:
    """GET /v1/models/{name}[/versions/{version}]."""

    def __init__(self, registry: Registry, models: Statuses) -> None:
        self._registry = registry
        self._models = models

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Respond with the states of one version, or of all, and the reasons of those that do not serve."""
        version = read_version(version)
        entry = self._models.status().get(name)
        if entry is None:
            self._registry.find(name)  # raises NotFoundError
            entry = {"model_version_status": []}  # loaded since the statuses were published
        statuses: list[dict[str, Any]] = entry["model_version_status"]
        if version is not None:
            known = [status["version"] for status in statuses]
            statuses = [status for status in statuses if status["version"] == version]
            if not statuses:
                raise NotFoundError(f"version {quote(version)} of model {quote(name)} is unknown; known: {join(known)}")
        self._count(name)
        resp.data = orjson.dumps(describe_status(statuses))

    def _count(self, name: str) -> None:
        try:
            servable = self._registry.find(name)
        except NotFoundError:  # a model that does not serve has no counters
            return
        servable.counters.answer("GetModelStatus")

    on_head = on_get
