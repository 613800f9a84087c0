"""Notes of requests in progress, across processes."""

import os
import signal

from forking import fork, join
from noted_requests import begin, text_of

from ovms_rest.shared_memory.inference_notes import NOTES, REQUEST_BYTES, InferenceNotes, Noted


def test_arbiter_reads_what_a_killed_worker_ran():
    notes = InferenceNotes(4)
    reader, writer = os.pipe()

    def work():
        notes.claim(3)
        begin(notes, "m", "1", "runs")
        begin(notes, "m", "2", "parked").park()
        begin(notes, "m", "2", "done").end()
        begin(notes, "p", "1", "again").add_digest(b"d" * 16)
        os.write(writer, b"!")
        signal.pause()

    pid = fork(work)
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert notes.read(3) == [
        Noted("m/1", "runs 10", b"", True),
        Noted("m/2", "parked 10", b"", False),
        Noted("p/1", "again 10", b"d" * 16, True),
    ]
    notes.clear(3)
    assert notes.read(3) == []


def test_next_request_of_a_note_has_no_digest():
    notes = InferenceNotes(1)
    notes.claim(0)
    note = begin(notes, "m", "1", "a long name of a request")
    note.add_digest(b"d" * 16)
    note.end()
    assert begin(notes, "m", "1", "b") is note
    assert notes.read(0) == [Noted("m/1", "b 10", b"", True)]


def test_note_of_a_worker_that_died_while_it_wrote_is_read():
    notes = InferenceNotes(1)
    notes.claim(0)
    note = begin(notes, "m", "1", "a")
    half = "\N{GREEK SMALL LETTER MU}".encode()[:1]
    place = bytes(note.memory).index(b"m/1")
    note.memory[place : place + 1] = half
    assert notes.read(0) == [Noted("\N{REPLACEMENT CHARACTER}/1", "a 10", b"", True)]


def test_parked_request_runs_again():
    notes = InferenceNotes(1)
    notes.claim(0)
    note = begin(notes, "m", "1", "a")
    note.park()
    note.run()
    assert notes.read(0) == [Noted("m/1", "a 10", b"", True)]


def test_request_that_runs_in_another_worker_is_found():
    notes = InferenceNotes(4)
    notes.claim(0)
    join(fork(lambda: (notes.claim(2), begin(notes, "m", "1", "a"), begin(notes, "m", "1", "b").park())))
    assert notes.runs_elsewhere(text_of("m", "1", "a"))
    assert not notes.runs_elsewhere(text_of("m", "1", "b")), "it is parked"
    assert not notes.runs_elsewhere(text_of("m", "2", "a")), "it is for another version"
    assert not notes.runs_elsewhere(text_of("m", "1", "a", 11)), "its body has another length"
    begin(notes, "m", "1", "own")
    assert not notes.runs_elsewhere(text_of("m", "1", "own"))


def test_requests_beyond_the_notes_of_a_slot_are_not_noted():
    notes = InferenceNotes(2)
    notes.claim(1)
    taken = [begin(notes, "m", "1", str(number)) for number in range(NOTES + 2)]
    assert len(notes.read(1)) == NOTES
    for note in taken:
        note.end()
    assert notes.read(1) == []
    assert len(notes.free) == NOTES


def test_very_long_names_fit():
    notes = InferenceNotes(2)
    notes.claim(0)
    name, request_id = "ä" * 1000, "i" * (REQUEST_BYTES - 4)
    begin(notes, name, "1", request_id)
    begin(notes, "m", "1", "b")
    long, short = notes.read(0)
    assert name.startswith(long.model)
    assert (long.request, short.request) == (f"{request_id} 10", "b 10")


def test_process_without_a_slot_notes_for_itself():
    notes = InferenceNotes(1)
    note = begin(notes, "m", "1", "a")
    note.end()
    assert begin(notes, "m", "1", "b") is note
    assert notes.read(0) == []
