"""Requests that crash workers: the note that a worker makes of each request, and the refusal of those that come again.

The rules are in worker/README.md, "Requests that crash". A request is known by its id and the length of its body, or by
its inputs. Inputs are compared only for models that have crashed lately: their digest may cost as much as decoding.
"""

import hashlib
import time
from collections.abc import Mapping

import numpy as np

from ovms_rest.errors import CrashedError, PausedError, TryLaterError
from ovms_rest.log import log
from ovms_rest.models.batching import parking
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array, ModelMetadata
from ovms_rest.protocol.words import quote
from ovms_rest.resources.body import Environ
from ovms_rest.shared_memory.crash_table import (
    Crash,
    CrashTable,
    PauseRule,
    Verdict,
    key_of_inputs,
    key_of_request,
)
from ovms_rest.shared_memory.inference_notes import DIGEST_BYTES, REQUEST_BYTES, InferenceNotes, Note, make_start

# The header by which a proxy says that it sends a request again, because the worker that had it is gone.
_ATTEMPT = "HTTP_X_REQUEST_ATTEMPT"
_WAIT_UNTIL = "ovms_rest.verdict_until"
# A request sent again waits at most this long until the arbiter, which may be loading models, has found out about the
# worker that had it.
VERDICT_SECONDS = 10.0
_PAUSE_SECONDS = 0.02
# Refusals are logged together, as often as this.
_LOG_SECONDS = 10.0


class CrashGuard:
    """The requests in progress of this process, and the known crashes.

    Any model is watched until the time in `until[0]`, in monotonic nanoseconds.
    """

    def __init__(self, notes: InferenceNotes, table: CrashTable) -> None:
        self.until = table.until
        self._notes = notes
        self._free = notes.free
        self._table = table
        self._starts: dict[tuple[str, str], bytes] = {}  # of notes, by name and version
        self._refused = 0  # since the last line of the log
        self._next_line = 0.0

    def begin(self, metadata: ModelMetadata, environ: Environ) -> Note:
        """Note a request that begins to run; the caller ends the note.

        Raises TryLaterError while another worker may have died of it and the arbiter has not found out.
        """
        # In one function, because it runs for every request.
        key = metadata.name, metadata.version
        start = self._starts.get(key) or self._add_start(key)
        request = f"{environ.get('HTTP_X_REQUEST_ID', '')} {environ.get('CONTENT_LENGTH', '')}".encode("latin-1")
        text = b"%b%b\0" % (start, request if len(request) < REQUEST_BYTES else request[: REQUEST_BYTES - 1])
        if _ATTEMPT in environ:
            self._await_verdict(text, environ)
        try:
            note = self._free.pop()
        except IndexError:
            note = self._notes.make()
        parking.note = note
        note.memory[: len(text)] = text
        return note

    def check_request(self, note: Note) -> None:
        """Refuse a request that has crashed a worker, and make one that may have run alone.

        Raises CrashedError, and PausedError for any other request for a model that is paused.
        """
        noted, crashes, now = note.read(), self._table.read(), time.monotonic_ns()
        if crashes.watched.get(noted.model, 0) <= now:
            return
        note.is_watched = True
        self._check(note, key_of_request(noted.model, noted.request))
        pause = crashes.paused.get(noted.model)
        if pause is not None and pause.until_ns > now:
            seconds = _seconds(pause.until_ns - now)
            raise PausedError(_explain_pause(noted.model, pause.rule, seconds), seconds)

    def check_inputs(self, note: Note, arrays: Mapping[str, Array]) -> None:
        """Do the same by the inputs of a request for a watched model, and note their digest. Raises CrashedError."""
        digest = make_digest(note.read().model, arrays)
        note.add_digest(digest)
        self._check(note, key_of_inputs(digest))

    def end(self, note: Note) -> None:
        """End the note of a request for a watched model, and acquit it of its suspicions: it has run without harm."""
        for crash in note.suspicions:
            self._table.acquit(crash)
        note.suspicions.clear()
        note.is_watched = False
        note.end()

    def _add_start(self, key: tuple[str, str]) -> bytes:
        start = self._starts[key] = make_start(*key)
        return start

    def _await_verdict(self, text: bytes, environ: Environ) -> None:
        """Wait while another worker has the request noted, which it ran before; its proxy saw that worker go."""
        until: float = environ.setdefault(_WAIT_UNTIL, time.monotonic() + VERDICT_SECONDS)

        def is_due() -> bool:
            return not self._notes.runs_elsewhere(text) or time.monotonic() >= until

        if is_due():
            return
        if "ovms_rest.buffers" in environ:  # our own worker runs others meanwhile, and calls again
            raise TryLaterError(is_due)
        while not is_due():
            time.sleep(_PAUSE_SECONDS)

    def _check(self, note: Note, key: str) -> None:
        crash = self._table.read().by_key.get(key)
        now = time.monotonic_ns()
        if crash is None or crash.until_ns <= now:
            return
        if crash.verdict is Verdict.GUILTY:
            self._log_refusal(crash)
            raise CrashedError(_explain(crash, now))
        if not self._table.is_acquitted(crash):
            note.suspicions.append(crash)
            if crash.verdict is Verdict.KILLED:
                note.add_kill()

    def _log_refusal(self, crash: Crash) -> None:
        """Log how many requests were refused, now and then."""
        self._refused += 1
        if (now := time.monotonic()) >= self._next_line:
            log.warning(
                "refused requests that repeat a crash: %d; the last was for %r (name and version), whose "
                "worker %s while running request %r",
                *(self._refused, crash.model, crash.cause, crash.request_id),
            )
            self._refused, self._next_line = 0, now + _LOG_SECONDS


def _explain(crash: Crash, now_ns: int) -> str:
    name, _, version = crash.model.rpartition("/")
    which = f"request {quote(crash.request_id)}" if "\0" in crash.key else "a request with the same inputs"
    return (
        f"the worker that ran {which} {crash.cause} during an inference with model {quote(name)} version {version}; "
        f"the request is not run again for {_seconds(crash.until_ns - now_ns)} s"
    )


def _explain_pause(model: str, rule: PauseRule, seconds: int) -> str:
    name, _, version = model.rpartition("/")
    return (
        f"model {quote(name)} version {version} has {rule.what} {rule.workers} workers within "
        f"{rule.within_seconds:g} s, and infers nothing for {seconds} s"
    )


def _seconds(nanoseconds: int) -> int:
    """Round up."""
    return -(-nanoseconds // 10**9)


def make_digest(label: str, arrays: Mapping[str, Array]) -> bytes:
    """Return a digest of a model and all its inputs: their names, datatypes, shapes and values.

    SHA-256, for which CPUs have instructions: twice as fast as BLAKE2b on 602 KB (2.0 against 4.3 ms on a busy core).
    """
    digest = hashlib.sha256(label.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name}\0{array.shape}".encode())
        for part in _parts_of(array):
            digest.update(part)
    return digest.digest()[:DIGEST_BYTES]


def _parts_of(array: Array) -> tuple[bytes | memoryview, ...]:
    """Return what identifies the datatype and the values of an array."""
    if isinstance(array, BytesArray):  # where its elements begin may differ with the body that they are a view on
        return b"strings", (array.ends - array.begins).tobytes(), b"".join(array.elements())
    return array.dtype.str.encode(), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
