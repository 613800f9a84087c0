"""What a worker notes of its requests, and which it refuses."""

import json
import time

import numpy as np
import pytest
from fake_app import FakeRegistry, client_of, doubler, request
from forking import fork, join
from noted_requests import begin

from ovms_rest.arbiter.crashes import find_death, find_hang, judge
from ovms_rest.errors import CrashedError, TryLaterError
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.resources import crash_guard
from ovms_rest.resources.crash_guard import CrashGuard, make_digest
from ovms_rest.resources.inference import Infer
from ovms_rest.resources.tfs import Predict
from ovms_rest.settings import Settings
from ovms_rest.shared_memory.crash_table import CrashTable, make_hang_rule
from ovms_rest.shared_memory.inference_notes import InferenceNotes, Noted

CRASH, KILL = find_death(-11, False), find_death(-9, False)
HANG = find_hang(False, make_hang_rule(2, 30))
PATH, PREDICT = "/v2/models/m/infer", "/v1/models/m:predict"


class Service:
    """An application in slot 0, and workers in slot 1 that die."""

    def __init__(self):
        self.notes, self.table = InferenceNotes(2), CrashTable()
        self.notes.claim(0)
        self.guard = CrashGuard(self.notes, self.table)
        self.model = doubler()
        registry = FakeRegistry(self.model)
        routes = {PATH: Infer, "/v1/models/{name}:predict": Predict}
        made = {path: kind(registry, Settings(), self.guard) for path, kind in routes.items()}
        made["/v2/models/{name}/infer"] = made.pop(PATH)
        self.client = client_of(made)

    def ask(self, body, request_id="id", path=PATH, **headers):
        data = json.dumps(body).encode()
        sent = {"X-Request-ID": request_id, "Content-Length": str(len(data)), **headers}
        return self.client.simulate_post(path, body=data, headers=sent)

    def die(self, *noted, death=CRASH):
        """Let a worker die while it runs requests, given by id, body and inputs."""
        guard = CrashGuard(self.notes, self.table)

        def work():
            self.notes.claim(1)
            for request_id, body, arrays in noted:
                note = begin(self.notes, "m", "1", request_id, len(json.dumps(body).encode()))
                if death is KILL:  # what is held against the request counts
                    guard.check_request(note)
                if note.is_watched and arrays is not None:
                    guard.check_inputs(note, arrays)
                elif arrays is not None:
                    note.add_digest(make_digest("m/1", arrays))

        join(fork(work))
        judge(self.notes, self.table, 1, death)


@pytest.fixture
def service():
    return Service()


BODY, OTHER = request(1.5), request(2.5)
INPUTS = {"x": np.float32([1.5])}


def test_request_is_noted_while_it_runs(service):
    seen = []
    infer = service.model.function
    service.model.function = lambda arrays: seen.extend(service.notes.read(0)) or infer(arrays)
    assert service.ask(BODY, "mine").status_code == 200
    assert seen == [Noted("m/1", f"mine {len(json.dumps(BODY))}", b"", runs=True, was_killed=False)]
    assert service.notes.read(0) == []


def test_note_of_a_request_that_fails_is_freed(service):
    assert service.ask({}).status_code == 400
    assert service.notes.read(0) == []


def test_request_that_crashed_a_worker_is_refused_by_its_id(service, caplog):
    service.die(("mine", BODY, None))
    answer = service.ask(BODY, "mine")
    assert answer.status_code == 500
    assert answer.json["error"] == (
        "the worker that ran request 'mine' died of SIGSEGV during an inference with model 'm' version 1; "
        "the request is not run again for 60 s"
    )
    assert service.model.counters.read().failures["crashed"].count == 1
    assert "refused requests that repeat a crash: 1; the last was for 'm/1' (name and version)" in caplog.text
    assert service.ask(OTHER | {"id": "longer"}, "mine").status_code == 200, "another body with that id"
    assert service.ask(BODY, "another").status_code == 200, "its inputs are not known"


def test_inputs_that_crashed_a_worker_are_refused_with_any_id_and_by_any_api(service):
    service.die(("mine", BODY, INPUTS))
    for path, body in ((PATH, BODY), (PATH, {**BODY, "id": "x"}), (PREDICT, {"inputs": [1.5]})):
        answer = service.ask(body, "another", path)
        assert answer.status_code == 500, answer.text
        assert "that ran a request with the same inputs died of SIGSEGV" in answer.json["error"]
        assert "not run again for 600 s" in answer.json["error"]
    assert service.model.counters.read().failures["crashed"].count == 3
    assert service.ask(OTHER).status_code == 200


def test_digest_is_noted_only_for_models_that_crashed_lately(service):
    seen = []
    infer = service.model.function
    service.model.function = lambda arrays: seen.append(service.notes.read(0)[0].digest) or infer(arrays)
    service.ask(OTHER)
    service.die(("mine", BODY, None))
    service.ask(OTHER)
    service.ask(BODY)
    assert seen == [b"", make_digest("m/1", {"x": np.float32([2.5])}), make_digest("m/1", INPUTS)]


def test_refusals_are_logged_together(service, caplog, monkeypatch):
    service.die(("mine", BODY, INPUTS))
    for _ in range(5):
        service.ask(BODY)
    assert caplog.text.count("refused requests") == 1
    monkeypatch.setattr(service.guard, "_next_line", 0.0)
    service.ask(BODY)
    assert "refused requests that repeat a crash: 5;" in caplog.text


def test_model_that_crashes_again_and_again_is_paused(service):
    for number in range(5):
        assert service.ask(BODY).status_code == 200
        service.die((f"p{number}", BODY, None))
    answer = service.ask(BODY, "innocent")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert answer.json["error"] == (
        "model 'm' version 1 has crashed 5 workers within 10 s, and infers nothing for 10 s"
    )
    assert service.ask(BODY, "p1").status_code == 500
    assert service.model.counters.read().failures["crashed"].count == 2
    assert service.notes.read(0) == []


def test_model_that_hangs_again_is_paused(service):
    for number in range(2):
        assert service.ask(BODY, f"before{number}").status_code == 200
        service.die((f"p{number}", OTHER, None), death=HANG)
    answer = service.ask(BODY, "innocent")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "90")
    assert answer.json["error"] == (
        "model 'm' version 1 has hung in 2 workers within 120 s, and infers nothing for 90 s"
    )


def test_request_of_a_killed_worker_runs_again(service):
    service.die(("mine", BODY, INPUTS), death=KILL)
    assert service.ask(BODY, "mine").status_code == 200


def test_inputs_that_run_between_two_kills_are_never_refused(service):
    for number in range(3):
        service.die((f"killed{number}", BODY, INPUTS), death=KILL)
        assert service.ask(BODY, f"asked{number}").status_code == 200


def test_inputs_of_two_killed_workers_are_refused(service):
    for number in range(2):
        service.die((f"killed{number}", BODY, INPUTS), death=KILL)
    assert service.ask(BODY, "asked").status_code == 500


def test_request_that_did_not_run_is_not_acquitted(service):
    """Otherwise a request that gets its worker killed could be tried for ever, if it is invalid every other time."""
    invalid = {**BODY, "outputs": [{"name": "unknown"}]}
    service.die(("mine", invalid, None), death=KILL)
    assert service.ask(invalid, "mine").status_code == 400
    service.die(("mine", invalid, None), death=KILL)
    assert service.ask(invalid, "mine").status_code == 500


def suspicions_of(service, request_id, body=BODY):
    """Return how many suspicions there are against a request while it runs."""
    seen = []
    infer = service.model.function
    service.model.function = lambda arrays: seen.append(len(crash_guard.parking.note.suspicions)) or infer(arrays)
    assert service.ask(body, request_id).status_code == 200
    service.model.function = infer
    return seen[0]


def test_suspects_run_alone_until_they_have_run(service):
    for _ in range(2):
        service.die(("mine", BODY, INPUTS), ("other", OTHER, None))
        assert [suspicions_of(service, "mine") for _ in range(2)] == [2, 0]
        assert [suspicions_of(service, "other", OTHER) for _ in range(2)] == [1, 0]


def test_suspect_that_has_run_in_one_worker_is_acquitted_in_all(service):
    service.die(("mine", BODY, INPUTS), ("other", OTHER, None))
    assert suspicions_of(service, "mine") == 2
    another = CrashGuard(service.notes, service.table)
    note = begin(service.notes, "m", "1", "mine", len(json.dumps(BODY)))
    another.check_request(note)
    another.check_inputs(note, INPUTS)
    assert note.suspicions == []
    another.end(note)


# --- Requests sent again by a proxy


def environ_of(body, request_id, **more):
    return {"HTTP_X_REQUEST_ID": request_id, "CONTENT_LENGTH": str(body), "HTTP_X_REQUEST_ATTEMPT": "2", **more}


def test_request_sent_again_waits_for_the_verdict_on_the_worker_that_had_it(service):
    join(fork(lambda: (service.notes.claim(1), begin(service.notes, "m", "1", "a"))))
    environ = environ_of(10, "a", **{"ovms_rest.buffers": True})
    with pytest.raises(TryLaterError) as raised:
        service.guard.begin(service.model.metadata, environ)
    assert not raised.value.is_due()
    judge(service.notes, service.table, 1, CRASH)
    assert raised.value.is_due()
    note = service.guard.begin(service.model.metadata, environ)
    with pytest.raises(CrashedError, match="request 'a' died of SIGSEGV"):
        service.guard.check_request(note)


@pytest.mark.parametrize("environ", [environ_of(11, "a"), environ_of(10, "b")])
def test_other_requests_sent_again_do_not_wait(service, environ):
    join(fork(lambda: (service.notes.claim(1), begin(service.notes, "m", "1", "a"))))
    service.guard.begin(service.model.metadata, {**environ, "ovms_rest.buffers": True})


def test_wait_ends_although_the_worker_lives(service, monkeypatch):
    """As it does when a client sends the header itself, with the id of a request that is running."""
    monkeypatch.setattr(crash_guard, "VERDICT_SECONDS", 0.1)
    join(fork(lambda: (service.notes.claim(1), begin(service.notes, "m", "1", "a"))))
    began = time.monotonic()
    service.guard.begin(service.model.metadata, environ_of(10, "a"))
    assert time.monotonic() - began >= 0.1


# --- Digests


def test_digest_depends_on_names_datatypes_shapes_and_values_alone():
    x = np.arange(6, dtype=np.float32)
    arrays = [
        *({"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.reshape(3, 2)}, {"x": x.view(np.int32)}, {"x": x + 1}),
        *({"x": x, "y": x}, {"x": np.float32(1)}, {"x": np.empty(0, np.float32)}),
        {"x": BytesArray.of([b"ab", b"c"], (2,))},
        {"x": BytesArray.of([b"a", b"bc"], (2,))},
    ]
    digests = [make_digest("m/1", each) for each in arrays]
    assert len(set(digests)) == len(arrays)
    assert make_digest("m/2", arrays[0]) != digests[0]
    assert make_digest("m/1", {"x": np.repeat(x, 2)[::2]}) == digests[0]
    assert make_digest("m/1", {"y": x, "x": x}) == make_digest("m/1", {"x": x, "y": x})
    begins = np.int32([3, 1])
    strings = BytesArray(begins, np.int32([5, 2]), np.frombuffer(bytearray(b"-c-ab"), np.uint8))
    assert make_digest("m/1", {"x": strings}) == make_digest("m/1", {"x": BytesArray.of([b"ab", b"c"], (2,))})
