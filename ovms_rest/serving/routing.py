"""From the target of a request to a responder, where Falcon's own ways differ from protocol.md section 1."""

import re
from typing import Any
from urllib.parse import unquote_to_bytes

import falcon
from falcon.routing import DefaultRouter, set_default_responders

_AUTHORITY = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/]*")
_SLASH_TOLERANT = frozenset({"GET", "HEAD", "OPTIONS"})


_INFERENCE = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


def is_inference(method: str, path: str) -> bool:
    """Tell whether a request infers, and so may have to wait; all others are answered at once. `path` is PATH_INFO."""
    return method == "POST" and path.endswith("/infer") and _INFERENCE.fullmatch(path) is not None


def read_inference(path: str) -> tuple[str, str | None]:
    """Return the model and the version, None when there is none, of the path of an inference."""
    found = _INFERENCE.fullmatch(path.encode("latin-1").decode("utf-8", "replace"))
    assert found is not None
    return found[1], found[2]


class Request(falcon.Request):
    """A request whose path keeps an encoded slash in a model's name and loses a slash at the end of a GET.

    WSGI decodes the path before it is split, so that the model `a%2Fready` would look like the readiness of `a`.
    """

    __slots__ = ()

    def __init__(self, env: dict[str, Any], options: falcon.RequestOptions | None = None) -> None:
        """Take the raw target where the server hands it on, as gunicorn does."""
        if "%2" in env.get("RAW_URI", ""):
            _keep_slashes(env)
        super().__init__(env, options)
        if self.path.endswith("/") and len(self.path) > 1 and self.method in _SLASH_TOLERANT:
            self.path = self.path[:-1]
        if self.method == "WEBSOCKET":
            self.method = "websocket"  # which Falcon keeps for itself in capitals


def _keep_slashes(env: dict[str, Any]) -> None:
    path = _AUTHORITY.sub("", env["RAW_URI"].partition("?")[0]).replace("%2f", "%252F").replace("%2F", "%252F")
    path = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
    env["PATH_INFO"] = path.removeprefix(env.get("SCRIPT_NAME", ""))


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
    """Falcon's router, with `OPTIONS *`, 405 for methods unknown to it, and no path that begins with two slashes."""

    def __init__(self) -> None:
        """Prepare the one path that is none."""
        super().__init__()
        resource = _AnyPath()
        methods = self.map_http_methods(resource)
        set_default_responders(methods)
        self._asterisk: Any = (resource, methods, {}, "*")

    def find(self, uri: str, req: falcon.Request | None = None) -> Any:
        """Find the responders of a path."""
        if uri == "*":
            return self._asterisk
        return None if uri.startswith("//") else super().find(uri, req)

    def map_http_methods(self, resource: object, **kwargs: Any) -> dict[str, Any]:
        """Map the methods of a resource."""
        return _Methods(super().map_http_methods(resource, **kwargs))
