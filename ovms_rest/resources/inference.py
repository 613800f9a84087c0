"""POST /v2/models/{name}[/versions/{version}]/infer: the way of an inference through the service."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import falcon

from ovms_rest.errors import BusyError, DeadlineError, InferenceError, NoContentError, ServingError
from ovms_rest.protocol.classification import classify
from ovms_rest.protocol.decoding import decode_header_length, decode_raw_request, decode_request
from ovms_rest.protocol.encoding import Buffer, encode_response
from ovms_rest.protocol.json_memory import choose_budget
from ovms_rest.protocol.room import SMALL_OUTPUTS, check_outputs, check_requested
from ovms_rest.protocol.tensors import Array, InferenceRequest, InferenceResponse, ModelMetadata, Tensor, batch_of
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.protocol.waiting_time import waits_since
from ovms_rest.resources.body import read_body
from ovms_rest.resources.compression import choose_encoding, compress
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.statistics import FailureKind, InferenceRecord, Question


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


class Infer:
    """POST /v2/models/{name}[/versions/{version}]/infer."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._max_body_bytes = settings.max_body_bytes
        self._json_memory = choose_budget(settings.max_body_bytes)
        self._may_compress = settings.response_compression

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Infer, and count it: bytes -> request -> arrays -> tensors -> bytes."""
        servable = self._registry.find(name, version)
        metadata, environ = servable.metadata, req.env
        started = time.monotonic_ns()
        record: InferenceRecord = environ.get("ovms_rest.inference") or InferenceRecord(started)
        record.model_name, record.model_version = metadata.name, metadata.version
        record.queue_ns = started - record.received_ns
        servable.counters.begin()
        try:
            header = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
            body = read_body(environ, self._max_body_bytes, header)
            request = self._decode(body, header, metadata)
            record.id, record.request_bytes = request.id, len(body)
            arrays = validate_inputs(request, metadata)
            requested = validate_outputs(request, metadata)
            if request.timeout_us:
                _check_deadline(request.timeout_us, environ, record.received_ns)
            if metadata.static_elements > SMALL_OUTPUTS:
                check_requested(requested, metadata, environ)
            decoded = time.monotonic_ns()
            record.input_ns = decoded - started
            tensors = servable.infer(arrays)
            inferred = time.monotonic_ns()
            record.infer_ns = inferred - decoded
            outputs = [
                (classify(tensors[name], classification, metadata.labels) if classification else tensors[name], binary)
                for name, binary, classification in requested
            ]
            if metadata.has_dynamic_outputs or metadata.static_elements > SMALL_OUTPUTS:
                check_outputs(outputs, environ)
            response = InferenceResponse(metadata.name, metadata.version, outputs, request.id)
            record.response_bytes = self._respond(req, resp, *encode_response(response))
        except Exception as error:
            _count_failure(servable.counters, error, record.queue_ns, started)
            raise
        record.output_ns = time.monotonic_ns() - inferred
        record.batch = batch_of(request.inputs[0].shape)
        servable.counters.record(
            record.queue_ns,
            record.input_ns,
            record.infer_ns,
            record.output_ns,
            record.batch,
            record.request_bytes,
            record.response_bytes,
        )

    def _decode(self, body: memoryview, header: str | None, metadata: ModelMetadata) -> InferenceRequest:
        """Decode a body; `header` is the text of Inference-Header-Content-Length."""
        header_length = decode_header_length(header, len(body))
        if header_length == 0:
            return decode_raw_request(body, metadata.inputs)
        return decode_request(body, header_length, model=metadata, json_memory=self._json_memory)

    def _respond(self, req: falcon.Request, resp: falcon.Response, head: bytes, sections: list[Buffer]) -> int:
        """Hand a response to the server: its JSON, and the bytes of its binary outputs; return its size."""
        if sections:
            resp.content_type = "application/octet-stream"
            resp.set_header("Inference-Header-Content-Length", str(len(head)))
        buffers: list[Buffer] = [head, *sections]
        if self._may_compress:
            resp.set_header("Vary", "Accept-Encoding")
            if encoding := choose_encoding(req.env.get("HTTP_ACCEPT_ENCODING", "")):
                resp.set_header("Content-Encoding", encoding)
                buffers = [compress(buffers, encoding)]
        size = sum(map(len, buffers))
        if len(buffers) == 1:
            resp.data = buffers[0]  # type: ignore[assignment]
        elif "ovms_rest.buffers" in req.env:  # our own worker sends views on tensors as they are
            resp.stream = buffers  # type: ignore[assignment]
            resp.content_length = size
        else:
            resp.data = b"".join(buffers)
        return size


def _check_deadline(timeout_us: int, environ: dict[str, Any], received: int) -> None:
    waited = time.monotonic_ns() - waits_since(environ, received)
    if waited > timeout_us * 1000:
        raise DeadlineError(timeout_us, waited)


def _count_failure(counters: InferenceCounters, error: Exception, queue_ns: int, started: int) -> None:
    """Count an inference that raised an error. NoContentError is a success: its response is empty."""
    elapsed = time.monotonic_ns() - started
    match error:
        case DeadlineError():
            counters.fail("timeout", error.waited_ns)
        case BusyError():
            counters.fail("overload", elapsed)
        case NoContentError():
            counters.record(queue_ns, 0, elapsed, 0)
        case ServingError() if not isinstance(error, InferenceError):
            counters.fail("invalid", elapsed)
        case _:
            counters.fail("failed", elapsed)
