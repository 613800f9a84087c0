"""From where the service may be changed over HTTP: models loaded and unloaded, the log set."""

import ipaddress

import falcon

from ovms_rest.errors import ForbiddenError
from ovms_rest.settings import Settings

# What a proxy adds: the request came from this host, but its client need not have.
_FORWARDED = ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_X_REAL_IP")


class Permission:
    """Whether a request may change the service, by where it came from."""

    def __init__(self, settings: Settings) -> None:
        """Take what is allowed; `is_control_address` is set in the worker that serves that address."""
        self.is_possible = settings.model_control != "none"
        self.is_control_address = False
        self._settings = settings

    def describe(self) -> str:
        """Tell in words from where the service may be changed."""
        if self._settings.model_control == "auto":
            address = self._settings.control_bind
            return f"on the control address {address}" if address else "from this host"
        return "from everywhere" if self.is_possible else "from nowhere"

    def check(self, req: falcon.Request) -> None:
        """Raise ForbiddenError unless the request may change the service."""
        allowed = self._settings.model_control
        if allowed == "all" or (allowed == "auto" and self.is_control_address):
            return
        if allowed == "none":
            why = "is not allowed over HTTP"
        elif self._settings.control_bind:
            why = f"is allowed on the control address only, {self._settings.control_bind}"
        elif any(name in req.env for name in _FORWARDED):
            why = "is allowed from this host only, and not through a proxy"
        elif not _is_local(req.env["REMOTE_ADDR"]):
            why = "is allowed from this host only"
        else:
            return
        raise ForbiddenError(f"{req.method} {req.path} {why}; OVMS_REST_MODEL_CONTROL is {allowed!r}")


def _is_local(address: str) -> bool:
    """Tell whether a client is on this host; one on a Unix socket has no address."""
    if not address:
        return True
    try:
        client = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(client, "ipv4_mapped", None) or client).is_loopback
