"""From the target of a request to a responder, where Falcon's own ways differ from protocol.md section 1."""

from typing import Any

import falcon
from falcon.routing import DefaultRouter, set_default_responders

from ovms_rest.protocol.routes import OUTSIDE, drop_slash, read_path, read_script_name
from ovms_rest.protocol.words import escape, escape_lines

# Of so many paths, of no more characters, the responders are remembered.
_REMEMBERED = 256
_REMEMBERED_LENGTH = 256
# Falcon's: resource, responders by method, what the path names, and the template.
_Found = tuple[object, dict[str, Any], dict[str, Any], str | None]


class Request(falcon.Request):
    """A request whose path is that of `read_path`, which our worker has called already."""

    __slots__ = ()

    def __init__(self, env: dict[str, Any], options: falcon.RequestOptions | None = None) -> None:
        """Read the path from the raw target where the server hands it on, as gunicorn does."""
        target = env.get("RAW_URI", "")
        if "ovms_rest.path_is_read" not in env:
            script_name = read_script_name(env.get("SCRIPT_NAME", ""))
            env["PATH_INFO"] = read_path(target, script_name) if target else drop_slash(env["PATH_INFO"])
        super().__init__(env, options)
        if target and env["PATH_INFO"] == OUTSIDE:
            self.path = OUTSIDE  # which Falcon takes for the path "/"
        if self.method == "WEBSOCKET":
            self.method = "websocket"  # which Falcon keeps for itself in capitals

    def log_error(self, message: str) -> None:
        """Write to WSGI's error stream; Falcon would write the decoded path with its line breaks."""
        line = f"[ERROR] {self.method} {self.path} failed"
        self._wsgierrors.write(f"{escape(line)}\n  {escape_lines(message.rstrip())}\n")


class _Methods(dict[str, Any]):
    """The responders of a path by method; a method that nobody knows is one more that is not allowed."""

    def __missing__(self, method: str) -> Any:
        return self["CONNECT"]


class _AnyPath:
    """OPTIONS *."""

    def on_options(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the methods that some path allows."""
        resp.set_header("Allow", "GET, HEAD, OPTIONS, POST")


class Router(DefaultRouter):
    """Falcon's router, with `OPTIONS *`, 405 for methods unknown to it, and one slash at the beginning of a path.

    Falcon would ignore further ones, and find routes without any.
    """

    def __init__(self) -> None:
        """Prepare the one path that is none."""
        super().__init__()
        resource = _AnyPath()
        methods = self.map_http_methods(resource)
        set_default_responders(methods)
        self._asterisk: Any = (resource, methods, {}, "*")
        self._remembered: dict[str, _Found] = {}

    def find(self, uri: str, req: falcon.Request | None = None) -> Any:
        """Find the responders of a path."""
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
        """Add a route; what was found without it does not count any more."""
        self._remembered.clear()
        super().add_route(*arguments, **keywords)

    def map_http_methods(self, resource: object, **kwargs: Any) -> dict[str, Any]:
        """Map the methods of a resource."""
        return _Methods(super().map_http_methods(resource, **kwargs))
