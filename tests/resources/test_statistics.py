"""The statistics extension, through Falcon and through Triton's client."""

import threading
import time
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from fake_app import client_of
from records import timed
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from ovms_rest.resources.statistics import Statistics
from ovms_rest.shared_memory.counters import BATCH_SIZES, Counters

NOTHING = {"count": 0, "ns": 0}
COMPUTE = ("compute_input", "compute_infer", "compute_output")
TIMES = ("success", "fail", "queue", *COMPUTE, "cache_hit", "cache_miss")


class Model:
    """The resource of a neighbouring route."""

    def on_get(self, req, resp, name):
        resp.text = name


def make(*versions):
    """Return counters of these names and versions, and a client of an application that serves them."""
    counters = Counters(4)
    for name, version in versions:
        counters.of(name, version)
    paths = ("/v2/models/stats", "/v2/models/{name}/stats", "/v2/models/{name}/versions/{version}/stats")
    return counters, client_of({**dict.fromkeys(paths, Statistics(counters)), "/v2/models/{name}": Model()})


def names(answer):
    """Return the models and versions in a response."""
    assert answer.status_code == 200
    return [(model["name"], model["version"]) for model in answer.json["model_stats"]]


# --- Values


def test_unused_model_has_zeros():
    _, client = make(("m", "1"))
    assert client.simulate_get("/v2/models/m/stats").json == {
        "model_stats": [
            {
                "name": "m",
                "version": "1",
                "last_inference": 0,
                "inference_count": 0,
                "execution_count": 0,
                "inference_stats": dict.fromkeys(TIMES, NOTHING),
                "batch_stats": [],
            }
        ]
    }


def computed(count, *times):
    """Return the entries of the times before, during and after inferences."""
    return {key: {"count": count, "ns": ns} for key, ns in zip(COMPUTE, times, strict=True)}


def test_counts_are_returned():
    counters, client = make(("m", "1"))
    before = time.time_ns() // 1_000_000
    model = counters.of("m", "1")
    model.record(timed(1, 20, 300, 4000, 8))
    model.record(timed(1, 20, 300, 4000, 8))
    model.record(timed(1, 20, 300, 4000, 1))
    model.fail("invalid", 7)
    model.fail("overload", 8)
    (shown,) = client.simulate_get("/v2/models/m/stats").json["model_stats"]
    assert before <= shown.pop("last_inference") <= time.time() * 1000
    assert shown == {
        "name": "m",
        "version": "1",
        "inference_count": 17,
        "execution_count": 3,
        "inference_stats": {
            "success": {"count": 3, "ns": 12963},
            "fail": {"count": 2, "ns": 15},
            "queue": {"count": 3, "ns": 3},
            **computed(3, 60, 900, 12000),
            "cache_hit": NOTHING,
            "cache_miss": NOTHING,
        },
        "batch_stats": [
            {"batch_size": 1, **computed(1, 20, 300, 4000)},
            {"batch_size": 8, **computed(2, 40, 600, 8000)},
        ],
    }


def test_counts_compared_by_perf_analyzer_are_equal_with_many_batch_sizes():
    counters, client = make(("m", "1"))
    for size in range(BATCH_SIZES + 5):
        counters.of("m", "1").record(timed(0, 1, 1, 1, size))
    (shown,) = client.simulate_get("/v2/models/m/stats").json["model_stats"]
    assert {shown["inference_stats"][key]["count"] for key in ("success", "queue", *COMPUTE)} == {BATCH_SIZES + 5}
    assert len(shown["batch_stats"]) == BATCH_SIZES


# --- Selection of models


@pytest.mark.parametrize(
    ("path", "which"),
    [
        ("/v2/models/stats", [("a", "1"), ("a", "2"), ("b", "1")]),
        ("/v2/models/a/stats", [("a", "1"), ("a", "2")]),
        ("/v2/models/a/versions/2/stats", [("a", "2")]),
        ("/v2/models/a/versions/2/stats/", [("a", "2")]),
    ],
)
def test_path_selects_models(path, which):
    _, client = make(("a", "1"), ("a", "2"), ("b", "1"))
    assert names(client.simulate_get(path)) == which


def test_list_is_empty_without_models():
    assert make()[1].simulate_get("/v2/models/stats").json == {"model_stats": []}


@pytest.mark.parametrize("path", ["/v2/models/x/stats", "/v2/models/a/versions/3/stats"])
def test_unknown_model_or_version_is_404_with_a_reason(path):
    answer = make(("a", "1"))[1].simulate_get(path)
    assert answer.status_code == 404
    assert "has no statistics" in answer.json["error"]


def test_model_may_be_called_stats():
    """Only its metadata without a version cannot be reached, as with Triton."""
    _, client = make(("stats", "1"), ("a", "1"))
    assert names(client.simulate_get("/v2/models/stats/stats")) == [("stats", "1")]
    assert names(client.simulate_get("/v2/models/stats/versions/1/stats")) == [("stats", "1")]
    assert len(names(client.simulate_get("/v2/models/stats"))) == 2


def test_head_works_where_get_does():
    answer = make(("m", "1"))[1].simulate_head("/v2/models/stats")
    assert (answer.status_code, answer.content) == (200, b"")


# --- Triton's client


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        """Write nothing."""


@pytest.fixture
def triton():
    """Counters of one version of m and one of n, and a client that reads them."""
    counters, served = make(("m", "1"), ("n", "3"))
    with make_server("127.0.0.1", 0, served.app, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = InferenceServerClient(f"127.0.0.1:{server.server_port}")
        yield counters, client
        client.close()
        server.shutdown()
        thread.join()


def test_tritons_client_reads_the_statistics_of_all_models_and_of_one(triton):
    counters, client = triton
    counters.of("n", "3").record(timed(1, 2, 3, 4))
    everything = client.get_inference_statistics()["model_stats"]
    assert [(model["name"], model["inference_count"]) for model in everything] == [("m", 0), ("n", 1)]
    assert client.get_inference_statistics("n")["model_stats"] == [everything[1]]
    assert client.get_inference_statistics("n", "3")["model_stats"] == [everything[1]]


def test_tritons_client_raises_our_message_for_an_unknown_model(triton):
    _, client = triton
    with pytest.raises(InferenceServerException, match="model 'x' has no statistics"):
        client.get_inference_statistics("x")
