"""The files of deploy/monitoring with the real promtool and a real Prometheus that scrapes a real service.

Prometheus runs the queries of the dashboard. Grafana itself is not tested, as no package registry here has it.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service import PATIENCE, ROOT, free_port, serve, wait_for

from ovms_rest.resources.metrics import DEFAULT_METRICS, check_metrics_list
from ovms_rest.shared_memory.statistics import FailureKind

DIRECTORY = ROOT / "deploy" / "monitoring"
ALERTS = (DIRECTORY / "alerts.yml").read_text()
DASHBOARD = json.loads((DIRECTORY / "dashboard.json").read_text())
README = (DIRECTORY / "README.md").read_text()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# By the panel's title and the query's letter.
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}

# The panels of OVMS's own dashboard (extras/grafana_dashboard.json) as in its docs/metrics.md, for its variables
# model_name=digits, model_version=1 and interface=REST.
_OF_MODEL = 'name="digits", version="1"'
_REQUESTS = f'{_OF_MODEL}, interface="REST"'
OVMS_PANELS = {
    "Throughput [RPS]": f'sum(rate(ovms_requests_success{{{_REQUESTS}, method=~"ModelInfer|Predict"}}[1m]))',
    "Mean Latency [ms]": f"sum(rate(ovms_request_time_us_sum{{{_REQUESTS}}}[1m])) / 1000"
    f" / sum(rate(ovms_request_time_us_count{{{_REQUESTS}}}[1m]))",
    **{
        f"Latency Quantile [ms] {quantile}": f"histogram_quantile({quantile},"
        f" sum by (le) (rate(ovms_request_time_us_bucket{{{_REQUESTS}}}[1m]))) / 1000"
        for quantile in (0.75, 0.90, 0.99)
    },
    "Latency Distribution [%]": f"100 * sum by (le) (rate(ovms_request_time_us_bucket{{{_REQUESTS}}}[1m]))"
    f" / scalar(sum(rate(ovms_request_time_us_count{{{_REQUESTS}}}[1m])))",
    "Mean Inference Time [ms]": f"sum(rate(ovms_inference_time_us_sum{{{_OF_MODEL}}}[1m])) / 1000"
    f" / sum(rate(ovms_inference_time_us_count{{{_OF_MODEL}}}[1m]))",
    "Mean Time of Request Waiting For Inference [ms]": "sum(rate(ovms_wait_for_infer_req_time_us_sum"
    f"{{{_OF_MODEL}}}[1m])) / 1000 / sum(rate(ovms_wait_for_infer_req_time_us_count{{{_OF_MODEL}}}[1m]))",
    "Currently Processed Requests": f"sum(ovms_current_requests{{{_OF_MODEL}}})",
}
# Copies of that dashboard read two buckets by their bounds, for an apdex score.
OVMS_BOUNDS = ("67466", "218591")

# The condition of an alert, on one line or in a block.
_EXPRESSION = r"expr: (?:\|\n((?: {10}.*\n)+)|(.*)\n)"
CONDITIONS = [" ".join((block or line).split()) for block, line in re.findall(_EXPRESSION, ALERTS)]

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")


def promtool(*arguments, text=None):
    done = subprocess.run(["promtool", *arguments], cwd=DIRECTORY, input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# --- A service, and a Prometheus that scrapes it


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The control address of a service with the demo that has had requests, and a function that sends more."""
    variables = {"OVMS_REST_CONTROL_BIND": "127.0.0.1:0", "OVMS_REST_METRICS_ENABLE": "true"}
    with serve(tmp_path_factory.mktemp("service"), "-w", "2", **variables) as service:
        found = service.wait_for(lambda: re.search(r"control address: http://(127\.0\.0\.1:\d+)", service.log))
        service.wait_for_workers(3)
        ask(service)
        yield found[1], lambda: ask(service)


def ask(service):
    """Infer with the model and the pipeline, send an invalid request, and request metadata and readiness."""
    samples = ROOT / "ovms_rest" / "demo" / "samples"
    assert service.infer("digits", (samples / "digit-7.json").read_bytes()).status == 200
    picture = (samples / "number-65902-101.bin").read_bytes()
    assert service.infer("number", picture, Inference_Header_Content_Length="101").status == 200
    assert service.infer("digits", b"{}").status == 400
    for path in ("/v2/models/digits", "/v2/models/digits/ready"):
        assert service.get(path).status == 200


@pytest.fixture(scope="module")
def metrics(control):
    with urllib.request.urlopen(f"http://{control[0]}/metrics", timeout=PATIENCE) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def labels(metrics):
    """The labels of every metric with their values, and the labels that Prometheus adds."""
    found = {"up": {}}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            for label, value in sample.labels.items():
                found.setdefault(name, {}).setdefault(label, set()).add(value)
            found.setdefault(name, {})
    for of_one in found.values():
        of_one |= {"job": {"ovms_rest"}, "instance": {"127.0.0.1:9000"}}
    # Those of deploy/kubernetes/prometheus.yml, whose test has them; empty on a host.
    found["up"] |= {"namespace": {""}, "release": {""}, "pod": {""}}
    return found


@pytest.fixture(scope="module")
def prometheus(control, tmp_path_factory):
    """A function that queries a Prometheus with our config, except for its port and a scrape every second."""
    directory, port = tmp_path_factory.mktemp("prometheus"), free_port()
    shutil.copy(DIRECTORY / "alerts.yml", directory)
    config = (DIRECTORY / "prometheus.yml").read_text().replace("127.0.0.1:9000", control[0]).replace("15s", "1s")
    (directory / "prometheus.yml").write_text(config)

    def query(path, **parameters):
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return json.load(response)["data"]

    options = {
        "config.file": directory / "prometheus.yml",
        "storage.tsdb.path": directory / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *(f"--{name}={value}" for name, value in options.items())],
            stdout=log,
            stderr=log,
        )

    def has_rates():
        assert process.poll() is None, (directory / "log").read_text()
        with contextlib.suppress(OSError, ValueError):  # it does not respond yet, or has no sample
            control[1]()  # requests continue, so that there are rates after three scrapes
            (series,) = query("query", query="count_over_time(up[1m])")["result"]
            return int(series["value"][1]) >= 3

    try:
        wait_for(has_rates, (directory / "log").read_text)
        yield query
    finally:
        process.terminate()
        process.wait(PATIENCE)


def fill(expression):
    """Replace Grafana's variables."""
    variables = {"$__rate_interval": "1m", "$__range": "1m", "$instance": ".*", "$model": ".*"}
    return re.sub(r"\$\w+", lambda found: variables[found[0]], expression)


def values(query, expression):
    return [float(series["value"][1]) for series in query("query", query=fill(expression))["result"]]


# --- The files by themselves


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml")], ids=" ".join
)
def test_promtool_finds_nothing(arguments):
    code, output = promtool(*arguments)
    assert code == 0, output
    assert "SUCCESS" in output


@needs_promtool
def test_alerts_fire_when_they_should():
    code, output = promtool("test", "rules", "alerts.test.yml")
    assert code == 0, output


@pytest.mark.parametrize("alert", re.findall(r"- alert: (\w+)", ALERTS))
def test_every_alert_is_tested_to_fire_and_not_to_fire(alert):
    tests = (DIRECTORY / "alerts.test.yml").read_text()
    assert f"alertname: {alert}, exp_alerts: []}}" in tests
    assert f"alertname: {alert}\n        exp_alerts:\n          - exp_labels:" in tests


@needs_promtool
def test_tests_of_the_alerts_fail_when_none_fires(tmp_path):
    shutil.copy(DIRECTORY / "alerts.test.yml", tmp_path)
    conditions = iter(CONDITIONS)
    (tmp_path / "alerts.yml").write_text(re.sub(_EXPRESSION, lambda _: f"expr: ({next(conditions)}) > Inf\n", ALERTS))
    code, output = promtool("test", "rules", str(tmp_path / "alerts.test.yml"))
    assert code == 1
    assert set(re.findall(r"alertname: (\w+)", output)) == set(re.findall(r"- alert: (\w+)", ALERTS))


def test_panels_have_unique_ids_titles_and_places_and_a_description():
    for key in ("id", "title"):
        assert len({panel[key] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert all(panel["description"].endswith(".") for panel in PANELS)
    used = {name for text in QUERIES.values() for name in re.findall(r"\$(?!__)(\w+)", text)}
    assert used | {"datasource"} == {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_dashboard_and_alert_count_the_same_kinds_as_errors():
    """All but clients' mistakes and closed connections."""
    (alert,) = [text for text in CONDITIONS if "> 0.01" in text]
    errors = set(re.findall(r'kind=~"([^"]*)"', alert + "".join(QUERIES.values())))
    assert [set(kinds.split("|")) for kinds in errors] == [{*get_args(FailureKind)} - {"invalid", "canceled"}]


# --- The files and the service


@needs_promtool
def test_promtool_accepts_the_metrics_except_for_names_like_ovmss(metrics):
    """Exit code 1 means invalid text, 3 only complaints."""
    code, output = promtool("check", "metrics", text=metrics)
    assert code in (0, 3), output
    complaints = {line.split(" ", 1)[1] for line in output.splitlines()}
    assert complaints <= {
        'counter metrics should have "_total" suffix',
        "metric names should not contain abbreviated units",
    }


def test_expressions_of_all_alerts_are_found():
    assert len(CONDITIONS) == ALERTS.count("- alert:")


@pytest.mark.parametrize("expression", [*QUERIES.values(), *CONDITIONS])
def test_service_has_the_metrics_and_labels_of(expression, labels):
    names = set()
    for name, matchers in re.findall(r"\b(ovms_\w+|up)\b(?:\{([^}]*)\})?", expression):
        assert name in labels
        names.add(name)
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            assert label in labels[name], f"{name} has no label {label}"
            if "$" not in value:
                assert set(value.split("|") if "~" in operator else [value]) <= labels[name][label]
    assert names
    known = set().union(*(labels[name] for name in names))
    for group in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= known


@needs_promtool
def test_expressions_of_the_dashboard_parse(tmp_path):
    rules = [{"record": f"panel:{index}", "expr": fill(text)} for index, text in enumerate(QUERIES.values())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    code, output = promtool("check", "rules", str(tmp_path / "rules.yml"))
    assert code == 0, output
    assert f"{len(rules)} rules found" in output


@needs_prometheus
@pytest.mark.parametrize("name", QUERIES)
def test_panel_has_data(prometheus, name):
    found = values(prometheus, QUERIES[name])
    assert found
    assert all(math.isfinite(value) and value >= 0 for value in found)


@needs_prometheus
def test_dashboard_shows_the_requests_made(prometheus):
    def shown(title):
        return values(prometheus, QUERIES[f"{title} A"])

    assert shown("Models that do not serve") == [0]
    assert shown("Workers that infer") == [2]
    assert len(shown("Busy workers")) == 2
    assert len(shown("CPU of workers")) == 3
    assert shown("Readiness of versions") == [1, 1]
    assert all(rate > 0 for rate in shown("Requests by model"))
    assert 0 < shown("Memory left")[0] < 1


@needs_prometheus
@pytest.mark.parametrize("name", ["instance", "model"])
def test_variables_of_the_dashboard_have_values(prometheus, name):
    (variable,) = (item for item in DASHBOARD["templating"]["list"] if item["name"] == name)
    metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
    found = prometheus(f"label/{label}/values", **{"match[]": fill(metric)})
    assert found == (["digits", "number"] if name == "model" else [found[0]])


@needs_prometheus
def test_prometheus_evaluates_the_alerts_and_none_fires(prometheus):
    (group,) = prometheus("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == re.findall(r"- alert: (\w+)", ALERTS)
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}  # unknown: not evaluated yet
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []


@needs_prometheus
@pytest.mark.parametrize("title", OVMS_PANELS)
def test_panel_of_ovmss_dashboard_has_data(prometheus, title):
    found = values(prometheus, OVMS_PANELS[title])
    assert len(found) == (34 if "Distribution" in title else 1)
    assert all(math.isfinite(value) and value >= 0 for value in found)
    assert title.startswith("Currently") or max(found) > 0


@needs_prometheus
@pytest.mark.parametrize("bound", OVMS_BOUNDS)
def test_bucket_of_ovmss_dashboard_exists(prometheus, bound):
    assert len(values(prometheus, f'ovms_request_time_us_bucket{{le="{bound}", {_REQUESTS}}}')) == 1


# --- The README


def test_readme_lists_every_metric():
    listed = re.findall(r"^\| `(ovms_\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted({*DEFAULT_METRICS, "ovms_infer_req_queue_size", "ovms_infer_req_active"})
    assert check_metrics_list(listed) == {}


def test_readme_lists_every_alert_and_every_panel_of_ovms():
    for alert in re.findall(r"- alert: (\w+)", ALERTS):
        assert f"| `{alert}` |" in README
    for title in OVMS_PANELS:
        assert re.sub(r" 0\.\d+$", "", title) in README


def test_readme_describes_every_file():
    named = re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE)
    files = {path.name for path in Path(DIRECTORY).iterdir() if path.name != "README.md"}
    assert files <= set(named)
