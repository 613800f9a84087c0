"""Bodies past gunicorn's readers: straight from the socket, and not a byte of the next request."""

import socket

import pytest
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser

from ovms_rest.pool.receiving import receive_from_gunicorn


@pytest.fixture
def connection():
    client, server = socket.socketpair()
    with client, server:
        server.settimeout(10)
        yield client, RequestParser(Config(), server, ("127.0.0.1", 1))


def request(body, length=None):
    return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body) if length is None else length, body)


def receive(parser, length):
    buffer = memoryview(bytearray(length))
    received = receive_from_gunicorn({"wsgi.input": next(parser).body}, buffer)
    return received, bytes(buffer)


def test_a_body_that_came_with_its_head(connection):
    client, parser = connection
    client.sendall(request(b"abc"))
    assert receive(parser, 3) == (3, b"abc")


def test_a_body_larger_than_gunicorn_reads_at_once(connection):
    client, parser = connection
    body = bytes(range(256)) * 200
    client.sendall(request(body))
    assert receive(parser, len(body)) == (len(body), body)


def test_the_request_behind_it_is_left_for_later(connection):
    client, parser = connection
    client.sendall(request(b"abc") + request(b"defg"))
    assert receive(parser, 3) == (3, b"abc")
    assert receive(parser, 4) == (4, b"defg")


def test_a_body_that_ends_early(connection):
    client, parser = connection
    client.sendall(request(b"abc", length=5))
    client.shutdown(socket.SHUT_WR)
    assert receive(parser, 5) == (3, b"abc\0\0")


def test_a_chunked_body_goes_through_gunicorns_reader(connection):
    client, parser = connection
    client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert receive(parser, 5) == (5, b"abcde")
