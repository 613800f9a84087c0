"""The queue of requests for inference, by priority and with timeouts (Triton's schedule policy extension).

Triton's `priority` is 1 for the first, then 2, and so on; 0, or none, comes last. Equal ones keep their order.
`timeout` is how many microseconds a request may be queued. Both cost time only when there is a choice: a request is
parsed for them when another is queued as well.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar

import orjson
import simdjson

from ovms_rest.protocol.header_length import HeaderLength
from ovms_rest.protocol.plain_bodies import holds_json
from ovms_rest.protocol.routes import is_prediction
from ovms_rest.protocol.waiting_time import waits_since

NEVER = math.inf

# Larger JSON is not parsed for its terms, which could take as long as an inference: it has the lowest priority, and its
# timeout is checked when it is decoded.
LARGEST_JSON = 2**20
# Beyond this simdjson finds the parameters without an object for everything else, which takes eight times as long.
_LONG_JSON = 2**14
_MOST_MEMBERS = 256

Environ = dict[str, Any]
T = TypeVar("T", bound=Hashable)


class Terms(NamedTuple):
    """The priority and timeout of a request, 0 for none.

    `since_ns` is when it began to wait, by the monotonic clock; it is set for requests with a timeout.
    """

    priority: int = 0
    timeout_us: int = 0
    since_ns: int = 0

    @property
    def deadline_ns(self) -> int:
        """When the timeout passes, by the monotonic clock."""
        return self.since_ns + self.timeout_us * 1000


_NO_TERMS = Terms()


class RequestQueue(Generic[T]):
    """A queue by priority; `read_terms` returns the terms of an item, and is called when there is a choice.

    `count` is the number of items. No timeout passes before `next_deadline`, in nanoseconds of the monotonic clock.
    """

    __slots__ = ("_first", "_last", "_limited", "_numbers", "_read_terms", "_unread", "count", "next_deadline")

    def __init__(self, read_terms: Callable[[T], Terms]) -> None:
        self._read_terms = read_terms
        self._unread: deque[T] = deque()  # the newest ones, whose terms have not been read
        self._last: deque[T] = deque()  # have no priority
        self._first: list[tuple[int, int, T]] = []  # a heap by priority and number
        self._numbers = itertools.count()
        self._limited: dict[T, Terms] = {}
        self.count = 0
        self.next_deadline: float = NEVER

    def push(self, item: T) -> None:
        """Add an item."""
        self._unread.append(item)
        self.count += 1

    def pop(self) -> T:
        """Remove and return the next item."""
        self.count -= 1
        if not self.count and self._unread:
            return self._unread.popleft()
        self._read()
        item = heappop(self._first)[2] if self._first else self._last.popleft()
        if self._limited:
            self._limited.pop(item, None)
        return item

    def next_priority(self) -> int:
        """Return the priority of the next item, 0 if it has none."""
        self._read()
        return self._first[0][0] if self._first else 0

    def find(self, is_wanted: Callable[[T], bool], most: int) -> list[T]:
        """Return the next items among the wanted ones, up to that many; they stay queued."""
        self._read()
        items = itertools.chain((entry[2] for entry in sorted(self._first)), self._last)
        return list(itertools.islice(filter(is_wanted, items), most))

    def remove(self, *items: T) -> None:
        """Remove items that are queued; others are ignored."""
        if self.count:
            self._drop(set(items))

    def expire(self, now_ns: int) -> list[tuple[T, Terms]]:
        """Remove and return the items whose timeout has passed; a single item is next anyway, and not looked at."""
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
        """Sort new items into the heap or the FIFO."""
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


def read_terms(environ: Environ, received_ns: int) -> Terms:
    """Return the terms of a request received whole, none for invalid ones, which are refused when it is decoded.

    Only the JSON of a body is parsed, and no compressed body. TensorFlow Serving's API knows no terms.
    """
    header: HeaderLength = environ["ovms_rest.header_length"]
    body: memoryview = environ["wsgi.input"].buffer[: None if header.text is None else header.length]
    if len(body) > LARGEST_JSON or "HTTP_CONTENT_ENCODING" in environ:
        return _NO_TERMS
    json = bytes(body)
    if b'"priority"' not in json and b'"timeout"' not in json:  # as mostly
        return _NO_TERMS
    if is_prediction(environ["PATH_INFO"]):
        return _NO_TERMS
    if header.text is None and not holds_json(body, environ.get("CONTENT_TYPE"), environ.get("HTTP_X_TENSOR_SHAPE")):
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
    """Find the parameters in a long JSON; none when keys are repeated, of which the last would count."""
    try:
        root: Any = simdjson.Parser().parse(json)
        if type(root) is not simdjson.Object or len(root) > _MOST_MEMBERS or len(set(root)) < len(root):
            return {}
        parameters = root.get("parameters")
        if type(parameters) is not simdjson.Object or len(parameters) > _MOST_MEMBERS:
            return {}
        found: dict[str, Any] = parameters.as_dict()
        return found
    except (ValueError, RuntimeError, MemoryError):  # reported when the request is decoded
        return {}


def _positive(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
