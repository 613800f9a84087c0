"""Reloading under load: on a call, on SIGHUP, on a change of the disk; what fails leaves everything as it was."""

import http.client
import json
import os
import shutil
import signal
import threading
import time
from errno import EIO, ESTALE

import model_zoo
import numpy as np
import pytest
from openvino import Type, opset15
from service import serve, write_config
from tritonclient import http as http_client

from ovms_rest.arbiter import reloading
from ovms_rest.arbiter.reloading import Change, Reloads
from ovms_rest.errors import NotFoundError, ReloadError, TryLaterError
from ovms_rest.models.registry import Entry, ModelRegistry


def times(factor):
    """A model x FP32 [1,4] -> y = x * factor."""
    x = model_zoo.parameter("x", (1, 4), Type.f32)
    return model_zoo.model_of({"y": opset15.multiply(x, opset15.constant(np.float32(factor)))}, [x])


BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]})


class Clients:
    """Clients that infer with a model all the time; whatever goes wrong for one is kept."""

    def __init__(self, service, model, count=3):
        self.failures, self.results = [], []
        self._service, self._model, self._stopping = service, model, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *error):
        self.wait_for_more()
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count=50):
        """Wait until so many more answers, or a failure, have come."""
        enough = len(self.results) + count
        self._service.wait_for(lambda: len(self.results) >= enough or self.failures)

    def _run(self):
        connection = None
        while not self._stopping.is_set():
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=60)
                connection.request("POST", f"/v2/models/{self._model}/infer", BODY)
                response = connection.getresponse()
                answer = json.loads(response.read())
                self.results.append((answer["model_version"], answer["outputs"][0]["data"][0]))
                if response.getheader("connection") == "close":
                    connection.close()
                    connection = None
            except Exception as error:  # whatever it is, a client would have met it
                self.failures.append(repr(error))
                connection = None


@pytest.fixture
def served(tmp_path):
    """A service of two models that looks at the disk only when it is told to."""
    model_zoo.save(times(1), tmp_path / "m")
    model_zoo.save(model_zoo.relu(), tmp_path / "other")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "other", "base_path": "other"})
    with serve(tmp_path, "-w", "2", config=config, OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0") as running:
        yield running


def reload(service):
    return service.request("POST", "/v1/config/reload")


def status(*versions, state="AVAILABLE", code="OK", message="OK"):
    entry = {"state": state, "status": {"error_code": code, "error_message": message}}
    return {"model_version_status": [{"version": version, **entry} for version in versions]}


def test_the_status_of_all_models_is_told(served):
    answer = served.get("/v1/config")
    assert (answer.status, answer.json()) == (200, {"m": status("1"), "other": status("1")})


def test_the_repository_index_tells_states_and_reasons(served, tmp_path):
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "model.onnx").write_text("garbage")
    assert reload(served).status == 412
    path = "/v2/repository/index"
    ready = [{"name": name, "version": "1", "state": "READY"} for name in ("m", "other")]
    first, broken, last = served.request("POST", path).json()
    assert [first, last] == ready
    assert (broken["name"], broken["version"], broken["state"]) == ("m", "2", "UNAVAILABLE")
    assert broken["reason"].startswith("cannot read ")
    assert served.request("POST", path, {"ready": True}).json() == ready
    with http_client.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        assert len(client.get_model_repository_index()) == 3
    for body in (b"[]", b"{", b'{"ready": 1}'):
        answer = served.request("POST", path, body)
        assert (answer.status, list(answer.json())) == (400, ["error"])
    assert served.get(path).status == 405


def test_the_outcome_is_what_serves_in_the_end(tmp_path):
    """Not what was loaded: the new workers may die at it."""
    ticket = {"id": "7", "writes": 0}
    config, models = write_config(tmp_path, {"name": "m", "base_path": "m"}), ModelRegistry({})
    reloads = Reloads(config, models, lambda configs, previous, stop: ModelRegistry({"m": Entry({1: None})}))
    assert reloads.run([Change(id="7")], lambda: False)
    models.give_up("m/1", "died")
    with pytest.raises(TryLaterError) as deferred:
        reloads.request(ticket)
    assert not deferred.value.is_due()
    reloads.end()
    assert deferred.value.is_due()
    with pytest.raises(ReloadError, match=r"^model 'm' version 1 died$") as caught:
        reloads.request(ticket)
    assert caught.value.status == 412


def test_a_bug_while_loading_is_told_and_the_arbiter_lives(tmp_path, caplog):
    def load(configs, previous, stop):
        raise ZeroDivisionError("a bug")

    models = ModelRegistry({})
    reloads = Reloads(write_config(tmp_path), models, load)
    assert not reloads.run([Change(id="7")], lambda: False)
    reloads.end()
    with pytest.raises(ReloadError, match="internal error; the reason is in the log of the server") as caught:
        reloads.request({"id": "7", "writes": 0})
    assert caught.value.status == 500
    assert "a bug" in caplog.text


@pytest.mark.parametrize(("what", "status"), [("load", 404), ("unload", 201)])
def test_a_change_of_a_model_that_a_reload_beside_it_takes_away_is_answered(tmp_path, what, status):
    """What comes while the arbiter loads is made at once after that."""
    models = ModelRegistry({})
    config = write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "n", "base_path": "n"})

    def load(configs, previous, stop):
        return ModelRegistry({model.name: Entry({1: object()}) for model in configs})

    reloads = Reloads(config, models, load)
    reloads.load()

    def load_and_change(configs, previous, stop):
        write_config(tmp_path, {"name": "n", "base_path": "n"})
        return load(configs, previous, stop)

    reloads._load = load_and_change
    if what == "unload":
        write_config(tmp_path, {"name": "n", "base_path": "n"})
    reloads.run([Change(what, "m", id="7"), Change(id="8")], lambda: False)
    reloads.end()
    assert list(models.entries) == ["n"]
    ticket = {"id": "7", "writes": 0}
    if status == 404:
        with pytest.raises(NotFoundError, match=r"^model 'm' is not in .* any more$"):
            reloads.load_model(ticket, "m", None)
    else:
        reloads.unload_model(ticket, "m", False)


def test_what_a_disk_refuses_to_tell_is_logged_once_for_each_kind_and_looked_at_again(tmp_path, caplog, monkeypatch):
    """A worker calls it every second; an error would end it."""
    errors = [ESTALE, ESTALE, EIO, ESTALE, EIO, None]

    def stamp(path):
        error = errors.pop(0)
        if error is not None:
            raise OSError(error, os.strerror(error), str(path))
        return (("changed", 1, 1, 1),)

    config = write_config(tmp_path)
    reloads = Reloads(config, ModelRegistry({}), lambda configs, previous, stop: ModelRegistry({}))
    monkeypatch.setattr(reloading, "stamp", stamp)
    for _ in range(6):
        reloads.watch()
    assert errors == []
    assert [record.message for record in caplog.records] == [
        "cannot tell whether the config or a model has changed, and goes on trying: "
        f"[Errno {error}] {os.strerror(error)}: '{config}'"
        for error in (ESTALE, EIO)
    ]


def test_the_newest_outcome_arrives_after_any_number_of_long_ones(tmp_path):
    """Each of 4-byte characters, beside the status of thousands of models that do not serve for long reasons."""
    models = ModelRegistry({f"m{number}": Entry(reason="why " * 500) for number in range(3000)})

    def load(configs, previous, stop):
        raise ReloadError("\U0001f600" * 3000, 412)

    reloads = Reloads(write_config(tmp_path, {"name": "m", "base_path": "m"}), models, load)
    for number in range(100):
        reloads.run([Change("load", "m", id=str(number))], lambda: False)
        reloads.end()
    for number in (0, 99):
        with pytest.raises(ReloadError, match=r"^\U0001f600{500}$"):
            reloads.load_model({"id": str(number), "writes": 0}, "m", None)
    assert reloads.status().keys() == models.entries.keys()


def test_all_outcomes_of_changes_that_are_made_together_arrive(tmp_path):
    models = ModelRegistry({})
    reloads = Reloads(write_config(tmp_path), models, lambda configs, previous, stop: ModelRegistry({}))
    reloads.run([Change(id=str(number)) for number in range(1000)], lambda: False)
    reloads.end()
    assert reloads.request({"id": "0", "writes": 0}) == (False, {})
    assert reloads.request({"id": "999", "writes": 0}) == (False, {})


def test_outcomes_that_cannot_be_published_come_with_the_next(tmp_path, caplog, monkeypatch):
    models = ModelRegistry({})
    reloads = Reloads(write_config(tmp_path), models, lambda configs, previous, stop: ModelRegistry({}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: os.strerror(os.write(-1, b"")))
        reloads.run([Change(id="1")], lambda: False)
        reloads.end()
    assert "cannot publish the outcomes of 1 changes" in caplog.text
    with pytest.raises(TryLaterError):
        reloads.request({"id": "1", "writes": 0})
    reloads.run([Change(id="2")], lambda: False)
    reloads.end()
    assert reloads.request({"id": "1", "writes": 0}) == (False, {})


def test_an_outcome_is_kept_for_who_comes_late_but_not_for_ever(tmp_path):
    models = ModelRegistry({})
    reloads = Reloads(write_config(tmp_path), models, lambda configs, previous, stop: ModelRegistry({}))
    for number in range(300):
        reloads.run([Change(id=str(number))], lambda: False)
        reloads.end()
    assert reloads.request({"id": "100", "writes": 0}) == (False, {})
    with pytest.raises(TryLaterError):
        reloads.request({"id": "1", "writes": 0})


def test_nothing_new_is_a_200_and_no_worker_is_replaced(served):
    served.wait_for(lambda: len(served.workers()) == 2)
    before = served.workers()
    answer = reload(served)
    assert (answer.status, answer.json()) == (200, {"m": status("1"), "other": status("1")})
    assert served.workers() == before


def test_a_new_version_is_served_when_the_call_returns_and_no_request_fails(served, tmp_path):
    with Clients(served, "m") as clients:
        model_zoo.save(times(2), tmp_path / "m", 2)
        answer = reload(served)
        assert (answer.status, answer.json()) == (201, {"m": status("2"), "other": status("1")})
        for _ in range(8):
            assert served.infer("m", BODY.encode()).json()["model_version"] == "2"
    assert clients.failures == []
    assert set(clients.results) == {("1", 1.0), ("2", 2.0)}


def test_only_what_has_changed_is_compiled(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    assert reload(served).status == 201
    assert served.log.count("model 'm' version 2 is being tried") == 1
    assert served.log.count("model 'm' version 1 is being tried") == 1
    assert served.log.count("model 'other' version 1 is being tried") == 1


def test_a_model_that_was_changed_in_its_place_is_served_anew(served, tmp_path):
    with Clients(served, "m") as clients:
        model_zoo.save(times(5), tmp_path / "new")
        for name in ("model.bin", "model.xml"):
            (tmp_path / "new" / "1" / name).rename(tmp_path / "m" / "1" / name)
        assert reload(served).status == 201
    assert clients.failures == []
    assert clients.results[-1] == ("1", 5.0)


@pytest.mark.parametrize("version", [1, 2], ids=["in the place of the old one", "as a new version"])
def test_a_broken_model_is_told_and_what_served_goes_on(served, tmp_path, version):
    with Clients(served, "m") as clients:
        shutil.rmtree(tmp_path / "m" / str(version), ignore_errors=True)
        (tmp_path / "m" / str(version)).mkdir()
        (tmp_path / "m" / str(version) / "model.onnx").write_text("garbage")
        answer = reload(served)
        assert answer.status == 412
        assert answer.json()["error"].startswith(f"model 'm' version {version} cannot read ")
    assert clients.failures == []
    assert set(clients.results) == {("1", 1.0)}
    told = [item["status"]["error_message"] for item in served.get("/v1/config").json()["m"]["model_version_status"]]
    assert any(text.startswith("cannot read ") for text in told)


def test_a_broken_model_is_tried_again_when_it_is_asked_for(served, tmp_path):
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "model.onnx").write_text("garbage")
    assert reload(served).status == 412
    assert reload(served).status == 412
    shutil.rmtree(tmp_path / "m" / "2")
    model_zoo.save(times(2), tmp_path / "m", 2)
    assert reload(served).json()["m"] == status("2")


def test_a_broken_config_is_a_400_and_changes_nothing(served, tmp_path):
    (tmp_path / "config.json").write_text('{"model_config_list": [{"config": {"nam": "m"}}]}')
    with Clients(served, "m") as clients:
        answer = reload(served)
        assert answer.status == 400
        assert "model_config_list[0].config.nam: unknown key" in answer.json()["error"]
        served.signal(signal.SIGHUP)
        served.wait_for(lambda: "reload failed, the service goes on as it was: " in served.log)
    assert clients.failures == []


def test_a_broken_config_is_told_by_what_serves_until_it_is_mended(served, tmp_path):
    config = tmp_path / "config.json"
    good = config.read_text()
    config.write_text('{"model_config_list": [{"config": {"nam": "m"}}]}')
    assert reload(served).status == 400
    why = f"still serves as before; the config is invalid now: {config}: model_config_list[0].config.name: is missing; "
    for entry in served.get("/v1/config").json().values():
        (version,) = entry["model_version_status"]
        assert (version["state"], version["status"]["error_code"]) == ("AVAILABLE", "OK")
        assert version["status"]["error_message"].startswith(why)
    for entry in served.request("POST", "/v2/repository/index").json():
        assert entry["state"] == "READY"
        assert entry["reason"].startswith(why)
    assert served.get("/v2/health/ready").status == 200
    config.write_text(good)
    assert reload(served).json() == {"m": status("1"), "other": status("1")}
    assert served.get("/v1/config").json() == {"m": status("1"), "other": status("1")}
    assert all("reason" not in entry for entry in served.request("POST", "/v2/repository/index").json())


def test_models_come_and_go_with_the_config(served, tmp_path):
    model_zoo.save(times(3), tmp_path / "third")
    write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "third", "base_path": "third"})
    assert reload(served).json() == {"m": status("1"), "third": status("1")}
    assert served.get("/v2/models/other").status == 404
    assert served.infer("third", BODY.encode()).json()["outputs"][0]["data"] == [3, 6, 9, 12]


def test_sighup_reloads_without_a_failure(served, tmp_path):
    before = served.workers()
    with Clients(served, "m") as clients:
        model_zoo.save(times(2), tmp_path / "m", 2)
        served.signal(signal.SIGHUP)
        served.wait_for(lambda: ("2", 2.0) in clients.results)
        served.wait_for(lambda: set(before).isdisjoint(served.workers()))
    assert clients.failures == []
    assert clients.results[-1] == ("2", 2.0)


def test_calls_at_the_same_time_all_return_with_the_new_generation(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(reload(served))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status for answer in answers} <= {200, 201}
    assert all(answer.json()["m"] == status("2") for answer in answers)


@pytest.mark.parametrize("control", ["", "127.0.0.1:0"], ids=["no control address", "a control address"])
def test_a_change_on_the_disk_is_served_without_being_told(tmp_path, control):
    """With a control address its worker looks."""
    model_zoo.save(times(1), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    variables = {"OVMS_REST_CONTROL_BIND": control}
    with serve(tmp_path, "-w", "2", config=config, **variables) as service, Clients(service, "m") as clients:
        model_zoo.save(times(2), tmp_path / "m", 2)
        service.wait_for(lambda: ("2", 2.0) in clients.results)
        write_config(tmp_path, {"name": "m", "base_path": "m", "model_version_policy": {"all": {}}})
        service.wait_for(lambda: service.get("/v2/models/m").json()["versions"] == ["1", "2"])
    assert clients.failures == []


def test_a_broken_version_on_the_disk_is_tried_once(tmp_path):
    model_zoo.save(times(1), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    with serve(tmp_path, "-w", "1", config=config) as service:
        (tmp_path / "m" / "2").mkdir()
        (tmp_path / "m" / "2" / "model.onnx").write_text("garbage")
        service.wait_for(lambda: "version 2 of model 'm' does not serve" in service.log)
        looks = time.monotonic() + 4  # four more looks at the disk
        service.wait_for(lambda: time.monotonic() > looks)
        assert service.log.count("model 'm' version 2 is being tried") == 1


def test_the_end_does_not_wait_for_a_model_that_hangs(served, tmp_path):
    model_zoo.save(model_zoo.endless(), tmp_path / "m", 2)
    served.signal(signal.SIGHUP)
    served.wait_for(lambda: "model 'm' version 2 is being tried" in served.log)
    started = time.monotonic()
    served.process.terminate()
    assert served.process.wait(60) == 0
    assert time.monotonic() - started < 30, "it would have been tried for 300 s"


@pytest.mark.parametrize("options", [("-k", "sync"), ("-k", "gthread")])
def test_reloads_work_with_gunicorns_own_workers(tmp_path, options):
    model_zoo.save(times(1), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    with serve(tmp_path, "-w", "2", *options, config=config) as service:
        model_zoo.save(times(2), tmp_path / "m", 2)
        assert reload(service).json() == {"m": status("2")}


def test_the_control_address_reloads_too(tmp_path):
    model_zoo.save(times(1), tmp_path / "m")
    config = write_config(tmp_path, {"name": "m", "base_path": "m"})
    path = tmp_path / "control"
    with serve(tmp_path, "-w", "2", config=config, OVMS_REST_CONTROL_BIND=f"unix:{path}") as service:
        service.wait_for(lambda: len(service.workers()) == 3)
        with Clients(service, "m") as clients:
            model_zoo.save(times(2), tmp_path / "m", 2)
            assert reload(service).json() == {"m": status("2")}
            service.wait_for(lambda: len(service.workers()) == 3)
        assert clients.failures == []
