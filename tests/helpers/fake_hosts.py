"""Hosts without a service: an HTTP server at a loopback address each, whose responses a test decides."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from service import free_port


class Received(NamedTuple):
    """A request as a host got it, and the host."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# Returns status and body; None closes the connection instead.
Respond = Callable[[Received], tuple[int, bytes] | None]


class FakeHosts:
    """Servers at 127.0.0.11, 127.0.0.12, ... on one port; `respond` answers for all of them."""

    def __init__(self, respond: Respond, count: int) -> None:
        self.respond = respond
        self.received: list[Received] = []
        self.port = free_port()
        self.names = [f"127.0.0.{11 + at}" for at in range(count)]
        self._servers = [ThreadingHTTPServer((name, self.port), self._handler(name)) for name in self.names]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()

    def _handler(self, name: str) -> type[BaseHTTPRequestHandler]:
        hosts = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                request = Received(name, self.command, self.path, headers, body)
                hosts.received.append(request)
                response = hosts.respond(request)
                if response is None:
                    self.close_connection = True
                    return
                status, content = response
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if content.endswith(CUT_OFF):
                    content, self.close_connection = content.removesuffix(CUT_OFF), True
                self.wfile.write(content)

            do_GET = do_POST = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


# The end of a body that a host announces and does not send.
CUT_OFF = b"<cut off>"


@contextlib.contextmanager
def fake_hosts(respond: Respond, count: int = 3) -> Iterator[FakeHosts]:
    """Run hosts that respond so."""
    hosts = FakeHosts(respond, count)
    try:
        yield hosts
    finally:
        hosts.close()
