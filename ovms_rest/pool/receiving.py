"""Receiving bodies past gunicorn's own readers, which cut them into slices of 1 KB and copy each several times."""

from gunicorn.http.body import Body, LengthReader
from gunicorn.http.unreader import SocketUnreader

from ovms_rest.serving.body import Environ, receive_from_wsgi


def receive_from_gunicorn(environ: Environ, buffer: memoryview) -> int:
    """Receive a body from the socket straight into the buffer, as far as it did not come with the head."""
    body = environ["wsgi.input"]
    reader = body.reader if isinstance(body, Body) else None
    if not isinstance(reader, LengthReader) or not isinstance(reader.unreader, SocketUnreader):
        return receive_from_wsgi(environ, buffer)
    early = reader.unreader.take_buffered()
    received = min(len(early), len(buffer))
    buffer[:received] = early[:received]
    reader.unreader.unread(early[received:])  # of the next request
    while received < len(buffer):
        count = reader.unreader.sock.recv_into(buffer[received:])
        if not count:
            break
        received += count
    reader.length -= received
    return received
