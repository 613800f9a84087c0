"""The requests with which workers died, in shared memory: the arbiter adds them, workers look them up.

A worker marks an entry, by one byte beside it, when its request or inputs have run without harm.

The table has a fixed size, and new entries replace the oldest. While no model has crashed lately, which is nearly
always, a worker reads one number of it per request.
"""

import mmap
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

import orjson

# A request that comes again with its id comes soon: proxies and clients repeat at once or within seconds. A client that
# gives all its requests one id is let through after that.
REQUEST_SECONDS: Final = 60
# The inputs of a crash are refused, and the model's requests compared with them, for this long.
INPUTS_SECONDS: Final = 600
# A model that crashes this many workers within this time is paused for the same time, so that workers live for other
# models: a new worker takes some tenths of a second.
PAUSING_CRASHES: Final = 5
PAUSE_SECONDS: Final = 10

# The entries of those at fault, and those of all others, so that many suspects replace no guilty one. Ten crashes per
# second, of a request and its inputs each, fill either in 25 seconds.
ENTRIES: Final = 512
_ENTRY_BYTES: Final = 1024
# The numbers before the entries: odd while the arbiter writes, and another one after each change; when the last model
# ceases to be watched (monotonic nanoseconds); how many entries of each kind there have been.
_VERSION, _UNTIL, _GUILTY, _OTHERS = range(4)
_HEAD_BYTES: Final = 64


class Verdict(StrEnum):
    """What is known of a request, or of inputs, with which a worker died."""

    GUILTY = "guilty"  # crashed it, or was alone in two workers that were killed
    SUSPECT = "suspect"  # was in a batch that crashed
    KILLED = "killed"  # was in a worker that something killed, perhaps for what the request did


class Crash(NamedTuple):
    """An entry; `key` is that of `key_of_request` or `key_of_inputs`, times are monotonic nanoseconds."""

    key: str
    verdict: Verdict
    model: str  # name/version
    request_id: str
    cause: str
    at_ns: int
    until_ns: int
    number: int = 0  # of the entry among those of its kind, which the table sets


class Crashes(NamedTuple):
    """The entries by key, and until when each model, as name/version, is watched, and paused."""

    by_key: dict[str, Crash]
    watched: dict[str, int]
    paused: dict[str, int]


def key_of_request(model: str, request: str) -> str:
    """Return the key of a request, described by its id and the length of its body, for a model."""
    return f"{model}\0{request}"


def key_of_inputs(digest: bytes) -> str:
    """Return the key of inputs for a model, which their digest includes."""
    return digest.hex()


class CrashTable:
    """The table; made in the arbiter before it forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD_BYTES + 2 * ENTRIES * _ENTRY_BYTES)
        self._numbers = memoryview(self._memory)[:_HEAD_BYTES].cast("Q")
        # One byte for each entry that is not guilty: 1 once a worker has run its request or inputs without dying.
        self._acquitted = memoryview(mmap.mmap(-1, ENTRIES))
        # Until when (monotonic nanoseconds) any model is watched, as the only item.
        self.until = self._numbers[_UNTIL : _UNTIL + 1]
        self._seen = 0
        self._crashes = Crashes({}, {}, {})

    def add(self, crashes: Sequence[Crash]) -> None:
        """Add entries, and watch their models; in the arbiter."""
        numbers = self._numbers
        numbers[_VERSION] += 1
        for crash in crashes:
            kind = _GUILTY if crash.verdict is Verdict.GUILTY else _OTHERS
            number = numbers[kind]
            begin, data = _find(kind, number), orjson.dumps(crash._replace(number=number)._asdict())
            self._memory[begin : begin + len(data) + 1] = data + b"\0"
            if kind == _OTHERS:
                self._acquitted[number % ENTRIES] = 0
            numbers[kind] = number + 1
            numbers[_UNTIL] = max(numbers[_UNTIL], crash.at_ns + INPUTS_SECONDS * 10**9)
        numbers[_VERSION] += 1

    def read(self) -> Crashes:
        """Return the entries that hold, as of the last call during which the arbiter wrote none."""
        version = self._numbers[_VERSION]
        if version != self._seen and version % 2 == 0:
            crashes = [*self._entries(_OTHERS), *self._entries(_GUILTY)]
            if self._numbers[_VERSION] == version:
                self._seen, self._crashes = version, _index(crashes)
        return self._crashes

    def acquit(self, crash: Crash) -> None:
        """Note that a request or inputs that were suspected of a crash have run without harm; in any worker."""
        if self._numbers[_OTHERS] - crash.number <= ENTRIES:  # else its entry has been replaced
            self._acquitted[crash.number % ENTRIES] = 1

    def is_acquitted(self, crash: Crash) -> bool:
        """Return whether `acquit` was called for a crash whose request is not guilty."""
        return bool(self._acquitted[crash.number % ENTRIES])

    def _entries(self, kind: int) -> Iterator[Crash]:
        """Yield the entries of a kind, oldest first; they may be torn while the arbiter writes."""
        count = self._numbers[kind]
        for number in range(max(0, count - ENTRIES), count):
            begin = _find(kind, number)
            data = self._memory[begin : self._memory.find(b"\0", begin)]
            try:
                fields = orjson.loads(data)
            except orjson.JSONDecodeError:
                continue
            yield Crash(**{**fields, "verdict": Verdict(fields["verdict"])})


def _find(kind: int, number: int) -> int:
    """Return where an entry begins."""
    return _HEAD_BYTES + ((kind - _GUILTY) * ENTRIES + number % ENTRIES) * _ENTRY_BYTES


def _index(crashes: Sequence[Crash]) -> Crashes:
    """Return entries by key, of which the last counts."""
    now, watched, times = time.monotonic_ns(), dict[str, int](), dict[str, set[int]]()
    for crash in crashes:
        watched[crash.model] = max(watched.get(crash.model, 0), crash.at_ns + INPUTS_SECONDS * 10**9)
        if crash.verdict is not Verdict.KILLED:  # an operator may kill workers again and again
            times.setdefault(crash.model, set()).add(crash.at_ns)
    paused = {model: until for model, at in times.items() if (until := _find_pause(at))}
    return Crashes({crash.key: crash for crash in crashes if crash.until_ns > now}, watched, paused)


def _find_pause(times: set[int]) -> int:
    """Return until when a model with crashes at these times is paused, 0 if it is not."""
    latest = sorted(times)[-PAUSING_CRASHES:]
    if len(latest) < PAUSING_CRASHES or latest[-1] - latest[0] > PAUSE_SECONDS * 10**9:
        return 0
    return latest[-1] + PAUSE_SECONDS * 10**9
