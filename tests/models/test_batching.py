"""Batches of parked requests: gathering, splitting, and failures, without a worker."""

import contextlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_rest.errors import DeadlineError, InvalidRequestError, LoadError
from ovms_rest.models import batching
from ovms_rest.models.batching import MAX_BATCH_BYTES, Batching, Parking
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.context import TraceContext, trace_headers, within

ANY = Dim(0, None)


@pytest.fixture(autouse=True)
def parking(monkeypatch):
    """Return a parking of this test's own, which the test runs."""
    parking = Parking()
    parking.begin()
    monkeypatch.setattr(batching, "parking", parking)
    return parking


class Doubling:
    """A model: y is twice x, of shape [batch, n], and s is t, strings of shape [batch]; negative values are refused."""

    def __init__(self, limit=4, uneven=False):
        inputs = {"x": TensorMetadata("x", "FP32", (ANY, ANY))}
        self.shapes = []
        self.uneven = uneven
        self.batching = Batching(ModelMetadata("m", "1", inputs, {}), limit, self.infer)

    def infer(self, arrays):
        self.shapes.append(arrays["x"].shape)
        if (arrays["x"] < 0).any():
            raise InvalidRequestError("negative")
        tensors = {"y": Tensor("y", "FP32", arrays["x"] * 2)}
        if self.uneven:
            tensors["y"] = Tensor("y", "FP32", np.float32([arrays["x"].sum()]))
        if "t" in arrays:
            tensors["s"] = Tensor("s", "BYTES", arrays["t"])
        return tensors


def rows(*values):
    return {"x": np.float32(values)}


def run(parking, model, *requests):
    """Run requests, and batches until none is parked; return what each got, and its record."""
    results = [None] * len(requests)
    records = [InferenceRecord(0) for _ in requests]

    def request(index):
        try:
            tensors = model.batching.infer(requests[index], records[index])
            results[index] = {name: tensor.array for name, tensor in tensors.items()}
        except Exception as error:
            results[index] = error

    for index in range(len(requests)):
        parking.run(request, index)
    while parking.members:
        parking.infer_next()
    return results, records


def test_records_of_a_batch_have_its_begin_and_all_of_its_rows(parking):
    before = time.monotonic_ns()
    _, records = run(parking, Doubling(), rows([1, 2]), rows([3, 4], [5, 6]))
    assert [record.batch_rows for record in records] == [3, 3]
    assert before < records[0].began_ns == records[1].began_ns < time.monotonic_ns()


def test_request_of_a_failed_batch_is_inferred_within_its_own_trace(parking):
    model, found = Doubling(), []
    model.batching._infer = lambda arrays: found.append(trace_headers()) or model.infer(arrays)

    def request(number):
        with within(TraceContext("1" * 32, f"{number:016x}", 1)), contextlib.suppress(InvalidRequestError):
            model.batching.infer(rows([-number]), InferenceRecord(0))

    for number in (1, 2):
        parking.run(request, number)
    parking.infer_next()
    assert found == [{}, *({"traceparent": f"00-{'1' * 32}-{number:016x}-01"} for number in (1, 2))]


def test_parked_requests_are_inferred_together_and_get_their_own_rows(parking):
    model = Doubling()
    results, records = run(parking, model, rows([1, 2]), rows([3, 4], [5, 6]), rows([7, 8]))
    assert model.shapes == [(4, 2)]
    assert [result["y"].tolist() for result in results] == [[[2, 4]], [[6, 8], [10, 12]], [[14, 16]]]
    assert [(record.executed_rows, record.is_follower) for record in records] == [(4, False), (0, True), (0, True)]


def test_batch_has_at_most_the_limit_of_rows_and_takes_the_oldest_that_fit(parking):
    model = Doubling(limit=4)
    three, two, one = rows([1], [1], [1]), rows([2], [2]), rows([3])
    results, records = run(parking, model, three, two, one)
    assert model.shapes == [(4, 1), (2, 1)]
    assert [result["y"].tolist() for result in results] == [[[2]] * 3, [[4]] * 2, [[6]]]
    assert [record.executed_rows for record in records] == [4, 2, 0]


def test_only_equal_dims_go_together(parking):
    model = Doubling()
    results, _ = run(parking, model, rows([1]), rows([1, 2]), rows([3]))
    assert model.shapes == [(2, 1), (1, 2)]
    assert [result["y"].tolist() for result in results] == [[[2]], [[2, 4]], [[6]]]


def test_the_oldest_of_the_highest_priority_is_inferred_next(parking):
    """Priority 1 is first, none is last; those of any priority fill up its batch."""
    model = Doubling()
    first = [(rows([1]), 0), (rows([1, 2]), 3), (rows([1, 2, 3]), 1), (rows([4, 5]), 0), (rows([6, 7]), 3)]

    def request(arrays, priority):
        model.batching.infer(arrays, InferenceRecord(0, priority=priority))

    for arrays, priority in first:
        parking.run(request, arrays, priority)
    assert [parking.is_first(priority) for priority in (0, 3, 1)] == [True] * 3
    parking.infer_next()
    assert [parking.is_first(priority) for priority in (0, 3, 1)] == [True, True, False]
    parking.infer_next()
    assert [parking.is_first(priority) for priority in (0, 3, 1)] == [True, False, False]
    parking.infer_next()
    assert model.shapes == [(1, 3), (3, 2), (1, 1)]
    assert not parking.is_first(0)


def test_models_are_not_mixed(parking):
    one, other = Doubling(), Doubling()
    run(parking, one, rows([1]))

    def request(model):
        model.batching.infer(rows([1]), None)

    for model in (one, other, one):
        parking.run(request, model)
    parking.infer_next()
    assert (one.shapes, other.shapes) == ([(1, 1), (2, 1)], [])
    parking.infer_next()
    assert other.shapes == [(1, 1)]


def test_only_the_request_at_fault_fails(parking):
    model = Doubling()
    results, records = run(parking, model, rows([1]), rows([-1]), rows([3]))
    assert model.shapes == [(3, 1), (1, 1), (1, 1), (1, 1)]
    assert results[0]["y"] == [[2]]
    assert results[2]["y"] == [[6]]
    with pytest.raises(InvalidRequestError, match="negative"):
        raise results[1]
    assert [record.executed_rows for record in records] == [1, 1, 1]


def test_requests_of_a_model_that_mixes_rows_are_inferred_one_by_one(parking, caplog):
    model = Doubling(uneven=True)
    for _ in range(2):
        results, _ = run(parking, model, rows([1]), rows([2]))
        assert [result["y"].tolist() for result in results] == [[1], [2]]
    (record,) = [item for item in caplog.records if item.levelname == "WARNING"]
    assert "cannot infer batches" in record.getMessage()
    assert "output 'y' has the shape [1] for 2 rows" in record.getMessage()


def test_strings_are_gathered_and_split(parking):
    inputs = [
        {"x": np.float32([[1]]), "t": BytesArray.of([b"a"], (1,))},
        {"x": np.float32([[2], [3]]), "t": BytesArray.of([b"", b"bcd"], (2,))},
        {"x": np.float32([[4]]), "t": BytesArray(np.int32([2]), np.int32([4]), np.frombuffer(b"xxef\0", np.uint8))},
    ]
    results, _ = run(parking, Doubling(), *inputs)
    assert [result["s"].elements() for result in results] == [[b"a"], [b"", b"bcd"], [b"ef"]]


def test_request_with_too_many_rows_is_rejected():
    with pytest.raises(InvalidRequestError) as caught:
        Doubling(limit=2).batching.infer(rows([1], [2], [3]), None)
    assert str(caught.value) == ("the request has 3 rows, at most 2 are allowed, max_batch_size of model 'm' version 1")


def test_inputs_with_different_numbers_of_rows_are_rejected():
    with pytest.raises(InvalidRequestError, match="got rows: 1 of 'x', 2 of 'z'"):
        Doubling().batching.infer({**rows([1]), "z": np.float32([[1], [2]])}, None)


def test_request_outside_of_a_worker_is_inferred_immediately():
    model = Doubling()
    assert model.batching.infer(rows([1]), None)["y"].array == [[2]]


def test_request_without_rows_is_inferred_alone_in_its_turn(parking):
    """Not while others have outputs that they have not read yet."""
    model, empty = Doubling(), {"x": np.zeros((0, 1), np.float32)}
    results, records = run(parking, model, rows([1]), empty, rows([2]), empty)
    assert model.shapes == [(2, 1), (0, 1), (0, 1)]
    assert [result["y"].tolist() for result in results] == [[[2]], [], [[4]], []]
    assert [record.is_follower for record in records] == [False, False, True, False]


def test_bytes_of_a_batch_are_limited(parking, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BATCH_BYTES", 32)
    model = Doubling(limit=100)
    results, _ = run(parking, model, *(rows([value] * 4) for value in range(3)), rows([1] * 4, *[[2] * 4] * 4))
    assert model.shapes == [(2, 4), (1, 4), (5, 4)]
    assert results[3]["y"].sum() == 2 * 4 * (1 + 2 * 4)
    parking.run(model.batching.infer, rows([1] * 8), None)
    assert not parking.is_full()
    parking.run(model.batching.infer, rows([1] * 8), None)
    assert parking.is_full()
    parking.infer_next()
    assert not parking.is_full()
    assert MAX_BATCH_BYTES == 2**26


def test_request_whose_timeout_passes_while_it_is_parked_is_not_inferred(parking):
    model, errors = Doubling(), []
    late = InferenceRecord(0, timeout_us=50, waiting_since_ns=time.monotonic_ns() - 60_000)
    patient = InferenceRecord(0, timeout_us=10**9, waiting_since_ns=time.monotonic_ns())

    def request(record):
        try:
            model.batching.infer(rows([1]), record)
        except DeadlineError as error:
            errors.append(error)

    for record in (late, patient, InferenceRecord(0)):
        parking.run(request, record)
    parking.infer_next()
    assert model.shapes == [(2, 1)]
    assert [error.waited_ns >= 60_000 for error in errors] == [True]
    parking.run(request, late)
    parking.infer_next()
    assert (len(errors), model.shapes, parking.is_full()) == (2, [(2, 1)], False)


def test_request_may_park_again(parking):
    """As one for a pipeline does at each of its nodes."""
    model, results = Doubling(), []

    def request(value):
        once = model.batching.infer(rows([value]), None)["y"].array.copy()
        results.append(model.batching.infer({"x": once}, None)["y"].array.tolist())

    for value in (1, 2):
        parking.run(request, value)
    while parking.members:
        parking.infer_next()
    assert results == [[[4]], [[8]]]
    assert model.shapes == [(2, 1), (2, 1)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=12), st.integers(1, 6))
def test_any_requests_get_the_rows_that_they_would_get_alone(shapes, limit):
    parking = batching.parking
    limit = max(limit, *(count for count, _ in shapes), 1)
    model, generator = Doubling(limit), np.random.default_rng(0)
    requests = [{"x": generator.random(shape, np.float32)} for shape in shapes]
    results, records = run(parking, model, *requests)
    for request, result in zip(requests, results, strict=True):
        assert (result["y"] == request["x"] * 2).all()
    assert all(shape[0] <= limit for shape in model.shapes)
    assert sum(shape[0] for shape in model.shapes) == sum(count for count, _ in shapes)
    assert sum(record.executed_rows for record in records) == sum(count for count, _ in shapes)


@pytest.mark.parametrize(
    ("dims", "is_allowed"),
    [
        ((ANY, Dim(3, 3)), True),
        ((Dim(1, 8),), True),
        ((Dim(1, 7),), False),
        ((Dim(2, None),), False),
        ((Dim(8, 8),), False),
        ((Dim(1, 1), Dim(3, 3)), False),
        ((), False),
    ],
)
@pytest.mark.parametrize("where", ["input", "output"])
def test_first_dim_has_to_allow_every_batch(dims, is_allowed, where):
    good, tensor = TensorMetadata("g", "FP32", (ANY,)), TensorMetadata("t", "FP32", dims)
    inputs, outputs = ({"t": tensor}, {"g": good}) if where == "input" else ({"g": good}, {"t": tensor})
    metadata = ModelMetadata("m", "1", inputs, outputs)
    if is_allowed:
        assert Batching(metadata, 8, lambda arrays: {}).limit == 8
        return
    with pytest.raises(LoadError, match=rf"max_batch_size: {where} 't' has the shape .* cannot be 1 to 8 rows"):
        Batching(metadata, 8, lambda arrays: {})


def test_output_of_unknown_rank_is_allowed():
    metadata = ModelMetadata(
        "m", "1", {"g": TensorMetadata("g", "FP32", (ANY,))}, {"t": TensorMetadata("t", "FP32", None)}
    )
    assert Batching(metadata, 8, lambda arrays: {}).limit == 8
