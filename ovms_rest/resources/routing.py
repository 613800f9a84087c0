"""From the target of a request to its responder, where protocol/README.md section 1 differs from Falcon."""

from typing import Any

import falcon
from falcon.responders import create_default_options
from falcon.routing import DefaultRouter, set_default_responders

from ovms_rest.protocol.routes import OUTSIDE, drop_slash, read_path, read_script_name
from ovms_rest.protocol.words import escape, escape_lines
from ovms_rest.tracing.context import read_context_of

# The router remembers the responders of this many paths, of this many characters at most.
_REMEMBERED = 256
_REMEMBERED_LENGTH = 256
# Falcon's result: resource, responders by method, parameters of the path, and the template.
_Found = tuple[object, dict[str, Any], dict[str, Any], str | None]


class Request(falcon.Request):
    """A request whose path comes from `read_path`: our worker has called it; for other servers it is called here."""

    __slots__ = ()

    def __init__(self, env: dict[str, Any], options: falcon.RequestOptions | None = None) -> None:
        if "ovms_rest.path_is_read" not in env:
            env["PATH_INFO"] = _read_path(env)
        super().__init__(env, options)
        if env["PATH_INFO"] == OUTSIDE and env.get("RAW_URI"):
            self.path = OUTSIDE  # Falcon has made it "/"
        if self.method == "WEBSOCKET":
            self.method = "websocket"  # Falcon uses the upper-case name itself

    def log_error(self, message: str) -> None:
        """Write to WSGI's error stream with line breaks escaped, which Falcon would write as they are."""
        context = read_context_of(self.env)
        trace = "" if context is None else f" (trace {context.trace_id})"
        line = f"[ERROR] {self.method} {self.path} failed{trace}"
        self._wsgierrors.write(f"{escape(line)}\n  {escape_lines(message.rstrip())}\n")


def _read_path(environ: dict[str, Any]) -> str:
    """Return the path of a request, from the raw target if the server hands it on, as gunicorn does."""
    if target := environ.get("RAW_URI"):
        return read_path(target, read_script_name(environ.get("SCRIPT_NAME", "")))
    return drop_slash(environ["PATH_INFO"])


class _Methods(dict[str, Any]):
    """The responders of a path by method; an unknown method is answered 405 like CONNECT."""

    def __missing__(self, method: str) -> Any:
        return self["CONNECT"]


class _AnyPath:
    """OPTIONS *."""

    def on_options(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Respond with the methods that at least one path allows."""
        resp.set_header("Allow", "GET, HEAD, OPTIONS, POST")


class Router(DefaultRouter):
    """Falcon's router, with `OPTIONS *`, 405 for unknown methods, and exactly one slash at the beginning of a path.

    `Allow` lists OPTIONS in the responses to OPTIONS too, which Falcon lists only in those with 405.

    Falcon would find routes for paths with several slashes there, or without any.
    """

    def __init__(self) -> None:
        super().__init__()
        resource = _AnyPath()
        methods = self.map_http_methods(resource)
        set_default_responders(methods)
        self._asterisk: Any = (resource, methods, {}, "*")
        self._remembered: dict[str, _Found] = {}

    def find(self, uri: str, req: falcon.Request | None = None) -> Any:
        """Return the responders of a path, None for an unknown path."""
        if remembered := self._remembered.get(uri):
            resource, methods, parameters, template = remembered
            return resource, methods, parameters.copy(), template
        if uri == "*":
            return self._asterisk
        if uri.startswith("//") or not uri.startswith("/"):
            return None
        found: _Found | None = super().find(uri, req)
        if found is not None and len(uri) <= _REMEMBERED_LENGTH:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            resource, methods, parameters, template = found
            self._remembered[uri] = resource, methods, parameters.copy(), template
        return found

    def add_route(self, *arguments: Any, **keywords: Any) -> None:
        """Add a route, and forget the remembered paths, which it may match."""
        self._remembered.clear()
        super().add_route(*arguments, **keywords)

    def map_http_methods(self, resource: object, **kwargs: Any) -> dict[str, Any]:
        """Return the responders of a resource by method."""
        methods = _Methods(super().map_http_methods(resource, **kwargs))
        if "OPTIONS" not in methods:
            methods["OPTIONS"] = create_default_options(sorted([*methods, "OPTIONS"]))
        return methods
