"""Cross-origin access for the console's page where the console is on the control address.

The page sends inferences to the service's own address, which is another origin by its port. That address allows by CORS
this one origin: the host that the request itself names, at the port of the control address.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import falcon

from ovms_rest.resources.permission import split_port

_READING = ("GET", "HEAD")
_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Expose-Headers": "*",
    "Access-Control-Max-Age": "600",
    "Vary": "Origin",
}


@dataclass(slots=True)
class ConsolePorts:
    """The TCP ports of the service and of the control address, None without one; set before workers are forked."""

    service: int | None = None
    control: int | None = None


class ConsoleOrigin:
    """Falcon middleware that lets the console's page read responses: all to GET, and those to inferences."""

    def __init__(self, ports: ConsolePorts) -> None:
        self._ports = ports

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Add the headers."""
        if "HTTP_ORIGIN" in req.env:
            resp.set_headers(self.find_headers(req.env))

    def find_headers(self, environ: Mapping[str, Any]) -> dict[str, str]:
        """Return the headers for the response to a request, none unless it comes from the console's page."""
        origin, port = environ.get("HTTP_ORIGIN"), self._ports.control
        if origin is None or port is None or not _is_open(environ):
            return {}
        scheme, _, authority = origin.partition("://")
        host, _ = split_port(environ.get("HTTP_HOST", ""), scheme)
        if scheme != environ.get("wsgi.url_scheme") or split_port(authority, scheme) != (host, str(port)):
            return {}
        return {"Access-Control-Allow-Origin": origin, **_HEADERS}


def _is_open(environ: Mapping[str, Any]) -> bool:
    """Return whether a request, or the one that a preflight announces, only reads or infers."""
    method = environ.get("REQUEST_METHOD")
    if method == "OPTIONS":
        method = environ.get("HTTP_ACCESS_CONTROL_REQUEST_METHOD", "")
    return method in _READING or (method == "POST" and environ.get("PATH_INFO", "").endswith(("/infer", ":predict")))
