"""No response depends on another request (protocol/README.md section 9): many clients, every response checked.

What a client gets is compared with what this process computes, while others fail, vanish, read slowly and have files
replaced.
"""

import contextlib
import gzip
import json
import random
import shutil
import socket
import struct
import time
from collections import deque
from pathlib import Path

import cv2
import model_zoo
import numpy as np
import openvino
from openvino import Type, opset15
from raw_http import post, receive
from service import repeating, serve, write_config

CLIENTS = 6
ROUNDS = 5  # of each client, at least
REPLACEMENTS = 3  # in each way, at least
WIDTH = 4096  # values of a row of the model whose file is replaced


def scaled(factor):
    """A model whose weights identify its file: x FP32 [-1,4096] -> y = factor * x."""
    x = model_zoo.parameter("x", (-1, WIDTH), Type.f32)
    weights = opset15.constant(np.full((1, WIDTH), factor, np.float32))
    return model_zoo.model_of({"y": opset15.multiply(x, weights)}, [x])


def highest():
    """The highest value of every row: x FP32 [-1,-1] -> y [n,1]; OpenVINO leaves it unwritten for empty rows."""
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    y = opset15.topk(x, opset15.constant(1), 1, "max", "value").output(0)
    y.set_names({"y"})
    return openvino.Model([opset15.result(y)], [x], "highest")


class Files:
    """The weights of a served model, replaced repeatedly in every way in which people copy files."""

    WAYS = 5

    def __init__(self, base_path: Path, spare: Path) -> None:
        model_zoo.save(scaled(1), base_path)
        (self._served,) = (base_path / "1").glob("*.bin")
        self._spares = {}
        for factor in range(1, 6):
            model_zoo.save(scaled(factor), spare / str(factor))
            (self._spares[factor],) = (spare / str(factor) / "1").glob("*.bin")
        self.factors = frozenset(self._spares)

    def replace(self, factor: int, way: int) -> None:
        new = self._spares[factor]
        if way == 0:  # cp: truncated, then written
            shutil.copyfile(new, self._served)
        elif way == 1:  # cp -p
            shutil.copy2(new, self._served)
        elif way == 2:  # dd conv=notrunc
            with self._served.open("r+b") as file:
                file.write(new.read_bytes())
        elif way == 3:  # mv
            beside = self._served.with_name("new")
            shutil.copyfile(new, beside)
            beside.rename(self._served)
        else:  # scp, in pieces
            with new.open("rb") as source, self._served.open("wb", buffering=0) as file:
                while piece := source.read(4000):
                    file.write(piece)


class Client:
    """A client that makes requests of many kinds, and checks each response."""

    def __init__(self, service, files: Files, seed: int) -> None:
        self._service = service
        self._files = files
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(seed)
        self.rounds = 0

    def run(self) -> None:
        kinds = [
            self.relu, self.through, self.compressed, self.picture, self.state, self.highest, self.nothing,
            self.product, self.shapes, self.values, self.scaled, self.slow, self.vanish, self.garbage,
        ]  # fmt: skip
        for kind in self._random.sample(kinds, len(kinds)):
            kind()
        self.rounds += 1

    def _try(self, send):
        """Return the response of `send`; try again when its connection is closed without one.

        A worker that drains does so when no request arrives in a second, on a busy machine also on a new connection. A
        worker that dies shows in the log.
        """
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                return send()
        raise AssertionError("three connections were closed without a response")

    def _post(self, model, body, length=None, **headers):
        """Infer; return the status, and the outputs as bytes or the error."""
        if length is not None:
            headers["Inference_Header_Content_Length"] = str(length)
        answer = self._try(lambda: self._service.infer(model, body, **headers))
        return answer.status, _outputs(answer)

    def _numbers(self, *shape):
        return self._numpy.standard_normal(shape).astype(np.float32)

    def _ask(self, model, *arrays, names=("x",), coding=None):
        body, length = _request(arrays, names, self._random.random() < 0.5)
        headers = {} if coding is None else {"Content_Encoding": coding}
        return self._post(model, body if coding is None else gzip.compress(body, 1), length, **headers)

    def relu(self):
        x = self._numbers(*self._random.choice([(1, 4), (3, 4), (500, 4), (5000, 4)]))
        assert self._ask("relu", x) == (200, [np.maximum(x, 0).tobytes()])

    def through(self):
        x = self._numbers(self._random.randrange(4_000, 9_000))
        assert self._ask("through", x) == (200, [x.tobytes()])

    def compressed(self):
        x = self._numbers(self._random.choice([5_000, 300_000]))
        assert self._ask("through", x, coding="gzip") == (200, [x.tobytes()])

    def picture(self):
        pixels = self._numpy.integers(0, 256, (self._random.randrange(50, 300), 100, 3), np.uint8)
        file = cv2.imencode(".png", pixels)[1].tobytes()
        size = {"binary_data_size": len(file) + 4}
        tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": size}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body = head + struct.pack("<I", len(file)) + file
        assert self._post("picture", body, len(head)) == (200, [pixels.tobytes()])

    def state(self):
        x = self._numbers(self._random.randrange(1, 4), 2)
        assert self._ask("state", x) == (200, [x.tobytes()])

    def highest(self):
        x = self._numbers(self._random.randrange(1, 50), self._random.randrange(1, 50))
        assert self._ask("highest", x) == (200, [x.max(1, keepdims=True).tobytes()])

    def nothing(self):
        status, error = self._ask("highest", self._numbers(self._random.randrange(1, 50), 0))
        assert (status, "TopK" in error) == (400, True)

    def product(self):
        rows, inner, columns = (self._random.randrange(1, 9) for _ in range(3))
        left, right = (
            self._numpy.integers(-9, 9, shape).astype(np.float32) for shape in ((rows, inner), (inner, columns))
        )
        assert self._ask("product", left, right, names=("left", "right")) == (200, [(left @ right).tobytes()])

    def shapes(self):
        status, error = self._ask("product", self._numbers(2, 3), self._numbers(4, 5), names=("left", "right"))
        assert (status, "dimension" in error) == (400, True)

    def values(self):
        rows, columns = self._random.randrange(2, 9), self._random.randrange(1, 9)  # never the trial's single value
        x, dims = np.abs(self._numbers(rows * columns)), [rows, columns + self._random.choice([0, 0, 1])]
        body = {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [len(x)], "data": x.tolist()},
                {"name": "dims", "datatype": "INT64", "shape": [2], "data": dims},
            ],
            "parameters": {"binary_data_output": True},
        }
        status, found = self._post("values", body)
        if dims[1] == columns:
            assert (status, found) == (200, [x.tobytes()])
        else:
            assert (status, "Reshape" in found) == (400, True)

    def scaled(self):
        x = self._numpy.integers(1, 9, (self._random.choice([1, 1, 8]), WIDTH)).astype(np.float32)
        status, outputs = self._ask("scaled", x)
        assert status == 200, outputs
        (y,) = outputs
        factors = set(np.unique(np.frombuffer(y, np.float32).reshape(x.shape) / x).tolist())
        assert len(factors) == 1, factors
        assert factors <= self._files.factors

    def slow(self):
        """A response that is read in pieces, with pauses."""
        x = self._numbers(700_000)
        answer = self._try(lambda: self._read_slowly(_encode("through", x)))
        assert (answer.status, _outputs(answer)) == (200, [x.tobytes()])

    def _read_slowly(self, data):
        with self._service.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.sendall(data)
            time.sleep(self._random.choice([0, 0.05, 0.2]))
            return receive(connection, "POST")

    def vanish(self):
        """A client that closes or resets its connection while it sends, waits or reads."""
        data = _encode("through", self._numbers(100_000))
        with contextlib.suppress(ConnectionError), self._service.connect() as connection:
            if self._random.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data[: self._random.choice([10, 300, 5_000, len(data)])])
            if self._random.random() < 0.3:
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    connection.recv(1000)

    def garbage(self):
        body = self._random.choice([b"", b"{", b'{"inputs":[]}', b'{"inputs":[{"name":"x"}]}', self._numpy.bytes(300)])
        assert self._post("relu", body)[0] == 400


def _request(arrays, names, binary):
    """Return the body of a request for binary outputs, and the length of its JSON if there is more."""
    entries, sections = [], []
    for name, array in zip(names, arrays, strict=True):
        entry = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if binary:
            sections.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(sections), len(head) if binary else None


def _encode(model, array):
    """Encode a binary request whose input is `x`."""
    body, length = _request([array], ["x"], True)
    return post(f"/v2/models/{model}/infer", body, f"Inference-Header-Content-Length: {length}")


def _outputs(answer):
    if answer.status != 200:
        assert list(answer.json()) == ["error"]
        return answer.json()["error"]
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    found, rest = [], answer.body[length:]
    for output in json.loads(answer.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found.append(rest[:size])
        rest = rest[size:]
    assert not rest
    return found


def make_config(directory):
    models = {
        "relu": model_zoo.relu(),
        "through": model_zoo.passthrough(x=(Type.f32, (-1,))),
        "picture": model_zoo.passthrough(x=(Type.u8, (1, -1, -1, 3))),
        "state": model_zoo.accumulating(),
        "highest": highest(),
        "product": model_zoo.product(),
        "values": model_zoo.reshaping(),
    }
    for name, model in models.items():
        model_zoo.save(model, directory / name)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return write_config(
        directory,
        *({"name": name, "base_path": name, "plugin_config": exact} for name in [*models, "scaled"]),
    )


def test_no_response_depends_on_another_request_or_on_files(tmp_path):
    files, config = Files(tmp_path / "scaled", tmp_path / "spare"), make_config(tmp_path)
    with serve(tmp_path, "-w", "2", config=config, OVMS_REST_METRICS_ENABLE="true") as service:
        clients = [Client(service, files, seed) for seed in range(CLIENTS)]
        free = deque(clients)

        def run_a_client():
            client = free.popleft()
            client.run()
            free.append(client)

        with repeating(run_a_client, CLIENTS) as failures:
            replace_files(service, files, lambda: failures or min(client.rounds for client in clients) >= ROUNDS)
        metrics = service.get("/metrics").body.decode()
        assert "\novms_rest_worker_restarts 0.0\n" in metrics
        assert "Traceback" not in service.log
        assert " died " not in service.log
        files.replace(3, 3)
        x = np.ones((1, WIDTH), np.float32)
        body, length = _request([x], ["x"], True)
        ask = lambda: _outputs(service.infer("scaled", body, Inference_Header_Content_Length=str(length)))  # noqa: E731
        service.wait_for(lambda: ask() == [(3 * x).tobytes()])


def replace_files(service, files, is_over):
    """Replace the file of a served model, and sometimes reload in addition to the service's own polling."""
    choices = random.Random(0)
    ways = choices.sample(range(Files.WAYS), Files.WAYS * REPLACEMENTS, counts=[REPLACEMENTS] * Files.WAYS)
    while ways or not is_over():
        files.replace(choices.choice(sorted(files.factors)), ways.pop() if ways else choices.randrange(Files.WAYS))
        if choices.random() < 0.3:
            assert service.request("POST", "/v1/config/reload").status in (200, 201)
        else:
            time.sleep(choices.random())
