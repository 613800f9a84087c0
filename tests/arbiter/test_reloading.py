"""Reloading under load: by a call, SIGHUP, or a change on disk; a failure changes nothing."""

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import model_zoo
import pytest
from generations import BODY, fault, inferring, save_broken, status, times, wait_until_replaced
from service import serve, write_config
from tritonclient import http as http_client

from ovms_rest.arbiter.reloading import MAX_DEATHS, Reloading
from ovms_rest.config import load_config
from ovms_rest.errors import LoadFailedError, NotFoundError, ReloadError, TryLaterError, UnavailableError
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.models.watching import stamp
from ovms_rest.resources.arbiter_client import ArbiterClient
from ovms_rest.resources.error_handlers import STATUSES
from ovms_rest.shared_memory.messages import Change


def reload(service):
    return service.request("POST", "/v1/config/reload")


def test_config_route_returns_the_status_of_all_models(served):
    answer = served.get("/v1/config")
    assert (answer.status, answer.json()) == (200, {"m": status("1"), "other": status("1")})


def test_repository_index_lists_states_and_reasons(served, tmp_path):
    save_broken(tmp_path / "m" / "2")
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


def make(path, load, models=None):
    """Make the arbiter's side of changes, given the function that loads models, and the workers' side."""
    models = models or ModelRegistry({})
    reloading = Reloading(path, models, load)
    return reloading, ArbiterClient(reloading.mailbox, models, lambda: False)


def run(reloading, *changes, renew=lambda has_changed: ""):
    reloading.run(changes, lambda: False, renew)


def ticket(number):
    return {"id": str(number), "writes": 0}


def load_nothing(configs, previous, housekeep):
    return {}


def test_outcome_is_that_of_the_workers_that_serve_in_the_end(tmp_path):
    """The new workers may die at a model that was loaded."""
    config, models = write_config(tmp_path, {"name": "m", "base_path": "m"}), ModelRegistry({})
    reloading, client = make(config, lambda configs, previous, housekeep: {"m": Entry({1: None})}, models)
    asked, deferred = ticket(7), []

    def renew(has_changed):
        assert has_changed
        models.give_up("m/1", "died")
        with pytest.raises(TryLaterError) as caught:
            client.request(asked)
        deferred.append(caught.value)
        assert not caught.value.is_due()
        return ""

    run(reloading, Change(id="7"), renew=renew)
    assert deferred[0].is_due()
    with pytest.raises(LoadFailedError, match=r"^model 'm' version 1 died$"):
        client.request(asked)


def test_model_is_given_up_after_deaths_since_a_worker_that_opened_it_was_born(tmp_path):
    models = ModelRegistry({"m": Entry({1: None}), "n": Entry({1: None})})
    reloading, _ = make(tmp_path, load_nothing, models)
    for _ in range(MAX_DEATHS):
        reloading.count_death("m/1")
        reloading.forget_deaths(time.monotonic())
    assert models.versions("m") == ["1"]
    born = time.monotonic()
    for _ in range(MAX_DEATHS):
        assert models.versions("m") == ["1"]
        reloading.count_death("m/1")
        reloading.forget_deaths(born)
    assert models.versions("m") == []
    assert models.versions("n") == ["1"]


def test_deaths_in_the_previous_generation_do_not_hide_those_in_the_next(tmp_path):
    models = ModelRegistry({"m": Entry({1: None})})
    reloading, _ = make(tmp_path, load_nothing, models)
    for _ in range(MAX_DEATHS):
        reloading.count_death("m/1")
    models.replace(ModelRegistry({"m": Entry({1: None})}))  # loaded again meanwhile
    for _ in range(MAX_DEATHS):
        assert models.versions("m") == ["1"]
        reloading.count_death("m/1")
    assert models.versions("m") == []


def test_reload_is_unavailable_while_the_new_workers_do_not_become_ready(tmp_path):
    reloading, client = make(write_config(tmp_path), load_nothing)
    run(reloading, Change(id="7"), renew=lambda has_changed: "the reason")
    with pytest.raises(UnavailableError, match=r"^the reason$"):
        client.request(ticket(7))


def test_bug_while_loading_is_reported_and_the_arbiter_lives(tmp_path, caplog):
    def load(configs, previous, housekeep):
        raise ZeroDivisionError("a bug")

    reloading, client = make(write_config(tmp_path), load)
    changed = []
    run(reloading, Change(id="7"), renew=lambda has_changed: changed.append(has_changed) or "")
    assert changed == [False]
    with pytest.raises(ReloadError, match="internal error; the reason is in the server's log") as caught:
        client.request(ticket(7))
    assert STATUSES[type(caught.value)] == 500
    assert "a bug" in caplog.text


@pytest.mark.parametrize(("action", "status"), [("load", 404), ("unload", 201)])
def test_change_of_a_model_that_a_reload_in_the_same_run_removes_has_an_outcome(tmp_path, action, status):
    """Changes that arrive while the arbiter loads run together afterwards."""
    models = ModelRegistry({})
    config = write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "n", "base_path": "n"})
    is_started = False

    def load(configs, previous, housekeep):
        if is_started:
            write_config(tmp_path, {"name": "n", "base_path": "n"})
        return {model.name: Entry({1: object()}) for model in configs}

    reloading, client = make(config, load, models)
    reloading.start(load_config(config), stamp(config))
    is_started = True
    if action == "unload":
        write_config(tmp_path, {"name": "n", "base_path": "n"})
    run(reloading, Change(action, "m", id="7"), Change(id="8"))
    assert list(models.entries) == ["n"]
    if status == 404:
        with pytest.raises(NotFoundError, match=r"^model 'm' is not in .* any more$"):
            client.load_model(ticket(7), "m", None)
    else:
        client.unload_model(ticket(7), "m", False)


def test_newest_outcome_arrives_after_any_number_of_long_ones(tmp_path):
    """Each of 4-byte characters, beside the status of thousands of models that do not serve for long reasons."""
    models = ModelRegistry({f"m{number}": Entry(reason="why " * 500) for number in range(3000)})

    def load(configs, previous, housekeep):
        raise LoadFailedError("\U0001f600" * 3000)

    reloading, client = make(write_config(tmp_path, {"name": "m", "base_path": "m"}), load, models)
    run(reloading, *[Change("load", "m", id=str(number)) for number in range(99)])
    run(reloading, Change("load", "m", id="99"))
    for number in (0, 99):
        with pytest.raises(LoadFailedError, match=r"^\U0001f600{500}$"):
            client.load_model(ticket(number), "m", None)
    assert client.status().keys() == models.entries.keys()


def test_outcomes_of_changes_that_run_together_all_arrive(tmp_path):
    reloading, client = make(write_config(tmp_path), load_nothing)
    run(reloading, *[Change(id=str(number)) for number in range(1000)])
    assert client.request(ticket(0)) == (False, {})
    assert client.request(ticket(999)) == (False, {})


def test_outcomes_that_cannot_be_published_are_published_with_the_next(tmp_path, caplog, monkeypatch):
    reloading, client = make(write_config(tmp_path), load_nothing)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: os.strerror(os.write(-1, b"")))
        run(reloading, Change(id="1"))
    assert "cannot publish the outcomes of 1 changes" in caplog.text
    with pytest.raises(TryLaterError):
        client.request(ticket(1))
    run(reloading, Change(id="2"))
    assert client.request(ticket(1)) == (False, {})


def test_outcome_is_kept_for_late_callers_but_not_for_ever(tmp_path):
    reloading, client = make(write_config(tmp_path), load_nothing)
    for number in range(300):
        run(reloading, Change(id=str(number)))
    assert client.request(ticket(100)) == (False, {})
    with pytest.raises(TryLaterError):
        client.request(ticket(1))


def test_reload_without_changes_is_a_200_and_replaces_no_worker(served):
    before = served.workers()
    answer = reload(served)
    assert (answer.status, answer.json()) == (200, {"m": status("1"), "other": status("1")})
    assert served.workers() == before


def test_new_version_is_served_when_the_call_returns_and_no_request_fails(served, tmp_path):
    with inferring(served, "m") as results:
        model_zoo.save(times(2), tmp_path / "m", 2)
        answer = reload(served)
        assert (answer.status, answer.json()) == (201, {"m": status("2"), "other": status("1")})
        for _ in range(8):
            assert served.infer("m", BODY).json()["model_version"] == "2"
    assert set(results) == {("1", 1.0), ("2", 2.0)}


def test_only_changed_models_are_compiled(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    assert reload(served).status == 201
    assert served.log.count("model 'm' version 2 is being tried") == 1
    assert served.log.count("model 'm' version 1 is being tried") == 1
    assert served.log.count("model 'other' version 1 is being tried") == 1


def test_model_changed_in_place_is_loaded_again(served, tmp_path):
    with inferring(served, "m") as results:
        model_zoo.save(times(5), tmp_path / "new")
        for name in ("model.bin", "model.xml"):
            (tmp_path / "new" / "1" / name).rename(tmp_path / "m" / "1" / name)
        assert reload(served).status == 201
    assert results[-1] == ("1", 5.0)


@pytest.mark.parametrize("version", [1, 2], ids=["in the place of the old one", "as a new version"])
def test_broken_model_is_reported_and_the_previous_version_keeps_serving(served, tmp_path, version):
    with inferring(served, "m") as results:
        shutil.rmtree(tmp_path / "m" / str(version), ignore_errors=True)
        save_broken(tmp_path / "m" / str(version))
        assert fault(reload(served)).startswith(f"412 model 'm' version {version} cannot read ")
    assert set(results) == {("1", 1.0)}
    versions = served.get("/v1/config").json()["m"]["model_version_status"]
    assert any(version["status"]["error_message"].startswith("cannot read ") for version in versions)


def test_reload_tries_a_broken_model_again(served, tmp_path):
    save_broken(tmp_path / "m" / "2")
    assert reload(served).status == 412
    assert reload(served).status == 412
    shutil.rmtree(tmp_path / "m" / "2")
    model_zoo.save(times(2), tmp_path / "m", 2)
    assert reload(served).json()["m"] == status("2")


def test_broken_config_is_a_400_and_changes_nothing(served, tmp_path):
    (tmp_path / "config.json").write_text('{"model_config_list": [{"config": {"nam": "m"}}]}')
    with inferring(served, "m"):
        assert re.match(r"400 .*model_config_list\[0\].config.nam: unknown key", fault(reload(served)))
        served.signal(signal.SIGHUP)
        served.wait_for(lambda: "reload failed; the service continues unchanged: " in served.log)


def test_statuses_mention_a_broken_config_until_it_is_repaired(served, tmp_path):
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


def test_reload_adds_and_removes_models_of_the_config(served, tmp_path):
    model_zoo.save(times(3), tmp_path / "third")
    write_config(tmp_path, {"name": "m", "base_path": "m"}, {"name": "third", "base_path": "third"})
    assert reload(served).json() == {"m": status("1"), "third": status("1")}
    assert served.get("/v2/models/other").status == 404
    assert served.infer("third", BODY).json()["outputs"][0]["data"] == [3, 6, 9, 12]


def test_sighup_reloads_without_a_failure(served, tmp_path):
    before = served.workers()
    with inferring(served, "m") as results:
        model_zoo.save(times(2), tmp_path / "m", 2)
        served.signal(signal.SIGHUP)
        served.wait_for(lambda: ("2", 2.0) in results)
        wait_until_replaced(served, before)
    assert results[-1] == ("2", 2.0)


def test_concurrent_reloads_all_return_with_the_new_generation(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(reload, [served] * 6))
    assert {answer.status for answer in answers} <= {200, 201}
    assert all(answer.json()["m"] == status("2") for answer in answers)


@pytest.mark.parametrize("control", ["", "127.0.0.1:0"], ids=["no control address", "a control address"])
def test_change_on_disk_is_served_without_a_call(tmp_path, control, config):
    """With a control address its worker watches the files."""
    variables = {"OVMS_REST_CONTROL_BIND": control}
    with serve(tmp_path, "-w", "2", config=config, **variables) as service, inferring(service, "m") as results:
        model_zoo.save(times(2), tmp_path / "m", 2)
        service.wait_for(lambda: ("2", 2.0) in results)
        write_config(tmp_path, {"name": "m", "base_path": "m", "model_version_policy": {"all": {}}})
        service.wait_for(lambda: service.get("/v2/models/m").json()["versions"] == ["1", "2"])


def test_broken_version_on_disk_is_tried_once(tmp_path, config):
    with serve(tmp_path, "-w", "1", config=config) as service:
        save_broken(tmp_path / "m" / "2")
        service.wait_for(lambda: "version 2 of model 'm' does not serve" in service.log)
        looks = time.monotonic() + 4  # four more looks at the disk
        service.wait_for(lambda: time.monotonic() > looks)
        assert service.log.count("model 'm' version 2 is being tried") == 1


def test_shutdown_does_not_wait_for_a_model_that_hangs(served, tmp_path):
    model_zoo.save(model_zoo.endless(), tmp_path / "m", 2)
    served.signal(signal.SIGHUP)
    served.wait_for(lambda: "model 'm' version 2 is being tried" in served.log)
    started = time.monotonic()
    served.process.terminate()
    assert served.process.wait(60) == 0
    assert time.monotonic() - started < 30, "it would have been tried for 300 s"


@pytest.mark.parametrize("options", [("-k", "sync"), ("-k", "gthread")])
def test_reloads_work_with_gunicorns_own_workers(tmp_path, options, config):
    with serve(tmp_path, "-w", "2", *options, config=config) as service:
        model_zoo.save(times(2), tmp_path / "m", 2)
        assert reload(service).json() == {"m": status("2")}


def test_control_address_reloads_too(start, tmp_path, config):
    path = tmp_path / "control"
    with start(2, config=config, OVMS_REST_CONTROL_BIND=f"unix:{path}") as service, inferring(service, "m"):
        model_zoo.save(times(2), tmp_path / "m", 2)
        assert reload(service).json() == {"m": status("2")}
        service.wait_for(lambda: len(service.workers()) == 3)
