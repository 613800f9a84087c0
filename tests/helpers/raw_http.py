"""HTTP as bytes: requests that a client library would not send, and several responses in a row."""

import contextlib
import io
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator

from service import Answer, Service, read_response, receive

RELU = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, -2, 3, -4]}]}).encode()
RELU_PATH = "/v2/models/relu/infer"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def head(method: str, path: str, *fields: str, version: str = "1.1") -> bytes:
    """Return the head of a request, with a Host."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *fields, "", ""]).encode("latin-1")


def post(path: str, body: bytes, *fields: str, version: str = "1.1") -> bytes:
    """Return a request with a body."""
    return head("POST", path, f"Content-Length: {len(body)}", *fields, version=version) + body


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """Return a chunk; one without data is the last."""
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def post_chunked(path: str, *chunks: bytes, fields: tuple[str, ...] = ()) -> bytes:
    """Return a request with a chunked body."""
    return head("POST", path, "Transfer-Encoding: chunked", *fields) + b"".join(map(chunk, chunks)) + chunk(b"")


def infer(model: str, request: dict, *fields: str) -> bytes:
    """Return an inference request."""
    return post(f"/v2/models/{model}/infer", json.dumps(request).encode(), *fields)


@contextlib.contextmanager
def connected(service: Service, *chunks: bytes) -> Iterator[socket.socket]:
    """Open a connection and send bytes."""
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for data in chunks:
            connection.sendall(data)
        yield connection


def receive_rest(connection: socket.socket) -> bytes:
    """Read until the server closes; a reset counts as closing."""
    received = []
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(2**20):
            received.append(data)
    return b"".join(received)


def exchange(service: Service, *chunks: bytes, half: bool = True) -> bytes:
    """Send bytes on a new connection, then close its sending side if `half`; return all bytes that the server sends."""
    with connected(service) as connection:
        with contextlib.suppress(OSError):  # refused and closed before all was sent
            for data in chunks:
                connection.sendall(data)
            if half:
                connection.shutdown(socket.SHUT_WR)
        return receive_rest(connection)


def parse(data: bytes, *methods: str) -> list[Answer]:
    """Return the responses in `data`, to requests of these methods, then of GETs; none may be broken."""
    stream, answers = io.BytesIO(data), []
    while stream.tell() < len(data):
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        answers.append(read_response(stream, method))
    return answers


def parse_all(data: bytes, *methods: str) -> list[Answer]:
    """Return the responses in `data` as `parse` does; a response that was cut off counts as an aborted connection."""
    try:
        return parse(data, *methods)
    except Exception as error:
        raise ConnectionAbortedError(f"cut off after {len(data)} bytes: {error!r}") from error


def is_closed(connection: socket.socket) -> bool:
    """Wait for the next bytes; return whether the connection has ended."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


class Barrier:
    """A connection on which to wait until the only worker has read everything sent to it before.

    The worker takes its connections in the order in which bytes arrived, and the barrier's request arrives last.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._connection = service.connect()
        self.wait()

    def wait(self) -> None:
        try:
            answer = self._ask()
        except ConnectionError:  # the worker closed the idle connection
            self._connection.close()
            self._connection = self._service.connect()
            answer = self._ask()
        assert answer.status == 200

    def _ask(self) -> Answer:
        self._connection.sendall(LIVE)
        return receive(self._connection)

    def close(self) -> None:
        self._connection.close()


def send_pieces(connection: socket.socket, pieces: list[bytes], barrier: Barrier) -> None:
    """Send pieces of a stream so that the worker reads each of them separately."""
    barrier.wait()  # until the connection has been accepted
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            barrier.wait()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


class Load:
    """Clients that infer without a pause, each on a connection that it keeps until the server closes it.

    `answered` counts responses, `failures` lists errors: a response to another request, or the end of a connection
    that no response had announced. With `reconnect` a client continues after an announced end.
    """

    def __init__(self, connect: Callable[[], socket.socket], clients: int = 4, reconnect: bool = True) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._connect = connect
        self._reconnect = reconnect
        self._stopping = False
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        try:
            while not self._stopping:
                with self._connect() as connection:
                    self._converse(connection, number)
                if not self._reconnect:
                    return
        except Exception as error:
            self.failures.append(f"client {number}: {error!r}")

    def _converse(self, connection: socket.socket, number: int) -> None:
        closing = False
        while not closing and not self._stopping:
            number = -number - 1
            data = [number, 1, -1, number]
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}
            connection.sendall(infer("relu", {"inputs": [tensor]}))
            answer = receive(connection, "POST")
            assert answer.status == 200, answer
            assert answer.json()["outputs"][0]["data"] == [max(item, 0) for item in data]
            closing = answer.headers.get("connection") == "close"
            self.answered += 1

    def join(self) -> None:
        """Wait for clients that do not reconnect."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self.join()
