"""The queue of requests: order, timeouts, and the terms of a request."""

import gzip
import itertools
import json
import time

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_rest.protocol.header_length import read_header_length
from ovms_rest.worker.http1 import RequestBody
from ovms_rest.worker.queue import LARGEST_JSON, NEVER, RequestQueue, Terms, read_terms

# --- The queue, of items that are numbers


def queue_of(*terms):
    """Fill a queue with the numbers from 0, which have these terms; return it and the numbers whose terms were read."""
    looked_at = []

    def read(item):
        looked_at.append(item)
        return terms[item]

    queue = RequestQueue(read)
    for item in range(len(terms)):
        queue.push(item)
    return queue, looked_at


def drain(queue):
    return [queue.pop() for _ in range(queue.count)]


def of(priority):
    return Terms(priority)


def until(microseconds, priority=0):
    """Return the terms of an item that has waited since 0."""
    return Terms(priority, microseconds, 0)


def test_equal_priorities_keep_their_order():
    assert drain(queue_of(of(0), of(0), of(0))[0]) == [0, 1, 2]
    assert drain(queue_of(of(3), of(3), of(3))[0]) == [0, 1, 2]


def test_priority_1_is_first_and_none_is_last():
    queue, _ = queue_of(of(0), of(2), of(1), of(2**64 - 1), of(1), of(0), of(2))
    assert drain(queue) == [2, 4, 1, 6, 3, 0, 5]


def test_priority_of_the_next_item():
    assert queue_of(of(0), of(0))[0].next_priority() == 0
    queue, _ = queue_of(of(0), of(2), of(3))
    assert queue.next_priority() == 2
    assert queue.pop() == 1
    assert queue.next_priority() == 3


def test_later_item_of_a_higher_priority_overtakes():
    queue, _ = queue_of(of(0), of(0), of(1), of(0))
    assert queue.pop() == 2
    queue.push(2)
    assert drain(queue) == [2, 0, 1, 3]


def test_wanted_items_are_found_in_their_order_and_stay_queued():
    queue, _ = queue_of(of(0), of(2), of(1), of(0), of(1))
    assert queue.find(lambda item: item != 4, 3) == [2, 1, 0]
    assert queue.find(lambda item: False, 3) == []
    assert queue.count == 5
    queue.remove(2, 1, 9)
    assert drain(queue) == [4, 0, 3]


def test_terms_of_a_single_item_are_not_read():
    queue, looked_at = queue_of(until(1, 1), of(1))
    queue.remove(1)
    assert queue.expire(10**9) == []
    assert queue.pop() == 0
    assert looked_at == []


def test_terms_of_every_item_are_read_once():
    queue, looked_at = queue_of(*[of(0)] * 5)
    queue.expire(0)
    drain(queue)
    assert looked_at == [0, 1, 2, 3, 4]


def test_items_past_their_timeout_are_removed():
    queue, _ = queue_of(until(3), until(1, 1), of(0), until(2), until(3))
    assert queue.expire(999) == []
    assert queue.next_deadline == 1000
    assert queue.expire(2000) == [(1, until(1, 1)), (3, until(2))]
    assert (queue.count, queue.next_deadline) == (3, 3000)
    assert queue.expire(2999) == []
    assert [item for item, _ in queue.expire(3000)] == [0, 4]
    assert (drain(queue), queue.next_deadline) == ([2], NEVER)


def test_timeout_counts_from_the_begin_of_waiting():
    queue, _ = queue_of(Terms(0, 5, 7000), of(0))
    assert queue.expire(11_999) == []
    assert queue.expire(12_000) == [(0, Terms(0, 5, 7000))]


def test_last_item_expires_once_its_terms_were_read():
    queue, _ = queue_of(of(0), until(1))
    assert queue.pop() == 0
    assert queue.expire(1000) == [(1, until(1))]
    assert queue.count == 0


def test_popped_item_does_not_expire():
    queue, _ = queue_of(until(1, 1), until(2))
    assert queue.pop() == 0
    assert queue.expire(1000) == []
    assert queue.next_deadline == 2000


@pytest.mark.parametrize("item", range(4))
def test_removed_item_is_neither_popped_nor_expires(item):
    """One item of each place: read, with and without a priority, and unread."""
    queue, _ = queue_of(until(1), until(1, 1), until(1, 2), until(1))
    queue.remove(3)
    queue.expire(0)
    queue.push(3)
    queue.remove(item)
    queue.remove(item)
    assert queue.count == 3
    assert sorted(over for over, _ in queue.expire(1000)) == sorted({0, 1, 2, 3} - {item})


def test_removal_of_an_unknown_item_changes_nothing():
    queue, _ = queue_of()
    queue.remove(0)
    assert queue.count == 0
    queue, _ = queue_of(of(1), of(0))
    queue.remove(7)
    assert drain(queue) == [0, 1]


class Model:
    """A simple model of the queue: a list of its items in the order of their arrival."""

    def __init__(self):
        self.waiting = []
        self.looked_at = set()

    def look(self):
        if len(self.waiting) > 1:
            self.looked_at.update(item for item, _ in self.waiting)

    def push(self, item, terms):
        self.waiting.append((item, terms))

    def pop(self):
        self.look()
        chosen = min(self.waiting, key=lambda entry: entry[1].priority or NEVER)
        self.waiting.remove(chosen)
        return chosen[0]

    def remove(self, item):
        self.waiting = [entry for entry in self.waiting if entry[0] != item]

    def expire(self, now):
        self.look()
        over = {
            (item, terms)
            for item, terms in self.waiting
            if item in self.looked_at and terms.timeout_us and terms.deadline_ns <= now
        }
        self.waiting = [entry for entry in self.waiting if entry not in over]
        return over


TERMS = st.builds(Terms, st.integers(0, 3), st.integers(0, 5), st.integers(0, 5000))
STEPS = st.one_of(
    st.tuples(st.just("push"), TERMS),
    st.tuples(st.just("pop"), st.none()),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("expire"), st.integers(0, 3000)),
)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=40))
def test_queue_agrees_with_a_simple_model(steps):
    terms, numbers, now = {}, itertools.count(), 0
    queue, model = RequestQueue(terms.__getitem__), Model()
    for step, argument in steps:
        if step == "push":
            item = next(numbers)
            terms[item] = argument
            queue.push(item)
            model.push(item, argument)
        elif step == "remove":
            queue.remove(argument)
            model.remove(argument)
        elif step == "expire":
            now += argument
            assert set(queue.expire(now)) == model.expire(now)
            assert queue.next_deadline > now
        elif queue.count:
            assert queue.pop() == model.pop()
        assert queue.count == len(model.waiting)
    assert drain(queue) == [model.pop() for _ in range(len(model.waiting))]


# --- The terms of a request


def request(body, received=0, **fields):
    """Return the arguments of `read_terms` for a request that was received whole."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    environ = {
        "PATH_INFO": "/v2/models/m/infer",
        "wsgi.input": RequestBody(memoryview(bytearray(data))),
        "ovms_rest.header_length": read_header_length(fields.get("inference_header_content_length")),
        **{f"HTTP_{name.upper()}": value for name, value in fields.items()},
    }
    return environ, received


def test_request_of_tensorflow_serving_has_no_terms():
    environ, received = request({"instances": [1], "parameters": {"priority": 1, "timeout": 1}})
    assert read_terms(environ, received) == Terms(1, 1, received)
    assert read_terms({**environ, "PATH_INFO": "/v1/models/m:predict"}, received) == Terms()


def with_parameters(**parameters):
    return request({"inputs": [], "parameters": parameters}, 123)


def test_terms_have_priority_and_timeout():
    assert read_terms(*with_parameters(priority=3, timeout=1000)) == Terms(3, 1000, 123)
    assert read_terms(*with_parameters(priority=2**64 - 1)) == Terms(2**64 - 1)
    assert read_terms(*with_parameters(timeout=5)).deadline_ns == 5123


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": []},
        {"parameters": {}},
        {"parameters": {"priority": 0, "timeout": 0}},
        {"parameters": {"priority": -1, "timeout": -5}},
        {"parameters": {"priority": True, "timeout": False}},
        {"parameters": {"priority": "1", "timeout": "1000"}},
        {"parameters": {"priority": 1.0, "timeout": None}},
        {"parameters": ["priority"]},
        {"parameters": None, "priority": 1, "timeout": 1},
        {"inputs": [{"parameters": {"priority": 1, "timeout": 1}}]},
        {"inputs": [{"data": ["priority", "timeout"]}]},
        ["priority", "timeout"],
        b"",
        b'{"parameters": {"priority": 1',
        b'"priority"',
        b'{"parameters": {"priority": 1}}\xff',
        b"[" * 100_000 + b'"timeout"',
    ],
)
def test_missing_or_invalid_parameters_are_no_terms(body):
    """They are refused when the request is decoded."""
    assert read_terms(*request(body)) == Terms()


def test_only_the_json_of_a_binary_request_is_parsed():
    text = b'{"parameters": {"priority": 1}}'
    body = text + b"\xff" * 100
    assert read_terms(*request(body, inference_header_content_length=str(len(text)))).priority == 1
    for length in ("0", "10", "999", "x", ""):
        assert read_terms(*request(body, inference_header_content_length=length)) == Terms()
    assert read_terms(*request(text, inference_header_content_length="0")) == Terms(), "this has no JSON"


def test_raw_elements_with_a_shape_have_no_terms():
    """Their text may even be valid JSON."""
    (environ, received) = request({"parameters": {"priority": 1}}, x_tensor_shape="1")
    assert read_terms(environ, received) == Terms(1)
    assert read_terms({**environ, "CONTENT_TYPE": "application/octet-stream"}, received) == Terms()


def test_compressed_body_is_not_parsed():
    body = json.dumps({"parameters": {"priority": 1}}).encode()
    assert read_terms(*request(gzip.compress(body), content_encoding="gzip")) == Terms()
    assert read_terms(*request(body, content_encoding="gzip")) == Terms()


def test_json_is_parsed_up_to_a_size():
    text = b'{"parameters": {"priority": 1}}'
    assert read_terms(*request(text.ljust(LARGEST_JSON))).priority == 1
    assert read_terms(*request(text.ljust(LARGEST_JSON + 1))) == Terms()
    length = str(len(text))
    assert read_terms(*request(text.ljust(2 * LARGEST_JSON), inference_header_content_length=length)).priority == 1


@pytest.mark.parametrize("size", [0, 20_000, 500_000])
@pytest.mark.parametrize(
    ("text", "priority"),
    [
        ('{"parameters": {"priority": 2}, "x": [%s]}', 2),
        ('{"x": [%s], "parameters": {"a": "b", "priority": 2}}', 2),
        ('{"x": [%s], "parameters": {"priority": 2.0}}', 0),
        ('{"x": [%s], "parameters": {"priority": true}}', 0),
        ('{"x": [%s], "parameters": {"priority": 18446744073709551616}}', 0),
        ('{"x": [%s], "parameters": ["priority"]}', 0),
        ('{"x": [%s], "y": {"parameters": {"priority": 2}}}', 0),
        ('[%s, {"parameters": {"priority": 2}}]', 0),
        ('{"x": [%s], "parameters": {"priority": 2}', 0),
        ('{"x": [%s], "parameters": {"priority": 2}, "\xff": 1}', 0),
    ],
)
def test_terms_are_found_in_json_of_any_length(text, priority, size):
    body = (text % ("0, " * (size // 3) + "0")).encode("latin-1")
    assert read_terms(*request(body)).priority == priority


def test_terms_in_the_longest_json_take_less_than_half_the_time_of_parsing():
    """A turn of the worker reads the terms of all queued requests."""
    body = b'{"parameters": {"priority": 1}, "x": [' + b"{}," * (LARGEST_JSON // 3 - 20) + b"{}]}"
    assert read_terms(*request(body)).priority == 1
    assert 2 * shortest(lambda: read_terms(*request(body))) < shortest(lambda: orjson.loads(body))


def shortest(call):
    """Return the shortest duration of five calls, in seconds."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def waited_since(began_ns):
    """Return how long a request received now has waited, if a proxy received it at `began_ns` since 1970."""
    received = time.monotonic_ns()
    terms = read_terms(*request({"parameters": {"timeout": 1}}, received, x_request_start=f"t={began_ns / 1e9:.6f}"))
    return (received - terms.since_ns) / 1e9


@pytest.mark.usefixtures("new_clock")
@pytest.mark.parametrize("seconds", [0.5, 60, 3599])
def test_waiting_begins_when_the_proxy_got_the_request(seconds):
    assert waited_since(time.time_ns() - seconds * 10**9) == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("seconds", [-3600, -1, 3601, 10**9])
def test_start_in_the_future_or_long_ago_is_ignored(seconds):
    assert waited_since(time.time_ns() - seconds * 10**9) == 0


def test_invalid_start_is_ignored():
    assert read_terms(*request({"parameters": {"timeout": 1}}, 7, x_request_start="yesterday")).since_ns == 7
