"""Counters of models, written by processes independently of each other."""

import itertools
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forking import fork, join
from hypothesis import given
from hypothesis import strategies as st
from records import timed

from ovms_rest.errors import NotFoundError
from ovms_rest.shared_memory.counters import BATCH_SIZES, Counters
from ovms_rest.shared_memory.statistics import BOUNDS, FAILURE_KINDS, BatchStatistics, Duration, Outcomes


@pytest.fixture
def counters():
    return Counters(8)


@pytest.fixture
def model(counters):
    """The counters of version 1 of model m."""
    return counters.of("m", "1")


def only_bucket(*record):
    """Return the bucket of the time of a request, which is the only one counted."""
    model = Counters(1).of("m", "1")
    model.record(timed(*record))
    return bucket_of(model.read().request_time)


def bucket_of(histogram):
    """Return the only bucket that is not empty."""
    (bucket,) = (index for index, count in enumerate(histogram.buckets) if count)
    return bucket


# --- What is counted


def test_new_counters_are_zero(model):
    seen = model.read()
    assert (seen.name, seen.version, seen.last_inference_ms, seen.inference_count) == ("m", "1", 0, 0)
    assert seen.success == seen.queue == seen.compute_infer == seen.fail == Duration(0, 0)
    assert seen.batches == []
    assert (seen.active, seen.request_bytes, seen.response_bytes) == (0, 0, 0)
    assert set(seen.request_time.buckets) == {0}


def test_inference_is_counted_with_its_durations(model):
    model.record(timed(1, 20, 300, 4000))
    model.record(timed(1, 20, 300, 4000))
    seen = model.read()
    assert seen.success == Duration(2, 2 * 4321)
    assert seen.queue == Duration(2, 2)
    assert seen.compute_input == Duration(2, 40)
    assert seen.compute_infer == Duration(2, 600)
    assert seen.compute_output == Duration(2, 8000)
    assert (seen.request_time.sum, seen.inference_time.sum, seen.queue_time.sum) == (2 * 4321, 600, 2)


def test_request_that_another_one_accounts_for_is_no_execution(model):
    """Three requests, of 2, 1 and 1 rows, are inferred together."""
    for batch, rows in ((2, 4), (1, 0), (1, 0)):
        record = timed(1, 20, 300, 4000, batch)
        record.executed_rows, record.is_follower = rows, not rows
        model.record(record)
    seen = model.read()
    assert (seen.inference_count, seen.execution_count, seen.success.count) == (4, 1, 3)
    assert seen.compute_infer == Duration(3, 900)
    assert seen.batches == [BatchStatistics(4, 1, 20, 300, 4000)]
    assert (sum(seen.batch_size.buckets), seen.batch_size.sum) == (1, 4)


def test_several_inferences_are_in_progress_until_each_ends(model):
    for _ in range(3):
        model.begin()
    model.record(timed())
    assert model.read().active == 2
    model.refuse("canceled", 5)
    assert model.read().active == 2
    model.fail("failed", 0)
    model.fail("failed", 0)
    assert model.read().active == 0
    model.record(timed())
    assert model.read().active == 0


def test_inference_count_is_the_sum_of_the_batch_sizes(model):
    for batch in (1, 8, 0):
        model.record(timed(0, 0, 0, 0, batch))
    seen = model.read()
    assert (seen.inference_count, seen.success.count) == (9, 3)


def test_bytes_of_successful_inferences_are_counted(model):
    model.record(timed(0, 0, 0, 0, 1, 100, 20))
    model.record(timed(0, 0, 0, 0, 1, 3, 4))
    seen = model.read()
    assert (seen.request_bytes, seen.response_bytes) == (103, 24)


def test_failures_are_counted_by_kind(model):
    for number, kind in enumerate(FAILURE_KINDS, 1):
        for _ in range(number):
            model.fail(kind, 10**number)
    seen = model.read()
    assert seen.failures == {
        "invalid": Duration(1, 10),
        "failed": Duration(2, 200),
        "overload": Duration(3, 3000),
        "timeout": Duration(4, 40000),
        "canceled": Duration(5, 500000),
        "crashed": Duration(6, 6000000),
    }
    assert seen.fail == Duration(21, 6543210)
    assert seen.success.count == 0


def test_inferences_are_counted_by_api(model):
    for api, successes in (("KServe", 3), ("TensorFlowServing", 2)):
        for _ in range(successes):
            model.record(replace(timed(), api=api))
    model.fail("failed", 1)
    model.fail("invalid", 1, "TensorFlowServing")
    model.refuse("overload", 1, "TensorFlowServing")
    seen = model.read()
    assert seen.apis == {"KServe": Outcomes(3, 1), "TensorFlowServing": Outcomes(2, 2)}
    assert (seen.success.count, seen.fail.count) == (5, 3)


def test_requests_for_metadata_and_readiness_are_counted_separately(model):
    model.answer("ModelMetadata")
    model.answer("ModelReady")
    model.answer("ModelReady")
    model.answer("GetModelStatus")
    assert model.read().questions == {
        "ModelMetadata": 1,
        "ModelReady": 2,
        "GetModelMetadata": 0,
        "GetModelStatus": 1,
    }


def test_last_inference_is_the_latest_of_all_workers(counters, model):
    before = time.time_ns() // 1_000_000
    model.record(timed())
    first = model.read().last_inference_ms
    counters.claim(1)
    time.sleep(0.01)
    model.record(timed())
    assert before <= first < model.read().last_inference_ms <= time.time() * 1000


@pytest.mark.parametrize("end", [lambda model: model.record(timed()), lambda model: model.fail("failed", 0)])
def test_inference_is_active_until_it_is_counted(end, counters, model):
    model.begin()
    counters.claim(1)
    model.begin()
    assert model.read().active == 2
    end(model)
    assert model.read().active == 1


# --- Batch sizes


def test_batch_sizes_are_listed_separately_in_ascending_order(model):
    for batch in (8, 1, 8):
        model.record(timed(9, 1, 2, 3, batch))
    assert model.read().batches == [BatchStatistics(1, 1, 1, 2, 3), BatchStatistics(8, 2, 2, 4, 6)]


def test_batch_sizes_are_summed_over_workers_whatever_their_order(counters, model):
    for slot, sizes in enumerate([(1, 2), (2, 1), (2,)]):
        counters.claim(slot)
        for size in sizes:
            model.record(timed(0, 1, 1, 1, size))
    assert model.read().batches == [BatchStatistics(1, 2, 2, 2, 2), BatchStatistics(2, 3, 3, 3, 3)]


def test_batch_sizes_without_room_are_in_the_totals_alone(model):
    sizes = range(1, BATCH_SIZES + 10)
    for size in (*sizes, *sizes, 0):
        model.record(timed(0, 1, 2, 3, size))
    seen = model.read()
    assert [(batch.batch_size, batch.count) for batch in seen.batches] == [(size, 2) for size in sizes[:BATCH_SIZES]]
    assert seen.compute_infer == Duration(2 * len(sizes) + 1, 2 * (2 * len(sizes) + 1))
    assert seen.inference_count == 2 * sum(sizes)


def test_successor_adds_to_the_batch_sizes_of_its_slot(counters, model):
    sizes = range(1, BATCH_SIZES + 1)
    for order in (sizes, reversed(sizes)):
        counters.claim(3)
        for size in order:
            model.record(timed(0, size, 0, 0, size))
    seen = [(batch.batch_size, batch.count, batch.input_ns) for batch in model.read().batches]
    assert seen == [(size, 2, 2 * size) for size in sizes]


# --- Buckets


@pytest.mark.parametrize(("index", "bound"), list(enumerate(BOUNDS)))
def test_bound_belongs_to_the_bucket_below(index, bound):
    assert only_bucket(0, bound * 1000, 0, 0) == index
    assert only_bucket(0, bound * 1000 + 1, 0, 0) == index + 1


def test_duration_of_zero_falls_into_the_first_bucket(model):
    model.record(timed())
    seen = model.read()
    assert [bucket_of(times) for times in (seen.request_time, seen.inference_time, seen.queue_time)] == [0, 0, 0]


def test_each_histogram_counts_its_own_duration(model):
    model.record(timed(17_000, 10_000, 31_000, 40_000))
    seen = model.read()
    assert [bucket_of(times) for times in (seen.request_time, seen.inference_time, seen.queue_time)] == [4, 2, 1]


# --- Processes


def test_sums_of_workers_that_count_concurrently_are_exact(counters, model):
    def work(slot):
        counters.claim(slot)
        for number in range(20_000):
            model.record(timed(1, 2, 3, 4, slot, 5, 6))
            if number % 4 == 0:
                model.fail("overload", 7)

    join(*(fork(lambda slot=slot: work(slot)) for slot in range(1, 5)))
    seen = model.read()
    assert seen.success == Duration(80_000, 800_000)
    assert seen.failures["overload"] == Duration(20_000, 140_000)
    assert seen.inference_count == 20_000 * (1 + 2 + 3 + 4)
    assert (seen.request_bytes, seen.response_bytes) == (480_000 - 80_000, 480_000)
    assert seen.request_time.buckets[0] == 80_000
    assert [batch.count for batch in seen.batches] == [20_000] * 4


def test_totals_never_fall_while_workers_count(counters, model):
    def work(slot):
        signal.alarm(60)
        counters.claim(slot)
        while True:
            model.record(timed(2**33, 2**32 - 1, 2**32 - 1, 1))

    pids = [fork(lambda slot=slot: work(slot)) for slot in (1, 2)]
    seen = [model.read()]
    while len({model.success.count for model in seen}) < 200:
        seen.append(model.read())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for before, after in itertools.pairwise([*seen, model.read()]):
        assert before.success.count <= after.success.count
        assert before.success.ns <= after.success.ns
        assert before.queue.ns <= after.queue.ns
        assert all(map(int.__le__, before.request_time.buckets, after.request_time.buckets))


def test_counts_of_a_killed_worker_stay(counters, model):
    reader, writer = os.pipe()

    def work():
        counters.claim(2)
        for _ in range(1000):
            model.record(timed(0, 0, 5, 0))
        model.begin()
        os.write(writer, b"!")
        signal.pause()

    pid = fork(work)
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert model.read().active == 1, "it was killed at an inference"
    counters.release(2)
    counters.count_crash(model.name, model.version, 2)
    counters.count_crash("unloaded", "1", 2)
    seen = model.read()
    assert (seen.compute_infer, seen.active, seen.crashes) == (Duration(1000, 5000), 0, 1)


def test_successor_in_a_slot_adds_to_its_counts(counters, model):
    def work():
        counters.claim(2)
        for _ in range(10):
            model.record(timed(1, 1, 1, 1))
            model.fail("failed", 1)

    for _ in range(3):
        join(fork(work))
    seen = model.read()
    assert (seen.success, seen.fail) == (Duration(30, 120), Duration(30, 30))


def test_successor_in_a_slot_is_not_active_with_the_inference_of_its_predecessor(counters, model):
    join(fork(lambda: (counters.claim(2), model.begin())))
    assert model.read().active == 1
    join(fork(lambda: counters.claim(2)))
    assert model.read().active == 0


def test_one_worker_does_not_touch_the_row_of_another():
    counters = Counters(3)
    model = counters.of("m", "1")
    for slot in (1, 0, 2):
        counters.claim(slot)
        for size in range(1, BATCH_SIZES + 2):
            model.record(timed(10, 2**50, 30, 40, size, 50, 60))
        model.begin()
    seen = model.read()
    count = 3 * (BATCH_SIZES + 1)
    assert (seen.active, seen.compute_output) == (3, Duration(count, 40 * count))
    assert seen.request_time.buckets[-1] == count
    assert (seen.request_bytes, seen.response_bytes, seen.fail) == (50 * count, 60 * count, Duration(0, 0))


def test_process_that_claims_no_slot_counts_too(model):
    model.record(timed())
    assert model.read().success.count == 1


def test_workers_in_the_last_slots_are_read_when_those_before_are_free():
    counters = Counters(4096)
    model = counters.of("m", "1")
    join(fork(lambda: (counters.claim(4095), model.record(timed()))))
    assert model.read().success.count == 1


def test_models_that_are_loaded_later_are_counted_by_the_slot_that_was_claimed(counters, model):
    counters.claim(1)
    later = counters.of("later", "1")
    later.begin()
    counters.claim(0)
    assert later.read().active == 1, "which slot 0 has nothing to do with"
    assert model.read().active == 0


def test_counters_of_removed_models_are_dropped(counters, model):
    counters.of("later", "1").record(timed())
    counters.keep({("later", "1"), ("never", "1")})
    assert [item.name for item in counters.statistics()] == ["later"]
    assert counters.of("later", "1").read().success.count == 1
    assert counters.of(model.name, model.version) is not model


def resident_shared_kilobytes():
    """Return the size of the anonymous shared maps of this process, which have this name."""
    maps = re.findall(r" /dev/zero \(deleted\)\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, maps))


def test_unused_slots_take_no_memory():
    counters = Counters(4096)
    counters.claim(1)
    counters.of("m", "1").record(timed())
    before = resident_shared_kilobytes()
    for name in map(str, range(10)):
        counters.of(name, "1").record(timed())
    counters.statistics()
    assert 40 <= resident_shared_kilobytes() - before <= 80, "a page or two for each, of 6.5 MB"


# --- Models


def test_version_always_has_the_same_counters(counters, model):
    model.record(timed())
    assert counters.of("m", "1") is model
    assert counters.of("m", "2").read().success.count == 0
    assert counters.of("n", "1").read().success.count == 0


def test_statistics_select_a_version_a_model_or_all(counters, model):
    for name, version in [("m", "2"), ("n", "1")]:
        counters.of(name, version)

    def names(*which):
        return [(model.name, model.version) for model in counters.statistics(*which)]

    assert names() == [("m", "1"), ("m", "2"), ("n", "1")]
    assert names("m") == [("m", "1"), ("m", "2")]
    assert names("m", "2") == [("m", "2")]


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [("x", None, "model 'x'"), ("x", "1", "version '1' of model 'x'"), ("m", "01", "version '01' of model 'm'")],
)
def test_model_that_was_never_loaded_has_no_statistics(name, version, message, counters, model):
    with pytest.raises(NotFoundError, match=f"^{message} has no statistics"):
        counters.statistics(name, version)


def test_statistics_without_models_are_empty():
    assert Counters(1).statistics() == []


# --- Against a model of it

DURATIONS = st.integers(0, 2**42)
RECORDS = st.lists(st.tuples(st.integers(0, 2), DURATIONS, DURATIONS, DURATIONS, DURATIONS, st.integers(0, 30)))


@given(RECORDS)
def test_sums_equal_the_written_counts(records):
    counters = Counters(3)
    model = counters.of("m", "1")
    for slot, *record in records:
        counters.claim(slot)
        model.record(timed(*record))
    seen = model.read()
    queue, input_, infer, output, batch = (sum(record[column] for record in records) for column in range(1, 6))
    assert seen.success == Duration(len(records), queue + input_ + infer + output)
    assert (seen.queue.ns, seen.compute_input.ns, seen.compute_infer.ns) == (queue, input_, infer)
    assert (seen.compute_output.ns, seen.inference_count) == (output, batch)
    for histogram, times in [
        (seen.request_time, [sum(record[1:5]) for record in records]),
        (seen.inference_time, [record[3] for record in records]),
        (seen.queue_time, [record[1] for record in records]),
    ]:
        below = [sum(ns <= bound * 1000 for ns in times) for bound in BOUNDS]
        assert list(itertools.accumulate(histogram.buckets)) == [*below, len(records)]
