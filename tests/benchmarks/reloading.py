"""How much a reload disturbs: latency of one model's requests while another, of ResNet-50's size, is loaded every 10 s.

    PYTHONPATH=tests/helpers python tests/benchmarks/reloading.py [SECONDS [ROUNDS [PERCENT]]]

Two workers infer with a model of some 20 ms and are busy for PERCENT (70) of their time. Requests are sent at a fixed
rate, whether earlier ones were answered or not (open loop), and a latency counts from the time at which a request was
due. Periods of SECONDS (40) with and without loads take turns, ROUNDS (3) times. What else runs on the machine is in
the figures of both; when it leaves the workers less than they need, the queue grows and the latencies say nothing.
What each process of the service uses for a load is printed too, which depends little on other processes.
"""

import contextlib
import http.client
import itertools
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import model_zoo
import numpy as np
from measure import arguments, infer_bare, machine
from scheduling import BODY, PATH, make_slow_model
from service import serve, write_config

WORKERS = 2
INTERVAL = 10.0
CONNECTIONS = 24


class Sent(NamedTuple):
    """The time at which a request was due, and the seconds from then to its sending and its response."""

    due: float
    sent: float
    answered: float


def send(port, rate, seconds):
    """Send requests at a fixed rate and return them; every response must be 200."""
    begin = time.monotonic() + 0.2
    numbers, found, failures = itertools.count(), [], []

    def send_some():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            while (due := begin + next(numbers) / rate) < begin + seconds:
                time.sleep(max(0, due - time.monotonic()))
                sent = time.monotonic()
                for attempt in range(2):
                    try:
                        connection.request("POST", PATH, BODY)
                        response = connection.getresponse()
                        response.read()
                        break
                    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                        connection.close()  # an idle connection that the worker closed meanwhile
                        if attempt:
                            raise
                if response.status != 200:
                    failures.append(response.status)
                found.append(Sent(due, sent - due, time.monotonic() - due))

    threads = [threading.Thread(target=send_some) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert len(found) == int(np.ceil(rate * seconds)), "a connection failed"
    return found


def load_often(service, file, stop, loads):
    """Load the model of a file every INTERVAL seconds until stopped; record the times and durations."""
    due = time.monotonic() + 2
    while not stop.wait(max(0, due - time.monotonic())):
        os.utime(file)
        started = time.monotonic()
        answer = service.request("POST", "/v1/config/reload")
        assert answer.status == 201, answer.body
        loads.append((started, time.monotonic() - started))
        due += INTERVAL


def measure(service, rate, seconds, file=None):
    """Send requests, while the model of a file is loaded if one is given; return requests and loads."""
    stop, loads = threading.Event(), []
    loading = threading.Thread(target=load_often, args=(service, file, stop, loads))
    if file:
        loading.start()
    found = send(service.port, rate, seconds)
    stop.set()
    if file:
        loading.join()
    return found, loads


def main():
    seconds, rounds, percent = arguments(40, 3, 70)
    print(f"{machine()}; {rounds} rounds of twice {seconds} s, {percent} % busy, a load every {INTERVAL:g} s")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        slow = make_slow_model(directory)
        spent = infer_bare(slow, {"x": np.ones(1, np.float32)}, WORKERS, 2).cpu / 1e3
        rate = WORKERS * percent / 100 / spent
        model_zoo.save(model_zoo.resnet50(), directory / "resnet50")
        config = write_config(
            directory,
            {"name": "slow", "base_path": str(slow.file.parent.parent)},
            {"name": "resnet50", "base_path": "resnet50"},
        )
        print(f"an inference takes {spent * 1e3:.1f} ms, {rate:.1f} requests/s")
        results = {"without loads": [], "with loads": []}
        durations = []
        with serve(directory, "-w", str(WORKERS), config=config) as service:
            service.wait_for_workers(WORKERS)
            send(service.port, rate, 3)
            for _ in range(rounds):
                results["without loads"].append(measure(service, rate, seconds)[0])
                found, loads = measure(service, rate, seconds, directory / "resnet50" / "1" / "model.xml")
                results["with loads"].append(found)
                durations += [duration for _, duration in loads]
            measure_costs(service, directory / "resnet50" / "1" / "model.xml")
    print("\n| ms | median | p90 | p99 | most | p99 per round | sent late, p99 |\n|---|---|---|---|---|---|---|")
    for name, periods in results.items():
        answered = [sent.answered * 1e3 for found in periods for sent in found]
        late = np.percentile([sent.sent * 1e3 for found in periods for sent in found], 99)
        quantiles = " | ".join(f"{value:.1f}" for value in np.percentile(answered, [50, 90, 99, 100]))
        each = ", ".join(f"{np.percentile([sent.answered * 1e3 for sent in found], 99):.0f}" for found in periods)
        print(f"| {name} | {quantiles} | {each} | {late:.1f} |")
    last = [np.percentile([sent.answered for found in periods for sent in found], 99) for periods in results.values()]
    print(f"\np99 with loads / without: {last[1] / last[0]:.2f}; a load takes {np.median(durations):.2f} s (median)")


class Spent(NamedTuple):
    """The usage of a process: CPU seconds of all threads that it ever had, and page faults."""

    policy: str
    cpu: float
    faults: int


def look_at(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    policy = {os.SCHED_OTHER: "normal", os.SCHED_IDLE: "idle"}[os.sched_getscheduler(pid)]
    ticks = int(fields[11]) + int(fields[12])
    return Spent(policy, ticks / os.sysconf("SC_CLK_TCK"), int(fields[7]))


def measure_costs(service, file, loads=5):
    """Print the usage of each process for a load without requests, which hardly depends on other processes."""
    costs = {}
    for _ in range(loads):
        service.wait_for_workers(WORKERS)
        arbiter, old = service.process.pid, service.workers()
        before, seen, stop = {pid: look_at(pid) for pid in (arbiter, *old)}, {}, threading.Event()

        def watch(arbiter=arbiter, seen=seen, stop=stop):
            while not stop.wait(0.005):
                for pid in (arbiter, *service.workers()):
                    with contextlib.suppress(OSError, IndexError):
                        seen[pid] = look_at(pid)

        watching = threading.Thread(target=watch)
        watching.start()
        os.utime(file)
        assert service.request("POST", "/v1/config/reload").status == 201
        service.wait_for_workers(WORKERS)
        stop.set()
        watching.join()
        new = service.workers()
        for pid, (policy, cpu, faults) in seen.items():
            names = {arbiter: "arbiter"} | dict.fromkeys(old, "old worker") | dict.fromkeys(new, "new worker")
            spent = before.get(pid, Spent("", 0, 0))
            costs.setdefault((names.get(pid, "trial"), policy), []).append((cpu - spent.cpu, faults - spent.faults))
    print("\n| a load without requests | scheduling policy | CPU ms | page faults |\n|---|---|---|---|")
    for (name, policy), found in costs.items():
        cpu, faults = np.mean(found, axis=0)
        print(f"| {name} | {policy} | {cpu * 1e3:.0f} | {faults:.0f} |")


if __name__ == "__main__":
    main()
