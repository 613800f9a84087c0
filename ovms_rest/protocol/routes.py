"""The path of a request, decoded once for all modules (protocol/README.md section 1)."""

import re
from urllib.parse import unquote_to_bytes

# RFC 3986 sections 3.1 and 3.2: scheme and authority, before the path in a target of absolute form.
_AUTHORITY = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*")
_ENCODED_SLASH = re.compile("%(?=2[Ff])")
_INFERENCE = re.compile(r"/v2/models/([^/]*)(?:/versions/([^/]*))?/infer")
# TensorFlow Serving's API. The verb follows the last colon, so a name may have colons.
_PREDICTION = re.compile(r"/v1/models/([^/]*)(?:/versions/([^/]*))?:predict")
# OVMS's clients ask for this version when their callers name none.
_DEFAULT_VERSION = "0"

# The path of a request outside SCRIPT_NAME; it matches no route.
OUTSIDE = ""


def read_script_name(variable: str) -> str:
    """Return the path at which the service is mounted, "" for the root, in WSGI's form, from SCRIPT_NAME."""
    name = variable.strip("/").encode(errors="surrogateescape").decode("latin-1")
    return f"/{name}" if name else ""


def read_path(target: str, script_name: str = "") -> str:
    """Return the path of a request target below `script_name` as WSGI's PATH_INFO; OUTSIDE if it is not below it.

    Percent-encoding is decoded except that of a slash, so that the model `a%2Fready` does not look like the readiness
    of `a`. A slash at the end is dropped.
    """
    path = target.partition("?")[0]
    if not path.startswith("/"):
        if path == "*":
            return path
        if authority := _AUTHORITY.match(path):
            path = path[authority.end() :] or "/"
    if "%" in path:
        path = unquote_to_bytes(_ENCODED_SLASH.sub("%25", path).encode("latin-1")).decode("latin-1")
    if script_name:
        if not f"{path}/".startswith(f"{script_name}/"):
            return OUTSIDE
        path = path[len(script_name) :] or "/"
    return drop_slash(path)


def read_authority(target: str) -> str | None:
    """Return host and port of a target of absolute form, None for any other target."""
    authority = _AUTHORITY.match(target.partition("?")[0])
    return None if authority is None else authority[0].partition("://")[2].rpartition("@")[2]


def drop_slash(path: str) -> str:
    """Return a path without the slash at its end."""
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


def read_inference(method: str, path: str) -> tuple[str, str | None] | None:
    """Return model and version (or None) of an inference, None for any other request; `path` is from `read_path`."""
    if method != "POST":
        return None
    if path.endswith("/infer"):
        found = _INFERENCE.fullmatch(path)
    elif is_prediction(path):
        found = _PREDICTION.fullmatch(path)
    else:
        return None
    if found is None:
        return None
    name, version = (part and part.encode("latin-1").decode("utf-8", "replace") for part in found.groups())
    return name, read_version(version) if found.re is _PREDICTION else version


def is_prediction(path: str) -> bool:
    """Return whether the path of an inference is that of TensorFlow Serving's API."""
    return path.endswith(":predict")


def read_version(version: str | None) -> str | None:
    """Return the version in a path of TensorFlow Serving's API, None for the default one."""
    return None if version == _DEFAULT_VERSION else version
