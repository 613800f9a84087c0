"""deploy/hosts: a real balancer in front of three hosts; faults of hosts, draining, and updates of a model."""

import contextlib
import http.client
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import balanced_hosts
import model_zoo
import namespaces
import nginx
import pytest
import slow_models
from balanced_hosts import Clients, adding, versions
from fake_hosts import CUT_OFF, fake_hosts
from raw_http import RELU, RELU_PATH, infer, post
from service import PATIENCE, environment, receive, wait_for

pytestmark = pytest.mark.skipif(
    nginx.PROGRAM is None or not (nginx.DEBIAN / "nginx.conf").exists(), reason="Debian's package nginx is missing"
)

READMES = [(balanced_hosts.DEPLOY / "README.md").read_text(), (nginx.DEPLOY / "README.md").read_text()]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A balancer and three hosts in network namespaces."""
    if reason := namespaces.missing():
        pytest.skip(reason)
    with balanced_hosts.run(tmp_path_factory.mktemp("hosts")) as running:
        yield running


@contextlib.contextmanager
def counting(cluster, steps=8 * slow_models.SLOW):
    """Send an inference that takes half a second or more; yield the host that computes it; check the response."""
    found = []

    def ask():
        with cluster.network.hub.connect(cluster.balancer.port) as connection:
            connection.sendall(infer("counting", slow_models.count(steps)))
            found.append(receive(connection, "POST"))

    thread = threading.Thread(target=ask)
    thread.start()
    yield wait_for(lambda: next((host for host in cluster.hosts if host.is_counting()), None), lambda: f"{found}")
    thread.join(PATIENCE)
    assert [answer.json()["outputs"][0]["data"] for answer in found] == [[steps]]


def is_left_out(cluster, host):
    """Return whether the balancer has noticed a fault of a host."""
    return f"http://{host.address}:80/" in cluster.balancer.log


def wait_until_served_by(cluster, host):
    before = host.inferences()
    wait_for(lambda: host.inferences() > before, lambda: f"{host.address} gets no requests")


# --- Faults


def test_no_client_notices_that_a_host_is_cut_off(cluster):
    with Clients(cluster) as clients:
        clients.go_on(10)
        with counting(cluster) as host:
            cluster.network.cut(host.namespace)
            clients.go_on(10)
        wait_for(lambda: is_left_out(cluster, host), lambda: f"no request to {host.address} has failed")
        cluster.network.heal(host.namespace)
        wait_until_served_by(cluster, host)
    assert (clients.failures, clients.closed) == ([], 0)


def test_no_request_to_a_slow_host_is_sent_again(cluster):
    slow = cluster.hosts[1]
    before = sum(host.inferences() for host in cluster.hosts)
    with Clients(cluster) as clients:
        clients.go_on(5)
        cluster.network.delay(slow.namespace, 0.1)
        clients.go_on(20)
        wait_for(lambda: max(answer.seconds for answer in clients.answers) > 0.2, lambda: "no response took longer")
    cluster.network.heal(slow.namespace)
    assert (clients.failures, clients.closed) == ([], 0)
    wait_for(  # statistics may be a second late
        lambda: sum(host.inferences() for host in cluster.hosts) - before == len(clients.answers),
        lambda: f"{sum(host.inferences() for host in cluster.hosts) - before} inferences for {len(clients.answers)}",
        10,
    )


# --- Draining


def test_drain_waits_for_requests_and_restore_brings_the_host_back_in_steps(cluster):
    with Clients(cluster) as clients:
        clients.go_on(5)
        with counting(cluster) as host:
            drained = cluster.operate("drain", host.address)
            assert drained.returncode == 0, drained.stdout
            assert not host.is_counting()
        assert f"server {host.address}:80 weight=100 max_fails=3 fail_timeout=5s down;" in cluster.list.read_text()
        idle = host.inferences()
        clients.go_on(10)
        assert host.inferences() == idle
        restored = cluster.operate("restore", host.address, "--steps", "10,50,100", "--pause", "0.1")
        assert restored.returncode == 0, restored.stdout
        assert [line.split()[-1] for line in restored.stdout.splitlines()] == ["10", "50", "100"]
        assert f"server {host.address}:80 weight=100 max_fails=3 fail_timeout=5s;" in cluster.list.read_text()
        wait_until_served_by(cluster, host)
    assert clients.failures == []


def test_status_shows_each_host(cluster):
    lines = cluster.operate("status").stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [host.address for host in cluster.hosts]
    assert all(": weight 100, ready, " in line for line in lines), lines


# --- Updates


def test_update_by_push_serves_old_or_new_version_and_a_broken_one_is_rolled_back(cluster):
    config = str(cluster.hosts[0].directory / balanced_hosts.CONFIG)
    for host in cluster.hosts:
        model_zoo.save(adding(2), host.directory / "adding", 2)
    with Clients(cluster) as clients:
        before = clients.go_on(5)
        pushed = cluster.operate("push", "adding", "2", "--config", config)
        assert pushed.returncode == 0, pushed.stdout
        clients.wait_for_version("2")
        assert versions(before) == {"1"}
        assert [host.versions() for host in cluster.hosts] == 3 * [["2"]]

        good, broken, untouched = cluster.hosts
        for host in (good, untouched):
            model_zoo.save(adding(3), host.directory / "adding", 3)
        (broken.directory / "adding" / "3").mkdir()
        (broken.directory / "adding" / "3" / "model.xml").write_text("not a model")
        pushed = cluster.operate("push", "adding", "3", "--config", config)
        assert pushed.returncode == 1, pushed.stdout
        assert f"{good.address}: serves version 3 (before: 2)" in pushed.stdout
        assert f"{broken.address}: does not serve version 3: 412: " in pushed.stdout
        assert f"{broken.address}: serves what it did before\n{good.address}: serves what" in pushed.stdout
        assert untouched.address not in pushed.stdout
        assert [host.versions() for host in cluster.hosts] == 3 * [["2"]]
        clients.wait_for_version("2")
    assert clients.failures == []
    assert versions(clients.answers) <= {"1", "2", "3"}


def test_update_by_pull_serves_old_or_new_version(cluster):
    with Clients(cluster, "watched") as clients:
        before = clients.go_on(5)
        for host in cluster.hosts:
            model_zoo.save(adding(2), host.directory / "beside", 2)
            (host.directory / "beside" / "2").rename(host.directory / "watched" / "2")
        for host in cluster.hosts:
            wait_for(lambda host=host: host.versions("watched") == ["2"], lambda host=host: host.service.log)
        clients.wait_for_version("2")
    assert clients.failures == []
    assert versions(before) == {"1"}
    assert versions(clients.answers) == {"1", "2"}


# --- The files for the hosts


def test_host_admits_only_the_balancer_and_knows_the_client(cluster):
    host, other = cluster.hosts[:2]
    with other.namespace.inside():
        connection = http.client.HTTPConnection(host.address, 80, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/v2", headers={"X-Forwarded-For": cluster.network.hub.address})
            assert connection.getresponse().status == 403
    log = (host.nginx.directory / "log" / "access.log").read_text()
    clients = {line.split()[0] for line in log.splitlines() if "POST /v2/models/adding/infer " in line}
    assert clients == {"127.0.0.1"}  # the clients of these tests, on the balancer itself


def test_no_client_notices_that_a_service_and_then_its_whole_host_are_killed(cluster):
    """The last test with these hosts: it does not start that one again."""
    with Clients(cluster) as clients:
        clients.go_on(5)
        with counting(cluster) as host:
            host.kill_service()
            clients.go_on(10)
        host.kill_nginx()
        clients.go_on(10)
    assert (clients.failures, clients.closed) == ([], 0)


# --- What the balancer sends again, with hosts whose responses the test decides


@contextlib.contextmanager
def balancer(directory, respond):
    """Run the balancer in front of hosts that respond so; yield both."""
    with fake_hosts(respond) as hosts:
        port = balanced_hosts.install_balancer(directory / "nginx", [f"{name}:{hosts.port}" for name in hosts.names])
        with nginx.start(directory / "nginx", port, port) as running:
            yield running, hosts


def test_request_is_sent_again_only_for_502_and_lost_connections(tmp_path):
    # None, a connection that ends, comes first: there are no kept-alive connections yet, whose attempts do not count.
    attempts = {None: 2, 200: 1, 400: 1, 413: 1, 429: 1, 500: 1, 502: 2, 503: 1, 504: 1}
    with balancer(tmp_path, None) as (running, hosts):
        for status, count in attempts.items():
            hosts.respond = lambda _, status=status: status and (status, b'{"error":"x"}')
            hosts.received.clear()
            answer = running.infer("relu", RELU, X_Request_ID="mine")
            assert (answer.status, answer.json().keys()) == (status or 502, {"error"})
            assert len({request.host for request in hosts.received}) == len(hosts.received) == count, status
            for request in hosts.received:
                assert (request.path, request.body, request.headers["x-request-id"]) == (RELU_PATH, RELU, "mine")


def test_next_host_answers_for_one_that_fails(tmp_path):
    with balancer(tmp_path, lambda request: None if request.host.endswith("11") else (200, b"{}")) as (running, hosts):
        assert [running.infer("relu", RELU).status for _ in range(12)] == 12 * [200]
        # Three failures, then it is left out for 5 s.
        assert sum(request.host.endswith("11") for request in hosts.received) == 3


def test_busy_hosts_are_not_left_out(tmp_path):
    with balancer(tmp_path, lambda _: (503, b"{}")) as (running, hosts):
        assert [running.infer("relu", RELU).status for _ in range(12)] == 12 * [503]
        assert len({request.host for request in hosts.received[-6:]}) == 3


def test_response_that_is_cut_off_reaches_the_client_so_and_is_not_sent_again(tmp_path):
    with balancer(tmp_path, lambda _: (200, b"half" + CUT_OFF)) as (running, hosts):
        with pytest.raises(http.client.IncompleteRead):
            running.infer("relu", RELU)
        assert len(hosts.received) == 1


def test_request_that_ends_kept_alive_connections_meets_each_host_once_at_most(tmp_path):
    """Nginx does not count an attempt on a kept-alive connection, but does not choose a host twice either."""
    with balancer(tmp_path, lambda request: (200, b"{}") if b"good" in request.body else None) as (running, hosts):
        for _ in range(12):
            assert running.infer("relu", b"good").status == 200
        hosts.received.clear()
        assert running.infer("relu", b"bad").status == 502
        found = [request.host for request in hosts.received]
        assert 2 <= len(found) <= 3
        assert len(set(found)) == len(found)


ONE_HOST = [
    ("POST", "/v2/repository/models/relu/load", 403),
    ("POST", "/v2/repository/models/relu/unload", 403),
    ("POST", "/v2/models/x/../../repository/models/relu/lo%61d", 403),
    ("POST", "/v1/config/reload", 403),
    ("GET", "/metrics", 403),
    ("GET", "/console", 404),
    ("GET", "/ovms_rest_error", 404),
]


def test_routes_of_one_host_are_not_passed_on(tmp_path):
    with balancer(tmp_path, lambda _: (200, b"{}")) as (running, hosts):
        for method, path, status in ONE_HOST:
            answer = running.request(method, path)
            assert (answer.status, list(answer.json())) == (status, ["error"])
        assert hosts.received == []


def test_descriptors_of_one_worker_suffice_for_the_requests_that_the_balancer_passes(tmp_path):
    """Under a soft limit of 128 instead of the 1024 of systemd, which the README's nginx.conf raises."""
    answers = threading.Event()
    with fake_hosts(lambda _: answers.wait(PATIENCE) and (200, b"{}")) as hosts, contextlib.ExitStack() as stack:
        port = balanced_hosts.install_balancer(tmp_path / "nginx", [f"{name}:{hosts.port}" for name in hosts.names])
        main = tmp_path / "nginx" / "nginx.conf"
        (edits,) = re.findall(r"^sed -i (.*) /etc/nginx/nginx.conf$", READMES[0], re.MULTILINE)
        subprocess.run(["sed", "-i", *shlex.split(edits), main], check=True)
        settings = main.read_text().replace("worker_processes auto;", "worker_processes 1;")
        main.write_text(settings)
        requests, connections, descriptors = (
            int(re.search(rf"{name} (\d+);", text)[1])
            for name, text in (
                ("limit_conn ovms_rest_inferences", (tmp_path / "nginx" / "ovms_rest" / "servers.conf").read_text()),
                ("worker_connections", settings),
                ("worker_rlimit_nofile", settings),
            )
        )
        assert connections > 2 * requests
        assert descriptors > connections + 2 * requests  # a file for each body that does not fit into memory
        limited = ["prlimit", "--nofile=128:"]
        running = stack.enter_context(nginx.start(main.parent, port, port, prefix=limited, workers=1))
        stack.callback(answers.set)
        clients = []
        for number in range(1, 129):
            clients.append(stack.enter_context(running.connect()))
            clients[-1].sendall(post(RELU_PATH, RELU))
            running.wait_for(lambda number=number: len(hosts.received) == number)
        answers.set()
        assert [receive(client, "POST").status for client in clients] == 128 * [200]


# --- hosts.py, with hosts whose responses the test decides


class Operated:
    """hosts.py with a list of three hosts and an nginx that accepts every file."""

    def __init__(self, directory: Path, hosts) -> None:
        self.list = directory / "hosts.conf"
        self.list.write_text(
            "# server 127.0.0.1:80;\n" + "".join(f"server {name}:80 weight=8;\n" for name in hosts.names)
        )
        self.config = directory / "config.json"
        self.config.write_text(json.dumps({"model_config_list": [{"config": {"name": "m", "base_path": "/m"}}]}))
        self._port = str(hosts.port)

    def start(self, *arguments, command="true"):
        return subprocess.Popen(
            ["env", "--default-signal=HUP",  # the tests may run under nohup
             sys.executable, str(balanced_hosts.SCRIPT), "--list", str(self.list), "--nginx", command,
             "--operators-port", self._port, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments, command="true"):
        return finish(self.start(*arguments, command=command))

    def start_push(self, *arguments, timeout=0.1):
        return self.start("push", "m", "2", "--config", str(self.config), "--timeout", f"{timeout}", *arguments)

    def push(self, *arguments):
        return finish(self.start_push(*arguments))


def finish(process):
    """Wait for the end of a process; return it with its output."""
    with process:
        try:
            output = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def serving(served, fails=lambda request: None):
    """Return responses of hosts that serve the versions in `served`, by host, and load what they are told to."""

    def respond(request):
        if (failure := fails(request)) is not None:
            return failure
        if request.path.endswith("/load"):
            keys = json.loads(json.loads(request.body)["parameters"]["config"])
            served[request.host] = keys["model_version_policy"]["specific"]["versions"]
        if request.path.endswith("/unload"):
            served[request.host] = []
        rows = [{"name": "m", "version": str(version)} for version in served[request.host]]
        return 200, json.dumps(rows).encode()

    return respond


def loads_version(request, host, version):
    return request.path.endswith("/load") and request.host == host and f"[{version}]".encode() in request.body


def test_push_rolls_back_a_host_that_loads_but_does_not_become_ready(tmp_path):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}

    def fails(request):
        unready = request.path == "/v2/health/ready" and request.host == "127.0.0.12" and served[request.host] == [2]
        return (400, b'{"error":"other"}') if unready else None

    with fake_hosts(serving(served, fails)) as hosts:
        done = Operated(tmp_path, hosts).push()
        assert (done.returncode, set(map(tuple, served.values()))) == (1, {(1,)})
        assert "127.0.0.12: does not serve version 2: 400: other" in done.stdout
        assert not any(loads_version(request, "127.0.0.13", 2) for request in hosts.received)


def test_push_unloads_a_model_that_was_not_served_before(tmp_path):
    served = {f"127.0.0.{at}": [] for at in (11, 12, 13)}
    refuse = lambda request: (412, b"{}") if loads_version(request, "127.0.0.13", 2) else None  # noqa: E731
    with fake_hosts(serving(served, refuse)) as hosts:
        assert Operated(tmp_path, hosts).push().returncode == 1
    assert served == {f"127.0.0.{at}": [] for at in (11, 12, 13)}


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ((503, b'{"error":"no memory"}'), "503: no memory"),
        ((200, b""), "it serves versions of m: 2; expected: 1"),
    ],
)
def test_push_names_hosts_that_are_not_rolled_back(tmp_path, response, problem):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}

    def fails(request):
        if loads_version(request, "127.0.0.11", 1):
            return response
        return (412, b"{}") if loads_version(request, "127.0.0.12", 2) else None

    with fake_hosts(serving(served, fails)) as hosts:
        done = Operated(tmp_path, hosts).push()
    assert done.returncode == 3
    assert f"127.0.0.11: NOT ROLLED BACK: {problem}" in done.stdout
    assert "127.0.0.12: serves what it did before" in done.stdout


def test_push_rolls_back_a_load_that_goes_on_after_the_timeout_of_nginx(tmp_path):
    """The host still serves the old version then, and would serve the new one a moment later."""
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}
    late = lambda request: (504, b"{}") if loads_version(request, "127.0.0.12", 2) else None  # noqa: E731
    with fake_hosts(serving(served, late)) as hosts:
        assert Operated(tmp_path, hosts).push().returncode == 1
        loads = [request for request in hosts.received if request.path.endswith("/load")]
    assert [request.host[-2:] for request in loads] == ["11", "12", "12", "11"]
    assert loads_version(loads[2], "127.0.0.12", 1)


def test_push_unloads_a_model_whose_first_load_goes_on(tmp_path):
    """The service responds 404 if that load has failed meanwhile."""
    served = {f"127.0.0.{at}": [] for at in (11, 12, 13)}

    def fails(request):
        if loads_version(request, "127.0.0.12", 2):
            return 504, b"{}"
        return (404, b"{}") if (request.host, request.path[-7:]) == ("127.0.0.12", "/unload") else None

    with fake_hosts(serving(served, fails)) as hosts:
        done = Operated(tmp_path, hosts).push()
        assert [request.host[-2:] for request in hosts.received if request.path.endswith("/unload")] == ["12", "11"]
    assert (done.returncode, served["127.0.0.11"]) == (1, [])
    assert "127.0.0.12: serves what it did before" in done.stdout


@pytest.mark.parametrize("path", ["/v2/repository/models/m/load", "/v2/health/ready", "/v2/repository/index"])
@pytest.mark.parametrize(
    "response",
    [(200, b"{" + CUT_OFF), (412, b"{" + CUT_OFF), (200, b'[{"name": "m"}]'), (200, b"\xff"), (500, b'{"error":1}')],
    ids=str,
)
def test_push_rolls_back_after_a_response_that_is_cut_off_or_makes_no_sense(tmp_path, path, response):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}
    has_failed = []

    def fails(request):
        # Once; a load is made in spite of its response, and the readiness has its status alone.
        if (request.host, request.path, served["127.0.0.11"]) != ("127.0.0.12", path, [2]) or has_failed:
            return None
        if path.endswith("/load"):
            served["127.0.0.12"] = [3]
        has_failed.append(request)
        return response

    with fake_hosts(serving(served, fails)) as hosts:
        done = finish(Operated(tmp_path, hosts).start_push(timeout=0.1 if path.endswith("/load") else PATIENCE))
    assert has_failed
    assert "Traceback" not in done.stderr
    # A second look finds the host ready.
    expected = (1, (1,)) if path.endswith("/load") else (0, (2,))
    assert (done.returncode, *set(map(tuple, served.values()))) == expected, done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_push_rolls_back_when_it_is_interrupted(tmp_path, number):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}
    running = []

    def fails(request):
        if (request.host, request.path, served["127.0.0.12"]) != ("127.0.0.12", "/v2/health/ready", [2]):
            return None
        wait_for(lambda: running, str)
        running[0].send_signal(number)
        return 400, b""

    with fake_hosts(serving(served, fails)) as hosts:
        running.append(Operated(tmp_path, hosts).start_push(timeout=PATIENCE))
        done = finish(running[0])
    assert (done.returncode, *set(map(tuple, served.values()))) == (1, (1,)), done
    assert done.stderr == "hosts.py: interrupted (KeyboardInterrupt()), rolling back\n"
    assert "127.0.0.12: serves what it did before\n127.0.0.11: serves what it did before\n" in done.stdout


def test_interrupt_during_the_rollback_gives_up_one_host(tmp_path):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}
    running, is_over = [], threading.Event()

    def fails(request):
        if loads_version(request, "127.0.0.12", 1):
            wait_for(lambda: running, str)
            running[0].send_signal(signal.SIGINT)
            is_over.wait(PATIENCE)
            return 503, b""
        return (412, b"{}") if loads_version(request, "127.0.0.12", 2) else None

    with fake_hosts(serving(served, fails)) as hosts:
        running.append(Operated(tmp_path, hosts).start_push())
        done = finish(running[0])
        is_over.set()
    assert (done.returncode, served["127.0.0.11"]) == (3, [1])
    assert "127.0.0.12: NOT ROLLED BACK: KeyboardInterrupt()\n127.0.0.11: serves what" in done.stdout


def test_push_changes_nothing_if_a_host_is_not_ready_unless_it_is_left_out(tmp_path):
    served = {f"127.0.0.{at}": [1] for at in (11, 12, 13)}
    unready = lambda request: (503, b"") if request.host == "127.0.0.12" else None  # noqa: E731
    with fake_hosts(serving(served, unready)) as hosts:
        operate = Operated(tmp_path, hosts)
        done = operate.push()
        assert (done.returncode, served["127.0.0.11"]) == (2, [1])
        assert "127.0.0.12 is not ready, nothing was changed: 503" in done.stderr
        assert operate.push("--without", "127.0.0.12").returncode == 0
        assert served == {"127.0.0.11": [2], "127.0.0.12": [1], "127.0.0.13": [2]}


def test_last_host_cannot_be_drained_and_a_file_that_nginx_refuses_is_put_back(tmp_path):
    with fake_hosts(lambda _: (503, b"")) as hosts:
        operate = Operated(tmp_path, hosts)
        before = operate.list.read_text()
        refused = operate("drain", "127.0.0.11", command="false")
        assert (refused.returncode, operate.list.read_text()) == (2, before)
        assert "no host 127.0.0.9; it has 127.0.0.11:80, " in operate("drain", "127.0.0.9").stderr
        last = before.replace("12:80 weight=8", "12:80 down").replace("13:80 weight=8", "13:80 down")
        operate.list.write_text(last)
        refused = operate("drain", "127.0.0.11")
        assert (refused.returncode, operate.list.read_text()) == (2, last)
        assert "127.0.0.11 is the last host that gets requests" in refused.stderr


def test_drain_fails_if_the_host_stays_busy_or_shows_no_figures(tmp_path):
    answers = [(200, b'ovms_rest_worker_busy{worker="0"} 1.0\n')]
    with fake_hosts(lambda _: answers[-1]) as hosts:
        operate = Operated(tmp_path, hosts)
        busy = operate("drain", "127.0.0.11", "--timeout", "0")
        assert (busy.returncode, "still works after 0 s" in busy.stderr) == (1, True)
        answers.append((404, b""))
        silent = operate("drain", "127.0.0.11")
        assert (silent.returncode, "OVMS_REST_METRICS_ENABLE" in silent.stderr) == (1, True)


def test_restore_waits_until_the_host_is_ready_and_leaves_it_down_if_that_ends(tmp_path):
    answers = [400, 400, 200, 200, 503]
    with fake_hosts(lambda _: (answers.pop(0) if len(answers) > 1 else answers[0], b"")) as hosts:
        operate = Operated(tmp_path, hosts)
        done = operate("restore", "127.0.0.12", "--steps", "50,75,100", "--pause", "0")
        assert done.returncode == 1
        assert "127.0.0.12: has weight 4\n127.0.0.12: has weight 6\n" in done.stdout
        assert "server 127.0.0.12:80 weight=8 down;" in operate.list.read_text()
        assert operate("restore", "127.0.0.12", "--timeout", "0").returncode == 2


def test_interrupted_restore_leaves_the_host_down(tmp_path):
    with fake_hosts(lambda _: (200, b"")) as hosts:
        operate = Operated(tmp_path, hosts)
        process = operate.start("restore", "127.0.0.12", "--pause", f"{PATIENCE}")
        assert process.stdout.readline() == "127.0.0.12: has weight 1\n"
        process.terminate()
        done = finish(process)
    assert (done.returncode, done.stderr) == (130, "hosts.py: interrupted\n")
    assert "server 127.0.0.12:80 weight=8 down;" in operate.list.read_text()


# --- The README


# Runs in namespaces of its own, with copies of the files of Debian's package, and starts nginx as the package does.
MACHINE = """
set -eu
ip link set lo up
ip addr add 10.0.0.10/32 dev lo
ip addr add 10.0.0.11/32 dev lo
for directory in /run /var/log/nginx /var/lib/nginx /usr/local/sbin /etc/sysctl.d; do
    mount -t tmpfs none $directory
done
cp -a /etc/nginx {copy}
mount --bind {copy} /etc/nginx
apt-get() {{ echo "installed: $*"; }}
{waiting}
nginx
{commands}
sleep 1
until curl -s http://localhost/v2 | grep -q error; do command sleep 0.05; done
echo ---
{checks}
"""
CHECK = "curl -s -w ' %{http_code}\\n'"


@pytest.mark.parametrize(
    ("begins", "checks", "expected"),
    [
        (
            ["apt-get install -y nginx curl python3"],
            f"hosts.py status; {CHECK} http://localhost/v2; {CHECK} http://localhost/metrics",
            r"(10\.0\.0\.1[123]: weight 100, unknown: .*\n){3}.* 502\n.* 403\n",
        ),
        (
            ["cp -r deploy/nginx", "cp deploy/hosts/host"],
            f"for port in 80 9000; do for client in 0 1; do {CHECK} --interface 10.0.0.1$client http://10.0.0.11:$port/v2;"
            " done; done",
            r".* 502\n.* 403\n.* 502\n.* 502\n",  # there is no service
        ),
    ],
    ids=["balancer", "host"],
)
def test_commands_of_the_readme_work_as_written(tmp_path, begins, checks, expected):
    isolated = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    probe = subprocess.run([*isolated, "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"cannot make namespaces for the README's machine: {probe.stderr.decode()}")
    blocks = re.findall(r"^```sh\n(.*?)^```", "\n".join(READMES), re.MULTILINE | re.DOTALL)
    commands = "".join(next(block for block in blocks if block.startswith(text)) for text in begins)
    texts = {"waiting": nginx.WAITING, "commands": commands, "checks": checks}
    done = subprocess.run(
        [*isolated, "bash", "-c", MACHINE.format(copy=tmp_path / "etc", **texts)],
        cwd=nginx.ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(expected, done.stdout.split("---\n")[1]), done.stdout
