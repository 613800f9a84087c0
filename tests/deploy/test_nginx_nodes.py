"""deploy/nginx with two services, as on a host with one per NUMA node."""

import contextlib
import copy
import re
import subprocess

import crashing_nodes
import model_zoo
import nginx
import pytest
from raw_http import RELU
from service import ROOT, free_port, serve
from test_nginx import CLOSED

pytestmark = pytest.mark.skipif(
    nginx.PROGRAM is None or not (nginx.DEBIAN / "nginx.conf").exists(), reason="Debian's package nginx is missing"
)

README = (nginx.DEPLOY / "README.md").read_text()
TWO_NODES = (nginx.DEPLOY / "ovms_rest" / "two_nodes.conf").read_text()


@contextlib.contextmanager
def run_service(directory):
    """Run a service with a worker and a control address; its sockets are in the directory."""
    directory.mkdir()
    exact = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    config = model_zoo.save_all(
        directory, {"relu": model_zoo.relu()}, lambda _: exact, **crashing_nodes.save(directory)
    )
    bind = ("-b", "127.0.0.1:0", "-b", f"unix:{directory}/data.sock")
    control = {"OVMS_REST_CONTROL_BIND": f"unix:{directory}/control.sock", "OVMS_REST_METRICS_ENABLE": "true"}
    with serve(directory, "-w", "1", bind=bind, config=config, **control) as service:
        service.wait_for_workers(2)
        yield service


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Two services, the nginx in front of them, and that nginx at the operators' address of each."""
    directory = tmp_path_factory.mktemp("host")
    with run_service(directory / "0") as first, run_service(directory / "1") as second:
        other = free_port()
        listen = {"listen 127.0.0.1:9001;": f"listen 127.0.0.1:{other};", "9001 1;": f"{other} 1;"}
        ports = nginx.install(directory / "nginx", directory, "http", **listen)
        (commands,) = re.findall(r"^```\n(cp .*two_nodes.*\n)", README, re.MULTILINE)
        subprocess.run(commands.replace("/etc/nginx/", f"{directory}/nginx/"), shell=True, check=True)
        servers = directory / "nginx" / "ovms_rest" / "servers.conf"
        servers.write_text(servers.read_text().replace("9000 0;", f"{ports[1]} 0;"))
        with nginx.start(directory / "nginx", *ports) as running:
            operators = [running.operators, copy.copy(running.operators)]
            operators[1].port = other
            yield running, operators, [first, second]


def inferences(operators, model="relu"):
    """Return the number of inferences with a model on each node."""
    answers = [each.get(f"/v2/models/{model}/stats").json() for each in operators]
    return [sum(row["execution_count"] for row in answer["model_stats"]) for answer in answers]


def test_sockets_are_those_of_the_units():
    sockets = (ROOT / "deploy" / "systemd" / "ovms_rest@.socket").read_text()
    expected = {
        path.replace("%i", node) for path in re.findall(r"^ListenStream=(.*)$", sockets, re.MULTILINE) for node in "01"
    }
    assert set(re.findall(r"unix:(/run/ovms_rest/[01]/\w+\.sock)", TWO_NODES)) == expected


def test_inferences_are_distributed_to_both_services(host):
    running, operators, _ = host
    before = inferences(operators)
    assert [running.infer("relu", RELU).status for _ in range(40)] == 40 * [200]
    running.wait_for(lambda: sum(inferences(operators)) - sum(before) == 40)  # statistics may be a second late
    assert all(after > count for count, after in zip(before, inferences(operators), strict=True))


def test_request_that_crashes_a_worker_is_sent_again_to_the_same_service(host):
    """The other one would run it, as it does not know that a worker died of it."""
    running, _, services = host
    answers = [running.infer("fragile", crashing_nodes.request(crashing_nodes.CRASH, number)) for number in range(4)]
    assert [answer.status for answer in answers] == 4 * [500]
    deaths = [re.findall(r"worker \d+ died of SIGSEGV", service.log) for service in services]
    assert sum(map(len, deaths)) == 4
    for service in services:
        service.wait_for_workers(2)


def test_operators_reach_each_service_at_an_address_of_its_own(host):
    running, operators, _ = host
    before = inferences(operators)
    for number, node in enumerate(operators):
        assert node.get("/metrics").status == 200
        assert node.infer("relu", RELU).status == 200
        running.wait_for(lambda number=number: inferences(operators)[number] == before[number] + 1)
    assert operators[1].request("POST", "/v2/repository/models/relu/unload").status == 200
    assert [node.get("/v2/models/relu/ready").status for node in operators] == [200, 404]
    assert operators[1].request("POST", "/v2/repository/models/relu/load").status == 200
    assert [node.get("/v2/models/relu/ready").status for node in operators] == 2 * [200]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_routes_of_operators_are_closed_to_clients(host, method, path):
    assert host[0].request(method, path).status == 403


def test_addresses_of_operators_do_not_pass_on_the_console_and_unknown_paths(host):
    for node in host[1]:
        assert [node.get(path).status for path in ("/console", "/nothing")] == [404, 404]
        browser = node.request("GET", "/", headers={"Accept": "text/html"})
        assert (browser.status, browser.json()["name"]) == (200, "ovms_rest")
