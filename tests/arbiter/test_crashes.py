"""Which requests a worker's death is the fault of, and what the log says."""

import signal

import pytest
from noted_requests import begin

from ovms_rest.arbiter.crashes import Death, Verdicts, find_death, find_hang, judge
from ovms_rest.shared_memory.crash_table import (
    CRASHES,
    ENTRIES,
    CrashTable,
    Verdict,
    key_of_inputs,
    key_of_request,
    make_hang_rule,
)
from ovms_rest.shared_memory.inference_notes import InferenceNotes

CRASH = find_death(-signal.SIGSEGV, False)
KILL = find_death(-signal.SIGKILL, False)
HANG_RULE = make_hang_rule(2, 30)
HANG, STOP = find_hang(False, HANG_RULE), find_hang(True, HANG_RULE)


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
    ("code", "ending", "expected"),
    [
        (-signal.SIGSEGV, False, Death("died of SIGSEGV", is_crash=True)),
        (-signal.SIGABRT, False, Death("died of SIGABRT", is_crash=True)),
        (-signal.SIGBUS, True, Death("died of SIGBUS", is_crash=True)),
        (-signal.SIGKILL, False, Death("was killed by SIGKILL")),
        (-signal.SIGKILL, True, Death("was killed by SIGKILL", is_wanted=True)),
        (-250, False, Death("was killed by signal 250")),
        (3, False, Death("ended with exit status 3")),
    ],
)
def test_deaths(code, ending, expected):
    assert find_death(code, ending) == expected


@pytest.mark.parametrize(
    ("death", "rules"),
    [(CRASH, [CRASHES, CRASHES]), (KILL, [None, CRASHES]), (HANG, [HANG_RULE, HANG_RULE]), (STOP, [None, CRASHES])],
    ids=["crash", "kill", "hang", "stop"],
)
def test_hangs_and_crashes_count_for_a_pause(notes, table, death, rules):
    """A worker that was killed, or stopped until the arbiter ended it, counts once its request is at fault."""
    for rule in rules:
        note = begin(notes, "m", "1", "a")
        if rule is rules[1]:
            note.add_kill()
        judge(notes, table, 2, death)
        assert table.read().by_key[key_of_request("m/1", "a 10")].rule == rule


@pytest.mark.parametrize(("workers", "pausing"), [(1, 2), (2, 2), (5, 2), (64, 32)])
def test_hangs_pause_a_model_once_they_have_taken_half_of_the_workers(workers, pausing):
    assert make_hang_rule(workers, 30) == ("hung in", pausing, 120, 90)
    assert make_hang_rule(workers, 3600).pause_seconds == 600


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


@pytest.mark.parametrize("death", [KILL, HANG, STOP, find_death(1, False)])
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
    models, line = judge(notes, table, 2, find_death(-signal.SIGKILL, True))
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


@pytest.mark.parametrize("character", ["m", '"', "\x01", "ü"])
def test_longest_names_and_ids_fit_into_the_table(table, character):
    name, request_id = character * 500, '"' * 128
    for number in range(ENTRIES + 2):
        notes = InferenceNotes(1)
        notes.claim(0)
        begin(notes, name, "1", f"{number}{request_id}"[:128])
        assert judge(notes, table, 0, KILL).line
    crashes = table.read().by_key
    assert len(crashes) == ENTRIES
    assert {crash.verdict for crash in crashes.values()} == {Verdict.KILLED}
