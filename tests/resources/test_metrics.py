"""The text of /metrics, read by Prometheus's own parser, against OVMS's families (OVMS's docs/metrics.md)."""

import sys
import types
from dataclasses import replace

import prometheus_client
import pytest
from fake_app import client_of
from prometheus_client.parser import text_string_to_metric_families
from records import timed

from ovms_rest.resources.metrics import DEFAULT_METRICS, Metrics, check_metrics_list
from ovms_rest.shared_memory.counters import Counters
from ovms_rest.shared_memory.statistics import BOUNDS, ProcessState, Readiness, SpanCounts, WorkerState

INTERFACE = {"api": "KServe", "interface": "REST"}
TFS = {"api": "TensorFlowServing", "interface": "REST"}
M1 = {"name": "m", "version": "1"}

# Type, labels and text of OVMS's families.
MODEL = {"name", "version"}
REQUESTS = {"api", "interface", "method", *MODEL}
OVMS_FAMILIES = {
    "ovms_requests_success": ("counter", REQUESTS, "Number of successful requests to a model or a DAG."),
    "ovms_requests_fail": ("counter", REQUESTS, "Number of failed requests to a model or a DAG."),
    "ovms_current_requests": ("gauge", MODEL, "Number of inference requests currently in process."),
    "ovms_request_time_us": (
        "histogram",
        {"interface", "name", "version"},
        "Processing time of requests to a model or a DAG.",
    ),
    "ovms_inference_time_us": ("histogram", MODEL, "Inference execution time in the OpenVINO backend."),
    "ovms_wait_for_infer_req_time_us": ("histogram", MODEL, "Request waiting time in the scheduling queue."),
    "ovms_streams": ("gauge", MODEL, "Number of OpenVINO execution streams."),
    "ovms_infer_req_queue_size": ("gauge", MODEL, "Inference request queue size (nireq)."),
    "ovms_infer_req_active": (
        "gauge",
        MODEL,
        "Number of currently consumed inference request from the processing queue.",
    ),
}
NOT_DEFAULT = {"ovms_infer_req_queue_size", "ovms_infer_req_active"}

OURS = {
    "ovms_rest_requests_refused": ("counter", {"name", "version", "kind"}),
    "ovms_rest_crashes": ("counter", {"name", "version"}),
    "ovms_rest_request_bytes": ("counter", {"name", "version"}),
    "ovms_rest_response_bytes": ("counter", {"name", "version"}),
    "ovms_rest_model_ready": ("gauge", {"name", "version"}),
    "ovms_rest_worker_busy": ("gauge", {"worker"}),
    "ovms_rest_worker_connections": ("gauge", {"worker"}),
    "ovms_rest_worker_resident_bytes": ("gauge", {"worker"}),
    "ovms_rest_worker_cpu_seconds": ("counter", {"worker"}),
    "ovms_rest_worker_restarts": ("counter", set()),
    "ovms_rest_worker_memory_replacements": ("counter", set()),
    "ovms_rest_generation": ("gauge", set()),
    "ovms_rest_spans_sent": ("counter", set()),
    "ovms_rest_spans_dropped": ("counter", {"reason"}),
    "ovms_rest_memory_limit_bytes": ("gauge", set()),
    "ovms_rest_memory_available_bytes": ("gauge", set()),
}

OF_PROCESSES = {
    "ovms_rest_generation",
    *(name for name in OURS if "worker" in name or "memory" in name or "spans" in name),
}

OF_GRAPHS = ["ovms_current_graphs", "ovms_requests_accepted", "ovms_requests_rejected"]
OF_GRAPHS += ["ovms_responses", "ovms_graph_error", "ovms_graph_processing_time_us"]

FULL = ProcessState(
    [WorkerState("0", True, 3, 2**20, 1.25), WorkerState("1", False, 0, 2**21, 0.5)],
    restarts=4,
    generation=2,
    outgrown=3,
    spans=SpanCounts(5, 6, 7),
    memory_limit_bytes=2**34,
    memory_available_bytes=2**33,
)

SERVING = (Readiness("m", "1", True),)


class Source:
    """Counters, the state of the processes and the readiness of models, with values of loaded models."""

    def __init__(self, counters, processes=FULL, versions=SERVING, **loaded):
        self.counters = counters
        self.processes = processes
        self.versions = versions
        self.loaded = loaded

    def statistics(self, name=None, version=None):
        return [replace(model, **self.loaded) for model in self.counters.statistics(name, version)]

    def process_state(self):
        return self.processes

    def readiness(self):
        return self.versions


def make(*versions):
    """Return counters of these names and versions, by default of version 1 of m."""
    counters = Counters(4)
    for name, version in versions or [("m", "1")]:
        counters.of(name, version)
    return counters


def ask(*arguments, method="GET"):
    """Send a request to a resource made with these arguments."""
    return client_of({"/metrics": Metrics(*arguments)}).simulate_request(method, "/metrics")


def scrape(source, *names):
    """Return the families of a scrape by name."""
    answer = ask(source, *([names] if names else []))
    assert answer.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def samples(source, name, suffix=""):
    """Return the labels and the value of each sample of a family. The parser adds `_total` to the names of counters."""
    family = scrape(source, name)[name]
    names = {name + suffix, f"{name}_total"}
    return [(sample.labels, sample.value) for sample in family.samples if sample.name in names]


def value(source, name, suffix="", /, **labels):
    """Return the value of the only sample that has these labels."""
    (found,) = (number for given, number in samples(source, name, suffix) if labels.items() <= given.items())
    return found


EVERYTHING = Source(make(), streams=2, queue_size=64)

# --- Families


@pytest.mark.parametrize("name", OVMS_FAMILIES)
def test_families_of_ovms_have_its_type_text_and_labels(name):
    kind, labels, text = OVMS_FAMILIES[name]
    family = scrape(EVERYTHING, name)[name]
    assert (family.type, family.documentation) == (kind, text)
    assert set().union(*(sample.labels for sample in family.samples)) - {"le"} == labels


@pytest.mark.parametrize("name", OVMS_FAMILIES)
def test_lines_of_ovms_families_have_its_names(name):
    lines = ask(EVERYTHING, [name]).text.splitlines()
    assert lines[:2] == [f"# HELP {name} {OVMS_FAMILIES[name][2]}", f"# TYPE {name} {OVMS_FAMILIES[name][0]}"]
    suffixes = ("_bucket", "_count", "_sum") if OVMS_FAMILIES[name][0] == "histogram" else ("",)
    assert {line.partition("{")[0] for line in lines[2:]} == {name + suffix for suffix in suffixes}


@pytest.mark.parametrize("name", OURS)
def test_our_families_have_their_type_and_labels(name):
    family = scrape(EVERYTHING, name)[name]
    assert (family.type, set().union(*(sample.labels for sample in family.samples))) == OURS[name]
    assert family.documentation.endswith(".")


def test_default_families_are_served_without_a_list():
    served = OVMS_FAMILIES.keys() - NOT_DEFAULT | OURS.keys()
    assert set(scrape(EVERYTHING)) == served
    assert set(DEFAULT_METRICS) == served | {"ovms_rest_batch_size"}


def test_sizes_of_batches_are_counted_of_models_that_infer_any():
    counters = make()
    for rows, is_follower in ((3, False), (0, True), (0, True), (1, False), (4096, False)):
        record = timed()
        record.executed_rows, record.is_follower = rows, is_follower
        counters.of("m", "1").record(record)
    source, name = Source(counters), "ovms_rest_batch_size"
    assert scrape(source, name)[name].type == "histogram"
    found = {labels["le"]: number for labels, number in samples(source, name, "_bucket")}
    assert list(found) == [*(str(2**exponent) for exponent in range(13)), "+Inf"]
    assert tuple(found[size] for size in ("1", "2", "4", "2048", "4096")) == (1, 1, 2, 2, 3)
    assert (value(source, name, "_count"), value(source, name, "_sum")) == (3, 4100)


def test_list_replaces_the_default_families():
    names = ["ovms_infer_req_active", "ovms_requests_success"]
    assert list(scrape(EVERYTHING, *names)) == names


def test_empty_list_serves_nothing():
    assert ask(EVERYTHING, []).text == ""


def test_families_of_graphs_may_be_listed_but_have_no_lines():
    assert list(scrape(EVERYTHING, *OF_GRAPHS, "ovms_streams")) == ["ovms_streams"]


def test_unknown_values_have_no_lines():
    unknown = {"ovms_streams", "ovms_infer_req_queue_size", "ovms_rest_model_ready", "ovms_rest_batch_size"}
    unknown |= set(OF_PROCESSES)
    families = scrape(Source(make(), ProcessState([WorkerState("0")]), ()))
    assert set(families) == set(DEFAULT_METRICS) - unknown


def test_values_known_of_some_workers_have_lines_for_them():
    processes = ProcessState([WorkerState("0", connections=0), WorkerState("1", busy=False)])
    source = Source(make(), processes)
    assert samples(source, "ovms_rest_worker_connections") == [({"worker": "0"}, 0)]
    assert samples(source, "ovms_rest_worker_busy") == [({"worker": "1"}, 0)]


def test_families_of_processes_are_served_without_models():
    assert set(scrape(Source(Counters(1), versions=()))) == OF_PROCESSES


def test_dropped_spans_have_a_reason():
    source = Source(make())
    assert samples(source, "ovms_rest_spans_sent") == [({}, 5)]
    assert samples(source, "ovms_rest_spans_dropped") == [({"reason": "full"}, 6), ({"reason": "failed"}, 7)]


# --- Values


def test_all_labels_exist_before_the_first_request():
    assert samples(EVERYTHING, "ovms_requests_success") == [
        ({**INTERFACE, **M1, "method": "ModelInfer"}, 0),
        ({**INTERFACE, **M1, "method": "ModelMetadata"}, 0),
        ({**INTERFACE, "name": "m", "method": "ModelReady"}, 0),
        ({**TFS, **M1, "method": "Predict"}, 0),
        ({**TFS, **M1, "method": "GetModelMetadata"}, 0),
        ({**TFS, "name": "m", "method": "GetModelStatus"}, 0),
    ]


def test_successes_and_failures_are_counted_by_method():
    counters = make()
    model = counters.of("m", "1")
    model.record(timed())
    model.record(timed())
    model.fail("invalid", 0)
    model.fail("timeout", 0)
    model.fail("timeout", 0)
    for question in ("ModelMetadata", "ModelMetadata", "ModelReady"):
        model.answer(question)
    source = Source(counters)
    for method, successes, failures in (("ModelInfer", 2, 3), ("ModelMetadata", 2, 0), ("ModelReady", 1, 0)):
        assert value(source, "ovms_requests_success", method=method) == successes
        assert value(source, "ovms_requests_fail", method=method) == failures


def test_requests_of_tensorflow_serving_are_counted_by_its_methods():
    counters = make()
    model = counters.of("m", "1")
    model.record(timed())
    model.record(replace(timed(), api="TensorFlowServing"))
    model.fail("invalid", 0, "TensorFlowServing")
    model.answer("GetModelStatus")
    source = Source(counters)
    counts = {("KServe", "ModelInfer"): (1, 0), ("TensorFlowServing", "Predict"): (1, 1)}
    counts |= {("TensorFlowServing", "GetModelStatus"): (1, 0), ("TensorFlowServing", "GetModelMetadata"): (0, 0)}
    for (api, method), (successes, failures) in counts.items():
        assert value(source, "ovms_requests_success", api=api, method=method) == successes
        assert value(source, "ovms_requests_fail", api=api, method=method) == failures


def test_readiness_requests_are_summed_over_versions():
    """OVMS has no version label for them."""
    counters = make(("b", "1"), ("a", "1"), ("b", "2"))
    for version in ("1", "2"):
        counters.of("b", version).answer("ModelReady")
    ready = [
        (labels["name"], number)
        for labels, number in samples(Source(counters), "ovms_requests_success")
        if labels["method"] == "ModelReady"
    ]
    assert ready == [("a", 0), ("b", 2)]


def test_refusals_are_counted_by_kind():
    counters = make()
    counters.of("m", "1").fail("overload", 5)
    refused = {labels["kind"]: number for labels, number in samples(Source(counters), "ovms_rest_requests_refused")}
    assert refused == {"invalid": 0, "failed": 0, "overload": 1, "timeout": 0, "canceled": 0, "crashed": 0}


def test_crashes_are_counted_of_models_and_pipelines():
    counters = make(("m", "1"), ("p", "1"))
    counters.count_crash("m", "1", 0)
    for is_pipeline in (False, True):
        source = Source(counters, is_pipeline=is_pipeline)
        assert {labels["name"]: number for labels, number in samples(source, "ovms_rest_crashes")} == {"m": 1, "p": 0}


def test_bytes_of_bodies_are_counted():
    counters = make()
    counters.of("m", "1").record(timed(0, 0, 0, 0, 1, 602_112, 4000))
    assert value(Source(counters), "ovms_rest_request_bytes", **M1) == 602_112
    assert value(Source(counters), "ovms_rest_response_bytes", **M1) == 4000


@pytest.mark.parametrize("name", ["ovms_current_requests", "ovms_infer_req_active"])
def test_inferences_under_way_are_counted(name):
    counters = make()
    counters.of("m", "1").begin()
    assert value(Source(counters), name, **M1) == 1


def test_streams_and_queue_size_are_served():
    assert value(EVERYTHING, "ovms_streams", **M1) == 2
    assert value(EVERYTHING, "ovms_infer_req_queue_size", **M1) == 64


def test_state_of_the_processes_is_served():
    of_workers = {"busy": (1, 0), "connections": (3, 0), "resident_bytes": (2**20, 2**21), "cpu_seconds": (1.25, 0.5)}
    for name, (first, second) in of_workers.items():
        found = samples(EVERYTHING, f"ovms_rest_worker_{name}")
        assert found == [({"worker": "0"}, first), ({"worker": "1"}, second)]
    totals = {"worker_restarts": 4, "generation": 2, "worker_memory_replacements": 3}
    for name, total in {**totals, "memory_limit_bytes": 2**34, "memory_available_bytes": 2**33}.items():
        assert samples(EVERYTHING, f"ovms_rest_{name}") == [({}, total)]


def test_readiness_is_1_for_a_version_that_serves_and_0_for_one_that_does_not():
    versions = (Readiness("m", "1", True), Readiness("m", "2", False), Readiness("never loaded", "1", False))
    assert samples(Source(make(), versions=versions), "ovms_rest_model_ready") == [
        ({"name": "m", "version": "1"}, 1),
        ({"name": "m", "version": "2"}, 0),
        ({"name": "never loaded", "version": "1"}, 0),
    ]


def test_pipeline_has_only_requests_and_their_time():
    names = {
        name
        for name, family in scrape(Source(make(), is_pipeline=True), *OVMS_FAMILIES).items()
        if any("name" in sample.labels for sample in family.samples)
    }
    assert names == {"ovms_requests_success", "ovms_requests_fail", "ovms_request_time_us"}


# --- Histograms

HISTOGRAMS = ["ovms_request_time_us", "ovms_inference_time_us", "ovms_wait_for_infer_req_time_us"]


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_have_ovms_buckets_written_as_integers(name):
    assert [labels["le"] for labels, _ in samples(EVERYTHING, name, "_bucket")] == [*map(str, BOUNDS), "+Inf"]


@pytest.mark.parametrize(("name", "time"), [*zip(HISTOGRAMS, (60_000, 30_500, 10_000), strict=True)])
def test_histograms_count_microseconds_up_to_each_bound(name, time):
    counters = make()
    counters.of("m", "1").record(timed(10_000, 9_000, 30_500, 10_500))
    counters.of("m", "1").record(timed(10**15, 0, 10**15, 0))
    source = Source(counters)
    for bound in BOUNDS:
        assert value(source, name, "_bucket", le=str(bound), **M1) == (time <= bound * 1000)
    assert value(source, name, "_bucket", le="+Inf", **M1) == 2
    assert value(source, name, "_count", **M1) == 2
    assert value(source, name, "_sum", **M1) == (time + 10**15 * (1 + (name == HISTOGRAMS[0]))) / 1000


def test_time_of_requests_counts_successes():
    counters = make()
    counters.of("m", "1").record(timed())
    counters.of("m", "1").fail("failed", 10)
    assert value(Source(counters), "ovms_request_time_us", "_count", interface="REST") == 1


# --- Text


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "{a}", "größe", "# HELP x_total "])
def test_any_model_name_survives_escaping(name):
    labels, _ = samples(Source(make((name, "1"))), "ovms_current_requests")[0]
    assert labels["name"] == name


def test_model_name_like_a_counter_is_left_alone():
    assert 'name="ovms_requests_success_total "' in ask(Source(make(("ovms_requests_success_total ", "1")))).text


def rewrite(text):
    """Return a text as prometheus-client writes it after parsing it; OVMS's counters have no `_total`."""
    families = types.SimpleNamespace(collect=lambda: text_string_to_metric_families(text))
    return prometheus_client.generate_latest(families).decode().replace("_total{", "{").replace("_total ", " ")


@pytest.mark.parametrize("name", ["m", 'a"b\\c\nd', "50%s %%", "größe"])
def test_text_is_that_of_prometheus_client(name):
    counters = make((name, "1"), (name, "12"), ("other", "1"))
    for nanoseconds in (0, 1, 999_999, 10**6, 10**9 + 1, 123_456_789_012, 10**17):
        for _ in range(3):
            counters.of(name, "12").record(timed(nanoseconds, nanoseconds, nanoseconds, nanoseconds, 1, 10**5, 333_333))
    source = Source(counters, streams=2, queue_size=1_000_000)
    text = ask(source, [*OVMS_FAMILIES, *OURS]).text
    assert text == rewrite(text)
    assert "e+06" in text
    assert "e+15" in text


def count_calls(function):
    """Return what a function returns, and how many functions it calls."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, len(calls)


def test_scrape_of_200_models_is_cheap():
    """A scrape once took 145 ms, so 60 of them held a worker for 8.7 s. Now it costs less than prometheus-client's."""
    counters = make(*((f"model {index}", "1") for index in range(200)))
    resource, resp = Metrics(Source(counters, streams=2)), types.SimpleNamespace()
    _, calls = count_calls(lambda: resource.on_get(None, resp))
    assert resp.data.count(b"\n") > 200 * 100
    families = list(text_string_to_metric_families(resp.data.decode()))
    source = types.SimpleNamespace(collect=lambda: families)
    text, theirs = count_calls(lambda: prometheus_client.generate_latest(source))
    assert text.count(b"\n") == resp.data.count(b"\n")
    assert calls < theirs / 2, (calls, theirs)


def test_content_type_is_that_of_prometheus_client():
    assert ask(EVERYTHING).headers["content-type"] == prometheus_client.CONTENT_TYPE_LATEST


def test_prometheus_clients_own_registry_is_not_served():
    assert all(name.startswith("ovms_") for name in scrape(EVERYTHING))


def test_head_works_where_get_does():
    answer = ask(EVERYTHING, method="HEAD")
    assert (answer.status_code, answer.content) == (200, b"")


def test_disabled_metrics_are_404_with_the_ways_to_enable_them():
    answer = ask(None)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    for way in ("--metrics_enable", "OVMS_REST_METRICS_ENABLE=true", "monitoring"):
        assert way in answer.json["error"]
    assert '"monitoring": {"metrics": {"enable": true}}' in answer.json["error"]


# --- The list


@pytest.mark.parametrize("names", [[], [*OVMS_FAMILIES, *OURS, *OF_GRAPHS], DEFAULT_METRICS])
def test_known_names_are_valid(names):
    assert check_metrics_list(names) == {}


def unknown(name, nearest):
    return f"unknown metric {name!r}; the nearest known one is {nearest!r}"


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (["ovms_request_success"], {0: unknown("ovms_request_success", "ovms_requests_success")}),
        (["ovms_streams", "ovms_streams"], {1: "'ovms_streams' is listed more than once"}),
        (
            ["ovms_stream", "ovms_responses", "ovms_infer_req_activ"],
            {0: unknown("ovms_stream", "ovms_streams"), 2: unknown("ovms_infer_req_activ", "ovms_infer_req_active")},
        ),
    ],
)
def test_every_problem_of_a_list_is_reported(names, problems):
    assert check_metrics_list(names) == problems


@pytest.mark.parametrize("name", ["", "x" * 10_000, "ovms_graph_request_latency_us"])
def test_unknown_names_are_refused_with_a_short_message(name):
    """OVMS knows ovms_graph_request_latency_us, but allows it in no list."""
    (problem,) = check_metrics_list([name]).values()
    assert len(problem) < 200
