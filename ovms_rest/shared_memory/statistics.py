"""Statistics of models as in Triton's extension (protocol/README.md, section 8), and the state of processes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from ovms_rest.errors import DeadlineError

# Why an inference failed: an error of the client (4xx), a failure of the model (500), too many queued requests, a
# request that did not start within its timeout, a client that closed its connection before the inference began
# (Triton's term), a request that has crashed a worker before.
FailureKind = Literal["invalid", "failed", "overload", "timeout", "canceled", "crashed"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

# The APIs of inferences, by OVMS's names.
Api = Literal["KServe", "TensorFlowServing"]
APIS: tuple[Api, ...] = get_args(Api)

# Requests for a model besides inferences, by OVMS's names; the last two are of TensorFlow Serving's API.
Question = Literal["ModelMetadata", "ModelReady", "GetModelMetadata", "GetModelStatus"]
QUESTIONS: tuple[Question, ...] = get_args(Question)

# The inclusive upper bounds in microseconds of OVMS's histograms, whose last bucket has none (its page on metrics).
BOUNDS = tuple(int(10 * 1.8**exponent) for exponent in range(33))


# The inclusive upper bounds of the sizes of batches.
BATCH_BOUNDS = tuple(2**exponent for exponent in range(13))


@dataclass(slots=True)
class InferenceRecord:
    """The record of one inference, filled in on its way: `ovms_rest.inference` in the environ.

    All times are nanoseconds, 0 for a stage that was not reached; `received_ns` is by the monotonic clock.
    """

    received_ns: int
    model_name: str = ""
    model_version: str = ""
    id: str = ""
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    batch: int = 1
    request_bytes: int = 0
    response_bytes: int = 0
    parked_ns: int = 0  # between being ready for the inference and its beginning, for a batch with other requests
    # Of the inference of a model that infers batches; a follower is a request for whose inference another one accounts.
    executed_rows: int | None = None
    is_follower: bool = False
    timeout_us: int = 0  # after which the inference may not begin, from `waiting_since_ns` on; 0: none
    waiting_since_ns: int = 0
    priority: int = 0  # among the parked requests; 1 is first, 0 last
    api: Api = "KServe"
    # Of the inference with others in a batch: when it began, by the monotonic clock, and the rows of all.
    began_ns: int = 0
    batch_rows: int = 0
    nodes: list[Any] | None = None  # where a pipeline notes tracing.spans.NodeTimes of its nodes; None for not at all

    def check_deadline(self) -> None:
        """Raise DeadlineError if the timeout has passed."""
        waited = time.monotonic_ns() - self.waiting_since_ns
        if self.timeout_us and waited > self.timeout_us * 1000:
            raise DeadlineError(self.timeout_us, waited)


@dataclass(frozen=True, slots=True)
class Duration:
    """The number of events and their total time in nanoseconds; orjson writes it in the form of the extension."""

    count: int
    ns: int


class Histogram(NamedTuple):
    """The number of durations in each bucket of BOUNDS and the last one, and their sum in nanoseconds.

    Of batches, the number of rows in each bucket of BATCH_BOUNDS, and all rows.
    """

    buckets: tuple[int, ...]
    sum: int


class Outcomes(NamedTuple):
    """How many inferences succeeded, and how many failed for any reason."""

    successes: int
    failures: int


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """The inferences of one batch size, in nanoseconds."""

    batch_size: int
    count: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def to_json(self) -> dict[str, Any]:
        """Return it in the form of the extension."""
        return {
            "batch_size": self.batch_size,
            "compute_input": Duration(self.count, self.input_ns),
            "compute_infer": Duration(self.count, self.infer_ns),
            "compute_output": Duration(self.count, self.output_ns),
        }


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """The statistics of a version of a model or a pipeline since the service started, over all workers.

    `success`, `queue`, `compute_input`, `compute_infer` and `compute_output` count the same: successful inferences. The
    time of `success` is the sum of the other four. `inference_count` is the sum of the batch sizes, `execution_count`
    that of the model's own inferences, each of one or more requests.
    """

    name: str
    version: str
    last_inference_ms: int  # since 1970, 0 for none
    inference_count: int
    execution_count: int
    success: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    failures: Mapping[FailureKind, Duration]
    batches: Sequence[BatchStatistics]
    apis: Mapping[Api, Outcomes]
    questions: Mapping[Question, int]
    request_time: Histogram
    inference_time: Histogram
    queue_time: Histogram
    batch_size: Histogram  # in rows, of models that infer batches
    request_bytes: int
    response_bytes: int
    active: int  # inferences under way
    crashes: int  # workers that died while they inferred with it
    # Not counted, but set where the model is loaded.
    is_pipeline: bool = False
    streams: int | None = None
    queue_size: int | None = None

    @property
    def fail(self) -> Duration:
        """The inferences that failed, for any reason."""
        failures = self.failures.values()
        return Duration(sum(failure.count for failure in failures), sum(failure.ns for failure in failures))

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the statistics response."""
        nothing = Duration(0, 0)  # there is no response cache
        return {
            "name": self.name,
            "version": self.version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success,
                "fail": self.fail,
                "queue": self.queue,
                "compute_input": self.compute_input,
                "compute_infer": self.compute_infer,
                "compute_output": self.compute_output,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [batch.to_json() for batch in self.batches],
        }


# --- The state of the processes and models, as metrics show it


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker: its label, whether it is busy, and its resources; None if unknown."""

    worker: str
    busy: bool | None = None
    connections: int | None = None
    resident_bytes: int | None = None
    cpu_seconds: float | None = None


class SpanCounts(NamedTuple):
    """The spans that the collector accepted, and those dropped: for lack of room, and after a failure to send them."""

    sent: int
    full: int
    failed: int


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The processes of the service; None if unknown.

    The memory is that of the host or of the tightest control group.
    """

    workers: Sequence[WorkerState] = ()
    restarts: int | None = None
    generation: int | None = None
    outgrown: int | None = None
    spans: SpanCounts | None = None
    memory_limit_bytes: int | None = None
    memory_available_bytes: int | None = None


class Readiness(NamedTuple):
    """Whether a version of a model or pipeline serves that should."""

    name: str
    version: str
    is_ready: bool
