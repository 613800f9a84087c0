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

# The entries of those at fault, and those of all others, so that many suspects replace no guilty one. Ten crashes per
# second, of a request and its inputs each, fill either in 25 seconds.
ENTRIES: Final = 512
# As JSON has six bytes for one of a name that contains control characters; a note has at most 512 bytes.
_ENTRY_BYTES: Final = 8192
# The numbers before the entries: odd while the arbiter writes, and another one after each change; when the last model
# ceases to be watched (monotonic nanoseconds); how many entries of each kind there have been.
_VERSION, _UNTIL, _GUILTY, _OTHERS = range(4)
_HEAD_BYTES: Final = 64


class PauseRule(NamedTuple):
    """A model that ends this many `workers` in one way within some seconds is paused, so that others are served."""

    what: str  # what the model has done, before a number of workers in a message
    workers: int
    within_seconds: float
    pause_seconds: float


# A new worker takes some tenths of a second.
CRASHES = PauseRule("crashed", 5, 10, 10)


def make_hang_rule(workers: int, timeout: float) -> PauseRule:
    """Return the rule for hangs, given how many workers infer, and gunicorn's timeout in seconds.

    Each hang takes a worker for the timeout. Hangs take a quarter of the workers' time at most: fewer than half of the
    workers hang in four timeouts, or all hang once and the model is paused for the other three.
    """
    return PauseRule("hung in", max(2, workers // 2), 4 * timeout, min(3 * timeout, INPUTS_SECONDS))


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
    rule: PauseRule | None = None  # by which the model is paused after several
    number: int = 0  # of the entry among those of its kind, which the table sets


class Pause(NamedTuple):
    """Why a model is paused, and until when (monotonic nanoseconds)."""

    rule: PauseRule
    until_ns: int


class Crashes(NamedTuple):
    """The entries by key, and by model, as name/version, until when it is watched, and its pause."""

    by_key: dict[str, Crash]
    watched: dict[str, int]
    paused: dict[str, Pause]


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
            rule = crash.rule and tuple(crash.rule)
            begin, data = _find(kind, number), orjson.dumps({**crash._asdict(), "rule": rule, "number": number})
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
            rule = fields["rule"]
            yield Crash(**{**fields, "verdict": Verdict(fields["verdict"]), "rule": rule and PauseRule(*rule)})


def _find(kind: int, number: int) -> int:
    """Return where an entry begins."""
    return _HEAD_BYTES + ((kind - _GUILTY) * ENTRIES + number % ENTRIES) * _ENTRY_BYTES


def _index(crashes: Sequence[Crash]) -> Crashes:
    """Return entries by key, of which the last counts."""
    now, watched, deaths = time.monotonic_ns(), dict[str, int](), dict[tuple[str, str], dict[int, PauseRule]]()
    for crash in crashes:
        watched[crash.model] = max(watched.get(crash.model, 0), crash.at_ns + INPUTS_SECONDS * 10**9)
        if crash.rule is not None:
            deaths.setdefault((crash.model, crash.rule.what), {})[crash.at_ns] = crash.rule
    paused: dict[str, Pause] = {}
    for (model, _), rules in deaths.items():
        pause = _find_pause(rules)
        if pause and (model not in paused or pause.until_ns > paused[model].until_ns):
            paused[model] = pause
    return Crashes({crash.key: crash for crash in crashes if crash.until_ns > now}, watched, paused)


def _find_pause(rules: dict[int, PauseRule]) -> Pause | None:
    """Return the pause of a model that ended workers at these times, None if they are too few; the last rule counts."""
    times = sorted(rules)
    rule = rules[times[-1]]
    latest = times[-rule.workers :]
    if len(latest) < rule.workers or latest[-1] - latest[0] > rule.within_seconds * 10**9:
        return None
    return Pause(rule, latest[-1] + int(rule.pause_seconds * 10**9))
