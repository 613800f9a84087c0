"""What the tests of a worker as a server share: requests of known cost, connections, and the state of its process."""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import slow_models
from processes import stopped
from raw_http import LIVE, RELU, RELU_PATH, Barrier, connected, exchange, head, infer, parse, post, receive
from service import Answer, Service, serve

MIB = 2**20
CHUNKED = head("POST", RELU_PATH, "Transfer-Encoding: chunked")
ENDLESS = infer("counting", slow_models.count(2**30))


def slow(factor: int = 1) -> bytes:
    """Write an inference that takes a core `factor` times some 50 to 100 ms."""
    return infer("counting", slow_models.count(factor * slow_models.SLOW))


SLOW = slow()


@contextlib.contextmanager
def starting(make_directory: Callable[[str], Path], config: Path) -> Iterator[Callable[..., Service]]:
    """Yield a function that starts a service: by the number of workers, gunicorn's arguments and the environment."""
    with contextlib.ExitStack() as stack:

        def start(workers: int, *arguments: str, **variables: str) -> Service:
            started = serve(make_directory("service"), "-w", str(workers), *arguments, config=config, **variables)
            service = stack.enter_context(started)
            service.wait_for_workers(workers + ("OVMS_REST_CONTROL_BIND" in variables))
            return service

        yield start


# --- Responses


def inferred(answer: Answer) -> bool:
    """Return whether a response is that to RELU."""
    return answer.status == 200 and answer.json()["outputs"][0]["data"] == [1, 0, 3, 0]


def is_filled(answer: Answer, value: float, size: int) -> bool:
    """Return whether a response is that to a `slow_models.fill`."""
    return answer.status == 200 and answer.body.endswith(np.full(size, value, np.float32).tobytes())


def fill(value: float, size: int, *fields: str) -> bytes:
    """Write an inference whose binary output has `size` numbers."""
    return infer("filling", slow_models.fill(value, size), *fields)


def works(service: Service) -> bool:
    """Return whether an inference on a new connection succeeds."""
    return inferred(parse(exchange(service, post(RELU_PATH, RELU, "Connection: close"), half=False), "POST")[0])


# --- Connections


@contextlib.contextmanager
def several(service: Service, count: int, *chunks: bytes) -> Iterator[list[socket.socket]]:
    """Open connections and send the same bytes on each."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(service, *chunks)) for _ in range(count)]


@contextlib.contextmanager
def used(service: Service, count: int) -> Iterator[list[socket.socket]]:
    """Open connections on each of which a request has been answered."""
    with several(service, count, LIVE) as connections:
        for connection in connections:
            receive(connection)
        yield connections


@contextlib.contextmanager
def connected_to_idle(service: Service) -> Iterator[socket.socket]:
    """Open a connection while all workers are idle, so that it goes to one with the fewest connections."""
    service.wait_until_idle()
    with used(service, 1) as (connection,):
        service.wait_until_idle()
        yield connection


@contextlib.contextmanager
def connected_with_small_buffer(service: Service, *chunks: bytes, size: int = 4096) -> Iterator[socket.socket]:
    """Open a connection with a small receive buffer, and send bytes."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        connection.connect(("127.0.0.1", service.port))
        for data in chunks:
            connection.sendall(data)
        yield connection


class Flood:
    """A connection on which requests are sent without end, and no response is read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._left = connection, b""
        connection.setblocking(False)

    def send(self) -> int:
        """Send as many bytes as the socket takes; return their number."""
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < MIB:
                self._left = self._left or LIVE * 1000
                count = self._connection.send(self._left)
                self._left = self._left[count:]
                sent += count
        return sent


def send_together(service: Service, requests: Sequence[bytes]) -> list[Answer]:
    """Have the only worker find all requests at once, one on each connection; return the responses."""
    with used(service, len(requests)) as connections:
        with contextlib.ExitStack() as stack:
            for pid in service.workers():  # and that of the control address, or the sender of spans
                stack.enter_context(stopped(service, pid))
            for connection, request in zip(connections, requests, strict=True):
                connection.sendall(request)
        return [receive(connection, "POST") for connection in connections]


def wait_until_read(service: Service) -> None:
    """Wait until the only worker has read what other connections were sent before."""
    with contextlib.closing(Barrier(service)) as barrier:
        barrier.wait()


def reset(connection: socket.socket) -> None:
    """Close a connection by a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
