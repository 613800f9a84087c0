"""The files of deploy/kubernetes: valid by the real schemas, and their containers run as tests/helpers/pods.py says.

Helm's own code renders the chart. No cluster runs here: nothing is scheduled, mounted or routed.
"""

import contextlib
import copy
import http.client
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from importlib.util import find_spec

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import model_zoo
import numpy as np
import pytest
import slow_models
import yaml
from charts import CHART, KUBERNETES, MANIFESTS, objects, plain_manifests, render
from kserve_schema import DIRECTORY as KSERVE_SCHEMAS
from kserve_schema import KUBERNETES as KUBERNETES_DEFINITIONS
from pods import mount_config, replace, run
from referencing import Registry, Resource
from service import PATIENCE, ROOT, free_port, wait_for
from test_nginx import CLOSED, OPEN

from ovms_rest import __version__
from ovms_rest.flags import read_flags
from ovms_rest.resources.metrics import check_metrics_list
from ovms_rest.settings import read_settings
from ovms_rest.worker.worker import DRAIN_SECONDS

VERSIONS = ("1.27", "1.37")  # of Kubernetes: the chart's kubeVersion, and the newest that kubernetes-validate knows
README = (KUBERNETES / "README.md").read_text()

needs_helm = pytest.mark.skipif(
    not find_spec("helm_python"), reason="needs PyPI package helm-python-sdk, which has wheels for x86_64 alone"
)
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")

# Values that switch on what the defaults leave out; each variant is checked like the plain manifests.
VARIANTS = {
    "defaults": {},
    "claim": {"models": {"claim": "models"}, "serviceAccountName": "models", "priorityClassName": "high"},
    "download": {
        "models": {"download": {"uri": "s3://bucket/models", "secret": "bucket", "size": "1.5Gi"}},
        "address": "::",
        "tolerations": [{"key": "inference", "operator": "Exists"}],
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
    },
    "fixed": {
        "autoscaling": {"enabled": False},
        "replicas": 3,
        "networkPolicy": {"egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 4318}]}]},
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
        "imagePullSecrets": [{"name": "registry"}],
        "image": {"repository": "registry.example/ovms_rest", "tag": "1"},
        "arguments": ["--log_level", "DEBUG"],
        "env": {"OVMS_REST_MAX_WAITING": "128", "OVMS_REST_MODEL_CONTROL": "auto"},
        "podLabels": {"c": "d"},
        "podAnnotations": {"e": "f"},
    },
    "closed": {"networkPolicy": {"clients": [], "prometheus": []}},
    "open": {"networkPolicy": {"enabled": False}},
}


def load(*names):
    """Return the YAML documents of files of deploy/kubernetes."""
    return [found for name in names for found in yaml.safe_load_all((KUBERNETES / name).read_text())]


def manifests():
    return {found["kind"]: found for file in sorted(MANIFESTS.iterdir()) for found in load(file)}


DEPLOYMENT = manifests()["Deployment"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
POD_LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
POD_PAUSE = POD["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1]
RUNTIME, INFERENCE_SERVICE = load("kserve/runtime.yaml", "kserve/inference_service.yaml")


# --- The real schemas


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", manifests())
def test_manifest_is_valid_for_kubernetes(kind, version):
    kubernetes_validate.validate(manifests()[kind], version, strict=True)


@needs_helm
@pytest.mark.parametrize("variant", VARIANTS)
def test_chart_renders_objects_that_are_valid_for_kubernetes(variant):
    for found in objects(VARIANTS[variant]).values():
        for version in VERSIONS:
            kubernetes_validate.validate(found, version, strict=True)


def test_unknown_field_of_a_manifest_is_invalid():
    changed = copy.deepcopy(DEPLOYMENT)
    changed["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(changed, VERSIONS[-1], strict=True)


def validate_kserve(found):
    """Validate against KServe's Python SDK and CRDs and, for what is Kubernetes' own, kubernetes-validate."""
    path = f"kubernetes-json-schema/v{VERSIONS[-1]}.0-local-strict/_definitions.json"
    definitions = kubernetes_validate.utils.schema_contents(path, VERSIONS[-1])
    schema = json.loads((KSERVE_SCHEMAS / "schema.json").read_text())
    version = found["apiVersion"].removeprefix("serving.kserve.io/").capitalize()
    registry = Registry().with_resources(
        [
            (KUBERNETES_DEFINITIONS.partition("#")[0], Resource.from_contents(definitions)),
            ("kserve", Resource.from_contents(schema)),
        ]
    )
    reference = {"$ref": f"kserve#/$defs/{version}{found['kind']}"}
    jsonschema.validators.Draft202012Validator(reference, registry=registry).validate(found)


@pytest.mark.parametrize("found", [RUNTIME, INFERENCE_SERVICE], ids=lambda found: found["kind"])
def test_object_of_kserve_is_valid(found):
    validate_kserve(found)


@pytest.mark.parametrize(
    ("found", "change"),
    [
        (RUNTIME, lambda spec: spec.update(protocolVersion="v2")),
        (RUNTIME, lambda spec: spec.pop("containers")),
        (RUNTIME, lambda spec: spec["containers"][0].update(arg=[])),
        (RUNTIME, lambda spec: spec["supportedModelFormats"][0].update(autoSelect="yes")),
        (RUNTIME, lambda spec: spec["supportedModelFormats"][0].update(priority=0)),
        (RUNTIME, lambda spec: spec["supportedModelFormats"][0].pop("name")),
        (INFERENCE_SERVICE, lambda spec: spec["predictor"].update(scaleMetric="queue")),
        (INFERENCE_SERVICE, lambda spec: spec["predictor"]["model"]["modelFormat"].pop("name")),
        (INFERENCE_SERVICE, lambda spec: spec["predictor"]["model"].update(storageURI="")),
        (INFERENCE_SERVICE, lambda spec: spec["predictor"]["model"].pop("modelFormat")),
        (INFERENCE_SERVICE, lambda spec: spec["predictor"]["model"]["resources"].update(limit={})),
        (INFERENCE_SERVICE, lambda spec: spec.pop("predictor")),
    ],
    ids=lambda value: "" if callable(value) else value["kind"],
)
def test_mistake_in_an_object_of_kserve_is_invalid(found, change):
    changed = copy.deepcopy(found)
    change(changed["spec"])
    with pytest.raises(jsonschema.ValidationError):
        validate_kserve(changed)


# --- The chart


@needs_helm
def test_manifests_are_the_chart_with_its_default_values():
    """`python tests/helpers/charts.py` writes them anew."""
    assert {file.name: file.read_text() for file in MANIFESTS.iterdir()} == plain_manifests()


@needs_helm
def test_helm_lint_finds_nothing():
    import helm_python

    report = helm_python.lint(str(CHART), strict=True)
    assert [found for found in report["messages"] if found["error"] != "icon is recommended"] == []
    assert report["errors"] == []


@needs_helm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 3}, "'replica' not allowed"),
        ({"image": {"tga": "1"}}, "'tga' not allowed"),
        ({"models": {"download": {"url": "s3://b"}}}, "'url' not allowed"),
        ({"cpu": 1.5}, "want integer"),
        ({"memory": "2 GB"}, "does not match pattern"),
        ({"address": "10.0.0.1"}, "must be one of"),
        ({"env": {"OVMS_REST_MAX_WAITING": 128}}, "want string"),
        ({"config": {"model_config_list": [{"name": "digits"}]}}, "missing property 'config'"),
        ({"models": {"claim": "models", "download": {"uri": "s3://b"}}}, "'not' failed"),
    ],
    ids=str,
)
def test_chart_refuses_values(values, message):
    import helm_python

    with pytest.raises(helm_python.HelmError, match=message):
        render(values)


def schemas(schema, path=""):
    """Yield the path and the schema of each property, at all depths."""
    for name, found in schema.get("properties", {}).items():
        yield f"{path}.{name}", found
        yield from schemas(found, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield f"{path}[]", schema[key]
            yield from schemas(schema[key], f"{path}[]")


SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_schema_describes_and_types_every_value():
    found = [*schemas(SCHEMA), *((name, schema) for name, schema in SCHEMA["definitions"].items())]
    assert len(found) > 50
    for path, schema in found:
        assert schema.get("description"), path
        assert "type" in schema or "$ref" in schema, path
        if schema.get("type") == "object" and "properties" in schema and not path.startswith(".config"):
            assert schema["additionalProperties"] is False, path


def test_values_and_schema_have_the_same_keys():
    """The defaults name every key, except inside values that the cluster or the service checks."""

    def keys(values, schema):
        for name, value in values.items():
            yield name
            inner = schema["properties"][name]
            if isinstance(value, dict) and inner.get("additionalProperties") is False:
                yield from (f"{name}.{key}" for key in keys(value, inner))

    def described(schema):
        for name, inner in schema["properties"].items():
            yield name
            if inner.get("additionalProperties") is False:
                yield from (f"{name}.{key}" for key in described(inner))

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert sorted(keys(values, SCHEMA)) == sorted(described(SCHEMA))
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(values)


def test_chart_and_runtime_have_the_version_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert {POD["containers"][0]["image"], RUNTIME["spec"]["containers"][0]["image"]} == {f"ovms_rest:{__version__}"}


@needs_helm
def test_changed_config_is_a_new_configmap():
    """So old pods keep their config, and a rolling update brings the new one."""
    config = {"model_config_list": [{"config": {"name": "a", "base_path": "/models/a"}}]}
    before, after = objects(), objects({"config": config})
    assert json.loads(after["ConfigMap"]["data"]["config.json"]) == config
    names = [found["ConfigMap"]["metadata"]["name"] for found in (before, after)]
    assert len({*names}) == 2
    for found, name in zip((before, after), names, strict=True):
        assert found["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"] == name


@needs_helm
def test_notes_name_the_source_of_models_and_the_autoscaler():
    assert "demo of the image" in render()["NOTES.txt"]
    other = render({"models": {"claim": "models"}, "autoscaling": {"enabled": False}})["NOTES.txt"]
    assert "demo" not in other
    assert "autoscaler" not in other


@needs_helm
@pytest.mark.parametrize(
    ("values", "is_warned"),
    [
        ({}, False),
        ({"service": {"type": "LoadBalancer"}}, True),
        ({"service": {"type": "NodePort"}, "networkPolicy": {"clients": []}}, True),
        ({"service": {"type": "NodePort"}, "networkPolicy": {"enabled": False}}, False),
        (
            {"service": {"type": "LoadBalancer"}, "networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
            False,
        ),
    ],
    ids=str,
)
def test_notes_warn_of_a_service_whose_clients_the_policy_drops(values, is_warned):
    assert ("WARNING" in (notes := render(values)["NOTES.txt"])) == is_warned, notes
    assert "\n\n\n" not in notes


@needs_helm
def test_variables_of_the_chart_are_settings_and_the_values_win():
    (container,) = objects(VARIANTS["fixed"])["Deployment"]["spec"]["template"]["spec"]["containers"]
    variables = {item["name"]: item["value"] for item in container["env"]}
    assert len(variables) == len(container["env"])
    settings = read_settings(variables)
    assert (settings.max_waiting, settings.model_control, settings.metrics_enable) == (128, "auto", True)
    assert settings.control_bind == "0.0.0.0:9000"


# --- The numbers


def test_grace_period_covers_pre_stop_and_the_graceful_timeout():
    (container,) = POD["containers"]
    (graceful,) = [item["value"].split() for item in container["env"] if item["name"] == "GUNICORN_CMD_ARGS"]
    assert graceful[0] == "--graceful-timeout"
    assert POD["terminationGracePeriodSeconds"] == int(POD_PAUSE) + int(graceful[1]) + 10
    predictor = INFERENCE_SERVICE["spec"]["predictor"]
    assert predictor["model"]["lifecycle"] == container["lifecycle"]
    assert predictor["terminationGracePeriodSeconds"] == POD["terminationGracePeriodSeconds"]


def test_pods_have_whole_cores_and_their_requests_are_their_limits():
    """So that the kubelet gives each pod the quality of service Guaranteed, and the service one worker per core."""
    for container in (
        *POD["containers"],
        *RUNTIME["spec"]["containers"],
        INFERENCE_SERVICE["spec"]["predictor"]["model"],
    ):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["cpu"]) >= 1


def test_selectors_select_the_pods():
    found = manifests()
    labels = POD_LABELS.items()
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in POD["topologySpreadConstraints"]),
    ]
    assert all(selector.items() <= labels for selector in selectors)
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert "replicas" not in DEPLOYMENT["spec"]  # an apply would undo the autoscaler's number


def test_only_prometheus_may_reach_the_control_address():
    rules = manifests()["NetworkPolicy"]["spec"]["ingress"]
    control = [rule for rule in rules if {"port": "control"} in rule["ports"]]
    assert [list(rule["from"][0]) for rule in control] == [["namespaceSelector"]]
    assert all(rule["ports"] and rule["from"] for rule in rules)  # without either a rule allows everything
    assert [port["name"] for port in manifests()["Service"]["spec"]["ports"]] == ["http"]


@needs_helm
def test_only_a_download_may_open_connections():
    egress = {name: objects(values).get("NetworkPolicy") for name, values in VARIANTS.items()}
    assert egress["defaults"]["spec"]["egress"] == egress["claim"]["spec"]["egress"] == []
    assert egress["download"]["spec"]["egress"] == [{}]
    assert egress["open"] is None


# --- The Deployment's container


@contextlib.contextmanager
def run_deployment(directory, config=None):
    """Run the container of the manifests, with another config if one is given."""
    found = manifests()
    ports = {8000: free_port(), 9000: free_port()}
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    text = found["ConfigMap"]["data"]["config.json"] if config is None else json.dumps(config)
    mount_config(replace(text, {"/models/": f"{directory / 'models'}/"}), directory / "config")
    flags = {"0.0.0.0": "127.0.0.1", "8000": str(ports[8000]), "/config/": f"{directory / 'config'}/"}  # noqa: S104
    # A kubelet uses the address of the pod, so it must not be that of the loopback interface.
    variables = {"0.0.0.0:9000": f"127.0.0.1:{ports[9000]}"}
    started = {**container, "args": replace(container["args"], flags), "env": replace(container["env"], variables)}
    with run(started, directory, ports) as running:
        yield running


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    """The container of the manifests, with the demo's model at /models as in the image."""
    directory = tmp_path_factory.mktemp("pod")
    shutil.copytree(ROOT / "ovms_rest" / "demo" / "digits", directory / "models" / "digits")
    with run_deployment(directory) as running:
        yield running


def wait_for_probes(pod):
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        pod.service.wait_for(lambda name=name: pod.probe(name))


def test_probes_of_the_deployment_succeed_and_it_infers(pod):
    wait_for_probes(pod)
    assert pod.service.port == pod.port("http")
    request = (ROOT / "ovms_rest" / "demo" / "samples" / "digit-7.json").read_bytes()
    assert pod.service.infer("digits", request).json()["outputs"][0]["data"] == [7]


def test_control_address_of_the_deployment_gives_metrics_and_refuses_model_control(pod):
    wait_for_probes(pod)
    control = copy.copy(pod.service)
    control.port = pod.port("control")
    assert control.get("/metrics").status == 200
    assert control.request("POST", "/v2/repository/models/digits/unload").status == 403


def test_data_port_of_the_deployment_serves_the_routes_that_the_readme_names(pod):
    wait_for_probes(pod)
    for path in ("/metrics", "/v1/config", "/v2/logging"):
        assert pod.service.get(path).status == 200, path
    for path in ("/v2/repository/index", "/v1/config/reload"):
        assert pod.service.request("POST", path, {}).status == 200, path
    for path in ("/v2/repository/models/digits/load", "/v2/repository/models/digits/unload", "/v2/logging"):
        assert pod.service.request("POST", path, {}).status == 403, path
    assert pod.service.get("/console").status == 404


def test_ready_probe_fails_and_live_probe_succeeds_while_a_model_does_not_serve(tmp_path):
    config = {"model_config_list": [{"config": {"name": "missing", "base_path": "/models/missing"}}]}
    with run_deployment(tmp_path, config) as pod:
        pod.service.wait_for(lambda: pod.probe("startupProbe"))
        assert pod.probe("livenessProbe")
        assert not pod.probe("readinessProbe")


# --- The end of a pod


def send_count(connection, model, steps):
    """Send an inference that takes this many steps of a loop."""
    body = {"inputs": [{"name": "steps", "datatype": "INT64", "shape": [], "data": [steps]}]}
    connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))


def receive_count(connection, steps):
    """Check the response; return whether the service keeps the connection open."""
    response = connection.getresponse()
    answer = response.read()
    assert (response.status, json.loads(answer)["outputs"][0]["data"]) == (200, [steps]), answer
    return not response.will_close


class Load:
    """Clients that repeat inferences until the block ends, every other one on a new connection each time.

    None opens a connection once `removed` is set. `failures` are all requests and connections that failed, except those
    on connections that were idle while the service ended.
    """

    def __init__(self, port, model, clients=4):
        self.removed = threading.Event()  # the pod is no endpoint of the Service any more
        self.failures, self.counts = [], [0] * clients
        self._is_over = threading.Event()
        self._port, self._model = port, model
        self._threads = [threading.Thread(target=self._repeat, args=(index,)) for index in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _repeat(self, index):
        while not (self.removed.is_set() or self._is_over.is_set()):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            with contextlib.closing(connection):
                is_open, sent = True, math.inf
                while is_open and not self._is_over.is_set():
                    previous, sent = sent, time.monotonic()
                    try:
                        send_count(connection, self._model, 5_000)
                        is_open = receive_count(connection, 5_000) and index % 2
                    except Exception as error:
                        # A service that ends closes idle connections: this request was too late for it.
                        is_late = self.removed.is_set() and time.monotonic() - previous > DRAIN_SECONDS
                        if not (is_late and isinstance(error, ConnectionError)):
                            self.failures.append(error)
                        return
                    self.counts[index] += 1


def end_under_load(pod, model):
    """End a pod as a kubelet does, and check that all requests succeed; return the seconds that it took.

    The clients keep their connections until the service closes them, and open new ones until preStop is over.
    """
    service = pod.service
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
    with Load(service.port, model) as load, contextlib.closing(connection):
        service.wait_for(lambda: all(load.counts))
        begin, before = time.monotonic(), sum(load.counts)
        pod.pre_stop()
        during = sum(load.counts)
        assert during > before
        assert pod.probe("livenessProbe")
        send_count(connection, model, 20 * slow_models.SLOW)
        load.removed.set()
        service.process.terminate()
        is_open = receive_count(connection, 20 * slow_models.SLOW)
        assert service.process.wait(PATIENCE) == 0, service.log
        took = time.monotonic() - begin
    assert load.failures == []
    assert sum(load.counts) > during
    assert not is_open
    return took


COUNTING = {"model_config_list": [{"config": {"name": "counting", "base_path": "/models/counting"}}]}


def test_pod_ends_under_load_without_a_failed_request(tmp_path):
    model_zoo.save(slow_models.counting(), tmp_path / "models" / "counting")
    with run_deployment(tmp_path, COUNTING) as pod:
        wait_for_probes(pod)
        assert end_under_load(pod, "counting") < POD["terminationGracePeriodSeconds"]


# --- The autoscaler's metric


ADAPTER = load("prometheus-adapter.yaml")[0]["rules"]["custom"][0]


def test_autoscaler_and_adapter_name_the_same_metric():
    (metric,) = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == ADAPTER["name"]["as"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "700m"}


def test_adapter_reads_metrics_that_the_service_exposes_by_default():
    used = set(re.findall(r"ovms\w+", ADAPTER["seriesQuery"] + ADAPTER["metricsQuery"]))
    assert used == {"ovms_request_time_us_sum", "ovms_streams"}
    check_metrics_list(",".join(name.removesuffix("_sum") for name in used))


def rendered_query(window):
    """Return the adapter's query for a pod, with the window of its rate replaced, since rate() extrapolates little."""
    query = ADAPTER["metricsQuery"]
    for name, text in {
        "Series": "ovms_request_time_us_sum",
        "LabelMatchers": 'namespace="default",pod="a"',
        "GroupBy": "pod",
    }.items():
        query = query.replace(f"<<.{name}>>", text)
    assert "<<" not in query
    assert query.count("[1m]") == 1
    return query.replace("[1m]", f"[{window}]")


def scrape_job(pod):
    """Return prometheus.yml with what the discovery would find for a pod instead of the discovery."""
    config = load("prometheus.yml")[0]
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]  # Debian's Prometheus is built without it
    found = {
        "__meta_kubernetes_namespace": "default",
        "__meta_kubernetes_pod_name": "a",
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": POD_LABELS["app.kubernetes.io/name"],
        "__meta_kubernetes_pod_label_app_kubernetes_io_instance": POD_LABELS["app.kubernetes.io/instance"],
    }
    job["static_configs"] = [
        {
            "targets": [f"127.0.0.1:{pod.port(name)}"],
            "labels": {**found, "__meta_kubernetes_pod_container_port_name": name},
        }
        for name in ("http", "control")
    ]
    return config | {"scrape_configs": [job | {"scrape_interval": "500ms"}]}


@contextlib.contextmanager
def run_prometheus(directory, config):
    """Start a Prometheus; yield a function that returns the values of a query by pod."""
    port = free_port()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = {
        "config.file": directory / "prometheus.yml",
        "storage.tsdb.path": directory / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *(f"--{name}={value}" for name, value in options.items())], stdout=log, stderr=log
        )

    def query(expression):
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=PATIENCE) as response:
            result = json.load(response)["data"]["result"]
            return {item["metric"].get("pod"): float(item["value"][1]) for item in result}
        return {}

    try:
        yield query
    finally:
        process.terminate()
        process.wait(PATIENCE)


@needs_prometheus
def test_metric_of_the_autoscaler_is_requests_in_progress_per_worker(tmp_path):
    """It is 0 without requests, and with eight clients of two workers 4, of which 3 are queued."""
    model_zoo.save(slow_models.counting(), tmp_path / "models" / "counting")
    with run_deployment(tmp_path, COUNTING) as pod, run_prometheus(tmp_path, scrape_job(pod)) as query:
        log, expression = (tmp_path / "prometheus.log").read_text, rendered_query("4s")
        wait_for(lambda: query(expression) == {"a": 0}, log)
        assert query("up") == {"a": 1}  # the port of the clients is not scraped
        # The labels by which alerts.yml finds pods.
        assert query('up{job="ovms_rest",namespace="default",release="ovms-rest",pod="a",instance="a"}') == {"a": 1}
        workers = query("max by (pod) (ovms_streams)")["a"]
        with Load(pod.service.port, "counting", clients=8) as load:
            wait_for(lambda: 3 <= query(expression).get("a", 0) * workers / 2 <= 5, log)
        assert load.failures == []


def test_alert_for_a_pod_waits_until_the_startup_probe_has_given_up():
    (group,) = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yml").read_text())["groups"]
    (wait,) = [rule["for"] for rule in group["rules"] if rule["alert"] == "OvmsRestPodDown"]
    probe = POD["containers"][0]["startupProbe"]
    assert int(wait.removesuffix("m")) * 60 > probe["periodSeconds"] * probe["failureThreshold"]


# --- KServe


def kserve_container(name):
    """Return the container that KServe makes of the runtime and the InferenceService, and its model's name."""
    (container,) = RUNTIME["spec"]["containers"]
    model = INFERENCE_SERVICE["spec"]["predictor"]["model"]
    merged = {**container, **{key: value for key, value in model.items() if key in ("lifecycle", "resources")}}
    return json.loads(json.dumps(merged).replace("{{.Name}}", name))


@contextlib.contextmanager
def run_runtime(directory):
    """Run the container with the model at DIRECTORY/models."""
    name, port = INFERENCE_SERVICE["metadata"]["name"], free_port()
    container = kserve_container(name)
    texts = {"/mnt/models": str(directory / "models"), "8080": str(port), "0.0.0.0": "127.0.0.1"}  # noqa: S104
    # The pause of preStop is that of the Deployment, which another test takes in full.
    paused = replace({"lifecycle": container["lifecycle"]}, {POD_PAUSE: "1"})
    with run({**container, **paused, "args": replace(container["args"], texts)}, directory, {8080: port}) as pod:
        wait_for_probes(pod)
        yield pod, name


def test_runtime_serves_a_directory_of_versions_and_ends_under_load_without_a_failed_request(tmp_path):
    """The directory is a link, as that of a modelcar."""
    model_zoo.save(slow_models.counting(), tmp_path / "elsewhere")
    (tmp_path / "models").symlink_to("elsewhere")
    with run_runtime(tmp_path) as (pod, name):
        assert pod.service.get(f"/v2/models/{name}").json()["versions"] == ["1"]
        assert end_under_load(pod, name) < INFERENCE_SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"]


def test_runtime_serves_a_model_without_a_directory_per_version_by_both_protocols(tmp_path):
    shutil.copytree(ROOT / "ovms_rest" / "demo" / "digits" / "1", tmp_path / "models")
    with run_runtime(tmp_path) as (pod, name):
        request = json.loads((ROOT / "ovms_rest" / "demo" / "samples" / "digit-7.json").read_bytes())
        assert pod.service.infer(name, request).json()["outputs"][0]["data"] == [7]
        (tensor,) = request["inputs"]
        pixels = np.reshape(tensor["data"], tensor["shape"]).tolist()
        answer = pod.service.request("POST", f"/v1/models/{name}:predict", {"instances": pixels})
        assert answer.status == 200, answer.body
        assert pod.service.get(RUNTIME["spec"]["annotations"]["prometheus.kserve.io/path"]).status == 200
        # As README.md says: the routes of the Deployment's data port, and the console.
        for path in ("/v1/config", "/v2/logging", "/console"):
            assert pod.service.get(path).status == 200, path
        for path in ("/v2/repository/index", "/v1/config/reload"):
            assert pod.service.request("POST", path, {}).status == 200, path
        for path in (f"/v2/repository/models/{name}/load", f"/v2/repository/models/{name}/unload", "/v2/logging"):
            assert pod.service.request("POST", path, {}).status == 403, path


def test_probes_and_metrics_of_the_runtime_use_its_only_port():
    """KServe's Knative mode allows one port."""
    (container,) = RUNTIME["spec"]["containers"]
    (port,) = container["ports"]
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(port["containerPort"])
    probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {probe["httpGet"]["port"] for probe in probes} == {port["containerPort"]}
    assert "lifecycle" not in container  # Knative refuses it


def test_runtime_mounts_its_volumes():
    mounted = {item["name"] for item in RUNTIME["spec"]["containers"][0]["volumeMounts"]}
    assert mounted == {item["name"] for item in RUNTIME["spec"]["volumes"]}


# The arguments of other runtimes for OVMS: KServe's config/runtimes/kserve-openvino.yaml, Open Data Hub's kserve-ovms.
OVMS_RUNTIMES = {
    "KServe": "--model_name=digits --model_path=/mnt/models --port=9000 --rest_port=8080"
    " --file_system_poll_wait_seconds=0",
    "Open Data Hub": "--model_name=digits --port=8001 --rest_port=8888 --model_path=/mnt/models"
    " --file_system_poll_wait_seconds=0 --grpc_bind_address=0.0.0.0 --rest_bind_address=0.0.0.0 --target_device=AUTO"
    " --metrics_enable",
}


@pytest.mark.parametrize("arguments", OVMS_RUNTIMES.values(), ids=OVMS_RUNTIMES)
def test_flags_of_other_runtimes_for_ovms_are_accepted(arguments):
    (model,) = read_flags(arguments.split(), 1).models
    assert (model["name"], model["base_path"]) == ("digits", "/mnt/models")


# --- The README


@pytest.mark.parametrize("version", VERSIONS)
def test_ingress_of_the_readme_is_valid_and_passes_on_no_route_of_operators(version):
    (text,) = [text for text in re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S) if "kind: Ingress" in text]
    ingress = yaml.safe_load(text)
    kubernetes_validate.validate(ingress, version, strict=True)
    paths = [(item["path"], item["pathType"]) for item in ingress["spec"]["rules"][0]["http"]["paths"]]

    def is_passed_on(route):
        return any(route == path or (kind == "Prefix" and route.startswith(f"{path}/")) for path, kind in paths)

    service = manifests()["Service"]
    for item in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert item["backend"]["service"]["name"] == service["metadata"]["name"]
        assert item["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert {route for _, route in OPEN if not is_passed_on(route.partition("?")[0].rstrip("/"))} == {"/"}
    assert not [route for _, route in CLOSED if is_passed_on(route)]


def test_commands_of_the_readme_write_the_pushed_image_into_the_files_once(tmp_path):
    (block,) = [text for text in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S) if "docker push" in text]
    tag, push, write = block.splitlines()
    image = f"registry.example/ovms_rest:{__version__}"
    assert (tag, push) == (f"docker tag ovms_rest {image}", f"docker push {image}")
    container = (ROOT / "deploy" / "container" / "README.md").read_text()
    assert "docker build -f deploy/container/Containerfile -t ovms_rest ." in container
    shutil.copytree(KUBERNETES, tmp_path / "deploy" / "kubernetes")
    for _ in range(2):
        subprocess.run(["sh", "-c", write], cwd=tmp_path, check=True)
    for name in ("manifests/deployment.yaml", "kserve/runtime.yaml"):
        written = (tmp_path / "deploy" / "kubernetes" / name).read_text()
        assert re.findall(r"image: \"?([^\"\s]+)", written) == [image]
    assert f"--set image.repository={image.rpartition(':')[0]}\n" in README


def test_readme_names_every_file():
    names = {file.name for file in KUBERNETES.iterdir()} - {"README.md"}
    assert names <= set(re.findall(r"`([\w./-]+?)/?`", README))
