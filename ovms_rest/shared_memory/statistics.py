"""What has happened to the versions of models, in the form of Triton's statistics extension (protocol.md section 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

# Why an inference was not answered: a mistake of the client (4xx), a failure of the model (500), too many requests
# waiting, a request that could not start in the time it gave, a client that closed its connection before the inference
# began (by Triton's word).
FailureKind = Literal["invalid", "failed", "overload", "timeout", "canceled"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

# What besides inferences is asked of a model, by OVMS's names.
Question = Literal["ModelMetadata", "ModelReady"]
QUESTIONS: tuple[Question, ...] = get_args(Question)

# The upper bounds of OVMS's histograms in microseconds, each included; a last bucket has none (ovms_config.md 8.3).
BOUNDS = tuple(int(10 * 1.8**exponent) for exponent in range(33))


@dataclass(slots=True)
class InferenceRecord:
    """What is known of one inference, filled in on its way: `ovms_rest.inference` in the environ, for the access log.

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


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened, and the nanoseconds it took in all; orjson writes it as the extension has it."""

    count: int
    ns: int


class Histogram(NamedTuple):
    """How many durations fell into each bucket of BOUNDS and the one behind them, and their sum in nanoseconds."""

    buckets: tuple[int, ...]
    ns: int


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """The inferences of one batch size, in nanoseconds."""

    batch_size: int
    count: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the extension writes it."""
        return {
            "batch_size": self.batch_size,
            "compute_input": Duration(self.count, self.input_ns),
            "compute_infer": Duration(self.count, self.infer_ns),
            "compute_output": Duration(self.count, self.output_ns),
        }


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """What has happened to a version of a model or a pipeline since the service started, in all workers.

    `success`, `queue`, `compute_input`, `compute_infer` and `compute_output` count the same: inferences that were
    answered. `success` takes as long as the other four together. `inference_count` is the sum of their batch sizes.
    """

    name: str
    version: str
    last_inference_ms: int  # since 1970, 0 for none
    inference_count: int
    success: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    failures: Mapping[FailureKind, Duration]
    batches: Sequence[BatchStatistics]
    questions: Mapping[Question, int]
    request_time: Histogram
    inference_time: Histogram
    queue_time: Histogram
    request_bytes: int
    response_bytes: int
    active: int  # inferences under way
    # What is not counted, but set where the model is loaded.
    is_pipeline: bool = False
    streams: int | None = None
    queue_size: int | None = None

    @property
    def fail(self) -> Duration:
        """The inferences that were not answered, for whatever reason."""
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
            "execution_count": self.success.count,
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
