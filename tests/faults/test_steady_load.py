"""The load of the faults notices what it is there for: requests that fail, wrong answers, and gaps."""

import contextlib
import http.server
import json
import threading
import time

import pytest
from service import wait_for
from steady_load import Factors, Load, ask_relu, ask_versioned


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the positive numbers of a request, in the way that `mode` of the server says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = self.server.mode
        if mode == "close":
            self.close_connection = True
            return
        if mode == "slow relu" and "relu" in self.path:
            time.sleep(0.3)
        numbers = [max(number, 0) for number in request["inputs"][0]["data"]]
        numbers[-1] += mode == "wrong"
        body = json.dumps({"model_version": "1", "outputs": [{"data": numbers}]}).encode()
        self.send_response(503 if mode == "503" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def answering(mode):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode = mode
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def count(load, attribute, least=3):
    """Wait until the load has counted some, and return what it has counted."""
    tallies = [load.take()]

    def is_enough():
        tallies[0] += load.take()
        found = getattr(tallies[0], attribute)
        return (found if isinstance(found, int) else len(found)) >= least

    wait_for(is_enough, lambda: repr(tallies[0]))
    return tallies[0]


@pytest.mark.parametrize("kind", [ask_relu, ask_versioned])
def test_right_answers_are_neither_failures_nor_wrong(kind):
    with answering("right") as server, Load(server.server_port, [kind]) as load:
        tally = count(load, "sent")
        load.wait_for_all(str)
    assert (tally.failures, tally.wrong) == ([], [])


@pytest.mark.parametrize("kind", [ask_relu, ask_versioned])
def test_answer_with_one_other_number_is_wrong(kind):
    with answering("wrong") as server, Load(server.server_port, [kind]) as load:
        tally = count(load, "wrong")
    assert len(tally.wrong) == tally.sent


def test_answer_of_a_version_that_may_not_answer_any_more_is_wrong():
    with answering("right") as server, Load(server.server_port, [ask_versioned]) as load:
        load.factors.change((1, 1), (2, 7))
        assert count(load, "sent").wrong == []
        load.factors.change((2, 7))
        assert count(load, "wrong").failures == []


@pytest.mark.parametrize(("mode", "text"), [("503", "503 b'"), ("close", "RemoteDisconnected")])
def test_error_and_closed_connection_are_failures(mode, text):
    with answering(mode) as server, Load(server.server_port, [ask_relu]) as load:
        tally = count(load, "failures")
    assert len(tally.failures) == tally.sent
    assert all(text in failure for failure in tally.failures)


def test_refused_connection_is_a_failure():
    with answering("right") as server:
        port = server.server_port
    with Load(port, [ask_relu]) as load:
        assert all("ConnectionRefusedError" in failure for failure in count(load, "failures").failures)


def test_gap_ends_with_the_next_success():
    with answering("503") as server, Load(server.server_port, [ask_relu]) as load:
        count(load, "failures", 10)
        server.mode = "right"
        tally = count(load, "sent", 5)
    assert tally.longest_gap > 10 * 0.04


def test_longest_request_counts_though_other_clients_are_served_meanwhile():
    with answering("slow relu") as server, Load(server.server_port, [ask_relu, ask_versioned]) as load:
        count(load, "sent", 5)
        load.wait_for_all(str)
        tally = count(load, "sent", 20)
    assert tally.longest_request >= 0.3
    assert (tally.failures, tally.wrong) == ([], [])


def test_factors_are_those_of_the_last_change():
    factors = Factors()
    factors.change((3, 2))
    assert factors() == {("3", 2.0)}
