"""Clients that vanish, dribble, close half of their connection, or read slowly; they use the models of slow_models."""

import contextlib
import random
import select
import socket
import struct
import time
from collections.abc import Callable

import slow_models
from raw_http import LIVE, RELU, RELU_PATH, infer, parse_all, post, receive, receive_rest
from service import Answer
from workers import inferred, is_filled

Connect = Callable[[], socket.socket]


def vanish(connect: Connect, generator: random.Random) -> None:
    """Disconnect at any moment, by closing or by a reset."""
    large = infer("filling", slow_models.fill(1, 1_000_000))
    kinds = [LIVE, post(RELU_PATH, RELU), large, infer("counting", slow_models.count(5000)), LIVE * 50]
    data = generator.choice(kinds)
    with connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data[: generator.choice((0, 10, len(data) // 2, len(data)))])
        if generator.random() < 0.5:
            select.select([connection], [], [], generator.random() * 0.02)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.recv(1000)
        if generator.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def dribble(connect: Connect, pause: float = 0.1) -> None:
    """Send a request in small pieces, on several connections together, and check the answers."""
    data = post(RELU_PATH, RELU, "Connection: close")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect()) for _ in range(20)]
        for start in range(0, len(data), 20):
            for connection in connections:
                connection.sendall(data[start : start + 20])
            time.sleep(pause)
        for connection in connections:
            answer = receive(connection, "POST")
            assert inferred(answer), answer


def half_close(connect: Connect, generator: random.Random) -> Answer | None:
    """Close the sending side after the request; return the answer, None if the connection ends without one."""
    steps = generator.randrange(1, 5000)
    with connect() as connection:
        connection.sendall(infer("counting", slow_models.count(steps), "Connection: close"))
        connection.shutdown(socket.SHUT_WR)
        answers = parse_all(receive_rest(connection), "POST")
    assert all(answer.status != 200 or answer.json()["outputs"][0]["data"] == [steps] for answer in answers), answers
    return answers[0] if answers else None


def read_slowly(connect: Connect, generator: random.Random) -> None:
    """Read a large response in small pieces, and check it."""
    value, size = generator.randrange(1, 1000), generator.randrange(1000, 2_000_000)
    with connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.sendall(infer("filling", slow_models.fill(value, size), "Connection: close"))
        received = []
        for _ in range(50):
            received.append(connection.recv(generator.randrange(1, 20_000)))
            time.sleep(0.01)
        received.append(receive_rest(connection))
        (answer,) = parse_all(b"".join(received), "POST")
        assert is_filled(answer, value, size), answer.status
