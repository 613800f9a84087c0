"""Requests that crash a real worker, sent by clients directly; tests/deploy has those through nginx."""

import contextlib
import http.client
import os
import signal
import threading

import crashing_nodes
import model_zoo
import pytest
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
        waiting = tmp_path / "waiting"
        victim = service.wait_for(
            lambda: waiting.exists() and waiting.read_text().endswith("\n") and waiting.read_text()
        )
        os.kill(int(victim), signal.SIGKILL)
        client.join()
        assert isinstance(outcomes[0], OSError)
        line = f"worker {int(victim)} was killed by SIGKILL during an inference with 'fragile/1' (name and version), "
        service.wait_for(lambda: f"{line}request 'mine' alone; if a request comes again it runs alone" in service.log)
        (tmp_path / "go").touch()
        assert service.infer("fragile", request, X_Request_ID="mine").status == 200
