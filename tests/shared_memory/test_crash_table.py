"""The table of crashes: what workers see of what the arbiter adds."""

import os
import time

from forking import fork, join

from ovms_rest.shared_memory.crash_table import (
    CRASHES,
    ENTRIES,
    INPUTS_SECONDS,
    Crash,
    CrashTable,
    Pause,
    Verdict,
    make_hang_rule,
)

SECOND = 10**9


def crash(key, verdict=Verdict.GUILTY, seconds=60.0, model="m/1"):
    now = time.monotonic_ns()
    return Crash(key, verdict, model, "id", "died of SIGSEGV", now, now + int(seconds * SECOND), CRASHES)


def test_worker_sees_what_the_arbiter_adds_after_the_fork():
    table = CrashTable()
    ready, added = os.pipe(), os.pipe()

    def work():
        assert table.read().by_key == {}
        assert table.until[0] == 0
        os.write(ready[1], b"!")
        os.read(added[0], 1)
        assert table.read().by_key["a"].verdict is Verdict.GUILTY
        assert table.until[0] > time.monotonic_ns()

    pid = fork(work)
    os.read(ready[0], 1)
    table.add([crash("a")])
    os.write(added[1], b"!")
    join(pid)


def test_entry_is_returned_as_it_was_added():
    table = CrashTable()
    table.add([entry := crash("a\0ü")])
    assert table.read().by_key == {"a\0ü": entry}
    assert table.read().watched == {"m/1": entry.at_ns + INPUTS_SECONDS * SECOND}


def test_expired_entry_is_gone_and_its_model_is_still_watched():
    table = CrashTable()
    table.add([crash("a", seconds=0)])
    assert table.read().by_key == {}
    assert list(table.read().watched) == ["m/1"]


def at(seconds, rule, model="m/1", key="a"):
    at_ns = int(seconds * SECOND)
    return Crash(key, Verdict.SUSPECT, model, "id", "died", at_ns, time.monotonic_ns() + SECOND, rule)


def test_model_is_paused_after_crashes_in_a_row():
    table = CrashTable()
    # Two entries at one time are of one worker.
    crashes = [at(second, CRASHES, key=key) for second in (1, 2, 3, 4) for key in "ab"]
    table.add([*crashes, *(at(second, None) for second in (5, 6, 7))])
    assert table.read().paused == {}
    table.add([at(5, CRASHES, "other/1")])
    assert table.read().paused == {}
    table.add([at(8, CRASHES)])
    assert table.read().paused == {"m/1": Pause(CRASHES, 18 * SECOND)}
    table.add([at(12.5, CRASHES)])
    assert table.read().paused == {}, "the last five took longer"


def test_model_is_paused_after_hangs_for_longer():
    table, rule = CrashTable(), make_hang_rule(4, 30)
    table.add([*(at(second, CRASHES) for second in (1, 2, 3, 4, 5)), at(5, rule)])
    assert table.read().paused == {"m/1": Pause(CRASHES, 15 * SECOND)}
    table.add([at(126, rule)])
    assert table.read().paused == {"m/1": Pause(CRASHES, 15 * SECOND)}, "the two took longer than 120 s"
    table.add([at(246, rule)])
    assert table.read().paused == {"m/1": Pause(rule, 336 * SECOND)}


def test_later_entry_counts_but_a_guilty_one_before_others():
    table = CrashTable()
    table.add([crash("a", Verdict.SUSPECT), crash("a", Verdict.KILLED)])
    assert table.read().by_key["a"].verdict is Verdict.KILLED
    table.add([crash("a", Verdict.GUILTY)])
    table.add([crash("a", Verdict.SUSPECT)])
    assert table.read().by_key["a"].verdict is Verdict.GUILTY


def test_oldest_entries_are_replaced_and_suspects_replace_no_guilty_one():
    table = CrashTable()
    table.add([crash("guilty")])
    table.add([crash(f"s{number}", Verdict.SUSPECT) for number in range(ENTRIES + 2)])
    keys = table.read().by_key.keys()
    assert keys == {"guilty", *(f"s{number}" for number in range(2, ENTRIES + 2))}
    table.add([crash(f"g{number}") for number in range(ENTRIES)])
    assert "guilty" not in table.read().by_key


def test_reader_keeps_what_it_had_while_the_arbiter_writes():
    table = CrashTable()
    table.add([crash("a")])
    assert list(table.read().by_key) == ["a"]
    table.add([crash("b")])
    table._numbers[0] -= 1
    assert list(table.read().by_key) == ["a"]
    table._numbers[0] += 1
    assert list(table.read().by_key) == ["a", "b"]
