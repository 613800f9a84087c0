"""The resources of the KServe v2 REST API (protocol.md section 1)."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.errors import BusyError, DeadlineError, EndingError, InferenceError, NoContentError, ServingError
from ovms_rest.protocol.classification import classify
from ovms_rest.protocol.decoding import decode_raw_request, decode_request
from ovms_rest.protocol.encoding import Buffer, encode_response
from ovms_rest.protocol.header_length import read_header_length
from ovms_rest.protocol.json_memory import choose_budget
from ovms_rest.protocol.room import SMALL_OUTPUTS, check_outputs, check_requested
from ovms_rest.protocol.tensors import Array, InferenceRequest, InferenceResponse, ModelMetadata, Tensor, batch_of
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.protocol.waiting_time import waits_since
from ovms_rest.resources.body import read_body
from ovms_rest.resources.compression import choose_encoding, compress
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.statistics import FailureKind, Question, Served

# Exactly those that work.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)


class InferenceCounters(Protocol):
    """Where inferences of a version are counted; all times are nanoseconds."""

    def begin(self) -> None:
        """Note that an inference is under way."""

    def record(
        self,
        queue_ns: int,
        input_ns: int,
        infer_ns: int,
        output_ns: int,
        batch: int = 1,
        request_bytes: int = 0,
        response_bytes: int = 0,
    ) -> None:
        """Count one that was answered."""

    def fail(self, kind: FailureKind, total_ns: int) -> None:
        """Count one that was not."""

    def answer(self, question: Question) -> None:
        """Count an answer about the model."""


class Servable(Protocol):
    """What can be inferred: a version of a model."""

    counters: InferenceCounters

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

    def __init__(self, extensions: Sequence[str]) -> None:
        """Take what works besides the protocol itself."""
        self._body = orjson.dumps({"name": "ovms_rest", "version": __version__, "extensions": extensions})

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

    def __init__(self, registry: Registry, is_ending: Callable[[], bool]) -> None:
        """Take what is served, and what tells whether the service ends."""
        self._registry = registry
        self._is_ending = is_ending

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 when everything that is configured serves, else 400 with what does not and why.

        When the service ends it is not ready any more, though it answers what has come.
        """
        if self._is_ending():
            raise EndingError("the service is shutting down")
        self._registry.check_ready()

    on_head = on_get


class ModelDescription:
    """GET /v2/models/{name}[/versions/{version}]."""

    def __init__(self, registry: Registry) -> None:
        """Take what is served."""
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Answer the names, datatypes and shapes of the model's tensors."""
        servable = self._registry.find(name, version, explain=True)
        servable.counters.answer("ModelMetadata")
        resp.data = orjson.dumps(servable.metadata.to_json(self._registry.versions(name)))

    on_head = on_get


class ModelReady:
    """GET /v2/models/{name}[/versions/{version}]/ready."""

    def __init__(self, registry: Registry) -> None:
        """Take what is served."""
        self._registry = registry

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Answer 200 when the model serves, else 404 with the reason."""
        self._registry.find(name, version, explain=True).counters.answer("ModelReady")

    on_head = on_get


class Infer:
    """POST /v2/models/{name}[/versions/{version}]/infer."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        """Take what is served, and the limits."""
        self._registry = registry
        self._settings = settings
        self._json_memory = choose_budget(settings.max_body_bytes)

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Infer, and count it."""
        servable = self._registry.find(name, version)
        started = time.monotonic_ns()
        received = req.env.get("ovms_rest.received", started)
        if req.env.get("ovms_rest.observed"):
            metadata = servable.metadata
            req.env["ovms_rest.served"] = Served(metadata.name, metadata.version, started - received, 0, 0, 0, "")
        servable.counters.begin()
        try:
            self._infer(req, resp, servable, received, started)
        except DeadlineError as error:
            servable.counters.fail("timeout", error.waited_ns)
            raise
        except BusyError:
            servable.counters.fail("overload", time.monotonic_ns() - started)
            raise
        except NoContentError:  # an answer too
            servable.counters.record(started - received, 0, time.monotonic_ns() - started, 0)
            raise
        except Exception as error:
            is_refusal = isinstance(error, ServingError) and not isinstance(error, InferenceError)
            servable.counters.fail("invalid" if is_refusal else "failed", time.monotonic_ns() - started)
            raise

    def _infer(
        self, req: falcon.Request, resp: falcon.Response, servable: Servable, received: int, started: int
    ) -> None:
        """Infer: bytes -> request -> arrays -> tensors -> bytes."""
        metadata, is_observed = servable.metadata, "ovms_rest.served" in req.env
        body, request = self._read_request(req, metadata)
        if is_observed:
            _note(req, id=request.id)
        arrays = validate_inputs(request, metadata)
        requested = validate_outputs(request, metadata)
        if request.timeout_us:
            waited = time.monotonic_ns() - waits_since(req.env, received)
            if waited > request.timeout_us * 1000:
                raise DeadlineError(request.timeout_us, waited)
        if metadata.static_elements > SMALL_OUTPUTS:
            check_requested(requested, metadata, req.env)
        decoded = time.monotonic_ns()
        if is_observed:
            _note(req, input_ns=decoded - started)
        tensors = servable.infer(arrays)
        inferred = time.monotonic_ns()
        outputs = [
            (classify(tensors[name], classification, metadata.labels) if classification else tensors[name], binary)
            for name, binary, classification in requested
        ]
        if metadata.has_dynamic_outputs or metadata.static_elements > SMALL_OUTPUTS:
            check_outputs(outputs, req.env)
        response = InferenceResponse(metadata.name, metadata.version, outputs, request.id)
        answered = self._answer(req, resp, *encode_response(response))
        output_ns = time.monotonic_ns() - inferred
        servable.counters.record(
            started - received,
            decoded - started,
            inferred - decoded,
            output_ns,
            batch_of(request.inputs[0].shape),
            body,
            answered,
        )
        if is_observed:
            _note(req, infer_ns=inferred - decoded, output_ns=output_ns)

    def _read_request(self, req: falcon.Request, metadata: ModelMetadata) -> tuple[int, InferenceRequest]:
        """Read the body; return its size, and the request."""
        header = read_header_length(req.env.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH"))
        body = read_body(req.env, self._settings.max_body_bytes, header.length)
        header_length = header.check(len(body))
        if header_length == 0:
            return len(body), decode_raw_request(body, metadata.inputs)
        return len(body), decode_request(body, header_length, model=metadata, json_memory=self._json_memory)

    def _answer(self, req: falcon.Request, resp: falcon.Response, head: bytes, sections: list[Buffer]) -> int:
        """Hand the answer to the server; return its size."""
        if sections:
            resp.content_type = "application/octet-stream"
            resp.set_header("Inference-Header-Content-Length", str(len(head)))
        parts: list[Buffer] = [head, *sections]
        if self._settings.response_compression:
            resp.set_header("Vary", "Accept-Encoding")
            if encoding := choose_encoding(req.env.get("HTTP_ACCEPT_ENCODING", "")):
                resp.set_header("Content-Encoding", encoding)
                parts = [compress(parts, encoding)]
        size = sum(map(len, parts))
        if len(parts) == 1:
            resp.data = parts[0]  # type: ignore[assignment]
        elif "ovms_rest.buffers" in req.env:  # our own worker sends views on tensors as they are
            resp.stream = parts  # type: ignore[assignment]
            resp.content_length = size
        else:
            resp.data = b"".join(parts)
        return size


def _note(req: falcon.Request, **known: int | str) -> None:
    """Add to what the worker's access log is told of this inference."""
    req.env["ovms_rest.served"] = req.env["ovms_rest.served"]._replace(**known)
