"""The inferences in progress of every worker, in shared memory: the arbiter reads what a worker ran when it died.

A worker notes a request before it decodes it, in one copy of some hundred bytes. A note says whether its request runs
or is parked for a batch: only one that runs can have caused a crash. Several run together in the inference of a batch.
"""

import itertools
import mmap
from typing import Final, NamedTuple

from ovms_rest.shared_memory.crash_table import Crash

# The notes of a slot. A worker with more requests in progress, parked for batches, does not note the others.
NOTES: Final = 64
# The bytes of the digest of a request's inputs.
DIGEST_BYTES: Final = 16

_NOTE_BYTES: Final = 512
_FREE, _PARKED, _RUNS = range(3)
# Whether a worker was killed before while it ran the same.
_KILLED: Final = 1
_DIGEST: Final = 2
_TEXT: Final = _DIGEST + DIGEST_BYTES
# Of the text: an id of up to 128 bytes with the length of a body, and the name and version of a model.
REQUEST_BYTES: Final = 144
_MODEL_BYTES: Final = _NOTE_BYTES - _TEXT - 1 - REQUEST_BYTES
_NO_DIGEST: Final = bytes(DIGEST_BYTES)


class Noted(NamedTuple):
    """A note as other processes read it.

    `request` is an id and a length, `digest` b"" if there is none. `was_killed`: the request began after a worker had
    been killed that ran it or its inputs.
    """

    model: str
    request: str
    digest: bytes
    runs: bool
    was_killed: bool = False


class Note:
    """The note of a request in this process, until `end`; then it is used for another one.

    Whoever takes it writes to `memory` what `make_start` describes, in place because a call would cost as much again.
    `is_watched`: the model of the request has crashed lately. `suspicions` are the crashes that the request may
    have caused, so that it must run alone.
    """

    __slots__ = ("_free", "is_watched", "memory", "suspicions")

    def __init__(self, memory: memoryview, free: "list[Note]") -> None:
        self.memory = memory
        self._free = free
        self.is_watched = False
        self.suspicions: list[Crash] = []

    def add_digest(self, digest: bytes) -> None:
        """Note the digest of the inputs."""
        self.memory[_DIGEST:_TEXT] = digest

    def add_kill(self) -> None:
        """Note that a worker was killed before while it ran the request or its inputs."""
        self.memory[_KILLED] = 1

    def park(self) -> None:
        """Note that the request does not run until `run`."""
        self.memory[0] = _PARKED

    def run(self) -> None:
        """Note that the request runs again."""
        self.memory[0] = _RUNS

    def read(self) -> Noted:
        """Return what other processes read; a worker may have died while it wrote."""
        model, request, _ = bytes(self.memory[_TEXT:]).split(b"\0", 2)
        digest = bytes(self.memory[_DIGEST:_TEXT])
        return Noted(
            model.decode(errors="replace"),
            request.decode("latin-1"),
            b"" if digest == _NO_DIGEST else digest,
            self.memory[0] == _RUNS,
            bool(self.memory[_KILLED]),
        )

    def end(self) -> None:
        """Note that the request is done."""
        self.memory[0] = _FREE
        self._free.append(self)


def make_start(name: str, version: str) -> bytes:
    """Return the first bytes of a note, which all requests for a version share; a very long name is cut.

    After them come an id, a space, the length of the body in digits, and a NUL: at most REQUEST_BYTES.
    """
    label = f"{name}/{version}".encode(errors="replace")[:_MODEL_BYTES].decode(errors="ignore")
    return bytes([_RUNS, 0]) + _NO_DIGEST + label.encode() + b"\0"


class InferenceNotes:
    """The notes of all workers; made in the arbiter before it forks. A process without a slot notes for itself."""

    def __init__(self, slots: int) -> None:
        # Pages that no worker writes take no memory. Of each slot: whether it was ever claimed, and how many notes were
        # ever used.
        self._claimed = mmap.mmap(-1, slots)
        self._used = memoryview(mmap.mmap(-1, slots))
        self._memory = memoryview(mmap.mmap(-1, slots * NOTES * _NOTE_BYTES))
        self._slot: int | None = None
        self._numbers = itertools.count()  # of notes; with gthread, threads make them
        self.free: list[Note] = []

    def claim(self, slot: int) -> None:
        """Write the notes of this slot from now on; in a worker after the fork."""
        self._slot, self._numbers = slot, itertools.count()
        self._claimed[slot] = 1
        self.free.clear()  # the list itself is known to those who take from it

    def make(self) -> Note:
        """Make a note, when none is `free`."""
        if self._slot is None:
            return Note(memoryview(bytearray(_NOTE_BYTES)), self.free)
        number = next(self._numbers)
        if number >= NOTES:
            return Note(memoryview(bytearray(_NOTE_BYTES)), [])
        self._used[self._slot] = max(self._used[self._slot], number + 1)
        return Note(self._find(self._slot, number), self.free)

    def _find(self, slot: int, index: int) -> memoryview:
        begin = (slot * NOTES + index) * _NOTE_BYTES
        return self._memory[begin : begin + _NOTE_BYTES]

    def read(self, slot: int) -> list[Noted]:
        """Return the requests in progress of a slot; in the arbiter when its worker is gone."""
        notes = (self._find(slot, index) for index in range(self._used[slot]))
        return [Note(note, []).read() for note in notes if note[0] != _FREE]

    def clear(self, slot: int) -> None:
        """Free the notes of a slot whose worker is gone; in the arbiter, after their requests have been judged."""
        for index in range(self._used[slot]):
            self._find(slot, index)[0] = _FREE

    def runs_elsewhere(self, text: bytes) -> bool:
        """Return whether a request is noted as running by another worker, which may have died with it."""
        text = text[_TEXT:]
        return any(
            note[0] == _RUNS and note[_TEXT : _TEXT + len(text)] == text
            for slot in range(self._claimed.rfind(b"\1") + 1)
            if slot != self._slot
            for note in (self._find(slot, index) for index in range(self._used[slot]))
        )
