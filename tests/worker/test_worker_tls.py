"""The worker behind TLS: requests, responses, ends of connections, and clients that fail in the handshake."""

import contextlib
import ssl

import pytest
from processes import stopped
from raw_http import LIVE, RELU, RELU_PATH, connected, head, is_closed, parse, post, post_chunked, receive
from workers import fill, inferred, is_filled, reset


@pytest.fixture(scope="module")
def tls(start_shared, certificate):
    cert, key = certificate
    return start_shared(1, "--certfile", cert, "--keyfile", key, OVMS_REST_HEAD_TIMEOUT_SECONDS="2")


@pytest.fixture
def secured(tls, certificate):
    """Open connections over TLS."""
    context = ssl.create_default_context(cafile=certificate[0])
    return lambda **options: context.wrap_socket(tls.connect(), server_hostname="127.0.0.1", **options)


def is_live(connection):
    connection.sendall(LIVE)
    return receive(connection).status == 200


def test_tls_is_served(secured):
    with secured() as connection:
        for _ in range(3):
            connection.sendall(LIVE + post(RELU_PATH, RELU))
            assert receive(connection).status == 200
            assert inferred(receive(connection, "POST"))
        connection.sendall(b"BROKEN\r\n\r\n")
        answer = receive(connection)
        assert (answer.status, list(answer.json())) == (400, ["error"])


def test_tls_in_pieces_and_in_bulk_is_read(secured):
    with secured() as connection:
        for byte in post(RELU_PATH, RELU) + post_chunked(RELU_PATH, RELU[:9], RELU[9:]):
            connection.sendall(bytes([byte]))
        assert [receive(connection, "POST").status for _ in range(2)] == [200, 200]
        for _ in range(2):
            connection.sendall(post(RELU_PATH, RELU.ljust(5_000_000)) + LIVE)
            assert inferred(receive(connection, "POST"))
            assert receive(connection).status == 200


def test_slow_readers_get_large_responses_over_tls(secured):
    """The unsent part of a record is sent while others infer."""
    with contextlib.ExitStack() as stack:
        connections = {value: stack.enter_context(secured()) for value in (1.5, 2.5, 3.5)}
        for value, connection in connections.items():
            connection.sendall(fill(value, 3_000_000) + LIVE)
        for _ in range(3):
            with secured() as other:
                other.sendall(fill(-1, 100))
                assert receive(other, "POST").status == 200
        for value, connection in connections.items():
            assert is_filled(receive(connection, "POST"), value, 3_000_000)
            assert receive(connection).status == 200


def test_tls_connection_is_closed_with_an_alert(secured):
    """RFC 9112 section 9.8: servers MUST attempt to initiate an exchange of closure alerts before closing."""
    for data in (head("GET", "/v2", "Connection: close"), b"BROKEN\r\n\r\n"):
        with secured(suppress_ragged_eofs=False) as connection:
            connection.sendall(data)
            received = b""
            while more := connection.recv(10_000):  # raises for an end without an alert
                received += more
            assert len(parse(received)) == 1


def test_clients_without_tls_do_not_affect_others(tls, secured):
    """Plain HTTP, no bytes, a handshake that ends in the middle, and a certificate that the client refuses."""
    before = tls.workers()
    with (
        connected(tls) as silent,
        connected(tls, b"\x16\x03\x01\x00\xf4\x01") as started,
        connected(tls, LIVE) as plain,
    ):
        assert is_closed(plain) or b"200" not in plain.recv(1000)
        with pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(tls.connect(), server_hostname="127.0.0.1")
        with secured() as connection:
            assert is_live(connection)
        assert is_closed(silent)
        assert is_closed(started)
    assert tls.workers() == before


def test_connection_reset_before_the_handshake_ends_no_worker(tls, secured):
    """The worker accepts it, and its first operation fails."""
    (pid,) = tls.workers()
    for data in (b"", b"\x16\x03\x01"):
        with stopped(tls, pid):
            for _ in range(3):
                with connected(tls, data) as connection:
                    reset(connection)
        with secured() as connection:
            assert is_live(connection)
    assert tls.workers() == [pid]
    assert "Traceback" not in tls.log
