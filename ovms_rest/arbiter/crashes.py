"""Whose fault the death of a worker is: its notes and its end become entries of the crash table, and a line of the log.

A signal that code causes, as SIGSEGV, is the fault of the request that ran alone; of those in a batch, the one at fault
is found when they come again and run alone. Any other end, also that of a hang, may come from outside, from an operator
or for lack of memory: only a request that was alone in two such workers is at fault, if it began in the second when the
first was gone and has not run without harm between. (Inputs may be common, those of a probe for instance, and workers
may be killed for other reasons again and again, or all at once.)
"""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ovms_rest.shared_memory.crash_table import (
    CRASHES,
    INPUTS_SECONDS,
    REQUEST_SECONDS,
    Crash,
    CrashTable,
    PauseRule,
    Verdict,
    key_of_inputs,
    key_of_request,
)
from ovms_rest.shared_memory.inference_notes import InferenceNotes, Noted

# The signals of crashes in code: bad memory, failed assertions and C++ exceptions, bad instructions, arithmetic, calls.
_CRASHES = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL),
        *(signal.SIGFPE, signal.SIGSYS, signal.SIGTRAP),
    }
)
_MOST_IDS = 8

_CONSEQUENCES = {
    Verdict.GUILTY: f"refused for {REQUEST_SECONDS} s, and the same inputs, where known, for {INPUTS_SECONDS} s",
    Verdict.SUSPECT: "if they come again, each runs alone",
    Verdict.KILLED: "if a request comes again it runs alone, and is refused once its worker is killed again",
}


class Death(NamedTuple):
    """The end of a worker: how it ended, as a verb; whether code crashed; whether the arbiter had told it to end.

    `hang_rule` pauses the model with which a worker hung.
    """

    cause: str
    is_crash: bool = False
    is_wanted: bool = False
    hang_rule: PauseRule | None = None


class Verdicts(NamedTuple):
    """The models, as name/version, that a worker inferred with when it died, and a line for the log, "" for none."""

    models: Sequence[str]
    line: str


def find_death(code: int, is_ending: bool) -> Death:
    """Return how a worker ended, by its exit code, negative for a signal."""
    is_crash = -code in _CRASHES
    verb = "died of" if is_crash else "was killed by" if code < 0 else "ended with"
    return Death(f"{verb} {describe_code(code)}", is_crash, is_ending and not is_crash)


def find_hang(was_stopped: bool, rule: PauseRule) -> Death:
    """Return the death of a worker that hung until the arbiter ended it; one that was stopped blames no model."""
    return Death("was stopped and ended") if was_stopped else Death("hung and was ended", hang_rule=rule)


def describe_code(code: int) -> str:
    """Return an exit status, or the name of a signal for a negative code."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def judge(notes: InferenceNotes, table: CrashTable, slot: int, death: Death) -> Verdicts:
    """Add the requests with which a worker died to the table, and free its notes; in the arbiter."""
    running = [noted for noted in notes.read(slot) if noted.runs]
    if not running:
        notes.clear(slot)
        return Verdicts((), "")
    models = list(dict.fromkeys(noted.model for noted in running))
    consequence = ""
    if not death.is_wanted:
        verdict = _find_verdict(running, death)
        # An operator may kill workers again and again.
        rule = death.hang_rule or (None if verdict is Verdict.KILLED else CRASHES)
        table.add(list(_make_entries(running, verdict, death.cause, rule)))
        consequence = f"; {_CONSEQUENCES[verdict]}"
    notes.clear(slot)  # after the verdict, for which repeated requests wait
    names = ", ".join(map(repr, models))
    what = f"{death.cause} during an inference with {names} (name and version), {_describe(running)}{consequence}"
    return Verdicts(models, what)


def _find_verdict(running: Sequence[Noted], death: Death) -> Verdict:
    is_alone = len(running) == 1
    if death.is_crash:
        return Verdict.GUILTY if is_alone else Verdict.SUSPECT
    return Verdict.GUILTY if is_alone and running[0].was_killed else Verdict.KILLED


def _keys_of(noted: Noted) -> Iterator[tuple[str, int]]:
    """Yield the keys of a request, and for how many seconds each counts.

    A request without an id, as with gunicorn's own workers, is known by its inputs alone.
    """
    has_id = bool(_id_of(noted))
    yield key_of_request(noted.model, noted.request), REQUEST_SECONDS if has_id else 0
    if noted.digest:
        yield key_of_inputs(noted.digest), INPUTS_SECONDS


def _make_entries(running: Iterable[Noted], verdict: Verdict, cause: str, rule: PauseRule | None) -> Iterator[Crash]:
    now = time.monotonic_ns()
    for noted in running:
        for key, seconds in _keys_of(noted):
            yield Crash(key, verdict, noted.model, _id_of(noted), cause, now, now + seconds * 10**9, rule)


def _describe(running: Sequence[Noted]) -> str:
    ids = [repr(_id_of(noted)) for noted in running]
    if len(ids) == 1:
        return f"request {ids[0]} alone"
    more = f" and {len(ids) - _MOST_IDS} more" if len(ids) > _MOST_IDS else ""
    return f"a batch of {len(ids)} requests, {', '.join(ids[:_MOST_IDS])}{more}"


def _id_of(noted: Noted) -> str:
    return noted.request.rpartition(" ")[0]
