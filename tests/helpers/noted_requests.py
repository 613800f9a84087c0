"""Notes of requests in progress, as a worker makes them."""

from ovms_rest.shared_memory.inference_notes import InferenceNotes, Note, make_start


def text_of(name: str, version: str, request_id: str, length: int = 10) -> bytes:
    """Return the bytes of a note of a request."""
    return make_start(name, version) + f"{request_id} {length}".encode() + b"\0"


def begin(notes: InferenceNotes, name: str, version: str, request_id: str, length: int = 10) -> Note:
    """Note a request that runs."""
    note = notes.free.pop() if notes.free else notes.make()
    text = text_of(name, version, request_id, length)
    note.memory[: len(text)] = text
    return note
