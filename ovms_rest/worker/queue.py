"""The requests that wait for their inference: who is next, and whose time is over (Triton's schedule policy).

Triton's `priority` is 1 for the first, then 2, and so on; 0, or none, comes last. Equals come in their order. `timeout`
is how many microseconds a request may wait for its start. Who asks for neither pays for neither: a request is looked at
when another waits as well.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar

import orjson
import simdjson

from ovms_rest.protocol.waiting_time import waits_since

NEVER = math.inf

# JSON that is larger is not looked into, which could take as long as an inference; its priority is the last. Its
# timeout is found when its turn comes.
LARGEST_JSON = 2**20
# Beyond this simdjson finds the parameters without an object for everything else, which takes eight times as long.
_LONG_JSON = 2**14
_MOST_MEMBERS = 256

Environ = dict[str, Any]
T = TypeVar("T", bound=Hashable)


class Terms(NamedTuple):
    """What a request says of its waiting; 0 is for no priority and no timeout.

    `since_ns` is when it began to wait, by the monotonic clock; it is there for who has a timeout.
    """

    priority: int = 0
    timeout_us: int = 0
    since_ns: int = 0

    @property
    def deadline_ns(self) -> int:
        """When its time is over, by the monotonic clock."""
        return self.since_ns + self.timeout_us * 1000


_NO_TERMS = Terms()


class RequestQueue(Generic[T]):
    """A queue by priority; `read_terms` tells the terms of an item, and is asked when there is a choice.

    `count` is how many wait. Before `next_deadline`, by the monotonic clock in nanoseconds, nobody's time is over.
    """

    __slots__ = ("_first", "_last", "_limited", "_numbers", "_read_terms", "_unread", "count", "next_deadline")

    def __init__(self, read_terms: Callable[[T], Terms]) -> None:
        """Begin with none."""
        self._read_terms = read_terms
        self._unread: deque[T] = deque()  # came last, and nobody knows their terms
        self._last: deque[T] = deque()  # have no priority
        self._first: list[tuple[int, int, T]] = []  # a heap by priority and number
        self._numbers = itertools.count()
        self._limited: dict[T, Terms] = {}
        self.count = 0
        self.next_deadline: float = NEVER

    def push(self, item: T) -> None:
        """Let an item wait."""
        self._unread.append(item)
        self.count += 1

    def pop(self) -> T:
        """Take the one whose turn it is."""
        self.count -= 1
        if not self.count and self._unread:
            return self._unread.popleft()
        self._read()
        item = heappop(self._first)[2] if self._first else self._last.popleft()
        if self._limited:
            self._limited.pop(item, None)
        return item

    def remove(self, item: T) -> None:
        """Take out one that waits no longer, if it is there."""
        if self.count:
            self._drop((item,))

    def expire(self, now_ns: int) -> list[tuple[T, Terms]]:
        """Take out those whose time is over; one that waits alone has its turn anyway, and is not looked at."""
        if self.count > 1:
            self._read()
        if now_ns < self.next_deadline:
            return []
        over = [(item, terms) for item, terms in self._limited.items() if terms.deadline_ns <= now_ns]
        if over:
            self._drop({item for item, _ in over})
        self.next_deadline = min((terms.deadline_ns for terms in self._limited.values()), default=NEVER)
        return over

    def _read(self) -> None:
        """Put where they belong those of whom it is not known."""
        while self._unread:
            item = self._unread.popleft()
            terms = self._read_terms(item)
            if terms.priority:
                heappush(self._first, (terms.priority, next(self._numbers), item))
            else:
                self._last.append(item)
            if terms.timeout_us:
                self._limited[item] = terms
                self.next_deadline = min(self.next_deadline, terms.deadline_ns)

    def _drop(self, items: Collection[T]) -> None:
        self._unread = deque(item for item in self._unread if item not in items)
        self._last = deque(item for item in self._last if item not in items)
        self._first = [entry for entry in self._first if entry[2] not in items]
        heapify(self._first)
        for item in items:
            self._limited.pop(item, None)
        self.count = len(self._unread) + len(self._last) + len(self._first)


def read_terms(environ: Environ, tensors_begin: int | None, received_ns: int) -> Terms:
    """Return the terms of a request received whole, none for invalid ones, which are refused when it is decoded.

    `tensors_begin` is the size of the JSON in its body, None for all of it. A compressed body is not looked into.
    """
    body: memoryview = environ["wsgi.input"].buffer[:tensors_begin]
    if len(body) > LARGEST_JSON or "HTTP_CONTENT_ENCODING" in environ:
        return _NO_TERMS
    json = bytes(body)
    if b'"priority"' not in json and b'"timeout"' not in json:
        return _NO_TERMS
    parameters = _read_parameters(json)
    timeout = _positive(parameters.get("timeout"))
    since_ns = waits_since(environ, received_ns) if timeout else 0
    return Terms(_positive(parameters.get("priority")), timeout, since_ns)


def _read_parameters(json: bytes) -> dict[str, Any]:
    if len(json) > _LONG_JSON:
        return _find_parameters(json)
    try:
        root = orjson.loads(json)
    except orjson.JSONDecodeError:
        return {}
    parameters = root.get("parameters") if isinstance(root, dict) else None
    return parameters if isinstance(parameters, dict) else {}


def _find_parameters(json: bytes) -> dict[str, Any]:
    """Find the parameters in a long JSON; where keys are repeated, of which the last counts, none are found."""
    try:
        root: Any = simdjson.Parser().parse(json)
        if type(root) is not simdjson.Object or len(root) > _MOST_MEMBERS or len(set(root)) < len(root):
            return {}
        parameters = root.get("parameters")
        if type(parameters) is not simdjson.Object or len(parameters) > _MOST_MEMBERS:
            return {}
        found: dict[str, Any] = parameters.as_dict()
        return found
    except (ValueError, RuntimeError, MemoryError):  # what is wrong with it the answer tells
        return {}


def _positive(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
