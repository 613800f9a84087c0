"""Which requests a worker's death is the fault of, and what the log says."""

import signal

import pytest
from noted_requests import begin

from ovms_rest.arbiter.crashes import Verdicts, find_death, judge
from ovms_rest.shared_memory.crash_table import CrashTable, Verdict, key_of_inputs, key_of_request
from ovms_rest.shared_memory.inference_notes import InferenceNotes

CRASH = find_death(-signal.SIGSEGV, False, False)
KILL = find_death(-signal.SIGKILL, False, False)


@pytest.fixture
def notes():
    notes = InferenceNotes(4)
    notes.claim(2)
    return notes


@pytest.fixture
def table():
    return CrashTable()


def verdict_on(table, request_id, model="m/1"):
    """Return the verdict on a request with a body of 10 bytes, None if there is none."""
    crash = table.read().by_key.get(key_of_request(model, f"{request_id} 10"))
    return None if crash is None else crash.verdict


@pytest.mark.parametrize(
    ("code", "aborted", "ending", "expected"),
    [
        (-signal.SIGSEGV, False, False, ("died of SIGSEGV", True, False)),
        (-signal.SIGABRT, False, False, ("died of SIGABRT", True, False)),
        (-signal.SIGBUS, False, True, ("died of SIGBUS", True, False)),
        (-signal.SIGKILL, False, False, ("was killed by SIGKILL", False, False)),
        (-signal.SIGKILL, False, True, ("was killed by SIGKILL", False, True)),
        (-signal.SIGKILL, True, True, ("hung and was ended", False, False)),
        (-signal.SIGABRT, True, False, ("hung and was ended", False, False)),
        (-250, False, False, ("was killed by signal 250", False, False)),
        (3, False, False, ("ended with exit status 3", False, False)),
    ],
)
def test_deaths(code, aborted, ending, expected):
    assert find_death(code, aborted, ending) == expected


def test_request_that_runs_alone_in_a_crash_is_guilty(notes, table):
    begin(notes, "m", "1", "a")
    begin(notes, "m", "1", "parked").park()
    begin(notes, "m", "1", "done").end()
    models, line = judge(notes, table, 2, CRASH)
    assert models == ["m/1"]
    assert line.startswith(
        "died of SIGSEGV during an inference with 'm/1' (name and version), request 'a' alone; refused for 60 s"
    )
    assert verdict_on(table, "a") is Verdict.GUILTY
    assert verdict_on(table, "parked") is verdict_on(table, "done") is None
    assert notes.read(2) == []


def test_requests_of_a_batch_that_crashes_are_suspects(notes, table):
    for number in range(10):
        begin(notes, "m", "1", f"r{number}")
    begin(notes, "p", "1", "of a pipeline")
    models, line = judge(notes, table, 2, CRASH)
    assert models == ["m/1", "p/1"]
    assert "'m/1', 'p/1' (name and version), a batch of 11 requests, 'r0', 'r1'," in line
    assert "'r7' and 3 more; if they come again, each runs alone" in line
    assert {verdict_on(table, f"r{number}") for number in range(10)} == {Verdict.SUSPECT}


def test_suspect_that_crashes_another_worker_alone_is_guilty(notes, table):
    begin(notes, "m", "1", "a"), begin(notes, "m", "1", "b")
    judge(notes, table, 2, CRASH)
    begin(notes, "m", "1", "b")
    judge(notes, table, 2, CRASH)
    assert (verdict_on(table, "a"), verdict_on(table, "b")) == (Verdict.SUSPECT, Verdict.GUILTY)


@pytest.mark.parametrize("death", [KILL, find_death(-signal.SIGKILL, True, False), find_death(1, False, False)])
def test_request_of_a_worker_that_was_killed_gets_another_try_and_no_third(notes, table, death):
    for verdict in (Verdict.KILLED, Verdict.GUILTY):
        note = begin(notes, "m", "1", "a")
        if verdict is Verdict.GUILTY:  # a worker has looked it up
            note.add_kill()
        assert death.cause in judge(notes, table, 2, death).line
        assert verdict_on(table, "a") is verdict


def test_workers_that_are_killed_at_the_same_time_do_not_make_their_common_inputs_guilty(notes, table):
    """Many clients send the same inputs, such as probes; an operator may kill all workers, again and again."""
    for event in range(3):
        for slot in (2, 3):
            notes.claim(slot)
            begin(notes, "m", "1", f"{event}-{slot}").add_digest(b"d" * 16)
        for slot in (2, 3):
            judge(notes, table, slot, KILL)
    assert table.read().by_key[key_of_inputs(b"d" * 16)].verdict is Verdict.KILLED


def test_suspect_that_is_killed_gets_another_try(notes, table):
    begin(notes, "m", "1", "a"), begin(notes, "m", "1", "b")
    judge(notes, table, 2, CRASH)
    begin(notes, "m", "1", "a")
    judge(notes, table, 2, KILL)
    assert verdict_on(table, "a") is Verdict.KILLED


def test_worker_killed_at_its_end_blames_nobody(notes, table):
    begin(notes, "m", "1", "a")
    models, line = judge(notes, table, 2, find_death(-signal.SIGKILL, False, True))
    assert (models, line) == (
        ["m/1"],
        "was killed by SIGKILL during an inference with 'm/1' (name and version), request 'a' alone",
    )
    assert table.read().watched == {}


def test_worker_that_ran_nothing_blames_nobody(notes, table):
    begin(notes, "m", "1", "a").park()
    assert judge(notes, table, 2, CRASH) == Verdicts((), "")
    assert notes.read(2) == []
    assert table.read().by_key == {}


def test_inputs_are_guilty_too_where_their_digest_is_noted(notes, table):
    begin(notes, "m", "1", "a").add_digest(b"d" * 16)
    judge(notes, table, 2, CRASH)
    crash = table.read().by_key[key_of_inputs(b"d" * 16)]
    assert (crash.verdict, crash.request_id, crash.model) == (Verdict.GUILTY, "a", "m/1")
    assert crash.until_ns - crash.at_ns == 600 * 10**9


def test_request_without_an_id_is_known_by_its_inputs_alone(notes, table):
    begin(notes, "m", "1", "")
    judge(notes, table, 2, CRASH)
    assert table.read().by_key == {}
    assert list(table.read().watched) == ["m/1"]
