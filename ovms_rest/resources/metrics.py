"""GET /metrics: OVMS's families with their names, labels, texts and buckets (OVMS's docs/metrics.md), and our own."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from operator import attrgetter
from typing import NamedTuple, Protocol

import falcon
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ovms_rest.errors import NotFoundError
from ovms_rest.protocol.words import quote
from ovms_rest.resources.statistics import StatisticsSource
from ovms_rest.shared_memory.statistics import (
    BATCH_BOUNDS,
    BOUNDS,
    Api,
    Histogram,
    ModelStatistics,
    Outcomes,
    ProcessState,
    Question,
    Readiness,
    WorkerState,
)

Label = tuple[str, str]

# prometheus-client adds `_total` to the name of a counter above its samples; OVMS does not, and neither do we.
_COUNTER_HEAD = re.compile(rb"^(# (?:HELP|TYPE) \S+)_total ", re.MULTILINE)

# Written as OVMS does: le="10", not le="10.0".
_LE = (*map(str, BOUNDS), "+Inf")
_LE_ROWS = (*map(str, BATCH_BOUNDS), "+Inf")


class MetricsSource(StatisticsSource, Protocol):
    """The counters and the state of all workers."""

    def process_state(self) -> ProcessState:
        """Return the state of the processes."""

    def readiness(self) -> Sequence[Readiness]:
        """Return every version that should serve."""


class _Values(NamedTuple):
    """All values of one scrape."""

    models: Sequence[ModelStatistics]
    processes: ProcessState
    readiness: Sequence[Readiness]


# The sample lines of a family, from its name and all values.
_Lines = Callable[[str, _Values], Iterator[str]]

# OVMS's names of inferences, and of the requests for the metadata and for the state.
_METHODS: Mapping[Api, tuple[str, Question, Question]] = {
    "KServe": ("ModelInfer", "ModelMetadata", "ModelReady"),
    "TensorFlowServing": ("Predict", "GetModelMetadata", "GetModelStatus"),
}


class _Family(NamedTuple):
    """A family: its type, its help text, its sample lines, and whether it is among the default metrics."""

    type: str
    text: str
    lines: _Lines
    default: bool = True


# --- Lines: 100 for each version of a model, 36 for each histogram, so their constant text is cached

# Enough for 2000 versions.
_KEPT_STARTS, _KEPT_HISTOGRAMS = 2**15, 6000

_write: Callable[[float], str] = lru_cache(2**14)(floatToGoString)


@lru_cache(_KEPT_STARTS)
def _start(name: str, *labels: tuple[str, str]) -> str:
    """Return a line without its value."""
    text = ",".join(f'{label}="{_escape(value)}"' for label, value in sorted(labels))
    return f"{name}{{{text}}} " if labels else f"{name} "


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


@lru_cache(_KEPT_HISTOGRAMS)
def _frame(name: str, bounds: tuple[str, ...], *labels: tuple[str, str]) -> str:
    """Return the lines of a histogram with a %s for each value."""
    starts = [
        *(_start(f"{name}_bucket", *labels, ("le", le)) for le in bounds),
        _start(f"{name}_count", *labels),
        _start(f"{name}_sum", *labels),
    ]
    return "".join(start.replace("%", "%%") + "%s\n" for start in starts)


def _line(value: float, name: str, *labels: tuple[str, str]) -> str:
    return f"{_start(name, *labels)}{_write(value)}\n"


def _labels_of(model: ModelStatistics) -> tuple[Label, Label]:
    return ("name", model.name), ("version", model.version)


def _of_models(value: Callable[[ModelStatistics], int | None], pipelines: bool = False) -> _Lines:
    """Make the lines of a value of every model, and of every pipeline if `pipelines` is true; None has no line."""

    def lines(name: str, values: _Values) -> Iterator[str]:
        for model in values.models:
            if (pipelines or not model.is_pipeline) and (number := value(model)) is not None:
                yield _line(number, name, *_labels_of(model))

    return lines


def _times(histogram: Callable[[ModelStatistics], Histogram], pipelines: bool = False, *labels: Label) -> _Lines:
    """Make the lines of a histogram of every model, and of every pipeline if `pipelines` is true, in microseconds."""

    def lines(name: str, values: _Values) -> Iterator[str]:
        for model in values.models:
            if pipelines or not model.is_pipeline:
                buckets, ns = histogram(model)
                counts = list(map(_write, accumulate(buckets)))
                yield _frame(name, _LE, *labels, *_labels_of(model)) % (*counts, counts[-1], _write(ns / 1000))

    return lines


def _batch_sizes(name: str, values: _Values) -> Iterator[str]:
    for model in values.models:
        counts = list(map(_write, accumulate(model.batch_size.buckets)))
        if model.batch_size.sum:
            yield _frame(name, _LE_ROWS, *_labels_of(model)) % (
                *counts,
                counts[-1],
                counts[-1],
                _write(model.batch_size.sum),
            )


def _requests(inferences: Callable[[Outcomes], int], questions: Callable[[int], int]) -> _Lines:
    """Make the lines of the number of requests by API and method.

    Requests for readiness and status have no version, as in OVMS.
    """

    def lines(name: str, values: _Values) -> Iterator[str]:
        name_of = attrgetter("name")
        by_name = [
            (model_name, list(models)) for model_name, models in groupby(sorted(values.models, key=name_of), name_of)
        ]
        for api, (infer, metadata, ready) in _METHODS.items():
            interface = ("api", api), ("interface", "REST")
            for model in values.models:
                labels = (*interface, *_labels_of(model))
                yield _line(inferences(model.apis[api]), name, *labels, ("method", infer))
                yield _line(questions(model.questions[metadata]), name, *labels, ("method", metadata))
            for model_name, models in by_name:
                number = sum(questions(model.questions[ready]) for model in models)
                yield _line(number, name, *interface, ("method", ready), ("name", model_name))

    return lines


def _refusals(name: str, values: _Values) -> Iterator[str]:
    for model in values.models:
        for kind, duration in model.failures.items():
            yield _line(duration.count, name, *_labels_of(model), ("kind", kind))


def _readiness(name: str, values: _Values) -> Iterator[str]:
    for version in values.readiness:
        yield _line(version.is_ready, name, ("name", version.name), ("version", version.version))


def _of_workers(value: Callable[[WorkerState], float | None]) -> _Lines:
    def lines(name: str, values: _Values) -> Iterator[str]:
        for worker in values.processes.workers:
            if (number := value(worker)) is not None:
                yield _line(number, name, ("worker", worker.worker))

    return lines


def _of_service(value: Callable[[ProcessState], int | None]) -> _Lines:
    def lines(name: str, values: _Values) -> Iterator[str]:
        if (number := value(values.processes)) is not None:
            yield _line(number, name)

    return lines


def _dropped_spans(name: str, values: _Values) -> Iterator[str]:
    if (spans := values.processes.spans) is not None:
        yield _line(spans.full, name, ("reason", "full"))
        yield _line(spans.failed, name, ("reason", "failed"))


# --- Families

_FAMILIES: Mapping[str, _Family] = {
    "ovms_requests_success": _Family(
        "counter",
        "Number of successful requests to a model or a DAG.",
        _requests(lambda outcomes: outcomes.successes, lambda answered: answered),
    ),
    "ovms_requests_fail": _Family(
        "counter",
        "Number of failed requests to a model or a DAG.",
        # Requests for metadata and readiness of a known model never fail; others belong to no model.
        _requests(lambda outcomes: outcomes.failures, lambda answered: 0),
    ),
    "ovms_current_requests": _Family(
        "gauge",
        "Number of inference requests currently in process.",
        _of_models(lambda model: model.active),
    ),
    "ovms_request_time_us": _Family(
        "histogram",
        "Processing time of requests to a model or a DAG.",
        _times(lambda model: model.request_time, True, ("interface", "REST")),
    ),
    "ovms_inference_time_us": _Family(
        "histogram",
        "Inference execution time in the OpenVINO backend.",
        _times(lambda model: model.inference_time),
    ),
    "ovms_wait_for_infer_req_time_us": _Family(
        "histogram",
        "Request waiting time in the scheduling queue.",
        _times(lambda model: model.queue_time),
    ),
    "ovms_streams": _Family(
        "gauge",
        "Number of OpenVINO execution streams.",
        _of_models(lambda model: model.streams),
    ),
    "ovms_infer_req_queue_size": _Family(
        "gauge",
        "Inference request queue size (nireq).",
        _of_models(lambda model: model.queue_size),
        default=False,
    ),
    "ovms_infer_req_active": _Family(
        "gauge",
        "Number of currently consumed inference request from the processing queue.",
        _of_models(lambda model: model.active),
        default=False,
    ),
    "ovms_rest_requests_refused": _Family(
        "counter",
        "Number of inference requests that were refused or failed, by kind.",
        _refusals,
    ),
    "ovms_rest_crashes": _Family(
        "counter",
        "Number of workers that died while they inferred with a model or pipeline.",
        _of_models(lambda model: model.crashes, pipelines=True),
    ),
    "ovms_rest_request_bytes": _Family(
        "counter",
        "Bytes in the bodies of inference requests.",
        _of_models(lambda model: model.request_bytes, pipelines=True),
    ),
    "ovms_rest_response_bytes": _Family(
        "counter",
        "Bytes in the bodies of inference responses.",
        _of_models(lambda model: model.response_bytes, pipelines=True),
    ),
    "ovms_rest_batch_size": _Family(
        "histogram",
        "Rows that were inferred together, of models with max_batch_size.",
        _batch_sizes,
    ),
    "ovms_rest_model_ready": _Family(
        "gauge",
        "1 for a version of a model or pipeline that serves, 0 for one that should serve but does not.",
        _readiness,
    ),
    "ovms_rest_worker_busy": _Family(
        "gauge",
        "1 while a worker has inferences to run, else 0; absent for the control worker.",
        _of_workers(lambda worker: worker.busy),
    ),
    "ovms_rest_worker_connections": _Family(
        "gauge",
        "Number of connections that a worker holds.",
        _of_workers(lambda worker: worker.connections),
    ),
    "ovms_rest_worker_resident_bytes": _Family(
        "gauge",
        "Resident memory of a worker, including the memory that it shares.",
        _of_workers(lambda worker: worker.resident_bytes),
    ),
    "ovms_rest_worker_cpu_seconds": _Family(
        "counter",
        "CPU time of a worker, user and system.",
        _of_workers(lambda worker: worker.cpu_seconds),
    ),
    "ovms_rest_worker_restarts": _Family(
        "counter",
        "Number of workers that died and were replaced.",
        _of_service(lambda processes: processes.restarts),
    ),
    "ovms_rest_worker_memory_replacements": _Family(
        "counter",
        "Number of workers that were replaced because their memory exceeded OVMS_REST_MAX_WORKER_MEMORY_BYTES.",
        _of_service(lambda processes: processes.outgrown),
    ),
    "ovms_rest_generation": _Family(
        "gauge",
        "Number of the current generation of workers.",
        _of_service(lambda processes: processes.generation),
    ),
    "ovms_rest_spans_sent": _Family(
        "counter",
        "Number of spans that the collector of traces has accepted; absent without traces.",
        _of_service(lambda processes: processes.spans and processes.spans.sent),
    ),
    "ovms_rest_spans_dropped": _Family(
        "counter",
        "Number of spans that were dropped: full, for lack of room; failed, because they could not be sent.",
        _dropped_spans,
    ),
    "ovms_rest_memory_limit_bytes": _Family(
        "gauge",
        "Memory that the service may use: that of the host, or the limit of its control group.",
        _of_service(lambda processes: processes.memory_limit_bytes),
    ),
    "ovms_rest_memory_available_bytes": _Family(
        "gauge",
        "Memory that the service can still use before the host or a control group runs out.",
        _of_service(lambda processes: processes.memory_available_bytes),
    ),
}

# OVMS's families of MediaPipe graphs: a list may name them, but there are no such graphs here.
_OF_GRAPHS = (
    "ovms_current_graphs",
    "ovms_requests_accepted",
    "ovms_requests_rejected",
    "ovms_responses",
    "ovms_graph_error",
    "ovms_graph_processing_time_us",
)

# The metrics served without a `metrics_list`.
DEFAULT_METRICS = tuple(name for name, family in _FAMILIES.items() if family.default)


def check_metrics_list(names: Sequence[str]) -> dict[int, str]:
    """Return the problems of a `metrics_list`, unknown and repeated names, by index."""
    known = (*_FAMILIES, *_OF_GRAPHS)
    problems = {}
    for index, name in enumerate(names):
        if name not in known:
            (near,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            problems[index] = f"unknown metric {quote(name)}; the nearest known one is {near!r}"
        elif name in names[:index]:
            problems[index] = f"{name!r} is listed more than once"
    return problems


# --- Text


class _Head(Collector):
    """A family without samples, for which prometheus-client writes the HELP and TYPE lines."""

    def __init__(self, name: str, family: _Family) -> None:
        self._metric = Metric(name, family.text, family.type)

    def collect(self) -> Iterator[Metric]:
        """Yield the family."""
        yield self._metric


def _write_head(name: str) -> str:
    return _COUNTER_HEAD.sub(rb"\1 ", generate_latest(_Head(name, _FAMILIES[name]))).decode()


class Metrics:
    """GET /metrics."""

    def __init__(self, source: MetricsSource | None, names: Iterable[str] = DEFAULT_METRICS) -> None:
        """Serve the metrics of a checked list; a `source` of None disables them."""
        self._source = source
        self._heads = {name: _write_head(name) for name in names if name in _FAMILIES}

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with Prometheus's text format, summed over all workers. Raises NotFoundError if disabled."""
        if self._source is None:
            raise NotFoundError(
                "metrics are disabled; enable them with --metrics_enable, OVMS_REST_METRICS_ENABLE=true, or "
                '"monitoring": {"metrics": {"enable": true}} in the config file'
            )
        values = _Values(self._source.statistics(), self._source.process_state(), self._source.readiness())
        resp.content_type = CONTENT_TYPE_LATEST
        parts: list[str] = []
        for name, head in self._heads.items():
            if lines := list(_FAMILIES[name].lines(name, values)):
                parts += (head, *lines)
        resp.data = "".join(parts).encode()

    on_head = on_get
