"""The console: static files of the package, read once, and what its page needs to know of the service.

Where there is a control address, the console is served there alone. Inferences are not, so the page sends them to the
service's own address (`console_origin`).
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import falcon
import orjson

from ovms_rest import __version__
from ovms_rest.errors import ForbiddenError, NotFoundError
from ovms_rest.resources.console_origin import ConsolePorts
from ovms_rest.resources.permission import Permission, find_foreign_page, is_proxied
from ovms_rest.shared_memory.recent_lines import RecentLines

FILES = Path(__file__).parents[1] / "console"
PAGE = "/console"
_TYPES = {
    ".html": falcon.MEDIA_HTML,
    ".css": "text/css; charset=utf-8",
    ".js": falcon.MEDIA_JS,
    ".svg": "image/svg+xml",
}
# The host of a Host header, which becomes a part of the policy below.
_HOST = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
# `blob:` and `data:` are the pictures that a user chooses, draws, or gets as an output.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'{service}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # asks each time, and gets 304 unless the service has been updated
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the console with the headers that depend on its content."""

    content: bytes
    media_type: str
    tag: str


def read_files(directory: Path = FILES) -> Mapping[str, File]:
    """Return the files below a directory by their paths in a URL; the page itself has the path ""."""
    return {
        "" if path.name == "index.html" else f"/{path.relative_to(directory).as_posix()}": _read(path)
        for path in sorted(directory.rglob("*"))
        if path.suffix in _TYPES
    }


def _read(path: Path) -> File:
    content = path.read_bytes()
    return File(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:32])


class ConsolePlace:
    """Where the console is served: in the control worker if there is one, else in every worker."""

    def __init__(self, is_on: bool, control_bind: str, is_control: Callable[[], bool], ports: ConsolePorts) -> None:
        self.is_on = is_on
        self._control_bind = control_bind
        self._is_control = is_control
        self._ports = ports

    def is_here(self) -> bool:
        """Return whether this process serves the console."""
        return self.is_on and (self._is_control() or not self._control_bind)

    def check(self) -> None:
        """Raise NotFoundError, with the reason, unless this process serves the console."""
        if not self.is_on:
            raise NotFoundError("the console is turned off; OVMS_REST_CONSOLE is false")
        if not self.is_here():
            raise NotFoundError(f"the console is served on the control address only, {self._control_bind}")

    def find_service(self, req: falcon.Request) -> str | None:
        """Return the scheme, host and port to which the page sends inferences, "" for its own, None if there is none.

        The host is that of the page's own URL. A proxy is expected to pass inferences on, too.
        """
        if not self._control_bind or is_proxied(req.env):
            return ""
        host = _HOST.fullmatch(req.get_header("Host") or "")
        return f"{req.scheme}://{host[1]}:{self._ports.service}" if host and self._ports.service else None


class ConsoleFile:
    """GET /console, and each of its files by a route of its own: no path of a request becomes one on the disk."""

    def __init__(self, file: File, place: ConsolePlace) -> None:
        self._file = file
        self._place = place

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the file, or 304 if the client has it."""
        self._place.check()
        if _has_slash(req):  # the page's links to its files are relative
            raise falcon.HTTPPermanentRedirect("../console")
        service = self._place.find_service(req)
        resp.set_headers(_HEADERS)
        resp.set_header("Content-Security-Policy", _POLICY.format(service=f" {service}" if service else ""))
        resp.set_header("ETag", f'"{self._file.tag}"')
        if any(tag in ("*", self._file.tag) for tag in req.if_none_match or ()):
            resp.status = 304
        else:
            resp.content_type = self._file.media_type
            resp.data = self._file.content

    on_head = on_get


class ConsoleSettings:
    """GET /console/settings."""

    def __init__(self, place: ConsolePlace, permission: Permission) -> None:
        self._place = place
        self._permission = permission

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the version, the address for inferences, and why this client may not change the service."""
        self._place.check()
        resp.set_headers(_HEADERS)
        resp.data = orjson.dumps(
            {
                "version": __version__,
                "service": self._place.find_service(req),
                "obstacle": self._permission.find_obstacle(req.env),
            }
        )

    on_head = on_get


class ConsoleErrors:
    """GET /console/errors."""

    def __init__(self, place: ConsolePlace, lines: RecentLines) -> None:
        self._place = place
        self._lines = lines

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the last warnings and errors of all processes, the newest at the end.

        CORS may be on for all routes, but the log is no web page's of another site.
        """
        self._place.check()
        if foreign := find_foreign_page(req.env):
            raise ForbiddenError(f"{req.method} {req.path} is not allowed for web pages of other sites: {foreign}")
        resp.set_headers(_HEADERS)
        resp.data = orjson.dumps({"lines": [line._asdict() for line in self._lines.read()]})

    on_head = on_get


def _has_slash(req: falcon.Request) -> bool:
    """Return whether the target of a request ends in a slash, which routing ignores."""
    return str(req.env.get("RAW_URI", "")).partition("?")[0].endswith(f"{PAGE}/")
