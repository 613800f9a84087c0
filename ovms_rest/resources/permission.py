"""Permission to change the service over HTTP: to load and unload models, and to change the log's settings."""

import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any

import falcon

from ovms_rest.errors import ForbiddenError
from ovms_rest.protocol.routes import read_authority
from ovms_rest.protocol.words import quote
from ovms_rest.settings import Settings

# Headers that a proxy adds: the proxy may be on this host while its client is not.
_PROXY_HEADERS = ("HTTP_FORWARDED", "HTTP_X_FORWARDED", "HTTP_X_REAL_IP", "HTTP_VIA")
# Values of Sec-Fetch-Site for a page of the service itself, and for a URL typed by the user.
_OWN_SITES = ("same-origin", "none")
_PORTS = {"http": "80", "https": "443"}

Environ = Mapping[str, Any]


class Permission:
    """Decides by the origin of a request whether it may change the service."""

    def __init__(self, settings: Settings, is_control: Callable[[], bool] = lambda: False) -> None:
        self._is_control = is_control  # whether this process is the control worker
        self._allowed = settings.model_control
        self._control_bind = settings.control_bind

    def describe(self) -> str:
        """Return from where the service may be changed, for the log."""
        if self._allowed == "all":
            return "from anywhere"
        where = [f"on the control address {self._control_bind}"] if self._control_bind else []
        if self._allowed == "local":
            return " and ".join(["from this host", *where])
        if self._allowed == "auto":
            return "".join(where) or "disabled, as OVMS_REST_CONTROL_BIND is not set"
        return "disabled"

    def check(self, req: falcon.Request) -> None:
        """Raise ForbiddenError, with the setting that would allow it, unless the request may change the service."""
        if reason := self.find_obstacle(req.env):
            raise ForbiddenError(f"{req.method} {req.path} {reason}")

    def check_page(self, req: falcon.Request) -> None:
        """Raise ForbiddenError for a request of a page of another site, unless changes are allowed from anywhere."""
        if self._allowed != "all" and (problem := self._find_page(req.env)):
            raise ForbiddenError(f"{req.method} {req.path} {problem}")

    def find_obstacle(self, environ: Environ) -> str | None:
        """Return why a request may not change the service, "is not allowed ...", None if it may."""
        if self._allowed == "all":
            return None
        if self._allowed == "none":
            return "is not allowed over HTTP; OVMS_REST_MODEL_CONTROL is 'none'"
        if self._is_control():
            return self._find_page(environ)
        if self._allowed == "local":
            problem = self._find_foreign(environ)
            return problem and (
                "is allowed from this host only, not through a proxy or from a web page of another site: "
                f"{problem}; OVMS_REST_MODEL_CONTROL is 'local'; 'all' would allow it from anywhere"
            )
        if self._control_bind:
            return (
                f"is allowed on the control address only, {self._control_bind}; OVMS_REST_MODEL_CONTROL is 'auto'; "
                "'local' would allow it from this host too"
            )
        return (
            "is allowed on a control address only, and none is configured; OVMS_REST_CONTROL_BIND sets one; "
            "OVMS_REST_MODEL_CONTROL=local would allow it from this host"
        )

    def _find_page(self, environ: Environ) -> str | None:
        """Return why a request of a web page is not allowed, None if it is, and for all other requests."""
        if not _is_from_page(environ):
            return None
        problem = find_foreign_page(environ)
        if self._is_control():  # which a browser on this host can reach; tools and proxies may use any name for it
            problem = problem or self._find_foreign_host(environ)
        return f"is not allowed for web pages of other sites: {problem}" if problem else None

    def _find_foreign(self, environ: Environ) -> str | None:
        """Return the evidence that a request does not come from this host, None if there is none."""
        address = environ["REMOTE_ADDR"]
        if not _is_loopback(address or "127.0.0.1"):  # a client on a Unix socket has no address
            return f"the request comes from {address}"
        for key in environ:
            if key.startswith(_PROXY_HEADERS):
                return f"the request has the header {key.removeprefix('HTTP_').replace('_', '-').title()}"
        return find_foreign_page(environ, behind_proxy=False) or self._find_foreign_host(environ)

    def _find_foreign_host(self, environ: Environ) -> str | None:
        """Return the evidence that a request is addressed to another host, as after DNS rebinding, None if not."""
        names = {"localhost", socket.gethostname().lower()}
        if self._control_bind and not self._control_bind.startswith("unix:"):
            names.add(split_port(self._control_bind)[0])
        for host in (environ.get("HTTP_HOST"), read_authority(environ.get("RAW_URI", ""))):
            if host is None:
                continue
            name = split_port(host)[0].removesuffix(".")
            if name not in names and not name.endswith(".localhost") and not _is_own_address(name):
                return f"{quote(host)} is not a name or address of this host"
        return None


def is_proxied(environ: Environ) -> bool:
    """Return whether a request has a header that a proxy adds."""
    return any(key.startswith(_PROXY_HEADERS) for key in environ)


def _is_from_page(environ: Environ) -> bool:
    """Return whether a request may come from a web page: browsers put one of these headers into every POST."""
    return "HTTP_ORIGIN" in environ or "HTTP_SEC_FETCH_SITE" in environ


def find_foreign_page(environ: Environ, behind_proxy: bool = True) -> str | None:
    """Return the header that shows that a page of another origin sent a request, None if there is none.

    A proxy may change Host, but not Sec-Fetch-Site.
    """
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site is not None and site not in _OWN_SITES:
        return f"Sec-Fetch-Site is {quote(site)}"
    if origin is None or (site is not None and behind_proxy):
        return None
    scheme, _, authority = origin.partition("://")
    if split_port(authority, scheme) != split_port(environ.get("HTTP_HOST", ""), scheme):
        return f"Origin is {quote(origin)}"
    return None


def split_port(authority: str, scheme: str = "http") -> tuple[str, str]:
    """Return host and port of HOST:PORT, the host in lower case and without the brackets of an IPv6 address."""
    host, found, port = authority.rpartition(":")
    if not found or port.endswith("]"):
        host, port = authority, ""
    return host.lower().strip("[]"), port or _PORTS.get(scheme, "")


def _is_loopback(address: str) -> bool:
    try:
        client = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(client, "ipv4_mapped", None) or client).is_loopback


def _is_own_address(host: str) -> bool:
    """Return whether a socket can be bound to this IP address, which makes it one of this host."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return address.is_loopback  # without IPv6, for instance
    return not address.is_multicast
