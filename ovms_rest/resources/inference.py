"""Inference: the way of a request from its bytes to those of its response."""

import time
from dataclasses import replace

import falcon

from ovms_rest.errors import (
    BusyError,
    CrashedError,
    DeadlineError,
    InferenceError,
    NoContentError,
    PausedError,
    ServingError,
)
from ovms_rest.models.servable import InferenceCounters, Registry
from ovms_rest.protocol.classification import classify
from ovms_rest.protocol.decoding import decode_request
from ovms_rest.protocol.encoding import Buffer, encode_response
from ovms_rest.protocol.header_length import read_header_length
from ovms_rest.protocol.json_memory import choose_limits
from ovms_rest.protocol.plain_bodies import JSON, decode_typed_request
from ovms_rest.protocol.raw_bodies import decode_raw_request
from ovms_rest.protocol.room import SMALL_OUTPUTS, check_outputs, check_requested, unlimited
from ovms_rest.protocol.tensors import InferenceRequest, InferenceResponse, ModelMetadata, batch_of
from ovms_rest.protocol.validation import validate_inputs, validate_outputs
from ovms_rest.protocol.waiting_time import waits_since
from ovms_rest.resources.body import Environ, read_body
from ovms_rest.resources.compression import choose_encoding, compress
from ovms_rest.resources.crash_guard import CrashGuard
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.statistics import InferenceRecord

_HEADER_LENGTH = "HTTP_INFERENCE_HEADER_CONTENT_LENGTH"


class Infer:
    """POST /v2/models/{name}[/versions/{version}]/infer."""

    def __init__(self, registry: Registry, settings: Settings, guard: CrashGuard) -> None:
        self._registry = registry
        self._guard = guard
        self._until = guard.until
        self._limits = choose_limits(settings.max_body_bytes)
        self._may_compress = settings.response_compression

    def on_post(self, req: falcon.Request, resp: falcon.Response, name: str, version: str | None = None) -> None:
        """Infer, and count it: bytes -> request -> arrays -> tensors -> bytes.

        Raises TryLaterError for a request sent again while it is unknown whether a worker has died of it.
        """
        servable = self._registry.find(name, version)
        metadata, environ = servable.metadata, req.env
        started = time.monotonic_ns()
        record: InferenceRecord = environ.get("ovms_rest.inference") or InferenceRecord(started)
        record.model_name, record.model_version = metadata.name, metadata.version
        record.queue_ns = started - record.received_ns
        note = self._guard.begin(metadata, environ)
        servable.counters.begin()
        try:
            if self._until[0] > started:
                self._guard.check_request(note)
            header = environ.get("ovms_rest.header_length") or read_header_length(environ.get(_HEADER_LENGTH))
            body = read_body(environ, self._limits.body, header.length)
            request = self._decode(body, header.check(len(body)), metadata, environ)
            record.id, record.request_bytes = request.id, len(body)
            arrays = validate_inputs(request, metadata)
            requested = validate_outputs(request, metadata)
            record.priority = request.priority
            if request.timeout_us:
                record.timeout_us = request.timeout_us
                record.waiting_since_ns = waits_since(environ, record.received_ns)
                record.check_deadline()
            if metadata.static_elements > SMALL_OUTPUTS:
                check_requested(requested, metadata, environ.get("ovms_rest.room", unlimited)())
            if note.is_watched:
                self._guard.check_inputs(note, arrays)
            decoded = time.monotonic_ns()
            record.input_ns = decoded - started
            tensors = servable.infer(arrays, record)
            inferred = time.monotonic_ns()
            record.infer_ns = inferred - decoded - record.parked_ns
            record.queue_ns += record.parked_ns
            outputs = [
                (classify(tensors[name], classification, metadata.labels) if classification else tensors[name], binary)
                for name, binary, classification in requested
            ]
            if metadata.has_dynamic_outputs or metadata.static_elements > SMALL_OUTPUTS:
                check_outputs(outputs, environ.get("ovms_rest.room", unlimited))
            response = InferenceResponse(metadata.name, metadata.version, outputs, request.id)
            record.response_bytes = self._respond(req, resp, *self._encode(response, request, environ))
        except Exception as error:
            _count_failure(servable.counters, error, record, time.monotonic_ns() - started)
            note.suspicions.clear()  # it may not have run, so it is not acquitted
            raise
        finally:
            if note.is_watched:
                self._guard.end(note)
            else:
                note.end()
        record.output_ns = time.monotonic_ns() - inferred
        record.batch = batch_of(request.inputs[0].shape)
        servable.counters.record(record)

    def _decode(
        self, body: memoryview, header_length: int | None, metadata: ModelMetadata, environ: Environ
    ) -> InferenceRequest:
        """Decode a body whose first `header_length` bytes are its JSON; with None, Content-Type may say what it is."""
        if header_length is None and (content_type := environ.get("CONTENT_TYPE", JSON)) != JSON:
            shape = environ.get("HTTP_X_TENSOR_SHAPE")
            return decode_typed_request(body, content_type, shape, metadata, self._limits)
        if header_length == 0:
            return decode_raw_request(body, metadata.inputs)
        return decode_request(body, header_length, model=metadata, limits=self._limits)

    def _encode(
        self, response: InferenceResponse, request: InferenceRequest, environ: Environ
    ) -> tuple[bytes, list[Buffer]]:
        """Return the JSON of a response, and the bytes of its binary outputs."""
        return encode_response(response)

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


def _count_failure(counters: InferenceCounters, error: Exception, record: InferenceRecord, elapsed_ns: int) -> None:
    """Count an inference that raised an error. NoContentError is a success: its response is empty."""
    match error:
        case DeadlineError():
            counters.fail("timeout", error.waited_ns, record.api)
        case CrashedError() | PausedError():
            counters.fail("crashed", elapsed_ns, record.api)
        case BusyError():
            counters.fail("overload", elapsed_ns, record.api)
        case NoContentError():
            counters.record(replace(record, input_ns=0, infer_ns=elapsed_ns))
        case ServingError() if not isinstance(error, InferenceError):
            counters.fail("invalid", elapsed_ns, record.api)
        case _:
            counters.fail("failed", elapsed_ns, record.api)
