"""An hour of mixed requests to models that infer batches: each response must be the one that is computed alone.

    PYTHONPATH=tests/helpers python tests/benchmarks/soak_batches.py [--seconds 3600] [--workers 2] [--seed 0]

Every model and pipeline is served twice, as NAME with `max_batch_size` and as NAME_alone without, both computed in
FP32. Each request goes to both at the same time and the responses are compared: status, error message, and outputs
byte by byte. Only the model `scores` may differ, by TOLERANCE: OpenVINO rounds its layer differently for one row
(ovms_rest/models/README.md, "Batches").

During the first half of the time the service is reloaded every 15 s, every other time with a model that has changed on
disk. The next eighth warms up the last workers. After it and at the end, their descriptors and memory are compared,
without clients. Exits with 1 on any difference, failure or growth.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import batching
import cv2
import model_zoo
import numpy as np
import openvino
import slow_models
from measure import machine, pss_megabytes
from openvino import Type, opset15
from raw_http import post, post_chunked, receive
from service import ROOT, open_files, serve, write_config
from soak import PATIENCE, Context, Failure, compare, measure, print_failures, print_measures

LIMIT = 8
# Of an output's largest value, for `scores`.
TOLERANCE = 1e-5
RELOAD_SECONDS = 15
# A few, since OpenVINO keeps memory for each shape that it has met.
WIDTHS = 1000, 30_000, 100_000
SCORES = 2048, 1000  # inputs and outputs


# --- Models


def halving():
    """Return half of x, x FP32 [-1,-1] -> y: the values of a pipeline of it change at each node."""
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    return model_zoo.model_of({"y": opset15.multiply(x, opset15.constant(0.5, Type.f32))}, [x])


def dense(inputs, outputs, has_bias=False):
    """Return a layer, x FP32 [-1,inputs] -> y FP32 [-1,outputs]."""
    x = model_zoo.parameter("x", (-1, inputs), Type.f32)
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((outputs, inputs), np.float32) / inputs**0.5
    y = opset15.matmul(x, opset15.constant(weights), False, True)
    if has_bias:
        y = opset15.relu(opset15.add(y, opset15.constant(generator.standard_normal((1, outputs), np.float32))))
    return model_zoo.model_of({"y": y}, [x])


MODELS = {
    "relu": model_zoo.relu((-1, -1)),
    "halving": halving(),
    "slow": slow_models.slow_relu(),
    "strings": model_zoo.strings(),
    "state": model_zoo.accumulating(),
    "passing": model_zoo.passthrough(x=(Type.f32, (-1, 4))),
    "product": model_zoo.product(),
    "sums": model_zoo.add((-1, -1)),
    "images": model_zoo.relu((-1, 8, 8, 3)),
    "layer": dense(256, 256),
    "scores": dense(*SCORES, has_bias=True),
    "encoder": batching.encoder(),
    "digits": openvino.Core().read_model(ROOT / "ovms_rest/demo/digits/1/digits.xml"),
}


def pipelines(suffix):
    """Configure pipelines of `halving`: two nodes in a row, and a node for each part of a request."""
    output = {"data_item": "y", "alias": "y"}
    node = {"name": "a", "model_name": f"halving{suffix}", "type": "DL model", "outputs": [output]}
    node["inputs"] = [{"x": {"node_name": "request", "data_item": "x"}}]
    second = {**node, "name": "b", "inputs": [{"x": {"node_name": "a", "data_item": "y"}}]}
    ends = [[{"y": {"node_name": name, "data_item": "y"}}] for name in "ab"]
    both = {"name": f"both{suffix}", "inputs": ["x"], "nodes": [node, second], "outputs": ends[1]}
    parts = {"name": f"parts{suffix}", "inputs": ["x"], "nodes": [node], "outputs": ends[0], "demultiply_count": -1}
    return [both, parts]


def save_models(directory: Path) -> Path:
    """Save all models; return a config that serves each with batches and alone."""
    entries = []
    for name, model in MODELS.items():
        model_zoo.save(model, directory / name)
        entry = {"name": name, "base_path": name, "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        if name == "images":
            entry["shape"] = f"(1:{LIMIT},8,8,3)"  # with any number of rows, encoded images are not resized
        entries += [{**entry, "max_batch_size": LIMIT}, {**entry, "name": f"{name}_alone"}]
    return write_config(directory, *entries, pipeline_config_list=pipelines("") + pipelines("_alone"))


# --- Requests


class Tensor(NamedTuple):
    """An input of a request: an array of numbers, or a list of elements of bytes."""

    name: str
    values: Any
    datatype: str = "FP32"

    @property
    def shape(self) -> list[int]:
        return [len(self.values)] if self.datatype == "BYTES" else list(self.values.shape)

    def to_bytes(self) -> bytes:
        if self.datatype == "BYTES":
            return b"".join(struct.pack("<I", len(element)) + element for element in self.values)
        return self.values.tobytes()

    def to_json(self) -> list:
        if self.datatype == "BYTES":
            return [element.decode() for element in self.values]
        return self.values.tolist()


class Exchange(NamedTuple):
    """A request as bytes, for the model with batches and for the one without; `may_expire` if it has a timeout."""

    model: str
    id: str
    together: bytes
    alone: bytes
    may_expire: bool
    exceeds: bool  # has more rows than the model with batches takes


def numbers(generator, *shape):
    return np.random.default_rng(generator.randrange(2**32)).standard_normal(shape, np.float32)


def inputs_of(model, rows, generator):
    """Return random inputs of a model."""
    match model:
        case "strings":
            words = ["".join(generator.choices("abé \0", k=generator.randint(0, 9))) for _ in range(rows)]
            return [Tensor("text", [word.encode() for word in words], "BYTES")]
        case "product":  # a batch fails, and each request is inferred alone
            return [Tensor("left", numbers(generator, 1, 1)), Tensor("right", numbers(generator, 1, 1))]
        case "sums":  # 2 and 3 columns do not fit
            return [
                Tensor(name, numbers(generator, rows, generator.choice((1, 2, 2, 3)))) for name in ("left", "right")
            ]
        case "images" if generator.random() < 0.7:
            pictures = [np.abs(numbers(generator, *generator.choice(((8, 8), (20, 13))), 3) * 80) for _ in range(rows)]
            encoded = [cv2.imencode(".png", picture.clip(0, 255).astype(np.uint8))[1].tobytes() for picture in pictures]
            if generator.random() < 0.1:
                encoded[-1] = encoded[-1][:40]
            return [Tensor("x", encoded, "BYTES")]
        case "slow":
            # Up to 8 ms, so that others queue up.
            return [Tensor("x", numbers(generator, rows, 2) + np.float32(generator.randrange(5000)))]
        case "encoder":
            words = np.random.default_rng(generator.randrange(2**32))
            return [Tensor("tokens", words.integers(0, batching.WORDS, (rows, batching.TOKENS)), "INT64")]
        case "parts":
            return [Tensor("x", numbers(generator, generator.randint(1, 5), rows, generator.randint(1, 3)))]
    shape = {"images": (8, 8, 3), "state": (2,), "passing": (4,), "layer": (256,), "scores": SCORES[:1]}.get(model)
    if model == "digits":
        return [Tensor("image", np.abs(numbers(generator, rows, 8, 8, 1)))]
    return [Tensor("x", numbers(generator, rows, *(shape or (generator.choice((1, 2, 2, 3, 700)),))))]


CLASSIFIED = {"relu": "y", "halving": "y", "both": "y", "layer": "y", "digits": "probabilities", "encoder": "embedding"}
WEIGHTS = {"relu": 6, "halving": 3, "both": 3, "parts": 2, "slow": 1, "strings": 3, "state": 2, "passing": 3}
WEIGHTS |= {"product": 1, "sums": 2, "images": 2, "layer": 3, "scores": 2, "encoder": 2, "digits": 3}
REQUEST_IDS = itertools.count()


def spoil(root, generator):
    """Make a request invalid."""
    tensor = root["inputs"][0]
    match generator.randrange(6):
        case 0:
            tensor["datatype"] = "FP64"
        case 1:
            tensor["shape"] = [*tensor["shape"], 1, 1, 1]
        case 2:
            tensor["name"] = "nothing"
        case 3:
            root["outputs"] = [{"name": "nothing"}]
        case 4:
            tensor["shape"] = [tensor["shape"][0] + 1, *tensor["shape"][1:]]
        case 5:
            root["parameters"] = {"timeout": None}


def make_exchange(generator: random.Random, model: str = "", rows: int = 0) -> Exchange:
    """Return a random request, some of which are invalid."""
    model = model or generator.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
    rows = rows or generator.choice((1, 1, 1, 1, 2, 3, LIMIT))
    exceeds = generator.random() < 0.01 and model not in ("product", "parts", "images", "slow")
    if exceeds:
        rows = LIMIT + 1
    request_id = f"{next(REQUEST_IDS)}"
    root: dict[str, Any] = {"id": request_id, "inputs": [], "parameters": {}}
    data = b""
    for tensor in inputs_of(model, rows, generator):
        entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if generator.random() < 0.5 or (tensor.name == "x" and tensor.datatype == "BYTES"):
            entry["parameters"] = {"binary_data_size": len(tensor.to_bytes())}
            data += tensor.to_bytes()
        else:
            entry["data"] = tensor.to_json()
        root["inputs"].append(entry)
    if generator.random() < 0.3:
        root["parameters"]["priority"] = generator.randint(0, 3)
    if generator.random() < 0.3:
        root["parameters"]["binary_data_output"] = True
    if model in CLASSIFIED and generator.random() < 0.15:
        root["outputs"] = [{"name": CLASSIFIED[model], "parameters": {"classification": generator.randint(1, 3)}}]
    if not exceeds and generator.random() < 0.03:
        spoil(root, generator)
    may_expire = not exceeds and isinstance(root["parameters"].get("timeout", 0), int) and generator.random() < 0.05
    alone = json.dumps(root).encode()
    if may_expire:
        root["parameters"]["timeout"] = generator.randint(1, 30_000)
    together = json.dumps(root).encode()
    version = "/versions/1" if generator.random() < 0.2 else ""
    chunked = generator.random() < 0.1
    return Exchange(
        model,
        request_id,
        _write(f"/v2/models/{model}{version}/infer", together, data, chunked),
        _write(f"/v2/models/{model}_alone{version}/infer", alone, data, chunked),
        may_expire,
        exceeds,
    )


def _write(path: str, text: bytes, data: bytes, chunked: bool) -> bytes:
    fields = (f"Inference-Header-Content-Length: {len(text)}",) if data else ()
    body = text + data
    middle = len(body) // 2
    return post_chunked(path, body[:middle], body[middle:], fields=fields) if chunked else post(path, body, *fields)


# --- Responses


class Comparison:
    """Compares responses, and counts."""

    def __init__(self) -> None:
        self.compared: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.largest = 0.0

    def check(self, exchange: Exchange, together, alone) -> None:
        """Raise Failure unless a response is the one computed alone."""
        if exchange.may_expire and together.status == 503 and b"timeout" in together.body:
            self.outcomes["expired"] += 1
            return
        if exchange.exceeds:
            if together.status != 400 or b"max_batch_size" not in together.body or alone.status not in (200, 400):
                self._fail(exchange, together, alone)
            self.outcomes["with too many rows"] += 1
            return
        if alone.status not in (200, 400) or together.status != alone.status:
            self._fail(exchange, together, alone)
        if alone.status == 400:
            if alone.json()["error"].replace("_alone'", "'") != together.json()["error"]:
                self._fail(exchange, together, alone)
            self.outcomes["invalid"] += 1
        else:
            self._check_outputs(exchange, together, alone)
        self.compared[exchange.model] += 1

    def _check_outputs(self, exchange, together, alone) -> None:
        (root, data), (root_alone, data_alone) = map(_split, (together, alone))
        if (root["model_name"], root["id"], root_alone["id"]) != (exchange.model, exchange.id, exchange.id):
            self._fail(exchange, together, alone)
        if (root["outputs"], data) == (root_alone["outputs"], data_alone):
            return
        if exchange.model != "scores":
            self._fail(exchange, together, alone)
        scores, expected = _scores(root, data), _scores(root_alone, data_alone)
        difference = float(np.abs(scores - expected).max() / np.abs(expected).max())
        self.largest = max(self.largest, difference)
        self.outcomes["rounded differently"] += 1
        if not difference <= TOLERANCE:
            self._fail(exchange, together, alone)

    def _fail(self, exchange, together, alone) -> None:
        self.outcomes["DIFFERENT"] += 1
        raise Failure(
            f"{exchange.model} {exchange.together[:400]!r}: {together.status} {together.body[:300]!r}, "
            f"alone {alone.status} {alone.body[:300]!r}"
        )


def _split(answer) -> tuple[dict, bytes]:
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    return json.loads(answer.body[:length]), answer.body[length:]


def _scores(root, data):
    (output,) = root["outputs"]
    values = np.frombuffer(data, "f4") if data else np.float32(output["data"])
    return values.reshape(output["shape"])


# --- Clients


class Channel:
    """A connection that is opened again when the server has closed it.

    Reloads close connections that are idle for longer than a second, as clients here may be on a busy machine; a
    request to a closed one is sent again.
    """

    def __init__(self, context: "BatchContext") -> None:
        self._context = context
        self._connection = context.connect()
        self._data = b""

    def send(self, data: bytes) -> None:
        self._data = data
        with contextlib.suppress(ConnectionError):  # `receive` sends it again
            self._connection.sendall(data)

    def receive(self):
        try:
            answer = receive(self._connection, "POST")
        except ConnectionError:
            if not self._context.is_reloading:
                raise
            self._context.comparison.outcomes["sent again"] += 1
            self._reopen()
            self._connection.sendall(self._data)
            answer = receive(self._connection, "POST")
        if answer.headers.get("connection") == "close":
            self._reopen()
        return answer

    def vanish(self, generator) -> None:
        """Disconnect, by closing or by a reset."""
        if generator.random() < 0.5:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._reopen()

    def _reopen(self) -> None:
        self._connection.close()
        self._connection = self._context.connect()

    def close(self) -> None:
        self._connection.close()


class BatchContext(Context):
    def __init__(self, service) -> None:
        super().__init__(service, excused=False)
        self.comparison = Comparison()
        self.is_reloading = False
        self._reported = 0

    def report(self) -> None:
        """Print the number of responses so far, and new failures."""
        new = self.failures[self._reported :]
        self._reported += len(new)
        lines = [f"{sum(self.comparison.compared.values())} responses compared", *new]
        print(time.strftime("%H:%M:%S"), "\n  ".join(lines), file=sys.stderr, flush=True)

    def settle(self, workers: int) -> None:
        """Wait for the end of all reloads."""
        answer = self.service.request("POST", "/v1/config/reload")
        if answer.status not in (200, 201):
            raise Failure(f"{answer.status} {answer.body!r}")
        self.service.wait_for_workers(workers)


def mixed(context: BatchContext, generator: random.Random) -> None:
    """Send requests of all kinds at the same time, each to both models; some clients vanish."""
    with contextlib.ExitStack() as stack:
        count = generator.randint(1, 12)
        # Most of a round are for one model: then batches are large.
        pairs = [[stack.enter_context(contextlib.closing(Channel(context))) for _ in range(2)] for _ in range(count)]
        for _ in range(generator.randint(1, 30)):
            model = make_exchange(generator).model
            exchanges = [make_exchange(generator, model if generator.random() < 0.6 else "") for _ in pairs]
            vanished = []
            for (one, other), exchange in zip(pairs, exchanges, strict=True):
                vanishes = generator.random() < 0.03
                cut = generator.choice((10, len(exchange.together) // 2, None)) if vanishes else None
                one.send(exchange.together[:cut])
                other.send(exchange.alone)
                vanished.append(vanishes)
            for (one, _), vanishes in zip(pairs, vanished, strict=True):
                if vanishes:
                    one.vanish(generator)
                    context.comparison.outcomes["vanished"] += 1
            for (one, other), exchange, vanishes in zip(pairs, exchanges, vanished, strict=True):
                if vanishes:
                    other.receive()
                else:
                    together = one.receive()
                    context.comparison.check(exchange, together, other.receive())
            if context.stopping.is_set():
                return


def slow_readers(context: BatchContext, generator: random.Random) -> None:
    """Infer wide rows together and read the responses slowly, while others infer with the same model."""
    with contextlib.ExitStack() as stack:
        width, arrays, connections = generator.choice(WIDTHS), [], []
        for _ in range(4):
            arrays.append(numbers(generator, generator.randint(1, 2), width))
            tensor = {"name": "x", "datatype": "FP32", "shape": list(arrays[-1].shape)}
            text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            connection = stack.enter_context(socket.socket())
            connection.settimeout(PATIENCE)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            connection.connect(("127.0.0.1", context.service.port))
            connection.sendall(_write("/v2/models/relu/infer", text, arrays[-1].tobytes(), chunked=False))
            connections.append(connection)
        for connection, array in zip(connections, arrays, strict=True):
            time.sleep(generator.random() * 0.3)
            answer = receive(connection, "POST")
            if answer.status != 200 or not answer.body.endswith(np.maximum(array, 0).tobytes()):
                context.comparison.outcomes["DIFFERENT"] += 1
                raise Failure(f"a slow reader got {answer.status} {answer.headers} {answer.body[:300]!r}")
            context.comparison.compared["relu, read slowly"] += 1


CLIENTS: dict[Callable[[BatchContext, random.Random], None], int] = {mixed: 6, slow_readers: 1}


# --- The run


def reload(context: BatchContext, directory: Path, generator: random.Random) -> None:
    """Reload the service at intervals, every other time with a changed model."""
    for count in itertools.count():
        if context.stopping.wait(RELOAD_SECONDS):
            return
        if count % 2:
            os.utime(directory / generator.choice([*MODELS]) / "1" / "model.xml")
        context.service.signal(signal.SIGHUP)
        context.counts["reloads"] += 1


def run_clients(context: BatchContext, seconds: float, seed: int, reloading: Path | None = None) -> None:
    """Run all clients for some seconds and wait for their end; reload the models in a directory meanwhile if given."""
    context.stopping.clear()
    context.is_reloading = reloading is not None
    clients = [client for client, count in CLIENTS.items() for _ in range(count)]
    threads = [threading.Thread(target=context.run, args=(each, seed + place)) for place, each in enumerate(clients)]
    if reloading is not None:
        threads.append(threading.Thread(target=reload, args=(context, reloading, random.Random(seed))))
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while not context.stopping.wait(min(60, max(end - time.monotonic(), 0))) and time.monotonic() < end:
        context.report()
    context.stopping.set()
    for thread in threads:
        thread.join(2 * PATIENCE)
        if thread.is_alive():
            context.failures.append("a client is hanging")


def describe_batches(service) -> None:
    """Print how many rows the models inferred together."""
    for name in MODELS:
        found = service.get(f"/v2/models/{name}/stats").json()["model_stats"][0]
        rows, executions = found["inference_count"], found["execution_count"]
        if not executions:
            continue
        sizes = " ".join(f"{entry['batch_size']}:{entry['compute_infer']['count']}" for entry in found["batch_stats"])
        print(f"  {name}: {rows} rows in {executions} inferences, {rows / executions:.2f} each; {sizes}")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seconds", 3600), ("workers", 2), ("seed", 0)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    chosen = arguments.parse_args()
    seconds, workers, seed = chosen.seconds, chosen.workers, 1000 * chosen.seed
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = save_models(directory)
        with serve(directory, "-w", str(workers), config=config, OVMS_REST_MAX_WAITING="1000") as service:
            service.wait_for_workers(workers)
            context = BatchContext(service)
            arbiter = [(len(open_files(service.process.pid)), pss_megabytes([service.process.pid]))]
            run_clients(context, seconds / 2, seed, directory)
            context.settle(workers)
            run_clients(context, seconds / 8, seed + 100)
            before = measure(context, workers)
            run_clients(context, seconds * 3 / 8, seed + 200)
            after = measure(context, workers)
            arbiter.append((len(open_files(service.process.pid)), pss_megabytes([service.process.pid])))
            compare(context, before, after, steady_workers=True)
            for text in ("Traceback", "WORKER TIMEOUT", "error on a connection", "cannot infer batches"):
                if text in service.log:
                    context.failures.append(f"the log has {text!r}: {service.log[service.log.index(text) :][:2000]}")
            compared, outcomes = context.comparison.compared, context.comparison.outcomes
            print(f"{seconds} s, {workers} workers, {context.counts['reloads']} reloads; {machine()}")
            print(f"{sum(compared.values())} responses compared, {outcomes['DIFFERENT']} different")
            print(", ".join(f"{count} {kind}" for kind, count in sorted(compared.items())))
            print(", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items())))
            print(f"largest difference of scores: {context.comparison.largest:.1e} of the largest value")
            print("rows inferred together, and the number of inferences by their requests' rows:")
            describe_batches(service)
    print_measures(before, after)
    print("arbiter: " + ", then ".join(f"{opened} fd {size:.1f} MB" for opened, size in arbiter))
    return print_failures(context)


if __name__ == "__main__":
    sys.exit(main())
