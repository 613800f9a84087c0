"""Requests that crash a real worker, sent by clients directly; tests/deploy has those through nginx."""

import contextlib
import http.client
import os
import signal
import threading
import time

import crashing_nodes
import model_zoo
import pytest
from raw_http import RELU
from service import serve

CRASH = crashing_nodes.CRASH


@contextlib.contextmanager
def serving(directory, *arguments, **variables):
    config = model_zoo.save_all(directory, {"relu": model_zoo.relu()}, lambda _: {}, **crashing_nodes.save(directory))
    with serve(directory, *arguments, config=config, **variables) as service:
        yield service


def is_cut(service, *values, request_id):
    """Send a request; return whether its connection ends without an answer, False for a refusal."""
    try:
        answer = service.infer("fragile", crashing_nodes.request(*values), X_Request_ID=request_id)
    except (ConnectionError, http.client.RemoteDisconnected):
        return True
    assert answer.status == 500
    return False


def waiting_worker(directory):
    """Return the id of the worker whose inference waits, 0 before that."""
    path = directory / "waiting"
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


def crashes(service):
    return service.log.count("died of SIGSEGV during an inference with 'fragile/1'")


def wait_for_crashes(service, count, workers):
    service.wait_for(lambda: crashes(service) == count and len(service.workers()) == workers)


def test_client_that_repeats_its_request_kills_one_worker_and_with_other_ids_two(tmp_path):
    with serving(tmp_path, "-w", "2") as service:
        service.wait_for_workers(2)
        assert is_cut(service, CRASH, 1, request_id="a")
        wait_for_crashes(service, 1, 2)
        assert not any(is_cut(service, CRASH, 1, request_id="a") for _ in range(3))
        assert is_cut(service, CRASH, 1, request_id="b")
        wait_for_crashes(service, 2, 2)
        assert not any(is_cut(service, CRASH, 1, request_id=str(number)) for number in range(10))
        assert crashes(service) == 2
        assert service.infer("fragile", crashing_nodes.request(1, 1)).status == 200


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_other_workers_refuse_the_inputs_too(tmp_path, kind):
    with serving(tmp_path, "-w", "2", "-k", kind) as service:
        service.wait_for(lambda: len(service.workers()) == 2)
        for number in range(2):
            assert is_cut(service, CRASH, 1, request_id=f"id{number}")
            wait_for_crashes(service, number + 1, 2)
        assert not any(is_cut(service, CRASH, 1, request_id=f"another{number}") for number in range(5))
        assert service.infer("fragile", crashing_nodes.request(1, 1)).status == 200


def test_request_of_a_worker_that_an_operator_kills_runs_again(tmp_path):
    with serving(tmp_path, "-w", "2") as service:
        service.wait_for_workers(2)
        request, outcomes = crashing_nodes.request(crashing_nodes.WAIT), []

        def ask():
            try:
                outcomes.append(service.infer("fragile", request, X_Request_ID="mine"))
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                outcomes.append(error)

        client = threading.Thread(target=ask)
        client.start()
        victim = service.wait_for(lambda: waiting_worker(tmp_path))
        os.kill(victim, signal.SIGKILL)
        client.join()
        assert isinstance(outcomes[0], OSError)
        line = f"worker {victim} was killed by SIGKILL during an inference with 'fragile/1' (name and version), "
        service.wait_for(lambda: f"{line}request 'mine' alone; if a request comes again it runs alone" in service.log)
        (tmp_path / "go").touch()
        assert service.infer("fragile", request, X_Request_ID="mine").status == 200


# --- Hangs


def hangs(service, request_id):
    """Send a request that never ends; return whether its connection ends without a response."""
    return is_cut(service, crashing_nodes.WAIT, float(ord(request_id)), request_id=request_id)


@pytest.mark.parametrize("kind", ["ovms_rest.worker.worker.Worker", "sync"])
def test_hanging_node_is_ended_at_once_and_its_model_is_paused(tmp_path, kind):
    """A node in Python must not catch the exception by which gunicorn ends a worker."""
    with serving(tmp_path, "-w", "2", "-k", kind, "--timeout", "2") as service:
        for request_id in "ab":
            service.wait_for(lambda: len(service.workers()) == 2)
            assert hangs(service, request_id)
            line = f"hung and was ended during an inference with 'fragile/1' (name and version), request {request_id!r}"
            service.wait_for(lambda text=line: text in service.log)
        answer = service.infer("fragile", crashing_nodes.request(1, 1))
        assert answer.status == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 6
        assert (
            "model 'fragile' version 1 has hung in 2 workers within 8 s, and infers nothing for "
            in answer.json()["error"]
        )
        assert service.infer("relu", RELU).status == 200
        assert service.log.count("WORKER TIMEOUT") == 2
        assert "out of memory" not in service.log


def test_worker_that_is_stopped_in_an_inference_does_not_count_as_a_hang(tmp_path):
    with serving(tmp_path, "-w", "1", "--timeout", "2") as service:
        for number in range(2):
            (tmp_path / "waiting").unlink(missing_ok=True)
            thread = threading.Thread(target=hangs, args=(service, str(number)))
            thread.start()
            os.kill(service.wait_for(lambda: waiting_worker(tmp_path)), signal.SIGSTOP)
            thread.join()
            service.wait_for(lambda n=number + 1: service.log.count("was stopped and ended during an infer") == n)
        assert service.infer("fragile", crashing_nodes.request(1, 1)).status == 200


def test_service_that_was_frozen_ends_no_worker(tmp_path):
    """As a container or a virtual machine is: workers and arbiter alike."""
    with serving(tmp_path, "-w", "2", "--timeout", "2") as service:
        service.wait_for_workers(2)
        workers = service.workers()
        frozen = [service.process.pid, *workers]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        service.signal(signal.SIGCONT)
        for count in (1, 2):  # between two signals the arbiter looks for hanging workers, which have not run yet
            service.signal(signal.SIGUSR1)
            service.wait_for(lambda n=count: service.log.count("Handling signal: usr1") == n)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        service.wait_for_workers(2)
        assert service.workers() == workers
        assert "WORKER TIMEOUT" not in service.log
