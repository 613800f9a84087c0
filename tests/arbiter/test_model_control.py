"""Loading and unloading models by call, under load, with failures and restarts."""

import http.client
import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import model_zoo
import pytest
import service as services
from generations import BODY, fault, index, inferring, save_broken, status, times, wait_until_replaced
from service import write_config
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException


def serve(directory, *arguments, **variables):
    """Run a service on which this host may load and unload models in the directory, unless set otherwise."""
    settings = {"OVMS_REST_MODEL_CONTROL": "local", "OVMS_REST_MODEL_ROOTS": str(directory), **variables}
    return services.serve(directory, *arguments, **settings)


def control(service, what, model="m", body=None, **headers):
    path = f"/v2/repository/models/{model}/{what}"
    return service.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})


def load(service, model="m", config=None):
    return control(service, "load", model, None if config is None else {"parameters": {"config": json.dumps(config)}})


def unload(service, model="m"):
    return control(service, "unload", model)


def result(service, model="m"):
    """Infer; return the version and the first number of the result, or the error."""
    answer = service.infer(model, BODY)
    if answer.status != 200:
        return answer.status
    return answer.json()["model_version"], answer.json()["outputs"][0]["data"][0]


UNLOADED = [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}]


# --- What happens


def test_unloaded_model_is_a_404_that_says_how_to_get_it_back(served):
    assert (unload(served).status, unload(served).status) == (200, 200)
    message = "model 'm' does not serve: it was unloaded; POST /v2/repository/models/m/load serves it again"
    for answer in (served.infer("m", BODY), served.get("/v2/models/m"), served.get("/v2/models/m/ready")):
        assert (answer.status, answer.json()) == (404, {"error": message})


def test_unloaded_model_is_listed_and_does_not_make_the_service_unready(served):
    unload(served)
    assert index(served, "m") == UNLOADED
    assert served.request("POST", "/v2/repository/index", {"ready": True}).json() == [
        {"name": "other", "version": "1", "state": "READY"}
    ]
    assert served.get("/v1/config").json() == {"m": status("1", state="END"), "other": status("1")}
    assert served.get("/v2/health/ready").status == 200


def test_loading_and_unloading_a_model_does_not_affect_clients_of_another(served):
    with inferring(served, "other") as results:
        for _ in range(2):
            assert (unload(served).status, result(served)) == (200, 404)
            assert (load(served).status, result(served)) == (200, ("1", 1.0))
            results.wait_for_more(20)
    assert set(results) == {("1", 7.0)}


def test_no_worker_serves_an_unloaded_model_when_the_call_returns(served):
    """Connections opened before the call are included."""
    connections = [http.client.HTTPConnection("127.0.0.1", served.port, timeout=60) for _ in range(8)]
    for connection in connections:
        connection.request("POST", "/v2/models/m/infer", BODY)
        assert connection.getresponse().read()
    assert unload(served).status == 200
    for connection in connections:
        try:
            connection.request("POST", "/v2/models/m/infer", BODY)
            status = connection.getresponse().status
        except ConnectionError:  # it was closed meanwhile
            status = served.infer("m", BODY).status
        assert status == 404
        connection.close()


def test_load_serves_the_new_version_of_that_model_alone_without_a_failed_request(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    model_zoo.save(times(8), tmp_path / "other", 2)
    with inferring(served, "m") as results:
        assert load(served).status == 200
        assert {result(served) for _ in range(8)} == {("2", 2.0)}
    assert set(results) == {("1", 1.0), ("2", 2.0)}
    assert result(served, "other") == ("1", 7.0)
    assert served.request("POST", "/v1/config/reload").status == 201
    assert result(served, "other") == ("2", 8.0)


def test_load_of_an_unchanged_model_replaces_no_worker(served):
    before = served.workers()
    assert load(served).status == 200
    assert served.workers() == before


def test_load_reads_the_config_file_again_for_that_model(served, tmp_path):
    model_zoo.save(times(3), tmp_path / "third")
    names = ("m", "other", "third", "fourth")
    write_config(tmp_path, *({"name": name, "base_path": "third"} for name in names))
    assert load(served, "third").status == 200
    assert (result(served, "third"), result(served, "m")) == (("1", 3.0), ("1", 1.0))
    assert served.get("/v2/models/fourth").status == 404
    assert load(served, "m").status == 200
    assert result(served, "m") == ("1", 3.0)


def test_access_log_has_the_duration_of_a_call(tmp_path, config):
    """Since its arrival, not since the last check for the outcome, which takes microseconds."""
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_ACCESS_LOG="json") as service:
        assert unload(service).status == 200
        line = service.wait_for(lambda: re.search("^{.*/unload.*}$", service.log, re.MULTILINE))[0]
        assert json.loads(line)["total_us"] > 10_000  # a new worker was forked and is ready


# --- A configuration that comes with the call


def test_config_sent_with_a_load_overrides_the_file_until_the_next_load(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    config = {"model_version_policy": {"all": {}}, "shape": "(1,4)"}
    assert load(served, "m", {**config, "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}).status == 200
    assert served.get("/v2/models/m").json()["versions"] == ["1", "2"]
    served.request("POST", "/v1/config/reload")
    assert served.get("/v2/models/m").json()["versions"] == ["1", "2"]
    assert load(served, "m").status == 200
    assert served.get("/v2/models/m").json()["versions"] == ["2"]


def test_tritons_client_loads_with_tritons_keys(served, tmp_path):
    model_zoo.save(times(2), tmp_path / "m", 2)
    with InferenceServerClient(f"127.0.0.1:{served.port}", network_timeout=60) as client:
        client.load_model("m", config='{"backend": "openvino", "version_policy": {"specific": {"versions": [1]}}}')
        assert client.get_model_metadata("m")["versions"] == ["1"]
        client.unload_model("m")
        assert not client.is_model_ready("m")
        client.load_model("m")
        assert client.get_model_metadata("m")["versions"] == ["2"]
        with pytest.raises(InferenceServerException, match="files are not accepted over HTTP"):
            client.load_model("m", config="{}", files={"file:1/model.xml": b"x"})


def test_model_missing_in_the_file_is_loaded_by_its_path_unloaded_and_loaded_again(served, tmp_path):
    model_zoo.save(times(9), tmp_path / "new one")
    name = "new%20one"
    assert (load(served, name, {"base_path": "new one"}).status, result(served, name)) == (200, ("1", 9.0))
    assert (served.request("POST", "/v1/config/reload").status, result(served, name)) == (200, ("1", 9.0))
    assert (unload(served, name).status, result(served, name)) == (200, 404)
    assert (load(served, name).status, result(served, name)) == (200, ("1", 9.0))


def test_failing_config_changes_nothing(served):
    with inferring(served, "m"):
        assert re.match("412 .*shape", fault(load(served, "m", {"shape": "(1,y)"})))
    assert index(served, "m") == [{"name": "m", "version": "1", "state": "READY"}]
    assert served.request("POST", "/v1/config/reload").status == 200
    unload(served)
    assert load(served, "m", {"shape": "(1,y)"}).status == 412
    (status,) = index(served, "m")
    assert (status["state"], status["reason"][:7]) == ("UNAVAILABLE", "shape: ")


def test_failing_version_is_reported_and_the_previous_one_keeps_serving(served, tmp_path):
    save_broken(tmp_path / "m" / "2")
    assert fault(load(served)).startswith("412 model 'm' version 2 cannot read ")
    assert result(served) == ("1", 1.0)
    assert [entry["state"] for entry in index(served, "m")] == ["READY", "UNAVAILABLE"]


def test_unloaded_model_that_cannot_be_loaded_stays_unloaded(served, tmp_path):
    unload(served)
    shutil.rmtree(tmp_path / "m" / "1")
    save_broken(tmp_path / "m" / "1")
    refusal = fault(load(served))
    assert refusal.startswith("412 model 'm' version 1 cannot read ")
    reason = refusal.removeprefix("412 model 'm' version 1 ")
    assert index(served, "m") == [UNLOADED[0] | {"reason": reason}]
    (status,) = served.get("/v1/config").json()["m"]["model_version_status"]
    assert status["status"] == {"error_code": "UNKNOWN", "error_message": reason}
    message = fault(served.get("/v2/models/m/ready"))
    assert message.startswith(
        "404 model 'm' does not serve: it was unloaded, and could not be loaded again: version 1 "
    )
    assert served.get("/v2/health/ready").status == 200
    assert served.request("POST", "/v1/config/reload").status == 200
    assert unload(served).status == 200
    assert index(served, "m") == UNLOADED


# --- Mistakes


CONFIG = "parameters.config"
MISTAKES = [
    (b"[]", "the request is an array, expected an object or an empty body"),
    (b"{", "the request is not valid JSON: "),
    (b'{"parameters": []}', "parameters is an array, expected an object"),
    (b'{"parameters": {"config": {}}}', f"{CONFIG} is an object, expected a string with a JSON object"),
    (b'{"parameters": {"config": null}}', f"{CONFIG} is null, expected a string with a JSON object"),
    (b'{"parameters": {"config": "x"}}', f"{CONFIG} is not valid JSON: "),
    (
        b'{"parameters": {"config": "{\\n// mine\\n}"}}',
        f"{CONFIG} is not valid JSON: // begins a comment, which JSON does not have: ",
    ),
    (b'{"parameters": {"config": "[]"}}', f"{CONFIG} holds an array, expected an object"),
    (b'{"parameters": {"config": "{\\"shap\\": 1}"}}', "config.shap: unknown key; the nearest known one is 'shape'"),
    (b'{"parameters": {"config": "{\\"name\\": \\"x\\"}"}}', 'config.name: expected "m" as in the path, got "x"'),
    (b'{"parameters": {"config": "{\\"backend\\": \\"onnx\\"}"}}', 'config.backend: expected openvino, got "onnx"'),
    (b'{"parameters": {"config": "{}", "file:1/m.xml": "eA=="}}', "parameters.file:1/m.xml: files are not accepted"),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A service for requests that change nothing."""
    directory = tmp_path_factory.mktemp("asked")
    model_zoo.save(times(1), directory / "m")
    config = write_config(directory, {"name": "m", "base_path": "m"})
    with serve(directory, "-w", "1", config=config, OVMS_REST_MODEL_ROOTS="") as running:
        yield running


@pytest.mark.parametrize(("body", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_invalid_load_is_a_400_with_the_reason(asked, body, message):
    assert fault(control(asked, "load", "m", body)).startswith(f"400 {message}")


def test_new_model_needs_a_path(asked):
    assert fault(load(asked, "new", {})) == "400 config.base_path: is missing, and model 'new' is new"


def test_config_has_a_size_limit(asked):
    assert re.match("400 .*at most 65536 are allowed", fault(load(asked, "m", {"base_path": "x" * 70_000})))


def test_config_has_a_depth_limit(asked):
    deep = '{"a": ' * 300 + "1" + "}" * 300
    message = "400 the request is nested too deep, at most 253 levels are allowed"
    assert fault(control(asked, "load", "m", {"parameters": {"config": deep}})) == message


def test_unload_accepts_a_boolean_only(asked):
    answer = control(asked, "unload", "m", {"parameters": {"unload_dependents": 1}})
    assert fault(answer) == "400 parameters.unload_dependents is the number 1, expected a boolean"


@pytest.mark.parametrize("what", ["load", "unload"])
def test_unknown_model_is_a_404(asked, what):
    assert re.match("404 .*'x'", fault(control(asked, what, "x")))


def test_config_file_broken_in_the_meantime_is_reported(served, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert fault(load(served)).startswith(f"400 {tmp_path}/config.json: is not valid JSON: ")
    assert result(served) == ("1", 1.0)


# --- Where its paths may lead


def test_call_may_not_name_a_directory_outside_the_configured_models(asked, tmp_path):
    (tmp_path / "secret-name").touch()
    (tmp_path / "1").mkdir()
    cache = tmp_path / "cache"
    nested = json.dumps({"CPU": {"CACHE_DIR": str(cache)}})
    for model, config, key in (
        ("new", {"base_path": str(tmp_path)}, "base_path"),
        ("new", {"base_path": str(tmp_path / "absent")}, "base_path"),
        ("m", {"plugin_config": {"CACHE_DIR": str(cache)}}, "plugin_config.CACHE_DIR"),
        ("m", {"plugin_config": {"DEVICE_PROPERTIES": nested}}, ""),
    ):
        message = fault(load(asked, model, config))
        assert message.startswith(f"403 config.{key}")
        assert "secret-name" not in message
        assert key != "base_path" or "OVMS_REST_MODEL_ROOTS" in message
    assert not cache.exists()
    assert index(asked, "m") == [{"name": "m", "version": "1", "state": "READY"}]


def test_call_may_name_a_path_below_a_configured_model(served, tmp_path):
    model_zoo.save(times(5), tmp_path / "m" / "more")
    cache = tmp_path / "m" / "cache"
    assert load(served, "more", {"base_path": "m/more", "plugin_config": {"CACHE_DIR": str(cache)}}).status == 200
    assert result(served, "more") == ("1", 5.0)
    assert list(cache.glob("*.blob"))


# --- Who may


def test_proxy_may_not_load_and_unload_for_its_clients(asked):
    for what in ("load", "unload"):
        message = fault(control(asked, what, X_Forwarded_For="10.0.0.1"))
        assert re.match("403 .* is allowed from this host only, not through a proxy", message)
    assert index(asked, "m") == [{"name": "m", "version": "1", "state": "READY"}]


@pytest.mark.parametrize("path", ["/v2/repository/models/m/load", "/v2/repository/models/m/unload", "/v2/logging"])
def test_web_page_of_another_site_may_not_change_the_service(asked, path):
    headers = {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}
    assert re.match("403 .*OVMS_REST_MODEL_CONTROL is 'local'", fault(asked.request("POST", path, b"", headers)))


def test_web_page_of_another_site_may_not_reload_and_others_may(asked):
    path = "/v1/config/reload"
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
        what = "POST /v1/config/reload is not allowed for web pages of other sites: "
        assert fault(asked.request("POST", path, b"", headers)).startswith(f"403 {what}")
    for headers in ({}, {"X-Forwarded-For": "10.0.0.1"}, {"Sec-Fetch-Site": "same-origin"}):
        assert asked.request("POST", path, b"", headers).status == 200


def test_web_page_of_another_site_may_reload_where_changes_are_allowed_from_anywhere(tmp_path, config):
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_MODEL_CONTROL="all") as service:
        headers = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert service.request("POST", "/v1/config/reload", b"", headers).status == 200


def test_loading_is_forbidden_by_default_without_a_control_address(tmp_path, config):
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_MODEL_CONTROL="") as service:
        for answer in (load(service), unload(service), service.request("POST", "/v2/logging", {"log_info": False})):
            assert re.match("403 .*OVMS_REST_CONTROL_BIND sets one; OVMS_REST_MODEL_CONTROL=local would", fault(answer))
        assert service.get("/v2/logging").json()["log_info"]
        assert service.request("POST", "/v1/config/reload").status == 200
        assert "loading and unloading over HTTP: disabled, as OVMS_REST_CONTROL_BIND is not set" in service.log


def test_loading_is_forbidden_everywhere_when_turned_off(tmp_path, config):
    with serve(tmp_path, "-w", "1", config=config, OVMS_REST_MODEL_CONTROL="none") as service:
        assert (load(service).status, unload(service).status) == (403, 403)
        assert "model_repository" not in service.get("/v2").json()["extensions"]


def test_loading_is_allowed_on_the_control_address_only(tmp_path, config):
    settings = {"OVMS_REST_MODEL_CONTROL": "", "OVMS_REST_CONTROL_BIND": "127.0.0.1:0"}
    with serve(tmp_path, "-w", "1", config=config, **settings) as service:
        line = service.wait_for(lambda: next((line for line in service.log.splitlines() if "control addr" in line), ""))
        assert re.match("403 .* is allowed on the control address only, 127.0.0.1:0", fault(unload(service)))
        address = line.rpartition("/")[2].split()[0]
        page = {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}
        with InferenceServerClient(address, network_timeout=60) as client:
            for headers in (page, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                with pytest.raises(InferenceServerException, match="is not allowed for web pages of other sites"):
                    client.unload_model("m", headers=headers)
            assert result(service) == ("1", 1.0)
            client.unload_model("m", headers={"X-Forwarded-For": "10.0.0.1", "Host": "ovms.example"})
        assert result(service) == 404


# --- What outlives what


def test_unloaded_model_stays_unloaded_when_workers_die_and_serves_after_a_restart(tmp_path, config):
    with serve(tmp_path, "-w", "2", config=config, OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0") as service:
        unload(service)
        service.wait_for(lambda: len(service.workers()) == 2)
        before = service.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until_replaced(service, before)
        assert {result(service) for _ in range(8)} == {404}
        service.signal(signal.SIGHUP)
        service.wait_for(lambda: not set(service.workers()) & set(before) and service.log.count("Hang up") == 1)
        assert service.request("POST", "/v1/config/reload").status in (200, 201)
        assert index(service, "m") == UNLOADED
    with serve(tmp_path, "-w", "2", config=config) as service:
        assert result(service) == ("1", 1.0)


def test_worker_that_dies_while_a_model_loads_is_replaced_during_the_load(served, tmp_path):
    model_zoo.save(model_zoo.endless(), tmp_path / "m", 2)
    before = served.workers()
    served.signal(signal.SIGHUP)
    served.wait_for(lambda: "model 'm' version 2 is being tried" in served.log)
    os.kill(before[0], signal.SIGKILL)
    served.wait_for(lambda: len(set(served.workers()) - set(before)) == 2)  # one more is the process that tries
    assert {result(served, "other") for _ in range(8)} == {("1", 7.0)}
    assert served.log.count("model 'm' version 2 is being tried") == 1


def test_many_concurrent_calls_all_get_a_response(served):
    outcomes = []

    def run(calls):
        outcomes.extend(call(served).status for call in calls)

    def reload(service):
        return service.request("POST", "/v1/config/reload")

    plans = ([unload, load] * 3, [load, unload] * 3, [reload] * 4, [lambda service: load(service, "other")] * 4)
    with inferring(served, "other"), ThreadPoolExecutor() as pool:
        list(pool.map(run, plans))
    assert set(outcomes) <= {200, 201}
    assert len(outcomes) == 20
    load(served)
    assert result(served) == ("1", 1.0)


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_gunicorns_own_workers_load_and_unload_too(tmp_path, kind, config):
    with serve(tmp_path, "-w", "2", "-k", kind, config=config) as service:
        assert unload(service).status == 200
        assert {result(service) for _ in range(4)} == {404}
        assert load(service).status == 200
        assert {result(service) for _ in range(4)} == {("1", 1.0)}
