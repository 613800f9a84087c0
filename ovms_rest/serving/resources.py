"""The resources of the KServe v2 REST API (protocol.md section 1)."""

from collections.abc import Mapping
from typing import Protocol

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.protocol.decoding import decode_header_length, decode_raw_request, decode_request
from ovms_rest.protocol.encoding import Buffer, encode_response
from ovms_rest.protocol.tensors import Array, InferenceRequest, InferenceResponse, ModelMetadata, Tensor
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.serving.body import read_body
from ovms_rest.serving.compression import choose_encoding, compress
from ovms_rest.settings import Settings

# Exactly those that work.
EXTENSIONS = ("binary_tensor_data",)


class Servable(Protocol):
    """What can be inferred: a version of a model."""

    @property
    def metadata(self) -> ModelMetadata:
        """What it takes and gives."""

    def infer(self, arrays: Mapping[str, Array]) -> Mapping[str, Tensor]:
        """Infer with an array for every input; return a tensor for every output, by name."""


class Registry(Protocol):
    """What is served."""

    def find(self, name: str, version: str | None = None, explain: bool = False) -> Servable:
        """Return the version asked for, None being the highest. Raises NotFoundError, with the reason to `explain`."""

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that serve, lowest first."""

    def check_ready(self) -> None:
        """Raise NotReadyError unless everything configured serves."""


class ServerDescription:
    """GET /v2."""

    _body = orjson.dumps({"name": "ovms_rest", "version": __version__, "extensions": EXTENSIONS})

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer name, version and the extensions that work."""
        resp.data = self._body

    on_head = on_get


class Live:
    """GET /v2/health/live."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200: whoever answers is alive."""

    on_head = on_get


class Ready:
    """GET /v2/health/ready."""

    def __init__(self, registry: Registry) -> None:
        """Take what is served."""
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 when everything that is configured serves, else 400 with what does not and why."""
        self._registry.check_ready()

    on_head = on_get


class ModelDescription:
    """GET /v2/models/{name}[/versions/{version}]."""

    def __init__(self, registry: Registry) -> None:
        """Take what is served."""
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Answer the names, datatypes and shapes of the model's tensors."""
        metadata = self._registry.find(name, version, explain=True).metadata
        resp.data = orjson.dumps(metadata.to_json(self._registry.versions(name)))

    on_head = on_get


class ModelReady:
    """GET /v2/models/{name}[/versions/{version}]/ready."""

    def __init__(self, registry: Registry) -> None:
        """Take what is served."""
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Answer 200 when the model serves, else 404 with the reason."""
        self._registry.find(name, version, explain=True)

    on_head = on_get


class Infer:
    """POST /v2/models/{name}[/versions/{version}]/infer."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        """Take what is served, and the limits."""
        self._registry = registry
        self._settings = settings

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Infer: bytes -> request -> arrays -> tensors -> bytes."""
        servable = self._registry.find(name, version)
        request = self._read_request(req, servable.metadata)
        arrays = validate_inputs(request, servable.metadata)
        requested = validate_outputs(request, servable.metadata)
        tensors = servable.infer(arrays)
        response = InferenceResponse(
            servable.metadata.name,
            servable.metadata.version,
            [(tensors[name], binary) for name, binary in requested],
            request.id,
        )
        self._answer(req, resp, *encode_response(response))

    def _read_request(self, req: falcon.Request, metadata: ModelMetadata) -> InferenceRequest:
        header = req.env.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
        body = read_body(req.env, self._settings.max_body_bytes, header)
        header_length = decode_header_length(header, len(body))
        if header_length == 0:
            return decode_raw_request(body, metadata.inputs)
        return decode_request(body, header_length)

    def _answer(self, req: falcon.Request, resp: falcon.Response, head: bytes, sections: list[Buffer]) -> None:
        if sections:
            resp.content_type = "application/octet-stream"
            resp.set_header("Inference-Header-Content-Length", str(len(head)))
        parts: list[Buffer] = [head, *sections]
        if self._settings.response_compression:
            resp.set_header("Vary", "Accept-Encoding")
            if encoding := choose_encoding(req.env.get("HTTP_ACCEPT_ENCODING", "")):
                resp.set_header("Content-Encoding", encoding)
                parts = [compress(parts, encoding)]
        if len(parts) == 1:
            resp.data = parts[0]  # type: ignore[assignment]
        elif "ovms_rest.buffers" in req.env:  # our own worker sends views on tensors as they are
            resp.stream = parts  # type: ignore[assignment]
            resp.content_length = sum(map(len, parts))
        else:
            resp.data = b"".join(parts)
