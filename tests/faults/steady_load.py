"""Steady clients of several models, which check the content of every answer and keep count.

A request that gets no response, or a status other than 200, has failed. A response with values other than expected is
wrong. Clients keep their connections, and before they send a request they look whether the server has closed it, as
urllib3 and curl do; they never send a request twice.
"""

import http.client
import json
import random
import select
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, field

import crashing_nodes
import numpy as np
import slow_models
from service import PATIENCE, wait_for

# Between the requests of one client.
PAUSE_SECONDS = 0.04


class WrongAnswerError(Exception):
    """An answer with status 200 whose content is not the expected."""


@dataclass
class Tally:
    """What happened in a span of time: requests, failures and wrong answers with their time and text."""

    sent: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_gap: float = 0.0  # seconds between two inferences that succeeded, of any client
    longest_request: float = 0.0  # seconds of a request that succeeded

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.sent + other.sent,
            self.failures + other.failures,
            self.wrong + other.wrong,
            max(self.longest_gap, other.longest_gap),
            max(self.longest_request, other.longest_request),
        )


class Factors:
    """The factors with which versions of the model `versioned` may answer at present, (version, factor)."""

    def __init__(self) -> None:
        self._allowed = frozenset({("1", 1.0)})

    def __call__(self) -> frozenset[tuple[str, float]]:
        """Return the factors allowed now."""
        return self._allowed

    def change(self, *allowed: tuple[int, float]) -> None:
        """Allow these from now on, and no others."""
        self._allowed = frozenset((str(version), float(factor)) for version, factor in allowed)


@dataclass(frozen=True)
class Exchange:
    """A request, and the check of its answer, which raises WrongAnswerError."""

    method: str
    path: str
    body: bytes | None
    headers: dict[str, str]
    check: Callable[[http.client.HTTPMessage, bytes], None]


def _expect(condition: bool, body: bytes) -> None:
    if not condition:
        raise WrongAnswerError(repr(body[:300]))


def _inference(model: str, request: dict, check: Callable[[dict], bool]) -> Exchange:
    body = json.dumps(request).encode()

    def check_body(_: http.client.HTTPMessage, answer: bytes) -> None:
        _expect(check(json.loads(answer)), answer)

    return Exchange("POST", f"/v2/models/{model}/infer", body, {}, check_body)


def _data(answer: dict) -> list:
    return answer["outputs"][0]["data"]


# --- The kinds of requests: each makes the next of its kind


def ask_relu(generator: random.Random, factors: Factors) -> Exchange:
    """JSON in and out; every second request may wait for a minute and no longer."""
    numbers = [generator.randrange(-1000, 1000) for _ in range(4)]
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": numbers}]}
    if numbers[0] % 2:
        request["parameters"] = {"timeout": 60_000_000}
    return _inference("relu", request, lambda answer: _data(answer) == [max(number, 0) for number in numbers])


def ask_binary(generator: random.Random, factors: Factors) -> Exchange:
    """Binary in and out, of up to 80 KB."""
    shape = generator.randrange(1, 5000), 4
    values = np.random.default_rng(generator.randrange(2**32)).standard_normal(shape, "f4")
    tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape)}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    expected = np.maximum(values, 0).tobytes()

    def check(headers: http.client.HTTPMessage, answer: bytes) -> None:
        _expect(answer[int(headers["Inference-Header-Content-Length"]) :] == expected, answer)

    size = {"Inference-Header-Content-Length": str(len(text))}
    return Exchange("POST", "/v2/models/relu/infer", text + values.tobytes(), size, check)


def ask_pipeline(generator: random.Random, factors: Factors) -> Exchange:
    """A pipeline of a custom node."""
    number = generator.randrange(1000, 1_000_000)
    return _inference("node", crashing_nodes.request(number), lambda answer: _data(answer) == [number])


def ask_slow(generator: random.Random, factors: Factors) -> Exchange:
    """Inferences of some milliseconds."""
    numbers = [generator.randrange(1000, slow_models.SLOW // 10) for _ in range(4)]
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": numbers}]}
    return _inference("slow", request, lambda answer: _data(answer) == numbers)


def ask_versioned(generator: random.Random, factors: Factors) -> Exchange:
    """A model that is changed: all numbers of an answer must be of one version that may answer."""
    numbers = [generator.randrange(1, 1000) for _ in range(4)]
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": numbers}]}
    before = factors()

    def check(answer: dict) -> bool:
        factor = _data(answer)[0] / numbers[0]
        allowed = (answer["model_version"], factor) in before | factors()
        return allowed and _data(answer) == [number * factor for number in numbers]

    return _inference("versioned", request, check)


def ask_health(generator: random.Random, factors: Factors) -> Exchange:
    """Liveness and metadata, which another worker answers; readiness falls while the service ends, as it should."""
    path = generator.choice(["/v2/health/live", "/v2/models/relu"])

    def check(_: http.client.HTTPMessage, answer: bytes) -> None:
        _expect(path == "/v2/health/live" or json.loads(answer)["name"] == "relu", answer)

    return Exchange("GET", path, None, {}, check)


KINDS = (ask_relu, ask_relu, ask_binary, ask_binary, ask_pipeline, ask_slow, ask_versioned, ask_health)


# --- The clients


class _Client:
    """One connection and its requests; `finished_at` is when the last request that succeeded had begun."""

    def __init__(self, load: "Load", kind: Callable[[random.Random, Factors], Exchange], number: int) -> None:
        self.kind, self.finished_at = kind, 0.0
        self._load, self._generator = load, random.Random(number)
        self.thread = threading.Thread(target=self._run, name=f"client {number}", daemon=True)

    def _run(self) -> None:
        while not self._load.is_over:
            connection = http.client.HTTPConnection("127.0.0.1", self._load.port, timeout=PATIENCE)
            with closing(connection):
                while not self._load.is_over and self._ask(connection):
                    time.sleep(PAUSE_SECONDS)

    def _ask(self, connection: http.client.HTTPConnection) -> bool:
        """Make one request; return whether the connection may be used again."""
        exchange, began = self.kind(self._generator, self._load.factors), time.monotonic()
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # the server has closed it; the next request opens another
        step = "connecting"
        try:
            if connection.sock is None:
                connection.connect()
            step = "sending"
            connection.request(exchange.method, exchange.path, exchange.body, exchange.headers)
            step = "waiting for the answer"
            answer = connection.getresponse()
            step = "reading the answer"
            body = answer.read()
            if answer.status != 200:
                self._load.count(self.kind, began, f"{answer.status} {body[:300]!r}")
                return not answer.will_close
            exchange.check(answer.headers, body)
        except WrongAnswerError as error:
            self._load.count(self.kind, began, wrong=str(error))
            return False
        except (OSError, http.client.HTTPException) as error:
            self._load.count(self.kind, began, f"{error!r} while {step}")
            time.sleep(PAUSE_SECONDS)
            return False
        self._load.count(self.kind, began)
        self.finished_at = began
        return not answer.will_close


class Load:
    """Clients of all kinds at a port; a context manager that ends them."""

    def __init__(self, port: int, kinds: Collection[Callable[[random.Random, Factors], Exchange]] = KINDS) -> None:
        self.port, self.is_over = port, False
        self.factors = Factors()
        self._lock = threading.Lock()
        self._tally, self._succeeded_at = Tally(), time.monotonic()
        self._clients = [_Client(self, kind, number) for number, kind in enumerate(kinds)]
        for client in self._clients:
            client.thread.start()

    def count(self, kind: Callable, began: float, failure: str = "", wrong: str = "") -> None:
        """Count a request that began at `began`, monotonic seconds."""
        now = time.monotonic()
        moment = f"{time.strftime('%H:%M:%S')} {kind.__name__} after {now - began:.3f} s: "
        with self._lock:
            tally = self._tally
            tally.sent += 1
            if failure:
                tally.failures.append(moment + failure)
                return
            if wrong:
                tally.wrong.append(moment + wrong)
                return
            tally.longest_request = max(tally.longest_request, now - began)
            if kind is not ask_health:
                tally.longest_gap = max(tally.longest_gap, now - self._succeeded_at)
                self._succeeded_at = now

    def take(self) -> Tally:
        """Return what happened since the last call."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def wait_for_all(self, explain: Callable[[], str]) -> None:
        """Wait until every client has succeeded with a request that it began after this call."""
        now = time.monotonic()

        def late() -> str:
            kinds = [client.kind.__name__ for client in self._clients if client.finished_at < now]
            return f"no success of {kinds}; {self._tally.failures[-5:]}\n{explain()}"

        wait_for(lambda: all(client.finished_at > now for client in self._clients), late)

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        for client in self._clients:
            client.thread.join(2 * PATIENCE)
            assert not client.thread.is_alive()
