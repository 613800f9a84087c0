"""Faults of hosts behind the balancer of deploy/hosts, under load.

    PYTHONPATH=tests/helpers python tests/benchmarks/hosts.py [SECONDS]

Three hosts in network namespaces of this machine, each with the service (one worker) and nginx, and the balancer with
its clients in another. Six clients check each response, and send the next inference 20 ms after it. For each
fault: responses in the SECONDS after it, failed requests (wrong responses included), and times of the responses. Needs
root and nginx (Debian: apt-get install nginx iproute2).
"""

import tempfile
import time
from pathlib import Path

import balanced_hosts
import model_zoo
from balanced_hosts import Clients, adding, quantile, versions
from measure import arguments, machine, print_header, print_row
from service import wait_for

LATENCY = 0.05  # seconds, in each direction


def cut_off(cluster):
    cluster.network.cut(cluster.hosts[0].namespace)


def stay_cut_off(cluster):
    """The host is out already."""


def slow_down(cluster):
    cluster.network.delay(cluster.hosts[0].namespace, LATENCY)


def kill_service(cluster):
    cluster.hosts[0].kill_service()


def kill_nginx(cluster):
    cluster.hosts[0].kill_nginx()


def push(cluster):
    for host in cluster.hosts:
        model_zoo.save(adding(2), host.directory / "adding", 2)
    done = cluster.operate("push", "adding", "2", "--config", str(cluster.hosts[0].directory / balanced_hosts.CONFIG))
    assert done.returncode == 0, done.stdout


def pull(cluster):
    for host in cluster.hosts:
        model_zoo.save(adding(2), host.directory / "beside", 2)
        (host.directory / "beside" / "2").rename(host.directory / "watched" / "2")
    for host in cluster.hosts:
        wait_for(lambda host=host: host.versions("watched") == ["2"], lambda host=host: host.service.log)


def drain(cluster):
    done = cluster.operate("drain", cluster.hosts[0].address)
    assert done.returncode == 0, done.stdout


def restore(cluster):
    done = cluster.operate("restore", cluster.hosts[0].address, "--pause", "1")
    assert done.returncode == 0, done.stdout


def heal(cluster):
    """Join the first host again, and wait until it gets requests."""
    host = cluster.hosts[0]
    cluster.network.heal(host.namespace)
    with Clients(cluster):
        before = host.inferences()
        wait_for(lambda: host.inferences() > before + 10, lambda: "no requests")


# In turn: what happens, the step that does it, the step after it, and the model that the clients use.
PHASES = [
    ("nothing", lambda cluster: None, None, "adding"),
    ("a host is cut off, packets vanish", cut_off, None, "adding"),
    ("it stays cut off", stay_cut_off, heal, "adding"),
    (f"a host answers {2 * LATENCY * 1e3:.0f} ms later", slow_down, heal, "adding"),
    ("update by push", push, None, "adding"),
    ("update by pull", pull, None, "watched"),
    ("a host is drained", drain, None, "adding"),
    ("it is restored in three steps", restore, None, "adding"),
    ("the service of a host is killed", kill_service, None, "adding"),
    ("its nginx is killed as well", kill_nginx, None, "adding"),
]


def main():
    (seconds,) = arguments(10)
    print(f"{machine()}; {seconds} s for each\n")
    with tempfile.TemporaryDirectory() as name, balanced_hosts.run(Path(name) / "hosts") as cluster:
        print_header("what happens", "responses", "failed", "reconnected", "p50 ms", "p99 ms", "longest ms", "versions")
        for title, step, after, model in PHASES:
            with Clients(cluster, model, interval=0.02) as clients:
                clients.go_on(10)
                first, end = len(clients.answers), time.monotonic() + seconds
                step(cluster)
                time.sleep(max(0, end - time.monotonic()))
            answers = clients.answers[first:]
            times = (quantile(answers, share) * 1e3 for share in (0.5, 0.99, 1))
            found = " and ".join(sorted(versions(answers)))
            print_row(title, len(answers), len(clients.failures), clients.closed, *(f"{it:.1f}" for it in times), found)
            if after:
                after(cluster)


if __name__ == "__main__":
    main()
